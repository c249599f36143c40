"""Clustering dropout's cost in front of a classifier beside torch's dropout, and of making the groups anew.

    python tests/benchmarks/bench_clustering_dropout.py

A layer with dropout in front of it is the contender; `again` is the same once more. What the groups cost is told per
optimizer step, at the interval of 100. Exit code 1 where a bound is missed.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from bench_dropblock import keep_memory
from bench_regularizers import Bound, Call, Case, tried
from torch import nn

from dropsurgery import get_regularizer

SHAPES = ((128, 512), (64, 2048), (256, 4096))  # the layer has as many outputs as inputs
SOURCES = ("feature", "weight", "derivative")
MOST = 1.15
SLACK = 0.25e-3  # what a few operators on small tensors take
STEP = 0.5e-3


def layer(units: int, **options: Any) -> Any:
    """A regularizer bound to a linear layer."""
    made: Any = get_regularizer("clustering_dropout")(**options)
    made.bind(nn.Linear(units, units))
    return made


def cases() -> Iterator[Case]:
    """Forward and backward of a linear layer, with what drops its input."""
    for rows, units in SHAPES:
        calls: dict[str, Call] = {"linear": nn.Linear(units, units)}
        calls |= {each: nn.Sequential(nn.Dropout(0.5), nn.Linear(units, units)) for each in ("dropout", "again")}
        calls |= {source: layer(units, source=source) for source in SOURCES}
        bounds = tuple(Bound(source, "dropout", MOST, SLACK) for source in SOURCES)
        yield Case("in front of a linear layer", (rows, units), calls, bounds, rounds=21, shares=False)


def steps() -> list[str]:
    """Seconds of `after_step` with the sums taken up, and of the one in a hundred that makes the groups."""
    missed = []
    print("\nafter an optimizer step, in ms")
    for rows, units in SHAPES:
        made = layer(units, interval=100)
        times = []
        for _ in range(600):
            made.rows.fill_(rows)
            made.total.uniform_(0, 1)
            begin = time.perf_counter()
            made.after_step()
            times.append(time.perf_counter() - begin)
        groups = statistics.median(times[99::100])
        mean = statistics.median(times) + groups / 100
        told = {"": statistics.median(times), "with groups": groups, "mean": mean}
        print(f"  {units} units" + "".join(f"  {name}{seconds * 1e3:9.3f}" for name, seconds in told.items()))
        if mean > STEP:
            missed.append(f"after_step of {units} units takes {mean * 1e3:.3f} ms, asked: {STEP * 1e3:.3f}")
    return missed


def main() -> int:
    """Measure all; 1 where a bound is missed."""
    torch.set_num_threads(2)
    torch.manual_seed(0)
    missed = [line for case in cases() for line in tried(case)] + steps()
    print("\n" + "\n".join(missed or ["every bound holds"]))
    return 1 if missed else 0


if __name__ == "__main__":
    keep_memory()
    sys.exit(main())
