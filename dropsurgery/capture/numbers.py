"""Tensors that a forward may run on while it is only looked at: fake ones, or numbers where nothing else will do.

Either way the model's own tensors are not touched: the probes hold others for the time of the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._subclasses import FakeTensor

from dropsurgery.capture.levels import map_tree

if TYPE_CHECKING:
    from dropsurgery.capture.recorder import Recorder


@contextmanager
def fakes_in(probe: nn.Module, recorder: Recorder) -> Iterator[None]:
    """Let a probe and all below it hold fake tensors meanwhile: it may write to them."""
    known: dict[int, Any] = {}
    with _replaced(probe, lambda fields: recorder.fake(fields, known)), recorder.values:
        yield


@contextmanager
def numbers_in(probe: nn.Module) -> Iterator[None]:
    """Let a probe and all below it hold copies of their numbers, and made-up ones where there are none (on meta)."""
    known: dict[int, Any] = {}

    def number(item: Any) -> Any:
        if not isinstance(item, torch.Tensor):
            return item
        if id(item) not in known:
            known[id(item)] = _made_up(item) if _is_empty(item) else item.detach().clone()
        return known[id(item)]

    with _replaced(probe, lambda fields: map_tree(fields, number)):
        yield


def made_up(tree: Any, *, whole: int = 0) -> Any:
    """The tree with numbers in place of its fake tensors; `whole` is what integers are."""
    return map_tree(tree, lambda item: _made_up(item, whole) if isinstance(item, torch.Tensor) else item)


def _made_up(tensor: torch.Tensor, whole: int = 0) -> torch.Tensor:
    """Numbers of a tensor's shape and dtype: small and random, ones for scales and variances, `whole` for indices."""
    device = torch.device("cpu") if tensor.device.type == "meta" else tensor.device
    made = torch.full(tuple(tensor.shape), whole, dtype=tensor.dtype, device=device)
    if not made.is_floating_point():
        return made
    if made.ndim == 1:
        return made.fill_(1.0)
    few = torch.empty(min(made.numel(), _DRAWN), dtype=made.dtype, device=device)
    few.normal_(0, 0.02 if made.ndim < 4 else 0.1)
    flat = made.view(-1)
    for begin in range(0, flat.numel(), _DRAWN):  # the same ones again: to draw millions takes long
        flat[begin : begin + _DRAWN] = few[: flat.numel() - begin]
    return made


_DRAWN = 1 << 16


def has_data(tree: Any) -> bool:
    """Whether the tensors of a tree hold numbers of their own: not on the meta device, nor one number expanded."""
    found: list[bool] = []
    map_tree(tree, lambda item: found.append(not _is_empty(item)) if isinstance(item, torch.Tensor) else None)
    return bool(found) and all(found)


def _is_empty(tensor: torch.Tensor) -> bool:
    if tensor.device.type == "meta" or isinstance(tensor, FakeTensor):
        return True
    return tensor.numel() > 1 and not any(tensor.stride())


@contextmanager
def _replaced(probe: nn.Module, replace: Callable[[dict[str, Any]], dict[str, Any]]) -> Iterator[None]:
    """Replace the tensors that modules hold, and those in their plain attributes; undo what the modules then set."""
    with ExitStack() as undo:
        for module in probe.modules():
            fields = module.__dict__
            plain = {name: value for name, value in fields.items() if type(value) in _HOLDERS and name not in _INTERNAL}
            for place, held in ((fields["_parameters"],) * 2, (fields["_buffers"],) * 2, (fields, plain)):
                undo.callback(_refill, place, dict(place))
                place.update(replace(dict(held)))
        yield


def _refill(place: dict[str, Any], before: dict[str, Any]) -> None:
    place.clear()
    place.update(before)


_INTERNAL = frozenset(nn.Module().__dict__)
_HOLDERS = (torch.Tensor, list, tuple, dict)
