"""conv ▶ activation with no norm between, on a map: VGG and AlexNet, first layers of ConvNeXt's MLPs.

Left out are the layers of gates: those that work on one pooled point (squeeze and excitation), and a convolution whose
sigmoid only scales another tensor.
"""

from __future__ import annotations

from dropsurgery.kinds import kind_of, kinds_of, skip_identities, tensor_users
from dropsurgery.matching import After, Into, Layer, Match, Pattern, ops
from dropsurgery.patterns._walks import pooled


def _on_a_map(match: Match) -> str | None:
    conv, act = match.nodes["conv"], match.nodes["act"]
    if pooled(conv):
        return "conv works on one pooled point: the layer of a gate"
    if "sigmoid" in kinds_of(act) and all(kind_of(user) == "mul" for user in skip_identities(act, tensor_users)):
        return "activation is a gate: it scales another tensor"
    return None


PATTERN = Pattern(
    "conv_act",
    forms=[ops(conv="conv", act="activation")],
    edges={
        "output": After("act"),
        "conv": After("conv"),
        "input": Into("conv"),
        "conv_module": Layer("conv"),
        "act_module": Layer("act"),
    },
    check=_on_a_map,
)
