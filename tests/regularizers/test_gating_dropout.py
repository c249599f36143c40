"""Gating Dropout against its rules in plain loops, in routers of several kinds, and on two processes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dropsurgery import SurgeryError, SurgeryWarning, apply_recipe
from dropsurgery.context import Context
from dropsurgery.records import GateFact, Site, TensorFact
from dropsurgery.regularizers.gating_dropout import (
    GatingDropout,
    decision,
    gating_dropout,
    mask_scores,
    relabel,
)
from tests.regularizers.toy_mixture import EXPERTS, FEATURES, Mixture, built, decisions, fact, skipping

# ---- the rules, token by token ----


def machines_by_hand(shape: tuple[int, ...], machines: int, along: int | None) -> np.ndarray:
    """The machine of each token of a `shape` without experts."""
    made = np.zeros(shape, int)
    for flat, place in enumerate(np.ndindex(*shape)):
        number, count = (flat, math.prod(shape)) if along is None else (place[along], shape[along])
        for machine in range(machines):
            if machine * count <= number * machines < (machine + 1) * count:
                made[place] = machine
    return made


def masked_by_hand(scores: np.ndarray, machine: np.ndarray, machines: int, low: float) -> np.ndarray:
    made = scores.copy()
    for *token, expert in np.ndindex(*scores.shape):
        if expert // (scores.shape[-1] // machines) != machine[tuple(token)]:
            made[(*token, expert)] = low
    return made


def relabelled_by_hand(indices: np.ndarray, machine: np.ndarray, machines: int, experts: int) -> np.ndarray:
    made, each = indices.copy(), experts // machines
    for *token, slot in np.ndindex(*indices.shape):
        made[(*token, slot)] = machine[tuple(token)] * each + indices[(*token, slot)] % each
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "machines"), [((12, 4), 4), ((12, 4), 2), ((7, 6), 3), ((2, 5, 6), 6), ((1, 4), 4)])
def test_scores_of_other_machines_are_masked(shape: tuple[int, ...], machines: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    scores = torch.randn(shape).to(dtype)
    y = gating_dropout(scores, 1.0, machines=machines)
    machine = machines_by_hand(shape[:-1], machines, None)
    low = torch.finfo(dtype).min / 2
    expected = masked_by_hand(scores.double().numpy(), machine, machines, low)
    assert y.dtype == dtype and y.isfinite().all() and np.array_equal(y.double().numpy(), expected)
    assert torch.equal(gating_dropout(scores, 0.0, machines=machines), scores)


@pytest.mark.parametrize(("shape", "along"), [((3, 8, 4), 1), ((3, 7, 4), 1), ((5, 3, 4), 0)])
def test_tokens_are_divided_along_an_axis(shape: tuple[int, ...], along: int) -> None:
    torch.manual_seed(0)
    scores = torch.randn(shape)
    expected = masked_by_hand(scores.numpy(), machines_by_hand(shape[:-1], 2, along), 2, -1.0)
    for axis in (along, along - 3):
        y = gating_dropout(scores, 1.0, machines=2, along=axis).numpy()
        assert np.array_equal(np.where(y < -1e30, -1.0, y), expected)
    other = masked_by_hand(scores.numpy(), machines_by_hand(shape[:-1], 2, None), 2, -1.0)
    assert not np.array_equal(other, expected)  # the control: divided as they lie


def test_experts_on_another_axis() -> None:
    torch.manual_seed(0)
    scores = torch.randn(3, 5, 4)
    for axis in (0, 1, -2):
        turned = gating_dropout(scores.movedim(-1, axis), 1.0, machines=2, axis=axis)
        assert torch.equal(turned.movedim(axis, -1), gating_dropout(scores, 1.0, machines=2))


@pytest.mark.parametrize(("shape", "machines"), [((12, 2), 2), ((9, 1), 4), ((2, 5, 2), 4), ((7, 3), 2)])
def test_indices_are_relabelled(shape: tuple[int, ...], machines: int) -> None:
    torch.manual_seed(0)
    indices = torch.randint(8, shape)
    y = gating_dropout(indices, 1.0, "relabel", experts=8, machines=machines)
    machine = machines_by_hand(shape[:-1], machines, None)
    assert y.dtype == indices.dtype
    assert np.array_equal(y.numpy(), relabelled_by_hand(indices.numpy(), machine, machines, 8))
    assert torch.equal(gating_dropout(indices, 0.0, "relabel", experts=8, machines=machines), indices)
    if shape[-1] == 1:  # one expert a token, without an axis for it
        alone = gating_dropout(indices[..., 0], 1.0, "relabel", experts=8, machines=machines)
        assert torch.equal(alone, y[..., 0])


def test_all_tokens_of_a_process_are_on_its_machine() -> None:
    torch.manual_seed(0)
    scores, indices = torch.randn(6, 4), torch.randint(4, (6, 2))
    for own in range(2):
        y = gating_dropout(scores, 1.0, machines=2, machine=own)
        assert ((y > -1e30) == (torch.arange(4) // 2 == own)).all()
        moved = gating_dropout(indices, 1.0, "relabel", experts=4, machines=2, machine=own)
        assert torch.equal(moved, 2 * own + indices % 2)


def test_a_given_decision_is_what_counts() -> None:
    scores, indices = torch.ones(4, 4), torch.tensor([[0], [1], [2], [3]])
    yes, no = torch.tensor(True), torch.tensor(False)
    assert (mask_scores(scores, yes, 1, 2)[:, :2] < -1e30).all() and torch.equal(mask_scores(scores, no, 1, 2), scores)
    assert relabel(indices, yes, 1, 2, 4).flatten().tolist() == [2, 3, 2, 3]
    assert relabel(indices, no, 1, 2, 4).flatten().tolist() == [0, 1, 2, 3]


def test_no_gradient_where_masked() -> None:
    torch.manual_seed(0)
    scores = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    y = gating_dropout(scores, 1.0, machines=2)
    y.backward(torch.ones_like(y))
    assert torch.equal(scores.grad == 0, y < -1e30) and set(scores.grad.flatten().tolist()) == {0.0, 1.0}


# ---- in routers ----


KINDS = ["normalised", "topk_softmax", "corrected"]
TOKENS = (16, FEATURES)


def tokens(shape: tuple[int, ...] = TOKENS) -> Tensor:
    torch.manual_seed(5)
    return torch.randn(shape)


def local_by_hand(mixture: Mixture, x: Tensor) -> Tensor:
    """Each token through the expert of its machine, of as many as there are experts."""
    rows = [mixture.experts[i * EXPERTS // len(x)](row) for i, row in enumerate(x)]
    return torch.stack(rows)


@pytest.mark.parametrize("kind", [*KINDS, "plain", "sigmoid"])
def test_1_nothing_changes_at_rate_0_and_in_eval(kind: str) -> None:
    x = tokens()
    plain = Mixture(kind)(x)
    assert torch.equal(Mixture(kind).with_dropout(0.0)(x), plain)
    dropped = Mixture(kind).with_dropout(1.0)
    assert not torch.equal(dropped(x), plain)
    dropped.router.at_scores.eval()
    assert torch.equal(dropped(x), plain)


@pytest.mark.parametrize("kind", KINDS)
def test_2_each_token_goes_to_the_expert_of_its_machine(kind: str) -> None:
    mixture, x = Mixture(kind).with_dropout(1.0), tokens()
    assert (mixture(x) - local_by_hand(mixture, x)).abs().max() <= 1e-6
    assert (Mixture(kind)(x) - local_by_hand(mixture, x)).abs().max() > 0.1


def test_2_sigmoid_keeps_the_weight_of_the_local_expert() -> None:
    mixture, x = Mixture("sigmoid").with_dropout(1.0), tokens()
    own = torch.arange(len(x)) * EXPERTS // len(x)
    weight = F.linear(x, mixture.router.weight).sigmoid().gather(1, own[:, None])
    assert (mixture(x) - local_by_hand(mixture, x) * weight).abs().max() <= 1e-6
    assert (mixture(x) - local_by_hand(mixture, x)).abs().max() > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_3_two_experts_a_machine(kind: str) -> None:
    mixture, x = Mixture(kind).with_dropout(1.0, virtual_ranks=2), tokens()
    _, weights, indices = mixture.router(x)
    assert torch.equal(indices // 2, (torch.arange(16) // 8)[:, None].expand(16, 2))
    assert torch.allclose(weights.sum(-1), torch.ones(16))
    mixture(x).square().sum().backward()
    assert mixture.router.weight.grad.abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_4_one_expert_a_machine_teaches_the_router_nothing(kind: str) -> None:
    mixture, x = Mixture(kind).with_dropout(1.0), tokens()
    mixture(x).square().sum().backward()
    grad = mixture.router.weight.grad
    assert grad.isfinite().all() and grad.abs().max() <= (1e-6 if kind == "corrected" else 0.0)
    free = Mixture(kind)
    free(x).square().sum().backward()
    assert free.router.weight.grad.abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_5_one_machine_is_the_identity_and_says_so(kind: str) -> None:
    x = tokens()
    with pytest.warns(SurgeryWarning, match=r"on one machine \(virtual_ranks=1\) .* is the identity"):
        mixture = Mixture(kind).with_dropout(1.0, virtual_ranks=1)
    assert torch.equal(mixture(x), Mixture(kind)(x))


def test_6_share_of_dropped_steps() -> None:
    p, steps = 0.3, 5000
    share = np.mean(decisions(p, steps))
    assert abs(share - p) <= 4 * math.sqrt(p * (1 - p) / steps)
    assert not abs(share - 0.35) <= 4 * math.sqrt(0.35 * 0.65 / steps)  # another rate would be seen


def test_decisions_hang_on_seed_step_and_gate_alone() -> None:
    first = decisions(0.5, 200)
    assert decisions(0.5, 200) == first
    for other in (decisions(0.5, 200, seed=1), decisions(0.5, 200, gate="b")):
        same = np.mean(np.equal(first, other))
        assert abs(same - 0.5) <= 4 * 0.5 / math.sqrt(200)
    torch.manual_seed(99)
    assert decisions(0.5, 50)[:50] == first[:50]
    model = decisions(0.5, 100, scope="model")
    assert decisions(0.5, 100, gate="b", scope="model") == model != first[:100]


def test_both_masks_of_a_gate_agree_also_without_a_seed() -> None:
    context = Context(None)
    layers = [built(0.5), built(0.5)]
    for layer, site in zip(layers, ("softmax", "add"), strict=True):
        layer.context, layer.site_id = context, site
    scores = torch.zeros(3, EXPERTS)
    found = [[bool((layer(scores) < 0).any()) for layer in layers] for _ in range(60)]
    assert all(a == b for a, b in found) and 10 < sum(a for a, _ in found) < 50


def test_a_step_or_each_of_its_forwards_is_dropped() -> None:
    """`per: step` holds for all forwards whose gradients are added up, `per: microbatch` for one."""
    scores = torch.zeros(1, EXPERTS)
    for per in ("step", "microbatch"):
        layer = built(0.5, seed=0, per=per)
        layer.context.one_batch = lambda: True
        steps = []
        for step in range(40):
            layer.context.step = step
            steps.append({bool((layer(scores) < 0).any()) for _ in range(6)})
        mixed = sum(len(found) == 2 for found in steps)
        assert mixed == 0 if per == "step" else mixed > 30
        assert {True, False} == set.union(*steps)


def test_8_finite_where_infinity_is_not() -> None:
    """A second expert chosen among what the first has left, as in sparsemixer: NaN where all the others are -inf."""

    def second(scores: Tensor) -> Tensor:
        left = scores.scatter(-1, scores.argmax(-1, keepdim=True), -math.inf)
        top = left.max(-1, keepdim=True)[0]
        factor = scores.abs().clamp(min=top)
        return left.masked_fill((top - scores) / factor > 0.02, -math.inf).softmax(-1)

    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        scores = torch.randn(8, EXPERTS).to(dtype).requires_grad_()
        masked = gating_dropout(scores, 1.0)
        assert masked.isfinite().all() and (masked + masked).isfinite().all()
        y = second(masked.float())
        y.square().sum().backward()
        assert y.isfinite().all() and scores.grad.isfinite().all()
        infinite = torch.where(masked < -1e4, -math.inf, masked)
        assert not infinite.isfinite().all() and second(infinite.float()).isnan().any()


def test_one_mask_does_not_do_where_a_bias_is_added() -> None:
    """The negative control of the second mask: with one, the bias chooses experts on other machines."""
    x = tokens()
    mixture = Mixture("corrected").with_dropout(1.0)
    expected = local_by_hand(mixture, x)
    assert (mixture(x) - expected).abs().max() <= 1e-6
    mixture.router.at_selection = nn.Identity()
    assert (mixture(x) - expected).abs().max() > 0.1


def test_one_entry_at_a_corrected_gate_is_told() -> None:
    def at(edge: str, gate: GateFact) -> Site:
        return Site(id=edge, module="", pattern="moe_gate", edge=edge, gate=gate)

    gate, free = fact(bias_corrected=True), fact(gate="b")
    assert not list(GatingDropout.incomplete([at("logits", gate), at("selection", gate), at("logits", free)]))
    (problem,) = GatingDropout.incomplete([at("logits", gate), at("logits", free)])
    assert "edge: selection" in problem
    (problem,) = GatingDropout.incomplete([at("selection", gate)])
    assert "edge: logits" in problem


def test_10_no_more_tokens_exceed_the_capacity() -> None:
    """Divided along the sequence, in which the router counts, all fit; divided as they lie, most do not."""
    x = tokens((4, 8, FEATURES))

    def kept(mixture: Mixture) -> int:
        return int((mixture.router(x)[1] > 0).sum())

    normal, dropped = Mixture("switch"), Mixture("switch").with_dropout(1.0)
    assert kept(dropped) == 32 >= kept(normal)
    dropped.router.at_scores.gate = fact(capacity_axis=None)
    assert kept(dropped) == 8 < kept(normal)


def test_modes_agree_where_weights_are_normalised_and_experts_alone() -> None:
    x = tokens()
    masked, relabelled = (Mixture("normalised").with_dropout(1.0, mode=mode)(x) for mode in ("mask", "relabel"))
    assert torch.allclose(masked, relabelled, atol=1e-6)
    masked, relabelled = (Mixture("plain", 1).with_dropout(1.0, mode=mode)(x) for mode in ("mask", "relabel"))
    assert not torch.allclose(masked, relabelled, atol=1e-2)
    mixture = Mixture("plain", 1)
    weight = mixture.router(x)[1]
    assert torch.allclose(relabelled, weight * local_by_hand(mixture, x), atol=1e-6)
    assert torch.allclose(masked, local_by_hand(mixture, x), atol=1e-6)


def test_raw_logits_stay() -> None:
    mixture, x = Mixture("normalised").with_dropout(1.0), tokens()
    assert torch.equal(mixture.router(x)[0], Mixture("normalised").router(x)[0])


# ---- checkpointing ----


class Private(nn.Module):
    """The wrong one: a generator of its own, which a repeated forward finds further on."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, scores: Tensor) -> Tensor:
        dropped = torch.rand((), generator=self.generator) < 0.5
        return mask_scores(scores, dropped, torch.arange(len(scores))[:, None] * EXPERTS // len(scores), EXPERTS)


@pytest.mark.parametrize("preserve", [True, False])
@pytest.mark.parametrize("seed", [None, 4])
def test_11_checkpointing_meets_the_same_decisions(seed: int | None, preserve: bool) -> None:
    def gradients(insert: Callable[[], Any], repeated: bool) -> list[Tensor]:
        torch.manual_seed(1)
        mixture, found = Mixture("normalised"), []
        mixture.router.at_scores = inserted = insert()
        for step in range(20):
            if isinstance(inserted, GatingDropout):
                inserted.context.step = step
            mixture.zero_grad()
            x = tokens().requires_grad_()
            how = {"use_reentrant": False, "preserve_rng_state": preserve}
            y = checkpoint(mixture, x, **how) if repeated else mixture(x)
            y.square().sum().backward()
            found.append(torch.cat([p.grad.flatten() for p in mixture.parameters() if p.grad is not None]))
        return found

    def wrong(insert: Callable[[], Any]) -> int:
        pairs = zip(gradients(insert, False), gradients(insert, True), strict=True)
        return sum(not torch.allclose(a, b, atol=1e-6) for a, b in pairs)

    assert wrong(lambda: built(0.5, seed=seed)) == 0
    assert wrong(Private) >= 5


# ---- Gate-Expert-Drop ----


class Block(nn.Module):
    """A mixture that gives its logits too, as some do."""

    def __init__(self, pair: bool = False) -> None:
        super().__init__()
        self.mixture, self.pair, self.calls = Mixture("normalised"), pair, 0

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        flat = x.reshape(-1, FEATURES)
        y = self.mixture(flat).view(x.shape)
        return (y, self.mixture.router(flat)[1]) if self.pair else y


def test_12_a_dropped_block_gives_zeros_and_nothing_in_it_is_called() -> None:
    block, x = Block(), tokens((2, 6, FEATURES)).requires_grad_()
    layer = skipping(1.0, block)
    assert layer.kind == "swap" and GatingDropout().kind == "insert"
    y = layer(x)
    assert block.calls == 0 and torch.equal(y, torch.zeros_like(x)) and torch.equal(x + y, x)
    (x + y).square().sum().backward()
    assert all(parameter.grad is None for parameter in block.parameters())
    y = layer.eval()(x)
    assert torch.equal(y, block(x)) and block.calls == 2
    (x + skipping(0.0, block)(x)).square().sum().backward()
    assert any(parameter.grad is not None for parameter in block.parameters())  # the control


def test_12_blocks_that_give_more_than_one_tensor() -> None:
    block = Block(pair=True)
    layer = skipping(1.0, block)
    layer.returns = (TensorFact((2, 6, FEATURES), torch.float32), TensorFact((12, 2), torch.float32))
    first, second = layer(tokens((3, 5, FEATURES)))
    assert first.shape == (3, 5, FEATURES) and second.shape == (15, 2) and not first.any() and not second.any()
    layer.returns = (TensorFact((2, 6, FEATURES), torch.float32), TensorFact((2, 6, 4), torch.bfloat16))
    second = layer(tokens((3, 5, FEATURES)))[1]
    assert second.shape == (3, 5, 4) and second.dtype == torch.bfloat16


class Returned(NamedTuple):
    """What a block may give besides its output."""

    y: Tensor
    loss: Tensor
    counts: Tensor


class Telling(nn.Module):
    """A mixture that gives a loss as well, in a container of its own."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.s = nn.Linear(FEATURES, EXPERTS)
        self.e = nn.ModuleList(nn.Linear(FEATURES, FEATURES) for _ in range(EXPERTS))
        self.how = how

    def forward(self, *given: Tensor, **options: Any) -> Any:
        (x,) = given
        scores = self.s(x).softmax(-1)
        w, i = scores.topk(2)
        y = sum(((i == e) * w).sum(-1, keepdim=True) * expert(x) for e, expert in enumerate(self.e))
        made = Returned(y, (scores.mean((0, 1)) ** 2).sum(), (i == 0).sum())  # type: ignore[arg-type]
        return made if self.how == "named tuple" else made._asdict() if self.how == "dict" else tuple(made)


class Outer(nn.Module):
    """Reads what a mixture gives."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.m, self.how = Telling(how), how

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        made = self.m(x)
        if self.how == "named tuple":
            return x + made.y, made.loss, made.counts
        return (x + made["y"], made["loss"], made["counts"]) if self.how == "dict" else (x + made[0], *made[1:])


@pytest.mark.parametrize("how", ["tuple", "named tuple", "dict"])
def test_12_blocks_that_give_losses_and_counts(how: str) -> None:
    """By the recipe, of a forward that takes any arguments: zeros of each kind, on other tokens too."""
    net, x = Outer(how).eval(), tokens((3, 5, FEATURES))
    gm = apply_recipe(net, "gate_expert_drop_moe", example_inputs=tokens((2, 6, FEATURES)))
    for ours, theirs in zip(gm(x), net(x), strict=True):
        assert torch.equal(ours, theirs)
    (layer,) = gm.surgery.regularizers.values()
    layer.set_rate("p", 1.0)
    y, loss, counts = gm.train()(x)
    assert torch.equal(y, x) and loss.shape == counts.shape == () and not loss and not counts
    assert loss.dtype == torch.float32 and counts.dtype == torch.int64


def test_share_of_skipped_blocks() -> None:
    layer = skipping(0.3, block := Block())
    x, steps = tokens((1, 2, FEATURES)), 600
    for step in range(steps):
        layer.context.step = step
        layer(x)
    assert abs(block.calls / steps - 0.7) <= 4 * math.sqrt(0.21 / steps)


def test_a_compiled_block_decides_alike() -> None:
    """Computed and thrown away there: the same numbers."""
    block, x = Block(), tokens((2, 6, FEATURES))
    eager, other = skipping(0.5, block), skipping(0.5, block)
    compiled = torch.compile(other, backend="eager", fullgraph=True)
    seen = set()
    for step in range(8):
        eager.context.step = other.context.step = step
        y = compiled(x)
        assert torch.allclose(y, eager(x), atol=1e-6)
        seen.add(bool(y.any()))
    assert seen == {True, False}


# ---- refusals ----


def test_refusals() -> None:
    with pytest.raises(SurgeryError, match="virtual_ranks: expected a divisor of the number of experts, 4, got 3"):
        built(virtual_ranks=3)
    with pytest.raises(SurgeryError, match=r"gating_dropout at a: expected scores of experts \(\.\.\., E\)"):
        GatingDropout().build(channel_axis=1, channels=8, shape=(2, 8, 7, 7), site_id="a")
    with pytest.raises(SurgeryError, match=r"expected scores of experts .* of two or more experts"):
        GatingDropout().build(channel_axis=-1, channels=1, shape=(2, 1), site_id="a")
    with pytest.raises(SurgeryError, match=r"relabel, got scores; use `mode: mask` on edge logits"):
        built(mode="relabel")
    with pytest.raises(SurgeryError, match="got one that limits it: tokens relabelled to one expert"):
        built(gate=fact(axis=None, capacity_axis=-2), mode="relabel")
    with pytest.raises(SurgeryError, match=r"expected the scores of a gate .*got Block; .*`expert_drop: true`"):
        GatingDropout().bind(Block())
    with pytest.raises(SurgeryError, match="experts: expected their number where indices are relabelled"):
        gating_dropout(torch.zeros(3, 2, dtype=torch.long), 0.5, "relabel")
    for wrong in ({"mode": "both"}, {"scope": "net"}, {"per": "epoch"}, {"expert_drop": 1}, {"virtual_ranks": 0}):
        with pytest.raises(SurgeryError, match=f"{next(iter(wrong))}: expected"):
            GatingDropout(**wrong)


def test_processes_that_cannot_be_served_are_refused() -> None:
    layer = built(0.5, seed=0)
    layer.place = (0, 3)
    with pytest.raises(SurgeryError, match="processes: expected a divisor of the number of experts, 4, got 3"):
        layer(torch.zeros(2, EXPERTS))
    layer = built(0.5, fact(capacity_axis=-2), seed=0)
    layer.place = (0, 2)
    with pytest.raises(SurgeryError, match="divide each process's tokens with `virtual_ranks: 4`"):
        layer(torch.zeros(1, 2, EXPERTS))
    layer.virtual_ranks = 4
    layer(torch.zeros(1, 2, EXPERTS))
    layer = built(0.5)
    layer.place = (0, 2)
    with pytest.raises(SurgeryError, match=r"expected a seed.*one seed in all of them"):
        layer(torch.zeros(2, EXPERTS))
    layer.context = None
    with pytest.raises(SurgeryError, match="expected a seed"):
        layer(torch.zeros(2, EXPERTS))


def test_repr_and_share() -> None:
    assert repr(GatingDropout(0.3)) == "GatingDropout(p=0.3)"
    assert repr(GatingDropout(0.3, mode="relabel", virtual_ranks=2)) == (
        "GatingDropout(p=0.3, mode='relabel', virtual_ranks=2)"
    )
    assert GatingDropout(0.4).expected_drop((8, 4)) == pytest.approx(0.3)
    assert GatingDropout(0.4, virtual_ranks=2).expected_drop((8, 4)) == pytest.approx(0.2)
    assert GatingDropout(0.4, expert_drop=True).expected_drop((8, 4)) == 0.4


def test_decision_of_numbers() -> None:
    """The coin of a key is that of torch's generator seeded with it."""
    key = torch.tensor(11)
    u = torch.rand((), generator=torch.Generator().manual_seed(11))
    for p in (0.1, 0.5, 0.9):
        assert bool(decision(torch.tensor(p), key)) == bool(u < p)


def test_nothing_is_warned_of_with_several_machines() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        built(0.5)
