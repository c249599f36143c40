"""Weight drop: DropConnect on the recurrent weights of an RNN (Merity, Keskar, Socher, ICLR 2018, arXiv:1708.02182).

    W_hh → W_hh * M / (1 - p)      M ~ Bernoulli(1 - p), one draw a weight, for all samples and all time steps

Masks are drawn anew in each forward, one for each layer and direction, and eval has the weights as they are.
In the authors' code (salesforce/awd-lstm-lm, weight_drop.py) p is `wdrop`, 0.5 by default. Parameters, their
keys and the fused kernel stay those of the layer. On CUDA torch may warn that the weights are not one chunk of
memory: the masked ones are not, and are copied together in each forward.

Placement: `weight_hh` of all layers of an LSTM, GRU or RNN (recipes/weight_drop_lstm.yaml).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dropsurgery.regularizers._base import Rate, Regularizer
from dropsurgery.regularizers._hosts import filled, run_with
from dropsurgery.regularizers._recurrent import require_recurrent
from dropsurgery.regularizers._taxonomy import Taxonomy
from dropsurgery.regularizers.dropout import dropout


class WeightDrop(Regularizer):
    """Weight drop in place of an RNN's forward; in eval that forward itself."""

    kind = "swap"
    paper = "Merity, Keskar, Socher: Regularizing and Optimizing LSTM Language Models, ICLR 2018, arXiv:1708.02182"
    summary = "drops single recurrent weights of an LSTM, GRU or RNN"
    placement = "in the hidden-to-hidden weights of recurrent layers: weight_drop_lstm"
    shapes = "what the layer takes: sequences of either layout, with or without batch, packed ones"
    needs = "an nn.LSTM, nn.GRU or nn.RNN"
    examples = ({"p": 0.5}, {"p": 0.2})
    taxonomy = Taxonomy(transforms="architecture", space="hidden")
    drops = "other"
    uncounted = "weights are dropped in the middle of the layer"

    p: Tensor

    def __init__(self, p: Rate = 0.5) -> None:
        super().__init__(p=p)

    @staticmethod
    def example_host() -> nn.Module:
        """Return a small layer for tests."""
        return filled(nn.GRU(5, 4, num_layers=2, bidirectional=True, batch_first=True))

    @staticmethod
    def example_inputs(batch: int) -> tuple[Tensor, ...]:
        """Return an input for that layer: `batch` sequences."""
        return (torch.randn(batch, 6, 5),)

    def bind(self, host: nn.Module) -> None:
        """Stand in for an LSTM, GRU or RNN; a SurgeryError where it is none, or hides its weights."""
        require_recurrent("weight_drop", self.site_id, host)
        super().bind(host)

    def forward(self, input: Any, hx: Any = None) -> Any:
        """Return what the layer gives with recurrent weights dropped; its own forward's result when not active."""
        if not self.active:
            return self.own(input, hx)
        host: nn.RNNBase = self.bound()  # type: ignore[assignment]
        host._update_flat_weights()  # or forward does it, and puts the unmasked weights back
        names = zip(host._flat_weights_names, host._flat_weights, strict=True)
        masked = [self._masked(weight) if name.startswith("weight_hh") else weight for name, weight in names]
        return run_with(host, "_flat_weights", masked, input, hx)

    def _masked(self, weight: Tensor | None) -> Tensor | None:
        return None if weight is None else dropout(weight, self.p, key=self.next_key())

    def expected_drop(self, shape: tuple[int, ...]) -> float:
        """Return p, the share of the recurrent weights."""
        return self._rates["p"]
