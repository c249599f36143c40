"""Recurrent layers of every kind with every combination of their options, what they are called with, what they give."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence
from torch.utils._pytree import tree_leaves

EXACT = 1e-12
INPUTS, CELLS, PROJECTED, STEPS = 3, 5, 2, 6
LENGTHS = (2, 6, 1, 4)  # of sequences of different lengths
HOSTS: dict[str, Callable[..., nn.RNNBase]] = {
    "LSTM": nn.LSTM,
    "projected LSTM": lambda *sizes, **options: nn.LSTM(*sizes, proj_size=PROJECTED, **options),
    "GRU": nn.GRU,
    "tanh RNN": nn.RNN,
    "relu RNN": lambda *sizes, **options: nn.RNN(*sizes, nonlinearity="relu", **options),
}
FORMS = ("batch", "alone", "sorted", "unsorted")

Numbers = np.ndarray[Any, Any]


def hosts(kind: str, **fixed: Any) -> Iterator[nn.RNNBase]:
    """Small float64 layers of a kind, with every combination of the options that are not fixed."""
    choices = {
        "num_layers": (1, 2),
        "bidirectional": (False, True),
        "batch_first": (False, True),
        "bias": (True, False),
    }
    for values in itertools.product(*({**choices, **{name: (value,) for name, value in fixed.items()}}).values()):
        torch.manual_seed(0)
        host = HOSTS[kind](INPUTS, CELLS, **dict(zip({**choices, **fixed}, values, strict=True))).double()
        for parameter in host.parameters():
            nn.init.uniform_(parameter, -0.9, 0.9)
        yield host


class Given(NamedTuple):
    """Sequences of one call, in the order that the layer has their rows in, and the call itself."""

    sequences: list[Tensor]
    input: Tensor | PackedSequence
    hx: Any
    states: list[Tensor]  # (parts, rows, width) each, with rows as in `sequences`
    order: list[int]  # where each row is in the caller's order


def given(host: nn.RNNBase, form: str, with_states: bool, seed: int = 1) -> Given:
    torch.manual_seed(seed)
    lengths = {"batch": [STEPS] * 3, "alone": [STEPS], "sorted": sorted(LENGTHS)[::-1], "unsorted": LENGTHS}[form]
    sequences = [torch.randn(length, INPUTS, dtype=torch.float64) for length in lengths]
    parts = host.num_layers * (1 + host.bidirectional)
    widths = [host.proj_size or host.hidden_size, *([host.hidden_size] if host.mode == "LSTM" else [])]
    states = [torch.randn(parts, len(lengths), width, dtype=torch.float64) * with_states for width in widths]
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    if form in ("batch", "alone"):
        input: Any = torch.stack(sequences, 0 if host.batch_first else 1) if form == "batch" else sequences[0]
    else:
        input = pack_sequence(sequences, enforce_sorted=form == "sorted")
    shown = [state.squeeze(1) if form == "alone" else state for state in states]
    hx = None if not with_states else tuple(shown) if host.mode == "LSTM" else shown[0]
    return Given([sequences[row] for row in order], input, hx, [state[:, order] for state in states], order)


def rows_of(given: Given, host: nn.RNNBase, result: Any) -> tuple[list[Numbers], list[Numbers]]:
    """What came out, sequence by sequence in the order of `given.sequences`, and the last states."""
    output, last = result
    last = list(last) if isinstance(last, tuple) else [last]
    if isinstance(output, PackedSequence):
        padded, lengths = pad_packed_sequence(output, batch_first=True)
        outputs = [padded[row, : lengths[row]] for row in given.order]
    elif output.dim() == 2:
        outputs, last = [output], [each.unsqueeze(1) for each in last]
    else:
        outputs = list(output.unbind(0 if host.batch_first else 1))
    return [each.detach().numpy() for each in outputs], [each[:, given.order].detach().numpy() for each in last]


def tensors(result: Any) -> list[Tensor]:
    """All that a layer or cell gave, in order."""
    return [each for each in tree_leaves(result) if isinstance(each, Tensor)]


def same(a: Any, b: Any) -> bool:
    """Whether two results are equal, number by number."""
    return all(map(torch.equal, tensors(a), tensors(b))) and len(tensors(a)) == len(tensors(b))


def close(a: tuple[list[Numbers], list[Numbers]], b: tuple[list[Numbers], list[Numbers]], most: float = EXACT) -> bool:
    pairs = zip([*a[0], *a[1]], [*b[0], *b[1]], strict=True)
    return all(x.shape == y.shape and np.abs(x - y).max(initial=0) <= most for x, y in pairs)
