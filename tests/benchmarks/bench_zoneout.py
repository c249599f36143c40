"""Zoneout beside a plain loop over cells, forward and backward: `python tests/benchmarks/bench_zoneout.py`.

Two layers of 256 units, 32 sequences of 64 steps. The loop is the method written down as its formulas stand; torch's
fused layer, which cannot do it, stands beside. A GRU is shown, and nothing is asked of it. Exit code 1 where a bound is
missed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from bench_dropblock import keep_memory
from bench_regularizers import Bound, Call, Case, tried
from torch import Tensor, nn

from dropsurgery import get_regularizer

SHAPE, LAYERS = (64, 32, 256), 2
P_CELL, P_HIDDEN = 0.5, 0.05
MOST = 0.85
CELLS: dict[type[nn.RNNBase], Any] = {nn.LSTM: nn.LSTMCell, nn.GRU: nn.GRUCell}


def plainly(cells: list[nn.Module], training: bool) -> Call:
    """Zoneout over cells, step by step."""

    def mixed(old: Tensor, new: Tensor, p: float) -> Tensor:
        if not training:
            return p * old + (1 - p) * new
        keep = torch.bernoulli(torch.full_like(new, p))
        return keep * old + (1 - keep) * new

    def run(x: Tensor) -> Tensor:
        for cell in cells:
            h = c = x.new_zeros(x.shape[1], x.shape[2])
            outputs = []
            for step in x:
                if isinstance(cell, nn.LSTMCell):
                    new_h, new_c = cell(step, (h, c))
                    c = mixed(c, new_c, P_CELL)
                else:
                    new_h = cell(step, h)
                h = mixed(h, new_h, P_HIDDEN)
                outputs.append(h)
            x = torch.stack(outputs)
        return x

    return run


def ours(host: nn.Module, training: bool) -> Call:
    layer: Any = get_regularizer("zoneout")(p_cell=P_CELL, p_hidden=P_HIDDEN)
    layer.bind(host)
    layer.train(training)
    return lambda x: layer(x)[0]


def cases() -> Iterator[Case]:
    for kind, training in ((nn.LSTM, True), (nn.LSTM, False), (nn.GRU, True), (nn.GRU, False)):
        host = kind(SHAPE[-1], SHAPE[-1], LAYERS)
        cells = [CELLS[kind](SHAPE[-1], SHAPE[-1]) for _ in range(LAYERS)]
        calls: dict[str, Call] = {
            "dropsurgery": ours(host, training),
            "plain loop": plainly(cells, training),
            "no zoneout": lambda x, host=host: host(x)[0],  # type: ignore[misc]
        }
        what = f"{kind.__name__}, {'training' if training else 'eval'}"
        bounds = (Bound("dropsurgery", "plain loop", MOST),) if kind is nn.LSTM else ()
        yield Case(what, SHAPE, calls, bounds, rounds=9, shares=False, guard="no zoneout")


def main() -> int:
    torch.set_num_threads(2)
    torch.manual_seed(0)
    missed = [line for case in cases() for line in tried(case)]
    print("\n" + "\n".join(missed or ["every bound holds"]))
    return 1 if missed else 0


if __name__ == "__main__":
    keep_memory()
    sys.exit(main())
