"""The cost of Channel DropBlock beside `x * c` and beside the authors' formulas written plainly, and its memory.

    python tests/benchmarks/bench_channel_dropblock.py

The plain way makes the whole matrix (C, C) of each sample and takes one row of it. Shares are counted on maps of ones,
where all channels are alike: the plain way drops whole samples there. Exit code 1 where a bound is missed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from bench_dropblock import keep_memory
from bench_regularizers import PLAINLY, Bound, Call, Case, ours, peak_of, tried
from torch import Tensor

SHAPES = (((32, 256, 14, 14), 3.0), ((32, 512, 7, 7), 4.5))
PEAK = 3.0  # of the input, the input and the output included
FASTER = 1.0  # than the plain way, at least


def plainly(metric: str, gamma: float) -> Call:
    """The authors' algorithm, step by step."""

    def likeness(x: Tensor) -> Tensor:
        if metric == "bilinear":
            vectors = F.normalize(x.flatten(2), dim=2)
            return vectors @ vectors.mT
        at, width = F.avg_pool2d(x, 3, 1, 1).flatten(2).argmax(2), x.shape[3]
        places = torch.stack([at // width, at % width], 2).float()
        return -torch.cdist(places, places)

    def call(x: Tensor) -> Tensor:
        batch, channels = x.shape[:2]
        with torch.no_grad():
            matrix = likeness(x)
            bound = matrix.topk(int(channels * gamma), dim=2)[0][:, :, -1:]
            mask = (matrix < bound)[torch.arange(batch), torch.randint(channels, (batch,))]
        return x * mask[:, :, None, None].float() / (1 - gamma)

    return call


def cases() -> Iterator[Case]:
    """Both metrics, at the authors' rates; the bounds are those of the cosines."""
    for shape, most in SHAPES:
        for metric, p in (("bilinear", 0.05), ("max_activation", 0.2)):
            calls = {"dropsurgery": ours("channel_dropblock", p=p, metric=metric), PLAINLY: plainly(metric, p)}
            bounds = (Bound("dropsurgery", PLAINLY, FASTER),)
            if metric == "bilinear":
                bounds += (Bound("dropsurgery", "x * c", most),)
            yield Case(f"{metric}, p = {p}", shape, calls, bounds, rounds=31)


def memory() -> list[str]:
    """The most memory that one call has at a time, as a multiple of its input."""
    missed = []
    for shape, _ in SHAPES:
        for metric in ("bilinear", "max_activation"):
            for dtype in (torch.float32, torch.bfloat16):
                layer = ours("channel_dropblock", p=0.2, metric=metric)
                peak = 2 * peak_of(layer, torch.randn(shape).to(dtype).requires_grad_())  # type: ignore[arg-type]
                what = f"peak of {metric} on {'x'.join(map(str, shape))}, {dtype}: {peak:.2f} of the input"
                print(what)
                if peak > PEAK + 0.02:  # what is of one channel
                    missed.append(what)
    return missed


def main() -> int:
    torch.set_num_threads(2)
    torch.manual_seed(0)
    missed = [line for case in cases() for line in tried(case)] + memory()
    print("\n" + "\n".join(missed or ["every bound holds"]))
    return 1 if missed else 0


if __name__ == "__main__":
    keep_memory()
    sys.exit(main())
