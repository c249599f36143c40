"""NSDropout beside dropout and `x * c`, forward and backward: `python tests/benchmarks/bench_nsdropout.py`.

On vectors all of these take microseconds, of which the calls themselves are most; what counts is a training step of a
net with it, and what it costs to take in a validation, which is one forward more. The formula by a sort of every class
stands beside it. Exit code 1 where a bound is missed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any

import timm
import torch
import torch.nn.functional as F
from bench_dropblock import keep_memory
from bench_regularizers import Bound, Call, Case, in_turn, kept_by, tried
from torch import Tensor, nn

from dropsurgery import apply_recipe, get_regularizer

# (samples, units), classes: all of them in the batch, and more of them than samples
SIZES = (((64, 512), 10), ((128, 4096), 10), ((256, 2048), 1000))
STEP = 1.05  # of the plain net's
READING = 1.05  # of a forward
KEPT = 1.0  # bytes an element


def layer_of(units: int, classes: int, samples: int) -> Any:
    """One that has had a validation, and has the labels of a batch."""
    layer: Any = get_regularizer("nsdropout")(p=0.2)
    validation = torch.randn(2 * classes, units), torch.arange(2 * classes) % classes
    with layer.batch(validation=validation):
        pass
    layer.labels = torch.randint(classes, (samples,))
    return layer


def sorting(layer: Any) -> Call:
    """The formula as it stands: a mean and a sort for each class."""

    def call(x: Tensor) -> Tensor:
        masks = torch.ones_like(layer.means)
        for label in layer.labels.unique().tolist():
            d = x.detach()[layer.labels == label].mean(0) - layer.means[label]
            masks[label, d.argsort(descending=True)[: round(0.2 * len(d))]] = 0
        return x * masks[layer.labels] / 0.8

    return call


def cases() -> Iterator[Case]:
    for shape, classes in SIZES:
        layer = layer_of(shape[1], classes, shape[0])
        calls: dict[str, Call] = {
            "nsdropout": layer,
            "plainly": sorting(layer),
            "F.dropout": lambda x: F.dropout(x, 0.2),
        }
        bounds = (Bound("nsdropout", "plainly", 1.0),)
        yield Case(f"{classes} classes", shape, calls, bounds, rounds=31, shares=False)


def memory() -> list[str]:
    missed = []
    for shape, classes in SIZES:
        kept = kept_by(layer_of(shape[1], classes, shape[0]), torch.randn(shape, requires_grad=True))
        print(f"\nmemory on {shape}, {classes} classes: keeps {kept:.3f} bytes an element")
        if kept > KEPT + 0.01:
            missed.append(f"memory on {shape}: keeps {kept:.3f} bytes an element, asked {KEPT}")
    return missed


def whole() -> list[str]:
    """A training step of ResNet-18, and taking in a validation beside a forward of the same samples in eval."""
    torch.manual_seed(0)
    images, labels = torch.randn(8, 3, 224, 224), torch.arange(8) % 4
    nets: dict[str, Any] = {
        "plain": timm.create_model("resnet18"),
        "nsdropout": apply_recipe(timm.create_model("resnet18"), "nsdropout_classifier"),
    }
    with nets["nsdropout"].surgery.batch(validation=(images, labels)):
        pass

    def trained(net: Any) -> float:
        begin = time.perf_counter()
        if net is nets["plain"]:
            net(images).sum().backward()
        else:
            with net.surgery.batch(labels=labels):
                net(images).sum().backward()
        taken = time.perf_counter() - begin
        net.zero_grad()
        return taken

    def read(net: nn.Module) -> float:
        begin = time.perf_counter()
        if net is nets["plain"]:
            with torch.no_grad():
                net.eval()(images)
        else:
            with net.surgery.batch(validation=(images, labels)):  # type: ignore[operator, union-attr]
                pass
        return time.perf_counter() - begin

    missed = []
    for what, call, most in (("training step", trained, STEP), ("validation", read, READING)):
        medians = in_turn({name: net.train() for name, net in nets.items()}, call, rounds=15)
        ratio = medians["nsdropout"] / medians["plain"]
        print(f"\nresnet18, {what}, 8x3x224x224: {medians['nsdropout'] * 1e3:.1f} ms, {ratio:.3f} of plain")
        if ratio > most:
            missed.append(f"{what}: {ratio:.3f} of the plain net's, asked {most}")
    return missed


def main() -> int:
    torch.set_num_threads(2)
    torch.manual_seed(0)
    missed = [line for case in cases() for line in tried(case)] + memory() + whole()
    print("\n" + "\n".join(missed or ["every bound holds"]))
    return 1 if missed else 0


if __name__ == "__main__":
    keep_memory()
    sys.exit(main())
