"""FocusedDropout beside `x * c`, forward and backward: `python tests/benchmarks/bench_focused_dropout.py`.

Measured are batches that are used (p = 1), which is the cost where there is one: the others pass. The formulas written
plainly stand beside it. Exit code 1 where a bound is missed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from bench_dropblock import keep_memory
from bench_regularizers import PLAINLY, Bound, Call, Case, kept_by, ours, peak_of, tried
from torch import Tensor

BOUNDS = {(32, 256, 14, 14): 2.5, (32, 512, 7, 7): 3.0}
PEAK = 3.0  # of the input's memory


def plainly(x: Tensor) -> Tensor:
    """The equations as they stand, sample by sample."""
    out = []
    for sample in x:
        reference = sample[sample.mean((1, 2)).argmax()].detach()
        gamma = 0.3 + 0.3 * torch.rand(())
        out.append(sample * (reference > gamma * reference.max()))
    return torch.stack(out)


def cases() -> Iterator[Case]:
    for shape, most in BOUNDS.items():
        calls: dict[str, Call] = {
            "image": ours("focused_dropout", p=1.0),
            "pixel": ours("focused_dropout", p=1.0, gamma_scope="pixel"),
            "not used": ours("focused_dropout", p=1e-30),
            PLAINLY: plainly,
        }
        bounds = tuple(Bound(each, "x * c", most) for each in ("image", "pixel", "not used"))
        yield Case("a batch that is used", shape, calls, bounds, rounds=31, shares=False)


def memory() -> list[str]:
    missed = []
    for shape in BOUNDS:
        x = torch.randn(shape, requires_grad=True)
        layer: Any = ours("focused_dropout", p=1.0)
        kept, peak = kept_by(layer, x), 2 * peak_of(layer, x)
        print(f"\nmemory on {shape}: keeps {kept:.3f} bytes an element, peak {peak:.2f} of the input")
        if peak > PEAK:
            missed.append(f"memory on {shape}: peak {peak:.2f} of the input, asked {PEAK}")
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
