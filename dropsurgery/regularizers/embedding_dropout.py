"""Embedding dropout: drop words, all of their occurrences at once (Gal, Ghahramani 2016, arXiv:1512.05287).

    row of word w in sequence b → row * M_bw / (1 - p)      M ~ Bernoulli(1 - p), one draw a sequence and word type

To drop a word type is to drop a row of the embedding's matrix, and where a word occurs twice in a sequence, both are
dropped or none. With `mask: sample` each sequence drops words of its own, as in the authors' code, where p is 0.3 for
the large language model (yaringal/BayesianRNN); with `mask: batch` all sequences drop the same ones, as in
salesforce/awd-lstm-lm (Merity, Keskar, Socher, ICLR 2018, arXiv:1708.02182), where p is `dropoute`, 0.1.

Placement: the words' embedding in front of `variational_dropout`, in a recipe `pattern: embedding, edge: module`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from dropsurgery.regularizers._base import Rate, Regularizer, rate_tensor, require
from dropsurgery.regularizers._hosts import filled, own_class, require_host
from dropsurgery.regularizers._taxonomy import Taxonomy
from dropsurgery.regularizers._uniform import scale_of, uniform

Mask = Literal["sample", "batch"]


def embedding_dropout(
    rows: Tensor,
    words: Tensor,
    p: float | Tensor,
    *,
    mask: Mask = "sample",
    count: int | None = None,
    batch_first: bool = True,
    numbers: Tensor | None = None,
    key: Tensor | None = None,
) -> Tensor:
    """Drop the rows of each word of a sequence with probability `p`, and divide the others by 1 - p.

    Args:
        rows: the words' vectors, (*words.shape, width).
        words: their numbers: one sequence (T,), or with a batch (B, T, …), or (T, B) without `batch_first`.
        p: the probability to drop a word.
        mask: "sample" draws for each sequence, "batch" once for all; that needs the `count` of words there are.
        numbers: uniform numbers in [0, 1) to draw by, as many as there are `words`, for `mask="batch"` as many as
            there could be; the word that is the n-th of its sequence in numerical order has the n-th. None draws them.
        key: a 0-dim int64 CPU tensor that the numbers depend on; None for torch's global generator.

    A SurgeryError if `p` is a number out of [0, 1], or `count` is missing.
    """
    rate = rate_tensor(p, rows.device)
    factor = torch.where(drawn_for(words, mask, count, batch_first, numbers, key) >= rate, scale_of(rate), 0.0)
    return rows * factor.to(rows.dtype).unsqueeze(-1)


def drawn_for(
    words: Tensor, mask: Mask, count: int | None, batch_first: bool, numbers: Tensor | None, key: Tensor | None
) -> Tensor:
    """Return a uniform number for each of `words`, alike for equal words of one sequence."""
    if mask == "batch":
        require(count is not None, "count", "the number of words there are, for `mask` 'batch'", None)
        assert count is not None
        numbers = uniform([count], words.device, key) if numbers is None else numbers
        return numbers[words]
    turned = words.dim() == 2 and not batch_first
    lines = words.t() if turned else words.flatten(1) if words.dim() > 1 else words.reshape(1, -1)
    numbers = uniform(lines.shape, words.device, key) if numbers is None else numbers.view(lines.shape)
    # The n-th word type of a sequence in sorted order has the n-th number: no table of all words is needed.
    ordered, places = lines.sort(dim=1)
    is_new = torch.ones_like(ordered)
    is_new[:, 1:] = (ordered[:, 1:] != ordered[:, :-1]).to(is_new.dtype)
    found = numbers.gather(1, is_new.cumsum(1, dtype=torch.int64) - 1)
    by_place = torch.empty_like(found).scatter(1, places, found)
    return by_place.t() if turned else by_place.view(words.shape)


class EmbeddingDropout(Regularizer):
    """`embedding_dropout` in place of an embedding's forward; in eval that forward itself."""

    kind = "swap"
    paper = "Gal, Ghahramani: Dropout in Recurrent Neural Networks, NeurIPS 2016, arXiv:1512.05287"
    summary = "drops words of a sequence wherever they occur in it"
    placement = "the embedding of a language model's words (pattern embedding, edge module)"
    shapes = "numbers of words (B, T), (T,), or (T, B) with `batch_first: false`"
    needs = "an nn.Embedding"
    taxonomy = Taxonomy(transforms=("data", "architecture"), space=("input", "hidden"))
    examples = ({"p": 0.3}, {"p": 0.1, "mask": "batch"}, {"p": 0.5, "batch_first": False})

    p: Tensor

    def __init__(self, p: Rate = 0.3, mask: Mask = "sample", batch_first: bool = True) -> None:
        super().__init__(p=p)
        require(mask in ("sample", "batch"), "mask", "'sample' or 'batch'", mask)
        require(isinstance(batch_first, bool), "batch_first", "true or false", batch_first)
        self.mask: Mask = mask
        self.batch_first = batch_first

    @staticmethod
    def example_host() -> nn.Module:
        """Return a small layer for tests."""
        return filled(nn.Embedding(30, 4))

    @staticmethod
    def example_inputs(batch: int) -> tuple[Tensor, ...]:
        """Return an input for that layer: `batch` sequences of words."""
        return (torch.randint(30, (batch, 12)),)

    def bind(self, host: nn.Module) -> None:
        """Stand in for an embedding; a SurgeryError where it is none."""
        known = isinstance(host, nn.Embedding) and own_class(host).forward is nn.Embedding.forward
        require_host(known, "embedding_dropout", self.site_id, "an nn.Embedding that runs torch's own forward", host)
        super().bind(host)

    def forward(self, input: Tensor) -> Tensor:
        """Return the words' vectors with words dropped; the embedding's own when not active."""
        rows: Tensor = self.own(input)
        if not self.active:
            return rows
        host: nn.Embedding = self.bound()  # type: ignore[assignment]
        return embedding_dropout(
            rows,
            input,
            self.p,
            mask=self.mask,
            count=host.num_embeddings,
            batch_first=self.batch_first,
            key=self.next_key(),
        )

    def expected_drop(self, shape: tuple[int, ...]) -> float:
        """Return p, the share of the words."""
        return self._rates["p"]

    def extra_repr(self) -> str:
        """Return the rate, where a mask holds, and which axis is the batch."""
        return f"{super().extra_repr()}, mask={self.mask!r}, batch_first={self.batch_first}"
