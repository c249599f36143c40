"""How much is dropped at each site of an emitted model, beside what was asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from dropsurgery.planning import ADOPT
from dropsurgery.records import Edit


@dataclass(frozen=True)
class AuditRow:
    """One site: the rate asked for, the share that it should drop by its closed form, and the one measured.

    `measured` is NaN for a layer that was adopted, and where what is dropped cannot be counted: `note` says why.
    """

    site: str
    regularizer: str
    p: float
    expected: float
    measured: float
    shape: tuple[int, ...]
    note: str = ""


class Audit(tuple[AuditRow, ...]):
    """The rows of an audit; `str()` is a table."""

    def __str__(self) -> str:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        notes = ("note",) if any(row.note for row in self) else ()
        for column in ("site", "regularizer", "p", "expected drop", "measured drop", "shape", *notes):
            table.add_column(column, no_wrap=True)
        for row in self:
            shape = "x".join(map(str, row.shape))
            measured = "not counted" if row.note else f"{row.measured:.4f}"
            rates = (f"{row.p:g}", f"{row.expected:.4f}", measured)
            table.add_row(row.site, row.regularizer, *rates, shape, *([row.note] if notes else []))
        console = Console(width=400, no_color=True, highlight=False)
        with console.capture() as captured:
            console.print(table)
        return "\n".join(line.rstrip() for line in captured.get().splitlines())


def arriving(regularizers: Mapping[str, nn.Module], run: Callable[[], Any]) -> dict[str, torch.Tensor]:
    """What arrives at each site in a run, or ones of its shape, which take no memory, where the values do not count."""
    found: dict[str, torch.Tensor] = {}

    def noting(site: str) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = next(map(_tensor_of, (*args, *kwargs.values())))
            own = getattr(module, "by_values", False)
            found[site] = x.clone() if own else torch.ones((), device=x.device).expand(x.shape)

        return note

    handles = [r.register_forward_pre_hook(noting(site), with_kwargs=True) for site, r in regularizers.items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found


def _tensor_of(given: Any) -> torch.Tensor:
    tensor: torch.Tensor = given if isinstance(given, torch.Tensor) else given.data  # of a PackedSequence
    return tensor


def audited(edit: Edit, regularizer: Any, x: torch.Tensor) -> AuditRow:
    """The row of one site, of what arrives there."""
    site, shape = (edit.site.id, edit.regularizer, edit.p), tuple(x.shape)
    if edit.kind == ADOPT:
        return AuditRow(*site, edit.p, float("nan"), shape)
    expected = regularizer.expected_drop(shape)
    if regularizer.uncounted:
        return AuditRow(*site, expected, float("nan"), shape, regularizer.uncounted)
    if regularizer.by_values:
        return AuditRow(*site, expected, regularizer.realised_drop(x), shape)
    ones = x.contiguous()
    given = (ones, 2 * ones) if edit.kind == "combine" else (ones,)
    given_back = regularizer(*given)
    dropped = given_back == 0 if regularizer.drops == "zero" else given_back != sum(given)
    return AuditRow(*site, expected, float(dropped.float().mean()), shape)
