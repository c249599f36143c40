"""The gates of mixtures of experts: found in every spelling, with the right facts; and where there is none, not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dropsurgery import apply_recipe
from dropsurgery.capture import Captured, capture
from dropsurgery.matching import find
from dropsurgery.patterns._gates import gate_at
from dropsurgery.patterns.moe_gate import PATTERN
from dropsurgery.planning import Sites
from dropsurgery.records import Edit, Site
from dropsurgery.rewriting import rewrite
from tests.patterns.gates import EXPERTS, GATES, NO_GATES

TOKENS = (2, 6, 16)


def tokens(seed: int = 0, shape: tuple[int, ...] = TOKENS) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    return GATES[name].build().eval()


class Keep(nn.Module):
    """Masks all experts but some, with a finite number."""

    def __init__(self, axis: int, kept: tuple[int, ...]) -> None:
        super().__init__()
        self.axis, self.kept = axis, kept

    def forward(self, logits: Tensor) -> Tensor:
        shape = [1] * logits.ndim
        shape[self.axis] = logits.shape[self.axis]
        mask = torch.zeros(shape[self.axis], dtype=torch.bool)
        mask[list(self.kept)] = True
        return torch.where(mask.view(shape), logits, torch.finfo(logits.dtype).min / 2)


class Same(nn.Module):
    """Changes nothing, and counts its calls."""

    calls = 0
    floating = True

    def forward(self, tensor: Tensor) -> Tensor:
        self.calls += 1
        self.floating = self.floating and tensor.is_floating_point()
        return tensor + 0


def inserted(captured: Captured, modules: dict[Any, nn.Module]) -> nn.Module:
    edits = [Edit(site, "insert", "dropout", 0.0, None, "test") for site in modules]
    by_id = {site.id: module for site, module in modules.items()}
    return rewrite(captured, edits, lambda edit: by_id[edit.site.id]).eval()


def sites_of(captured: Captured, edge: str) -> list[Site]:
    return Sites(captured).of("moe_gate", edge)


@pytest.mark.parametrize("name", GATES)
def test_the_gate_and_its_facts(name: str) -> None:
    case = GATES[name]
    captured = capture(built(name), tokens())
    found = find(captured.view.graph, PATTERN)
    assert len(found.matches) == case.count, [miss.reason for miss in found.misses]
    for site in sites_of(captured, "logits"):
        fact = site.gate
        assert fact is not None
        assert (fact.experts, fact.order, fact.k, fact.bias_corrected, fact.axis, fact.features) == (
            *(EXPERTS, case.order, case.k, case.bias, case.axis),
            8 if name == "perceptron" else 16,
        )
        assert fact.capacity_axis == case.capacity


def others_changed(net: nn.Module, kept: tuple[int, ...]) -> None:
    """Give other numbers to all experts but some: parameters of all of them, and lists of modules."""
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim > 1 and parameter.shape[0] == EXPERTS and parameter.shape[1:] != (16,):
                parameter[[e for e in range(EXPERTS) if e not in kept]] += 3
        for child in net.modules():
            if isinstance(child, (nn.ModuleList, nn.ModuleDict)) and len(child) == EXPERTS:
                for e, expert in enumerate(child.values() if isinstance(child, nn.ModuleDict) else child):
                    for parameter in expert.parameters() if e not in kept else ():
                        parameter += 3


KEPT = (1, 2)


@pytest.mark.parametrize("name", [name for name in GATES if name != "kernels"])
def test_masked_experts_have_no_part(name: str) -> None:
    """With all but two experts masked at `logits` and `selection`, the others can be anything."""
    net = built(name)
    captured = capture(net, tokens())
    sites = [site for edge in ("logits", "selection") for site in sites_of(captured, edge)]
    gm = inserted(captured, {site: Keep(site.gate.axis or -1, KEPT) for site in sites if site.gate})
    with torch.no_grad():
        before, plain = gm(tokens()), net(tokens())
        others_changed(net, KEPT)  # gm holds the same parameters
        after, changed = gm(tokens()), net(tokens())
    assert torch.equal(before, after)
    assert not torch.equal(plain, changed)  # without the mask they have one


@pytest.mark.parametrize("name", ["sigmoid, bias, topk", "groups", "groups, zeros", "softmax, bias, view"])
def test_one_mask_is_not_enough_behind_a_bias(name: str) -> None:
    net = built(name)
    with torch.no_grad():
        for buffer in net.buffers():
            buffer.copy_(torch.tensor([0.0, 0.0, 9.0, 9.0]))
    chosen: list[set[int]] = []
    for edges in (("logits",), ("logits", "selection")):
        captured, watch = capture(net, tokens()), Watch()
        masks: dict[Any, nn.Module] = {s: Keep(-1, (0, 1)) for edge in edges for s in sites_of(captured, edge)}
        inserted(captured, {**masks, sites_of(captured, "indices")[0]: watch})(tokens())
        chosen.append(set(watch.seen.unique().tolist()))
    assert chosen == [{2, 3}, {0, 1}]


@pytest.mark.parametrize("kept", [(0, 2), (0, 3), (1, 2), (1, 3)])
def test_zeros_behind_the_bias_do_not_beat_the_mask(kept: tuple[int, ...]) -> None:
    """One expert of each group is left: its score is zero where the other group is chosen, and the masked ones' too."""
    captured, watch = capture(built("groups, zeros"), tokens()), Watch()
    masks: dict[Any, nn.Module] = {s: Keep(-1, kept) for e in ("logits", "selection") for s in sites_of(captured, e)}
    inserted(captured, {**masks, sites_of(captured, "indices")[0]: watch})(tokens())
    assert set(watch.seen.unique().tolist()) == set(kept)


