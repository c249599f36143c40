"""ScheduledDropPath: drop what an operation of a cell gives (Zoph et al., CVPR 2018, arXiv:1707.07012).

    x (B, ...) → x * b / (1 - p)      b (B, 1, ...) ~ Bernoulli(1 - p), one draw a sample

What makes it scheduled is where p comes from, and that is said in a recipe: p falls short of its target by the share
of the training that is done (`schedule: {kind: linear}`) and by the place of the cell (`depth_rule: cells`),

    1 - keep_prob = (t / T) * (cell + 1) / cells * (1 - target),

cells being counted from 0, stem and reduction cells among them. So it is in the authors' code (tensorflow/models,
research/slim/nets/nasnet: nasnet_utils.py, version "v3", and nasnet.py); "v1" there is time alone (no depth rule),
"v2" depth alone (no schedule). Their drop_path_keep_prob is 1 - p: 0.7 for the large ImageNet net, 0.6 for CIFAR.

Placement: on what each operation of a cell gives, convolution or pooling, before the pairwise sum; not on what passes
through as it is or by a bare projection (recipes/scheduled_drop_path_nasnet.yaml).
"""

from __future__ import annotations

from torch import Tensor

from dropsurgery.errors import SurgeryError
from dropsurgery.regularizers._base import Rate, Regularizer, require
from dropsurgery.regularizers._taxonomy import Taxonomy
from dropsurgery.regularizers.stochastic_depth import stochastic_depth


def scheduled_drop_path(x: Tensor, p: float | Tensor, *, key: Tensor | None = None) -> Tensor:
    """Drop whole samples of `x` (B, ...) with probability `p` and divide the others by 1 - p.

    `key`, a 0-dim int64 CPU tensor, is what the random numbers depend on; None for torch's global generator.
    A SurgeryError if `x` has no batch, or `p` is a number out of [0, 1].
    """
    require(x.dim() > 0, "input of scheduled_drop_path", "a batch (B, ...)", tuple(x.shape))
    return stochastic_depth(x, p, "row", key=key)


class ScheduledDropPath(Regularizer):
    """`scheduled_drop_path` as a layer; identity in eval."""

    paper = "Zoph et al.: Learning Transferable Architectures for Scalable Image Recognition, 2018, arXiv:1707.07012"
    summary = "drops what an operation of a cell gives, more so the deeper the cell and the later in training"
    placement = "after each operation of a cell, before the pairwise sum: recipe scheduled_drop_path_nasnet"
    shapes = "any shape (B, ...)"
    examples = ({"p": 0.3}, {"p": 0.4})
    taxonomy = Taxonomy(transforms=("data", "architecture"), space="hidden", dependence="time")

    p: Tensor

    def __init__(self, p: Rate = 0.3) -> None:
        super().__init__(p=p)

    def build(self, *, channel_axis: int | None, channels: int | None, shape: tuple[int, ...], site_id: str) -> None:
        """Take the facts; a SurgeryError where there is no batch of which a sample could be dropped."""
        if not shape:
            raise SurgeryError(
                f"scheduled_drop_path at {site_id}: expected a batch (B, ...), got a tensor of shape {shape}; "
                "leave this site out (`where: {exclude: …}`)"
            )
        super().build(channel_axis=channel_axis, channels=channels, shape=shape, site_id=site_id)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` with samples dropped; `x` itself when not active."""
        return scheduled_drop_path(x, self.p, key=self.next_key()) if self.active else x

    def expected_drop(self, shape: tuple[int, ...]) -> float:
        """Return p, whatever the shape."""
        return self._rates["p"]
