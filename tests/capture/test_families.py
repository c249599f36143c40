"""Facts of real models against sources that know nothing of the engine: module paths, timm's `feature_info`, and the
`drop_path` layers that timm puts on every residual branch."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache

import pytest
from torch import fx, nn

from dropsurgery.capture import Captured, capture
from dropsurgery.models import make_model


@dataclass(frozen=True)
class Family:
    """What is known of a model: the paths of its stages from stage `first` on, and joins beside its drop paths.

    `beside` counts residual additions without a drop path (convolutional positions, fusions), and drop paths without
    one are negative; `blocks` is the number of repeated blocks where the family's own configuration says it.
    """

    stages: tuple[str, ...] = ()
    first: int = 1
    beside: int = 0
    blocks: int | None = None
    reductions: tuple[int, ...] = field(default=())


def numbered(name: str, count: int, start: int = 0) -> tuple[str, ...]:
    return tuple(f"{name}{index}" for index in range(start, start + count))


STAGES, BLOCKS, LAYERS = numbered("stages.", 4), numbered("blocks.", 5), numbered("layers.", 4)
FAMILIES: dict[str, Family] = {
    "beit_base_patch16_224": Family(blocks=12),
    "cait_xxs24_224": Family(beside=-1, blocks=26),  # the first class attention adds to a parameter
    "caformer_s18": Family(STAGES, blocks=18),
    "coatnet_nano_rw_224": Family(STAGES, blocks=16),
    "convit_tiny": Family(blocks=12),
    "convnextv2_atto": Family(STAGES, blocks=12),  # GRN adds too, and is no residual branch
    "cs3darknet_focus_s": Family(STAGES),
    "cspnext_tiny": Family(STAGES),
    "davit_tiny": Family(STAGES, beside=24, blocks=12),  # two convolutional positions a block
    "edgenext_xx_small": Family(STAGES, blocks=12),
    "efficientformer_l1": Family(STAGES, blocks=15),
    "efficientnet_b0": Family(("blocks.1", "blocks.2", "blocks.3", "blocks.5"), blocks=9),
    "efficientvit_m0": Family(numbered("stages.", 3), beside=38),
    "fasternet_t0": Family(STAGES, blocks=13),
    "focalnet_tiny_srf": Family(LAYERS, blocks=12),
    "gcvit_xxtiny": Family(STAGES, beside=11),  # convolutions with a shortcut, around the attention
    "ghostnet_050": Family(beside=16, blocks=16),
    "gmlp_ti16_224": Family(blocks=30),
    "halonet_h1": Family(STAGES, blocks=19),
    "hgnetv2_b0": Family(("stem", *STAGES), first=0),
    "hiera_tiny_224": Family(
        ("blocks.0", "blocks.1", "blocks.2", "blocks.3", "blocks.9", "blocks.10", "blocks.11"), first=-1, blocks=12
    ),
    "iformer_t": Family(STAGES),
    "inception_next_atto": Family(STAGES, blocks=12),
    "levit_128s": Family(numbered("stages.", 3)),
    "lowformer_b0": Family(STAGES),
    "mambaout_femto": Family(STAGES, blocks=18),
    "maxvit_pico_rw_256": Family(STAGES),
    "mixer_s32_224": Family(blocks=8),
    "mobilenetv4_conv_small": Family(numbered("blocks.", 4), blocks=10),
    "mvitv2_tiny": Family(STAGES, blocks=10),
    "nf_regnet_b0": Family(STAGES, blocks=16),
    "nextvit_small": Family(STAGES, beside=44, blocks=20),
    "pit_ti_224": Family(numbered("transformers.", 3), first=2, blocks=12),
    "poolformerv2_s12": Family(STAGES, blocks=12),
    "pvt_v2_b0": Family(STAGES, blocks=8),
    "regnety_002": Family(numbered("s", 4, 1), blocks=13),
    "repvit_m1": Family(STAGES, beside=72),
    "resmlp_12_224": Family(blocks=12),
    "rexnet_100": Family(beside=11, blocks=11),
    "sam2_hiera_tiny": Family(blocks=12),
    "swiftformer_xs": Family(STAGES, beside=4),  # additive attention adds its query
    "swinv2_cr_tiny_224": Family(STAGES, blocks=12),
    "tiny_vit_5m_224": Family(STAGES, blocks=12),
    "tnt_s_legacy_patch16_224": Family(blocks=12),
    "twins_pcpvt_small": Family(numbered("blocks.", 4), beside=4),
    "xception41p": Family(beside=12, blocks=12),
    "xcit_nano_12_p8_224": Family(blocks=14),
}


@lru_cache(maxsize=1)
def captured(name: str) -> tuple[nn.Module, Captured]:
    model = make_model(name)
    return model, capture(model)


def placed(graph: fx.Graph, prefix: str) -> list[fx.Node]:
    """The leaves of the backbone inside a module."""
    found = [
        node
        for node in graph.nodes
        if node.op == "call_module" and node.meta["role"] == "backbone" and f"{node.target}.".startswith(f"{prefix}.")
    ]
    assert found, f"no leaf in {prefix}"
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_family(name: str) -> None:
    family, (model, whole) = FAMILIES[name], captured(name)
    graph = whole.view.graph
    joins = [node for node in graph.nodes if "join" in node.meta]
    drops = Counter(
        node.meta["owner"]
        for node in graph.nodes
        if node.op == "call_module" and str(node.target).rpartition(".")[2].startswith("drop_path")
    )
    assert len(joins) == _expected_drops(graph, drops) + family.beside
    if family.blocks is not None:
        assert {node.meta["block"] for node in joins} == {(index, family.blocks) for index in range(family.blocks)}
    check_stages(graph, family)
    check_reductions(model, graph)


def _expected_drops(graph: fx.Graph, drops: Counter[str]) -> int:
    """Drop paths whose owner adds at all: some layers have one that stays unused where there is no shortcut."""
    adding = {node.meta["owner"] for node in graph.nodes if "join" in node.meta or "no_join" in node.meta}
    return sum(count for owner, count in drops.items() if owner in adding)


def check_stages(graph: fx.Graph, family: Family) -> None:
    if family.first < 0:
        stages = [{node.meta["stage"] for node in placed(graph, prefix)} for prefix in family.stages]
        assert stages == [{1}, {2}, {2}, {3}, {3}, {4}, {4}]
        return
    for stage, prefix in enumerate(family.stages, start=family.first):
        assert {node.meta["stage"] for node in placed(graph, prefix)} == {stage}, prefix


# Families whose feature_info names modules that hold more than one scale, or the input of the next block.
_OTHER_SCALES = ("crossvit", "coat_", "hiera", "sam2", "mobilenetv5", "mvitv2", "tnt")


def check_reductions(model: nn.Module, graph: fx.Graph) -> None:
    for info in getattr(model, "feature_info", None) or ():
        module = info["module"]
        inside = [
            node for node in graph.nodes if node.meta.get("role") and f"{node.meta['path']}.".startswith(f"{module}.")
        ]
        if inside and not any(type(model).__name__.lower().startswith(name.strip("_")) for name in _OTHER_SCALES):
            assert inside[-1].meta["reduction"] == info["reduction"], module
