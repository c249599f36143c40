"""The cost of weighted channel dropout beside `x * c` and beside the paper's algorithm written plainly, and its memory.

    python tests/benchmarks/bench_weighted_channel_dropout.py

Exit code 1 where a bound is missed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from bench_dropblock import keep_memory
from bench_regularizers import PLAINLY, Bound, Case, ours, peak_of, tried
from torch import Tensor

SHAPES = (((32, 256, 14, 14), 3.0), ((32, 512, 7, 7), 5.0))
PEAK = 3.0  # of the input, the input and the output included


def plainly(x: Tensor) -> Tensor:
    """Algorithm 1 of the paper with equations 5 and 6, at wrs_ratio 0.8 and q 0.9."""
    with torch.no_grad():
        scores = x.mean((2, 3)).relu()
        keys = torch.rand_like(scores) ** (1 / scores)
        chosen = keys.topk(int(0.8 * x.shape[1]), dim=1).indices
        mask = torch.zeros_like(scores).scatter(1, chosen, 1.0) * (torch.rand_like(scores) < 0.9)
        alpha = scores.sum(1, keepdim=True) / (scores * mask).sum(1, keepdim=True)
    return x * (mask * alpha)[:, :, None, None]


def cases() -> Iterator[Case]:
    """The paper's rates."""
    for shape, most in SHAPES:
        calls = {"dropsurgery": ours("weighted_channel_dropout", p=0.2, q=0.9), PLAINLY: plainly}
        yield Case("p = 0.2, q = 0.9", shape, calls, (Bound("dropsurgery", "x * c", most),), rounds=31)


def memory() -> list[str]:
    """The most memory that one call has at a time, as a multiple of its input."""
    missed = []
    for shape, _ in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            layer = ours("weighted_channel_dropout")
            peak = 2 * peak_of(layer, torch.randn(shape).to(dtype).requires_grad_())  # type: ignore[arg-type]
            what = f"peak on {'x'.join(map(str, shape))}, {dtype}: {peak:.2f} of the input"
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
