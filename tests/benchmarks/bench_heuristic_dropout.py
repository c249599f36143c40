"""Heuristic dropout's cost beside its formulas written plainly and beside `x * c`, forward and backward, in one run.

python tests/benchmarks/bench_heuristic_dropout.py

As in `bench_regularizers.py`: contenders take turns, medians are compared. Exit code 1 where a bound is missed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from bench_dropblock import keep_memory
from bench_regularizers import PEAK, PLAINLY, SCALARS, Bound, Case, ours, peak_of, tried
from torch import Tensor

from dropsurgery import get_regularizer

KERNEL = torch.tensor([[-1.0, -1, -1], [-1, 8, -1], [-1, -1, -1]])
IDENTITY = torch.tensor([[0.0, 0, 0], [0, 1, 0], [0, 0, 0]])


def plainly(x: Tensor, p: float = 0.1, k: float = 2.0, b: int = 10, eps: float = 1e-7) -> Tensor:
    """The formulas as they read: all bins of all values at once, and one grouped convolution."""
    samples, channels, height, width = x.shape
    rows = x.detach().flatten(2)
    counts = (torch.round(rows.tanh() * b)[..., None] == torch.arange(b + 1)).sum(2).float()
    shares = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    score = -(shares * shares.clamp(min=1e-30).log()).sum(-1) + k / (rows.var(-1) + eps)
    chosen = torch.zeros_like(score, dtype=torch.bool)
    chosen.scatter_(1, score.topk(round(p * channels), 1).indices, True)
    kernels = torch.where(chosen.flatten()[:, None, None], KERNEL, IDENTITY)[:, None]
    flat = x.reshape(1, samples * channels, height, width)
    return F.conv2d(flat, kernels, padding=1, groups=samples * channels).view(x.shape)


def cases() -> Iterator[Case]:
    for shape, most in (((32, 256, 14, 14), 10.0), ((32, 512, 7, 7), 18.0)):
        calls = {
            "heuristic_dropout": ours("heuristic_dropout", p=0.1),
            "mask: zero": ours("heuristic_dropout", p=0.1, mask="zero"),
            PLAINLY: plainly,
        }
        bounds = (Bound("heuristic_dropout", "x * c", most), Bound("heuristic_dropout", PLAINLY, 0.3))
        yield Case("p = 0.1, k = 2", shape, calls, bounds, rounds=21, shares=False)


def memory() -> list[str]:
    """The peak of one call, its input included, as a share of input and output."""
    x = torch.randn(32, 256, 14, 14, requires_grad=True)
    highest = {p: peak_of(get_regularizer("heuristic_dropout")(p=p), x) for p in (0.1, 1.0)}
    for p, share in highest.items():
        print(f"\npeak at p = {p}, of input and output: {share:.2f}")
    return [f"peak at p = {p}: {each:.2f}, asked {PEAK}" for p, each in highest.items() if each > PEAK + SCALARS]


def main() -> int:
    torch.set_num_threads(2)
    torch.manual_seed(0)
    missed = [line for case in cases() for line in tried(case)] + memory()
    print("\n" + "\n".join(missed or ["every bound holds"]))
    return 1 if missed else 0


if __name__ == "__main__":
    keep_memory()
    sys.exit(main())
