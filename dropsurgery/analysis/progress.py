"""Progress on standard error."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Item = TypeVar("Item")


def bar(*more: str) -> Progress:
    """A progress bar; `more` are further columns, as rich takes them (`{task.fields[name]}`)."""
    texts = map(TextColumn, more)
    head, times = TextColumn("{task.description}"), (TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(head, BarColumn(), MofNCompleteColumn(), *texts, *times, console=Console(file=sys.stderr))


def followed(what: str, items: Iterable[Item], total: int) -> Iterator[Item]:
    """The same items, with a bar that moves on with each."""
    with bar() as shown:
        yield from shown.track(items, total=total, description=what)
