"""Train a small mixture of experts to translate made-up languages, with and without Gating Dropout.

A sentence is a row of words of one of four languages. Each language has its own dictionary into a fifth one, and two of
them are read backwards; the first word says which language it is, and a share of the words is misread, as noise. Of the
net's blocks each has attention and four experts, of which the gate chooses two for each word.

Compared are the net as it is, Gating Dropout (in some steps each word keeps to the expert of its simulated machine) and
Gate-Expert-Drop (in some steps whole mixtures are skipped). Shown are the share of words that are translated right, in
sentences that were not learned from, and what the gates do in eval: the entropy of their weights, from 0 (one expert
has all) to 1 (all alike), and how the words are shared out among the experts.

    python examples/moe_translation_toy.py                # the table
    python examples/moe_translation_toy.py --out moe.png  # and a picture of the gates
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from dropsurgery import apply_recipe

LANGUAGES, WORDS, LENGTH = 4, 24, 10
EXPERTS, CHOSEN, WIDTH, BLOCKS = 4, 2, 32, 2
NOISE = 0.1
METHODS: dict[str, tuple[str, str] | None] = {  # the recipe, and its first entry
    "plain": None,
    "Gating Dropout": ("gating_dropout_moe", "scores"),
    "Gate-Expert-Drop": ("gate_expert_drop_moe", "mixtures"),
}

console = Console()


@dataclass(frozen=True)
class Settings:
    """How much is trained and tested."""

    steps: int = 500
    batch: int = 48
    learn: int = 1500  # sentences
    tests: int = 400
    p: float = 0.2


# ---- sentences ----


@dataclass(frozen=True)
class Text:
    """Sentences (n, 1 + LENGTH), the first word of which names the language, and their translations (n, LENGTH)."""

    given: Tensor
    wanted: Tensor

    @staticmethod
    def new(count: int, seed: int, noise: float = 0.0) -> Text:
        """Sentences of that seed; the languages are the same for all. A share of the words, `noise`, is misread."""
        dictionaries = [torch.randperm(WORDS, generator=_chance(100 + n)) for n in range(LANGUAGES)]
        chance = _chance(seed)
        language = torch.randint(LANGUAGES, (count,), generator=chance)
        words = torch.randint(WORDS, (count, LENGTH), generator=chance)
        wanted = torch.stack(dictionaries)[language[:, None], words]
        wanted = torch.where((language % 2 == 1)[:, None], wanted.flip(1), wanted)
        misread = torch.rand(words.shape, generator=chance) < noise
        words = torch.where(misread, torch.randint(WORDS, words.shape, generator=chance), words)
        return Text(torch.cat([WORDS + language[:, None], words], 1), wanted)


def _chance(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- the net ----


class Mixture(nn.Module):
    """Two of four experts for each word, by the weights of a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)) for _ in range(EXPERTS)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Mix the experts of each word; all of them are computed, which is plain and no slower when they are small."""
        weights, chosen = self.gate(x).softmax(-1).topk(CHOSEN, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            y = y + expert(x) * (weights * (chosen == number)).sum(-1, keepdim=True)
        return y


class Block(nn.Module):
    """Attention and a mixture, each in a residual branch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.mixture = Mixture()

    def forward(self, x: Tensor) -> Tensor:
        """Let words look at each other, and each at its experts."""
        seen = self.first(x)
        x = x + self.attention(seen, seen, seen, need_weights=False)[0]
        return x + self.mixture(self.second(x))


