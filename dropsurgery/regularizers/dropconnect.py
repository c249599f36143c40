"""DropConnect: drop each weight of a layer by itself (Wan et al., ICML 2013).

    y = W x + b  →  y = ((M * W) x + m * b) / (1 - p)      M, m ~ Bernoulli(1 - p), one draw a weight

The paper draws a mask for each example and masks the biases too; its p is the probability to keep, 1 - p here.
This is the inverted form, so that eval has the mean weights and changes nothing. The paper's own inference,
which samples from a Gaussian, is not done here.

`scope: sample` is the paper's. It makes B x out x in weights, and keeps them for backward: 4 MB a sample
for a layer of 1024 x 1024 in float32. `scope: batch` draws one mask for the batch and keeps none.
Not to be confused with what EfficientNets call drop connect, which is stochastic depth.

Placement: fully connected layers; recipe dropconnect_classifier.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from dropsurgery.regularizers._base import Rate, Regularizer, require
from dropsurgery.regularizers._hosts import filled, own_class, require_host, run_with
from dropsurgery.regularizers._taxonomy import Taxonomy
from dropsurgery.regularizers.dropout import dropout

Scope = Literal["sample", "batch"]


def drop_connect(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    p: float | Tensor,
    *,
    drop_bias: bool = True,
    key: Tensor | None = None,
    bias_key: Tensor | None = None,
) -> Tensor:
    """Apply a linear layer, each sample of `x` (B, ..., in) with a mask of its own on `weight` (out, in).

    What a sample has between its first and its last axis (tokens) shares the mask. `drop_bias`: mask `bias` (out)
    too. The keys, 0-dim int64 CPU tensors, are what the random numbers depend on; None for torch's global
    generator. A SurgeryError if `p` is a number out of [0, 1].
    """
    rows = x.reshape(1, 1, -1) if x.dim() == 1 else x.flatten(1, -2) if x.dim() > 2 else x.unsqueeze(1)
    weights = dropout(weight.expand(len(rows), *weight.shape), p, key=key)
    y = rows @ weights.transpose(1, 2)
    if bias is not None:
        biases = bias.expand(len(rows), 1, len(bias))
        y = y + (dropout(biases, p, key=bias_key) if drop_bias else biases).to(y.dtype)
    return y.reshape(*x.shape[:-1], len(weight))


class DropConnect(Regularizer):
    """DropConnect in place of a linear layer's or convolution's forward; in eval that forward itself."""

    kind = "swap"
    paper = "Wan et al.: Regularization of Neural Networks using DropConnect, ICML 2013"
    summary = "drops single weights of a layer"
    placement = "in fully connected layers; recipe dropconnect_classifier"
    shapes = "what the layer takes"
    needs = "a linear layer, or with `scope: batch` a convolution, whose weight is a plain parameter"
    examples = ({"p": 0.2}, {"p": 0.5, "scope": "batch"}, {"p": 0.3, "bias": False})
    taxonomy = Taxonomy(transforms="architecture", space="hidden")
    drops = "other"
    uncounted = "weights are dropped, and an output is the sum of many"

    p: Tensor

    def __init__(self, p: Rate = 0.5, scope: Scope = "sample", bias: bool = True) -> None:
        super().__init__(p=p)
        require(scope in ("sample", "batch"), "scope", "'sample' or 'batch'", scope)
        require(isinstance(bias, bool), "bias", "true or false", bias)
        self.scope = scope
        self.bias = bias

    @staticmethod
    def example_host() -> nn.Module:
        """Return a small layer for tests."""
        return filled(nn.Linear(14, 5))

    def bind(self, host: nn.Module) -> None:
        """Stand in for a linear layer or a convolution; a SurgeryError where it is none, or hides its weight."""
        if self.scope == "sample":
            expected = "a linear layer that computes W x + b (`scope: batch` takes convolutions and all linear layers)"
            require_host(_is_plain_linear(host), "dropconnect", self.site_id, expected, host)
        known = isinstance(host, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))
        expected = "a linear layer or a convolution whose weight is a plain parameter"
        require_host(known and host._parameters.get("weight") is not None, "dropconnect", self.site_id, expected, host)
        super().bind(host)

    def forward(self, input: Tensor) -> Tensor:
        """Return what the layer gives with weights dropped; its own forward's result when not active."""
        if not self.active:
            own: Tensor = self.own(input)
            return own
        weight: Tensor = self.bound().weight  # type: ignore[assignment]
        bias: Tensor | None = self.bound().bias  # type: ignore[assignment]
        key = self.next_key()
        bias_key = self.next_key() if self.bias and bias is not None else None
        if self.scope == "sample":
            return drop_connect(input, weight, bias, self.p, drop_bias=self.bias, key=key, bias_key=bias_key)
        masked = {"weight": dropout(weight, self.p, key=key)}
        if self.bias and bias is not None:
            masked["bias"] = dropout(bias, self.p, key=bias_key)
        y: Tensor = run_with(self.bound(), "_parameters", {**self.bound()._parameters, **masked}, input)
        return y

    def expected_drop(self, shape: tuple[int, ...]) -> float:
        """Return p, the share of the weights."""
        return self._rates["p"]

    def extra_repr(self) -> str:
        """Return the rate, where a mask holds, and whether biases are masked."""
        return f"{super().extra_repr()}, scope={self.scope!r}, bias={self.bias}"


def _is_plain_linear(host: nn.Module) -> bool:
    """Whether a layer computes W x + b with its weight and bias, and with nothing else."""
    if not isinstance(host, nn.Linear):
        return False
    # A subclass of torch's layer may add to it (a low-rank update, say), and would have parameters or layers for that.
    simple = set(host._parameters) == {"weight", "bias"} and set(host._modules) <= {"_surgery"}
    return simple or own_class(host).forward is nn.Linear.forward
