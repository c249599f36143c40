"""conv ▶ norm ▶ activation, each the only consumer of the one before; the norm may hold its activation inside."""

from __future__ import annotations

from dropsurgery.matching import After, Into, Layer, Pattern, ops

PATTERN = Pattern(
    "conv_bn_act",
    forms=[ops(conv="conv", norm="norm", act="activation"), ops(conv="conv", act="norm_act")],
    edges={
        "output": After("act"),
        "conv": After("conv"),
        "norm": After("norm"),
        "input": Into("conv"),
        "conv_module": Layer("conv"),
        "act_module": Layer("act"),
    },
)
