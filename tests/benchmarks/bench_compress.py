"""What compression gives: parameters, multiply-adds and time of each model, whole and at half width.

    python tests/benchmarks/bench_compress.py [NAME…]

Every site of structural dropout keeps half of its units (an attention of 3 heads keeps 2). Times are of one batch of
BATCH images of 224 pixels in eval mode, medians of interleaved repetitions on THREADS threads. Then the largest
difference of masked and narrow outputs, as a share of the largest output, in float32 and in float64 (at WIDTHS[1],
whose factors are no powers of two), and beside them how far the masked model's own float32 is from its float64: a deep
net with random weights rounds by more than 1e-6. Exit code 1 where outputs differ by more than 1e-12 in float64, or in
float32 by more than 1e-6 and twice that rounding, or a narrow model is not smaller and faster than the whole one.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dropsurgery import apply_recipe, compress
from dropsurgery.models import make_model

BATCH, THREADS, REPEATS, WIDTHS, TOLERANCE, EXACT = 4, 2, 9, (0.5, 0.3), 1e-6, 1e-12


def structural(*places: dict[str, Any]) -> dict[str, Any]:
    entries = [
        {"name": f"sites {index}", "insert": "structural_dropout", "with": {"p": 0.5}, **place}
        for index, place in enumerate(places)
    ]
    return {"version": 1, "name": "half", "summary": "half", "entries": entries}


ACTS = {"pattern": "conv_bn_act", "edge": "output"}
INVERTED = ACTS | {"where": {"module": ["blocks.*"], "exclude": ["blocks.0.*"]}}
ENCODER = ACTS | {"where": {"path": "branch", "role": "encoder", "min_size": 2}}
PAIRS = {"pattern": "double_conv", "edge": "between"}

MODELS: dict[str, Any] = {
    "resnet18": "structural_dropout_resnet",
    "resnet50": "structural_dropout_resnet",
    "vgg11_bn": structural(ACTS, {"pattern": "conv_act", "edge": "output"}),
    "mobilenetv3_large_100": structural(INVERTED),
    "vit_tiny_patch16_224": "structural_dropout_vit",
    "smp:Unet:resnet34": structural(ENCODER, PAIRS),
}


def lively(model: nn.Module) -> nn.Module:
    """Norms with numbers as training would leave them."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.weight, module.running_var):  # a last norm that begins at 0 would hide its branch
                nn.init.uniform_(tensor, 0.5, 1.5)
            for tensor in (module.bias, module.running_mean):
                nn.init.uniform_(tensor, -0.3, 0.3)
    return model.eval()


def multiply_adds(model: nn.Module, x: torch.Tensor) -> int:
    """By torch's own counter, which counts two operations for each."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(x)
    return int(counter.get_total_flops() // 2 // len(x))


def seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def latencies(models: list[nn.Module], x: torch.Tensor) -> list[float]:
    """Median milliseconds a batch, of models that take turns."""
    times: list[list[float]] = [[] for _ in models]
    with torch.no_grad():
        for model in models:
            model(x)
        for _ in range(REPEATS):
            for model, kept in zip(models, times, strict=True):
                kept.append(seconds(lambda model=model: model(x)))
    return [1000 * statistics.median(kept) for kept in times]


def relative(expected: torch.Tensor, got: torch.Tensor) -> float:
    return float((expected.double() - got.double()).abs().max() / expected.double().abs().max())


def compared(gm: Any, x: torch.Tensor) -> tuple[float, float, float]:
    """Masked against narrow in float32; the masked model's float32 against its float64; masked against narrow there."""
    wide: Any = copy.deepcopy(gm).double()
    outputs = []
    for model, inputs in ((gm, x), (wide, x.double())):
        narrow = compress(model, WIDTHS[1], inputs)
        with torch.no_grad(), model.surgery.width(WIDTHS[1]):
            outputs.append((model(inputs), narrow(inputs)))
    (single, narrow_single), (double, narrow_double) = outputs
    return relative(single, narrow_single), relative(double, single), relative(double, narrow_double)


def measured(name: str) -> bool:
    """Print one row; gives whether all holds."""
    model = lively(make_model(name, device="cpu"))
    x = torch.randn(BATCH, 3, 224, 224)
    gm: Any = apply_recipe(model, MODELS[name], example_inputs=x, total_steps=1)
    made = []
    taken = seconds(lambda: made.append(compress(gm, WIDTHS[0])))
    narrow = made[0]
    differences = compared(gm, x[:2])
    counts = [sum(p.numel() for p in each.parameters()) for each in (model, narrow)]
    macs = [multiply_adds(each, x) for each in (model, narrow)]
    times = latencies([model, narrow], x)
    print(
        f"{name:22} {counts[0] / 1e6:8.2f} {counts[1] / 1e6:8.2f} {counts[1] / counts[0]:6.1%}"
        f"  {macs[0] / 1e9:7.3f} {macs[1] / 1e9:7.3f} {macs[1] / macs[0]:6.1%}"
        f"  {times[0]:8.1f} {times[1]:8.1f} {times[1] / times[0]:6.1%}"
        f"  {differences[0]:7.1e} {differences[1]:7.1e} {differences[2]:7.1e}  {taken:6.1f} s",
        flush=True,
    )
    smaller = all(narrow < whole for whole, narrow in (counts, macs, times))
    single, rounding, double = differences
    return smaller and double <= EXACT and single <= max(TOLERANCE, 2 * rounding)


def main(names: list[str]) -> int:
    torch.set_num_threads(THREADS)
    print(
        f"{'':22} {'parameters / million':^24}  {'multiply-adds / 1e9':^22}  {'ms a batch of ' + str(BATCH):^24}"
        f"  {'differences':^23}"
    )
    print(
        f"{'model':22} {'whole':>8} {'half':>8} {'share':>6}  {'whole':>7} {'half':>7} {'share':>6}"
        f"  {'whole':>8} {'half':>8} {'share':>6}  {'float32':>7} {'round':>7} {'float64':>7}  {'compress':>8}"
    )
    held = [measured(name) for name in names or MODELS]
    return int(not all(held))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
