"""The cost of structural dropout beside `x * c` and beside its formula written plainly, its memory, and a whole net.

    python tests/benchmarks/bench_structural_dropout.py

Exit code 1 where a bound is missed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from bench_dropblock import keep_memory
from bench_regularizers import Bound, Case, kept_by, ours, peak_of, tried
from torch import Tensor

SHAPES = (
    *(((32, 256, 28, 28), 1.2), ((32, 256, 14, 14), 1.7), ((32, 512, 7, 7), 2.5)),  # as of spatial_dropout
    *(((128, 4096), 1.7), ((32, 197, 768), 1.5)),  # hidden units, tokens
)
PEAK = 2.0  # of the input, the input and the output included


def plainly(x: Tensor) -> Tensor:
    """The released code's way with `zero_pad`, before its last commit: the width read by the host."""
    units = x.shape[1]
    if float(torch.rand(())) >= 0.5:
        return x
    width = int(torch.randint(max(1, units // 8), units, ()))
    y = torch.zeros_like(x)
    y[:, :width] = x[:, :width] * (units / width)
    return y


def cases() -> Iterator[Case]:
    """Maps, features and tokens."""
    for shape, most in SHAPES:
        calls = {"dropsurgery": ours("structural_dropout", p=0.5), "plain, axis 1": plainly}
        if len(shape) == 3:
            layer = ours("structural_dropout", p=0.5)
            layer.channel_axis = -1  # type: ignore[attr-defined]
            calls = {"dropsurgery": layer}
        yield Case("p = 0.5", shape, calls, (Bound("dropsurgery", "x * c", most, slack=0.25e-3),), rounds=31)


def memory() -> list[str]:
    """The most memory that one call has at a time, and what it keeps for backward, as multiples of its input."""
    missed = []
    for shape, _ in SHAPES[:3]:
        for dtype in (torch.float32, torch.bfloat16):
            layer = ours("structural_dropout")
            x = torch.randn(shape).to(dtype).requires_grad_()
            peak = 2 * peak_of(layer, x)  # type: ignore[arg-type]
            kept = kept_by(layer, x)  # type: ignore[arg-type]
            what = f"on {'x'.join(map(str, shape))}, {dtype}: peak {peak:.2f} of the input, kept {kept:.3f} bytes each"
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