class Watch(nn.Module):
    """Keeps what passes."""

    seen: Tensor

    def forward(self, tensor: Tensor) -> Tensor:
        self.seen = tensor.clone()
        return tensor


@pytest.mark.parametrize("edge", PATTERN.edges)
@pytest.mark.parametrize("name", GATES)
def test_every_edge_that_is_named_is_passed(name: str, edge: str) -> None:
    """What is inserted there runs, at each site, and changes nothing where it changes nothing."""
    net = built(name)
    captured = capture(net, tokens())
    sites = sites_of(captured, edge)
    if not sites or edge == "block":
        match = find(captured.view.graph, PATTERN).matches[0]
        assert edge == "block" or match.edges(edge).reason  # type: ignore[union-attr]
        return
    modules = {site: Same() for site in sites}
    gm = inserted(captured, modules)  # type: ignore[arg-type]
    for shape in (TOKENS, (3, 9, 16)):
        with torch.no_grad():
            assert torch.equal(gm(tokens(1, shape)), net(tokens(1, shape)))
    assert all(module.calls or edge == "hidden" for module in modules.values())
    assert any(module.calls for module in modules.values())
    assert edge == "indices" or all(module.floating for module in modules.values())
    assert list(gm.state_dict()) == list(net.state_dict())


REACHED = {
    "softmax, topk": "logits input probabilities indices hidden output block",
    "softmax, topk, loop": "logits input probabilities indices output block",
    "softmax, topk, list": "logits input probabilities indices hidden output block",
    "groups": "logits selection input probabilities indices hidden output block",
    "capacity": "logits input probabilities hidden output block",
    "scattered": "logits input probabilities hidden output block",
    "multigate": "logits input probabilities hidden output block",
    "kernels": "logits input probabilities",
    "one by one": "logits input probabilities hidden output block",
    "hidden": "logits input hidden block",
    "grouped": "logits input hidden output block",
    "sidelong": "logits input hidden output block",
    "looked up": "logits input probabilities indices hidden output block",
    "straight": "logits input probabilities hidden output block",
}


@pytest.mark.parametrize("name", REACHED)
def test_which_edges_can_be_reached(name: str) -> None:
    wrapped = nn.Sequential(nn.Identity(), built(name))  # a mixture is a module of a net
    sites = Sites(capture(wrapped, tokens()))
    assert " ".join(edge for edge in PATTERN.edges if sites.of("moe_gate", edge)) == REACHED[name]


