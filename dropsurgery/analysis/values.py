"""Equality with values: two models on the same weights and numbers give the same bits, gradients and buffers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dropsurgery.analysis.examples import larger_images, more_samples, with_numbers
from dropsurgery.analysis.traces import tensors_of
from dropsurgery.capture import Inputs
from dropsurgery.forwards import SLOTS

_NOISE = 0.3


def randomize(model: nn.Module) -> nn.Module:
    """Random scales and statistics: a last norm that starts at zero would hide whatever happens on its branch."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and parameter.is_floating_point():
                low, high = (-0.1, 0.1) if name.endswith("bias") else (0.5, 1.0)
                parameter.uniform_(low, high, generator=generator)
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.8, 1.5, generator=generator)
    return model


@dataclass(frozen=True)
class Run:
    """All that one call did."""

    error: str | None
    outputs: list[Tensor]
    random: Tensor
    buffers: list[Tensor]
    gradients: dict[str, Tensor]


def same_values(model: nn.Module, gm: Any, inputs: Inputs) -> Iterator[str]:
    """The same numbers in eval and, with gradients and buffers, in training; for other shapes; and of a copy.

    Args:
        model: with weights (`randomize`).
        gm: what surgery made of it; it shares its parameters and buffers.
        inputs: an example; only its shapes count.
    """
    inputs = with_numbers(inputs)
    plain = _run(model, inputs, training=False)
    yield from _differences("values in eval", model, plain, gm, inputs, training=False)
    trained = _run(model, inputs, training=True)
    yield from _differences("values in training", model, trained, gm, inputs, training=True)
    other = with_numbers(more_samples(inputs))
    yield from _differences("values of another batch size", model, _run(model, other, training=False), gm, other)
    larger = larger_images(inputs)
    if larger is not None:
        larger = with_numbers(larger)
        yield from _differences("values of larger images", model, _run(model, larger, training=False), gm, larger)
    yield from _differences("values of a copy", model, plain, copy.deepcopy(gm), inputs)
    if trained.error is None and gm.surgery.plan.edits:
        with gm.surgery.active(p=_NOISE):
            noisy = _run(gm, inputs, training=True)
        if noisy.error is None and not _unequal(trained.outputs, noisy.outputs):
            yield f"values in training at the rate {_NOISE}: no noise"


def not_finite(model: nn.Module, inputs: Inputs) -> bool:
    """Whether a model gives numbers that hide differences."""
    outputs = _run(model, with_numbers(inputs), training=False).outputs
    return not all(bool(torch.isfinite(output).all()) for output in outputs)


def _differences(
    what: str, model: nn.Module, expected: Run, gm: nn.Module, inputs: Inputs, *, training: bool = False
) -> Iterator[str]:
    found = list(_compared(expected, _run(gm, inputs, training=training)))
    if found and list(_compared(expected, _run(model, inputs, training=training))):
        return  # the model does not repeat itself either
    yield from (f"{what}: {line}" for line in found)


def _compared(one: Run, other: Run) -> Iterator[str]:
    if one.error != other.error:
        yield f"expected {one.error or 'no error'}, got {other.error or 'no error'}"
    elif _unequal(one.outputs, other.outputs):
        yield "other outputs"
    elif not torch.equal(one.random, other.random):
        yield "another number of random draws"
    elif _unequal(one.buffers, other.buffers):
        yield "other buffers"
    elif list(one.gradients) != list(other.gradients):
        yield "other parameters have gradients"
    elif wrong := [name for name, grad in one.gradients.items() if _unequal([grad], [other.gradients[name]])]:
        yield f"other gradients of {len(wrong)} parameters: {', '.join(wrong[:3])}"


def _unequal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return len(ours) != len(theirs) or any(
        a.shape != b.shape or a.dtype != b.dtype or not torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
        for a, b in zip(ours, theirs, strict=True)
    )


def _run(model: nn.Module, inputs: Inputs, *, training: bool) -> Run:
    """Call a model in a mode under a seed, backward included where it trains; buffers are put back afterwards."""
    error, outputs, gradients = None, [], {}
    with _restored_buffers(model) as buffers, torch.random.fork_rng([]), torch.set_grad_enabled(training):
        torch.manual_seed(3)
        try:
            outputs = list(tensors_of(model.train(training)(*inputs[0], **inputs[1])))
            if training:
                gradients = _gradients(model, outputs)
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
        random = torch.get_rng_state()
        after = [buffer.clone() for buffer in buffers]
    return Run(error, [output.detach() for output in outputs], random, after, gradients)


def _gradients(model: nn.Module, outputs: list[Tensor]) -> dict[str, Tensor]:
    scalar = sum(output.float().square().mean() for output in outputs if output.requires_grad)
    if isinstance(scalar, Tensor):
        scalar.backward()  # type: ignore[no-untyped-call]
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return gradients


@contextmanager
def _restored_buffers(model: nn.Module) -> Iterator[list[Tensor]]:
    """The buffers of the model itself, put back at the end."""
    buffers = [b for n, b in model.named_buffers() if b is not None and SLOTS not in n.split(".")]
    before = [buffer.clone() for buffer in buffers]
    try:
        yield buffers
    finally:
        with torch.no_grad():
            for buffer, saved in zip(buffers, before, strict=True):
                buffer.copy_(saved)
