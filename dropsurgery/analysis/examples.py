"""Inputs made of an example: with numbers, with other batch sizes, with larger or smaller images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dropsurgery.capture import Inputs

# To the height and to the width: not the same, and what a stride of 32 divides.
_GROWTH = (32, 64)
_LARGE = 400


def more_samples(inputs: Inputs) -> Inputs:
    """The same with one sample more: tensors along their first axis, lists of tensors by another entry."""
    made: Inputs = _mapped(inputs, _repeat_first, lambda images: [*images, images[0]])
    return made


def larger_images(inputs: Inputs) -> Inputs | None:
    """The same with larger images, not square; None where nothing is an image."""
    grown: list[Tensor] = []

    def grow(x: Tensor) -> Tensor:
        grown.append(_grow(x))
        return grown[-1]

    made: Inputs = _mapped(inputs, lambda x: grow(x) if x.dim() >= 4 else x, lambda images: list(map(grow, images)))
    return made if grown else None


def smaller_images(inputs: Inputs) -> Iterator[Inputs]:
    """The same with images a fourth, a third, half as wide, where they are so large that numbers take minutes."""
    for parts in (4, 3, 2):
        shrunk: list[Tensor] = []
        shrink = partial(_shrink, parts, shrunk)
        made: Inputs = _mapped(inputs, shrink, partial(_each, shrink))
        if shrunk:
            yield made


def _shrink(parts: int, shrunk: list[Tensor], x: Tensor) -> Tensor:
    if x.dim() < 4 or min(x.shape[-2:]) < _LARGE or any(size % parts for size in x.shape[-2:]):
        return x
    shrunk.append(x.new_zeros((*x.shape[:-2], *(size // parts for size in x.shape[-2:]))))
    return shrunk[-1]


def _each(change: Callable[[Tensor], Tensor], images: list[Tensor]) -> list[Tensor]:
    return [change(image) for image in images]


def with_numbers(inputs: Inputs, device: str = "cpu") -> Inputs:
    """The same shapes with random numbers; whole numbers and flags stay as they are."""
    generator = torch.Generator().manual_seed(2)

    def filled(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x.to(device)
        return torch.randn(x.shape, generator=generator).to(device, x.dtype)

    made: Inputs = _mapped(inputs, filled, lambda images: list(map(filled, images)))
    return made


def _mapped(tree: Any, single: Callable[[Tensor], Tensor], samples: Callable[[list[Tensor]], Any]) -> Any:
    """Map tensors, and lists of tensors (one a sample) as a whole."""
    if isinstance(tree, Tensor):
        return single(tree)
    if isinstance(tree, list) and tree and all(isinstance(item, Tensor) for item in tree):
        return samples(tree)
    if isinstance(tree, (list, tuple)):
        return type(tree)(_mapped(item, single, samples) for item in tree)
    if isinstance(tree, dict):
        return {key: _mapped(item, single, samples) for key, item in tree.items()}
    return tree


def _repeat_first(x: Tensor) -> Tensor:
    return torch.cat([x, x[:1]]) if x.dim() else x


def _grow(x: Tensor) -> Tensor:
    height, width = (size + more for size, more in zip(x.shape[-2:], _GROWTH, strict=True))
    return x.new_zeros((*x.shape[:-2], height, width))
