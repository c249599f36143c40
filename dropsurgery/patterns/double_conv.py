"""U-Net's two convolutions in a row: (conv ▶ norm? ▶ activation) twice, with the same output width.

Both keep the size of the map (stride 1) and see more than a point (kernels above 1), which leaves out stems and
bottlenecks; neither lies on a residual branch. Of three or more in a row (VGG) the first two are taken.
"""

from __future__ import annotations

from torch import fx

from dropsurgery.kinds import conv_fact, kind_of, tensor_inputs
from dropsurgery.matching import Match, Pattern, after, ops, units

PATTERN_UNITS = (
    [ops(conv="conv", norm="norm", act="activation"), ops(conv="conv", act="norm_act"), ops(conv="conv", act="activation")],
)


def _is_double(match: Match) -> str | None:
    first, second = (conv_fact(match.nodes[name]) for name in ("conv", "conv2"))
    if first is None or second is None:
        return "conv has a weight that is not known"
    return None


PATTERN = None
