"""What commands print: text, JSON and tables on standard output, messages on standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any


def write(text: str) -> int:
    """Print text as it is."""
    sys.stdout.write(text)
    return 0


def print_json(facts: Any) -> int:
    """Print plain data."""
    return write(json.dumps(facts, indent=2, ensure_ascii=False) + "\n")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> int:
    """A table that fits the terminal; in a pipe, padded columns of which nothing is cut."""
    cells = [columns, *([_cell(cell) for cell in row] for row in rows)]
    if sys.stdout.isatty():
        _rich(cells)
        return 0
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells)
    return write("".join(f"{line}\n" for line in lines))


def _rich(cells: Sequence[Sequence[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in cells[0]:
        table.add_column(column, overflow="fold")
    for row in cells[1:]:
        table.add_row(*map(Text, row))  # as text: brackets are no markup
    Console().print(table)


def _cell(value: Any) -> str:
    return "-" if value is None else str(value)


def pairs(items: dict[str, Any]) -> str:
    """A dict as `name: value` in one line."""
    return ", ".join(f"{name}: {value}" for name, value in items.items())


def first_line(module: Any) -> str:
    """The first line of a module's docstring."""
    return (getattr(module, "__doc__", None) or "").strip().partition("\n")[0]


def say(text: str) -> None:
    """Tell the user something, on standard error."""
    sys.stderr.write(f"dropsurgery: {text}\n")
