"""Assignment drop: drop single assignments of tokens to experts (megablocks, pull request 44).

    w (..., k) → w * M            M ~ Bernoulli(1 - p), one draw a token and slot, in training; w in eval

That proposal, which was closed, calls it expert dropout, and writes -1 for the index of an assignment that is
dropped, so that no expert sees the token there. Here its weight becomes 0: the sum over a token's experts is the same,
whichever way a model hands its tokens out, and no index is met that it does not know; what the dropped expert computes
is thrown away. Not the expert dropout of Switch Transformers, which is expert_dropout.

Unlike expert_output_masking it changes nothing in eval. Nothing is rescaled; by `renormalise: true`, the library's
option, the weights that are left of a token are scaled to what they added up to before (a token of which none is left
gets nothing, and one whose left weights add up to 0 or less stays as it is).

Placement: the weights of the chosen experts (pattern moe_gate, edge probabilities).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dropsurgery.errors import SurgeryError
from dropsurgery.regularizers._base import Rate, Regularizer, rate_tensor, require
from dropsurgery.regularizers._taxonomy import Taxonomy
from dropsurgery.regularizers._uniform import uniform


def topk_assignment_drop(
    weights: Tensor, p: float | Tensor, renormalise: bool = False, *, axis: int = -1, key: Tensor | None = None
) -> Tensor:
    """Drop each assignment of a token to an expert, by its weight in `weights` (..., k), with probability `p`.

    With `renormalise` the weights left of a token, along `axis`, add up to what they did. `key`, a 0-dim int64 CPU
    tensor, is what the random numbers depend on; None for torch's global generator. A SurgeryError if `p` is a number
    out of [0, 1].
    """
    _check(renormalise)
    kept = uniform(weights.shape, weights.device, key) >= rate_tensor(p, weights.device)
    left = torch.where(kept, weights, 0)
    return _renormalised(left, weights, axis) if renormalise else left


def _renormalised(left: Tensor, weights: Tensor, axis: int) -> Tensor:
    wide = torch.promote_types(weights.dtype, torch.float32)
    before, after = (each.sum(axis, keepdim=True, dtype=wide) for each in (weights, left))
    known = after > torch.finfo(wide).tiny
    # One division that never is by 0: where it is thrown away, its gradient would be NaN.
    factor = torch.where(known, before / torch.where(known, after, 1), 1)
    return (left * factor).to(weights.dtype)


class TopkAssignmentDrop(Regularizer):
    """`topk_assignment_drop` as a layer; identity in eval."""

    paper = "megablocks, pull request 44 (closed): dropout of assignments"
    summary = "drops single assignments of tokens to experts"
    placement = "the weights of the chosen experts: pattern moe_gate, edge probabilities"
    shapes = "weights (..., k)"
    needs = "a mixture of experts (pattern moe_gate)"
    examples = ({"p": 0.2},)
    taxonomy = Taxonomy(transforms="architecture", space="hidden")

    p: Tensor

    def __init__(self, p: Rate = 0.1, renormalise: bool = False) -> None:
        super().__init__(p=p)
        _check(renormalise)
        self.renormalise = renormalise
        self.channel_axis = -1

    @staticmethod
    def example_inputs(batch: int) -> tuple[Tensor, ...]:
        """Return an input for tests: the weights of two experts a token."""
        return (torch.randn(batch, 9, 2),)

    def build(self, *, channel_axis: int | None, channels: int | None, shape: tuple[int, ...], site_id: str) -> None:
        """Take the facts; a SurgeryError where there are no tokens with weights."""
        if self.gate is not None:  # weights of the chosen have no axis of all experts, and are the last one
            channel_axis = -1 if self.gate.axis is None else self.gate.axis
            if self.gate.k == 1:  # nothing is left to be scaled, and there may be no axis for one
                self.renormalise = False
        alone = self.gate is not None and self.gate.k == 1 and len(shape) == 1
        if (len(shape) < 2 and not alone) or channel_axis is None:
            raise SurgeryError(
                f"topk_assignment_drop at {site_id}: expected weights of experts (..., k) (pattern moe_gate, edge "
                f"probabilities), got a tensor of shape {shape} with channel axis {channel_axis}; leave this site out "
                "(`where: {exclude: …}`)"
            )
        super().build(channel_axis=channel_axis, channels=channels, shape=shape, site_id=site_id)

    def forward(self, weights: Tensor) -> Tensor:
        """Return weights with some zeroed; themselves when not active."""
        if not self.active:
            return weights
        key = self.next_key()
        return topk_assignment_drop(weights, self.p, self.renormalise, axis=self.channel_axis, key=key)

    def expected_drop(self, shape: tuple[int, ...]) -> float:
        """Return p, whatever the shape."""
        return self._rates["p"]

    def extra_repr(self) -> str:
        """Return the rate, and whether weights are scaled."""
        return f"{super().extra_repr()}, renormalise={self.renormalise}"


def _check(renormalise: bool) -> None:
    require(isinstance(renormalise, bool), "renormalise", "true or false", renormalise)