class Zero(nn.Module):
    """Nothing is left."""

    def forward(self, tensor: Tensor) -> Tensor:
        return torch.zeros_like(tensor)


@pytest.mark.parametrize("name", [name for name in GATES if name not in ("kernels", "twice")])
def test_weights_are_all_that_experts_have_a_part_by(name: str) -> None:
    """Without the weights of the gates at `probabilities`, the experts can be anything."""
    net = built(name)
    captured = capture(net, tokens())
    sites = sites_of(captured, "probabilities")
    if not sites:
        return
    gm = inserted(captured, {site: Zero() for site in sites})
    with torch.no_grad():
        before = gm(tokens())
        others_changed(net, ())  # gm holds the same parameters
        assert torch.equal(before, gm(tokens()))


def test_each_gate_has_experts_of_its_own() -> None:
    captured = capture(built("twice"), tokens())
    found = find(captured.view.graph, PATTERN)
    lists = [gate_at(match.nodes["scorer"]).experts.modules for match in found.matches]  # type: ignore[union-attr]
    assert lists == [tuple(f"e.{number}.{e}" for e in range(EXPERTS)) for number in range(2)]


def test_a_bias_that_training_moves_is_moved() -> None:
    """Also where it counts what was chosen: training is recorded, and changes the same numbers."""
    recipe = {
        "version": 1,
        "name": "mixture",
        "entries": [{"name": "gate", "pattern": "moe_gate", "edge": "logits", "insert": "dropout", "with": {"p": 0.0}}],
    }
    net, plain = built("balanced").train(), built("balanced").train()
    gm = apply_recipe(net, recipe, example_inputs=tokens()).train()
    with torch.no_grad():
        assert torch.equal(gm(tokens()), plain(tokens()))
    assert torch.equal(gm.c, plain.c) and not torch.equal(plain.c, built("balanced").c)  # type: ignore[arg-type]


def test_logits_that_are_given_out_stay_as_they_are() -> None:
    captured = capture(built("softmax, topk"), tokens())
    (site,) = sites_of(captured, "logits")
    assert site.gate is not None and site.gate.returned
    gm = inserted(captured, {site: Keep(-1, KEPT)})
    flat = tokens().flatten(0, 1)
    logits, weights, indices = gm.p(flat)
    assert torch.equal(logits, captured.model.p(flat)[0])
    assert set(indices.unique().tolist()) == set(KEPT) and torch.isfinite(weights).all()


def test_one_call_where_logits_go_two_ways() -> None:
    captured = capture(built("bias, topk, softmax"), tokens())
    (site,) = sites_of(captured, "logits")
    module = Same()
    inserted(captured, {site: module})(tokens())
    assert site.at is not None and site.at.also and module.calls == 1


@pytest.mark.parametrize("name", NO_GATES)
def test_what_is_none(name: str) -> None:
    build, reason = NO_GATES[name]
    torch.manual_seed(0)
    found = find(capture(build().eval(), tokens()).view.graph, PATTERN)
    assert not found.matches
    reasons = [miss.reason for miss in found.nearest(9)]
    assert not reason or any(reason in each for each in reasons), reasons


def test_the_line_that_stands_in_the_way() -> None:
    found = find(capture(NO_GATES["hidden product"][0]().eval(), tokens()).view.graph, PATTERN)
    (miss,) = found.nearest(1)
    assert miss.reason.startswith("unsupported: 'p' stays Python") and "gates.py" in miss.reason
    assert "return i.flatten().tolist(), w, i" in miss.reason


def test_names_say_nothing() -> None:
    """Experts are told by being alike: with one of another size there are none in sight."""
    net = built("softmax, topk, list")
    net.q[0] = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))  # type: ignore[operator,union-attr]
    found = find(capture(net, tokens()).view.graph, PATTERN)
    assert not found.matches and found.nearest(1)[0].reason.startswith("candidate")
