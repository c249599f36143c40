"""Expert dropout: dropout on the hidden units inside experts (Fedus, Zoph, Shazeer 2021, arXiv:2101.03961).

    h (..., f) → h * M / (1 - p)      in training, M ~ Bernoulli(1 - p), one draw an element; h in eval

What Switch Transformers and ST-MoE mean by the name: plain inverted dropout in the feed-forward nets of the experts, at
a higher rate than in the rest of the model, when a pretrained mixture is fine-tuned. The rates are not verified; the
default is the library's choice. It drops no expert: whole expert outputs are dropped by expert_output_masking, the
assignments of tokens to experts (which others call expert dropout too) by topk_assignment_drop.

Dropout that the experts have already stays at work: set it to 0, or bring it under the recipe with `insert: adopt`.

Placement: the hidden units of each expert, before its last layer (recipe expert_dropout_switch).
"""

from __future__ import annotations

from torch import Tensor

from dropsurgery.regularizers._base import Rate, Regularizer
from dropsurgery.regularizers._taxonomy import Taxonomy
from dropsurgery.regularizers.dropout import dropout


def expert_dropout(x: Tensor, p: float | Tensor, *, key: Tensor | None = None) -> Tensor:
    """Drop each hidden unit of `x` (..., f) with probability `p`, and divide the others by 1 - p.

    `key`, a 0-dim int64 CPU tensor, is what the random numbers depend on; None for torch's global generator.
    A SurgeryError if `p` is a number out of [0, 1].
    """
    return dropout(x, p, key=key)


class ExpertDropout(Regularizer):
    """`expert_dropout` as a layer; identity in eval."""

    paper = "Fedus, Zoph, Shazeer: Switch Transformers, 2021, arXiv:2101.03961"
    summary = "drops hidden units inside experts"
    placement = "the hidden units of each expert, before its last layer: recipe expert_dropout_switch"
    shapes = "any shape: tokens (..., f), or of all experts at once"
    needs = "a mixture of experts (pattern moe_gate); elsewhere it is dropout"
    examples = ({"p": 0.3},)
    taxonomy = Taxonomy(transforms=("data", "architecture"), space="hidden")

    p: Tensor

    def __init__(self, p: Rate = 0.3) -> None:
        super().__init__(p=p)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` with units dropped; `x` itself when not active."""
        return expert_dropout(x, self.p, key=self.next_key()) if self.active else x

    def expected_drop(self, shape: tuple[int, ...]) -> float:
        """Return p, whatever the shape."""
        return self._rates["p"]
