"""Time and memory of surgery on ResNet-50, against `timm.create_model` measured in the same run.

    python tests/benchmarks/bench_apply.py

Exit code 1 where converting costs more than building, or where parameter memory grows.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import timm
from torch import nn

from dropsurgery import apply_recipe, strip

REPEATS = 15
RECIPE = "dropblock_resnet_g34"


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def storage(*models: nn.Module) -> int:
    """Bytes of all distinct parameter storages of some models."""
    sizes = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for m in models for p in m.parameters()}
    return sum(sizes.values())


def main() -> int:
    rows: dict[str, list[float]] = {"create_model": [], "apply_recipe": [], "strip": []}
    for _ in range(REPEATS):  # interleaved, so that a busy machine slows all alike
        built, model = timed(lambda: timm.create_model("resnet50"))
        applied, gm = timed(lambda model=model: apply_recipe(model, RECIPE, total_steps=1000))
        stripped, plain = timed(lambda gm=gm: strip(gm))
        for name, seconds in zip(rows, (built, applied, stripped), strict=True):
            rows[name].append(seconds)
    base = statistics.median(rows["create_model"])
    for name, seconds in rows.items():
        middle = statistics.median(seconds)
        print(f"{name:14} {1000 * middle:8.1f} ms   {middle / base:5.2f} x create_model")
    added = storage(model, gm, plain) - storage(model)
    print(f"parameter memory added: {added} bytes")
    return int(statistics.median(rows["apply_recipe"]) > base or added > 0)


if __name__ == "__main__":
    sys.exit(main())
