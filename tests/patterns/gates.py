"""Mixtures of experts in the spellings that are met in the wild, and what only looks like a gate.

Names say nothing on purpose. Each takes tokens (batch, length, 16) and gives (batch, length, 16), with 4 experts;
`GATES[name]` builds one, `NO_GATES[name]` is a pair of what builds one and a part of the reason why it is none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, EXPERTS = 16, 4


class Two(nn.Module):
    """An expert: two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.gelu(self.a(x)))


class Stacked(nn.Module):
    """All experts in two parameters, called with indices and weights."""

    def __init__(self) -> None:
        super().__init__()
        self.u = nn.Parameter(torch.randn(EXPERTS, 24, WIDTH) * 0.2)
        self.v = nn.Parameter(torch.randn(EXPERTS, WIDTH, 24) * 0.2)

    def forward(self, x: Tensor, i: Tensor, w: Tensor) -> Tensor:
        inner = F.silu(torch.einsum("td,tkfd->tkf", x, self.u[i]))
        return (torch.einsum("tkf,tkdf->tkd", inner, self.v[i]) * w.unsqueeze(-1)).sum(1)


class Looped(nn.Module):
    """All experts in two parameters, in a loop over those that any token goes to: numbers decide what runs."""

    def __init__(self) -> None:
        super().__init__()
        self.u = nn.Parameter(torch.randn(EXPERTS, 24, WIDTH) * 0.2)
        self.v = nn.Parameter(torch.randn(EXPERTS, WIDTH, 24) * 0.2)

    def forward(self, x: Tensor, i: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in i.unique():
            t, k = torch.where(i == e)
            y = F.linear(F.silu(F.linear(x[t], self.u[e])), self.v[e])
            out.index_add_(0, t, y * w[t, k, None])
        return out


class Listed(nn.ModuleList):
    """Experts in a list, in a loop over those that any token goes to."""

    def __init__(self) -> None:
        super().__init__(Two() for _ in range(EXPERTS))

    def forward(self, x: Tensor, i: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self):
            t, k = torch.where(i == e)
            if t.numel():
                out.index_add_(0, t, expert(x[t]) * w[t, k, None])
        return out


class Router(nn.Module):
    """What scores and chooses, in a module of its own; `route` is how."""

    def __init__(self, route: Callable[..., Any], width: int = EXPERTS) -> None:
        super().__init__()
        self.m = nn.Parameter(torch.randn(width, WIDTH))
        self.register_buffer("c", torch.linspace(-1.0, 1.0, width))
        self.route = route

    def forward(self, x: Tensor) -> Any:
        return self.route(self, x)


class Block(nn.Module):
    """A router and experts that it calls with indices and weights."""

    def __init__(self, router: nn.Module, experts: nn.Module) -> None:
        super().__init__()
        self.p, self.q = router, experts

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        *_, w, i = self.p(flat)
        return self.q(flat, i, w).reshape(x.shape)


def _softmax_topk(net: Any, x: Tensor) -> Any:
    logits = F.linear(x, net.m)
    w, i = torch.topk(F.softmax(logits.float(), dim=-1), 2, dim=-1)
    w /= w.sum(-1, keepdim=True)
    return logits, w.to(x.dtype), i


def _topk_softmax(net: Any, x: Tensor) -> Any:
    logits = x @ net.m.t()
    values, i = logits.topk(2, dim=-1)
    return logits, values.softmax(dim=-1), i


def _sigmoid_bias_topk(net: Any, x: Tensor) -> Any:
    scores = torch.sigmoid(F.linear(x, net.m) * 0.5)
    i = torch.topk(scores + net.c, 2, dim=-1)[1]
    w = scores.gather(1, i)
    return w / (w.sum(-1, keepdim=True) + 1e-20), i


def _grouped(net: Any, x: Tensor, fill: float = float("-inf")) -> Any:
    """Experts in two groups, of which one is left."""
    logits = F.linear(x.float(), net.m.float())
    scores = logits.sigmoid()
    biased = scores + net.c
    groups = biased.view(-1, 2, EXPERTS // 2).topk(2, dim=-1)[0].sum(-1)
    mask = torch.zeros_like(groups).scatter_(1, groups.topk(1, dim=-1, sorted=False)[1], 1)
    mask = mask.unsqueeze(-1).expand(-1, 2, EXPERTS // 2).reshape(-1, EXPERTS)
    i = biased.masked_fill(~mask.bool(), fill).topk(2, dim=-1, sorted=False)[1]
    return logits, scores.gather(1, i) * 2.5, i


def _filled(net: Any, x: Tensor) -> Any:
    """The experts of the other group have the score zero: more than one that is masked."""
    return _grouped(net, x, 0.0)


def _softmax_bias_view(net: Any, x: Tensor) -> Any:
    scores = F.linear(x, net.m).softmax(-1)
    with torch.no_grad():
        i = (scores.view(-1, EXPERTS) + net.c.unsqueeze(0)).topk(2, dim=-1).indices
    return torch.take_along_dim(scores, i, dim=1), i


def _logits_bias_topk(net: Any, x: Tensor) -> Any:
    """The choice on logits with a bias, the weights of those without."""
    logits = F.linear(x, net.m)
    i = (logits + net.c).topk(2, dim=-1).indices
    return torch.softmax(logits.gather(-1, i), dim=-1), i


def _softplus_sqrt(net: Any, x: Tensor) -> Any:
    scores = F.softplus(F.linear(x, net.m)).sqrt()
    w, i = scores.topk(2, -1)
    return w / w.sum(-1, keepdim=True), i


def _sorted(net: Any, x: Tensor) -> Any:
    w, i = F.linear(x, net.m).softmax(-1).sort(dim=-1, descending=True)
    return w[:, :2], i[:, :2]


def _capped(net: Any, x: Tensor) -> Any:
    """Temperature and a soft cap on the logits; a scale for each expert on the weights."""
    logits = torch.tanh(F.linear(x, net.m) / 3.0) * 3.0
    w, i = torch.softmax(logits.float() / 0.7, -1).topk(2)
    return w * net.c[i].exp(), i


def _noisy(net: Any, x: Tensor) -> Any:
    """Noise that is scaled by something learned, in training."""
    logits = x @ net.m.t()
    if net.training:
        logits = logits + torch.randn_like(logits) * (F.softplus(x @ net.m.t().flip(1)) + 1e-2)
    values, i = logits.topk(2, dim=1)
    return F.softmax(values, dim=1), i


class Capacity(nn.Module):
    """One expert a token, as a mask, as long as there is room (counted along each sequence)."""

    def __init__(self) -> None:
        super().__init__()
        self.s = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.e = nn.ModuleDict({f"n{index}": Two() for index in range(EXPERTS)})
        self.kept = torch.float32

    def forward(self, x: Tensor) -> Tensor:
        self.given = x.dtype  # as some do
        self.s = self.s.to(self.kept)
        probabilities = F.softmax(self.s(x.to(self.kept)), dim=-1).to(self.given)
        mask = F.one_hot(probabilities.argmax(dim=-1), EXPERTS)
        mask = mask * (mask.cumsum(dim=-2) <= 4)
        top = probabilities.max(dim=-1).values.unsqueeze(-1)
        return sum(mask[..., e : e + 1] * top * expert(x) for e, expert in enumerate(self.e.values()))  # type: ignore[return-value]


class Scattered(nn.Linear):
    """A linear layer that chooses, and writes the weights to the places of the chosen."""

    def __init__(self) -> None:
        super().__init__(WIDTH, EXPERTS, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        logits = super().forward(x)
        values, i = torch.topk(logits, 1, dim=1)
        weights = torch.full_like(logits, float("-inf")).scatter_(1, i, values)
        return torch.sigmoid(weights.float()).to(x.dtype), logits


class AllAtOnce(nn.Module):
    """Each expert runs on all tokens, scaled by weights that are mostly zero."""

    def __init__(self) -> None:
        super().__init__()
        self.r = Scattered()
        self.u = nn.Parameter(torch.randn(EXPERTS, WIDTH, 24) * 0.2)
        self.v = nn.Parameter(torch.randn(EXPERTS, 24, WIDTH) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        w, _ = self.r(flat)
        routed = flat.repeat(EXPERTS, 1) * w.transpose(0, 1).reshape(-1, 1)
        hidden = torch.bmm(routed.view(EXPERTS, -1, WIDTH), self.u).relu()
        return torch.bmm(hidden, self.v).sum(0).reshape(x.shape)


class Perceptron(nn.Module):
    """Scores from several layers, and the choice in the block."""

    def __init__(self) -> None:
        super().__init__()
        self.s = nn.Sequential(nn.Linear(WIDTH, 8), nn.GELU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, EXPERTS))
        self.e = Stacked()

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        probabilities = torch.softmax(self.s(flat), dim=1)
        i = probabilities.topk(2, dim=1).indices
        return self.e(flat, i, probabilities.gather(1, i)).view_as(x)


class Bare(nn.Module):
    """A router that gives its logits alone; all the rest is the block's."""

    def __init__(self) -> None:
        super().__init__()
        self.r = Router(lambda net, x: F.linear(x.view(-1, WIDTH), net.m))
        self.e = Looped()

    def forward(self, x: Tensor) -> Tensor:
        w, i = F.softmax(self.r(x), dim=1, dtype=x.dtype).topk(2, dim=-1)
        return self.e(x.view(-1, WIDTH), i, w / torch.norm(w, p=1, dim=-1, keepdim=True)).view(x.shape)


class Dispatched(nn.Module):
    """Two experts a token, one after the other, dispatched by einsum over a table of places (GShard)."""

    def __init__(self) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.randn(WIDTH, EXPERTS))
        self.u = nn.Parameter(torch.randn(EXPERTS, WIDTH, 24) * 0.2)
        self.v = nn.Parameter(torch.randn(EXPERTS, 24, WIDTH) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        *_, length, _ = x.shape
        raw = torch.einsum("bnd,de->bne", x, self.g).softmax(dim=-1)
        first = F.one_hot(raw.argmax(dim=-1), EXPERTS).float()
        second = F.one_hot((raw * (1.0 - first)).argmax(dim=-1), EXPERTS).float()
        table = 0.0
        for mask in (first, second):
            place = (mask.cumsum(dim=1) - 1) * mask
            mask = mask * (place < length).float()
            weight = (raw * mask).sum(-1, keepdim=True) * mask
            table = table + weight.unsqueeze(-1) * F.one_hot(place.long(), length).float()
        inputs = torch.einsum("bnd,bnec->ebcd", x, (table != 0).float())
        outputs = torch.einsum("ebcf,efd->ebcd", torch.einsum("ebcd,edf->ebcf", inputs, self.u).relu(), self.v)
        return torch.einsum("ebcd,bnec->bnd", outputs, table)


class Thresholded(nn.Module):
    """Scores below the k-th are masked before the softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.s = nn.Linear(WIDTH, EXPERTS)
        self.e = nn.ModuleList(Two() for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        logits = self.s(x)
        least = logits.topk(2, dim=-1).values[..., -1:]
        w = logits.masked_fill(logits < least, float("-inf")).softmax(-1)
        return torch.stack([expert(x) for expert in self.e], -1).mul(w.unsqueeze(-2)).sum(-1)


class Multigate(nn.Module):
    """Two gates that mix the same stacked experts (MMoE)."""

    def __init__(self) -> None:
        super().__init__()
        self.e = nn.ModuleList(Two() for _ in range(EXPERTS))
        self.g = nn.ModuleList(nn.Linear(WIDTH, EXPERTS, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        all_of_them = torch.stack([expert(x) for expert in self.e], dim=2)
        tasks = [torch.matmul(gate(x).softmax(dim=-1).unsqueeze(2), all_of_them).squeeze(2) for gate in self.g]
        return tasks[0] + tasks[1]


class Kernels(nn.Module):
    """A weight that is mixed of experts for each sample (CondConv)."""

    def __init__(self) -> None:
        super().__init__()
        self.s = nn.Linear(WIDTH, EXPERTS)
        self.w = nn.Parameter(torch.randn(EXPERTS, WIDTH * WIDTH) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        routing = torch.sigmoid(self.s(x.mean(1)))
        weight = torch.matmul(routing, self.w).view(-1, WIDTH, WIDTH)
        return torch.bmm(x, weight)


class OneByOne(nn.Module):
    """Dense weights, sliced and multiplied expert by expert."""

    def __init__(self) -> None:
        super().__init__()
        self.s = nn.Linear(WIDTH, EXPERTS)
        self.e = nn.ModuleList(Two() for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        w = F.softmax(self.s(x), -1)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.e):
            out = out + w[..., e : e + 1] * expert(x)
        return out


class Hidden(nn.Module):
    """A router whose forward asks for numbers: only its layer is in reach."""

    def __init__(self) -> None:
        super().__init__()
        self.s = nn.Linear(WIDTH, EXPERTS)

    def forward(self, x: Tensor) -> Any:
        w, i = self.s(x).softmax(-1).topk(2)
        counts = [int(count) for count in torch.bincount(i.flatten(), minlength=EXPERTS).tolist()]
        return counts, w, i


class HiddenProduct(nn.Module):
    """The same, without any layer."""

    def __init__(self) -> None:
        super().__init__()
        self.m = nn.Parameter(torch.randn(EXPERTS, WIDTH))

    def forward(self, x: Tensor) -> Any:
        w, i = F.linear(x, self.m).softmax(-1).topk(2)
        return i.flatten().tolist(), w, i


class Grouped(nn.Module):
    """Two experts a token with room for each counted within groups; as many tokens in a group as there are experts."""

    def __init__(self) -> None:
        super().__init__()
        self.s = nn.Linear(WIDTH, EXPERTS)
        self.e = nn.ModuleList(Two() for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        groups = x.reshape(-1, EXPERTS, WIDTH) if x.numel() % (EXPERTS * WIDTH) == 0 else x
        scores = self.s(groups).softmax(-1)
        masks, left = [], scores
        for _ in range(2):
            masks.append(F.one_hot(left.argmax(-1), EXPERTS))
            left = left.masked_fill(masks[-1].bool(), float("-inf"))
        masks = [mask * (mask.cumsum(1) <= 3) for mask in masks]
        one, two = ((scores * mask).sum(-1, keepdim=True) for mask in masks)
        total = (one + two).clamp(min=1e-9)
        w = one / total * masks[0] + two / total * masks[1]
        return sum(w[..., e : e + 1] * expert(groups) for e, expert in enumerate(self.e)).reshape(x.shape)  # type: ignore[union-attr]


class Slots(nn.Module):
    """Room is counted along the sequence, of masks that have an axis for the k chosen besides."""

    def __init__(self) -> None:
        super().__init__()
        self.s = nn.Linear(WIDTH, EXPERTS)
        self.e = nn.ModuleList(Two() for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        w, i = self.s(x).softmax(-1).topk(2)
        mask = F.one_hot(i, EXPERTS)
        mask = mask * (mask.cumsum(1) <= 4)
        w = (w.unsqueeze(-1) * mask).sum(2)
        return sum(w[..., e : e + 1] * expert(x) for e, expert in enumerate(self.e))  # type: ignore[return-value]


class Turned(nn.Module):
    """Room is counted of masks whose first axis is the experts'."""

    def __init__(self) -> None:
        super().__init__()
        self.s = nn.Linear(WIDTH, EXPERTS)
        self.e = nn.ModuleList(Two() for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        w, i = self.s(flat).softmax(-1).max(-1)
        mask = F.one_hot(i, EXPERTS).t()
        mask = mask * (mask.cumsum(-1) <= 5)
        return sum((mask[e] * w)[:, None] * expert(flat) for e, expert in enumerate(self.e)).view(x.shape)  # type: ignore[union-attr]


class Sidelong(nn.Module):
    """The experts' axis is the second, and so is that of the chosen."""

    def __init__(self) -> None:
        super().__init__()
        self.s = nn.Linear(WIDTH, EXPERTS)
        self.e = nn.ModuleList(Two() for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        w, i = self.s(x).transpose(1, 2).softmax(1).topk(2, dim=1)
        return sum(((i == e) * w).sum(1)[..., None] * expert(x) for e, expert in enumerate(self.e))  # type: ignore[return-value]


class LookedUp(nn.Module):
    """Each token looks up the weights of its experts."""

    def __init__(self) -> None:
        super().__init__()
        self.s = nn.Linear(WIDTH, EXPERTS)
        self.u = nn.Parameter(torch.randn(EXPERTS, 24, WIDTH) * 0.2)
        self.v = nn.Parameter(torch.randn(EXPERTS, WIDTH, 24) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        w, i = self.s(x).softmax(-1).topk(2)
        hidden = torch.einsum("btd,btkfd->btkf", x, self.u[i]).relu()
        return torch.einsum("btkf,btkdf,btk->btd", hidden, self.v[i], w)


class Straight(nn.Module):
    """One expert a token by a straight-through estimator: the weights are the soft ones and what the choice adds."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.s = nn.Linear(WIDTH, EXPERTS)
        self.e = nn.ModuleList(Two() for _ in range(EXPERTS))
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        soft = self.s(x).softmax(-1)
        hard = F.one_hot(soft.argmax(-1), EXPERTS).to(x.dtype)
        w = hard - soft.detach() + soft if self.first else soft + (hard - soft).detach()
        return (torch.stack([expert(x) for expert in self.e], -1) * w.unsqueeze(-2)).sum(-1)


class Normed(nn.Module):
    """Scores are normalised before the softmax, as in gates that are built of a general block of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.s = nn.Sequential(nn.Linear(WIDTH, EXPERTS), nn.BatchNorm1d(EXPERTS), nn.Softmax(dim=1))
        self.e = nn.ModuleList(Two() for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        outputs = torch.cat([expert(flat).unsqueeze(1) for expert in self.e], dim=1)
        return torch.sum(torch.mul(self.s(flat).unsqueeze(-1), outputs), dim=1).view(x.shape)


class Twice(nn.Module):
    """Two gates, each with experts in a list of its own, in one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.s = nn.ModuleList(nn.Linear(WIDTH, EXPERTS) for _ in range(2))
        self.e = nn.ModuleList(nn.ModuleList(Two() for _ in range(EXPERTS)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for gate, experts in zip(self.s, self.e, strict=True):
            w, i = gate(x).softmax(-1).topk(2)
            x = sum(((i == e) * w).sum(-1, keepdim=True) * expert(x) for e, expert in enumerate(experts))  # type: ignore[assignment,arg-type]
        return x


class Balanced(nn.Module):
    """The bias is moved in training by how often each expert was chosen, which is counted."""

    def __init__(self) -> None:
        super().__init__()
        self.m = nn.Parameter(torch.randn(EXPERTS, WIDTH))
        self.register_buffer("c", torch.linspace(-0.3, 0.3, EXPERTS))
        self.e = nn.ModuleList(Two() for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        scores = torch.mm(x.reshape(-1, WIDTH), self.m.t()).sigmoid()
        i = (scores + self.c).topk(2, dim=-1)[1]
        w = scores.gather(1, i)
        if self.training:
            with torch.no_grad():
                load = torch.bincount(i.flatten(), minlength=EXPERTS).float()
                self.c.add_(torch.sign(load.mean() - load) * 0.01)
        flat = x.reshape(-1, WIDTH)
        return sum(((i == e) * w).sum(-1, keepdim=True) * expert(flat) for e, expert in enumerate(self.e)).view(x.shape)  # type: ignore[union-attr]


@dataclass(frozen=True)
class Case:
    """A mixture, and what is to be found of its gate; `free` experts can be masked without any effect."""

    build: Callable[[], nn.Module]
    order: str
    k: int | None = 2
    bias: bool = False
    count: int = 1
    capacity: int | None = None
    axis: int = -1


def _of(route: Callable[..., Any], experts: Callable[[], nn.Module] = Stacked) -> Callable[[], nn.Module]:
    return lambda: Block(Router(route), experts())


GATES: dict[str, Case] = {
    "softmax, topk": Case(_of(_softmax_topk), "softmax_topk"),
    "softmax, topk, loop": Case(_of(_softmax_topk, Looped), "softmax_topk"),
    "softmax, topk, list": Case(_of(_softmax_topk, Listed), "softmax_topk"),
    "topk, softmax": Case(_of(_topk_softmax), "topk_softmax"),
    "sigmoid, bias, topk": Case(_of(_sigmoid_bias_topk), "sigmoid_topk", bias=True),
    "groups": Case(_of(_grouped), "sigmoid_topk", bias=True),
    "groups, zeros": Case(_of(_filled), "sigmoid_topk", bias=True),
    "softmax, bias, view": Case(_of(_softmax_bias_view), "softmax_topk", bias=True),
    "bias, topk, softmax": Case(_of(_logits_bias_topk), "topk_softmax", bias=True),
    "softplus": Case(_of(_softplus_sqrt), "softplus_sqrt_topk"),
    "sort": Case(_of(_sorted), "softmax_topk", k=None),
    "capped": Case(_of(_capped), "softmax_topk"),
    "noisy": Case(_of(_noisy, Listed), "topk_softmax"),
    "capacity": Case(Capacity, "argmax_onehot", k=1, capacity=-2),
    "scattered": Case(AllAtOnce, "topk_sigmoid", k=1),
    "perceptron": Case(Perceptron, "softmax_topk"),
    "bare": Case(Bare, "softmax_topk"),
    "dispatched": Case(Dispatched, "argmax_onehot", capacity=-2),
    "thresholded": Case(Thresholded, "topk_softmax"),
    "multigate": Case(Multigate, "dense", k=None, count=2),
    "kernels": Case(Kernels, "dense", k=None),
    "one by one": Case(OneByOne, "dense", k=None),
    "hidden": Case(lambda: Block(Hidden(), Listed()), "unknown", k=None),
    "grouped": Case(Grouped, "argmax_onehot", capacity=-2),
    "slots": Case(Slots, "softmax_topk", capacity=-2),
    "turned": Case(Turned, "argmax_onehot", k=1, capacity=-2),
    "sidelong": Case(Sidelong, "softmax_topk", axis=-2),
    "looked up": Case(LookedUp, "softmax_topk"),
    "straight": Case(lambda: Straight(True), "argmax_onehot", k=1),
    "straight, detached": Case(lambda: Straight(False), "argmax_onehot", k=1),
    "normed": Case(Normed, "dense", k=None),
    "twice": Case(Twice, "softmax_topk", count=2),
    "balanced": Case(Balanced, "sigmoid_topk", bias=True),
}


# -- what is none ----------------------------------------------------------------------------------------------------
class Free(nn.Module):
    """Layers, parameters and a forward that is a function of them and the input."""

    def __init__(self, function: Callable[..., Tensor], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def _attention(net: Any, x: Tensor) -> Tensor:
    q, k, v = net.q(x), net.k(x), net.v(x)
    return (q @ k.transpose(1, 2)).softmax(-1) @ v


def _sparse_attention(net: Any, x: Tensor) -> Tensor:
    """Each token attends to the 4 best others."""
    q, k, v = net.q(x), net.k(x), net.v(x)
    scores, i = (q @ k.transpose(1, 2)).topk(4, dim=-1)
    return torch.einsum("btk,btkd->btd", scores.softmax(-1), v[torch.arange(x.shape[0])[:, None, None], i])


def _synthesizer(net: Any, x: Tensor) -> Tensor:
    """The weights of an attention from one layer, without keys."""
    return net.q(x).softmax(-1) @ net.v(x)


def _external(net: Any, x: Tensor) -> Tensor:
    """Attention to a memory of learned vectors."""
    return net.out(net.q(x).softmax(-1) @ net.memory)


def _squeeze(net: Any, x: Tensor) -> Tensor:
    return x * torch.sigmoid(net.v(F.relu(net.q(x.mean(1))))).unsqueeze(1)


def _of_one(net: Any, x: Tensor) -> Tensor:
    return torch.sigmoid(net.q(x)) * net.v(x)


def _soft(net: Any, x: Tensor) -> Tensor:
    """Slots for each expert: the softmax that dispatches is over tokens."""
    logits = torch.einsum("btd,ed->bte", x, net.m)
    slots = torch.einsum("bte,btd->bed", logits.softmax(dim=1), x)
    outputs = torch.stack([expert(slots[:, e]) for e, expert in enumerate(net.e)], dim=1)
    return torch.einsum("bte,bed->btd", logits.softmax(dim=2), outputs)


def _expert_choice(net: Any, x: Tensor) -> Tensor:
    """Experts choose tokens."""
    scores = F.linear(x, net.m).softmax(-1)
    w, i = scores.topk(2, dim=1)
    out = torch.zeros_like(x)
    for e, expert in enumerate(net.e):
        at = i[:, :, e, None].expand(-1, -1, x.shape[-1])
        out = out.scatter_add(1, at, expert(x.gather(1, at)) * w[:, :, e, None])
    return out


def _head(net: Any, x: Tensor) -> Tensor:
    return net.q(x.mean(1)).softmax(-1).topk(2).values


def _sampler(net: Any, x: Tensor) -> Tensor:
    """Words that are sampled among the likeliest."""
    values, i = net.words(x).topk(5, dim=-1)
    return torch.gather(i, -1, values.softmax(-1).argmax(-1, keepdim=True)).float()


def _sparsemixer(net: Any, x: Tensor) -> Tensor:
    logits = net.q(x)
    weights, places = [], []
    left = logits
    for _ in range(2):
        best, i = left.max(dim=-1, keepdim=True)
        factor = logits.abs().clamp(min=best)
        masked = left.masked_fill(((best - logits) / factor) > 0.02, float("-inf"))
        weights.append(masked.softmax(-1).gather(-1, i))
        places.append(i)
        left = logits.scatter(-1, i, float("-inf"))
    flat = x.flatten(0, 1)
    return net.e(flat, torch.cat(places, -1).flatten(0, 1), torch.cat(weights, -1).flatten(0, 1)).view_as(x)


def _hash(net: Any, x: Tensor) -> Tensor:
    flat = x.flatten(0, 1)
    i = net.table[(flat[:, :1] * 10).long().abs() % 8].view(-1, 2)
    return net.e(flat, i, F.softplus(net.q(flat)).gather(1, i)).view_as(x)


def _gated_unit(net: Any, x: Tensor) -> Tensor:
    one, other = net.q(x).chunk(2, dim=-1)
    return torch.sigmoid(one) * other


def _recurrent(net: Any, x: Tensor) -> Tensor:
    state, cell = torch.zeros_like(x[:, 0]), torch.zeros_like(x[:, 0])
    for step in range(3):
        i, f, g, o = net.q(torch.cat((x[:, step], state), -1)).chunk(4, dim=-1)
        cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
        state = torch.sigmoid(o) * torch.tanh(cell)
    return state


def _selective(net: Any, x: Tensor) -> Tensor:
    """Selective kernels: a softmax over branches for each channel."""
    branches = torch.stack([net.k(x), net.v(x)], 1)
    scores = net.q(branches.sum(1).mean(1)).view(-1, 2, WIDTH)
    return (branches * scores.softmax(1).unsqueeze(2)).sum(1)


def _conv_scores(net: Any, x: Tensor) -> Tensor:
    """Dynamic convolution whose scores a convolution makes."""
    pooled = x.transpose(1, 2).mean(-1, keepdim=True)
    scores = net.c(pooled).flatten(1).softmax(1)
    weight = (scores @ net.w).view(-1, WIDTH, WIDTH)
    return torch.bmm(x, weight)


def _pruned(net: Any, x: Tensor) -> Tensor:
    """Tokens are kept by their scores."""
    keep = net.q(x).sigmoid().squeeze(-1).topk(3, dim=1).indices
    return x.gather(1, keep.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def _blocks(net: Any, x: Tensor) -> Tensor:
    """As many blocks one after the other as there are classes."""
    for block in net.e:
        x = x + block(x)
    w, i = net.q(x).softmax(-1).topk(2)
    return x * w.sum(-1, keepdim=True) + i.sum(-1, keepdim=True)


def _blocks_in_python(net: Any, x: Tensor) -> Tensor:
    x = net.k(net.q(x))
    for block in net.e:
        x = x + block(x)
    return x if x.sum().item() > 1e9 else x + 1


def _head_in_python(net: Any, x: Tensor) -> Tensor:
    for block in net.e:
        x = x + block(x)
    scores = net.q(x).softmax(-1)
    return scores if scores.sum().item() > 1e9 else scores.max(-1).values


def _exits(net: Any, x: Tensor) -> Tensor:
    """A head behind each block, whose confidence is used."""
    told = []
    for block, head in zip(net.e, net.heads, strict=True):
        x = block(x)
        w, i = head(x).softmax(-1).max(-1, keepdim=True)
        told.append(w * i)
    return x * torch.stack(told).mean(0)


def _best_scores(net: Any, x: Tensor) -> Tensor:
    """Branches beside a classifier; who was chosen is told to none."""
    values, _ = net.q(x).softmax(-1).topk(2)
    return net.o(values) + sum(expert(x) for expert in net.e)


def _depth(net: Any, x: Tensor) -> Tensor:
    """What layers one after the other give is mixed."""
    hidden, w = [], net.q(x).softmax(-1)
    for block in net.e:
        x = block(x)
        hidden.append(x)
    return (torch.stack(hidden, -1) * w.unsqueeze(-2)).sum(-1)


def _codebook(net: Any, x: Tensor) -> Tensor:
    """A vector of a table for each token, straight through."""
    soft = net.q(x).softmax(-1)
    hard = F.one_hot(soft.argmax(-1), EXPERTS) + soft - soft.detach()
    return net.t(hard @ net.m + x)


def _words(net: Any, x: Tensor) -> Tensor:
    """The mean of the likeliest words' vectors."""
    values, i = (x @ net.words.weight.t()).topk(4)
    return (net.words(i) * values.softmax(-1).unsqueeze(-1)).sum(-2)


def _winners(net: Any, x: Tensor) -> Tensor:
    """Hidden units of which the largest are left."""
    hidden = net.q(x).sigmoid()
    return net.o(hidden * (hidden >= hidden.topk(5).values[..., -1:]))


def _layer(outputs: int, inputs: int = WIDTH) -> nn.Linear:
    return nn.Linear(inputs, outputs)


def _list() -> nn.ModuleList:
    return nn.ModuleList(Two() for _ in range(EXPERTS))


def _parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def _three() -> dict[str, nn.Module]:
    return {"q": _layer(WIDTH), "k": _layer(WIDTH), "v": _layer(WIDTH)}


NO_GATES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "attention": (lambda: Free(_attention, **_three()), "attention"),
    "sparse attention": (lambda: Free(_sparse_attention, **_three()), "attention"),
    "synthesizer": (lambda: Free(_synthesizer, q=_layer(6), v=_layer(WIDTH)), "attention"),
    "external attention": (
        lambda: Free(_external, q=_layer(6), memory=_parameter(6, WIDTH), out=_layer(WIDTH)),
        "attention",
    ),
    "squeeze": (lambda: Free(_squeeze, q=_layer(4), v=_layer(WIDTH, 4)), "squeeze and excitation"),
    "gate of one": (lambda: Free(_of_one, q=_layer(1), v=_layer(WIDTH)), "E = 1"),
    "soft mixture": (lambda: Free(_soft, m=_parameter(EXPERTS, WIDTH), e=_list()), "over tokens"),
    "expert choice": (lambda: Free(_expert_choice, m=_parameter(EXPERTS, WIDTH), e=_list()), "experts choose tokens"),
    "head": (lambda: Free(_head, q=_layer(10)), "candidate"),
    "sampler": (lambda: Free(_sampler, words=_layer(5000)), "vocabulary"),
    "sparsemixer": (lambda: Free(_sparsemixer, q=_layer(EXPERTS), e=Stacked()), "sparsemixer"),
    "hash": (
        lambda: Free(_hash, q=_layer(EXPERTS), e=Stacked(), table=nn.Parameter(torch.zeros(8, 2).long(), False)),
        "looked up",
    ),
    "gated unit": (lambda: Free(_gated_unit, q=_layer(2 * WIDTH)), ""),
    "recurrent": (lambda: Free(_recurrent, q=_layer(4 * WIDTH, 2 * WIDTH)), ""),
    "selective kernels": (lambda: Free(_selective, q=_layer(2 * WIDTH), k=_layer(WIDTH), v=_layer(WIDTH)), ""),
    "convolution": (
        lambda: Free(_conv_scores, c=nn.Conv1d(WIDTH, EXPERTS, 1), w=_parameter(EXPERTS, WIDTH * WIDTH)),
        "convolution",
    ),
    "pruned tokens": (lambda: Free(_pruned, q=_layer(1)), "E = 1"),
    "hidden product": (lambda: Block(HiddenProduct(), Stacked()), "tolist"),
    "blocks": (lambda: Free(_blocks, q=_layer(EXPERTS), e=_list()), "candidate"),
    "blocks in python": (lambda: Free(_blocks_in_python, q=_layer(EXPERTS), k=_layer(WIDTH, EXPERTS), e=_list()), ""),
    "head in python": (lambda: Free(_head_in_python, q=_layer(EXPERTS), e=_list()), ""),
    "early exits": (
        lambda: Free(_exits, e=_list(), heads=nn.ModuleList(_layer(EXPERTS) for _ in range(EXPERTS))),
        "candidate",
    ),
    "best scores": (lambda: Free(_best_scores, q=_layer(EXPERTS), o=_layer(WIDTH, 2), e=_list()), "a head"),
    "mixture of depths": (lambda: Free(_depth, q=_layer(EXPERTS), e=_list()), ""),
    "codebook": (
        lambda: Free(_codebook, q=_layer(EXPERTS), m=_parameter(EXPERTS, WIDTH), t=_layer(WIDTH)),
        "candidate",
    ),
    "likeliest words": (lambda: Free(_words, words=nn.Embedding(20, WIDTH)), "candidate"),
    "winners": (lambda: Free(_winners, q=_layer(32), o=_layer(WIDTH, 32)), "candidate"),
}
