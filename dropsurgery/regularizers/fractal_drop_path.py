"""FractalNet's drop-path: drop inputs of a join, or keep one column of the net (Larsson et al. 2017, arXiv:1605.07648).

    a, b, ... → n / k * (sum of the k inputs that are kept)      in training
    a, b, ... → a + b + ...                                      in eval

Local: a join drops each of its n inputs with probability p, and keeps at least one: where all would go, one of them,
each alike, stays. Global: one column is kept for the whole net, so that of every join the input of one same place is
left. A forward is global with probability `p_global`, and local otherwise; a draw holds for the whole batch. 0.15 and
one half are the rates of the Caffe code under the authors' name (gustavla/fractalnet), which draws a batch too.

FractalNet's joins are means over what is kept. Here a sum is taken the place of, in a net that was made with it, and
so the mean is multiplied by n: with all inputs kept it is the sum. That the columns of a net are told by the place of
an input in its join is the reading taken here for nets that are no FractalNets. Not to be mixed up with what is often
called DropPath, which is stochastic_depth.

For one column in the whole net, all joins have to share a draw: within a model they do. A layer alone draws its own.
Joins of different p_global do not agree on which forwards are global: give one to all, and no depth rule.

Placement: in place of sums of parallel operations (recipes/fractal_drop_path_cells.yaml).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import add
from typing import Protocol

import torch
from torch import Tensor

from dropsurgery.regularizers._base import Keys, Rate, Regularizer, rate_tensor, require
from dropsurgery.regularizers._taxonomy import Taxonomy
from dropsurgery.regularizers._uniform import uniform


class SharedKeys(Keys, Protocol):
    """Where keys come from that all sites of a model get alike."""

    def shared_key(self, site_id: str, name: str) -> Tensor:
        """Return the key of this forward's draw called `name`, a 0-dim int64 tensor on the CPU."""


def fractal_drop_path(
    inputs: Sequence[Tensor],
    p: float | Tensor = 0.15,
    p_global: float | Tensor = 0.5,
    *,
    key: Tensor | None = None,
    shared_key: Tensor | None = None,
) -> Tensor:
    """Add up the `inputs` (of one shape) that are kept, and scale the sum as if all were there.

    With probability `p_global` one alone is kept; otherwise each is dropped with probability `p`, but for one.
    `shared_key` is what the choice between the two and that of the one depend on, `key` the rest: 0-dim int64 CPU
    tensors; None for torch's global generator. A SurgeryError for less than two inputs, shapes that differ, or a
    rate that is a number out of [0, 1].
    """
    shapes = [tuple(x.shape) for x in inputs]
    alike = len(shapes) > 1 and len(set(shapes)) == 1
    require(alike, "inputs of fractal_drop_path", "two or more of one shape", shapes)
    local, whole = (rate_tensor(rate, inputs[0].device) for rate in (p, p_global))
    kept = _kept(len(inputs), local, whole, key, shared_key)
    dtype = reduce(torch.promote_types, [x.dtype for x in inputs])
    factors = (kept * (len(inputs) / kept.sum())).to(dtype).unbind()
    y = inputs[0].to(dtype) * factors[0]
    for x, factor in zip(inputs[1:], factors[1:], strict=True):
        y = torch.addcmul(y, x.to(dtype), factor)
    return y


def _kept(count: int, p: Tensor, p_global: Tensor, key: Tensor | None, shared_key: Tensor | None) -> Tensor:
    """Return which of `count` inputs are kept, as 0 and 1."""
    own = uniform((count + 1,), p.device, key)
    shared = uniform((2,), p.device, shared_key)
    place = torch.arange(count, device=p.device)
    spare, column = ((u * count).long().clamp(max=count - 1) == place for u in (own[count], shared[1]))
    local = own[:count] >= p
    local = torch.where(local.any(), local, spare)
    return torch.where(shared[0] < p_global, column, local).float()


class FractalDropPath(Regularizer):
    """`fractal_drop_path` as a layer that stands in for a sum; the sum in eval."""

    kind = "combine"
    paper = "Larsson et al.: FractalNet: Ultra-Deep Neural Networks without Residuals, ICLR 2017, arXiv:1605.07648"
    summary = "drops inputs of joins, or keeps one column of the whole net"
    placement = "in place of the sums of parallel operations: recipe fractal_drop_path_cells"
    shapes = "two or more of one shape"
    examples = ({"p": 0.15, "p_global": 0.5}, {"p": 0.3, "p_global": 0.0})
    taxonomy = Taxonomy(transforms=("data", "architecture"), space="hidden")
    drops = "other"
    uncounted = "an input that is dropped changes the whole sum"

    p: Tensor
    p_global: Tensor
    context: SharedKeys | None = None

    def __init__(self, p: Rate = 0.15, p_global: Rate = 0.5) -> None:
        super().__init__(p=p, p_global=p_global)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the sum of the inputs that are kept, scaled; when not active the sum of all."""
        if not self.active:
            return reduce(add, inputs)
        shared = None if self.context is None else self.context.shared_key(self.site_id, "fractal_drop_path")
        return fractal_drop_path(inputs, self.p, self.p_global, key=self.next_key(), shared_key=shared)

    def expected_drop(self, shape: tuple[int, ...]) -> float:
        """Return the expected share of two inputs that is dropped."""
        p, p_global = self._rates["p"], self._rates["p_global"]
        return p_global / 2 + (1 - p_global) * (p - p**2 / 2)
