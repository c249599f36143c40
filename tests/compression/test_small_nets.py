"""Small nets: where a cut goes on, the narrow model is the masked one; where not, the message names the place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import (
    PATTERNS,
    Branched,
    Concatenated,
    Depthwise,
    Fixed,
    Flattened,
    Functional,
    Gated,
    GatedUnit,
    Grouped,
    Heads,
    Multilayer,
    Opaque,
    Output,
    Outwards,
    Shared,
    Shuffled,
    Sorted,
    Summed,
    Tied,
    Twice,
    Viewed,
    Within,
    at,
    operated,
)
from torch import nn

from dropsurgery import SurgeryError, catalogue, compress


@pytest.fixture(autouse=True)
def patterns(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, pattern in PATTERNS.items():
        monkeypatch.setitem(catalogue._registered["patterns"], name, pattern)


HEADS = at("*", "attention", granularity="head")
IMAGE, ROW, TOKENS = (2, 3, 8, 8), (4, 6), (2, 5, 6)


def sizes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def outputs(model: Any, shape: tuple[int, ...]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7)))


def agrees(gm: Any, narrow: nn.Module, widths: Any, shape: tuple[int, ...]) -> None:
    with gm.surgery.width(widths):
        expected = outputs(gm, shape)
    assert not torch.allclose(expected, outputs(gm, shape), rtol=1e-3)  # the cut is felt
    torch.testing.assert_close(outputs(narrow, shape), expected, rtol=1e-12, atol=1e-12 * float(expected.abs().max()))


GOES_ON = {
    "flatten": (Flattened(), [at("act")], IMAGE, 3, {"a.weight": (3, 3, 3, 3), "n.weight": (3,), "b.weight": (5, 48)}),
    "view": (Viewed(), [at("act")], IMAGE, 3, {"a.weight": (3, 3, 3, 3), "b.weight": (5, 3)}),
    "sum": (Summed(), [at("act1"), at("act2")], IMAGE, 5, {"a.weight": (5, 3, 3, 3), "b.weight": (5, 3, 3, 3)}),
    "cat": (
        Concatenated(),
        [at("act1"), at("act2")],
        IMAGE,
        0.5,
        {"a.bias": (4,), "b.bias": (3,), "c.weight": (4, 7, 3, 3)},
    ),
    "one of a cat": (
        Concatenated(),
        [at("act2")],
        IMAGE,
        2,
        {"a.bias": (8,), "b.bias": (2,), "c.weight": (4, 10, 3, 3)},
    ),
    "depthwise": (Depthwise(), [at("act")], IMAGE, 3, {"d.weight": (3, 1, 3, 3), "c.weight": (4, 3, 1, 1)}),
    "depthwise, many of each": (
        Depthwise(times=2),
        [at("act")],
        IMAGE,
        3,
        {"d.weight": (6, 1, 3, 3), "c.weight": (4, 6, 1, 1)},
    ),
    "behind a depthwise": (
        Depthwise(True, norm=True),
        [at("act2")],
        IMAGE,
        3,
        {"a.weight": (3, 3, 3, 3), "d.bias": (3,)},
    ),
    "both sides of one": (
        Depthwise(True, norm=True),
        [at("act"), at("act2")],
        IMAGE,
        3,
        {"d.bias": (3,), "n.bias": (3,)},
    ),
    "gate": (
        Gated(),
        [at("act")],
        IMAGE,
        3,
        {"r.weight": (2, 3, 1, 1), "e.weight": (3, 2, 1, 1), "c.weight": (4, 3, 3, 3)},
    ),
    "function": (
        Functional(),
        [at("*", "any_conv")],
        IMAGE,
        3,
        {"first": (3, 3, 3, 3), "second": (4, 3, 1, 1), "scale": (3, 1, 1)},
    ),
    "batch norm": (Multilayer(), [at("act")], ROW, 5, {"a.weight": (5, 6), "n.weight": (5,), "b.weight": (3, 5)}),
    "a PReLU a unit": (Multilayer(nn.PReLU(12)), [at("act")], ROW, 5, {"act.weight": (5,)}),
    "into the norm": (Multilayer(nn.GELU()), [at("n", "any_norm")], ROW, 5, {"a.weight": (5, 6), "b.weight": (3, 5)}),
    "into the rows": (Multilayer(nn.GELU(), nn.Identity()), [at("a", "linear")], ROW, 5, {"a.weight": (5, 6)}),
    "no factor": (Multilayer(nn.GELU()), [at("n", "any_norm", normalize=False)], ROW, 5, {"n.bias": (5,)}),
    "heads": (Heads(), [HEADS], TOKENS, 3, {"qkv.weight": (36, 6), "proj.weight": (6, 12)}),
    "called twice": (Shared(), [at("pair.act")], ROW, 5, {"pair.a.weight": (5, 6), "pair.b.weight": (6, 5)}),
    "within a part that stays Python": (Within(), [at("pair.act")], ROW, 5, {"pair.b.weight": (6, 5)}),
    "heads of another size": (Heads(4, 2), [HEADS], TOKENS, 1, {"qkv.bias": (6,)}),
}


@pytest.mark.parametrize("case", GOES_ON)
def test_the_narrow_model_is_the_masked_one(case: str) -> None:
    model, entries, shape, width, expected = GOES_ON[case]
    if case == "function":
        entries = [{**entries[0], "where": {"index": 0}, "module": ["*"]}]
        entries[0].pop("module")
    gm = operated(model, *entries, shape=shape)
    before = sizes(gm)
    narrow = compress(gm, width)
    assert type(narrow) is type(model)
    assert expected.items() <= sizes(narrow).items()
    assert sizes(gm) == before
    agrees(gm, narrow, width, shape)


def test_layers_say_how_wide_they_are() -> None:
    gm = operated(Depthwise(True, norm=True), at("act"), at("act2"), shape=IMAGE)
    narrow: Any = compress(gm, 3)
    assert (narrow.a.out_channels, narrow.d.in_channels, narrow.d.out_channels, narrow.d.groups) == (3, 3, 3, 3)
    assert (narrow.n.num_features, narrow.c.in_channels, narrow.c.out_channels) == (3, 3, 4)
    assert tuple(narrow.n.running_mean.shape) == (3,) == tuple(narrow.n.running_var.shape)
    heads: Any = compress(operated(Heads(), HEADS, shape=TOKENS), 1)
    assert (heads.heads, heads.size, heads.qkv.out_features, heads.proj.in_features) == (1, 4, 12, 4)


STOPPED = {
    "sum with what is not masked": (Branched(), [at("act2")], IMAGE, 3, ["'b'", "not zero", "'a'"]),
    "sum of other widths": (
        Summed(),
        [at("act1"), at("act2")],
        IMAGE,
        {"act1*": 3, "act2*": 5},
        ["'c'", "not masked alike"],
    ),
    "sum of which one is masked": (Summed(), [at("act1")], IMAGE, 3, ["'c'", "not masked alike", "ReLU 'act2'"]),
    "bias behind the mask": (Depthwise(True), [at("act")], IMAGE, 3, ["'c'", "'d' makes other numbers of the zeros"]),
    "norm behind the mask": (
        Depthwise(norm=True),
        [at("act")],
        IMAGE,
        3,
        ["'c'", "'n' makes other numbers of the zeros"],
    ),
    "two widths at one depthwise": (
        Depthwise(True, norm=True),
        [at("act"), at("act2")],
        IMAGE,
        {"act#*": 3, "act2*": 5},
        ["'c'", "not zero"],
    ),
    "groups": (Grouped(), [at("act")], IMAGE, 4, ["'c'", "2 groups"]),
    "layer norm": (Multilayer(norm=nn.LayerNorm(12)), [at("act")], ROW, 5, ["'n'", "layer norm over what is cut"]),
    "group norm": (Depthwise(), [at("act")], IMAGE, 3, ["'n'", "group norm"]),
    "tied": (Tied(), [at("act")], ROW, 3, ["weight", "uses too"]),
    "called twice": (Twice(), [at("act")], ROW, 3, ["'a'", "several times", "one of them only"]),
    "result": (Output(), [at("act")], IMAGE, 3, ["the result of the net"]),
    "opaque": (Opaque(), [at("act")], IMAGE, 3, ["'part'", "stays Python"]),
    "into a part that stays Python": (Outwards(), [at("pair.act")], ROW, 4, ["'pair.act'", "stays Python"]),
    "pixel shuffle": (Shuffled(), [at("act")], IMAGE, 4, ["'shuffle'", "makes positions of channels"]),
    "no rule": (Sorted(), [at("act")], ROW, 4, ["cumsum", "not known"]),
    "split into written sizes": (GatedUnit(), [at("a", "linear")], ROW, 12, ["split", "written in its code"]),
    "heads written in code": (Fixed(), [HEADS], TOKENS, 3, ["number 4 written in its code"]),
    "norm over heads": (Heads(norm=True), [HEADS], TOKENS, 3, ["'n'", "layer norm"]),
    "factor before an activation": (
        Multilayer(nn.GELU(), nn.LayerNorm(12, elementwise_affine=False)),
        [at("n", "any_norm")],
        ROW,
        5,
        ["layer norm"],
    ),
}


@pytest.mark.parametrize("case", STOPPED)
def test_what_stops_a_cut_is_named(case: str) -> None:
    model, entries, shape, width, told = STOPPED[case]
    if case == "group norm":
        model = Depthwise()
        model.n = nn.GroupNorm(2, 8)
    gm = operated(model, *entries, shape=shape)
    before, state = sizes(gm), {key: value.clone() for key, value in gm.state_dict().items()}
    with pytest.raises(SurgeryError) as error:
        compress(gm, width)
    message = str(error.value)
    assert all(part in message for part in told), message
    assert message.startswith("compress: ") and message.endswith("Nothing was changed")
    assert next(iter(gm.surgery.regularizers)) in message
    assert sizes(gm) == before
    assert all(torch.equal(state[key], value) for key, value in gm.state_dict().items())
    assert all(regularizer.width is None for regularizer in gm.surgery.regularizers.values())


def test_a_gated_unit_loses_both_halves() -> None:
    gm = operated(GatedUnit(nn.GLU()), at("b", "linear", "input"), shape=ROW)
    narrow = compress(gm, 3)
    assert sizes(narrow)["a.weight"] == (6, 6)
    agrees(gm, narrow, 3, ROW)
