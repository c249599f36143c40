"""Fit a hierarchical mixture of experts, a soft tree, to few noisy points, with and without dropout in it.

Each decision node of the tree mixes its two subtrees by a gate, g * left + (1 - g) * right; each leaf is a linear
expert. A tree of depth 5 has more of them than 60 points can tell apart. The recipe hme_dropout drops left subtrees
while it is trained, so that trees of different complexity are sampled; in eval each gate has its expected value.

Shown is the error on the points that were learned from, and on the curve that they came from, for several rates: the
mean over several sets of points.

    python examples/soft_tree_regression.py                 # the table
    python examples/soft_tree_regression.py --out tree.png  # and a picture of the curves
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from dropsurgery import apply_recipe

RATES = (0.0, 0.1, 0.3, 0.5)
NOISE = 0.3

console = Console()


@dataclass(frozen=True)
class Settings:
    """How much is trained and tested."""

    seeds: int = 3
    depth: int = 5
    points: int = 60
    steps: int = 1000


class Node(nn.Module):
    """A decision node, and below it nodes or leaves."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.gate = nn.Linear(1, 1)
        self.left, self.right = (nn.Linear(1, 1) if depth == 1 else Node(depth - 1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Mix both subtrees; all of them are computed."""
        share = torch.sigmoid(self.gate(x))
        mixed: Tensor = share * self.left(x) + (1 - share) * self.right(x)
        return mixed


def curve(x: Tensor) -> Tensor:
    """What is to be found."""
    return torch.sin(3 * x) + 0.5 * (x > 0)


def points(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy points on the curve."""
    chance = torch.Generator().manual_seed(seed)
    x = torch.rand(count, 1, generator=chance) * 4 - 2
    return x, curve(x) + NOISE * torch.randn(count, 1, generator=chance)


def new_tree(p: float, seed: int, settings: Settings) -> Any:
    """A tree with the weights of that seed, and dropout in it."""
    torch.manual_seed(seed)
    tree = Node(settings.depth)
    for module in tree.modules():
        if isinstance(module, Node):  # gates that differ from the start
            nn.init.normal_(module.gate.weight, std=3.0)
            nn.init.normal_(module.gate.bias, std=2.0)
    overrides = {"decision nodes.with.p": p}
    return apply_recipe(tree, "hme_dropout", example_inputs=torch.zeros(2, 1), overrides=overrides, seed=seed)


def train(tree: nn.Module, x: Tensor, y: Tensor, steps: int) -> None:
    """Adam, on all points at once."""
    optimizer = torch.optim.Adam(tree.parameters(), lr=0.02)
    tree.train()
    for _ in range(steps):
        optimizer.zero_grad()
        (tree(x) - y).square().mean().backward()
        optimizer.step()


@dataclass(frozen=True)
class Result:
    """The errors of one tree, and what it found on a grid."""

    learned: float
    missed: float
    found: Tensor


def run(settings: Settings) -> dict[float, list[Result]]:
    """Every rate on every set of points."""
    grid = torch.linspace(-2, 2, 200)[:, None]
    results: dict[float, list[Result]] = {p: [] for p in RATES}
    pairs = [(seed, p) for seed in range(settings.seeds) for p in RATES]
    for seed, p in track(pairs, description="training", console=console):
        x, y = points(settings.points, seed)
        tree = new_tree(p, seed, settings)
        train(tree, x, y, settings.steps)
        with torch.no_grad():
            found = tree.eval()(grid)
            learned = (tree(x) - y).square().mean().sqrt().item()
        results[p].append(Result(learned, (found - curve(grid)).square().mean().sqrt().item(), found))
    return results


def table(results: dict[float, list[Result]], settings: Settings) -> Table:
    """One row a rate."""
    about = f"root mean square error, mean of {settings.seeds} sets of {settings.points} points (noise {NOISE:g})"
    shown = Table(title=about, title_justify="left")
    for column in ("p", "on the points", "on the curve", "live leaves in training"):
        shown.add_column(column)
    for p, each in results.items():
        errors = (statistics.mean(values) for values in ([r.learned for r in each], [r.missed for r in each]))
        shown.add_row(f"{p:g}", *(f"{error:.3f}" for error in errors), f"{(2 - p) ** settings.depth:.1f}")
    return shown


def picture(results: dict[float, list[Result]], settings: Settings) -> Figure:
    """What the trees of the first seed found."""
    figure = Figure(figsize=(3.2 * len(RATES), 3), dpi=100, layout="constrained")
    x, y = points(settings.points, 0)
    grid = torch.linspace(-2, 2, 200)
    for axes, (p, each) in zip(figure.subplots(1, len(RATES), sharey=True), results.items(), strict=True):
        axes.plot(x, y, ".", color="grey", markersize=4)
        axes.plot(grid, curve(grid), color="black", linewidth=0.8)
        axes.plot(grid, each[0].found, color="#a50026")
        axes.set(title=f"p = {p:g}")
    return figure


def main() -> None:
    """Run, print the table, and draw the picture if it is asked for."""
    parser = argparse.ArgumentParser(description="Fit soft trees with and without dropout of their left subtrees.")
    parser.add_argument("--quick", action="store_true", help="few steps, to see that it runs")
    parser.add_argument("--out", type=Path, help="the file to draw the curves into")
    given = parser.parse_args()
    settings = Settings(seeds=1, depth=2, points=10, steps=5) if given.quick else Settings()
    torch.set_num_threads(1)  # trees this small gain nothing from more
    begin = time.perf_counter()
    results = run(settings)
    console.print(table(results, settings))
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        picture(results, settings).savefig(given.out)
        console.print(f"wrote {given.out.resolve()}", soft_wrap=True)
    console.print(f"{time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
