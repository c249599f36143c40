"""Every linear layer, module or function; convolutions of one point are none."""

from __future__ import annotations

from dropsurgery.matching import After, Into, Layer, Pattern, ops

PATTERN = Pattern(
    "linear",
    forms=[ops(linear="linear")],
    edges={"output": After("linear"), "input": Into("linear"), "module": Layer("linear")},
)
