"""A language model of characters on the text that ships with Python: plain, variational dropout, zoneout.

`pydoc_data.topics` is what `help()` shows: some 460 kB of English about the language. A small LSTM reads a part of it
and is to predict each next character; it learns that part by heart before it knows English, which is what the
regularizers are for. Each of them goes into the same net by its recipe, and the nets are compared on pages that none
has read, in bits a character. A text this small is here to show the way, not to rank methods: what comes out is
printed, whichever way it falls.

    python examples/char_lm.py          # three seeds, minutes on two cores
    python examples/char_lm.py --quick  # one seed, few steps: does it run?
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

from dropsurgery import apply_recipe

# The recipe of each method, and what is changed in it: rates for a net that has a second to learn, not a day.
METHODS: dict[str, tuple[str, dict[str, Any]] | None] = {
    "plain": None,
    "variational": (
        "variational_dropout_lstm",
        {"recurrent layers.with": {"p_input": 0.1, "p_hidden": 0.25, "p_output": 0.25, "tied": True}},
    ),
    "zoneout": ("zoneout_lstm", {}),
}
CELLS = 192
VECTOR = 32

console = Console()


@dataclass(frozen=True)
class Settings:
    """How much there is to do."""

    seeds: int = 3
    learn: int = 60_000  # characters
    test: int = 30_000
    updates: int = 500
    batch: int = 32
    steps: int = 48


# ---- text ----


@dataclass(frozen=True)
class Text:
    """What is learned from and what is tested on, as numbers of characters, and how many characters there are."""

    learn: Tensor
    test: Tensor
    characters: int

    @staticmethod
    def new(settings: Settings) -> Text:
        """The pages in the order of their names; those that are tested on come after those that are learned."""
        whole = "\n\n".join(page for _, page in sorted(topics.items()))
        letters = sorted(set(whole))
        number = {letter: index for index, letter in enumerate(letters)}
        part = torch.tensor([number[letter] for letter in whole[: settings.learn + settings.test]])
        return Text(part[: settings.learn], part[settings.learn :], len(letters))

    def batches(self, settings: Settings, chance: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Pieces from anywhere, and what comes one character later."""
        inside = torch.arange(settings.steps + 1)
        for _ in range(settings.updates):
            start = torch.randint(len(self.learn) - settings.steps, (settings.batch, 1), generator=chance)
            piece = self.learn[start + inside]
            yield piece[:, :-1], piece[:, 1:]


# ---- nets ----


class CharacterModel(nn.Module):
    """Characters (B, T) and a state → scores of the next ones (B, T, characters), and the state."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, VECTOR)
        self.rnn = nn.LSTM(VECTOR, CELLS, batch_first=True)
        self.head = nn.Linear(CELLS, characters)

    def forward(self, text: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Read on from a state."""
        y, state = self.rnn(self.embedding(text), state)
        return self.head(y), state


def new_model(method: str, seed: int, characters: int, updates: int) -> nn.Module:
    """A net with the weights of that seed, and the method in it."""
    torch.manual_seed(seed)
    model = CharacterModel(characters)
    chosen = METHODS[method]
    if chosen is None:
        return model
    example = torch.zeros(2, 8, dtype=torch.int64)
    recipe, overrides = chosen
    return apply_recipe(model, recipe, example_inputs=example, total_steps=updates, overrides=overrides, seed=seed)


def bits(scores: Tensor, text: Tensor) -> Tensor:
    """The mean of the bits that it takes to say each character."""
    return F.cross_entropy(scores.flatten(0, 1), text.flatten()) / math.log(2)


@torch.no_grad()
def tested(model: nn.Module, text: Tensor) -> float:
    """Bits a character, read in one go by a few readers who begin at different places."""
    model.eval()
    lines = text[: len(text) // 20 * 20].view(20, -1)
    state, spent = None, []
    for piece, following in zip(lines[:, :-1].split(100, 1), lines[:, 1:].split(100, 1), strict=True):
        scores, state = model(piece, state)
        spent.append(bits(scores, following).item() * piece.shape[1])
    return sum(spent) / (lines.shape[1] - 1)


@dataclass(frozen=True)
class Result:
    """One trained net: bits a character where it has learned, and where it has not, and the seconds it took."""

    learned: float
    unseen: float
    seconds: float


def run_one(method: str, seed: int, text: Text, settings: Settings, progress: Progress) -> Result:
    """Train a net, and test it."""
    model = new_model(method, seed, text.characters, settings.updates)
    if seed == 0 and method != "plain":
        console.print(str(model.surgery.plan), highlight=False, soft_wrap=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    decay = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=settings.updates, pct_start=0.1)
    task = progress.add_task(f"{method}, seed {seed}", total=settings.updates)
    begin = time.perf_counter()
    model.train()
    for piece, following in text.batches(settings, torch.Generator().manual_seed(seed)):
        loss = bits(model(piece)[0], following)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay.step()
        progress.update(task, advance=1, description=f"{method}, seed {seed}: {loss.item():.2f} bits")
    seconds = time.perf_counter() - begin
    progress.remove_task(task)
    return Result(tested(model, text.learn[: len(text.test)]), tested(model, text.test), seconds)


def run(settings: Settings) -> dict[str, list[Result]]:
    """Every method with every seed."""
    text = Text.new(settings)
    results: dict[str, list[Result]] = {name: [] for name in METHODS}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        whole = progress.add_task("nets", total=settings.seeds * len(METHODS))
        for seed in range(settings.seeds):
            for name in METHODS:
                results[name].append(run_one(name, seed, text, settings, progress))
                progress.advance(whole)
    return results


# ---- what comes out ----


def spread(values: list[float]) -> str:
    """The mean, and the standard deviation over the seeds."""
    apart = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.3f} ± {apart:.3f}"


def table(results: dict[str, list[Result]], settings: Settings) -> Table:
    """Bits a character of each method, on what it has read and on what it has not."""
    about = f"bits a character after {settings.updates} updates, mean ± deviation over the seeds"
    shown = Table(title=about, title_justify="left")
    for column in ("method", "unseen pages", "each seed", "pages learned from", "seconds"):
        shown.add_column(column)
    for name, each in results.items():
        unseen = [result.unseen for result in each]
        seconds = statistics.mean(result.seconds for result in each)
        singly = ", ".join(f"{value:.3f}" for value in unseen)
        shown.add_row(name, spread(unseen), singly, spread([result.learned for result in each]), f"{seconds:.1f}")
    return shown


def main() -> None:
    """Run, and print the table."""
    parser = argparse.ArgumentParser(description="A character language model with and without recurrent noise.")
    parser.add_argument("--quick", action="store_true", help="one seed and few steps, to see that it runs")
    settings = Settings()
    if parser.parse_args().quick:
        settings = replace(settings, seeds=1, learn=20_000, test=4_000, updates=4, batch=8, steps=16)
    torch.set_num_threads(1)  # steps this small gain little from more, and results depend on the number
    begin = time.perf_counter()
    results = run(settings)
    console.print(table(results, settings))
    console.print(f"{time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
