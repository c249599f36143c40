"""Expert output masking (EOM): zero what an expert gives for a token (NLLB team 2022, arXiv:2207.04672).

    w (..., k) → w * M            in training, M ~ Bernoulli(1 - p), one draw a token and slot      `rescale: test`
    w          → w * (1 - p)      in eval
    w (..., k) → w * M / (1 - p)  in training; w in eval                                           `rescale: train`

The output of a mixture is the sum of w_i y_i over a token's chosen experts, so that a weight of 0 is a whole vector y_i
of 0, whichever way the tokens are handed out. The first is that of fairseq's code, which does not rescale in training
and multiplies by 1 - p in eval; so has eval here. Mean of training and output in eval are so the same. `unit: token` is
one draw for all of a token's experts: the masked output of the whole mixture (FOM).

Hugging Face's NllbMoe has dropout of single elements, rescaled in training, and multiplies by 1 - p in eval as well, so
that its two means differ by the factor 1 - p: another method, and not done here.

Placement: the weights of the chosen experts (pattern moe_gate, edge probabilities).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dropsurgery.errors import SurgeryError
from dropsurgery.regularizers._base import Rate, Regularizer, rate_tensor, require
from dropsurgery.regularizers._taxonomy import Taxonomy
from dropsurgery.regularizers._uniform import scale_of, uniform

Rescale = Literal["test", "train"]
Unit = Literal["slot", "token"]


def expert_output_masking(
    weights: Tensor,
    p: float | Tensor,
    rescale: Rescale = "test",
    unit: Unit = "slot",
    *,
    axis: int = -1,
    key: Tensor | None = None,
) -> Tensor:
    """Make weights of experts (..., k) zero with probability `p`, each by itself or all of a token at once.

    By `rescale` "train" the others are divided by 1 - p; by "test" they stay, and the caller multiplies by 1 - p at
    test time. `axis` is the one of the k experts. `key`, a 0-dim int64 CPU tensor, is what the random numbers depend
    on; None for torch's global generator. A SurgeryError if `p` is a number out of [0, 1], or an option is unknown.
    """
    _check(rescale, unit)
    shape = list(weights.shape)
    if unit == "token":
        require(weights.dim() > 0, "input of expert_output_masking", "weights (..., k)", tuple(weights.shape))
        shape[axis] = 1
    rate = rate_tensor(p, weights.device)
    masked = torch.where(uniform(shape, weights.device, key) >= rate, weights, 0)
    return masked * scale_of(rate).to(weights.dtype) if rescale == "train" else masked


class ExpertOutputMasking(Regularizer):
    """`expert_output_masking` as a layer."""

    paper = "NLLB team: No Language Left Behind, 2022, arXiv:2207.04672"
    summary = "zeroes what single experts give for a token"
    placement = "the weights of the chosen experts: pattern moe_gate, edge probabilities"
    shapes = "weights (..., k)"
    needs = "a mixture of experts (pattern moe_gate)"
    examples = ({"p": 0.2}, {"p": 0.5, "rescale": "train"}, {"p": 0.3, "unit": "token"})
    taxonomy = Taxonomy(transforms=("data", "architecture"), space="hidden")

    p: Tensor

    def __init__(self, p: Rate = 0.2, rescale: Rescale = "test", unit: Unit = "slot") -> None:
        super().__init__(p=p)
        _check(rescale, unit)
        self.rescale: Rescale = rescale
        self.unit: Unit = unit
        self.channel_axis = -1
        if rescale == "test":
            self.eval_rule = "times the share of expert outputs kept, 1 - p"

    @staticmethod
    def example_inputs(batch: int) -> tuple[Tensor, ...]:
        """Return an input for tests: the weights of two experts a token."""
        return (torch.randn(batch, 9, 2),)

    def build(self, *, channel_axis: int | None, channels: int | None, shape: tuple[int, ...], site_id: str) -> None:
        """Take the facts; a SurgeryError where there are no tokens with weights."""
        if self.gate is not None:  # weights of the chosen have no axis of all experts, and are the last one
            channel_axis = -1 if self.gate.axis is None else self.gate.axis
            if self.gate.k == 1:  # there may be no axis for one
                self.unit = "slot"
        alone = self.gate is not None and self.gate.k == 1 and len(shape) == 1
        if (len(shape) < 2 and not alone) or channel_axis is None:
            raise SurgeryError(
                f"expert_output_masking at {site_id}: expected weights of experts (..., k) (pattern moe_gate, edge "
                f"probabilities), got a tensor of shape {shape} with channel axis {channel_axis}; leave this site out "
                "(`where: {exclude: …}`)"
            )
        super().build(channel_axis=channel_axis, channels=channels, shape=shape, site_id=site_id)

    def forward(self, weights: Tensor) -> Tensor:
        """Return weights with some zeroed; when not active themselves, or by `rescale: test` times 1 - p."""
        if self.active:
            return expert_output_masking(
                weights, self.p, self.rescale, self.unit, axis=self.channel_axis, key=self.next_key()
            )
        if self.rescale == "test" and self._nonzero:
            return (weights * (1 - self.p)).to(weights.dtype)
        return weights

    def expected_drop(self, shape: tuple[int, ...]) -> float:
        """Return p, whatever the shape."""
        return self._rates["p"]

    def extra_repr(self) -> str:
        """Return the rate, where the scale is made up for, and what a draw holds for."""
        return f"{super().extra_repr()}, rescale={self.rescale!r}, unit={self.unit!r}"


def _check(rescale: Rescale, unit: Unit) -> None:
    require(rescale in ("test", "train"), "rescale", "'test' or 'train'", rescale)
    require(unit in ("slot", "token"), "unit", "'slot' or 'token'", unit)
