"""Dropout in hierarchical mixtures of experts (Irsoy, Alpaydin, Neurocomputing 419, 2021, arXiv:1812.10158).

    y = g * left + (1 - g) * right      of each decision node of a soft tree, g = sigmoid(w x + b)
    g (B, 1) → d * g                    in training, d ~ Bernoulli(1 - p), independently at each node
    g        → (1 - p) * g              in eval   `eval_rule: expected`
    g        → g                        in eval   `eval_rule: full`

Only left subtrees are dropped: where d = 0 all goes to the right, so that training samples an ensemble of trees of
different complexity, and the rightmost leaf is always there. The leaves' weights add up to 1 whatever is dropped. Each
path has each node's draw once and the output is linear in each of them, so that eval by `expected` is the exact mean
over all draws, and no approximation.

Not established by the source as it was read: whether a draw is for a sample (`sample: per_sample`, the default) or for
the batch (`per_batch`), and what eval does; both are options here, and the rate's default is the library's choice.
Nothing is rescaled. A tree of depth D, all of whose leaves are there, has (2 - p)^D of them left on average.

Placement: behind the sigmoid of each decision node, where g and 1 - g both see the draw (recipe hme_dropout).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dropsurgery.errors import SurgeryError
from dropsurgery.regularizers._base import Rate, Regularizer, rate_tensor, require
from dropsurgery.regularizers._taxonomy import Taxonomy
from dropsurgery.regularizers._uniform import uniform

Sample = Literal["per_sample", "per_batch"]
EvalRule = Literal["expected", "full"]


def hme_dropout(gate: Tensor, p: float | Tensor, sample: Sample = "per_sample", *, key: Tensor | None = None) -> Tensor:
    """Make the gate of a decision node, `gate` (B, ..., 1), zero with probability `p`.

    One draw for each element ("per_sample"), or one for all samples ("per_batch"); several nodes, in the last axis,
    have draws of their own. `key`, a 0-dim int64 CPU tensor, is what the
    random numbers depend on; None for torch's global generator. A SurgeryError if `p` is a number out of [0, 1].
    """
    _check(sample)
    shape = gate.shape if sample == "per_sample" else [1] * (gate.dim() - 1) + list(gate.shape[-1:])
    return dropped_left(gate, uniform(shape, gate.device, key) < rate_tensor(p, gate.device))


def dropped_left(gate: Tensor, dropped: Tensor) -> Tensor:
    """Return `gate` with 0 where the left subtree is `dropped`; no gradient flows there."""
    return torch.where(dropped, 0, gate)


class HmeDropout(Regularizer):
    """`hme_dropout` as a layer; in eval the expected gate, or by `eval_rule: full` the identity."""

    paper = "Irsoy, Alpaydin: Dropout Regularization in Hierarchical Mixture of Experts, 2021, arXiv:1812.10158"
    summary = "drops left subtrees of a hierarchical mixture of experts"
    placement = "behind the sigmoid of each decision node: recipe hme_dropout"
    shapes = "gates (B, ..., 1)"
    needs = "a soft tree, node by node (pattern hme_node)"
    examples = ({"p": 0.3}, {"p": 0.2, "sample": "per_batch"}, {"p": 0.5, "eval_rule": "full"})
    taxonomy = Taxonomy(transforms="architecture", space="hidden")

    p: Tensor

    def __init__(self, p: Rate = 0.1, sample: Sample = "per_sample", eval_rule: EvalRule = "expected") -> None:
        super().__init__(p=p)
        _check(sample)
        require(eval_rule in ("expected", "full"), "eval_rule", "'expected' or 'full'", eval_rule)
        self.sample: Sample = sample
        self.expects = eval_rule == "expected"
        if self.expects:
            self.eval_rule = "the gate of each decision node times 1 - p, its expected value"

    @staticmethod
    def example_inputs(batch: int) -> tuple[Tensor, ...]:
        """Return an input for tests: gates, one a sample."""
        return (torch.rand(batch, 1),)

    def build(self, *, channel_axis: int | None, channels: int | None, shape: tuple[int, ...], site_id: str) -> None:
        """Take the facts; a SurgeryError unless there is a gate for each sample."""
        if len(shape) < 2:
            raise SurgeryError(
                f"hme_dropout at {site_id}: expected the gate of one decision node (B, ..., 1) (pattern hme_node, edge "
                f"gate), got a tensor of shape {shape}; leave this site out (`where: {{exclude: …}}`)"
            )
        super().build(channel_axis=channel_axis, channels=channels, shape=shape, site_id=site_id)

    def forward(self, gate: Tensor) -> Tensor:
        """Return the gate with left subtrees dropped; when not active expected, or by `eval_rule: full` as it is."""
        if self.active:
            return hme_dropout(gate, self.p, self.sample, key=self.next_key())
        if self.expects and self._nonzero:
            return (gate * (1 - self.p)).to(gate.dtype)
        return gate

    def expected_drop(self, shape: tuple[int, ...]) -> float:
        """Return p: of the left subtrees, whatever the shape."""
        return self._rates["p"]

    def extra_repr(self) -> str:
        """Return the rate, what a draw holds for, and the rule of eval."""
        rule = "expected" if self.expects else "full"
        return f"{super().extra_repr()}, sample={self.sample!r}, eval_rule={rule!r}"


def _check(sample: Sample) -> None:
    require(sample in ("per_sample", "per_batch"), "sample", "'per_sample' or 'per_batch'", sample)
