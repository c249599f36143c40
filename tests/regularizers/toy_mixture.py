"""A mixture of experts with a router of each kind, and Gating Dropout in it, put there by hand."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dropsurgery.context import Context
from dropsurgery.records import GateFact
from dropsurgery.regularizers.gating_dropout import GatingDropout

EXPERTS, FEATURES = 4, 8


def fact(**changes: Any) -> GateFact:
    facts: dict[str, Any] = {
        "gate": "moe.gate#0",
        "experts": EXPERTS,
        "axis": -1,
        "k": 2,
        "scores": "softmax",
        "order": "softmax_topk",
        "bias_corrected": False,
        "capacity_axis": None,
        "returned": True,
    }
    return GateFact(**(facts | changes))


def built(p: float = 1.0, gate: GateFact | None = None, seed: int | None = None, **options: Any) -> GatingDropout:
    """One that was told of its gate, as in a model."""
    layer = GatingDropout(p, **options)
    layer.gate = gate or fact()
    layer.build(channel_axis=-1, channels=EXPERTS, shape=(6, EXPERTS), site_id="moe.softmax#0:moe_gate.logits")
    layer.context = Context(seed)
    return layer


class Router(nn.Module):
    """Routers as they are found, with a place for what is inserted: on scores, and behind a bias."""

    def __init__(self, kind: str, k: int = 2, capacity: int = 2) -> None:
        super().__init__()
        self.kind, self.k, self.capacity = kind, k, capacity
        self.weight = nn.Parameter(torch.randn(EXPERTS, FEATURES))
        self.register_buffer("bias", torch.randn(EXPERTS) * 3)
        self.at_scores: nn.Module = nn.Identity()
        self.at_selection: nn.Module = nn.Identity()
        self.at_indices: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The raw logits, and for each token the weights and the indices of its experts."""
        raw = F.linear(x, self.weight)
        weights, indices = getattr(self, self.kind)(self.at_scores(raw))
        return raw, weights, self.at_indices(indices)

    def normalised(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        weights, indices = scores.softmax(-1).topk(self.k)
        return weights / weights.sum(-1, keepdim=True), indices

    def plain(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(scores.softmax(-1).topk(self.k))

    def topk_softmax(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        top, indices = scores.topk(self.k)
        return top.softmax(-1), indices

    def sigmoid(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        top, indices = scores.topk(1)
        spread = torch.full_like(scores, -math.inf).scatter_(-1, indices, top).sigmoid()
        return spread.gather(-1, indices), indices

    def corrected(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        shares = scores.sigmoid()
        choice = self.at_selection(shares + self.bias)
        groups = choice.view(-1, 2, EXPERTS // 2).topk(2)[0].sum(-1)
        out = torch.zeros_like(groups).scatter_(1, groups.topk(1)[1], 1.0)
        allowed = out.unsqueeze(-1).expand(-1, 2, EXPERTS // 2).reshape(-1, EXPERTS).bool()
        indices = choice.masked_fill(~allowed, -math.inf).topk(self.k)[1]
        weights = shares.gather(1, indices)
        return weights / (weights.sum(-1, keepdim=True) + 1e-20), indices

    def switch(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Each expert takes `capacity` tokens of each sequence; the others get weight 0."""
        shares = scores.softmax(-1)
        chosen = F.one_hot(shares.argmax(-1), EXPERTS)
        kept = (chosen.cumsum(-2) <= self.capacity) * chosen
        return (shares * kept).amax(-1, keepdim=True), chosen.argmax(-1, keepdim=True)


class Mixture(nn.Module):
    def __init__(self, kind: str, k: int = 2, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router = Router(kind, k, **options)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(FEATURES, 12), nn.ReLU(), nn.Linear(12, FEATURES)) for _ in range(EXPERTS)
        )

    def forward(self, x: Tensor) -> Tensor:
        _, weights, indices = self.router(x)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            y = y + expert(x) * (weights * (indices == number)).sum(-1, keepdim=True)
        return y

    def with_dropout(self, p: float, **options: Any) -> Mixture:
        gate = fact(bias_corrected=self.router.kind == "corrected")
        if self.router.kind == "switch":
            gate = fact(capacity_axis=-2)
        if options.get("mode") == "relabel":
            self.router.at_indices = built(p, fact(axis=None), seed=1, **options)
            return self
        layer = built(p, gate, seed=1, **options)
        self.router.at_scores = self.router.at_selection = layer
        return self


def decisions(p: float, steps: int, seed: int = 0, gate: str = "a", **options: Any) -> list[bool]:
    """Whether each of many steps is dropped."""
    layer = built(p, fact(gate=gate), seed=seed, **options)
    scores, found = torch.zeros(1, EXPERTS), []
    for step in range(steps):
        layer.context.step = step
        found.append(bool((layer(scores) < 0).any()))
    return found


def skipping(p: float, block: nn.Module, seed: int | None = 0) -> GatingDropout:
    layer = GatingDropout(p, expert_drop=True)
    layer.context = Context(seed)
    layer.build(channel_axis=-1, channels=FEATURES, shape=(2, 6, FEATURES), site_id="moe#0:moe_gate.block")
    layer.bind(block)
    return layer
