"""How good a net with structural dropout is at each width: one evaluation a width, by masks, and where it bends."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from dropsurgery.analysis.progress import bar
from dropsurgery.errors import SurgeryError
from dropsurgery.widths import Widths, resolve_widths, structural_sites

_FLAT = 1e-9  # of the curve's height: less is rounding


@dataclass(frozen=True)
class WidthPoint:
    """One width: as it was asked for, the share of all units that it keeps, how many each site keeps, and the score."""

    width: Widths
    share: float
    units: dict[str, int]
    score: float


@dataclass(frozen=True)
class WidthCurve:
    """The score at each width, from the narrowest to the widest; `str()` is a table.

    It need not rise all the way, so that no width can be found by halving an interval: each one asked for is measured.
    """

    points: tuple[WidthPoint, ...]

    @property
    def knee(self) -> WidthPoint | None:
        """The point farthest above the straight line from the narrowest to the widest point; None where none is.

        Shares and scores are both mapped to [0, 1], from the narrowest point to the widest, and the point of largest
        (score - share) is taken, the narrowest of equals: what is lost by going below it is more than what is gained
        by going above. For a score that falls with the width, such as a loss, that is the same turned round. There is
        none with less than three different shares, with equal scores at both ends, with a score that is not finite, or
        where no point lies above the line.
        """
        points = self.points
        if len({point.share for point in points}) < 3 or not all(math.isfinite(point.score) for point in points):
            return None
        first, last = points[0], points[-1]
        wide, high = last.share - first.share, last.score - first.score
        if high == 0:
            return None
        above = [(point.score - first.score) / high - (point.share - first.share) / wide for point in points]
        best = max(above)
        return points[above.index(best)] if best > _FLAT else None

    def __iter__(self) -> Iterator[WidthPoint]:
        return iter(self.points)

    def __len__(self) -> int:
        return len(self.points)

    def __str__(self) -> str:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        for column in ("width", "share of units", "score", ""):
            table.add_column(column, no_wrap=True, justify="left" if column in ("width", "") else "right")
        for point in self.points:
            mark = "knee" if point is self.knee else ""
            table.add_row(_shown(point.width), f"{point.share:.4f}", f"{point.score:.6g}", mark)
        console = Console(width=400, no_color=True, highlight=False)
        with console.capture() as captured:
            console.print(table)
        return "\n".join(line.rstrip() for line in captured.get().splitlines())

    def plot(self, path: str | Path | None = None) -> Any:
        """Return a matplotlib figure of the curve with its knee marked, and write it to `path` if one is given.

        Raises:
            SurgeryError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise SurgeryError(
                'plot: expected matplotlib, which is not installed; pip install "dropsurgery[examples]", or matplotlib'
            ) from error
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        axes.plot([point.share for point in self.points], [point.score for point in self.points], marker="o")
        knee = self.knee
        if knee is not None:
            label = f"knee: {_shown(knee.width)}"
            axes.plot([knee.share], [knee.score], marker="o", markersize=12, fillstyle="none", color="C3", label=label)
            axes.axvline(knee.share, color="C3", linestyle=":", linewidth=1)
            axes.legend()
        axes.set_xlabel("share of units kept")
        axes.set_ylabel("score")
        axes.grid(alpha=0.3)
        if path is not None:
            figure.savefig(path)
        return figure


def width_curve(gm: nn.Module, evaluate: Callable[[Any], float], widths: Iterable[Widths]) -> WidthCurve:
    """Measure a model with structural dropout at each width, by masks: nothing is cut out of it.

    The model is in eval and without gradients during it, and as before afterwards: its modes and its widths.

    Args:
        gm: a model made by `apply_recipe` from a recipe with structural_dropout.
        evaluate: takes the model, and returns its score as a number, such as the accuracy on validation data.
        widths: each an integer, a float, or a mapping, as `gm.surgery.width` takes it.

    Raises:
        SurgeryError: no such model, no widths, one that a site cannot have, or a score that is no number. Widths are
            checked before anything is evaluated.
    """
    if not isinstance(widths, Iterable) or isinstance(widths, (str, Mapping)):
        raise SurgeryError(f"width_curve: expected a list of widths, got {widths!r}")
    asked = list(widths)
    if not asked:
        raise SurgeryError("width_curve: expected one width at least, got none")
    if not callable(evaluate):
        raise SurgeryError(f"width_curve: expected a function that takes the model, got {evaluate!r}")
    resolved = [resolve_widths(gm, width) for width in asked]
    full = {site: each.full_width for site, each in structural_sites(_surgery(gm).regularizers).items()}
    now = {site: each.width or full[site] for site, each in structural_sites(_surgery(gm).regularizers).items()}
    points = []
    with _resting(gm), torch.no_grad(), bar("{task.fields[score]}") as shown:
        task = shown.add_task("widths", total=len(asked), score="")
        for width, units in zip(asked, resolved, strict=True):
            gm.eval()
            with _surgery(gm).width(units):
                score = _number(evaluate(gm))
            kept = now | units
            points.append(WidthPoint(width, sum(kept.values()) / sum(full.values()), kept, score))
            shown.update(task, advance=1, score=f"{_shown(width)}: {score:.4g}")
    return WidthCurve(tuple(sorted(points, key=lambda point: point.share)))


def _surgery(gm: nn.Module) -> Any:
    return gm.__dict__["surgery"]


def _shown(width: Widths) -> str:
    """A width as a short word."""
    if not isinstance(width, Mapping):
        return f"{width:g}"
    return "{" + ", ".join(f"{name}: {each:g}" for name, each in width.items()) + "}"


def _number(score: Any) -> float:
    try:
        return float(score)
    except (TypeError, ValueError, RuntimeError) as error:
        raise SurgeryError(f"width_curve: expected evaluate(gm) to return a number, got {score!r}") from error


@contextmanager
def _resting(gm: nn.Module) -> Iterator[None]:
    """Give back the mode of each module."""
    modes = {module: module.training for module in gm.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
