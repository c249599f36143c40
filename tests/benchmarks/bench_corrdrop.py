"""CorrDrop's cost beside `x * c`, beside the bare product A A^T and beside its formulas written plainly.

    python tests/benchmarks/bench_corrdrop.py

Forward and backward, in turns, medians (see bench_regularizers.py). The product has no backward: it is what a score of
all pairs cannot do without. Exit code 1 where a bound is missed.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from bench_dropblock import keep_memory
from bench_regularizers import PLAINLY, Bound, Call, Case, ours, peak_of, tried
from torch import Tensor

from dropsurgery import get_regularizer

P = 0.2
SHAPES = ((32, 256, 14, 14), (32, 512, 7, 7))
PEAK = 1.5  # of input and output together, which is three times the input


def product(x: Tensor) -> Tensor:
    """A A^T of the channels of each sample, and x as it is."""
    rows = x.detach().flatten(2)
    torch.bmm(rows, rows.mT)
    return x.view_as(x)


def plain_mask(rows: Tensor, p: float) -> Tensor:
    """Equations (1) to (8) as they stand: (B, N, K) → S (B, N)."""
    unit = F.normalize(rows, dim=-1)
    same = (unit @ unit.mT - torch.eye(rows.shape[1])).abs().mean(-1)
    candidates = 1 - torch.bernoulli(same.softmax(-1))
    rate = (p * candidates.numel() / candidates.sum()).clamp(max=1)
    return 1 - candidates * torch.bernoulli(rate.expand_as(candidates))


def plain_channel(x: Tensor) -> Tensor:
    kept = plain_mask(x.detach().flatten(2), P)[:, :, None, None]
    return x * kept * (kept.numel() / kept.sum())


def plain_spatial(k: int) -> Call:
    def call(x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        pooled = F.avg_pool2d(x.detach(), k, ceil_mode=True, count_include_pad=False)
        rows, columns = pooled.shape[2:]
        kept = plain_mask(pooled.flatten(2).mT, P / k**2 * height * width / (rows * columns))
        mask = F.interpolate(kept.view(-1, 1, rows, columns), scale_factor=k)[:, :, :height, :width]
        return x * mask * (mask.numel() / mask.sum())

    return call


def behind(*producer: str) -> Call:
    """The channels' layer where its input comes from `producer`; what it costs does not hang on the values."""
    layer = get_regularizer("corrdrop_channel")(p=P)
    layer.producer = producer
    layer.build(channel_axis=1, channels=8, shape=(2, 8, 4, 4), site_id="site")
    return layer  # type: ignore[no-any-return]


def channel() -> Iterator[Case]:
    for shape in SHAPES:
        calls = {"any input": behind("norm"), "after ReLU": behind("activation", "relu")}
        calls |= {"A A^T": product, PLAINLY: plain_channel}
        bounds = Bound("any input", "A A^T", 1.6), Bound("after ReLU", "A A^T", 0.6)
        yield Case("corrdrop_channel, p = 0.2", shape, calls, bounds, rounds=21)


def spatial() -> Iterator[Case]:
    for (shape, most), k in itertools.product(zip(SHAPES, (5.5, 7.0), strict=True), (5, 3)):
        name = f"blocks of {k}"
        calls = {name: ours("corrdrop_spatial", p=P, block_size=k), PLAINLY: plain_spatial(k)}
        yield Case(f"corrdrop_spatial, p = 0.2, k = {k}", shape, calls, (Bound(name, "x * c", most),), rounds=31)


def memory() -> list[str]:
    """The most that forward has at a time, its input included, as a share of its input and output."""
    missed = []
    print("\npeak of forward, of input and output")
    for shape, name in itertools.product(SHAPES, ("corrdrop_channel", "corrdrop_spatial")):
        peak = peak_of(get_regularizer(name)(p=P), torch.randn(shape, requires_grad=True))
        print(f"  {name:18}{'x'.join(map(str, shape)):>16}{peak:8.2f}")
        if peak > PEAK:
            missed.append(f"{name} on {shape}: a peak of {peak:.2f}, asked: {PEAK}")
    return missed


def main() -> int:
    torch.set_num_threads(2)
    torch.manual_seed(0)
    missed = [line for case in (*channel(), *spatial()) for line in tried(case)] + memory()
    print("\n" + "\n".join(missed or ["every bound holds"]))
    return 1 if missed else 0


if __name__ == "__main__":
    keep_memory()
    sys.exit(main())
