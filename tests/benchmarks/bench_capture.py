"""Time of capture: against building the same model, over the smallest of each family; and over graphs of all sizes.

    python tests/benchmarks/bench_capture.py [NAME…]

With names, only these models are compared with their construction. Times are of the processor, on one thread, medians
of interleaved repetitions. Exit code 1 where a bound is missed: capture takes at most as long as `timm.create_model`
in the median over the families, at most 1.5 times or 150 ms, whichever is more, for each; trace, match and plan
together grow at most as (number of nodes) ** 1.2.
"""

from __future__ import annotations

import gc
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import timm
import torch

from dropsurgery.analysis.certify import everywhere, sites_by_edge
from dropsurgery.analysis.families import SMALLEST
from dropsurgery.capture import capture
from dropsurgery.models import make_model
from dropsurgery.planning import Sites, plan
from dropsurgery.recipe import load_recipe

REPEATS = 3
MEDIAN, EACH, FLOOR, POWER = 1.0, 1.5, 0.150, 1.2
SIZES = (
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnet200", "vit_tiny_patch16_224",
    "vit_large_patch16_224", "vit_giant_patch14_224", "convnext_atto", "convnext_xlarge", "efficientnet_b0",
    "efficientnet_b7", "efficientnet_l2", "densenet121", "densenet264d", "swin_tiny_patch4_window7_224",
    "swin_large_patch4_window7_224", "hrnet_w18_small", "hrnet_w64", "nasnetalarge", "gemma4_vit_570m",
)  # fmt: skip


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    gc.collect()
    begin = time.process_time()
    result = function()
    return time.process_time() - begin, result


def compare(name: str) -> tuple[float, float]:
    """Median seconds to build a model and to capture it."""
    built, captured = [], []
    for _ in range(REPEATS):
        seconds, model = timed(lambda: timm.create_model(name))
        built.append(seconds)
        captured.append(timed(lambda model=model: capture(model))[0])
    return statistics.median(built), statistics.median(captured)


def against_building(names: Sequence[str]) -> list[str]:
    """The bounds that are missed."""
    missed, ratios = [], []
    print(f"{'':40}{'build ms':>10}{'capture ms':>12}{'ratio':>8}")
    for name in names:
        build, taken = compare(name)
        ratios.append(taken / build)
        over = taken > max(EACH * build, FLOOR)
        print(f"{name:40}{1e3 * build:10.0f}{1e3 * taken:12.0f}{ratios[-1]:8.2f}{'  over its bound' if over else ''}")
        if over:
            missed.append(
                f"{name}: {ratios[-1]:.2f} x and {1e3 * taken:.0f} ms, bound {EACH} x or {1e3 * FLOOR:.0f} ms"
            )
    middle = statistics.median(ratios)
    print(f"median ratio {middle:.2f}, {min(ratios):.2f} to {max(ratios):.2f}\n")
    return [*missed, f"median ratio {middle:.2f}, bound {MEDIAN}"] if middle > MEDIAN else missed


def whole_way(name: str) -> tuple[int, float]:
    """Nodes of a model's graph, and seconds to trace it, match all patterns and plan edits everywhere."""
    model = make_model(name)

    def go() -> int:
        captured = capture(model)
        plan(captured, load_recipe(everywhere(sites_by_edge(Sites(captured)))), total_steps=10)
        return len(captured.view.graph.nodes)

    runs = [timed(go) for _ in range(REPEATS)]
    return runs[0][1], statistics.median(seconds for seconds, _ in runs)


def against_size() -> list[str]:
    """Whether the time grows faster than the graph."""
    points = sorted((*whole_way(name), name) for name in SIZES)
    slope, start = statistics.linear_regression([n for n, *_ in points], [seconds for _, seconds, _ in points])
    power = statistics.linear_regression([math.log(n) for n, *_ in points], [math.log(s) for _, s, _ in points]).slope
    print(f"{'':40}{'nodes':>8}{'ms':>8}{'line':>8}")
    for nodes, seconds, name in points:
        print(f"{name:40}{nodes:8}{1e3 * seconds:8.0f}{1e3 * (start + slope * nodes):8.0f}")
    print(f"{1e3 * start:.0f} ms + {1e6 * slope:.0f} ms for 1000 nodes; time grows as nodes ** {power:.2f}")
    return [f"time grows as nodes ** {power:.2f}, bound {POWER}"] if power > POWER else []


def main(names: Sequence[str]) -> int:
    torch.set_num_threads(1)
    whole_way("resnet18")  # what is imported and cached at first use
    missed = against_building(names or list(SMALLEST.values()))
    if not names:
        missed += against_size()
    for line in missed:
        print(f"missed: {line}")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