class Translator(nn.Module):
    """Words and places in, scores of words out."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS + LANGUAGES, WIDTH)
        self.places = nn.Parameter(torch.randn(1 + LENGTH, WIDTH) / math.sqrt(WIDTH))
        self.blocks = nn.Sequential(*[Block() for _ in range(BLOCKS)])
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, words: Tensor) -> Tensor:
        """Translate sentences (n, 1 + LENGTH) to scores (n, LENGTH, WORDS)."""
        scores: Tensor = self.head(self.blocks(self.words(words) + self.places))[:, 1:]
        return scores


def new_model(method: str, settings: Settings) -> Any:
    """The net, the same weights for all methods, and the method in it."""
    torch.manual_seed(0)
    model, recipe = Translator(), METHODS[method]
    if recipe is None:
        return model
    name, entry = recipe
    given = Text.new(2, 0).given
    return apply_recipe(model, name, example_inputs=given, overrides={f"{entry}.with.p": settings.p}, seed=0)


def balance(probabilities: Tensor) -> Tensor:
    """The loss of balance: E * sum of (share of words) * (mean weight), over the experts; 1 where all are alike."""
    first = F.one_hot(probabilities.argmax(-1), EXPERTS).float().flatten(0, -2).mean(0)
    return EXPERTS * (first * probabilities.flatten(0, -2).mean(0)).sum()


def train(model: nn.Module, text: Text, settings: Settings) -> None:
    """Adam, cross-entropy, and a small loss of balance on what the gates give."""
    optimizer, chance = torch.optim.Adam(model.parameters(), lr=3e-3), _chance(1)
    model.train()
    for _ in range(settings.steps):
        index = torch.randint(len(text.given), (settings.batch,), generator=chance)
        with listening(model) as heard:
            scores = model(text.given[index])
        loss = F.cross_entropy(scores.flatten(0, 1), text.wanted[index].flatten())
        for logits in heard:
            loss = loss + 0.01 * balance(logits.softmax(-1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@contextmanager
def listening(model: nn.Module) -> Iterator[list[Tensor]]:
    """What the gates give while it lasts; of skipped mixtures nothing."""
    heard: list[Tensor] = []
    gates = [module for name, module in model.named_modules() if name.endswith("mixture.gate")]
    handles = [gate.register_forward_hook(lambda _, taken, given: heard.append(given)) for gate in gates]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


# ---- what comes out ----


@dataclass(frozen=True)
class Result:
    """Of one net: how much it learned and how much it knows, and of its gates entropy and load (BLOCKS, EXPERTS)."""

    learned: float
    right: float
    entropy: float
    load: Tensor


@torch.no_grad()
def tested(model: nn.Module, learned: Text, text: Text) -> Result:
    """Translate, and look at the gates."""
    model.eval()

    def share(of: Text) -> float:
        return (model(of.given).argmax(-1) == of.wanted).float().mean().item()

    with listening(model) as heard:
        right = share(text)
    probabilities = torch.stack([logits.softmax(-1).flatten(0, -2) for logits in heard])
    entropy = -(probabilities * probabilities.clamp(min=1e-9).log()).sum(-1).mean() / math.log(EXPERTS)
    chosen = F.one_hot(probabilities.topk(CHOSEN, dim=-1).indices, EXPERTS).float().sum(2).mean(1) / CHOSEN
    return Result(share(learned), right, entropy.item(), chosen)


def run(settings: Settings) -> dict[str, Result]:
    """Every method on the same sentences."""
    learn, tests = Text.new(settings.learn, 1, NOISE), Text.new(settings.tests, 2)
    results = {}
    for method in track(METHODS, description="training", console=console):
        model = new_model(method, settings)
        train(model, learn, settings)
        results[method] = tested(model, learn, tests)
    return results


def table(results: dict[str, Result]) -> Table:
    """One row a method."""
    shown = Table(title="words translated right, and what the gates do", title_justify="left")
    for column in ("method", "learned from", "new sentences", "entropy of the gates", "largest share of an expert"):
        shown.add_column(column)
    for name, result in results.items():
        numbers = (result.learned, result.right, result.entropy, result.load.max().item())
        shown.add_row(name, *(f"{number:.3f}" for number in numbers))
    return shown


def picture(results: dict[str, Result]) -> Figure:
    """How the words are shared out among the experts, block by block."""
    figure = Figure(figsize=(3.2 * BLOCKS * 1.3, 3.2), dpi=100, layout="constrained")
    for block, axes in enumerate(figure.subplots(1, BLOCKS, sharey=True)):
        for place, (name, result) in enumerate(results.items()):
            at = [expert + (place - (len(results) - 1) / 2) / (len(results) + 1) for expert in range(EXPERTS)]
            label = f"{name} (entropy {result.entropy:.2f})"
            axes.bar(at, result.load[block], width=1 / (len(results) + 1), label=label)
        axes.axhline(1 / EXPERTS, color="grey", linewidth=0.8)
        axes.set(title=f"block {block + 1}", xlabel="expert", xticks=range(EXPERTS))
    first = figure.axes[0]
    first.set_ylabel("share of the words")
    figure.legend(*first.get_legend_handles_labels(), loc="outside upper center", ncols=len(results), fontsize="small")
    return figure


def lines(settings: Settings, results: dict[str, Result], begin: float) -> Iterator[Any]:
    """What is printed."""
    yield table(results)
    yield f"{settings.steps} steps each at p = {settings.p:g}; {time.perf_counter() - begin:.0f} s"


def main() -> None:
    """Run, print the table, and draw the picture if it is asked for."""
    parser = argparse.ArgumentParser(description="Translate with a mixture of experts, with and without dropout.")
    parser.add_argument("--quick", action="store_true", help="few steps, to see that it runs")
    parser.add_argument("--out", type=Path, help="the file to draw the gates into")
    given = parser.parse_args()
    settings = Settings(steps=6, batch=8, learn=16, tests=8, p=0.5) if given.quick else Settings()
    torch.set_num_threads(1)  # sentences this small gain nothing from more
    begin = time.perf_counter()
    results = run(settings)
    for line in lines(settings, results, begin):
        console.print(line)
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        picture(results).savefig(given.out)
        console.print(f"wrote {given.out.resolve()}", soft_wrap=True)


if __name__ == "__main__":
    main()
