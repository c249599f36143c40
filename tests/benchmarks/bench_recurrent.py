"""Recurrent noise beside `nn.LSTM` and a loop over `nn.LSTMCell`: `python tests/benchmarks/bench_recurrent.py`.

Forward and backward of two layers of 256 on 32 sequences of 64 steps. Masks that the batch shares run in torch's fused
kernel; masks of each sequence's own in a loop over the steps, which is compared with one that has no noise at all.
Exit code 1 where a bound is missed.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from typing import Any

import torch
from bench_dropblock import keep_memory
from bench_regularizers import Bound, Call, Case, tried
from torch import Tensor, nn

from dropsurgery import get_regularizer
from dropsurgery.regularizers._recurrent import recur

STEPS, BATCH, WIDTH, LAYERS = 64, 32, 256, 2
FUSED, LOOP = 1.10, 0.85


def ours(name: str, host: nn.Module, **options: Any) -> Call:
    layer: Any = get_regularizer(name)(**options)
    layer.bind(copy.deepcopy(host))
    return lambda x: layer(x)[0]  # type: ignore[no-any-return]


def cell_loop(kind: type[nn.Module]) -> Call:
    """The loop that one writes by hand, without noise."""
    cells = [kind(WIDTH, WIDTH) for _ in range(LAYERS)]

    def call(x: Tensor) -> Tensor:
        for cell in cells:
            state = x.new_zeros(BATCH, WIDTH)
            pair, outputs = (state, state), []
            for now in x:
                if isinstance(cell, nn.LSTMCell):
                    pair = cell(now, pair)
                    outputs.append(pair[0])
                else:
                    state = cell(now, state)
                    outputs.append(state)
            x = torch.stack(outputs)
        return x

    return call


def lstm() -> Iterator[Case]:
    host = nn.LSTM(WIDTH, WIDTH, LAYERS)
    calls: dict[str, Call] = {
        "nn.LSTM": lambda x: host(x)[0],
        "batch": ours("variational_dropout", host, mask="batch"),
        "batch, untied": ours("variational_dropout", host, mask="batch", tied=False),
        "nn.LSTMCell loop": cell_loop(nn.LSTMCell),
        "no noise": lambda x: recur(host, x)[0],
        "sample": ours("variational_dropout", host),
        "sample, untied": ours("variational_dropout", host, tied=False),
    }
    bounds = (
        *(Bound(name, "nn.LSTM", FUSED) for name in ("batch", "batch, untied")),
        Bound("sample", "nn.LSTMCell loop", LOOP),
    )
    yield Case("LSTM", (STEPS, BATCH, WIDTH), calls, bounds, rounds=9, shares=False, guard="nn.LSTM")


def gru() -> Iterator[Case]:
    host = nn.GRU(WIDTH, WIDTH, LAYERS)
    calls: dict[str, Call] = {
        "nn.GRU": lambda x: host(x)[0],
        "batch": ours("variational_dropout", host, mask="batch"),
        "nn.GRUCell loop": cell_loop(nn.GRUCell),
        "sample": ours("variational_dropout", host),
    }
    bounds = (Bound("batch", "nn.GRU", FUSED), Bound("sample", "nn.GRUCell loop", LOOP))
    yield Case("GRU", (STEPS, BATCH, WIDTH), calls, bounds, rounds=9, shares=False, guard="nn.GRU")


def main() -> int:
    torch.set_num_threads(2)
    torch.manual_seed(0)
    missed = [line for part in (lstm, gru) for case in part() for line in tried(case)]
    print("\n" + "\n".join(missed or ["every bound holds"]))
    return 1 if missed else 0


if __name__ == "__main__":
    keep_memory()
    sys.exit(main())
