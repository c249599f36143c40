"""Show that masks picked by the true label of a test sample leak that label: on pure noise they "classify".

Inputs are independent Gaussian numbers and labels are drawn at random, so no classifier of the inputs can do better
than chance. A small net with NSDropout behind its hidden ReLU is trained on such data, and tested on more of them in
three ways: with the masks of the true labels, which is the author's test procedure; without masks; and with the masks
of other labels, put on in random order. In the first it seems to have learned, in the second it has not, and in the
third it answers with the label of the mask: it reads the pattern of zeros, and not the input.

    python examples/nsdropout_leak.py            # five seeds of a small and three of a larger problem, under a minute
    python examples/nsdropout_leak.py --quick    # one seed of the small one
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

from dropsurgery import SurgeryWarning, apply_recipe

RECIPE = {
    "version": 1,
    "name": "nsdropout leaking",
    "patterns": {"hidden": ["linear", "activation"]},
    "entries": [
        {
            "name": "hidden units",
            "pattern": "hidden",
            "insert": "nsdropout",
            "with": {"p": 0.2, "eval_rule": "last_mask_true_label", "i_know_this_leaks_labels": True},
        }
    ],
}

console = Console()


@dataclass(frozen=True)
class Problem:
    """Noise to be classified, the net that is to do so, and its training."""

    inputs: int = 32
    units: int = 64
    classes: int = 5
    samples: tuple[int, int, int] = (600, 200, 500)  # to learn from, to validate, to test
    steps: int = 150
    rate: float = 1e-2

    def data(self, count: int) -> tuple[Tensor, Tensor]:
        """So many samples, and labels that have nothing to do with them."""
        return torch.randn(count, self.inputs), torch.randint(self.classes, (count,))


LARGER = Problem(units=128, classes=10, samples=(1000, 400, 1000), steps=300)


@dataclass(frozen=True)
class Result:
    """Accuracies on the test data of one seed."""

    true_label: float  # with the masks of the true labels
    without: float
    shuffled: float  # with those of other labels, compared with the true ones
    follows: float  # the same, compared with the labels of the masks


@torch.no_grad()
def tested(gm: Any, x: Tensor, y: Tensor) -> Result:
    """Accuracy by the masks that the net is given."""

    def share(mask: Tensor, of: Tensor) -> float:
        with gm.surgery.batch(labels=mask), warnings.catch_warnings():
            warnings.simplefilter("ignore", SurgeryWarning)  # it warns at each forward, as it should
            return (gm(x).argmax(1) == of).float().mean().item()

    other = y[torch.randperm(len(y))]
    with gm.surgery.active(p=0.0):
        without = share(y, y)
    return Result(share(y, y), without, share(other, y), share(other, other))


def trial(problem: Problem, seed: int) -> Result:
    """Train a net on one draw of noise, and test it on another."""
    torch.manual_seed(seed)
    (x, y), validation, test = (problem.data(count) for count in problem.samples)
    net = nn.Sequential(nn.Linear(problem.inputs, problem.units), nn.ReLU(), nn.Linear(problem.units, problem.classes))
    gm: Any = apply_recipe(net, RECIPE, example_inputs=x[:2])
    optimizer = torch.optim.Adam(gm.parameters(), lr=problem.rate)
    for _ in range(problem.steps):  # each is an epoch: the batch is all there is
        with gm.surgery.batch(labels=y, validation=validation):
            optimizer.zero_grad()
            F.cross_entropy(gm.train()(x), y).backward()
            optimizer.step()
    return tested(gm.eval(), *test)


def report(problem: Problem, results: list[Result]) -> None:
    """A table of the accuracies, over all seeds."""
    table = Table(
        title=f"Test accuracy on noise: {problem.classes} classes, {len(results)} seeds",
        caption=f"chance: {1 / problem.classes:.3f}",
        title_justify="left",
        caption_justify="left",
    )
    for column in ("masks in eval", "mean", "lowest", "highest"):
        table.add_column(column, justify="left" if column == "masks in eval" else "right")
    for name, values in {
        "of the true labels": [each.true_label for each in results],
        "none": [each.without for each in results],
        "of shuffled labels": [each.shuffled for each in results],
        "of shuffled labels, answers that are theirs": [each.follows for each in results],
    }.items():
        table.add_row(name, *(f"{number:.3f}" for number in (statistics.mean(values), min(values), max(values))))
    console.print(table)


def main() -> None:
    """Train on noise, and report what was measured."""
    parser = argparse.ArgumentParser(description="Show that NSDropout's masks by true test labels leak these labels.")
    parser.add_argument("--quick", action="store_true", help="one seed of the small problem, to see that it runs")
    runs = {Problem(): 1} if parser.parse_args().quick else {Problem(): 5, LARGER: 3}
    torch.set_num_threads(1)  # results depend on the number
    begin = time.perf_counter()
    for problem, seeds in runs.items():
        with Progress(console=console, transient=True) as progress:
            results = [trial(problem, seed) for seed in progress.track(range(seeds), description="training")]
        report(problem, results)
    console.print(f"{time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
