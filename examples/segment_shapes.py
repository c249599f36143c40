"""Segment drawn shapes from few images: a plain U-Net, dropout, DropBlock and heuristic dropout at the same places.

Discs and squares are cut out of one of the two photographs that scikit-learn bundles, tinted, and pasted onto the
other; the discs are to be found. An SMP U-Net learns it from a dozen images, once as it is and once with each
regularizer between the convolutions where `heuristic_dropout_unet_double_conv` puts its own, all at p = 0.1.

Then the co-adaptation test of that method's paper (Shi et al., ICASSP 2022): a share of the feature maps in front of
the last layer is set to zero, at random, and how much Dice that costs is plotted. Data this small are here to show the
way, not to rank methods: what comes out is printed and drawn, whichever way it falls.

    python examples/segment_shapes.py                 # three seeds, minutes on two cores; pictures into this folder
    python examples/segment_shapes.py --out pictures  # into another
    python examples/segment_shapes.py --quick         # one seed, few steps: does it run?
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_sample_image
from torch import Tensor, nn

from dropsurgery import apply_recipe, strip

RECIPE = "heuristic_dropout_unet_double_conv"
# What takes the place of heuristic dropout in the recipe; None for a net without any.
METHODS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "dropout": {"defaults.insert": "dropout", "defaults.with": {"p": 0.1}},
    "DropBlock": {"defaults.insert": "dropblock", "defaults.with": {"p": 0.1, "block_size": 3}},
    "Heuristic": {},
}
PHOTOGRAPHS = ("china.jpg", "flower.jpg")
SIZE = 64
BATCH = 6
RADII = (6, 13)
SHARES = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75)  # of the 16 last feature maps
HALF = SHARES.index(0.5)
SHOWN = 5

console = Console()


@dataclass(frozen=True)
class Settings:
    """How much there is to do."""

    seeds: int = 3
    learn: int = 12
    tests: int = 60
    epochs: int = 40
    draws: int = 24  # of feature maps to mask, for each share


# ---- images ----


@dataclass(frozen=True)
class Data:
    """Images (N, 3, SIZE, SIZE) about 0, and masks (N, 1, SIZE, SIZE) of 0 and 1."""

    images: Tensor
    masks: Tensor

    @staticmethod
    def new(count: int, seed: int) -> Data:
        """Draw so many images; the same for the same seed."""
        chance = np.random.default_rng(seed)
        photographs = [load_sample_image(name) / 255 for name in PHOTOGRAPHS]
        images, masks = zip(*(drawn(chance, photographs) for _ in range(count)), strict=True)
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float()
        return Data((pixels - 0.5) / 0.25, torch.from_numpy(np.stack(masks))[:, None].float())

    def batch(self, index: Tensor, chance: torch.Generator) -> tuple[Tensor, Tensor]:
        """The samples at `index`, all turned and mirrored alike, by chance."""
        turns, mirror = (int(torch.randint(n, (), generator=chance)) for n in (4, 2))
        both = torch.cat([self.images[index], self.masks[index]], 1).rot90(turns, (2, 3))
        both = both.flip(3) if mirror else both
        return both[:, :3].contiguous(), both[:, 3:].contiguous()


def drawn(chance: np.random.Generator, photographs: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """One image with two squares and two discs, and where the discs are; a later shape covers an earlier one."""
    ground, cloth = (photographs[i] for i in chance.permutation(2))
    image, mask = cut_out(chance, ground), np.zeros((SIZE, SIZE), bool)
    rows, columns = np.mgrid[:SIZE, :SIZE]
    for is_disc in (False, True, False, True):
        radius = chance.uniform(*RADII)
        y, x = chance.uniform(radius, SIZE - radius, 2)
        down, right = np.abs(rows - y), np.abs(columns - x)
        inside = np.hypot(down, right) < radius if is_disc else np.maximum(down, right) < 0.9 * radius
        tinted = 0.6 * cut_out(chance, cloth) + 0.4 * chance.uniform(0, 1, 3)
        image = np.where(inside[..., None], tinted, image)
        mask = (mask | inside) if is_disc else (mask & ~inside)
    return image, mask


def cut_out(chance: np.random.Generator, photograph: np.ndarray) -> np.ndarray:
    """A square of SIZE somewhere in a photograph, of which every second pixel is taken."""
    top, left = (chance.integers(0, length - 2 * SIZE) for length in photograph.shape[:2])
    return photograph[top : top + 2 * SIZE : 2, left : left + 2 * SIZE : 2]


# ---- nets ----


def new_model(method: str, seed: int, steps: int) -> nn.Module:
    """A U-Net with the weights of that seed, and the method in it."""
    torch.manual_seed(seed)
    model = smp.Unet("resnet18", encoder_weights=None, classes=1)
    overrides = METHODS[method]
    if overrides is None:
        return model
    shape = torch.zeros(1, 3, SIZE, SIZE)
    return apply_recipe(model, RECIPE, example_inputs=shape, total_steps=steps, overrides=overrides, seed=seed)


def train(model: nn.Module, data: Data, epochs: int, seed: int) -> None:
    """Adam at 1e-3, as in the paper; cross-entropy and Dice loss."""
    chance = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model.train()
    for _ in range(epochs):
        for index in torch.randperm(len(data.images), generator=chance).split(BATCH):
            images, masks = data.batch(index, chance)
            logits = model(images)
            shares = logits.sigmoid()
            overlap = 1 - 2 * (shares * masks).sum() / (shares.sum() + masks.sum())
            loss = F.binary_cross_entropy_with_logits(logits, masks) + overlap
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def dice(logits: Tensor, masks: Tensor) -> float:
    """Twice the overlap by both areas, the mean over the images."""
    found, wanted = (logits > 0).flatten(1), (masks > 0).flatten(1)
    return (2 * (found & wanted).sum(1) / (found.sum(1) + wanted.sum(1)).clamp(min=1)).mean().item()


@torch.no_grad()
def last_maps(model: nn.Module, images: Tensor) -> Tensor:
    """What the last layer, the segmentation head, is given."""
    given: list[Tensor] = []
    hook = model.segmentation_head.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    for part in images.split(20):
        model(part)
    hook.remove()
    return torch.cat(given)


@dataclass(frozen=True)
class Result:
    """One trained net: its Dice with a share of its last maps masked, for each of SHARES, and what it found."""

    dices: list[float]
    found: Tensor

    @property
    def lost(self) -> list[float]:
        """How much Dice each share costs."""
        return [self.dices[0] - each for each in self.dices]


@torch.no_grad()
def tested(model: nn.Module, data: Data, draws: int) -> Result:
    """Mask shares of the last maps, the same ones for every net, and find the discs with what is left."""
    model.eval()
    maps = last_maps(model, data.images)
    channels = maps.shape[1]
    chance = torch.Generator().manual_seed(0)
    orders = [torch.randperm(channels, generator=chance) for _ in range(draws)]

    def of_share(share: float) -> float:
        found = []
        for order in orders if share else orders[:1]:
            kept = (order >= round(share * channels)).float()
            found.append(dice(model.segmentation_head(maps * kept[:, None, None]), data.masks))
        return statistics.mean(found)

    return Result([of_share(share) for share in SHARES], model.segmentation_head(maps[:SHOWN]) > 0)


def run(settings: Settings) -> tuple[dict[str, list[Result]], Data]:
    """Every method with every seed; the results, and what was tested on."""
    steps = settings.epochs * -(-settings.learn // BATCH)
    test = Data.new(settings.tests, seed=1000)
    results: dict[str, list[Result]] = {name: [] for name in METHODS}
    pairs = [(seed, name) for seed in range(settings.seeds) for name in METHODS]
    for seed, name in track(pairs, description="training", console=console):
        model = new_model(name, seed, steps)
        if seed == 0 and METHODS[name] == {}:
            console.print(str(model.surgery.audit()), highlight=False, soft_wrap=True)
        train(model, Data.new(settings.learn, seed), settings.epochs, seed)
        results[name].append(tested(model if name == "plain" else strip(model), test, settings.draws))
    return results, test


# ---- what comes out ----


def spread(values: list[float]) -> float:
    """The standard deviation over the seeds."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def table(results: dict[str, list[Result]], settings: Settings) -> Table:
    """Dice of each method, and what half of the last maps are worth."""
    about = f"Dice on {settings.tests} images after training on {settings.learn}, mean ± deviation over the seeds"
    shown = Table(title=about, title_justify="left")
    for column in ("method", "Dice", "each seed", "Dice lost with half of the last maps"):
        shown.add_column(column)
    for name, each in results.items():
        dices, lost = [result.dices[0] for result in each], [result.lost[HALF] for result in each]
        means = (f"{statistics.mean(values):.3f} ± {spread(values):.3f}" for values in (dices, lost))
        first, last = means
        shown.add_row(name, first, ", ".join(f"{value:.3f}" for value in dices), last)
    return shown


