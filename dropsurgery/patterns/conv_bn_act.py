"""conv ▶ norm ▶ activation, each the only consumer of the one before; the norm may hold its activation inside."""

from __future__ import annotations

from dropsurgery.matching import Pattern, after, into, ops

PATTERN = Pattern(
    "conv_bn_act",
    forms=[ops(conv="conv", norm="norm", act="activation"), ops(conv="conv", act="norm_act")],
    edges={"output": after("act"), "conv": after("conv"), "norm": after("norm"), "input": into("conv")},
)
