"""What a layer's units respond with in training: sums of magnitudes, of values on their way or of their gradients.

Sums grow in place, by operators of their own: a compiled model has them as they are, and a forward that activation
checkpointing repeats within backward is told from a new one when it runs.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from typing import Protocol

import torch
from torch import Tensor

_handles = itertools.count()
_watchers: weakref.WeakValueDictionary[int, Watcher] = weakref.WeakValueDictionary()


class Watcher(Protocol):
    """Who has the sums: of magnitudes for each unit (D,), and the number of rows that were added up, 0-dim."""

    total: Tensor
    rows: Tensor

    def weight_of_layer(self) -> Tensor:
        """Return the weight (out, D) of the layer whose units are watched."""


def handle_of(watcher: Watcher) -> int:
    """Return a new number by which hooks find `watcher`: they keep neither it nor any graph alive."""
    handle = next(_handles)
    _watchers[handle] = watcher
    return handle


def watch_gradient(value: Tensor, handle: int, *, of_output: bool) -> None:
    """Have the gradient of what a layer reads added to the watcher's sums, when backward comes to `value`.

    `value` is what it reads, or with `of_output` what it gives, from whose gradient and the weight that of the input
    follows: where nothing in front of the layer learns, none is computed.
    """
    value.register_hook(functools.partial(_note, handle, of_output))  # type: ignore[no-untyped-call]


def _note(handle: int, of_output: bool, gradient: Tensor) -> Tensor:
    noted: Tensor = note_gradient(gradient, handle, of_output)
    return noted


@torch.library.custom_op("dropsurgery::add_response", mutates_args=("total", "rows"))
def add_response(x: Tensor, total: Tensor, rows: Tensor) -> None:
    """Add the magnitudes of `x` (..., D) to `total` (D), and their number of rows to `rows`; in backward nothing."""
    if torch._C._current_graph_task_id() == -1:
        _add(x, total, rows)


@add_response.register_fake
def _(x: Tensor, total: Tensor, rows: Tensor) -> None:
    return None


# It gives the gradient back, so that no compiler leaves it out.
@torch.library.custom_op(
    "dropsurgery::note_gradient",
    mutates_args=(),
    tags=(torch.Tag.nondeterministic_seeded, torch.Tag.cudagraph_unsafe),
)
def note_gradient(gradient: Tensor, handle: int, of_output: bool) -> Tensor:
    """Add the magnitudes of a gradient to the sums of the watcher of that handle, and return the gradient."""
    watcher = _watchers.get(handle)
    if watcher is not None:
        of_input = gradient
        if of_output:
            weight = watcher.weight_of_layer().detach()
            wide = torch.promote_types(gradient.dtype, weight.dtype)
            of_input = gradient.to(wide) @ weight.to(wide)
        _add(of_input, watcher.total, watcher.rows)
    return gradient.clone()


@note_gradient.register_fake
def _(gradient: Tensor, handle: int, of_output: bool) -> Tensor:
    return torch.empty_like(gradient)


def _same(ctx: object, gradient: Tensor) -> tuple[Tensor, None, None]:
    return gradient, None, None


note_gradient.register_autograd(_same)


def _add(x: Tensor, total: Tensor, rows: Tensor) -> None:
    """Add them; nothing where they are not finite, as gradients are in a step that a GradScaler skips."""
    flat = x.detach().reshape(-1, x.shape[-1])
    added = torch.linalg.vector_norm(flat, 1, 0, dtype=torch.promote_types(x.dtype, torch.float32)).to(total.dtype)
    finite = added.isfinite().all()
    total += torch.where(finite, added, 0)
    rows += len(flat) * finite


def summed_over_processes(total: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return both sums over all processes of a distributed training: these sums, where there is one process."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return total, rows
    if torch.distributed.get_world_size() == 1:
        return total, rows
    both = torch.cat([total, rows[None]])
    torch.distributed.all_reduce(both)
    return both[:-1], both[-1]