def segmentations(results: dict[str, list[Result]], test: Data) -> Figure:
    """Test images, where the discs are, and what the net of the first seed found by each method."""
    columns: dict[str, Callable[[int], np.ndarray]] = {
        "image": lambda i: (test.images[i] * 0.25 + 0.5).permute(1, 2, 0).numpy(),
        "discs": lambda i: test.masks[i, 0].numpy(),
    }
    for name, each in results.items():
        columns[name] = lambda i, found=each[0].found: found[i, 0].numpy()
    rows = min(SHOWN, len(test.images))
    figure = Figure(figsize=(1.6 * len(columns), 1.7 * rows), dpi=100, layout="constrained")
    grid = figure.subplots(rows, len(columns), squeeze=False)
    for i, line in enumerate(grid):
        for axes, (title, pixels) in zip(line, columns.items(), strict=True):
            axes.imshow(pixels(i), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes.set(xticks=[], yticks=[], title=title if i == 0 else "")
    return figure


def curves(results: dict[str, list[Result]]) -> Figure:
    """How much Dice is lost with each share of the last maps masked: the mean over the seeds, and their spread."""
    figure = Figure(figsize=(7, 4.5), dpi=100, layout="constrained")
    axes = figure.subplots()
    for name, each in results.items():
        lost = np.array([result.lost for result in each])
        mean, apart = lost.mean(0), lost.std(0, ddof=1) if len(each) > 1 else 0 * lost[0]
        axes.plot(SHARES, mean, marker="o", label=name)
        axes.fill_between(SHARES, mean - apart, mean + apart, alpha=0.15)
    axes.set(xlabel="share of the last feature maps that is masked", ylabel="Dice lost", title="co-adaptation")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def main() -> None:
    """Run, print the table, and draw the pictures."""
    parser = argparse.ArgumentParser(description="Segment drawn shapes with and without regularizers in a U-Net.")
    parser.add_argument("--quick", action="store_true", help="one seed and few steps, to see that it runs")
    parser.add_argument("--out", type=Path, default=Path(), help="the folder to write the pictures into")
    given = parser.parse_args()
    settings = Settings(1, learn=6, tests=6, epochs=2, draws=2) if given.quick else Settings()
    torch.set_num_threads(1)  # batches this small gain little from more, and results depend on the number
    begin = time.perf_counter()
    results, test = run(settings)
    console.print(table(results, settings))
    given.out.mkdir(parents=True, exist_ok=True)
    for name, figure in (("segmentations", segmentations(results, test)), ("co_adaptation", curves(results))):
        file = (given.out / f"{name}.png").resolve()
        figure.savefig(file, format="png")
        console.print(f"wrote {file}", soft_wrap=True)
    console.print(f"{time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
