"""Gaussian dropout: multiply by Gaussian noise instead of dropping (Srivastava et al., JMLR 15, 2014, section 10).

    x → x * N      N ~ Normal(1, p / (1 - p)), one draw an element

The noise has the mean and the variance of dropout's M / (1 - p), so that p means the same in both, but no element
becomes zero. The paper writes p for the probability to keep, and has the variance (1 - p) / p. Kingma, Salimans and
Welling 2015 (arXiv:1506.02557) write alpha for p / (1 - p); their variational dropout learns it, which this does
not. The same as Keras's GaussianDropout. Placement: as dropout's, on the outputs of hidden layers (recipe
gaussian_dropout_vgg). At p = 1, where no such noise exists, all is zero, as by dropout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dropsurgery.regularizers._base import Rate, Regularizer, rate_tensor
from dropsurgery.regularizers._blocks import fresh_key
from dropsurgery.regularizers._taxonomy import Taxonomy
from dropsurgery.regularizers._tracing import is_transformed
from dropsurgery.regularizers._uniform import scale_of


def gaussian_dropout(x: Tensor, p: float | Tensor, *, key: Tensor | None = None) -> Tensor:
    """Multiply each element of `x` (any shape) by a number drawn from Normal(1, p / (1 - p)).

    `key`, a 0-dim int64 CPU tensor, is what the random numbers depend on; None for torch's global generator.
    A SurgeryError if `p` is a number out of [0, 1].
    """
    rate = rate_tensor(p, x.device)
    if key is None:
        # A key is read on the host, which a captured CUDA graph would do only once.
        if x.device.type != "cpu" or is_transformed():
            return _times(x, torch.randn(x.shape, device=x.device, dtype=torch.float32), rate)
        key = fresh_key()
    if is_transformed():
        return _times(x, keyed_normal(x.shape, x.device, key), rate)
    y: Tensor = _DrawnTwice.apply(x, rate, key)
    return y


class GaussianDropout(Regularizer):
    """`gaussian_dropout` as a layer; identity in eval."""

    paper = "Srivastava et al.: Dropout, JMLR 15, 2014, section 10"
    summary = "multiplies elements by Gaussian noise"
    placement = "on the outputs of hidden layers, where dropout would go: recipe gaussian_dropout_vgg"
    examples = ({"p": 0.1}, {"p": 0.5})
    taxonomy = Taxonomy(transforms=("data", "architecture"), space="hidden")
    drops = "other"
    uncounted = "each element is changed, and none dropped"

    p: Tensor

    def __init__(self, p: Rate = 0.5) -> None:
        super().__init__(p=p)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` times noise; `x` itself when not active."""
        return gaussian_dropout(x, self.p, key=self.next_key()) if self.active else x

    def expected_drop(self, shape: tuple[int, ...]) -> float:
        """Return p: the share that dropout with noise of this variance would drop."""
        return self._rates["p"]


def _times(x: Tensor, normal: Tensor, p: Tensor) -> Tensor:
    """`x` times noise, which is made of the numbers drawn, in place."""
    some = (p < 1).to(p.dtype)
    y = x * normal.mul_((p * scale_of(p)).sqrt() * some).add_(some)
    # Not `y.to(x.dtype)` at once: where that gives `y` itself, compilers of torch 2.11 lose the gradient.
    return y if y.dtype == x.dtype else y.to(x.dtype)


class _DrawnTwice(torch.autograd.Function):
    """`_times`, whose numbers are drawn once more for backward instead of being kept: four bytes an element."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: Tensor, key: Tensor) -> Tensor:
        ctx.save_for_backward(p.clone(), key)  # the rate may move before backward
        return _times(x, keyed_normal(x.shape, x.device, key), p)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        p, key = ctx.saved_tensors
        return _times(grad, keyed_normal(grad.shape, grad.device, key), p), None, None


@torch.library.custom_op(
    "dropsurgery::keyed_normal",
    mutates_args=(),
    tags=(torch.Tag.nondeterministic_seeded, torch.Tag.cudagraph_unsafe),
)
def keyed_normal(shape: Sequence[int], device: torch.device, key: Tensor) -> Tensor:
    """Return float32 numbers of mean 0 and variance 1 from a generator of their own, seeded with `key`."""
    generator = torch.Generator(device).manual_seed(int(key))
    return torch.randn(shape, device=device, generator=generator, dtype=torch.float32)


@keyed_normal.register_fake
def _(shape: Sequence[int], device: torch.device, key: Tensor) -> Tensor:
    return torch.empty(shape, device=device, dtype=torch.float32)
