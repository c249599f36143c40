"""Draw what each regularizer does, side by side in one picture, the way papers show their masks.

Two photographs that scikit-learn bundles go through small nets with random weights. What comes out, non-negative
feature maps, is given to each regularizer of the catalogue, with its default arguments and in training mode:

- one that is inserted is drawn by the factor that each element is multiplied by, or, where no factor says it, by
  the map before and after; one that belongs on the net's input, by the photograph and the factor; one that takes no
  maps, as those of mixtures of experts, by its own example, a row for each token;
- one that takes the place of a sum, by the factor of either operand;
- one that stands in for a layer, by what the layer gave and what it gives now, or by the mask of its weights;
- one that goes by labels, by the factor of each unit of vectors, sample by sample.

Below the name stands what was measured: the share that was dropped in many draws, or why it cannot be counted. In the
picture is the first of as many draws in which something is dropped and something kept.

    python examples/mask_gallery.py                              # all of them, to mask_gallery.png
    python examples/mask_gallery.py dropblock cutout --out a.png # two of them
"""

from __future__ import annotations

import argparse
import copy
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from rich.console import Console
from sklearn.datasets import load_sample_image
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dropsurgery import SurgeryError, catalogue

PHOTOGRAPHS = ("china.jpg", "flower.jpg")
SIZE = 56  # of the images and of the maps
CHANNELS = 6
SHOWN = (1, 4)  # channels
UNITS = 42  # of the layers whose weights are drawn
LABELS = 3  # of those that go by them
DRAWS = 100
ALIKE = 1e-3  # factors that differ less are the same, rounded

FACTORS = LinearSegmentedColormap.from_list(
    "factors",
    [(0, "#f2c200"), (0.25, "#a50026"), (0.35, "#f08a62"), (0.5, "#f4f4f4"), (0.7, "#74add1"), (1, "#1a2f7d")],
)
FACTOR_RANGE = Normalize(-1, 3, clip=True)
FACTOR_NAMES = {-1: "-1\nsign turned", 0: "0\ndropped", 1: "1\nkept", 2: "2", 3: "3 or more\namplified"}
VALUES = colormaps["viridis"]

# Inches, of 100 dots each: a panel has 3 dots for each element of a map.
PANEL, GAP, WORDS, TITLE, MARGIN = 1.68, 0.1, 0.82, 0.2, 0.3
PANELS = 4
CELL = (PANELS * PANEL + (PANELS - 1) * GAP + 2 * MARGIN, PANEL + WORDS + TITLE + MARGIN)
COLUMNS = 3

console = Console()


# ---- what the regularizers are given ----


@dataclass(frozen=True)
class Data:
    """Two images with mean 0 and standard deviation 1, and what nets make of them, all (2, ..., SIZE, SIZE)."""

    images: Tensor
    photographs: Tensor  # the images, in [0, 1]
    before: Tensor  # what the last ReLU of a net takes
    maps: Tensor  # what it gives
    others: Tensor  # and that of another net

    @staticmethod
    def new(seed: int) -> Data:
        """The two photographs, cut to squares, and two nets of that seed."""
        photographs = torch.cat([_photograph(name) for name in PHOTOGRAPHS])
        std, mean = torch.std_mean(photographs, dim=(0, 2, 3), keepdim=True)
        images = (photographs - mean) / std
        torch.manual_seed(seed)
        before, other = (_net()(images).detach() for _ in range(2))
        return Data(images, photographs, before, _rectified(before, 1e-3), _rectified(other, 2e-3))


def _photograph(name: str) -> Tensor:
    pixels = torch.tensor(load_sample_image(name)).permute(2, 0, 1)[None].float() / 255
    side = min(pixels.shape[2:])
    left = (pixels.shape[3] - side) // 2
    return F.interpolate(pixels[..., :side, left : left + side], size=(SIZE, SIZE), mode="area")


def _net() -> nn.Module:
    """Two convolutions with norms and a pooling; the last ReLU is left to the caller."""
    how = {"padding": 2, "padding_mode": "reflect"}  # zeros would draw a frame
    pool = nn.AvgPool2d(5, stride=1, padding=2, count_include_pad=False)
    first = [nn.Conv2d(3, 12, 5, **how), nn.BatchNorm2d(12), nn.ReLU(), pool]
    return nn.Sequential(*first, nn.Conv2d(12, CHANNELS, 5, **how), nn.BatchNorm2d(CHANNELS))


def _rectified(x: Tensor, trace: float) -> Tensor:
    # What a ReLU makes 0 is lifted by a trace, so that a dropped element can be told from one that was 0 before.
    return x.relu() + trace


# ---- a regularizer, as drawn ----


@dataclass(frozen=True)
class Panel:
    """One square of the picture."""

    title: str
    pixels: np.ndarray  # (H, W, 3), in [0, 1]
    note: str = ""  # written into it


@dataclass(frozen=True)
class Drawing:
    """What is shown of one draw: factors where there are some, else values."""

    panels: list[Panel]
    factors: Tensor | None = None

    @property
    def drops_some(self) -> bool:
        """Whether something is dropped in it and something kept."""
        return self.factors is not None and bool((self.factors == 0).any()) and bool(self.factors.any())

    @property
    def varies(self) -> bool:
        """Whether not all of it has one factor."""
        return self.factors is None or bool(self.factors.max() - self.factors.min() > ALIKE)


@dataclass(frozen=True)
class Group:
    """All that the picture says of one regularizer."""

    name: str
    year: str
    summary: str
    arguments: str
    share: str
    panels: list[Panel]


def factor_panels(
    titles: Sequence[str], factors: Sequence[Tensor], over: Sequence[Tensor] | None = None
) -> list[Panel]:
    """Factors (n, H, W) in colour; `over` them the maps that they belong to, as light and shade."""
    panels = []
    for number, (title, factor) in enumerate(zip(titles, factors, strict=True)):
        pixels = FACTORS(FACTOR_RANGE(factor.numpy()))[..., :3]
        if over is not None:
            light = 0.75 + 0.25 * (over[number] / over[number].amax()).sqrt()
            pixels *= light.where(factor != 0, 1).numpy()[..., None]
        alike = bool(factor.max() - factor.min() < ALIKE)
        panels.append(Panel(title, pixels, f"x {factor.mean().item():.3g}" if alike else ""))
    return panels


def value_panels(titles: Sequence[str], maps: Sequence[Tensor]) -> list[Panel]:
    """Maps (H, W) on one common scale."""
    scale = Normalize(min(x.min().item() for x in maps), max(x.max().item() for x in maps))
    return [Panel(title, VALUES(scale(x.numpy()))[..., :3]) for title, x in zip(titles, maps, strict=True)]


def photograph_panel(title: str, photograph: Tensor) -> Panel:
    """A photograph (3, H, W) in [0, 1]."""
    return Panel(title, photograph.permute(1, 2, 0).clamp(0, 1).numpy())


# ---- one scene for each kind of regularizer: given the layer and the data, it says how to draw ----

Draw = Callable[[], Drawing]
SHOWN_TITLES = [f"sample {sample + 1}, channel {channel + 1}" for sample in (0, 1) for channel in SHOWN]


def shown(x: Tensor) -> Tensor:
    """Of maps (2, C, H, W) those that are drawn, (4, H, W)."""
    return x[:, SHOWN].flatten(0, 1)


def inserted(layer: Any, data: Data) -> Draw:
    """By factors, or before and after."""
    if layer.placement.startswith("the network's input"):
        return on_images(layer, data)
    if hasattr(layer, "example_inputs"):
        return on_tokens(layer, example_of(layer))
    x = data.maps

    def by_factors() -> Drawing:
        factors = shown(layer(x) / x)
        return Drawing(factor_panels(SHOWN_TITLES, factors, shown(x)), factors)

    def by_values() -> Drawing:
        y = layer(x)
        maps = [each[sample, SHOWN[0]] for sample in (0, 1) for each in (x, y)]
        titles = [f"sample {sample}, {when}" for sample in (1, 2) for when in ("before", "after")]
        return Drawing([*value_panels(titles[:2], maps[:2]), *value_panels(titles[2:], maps[2:])])

    return by_factors if layer.drops == "zero" or keeps_zeros(layer, x) else by_values


def keeps_zeros(layer: Any, x: Tensor) -> bool:
    """Whether what is 0 stays 0, so that each element is multiplied by something."""
    holed = x.clone()
    holed[..., ::2, ::2] = 0
    return not layer(holed)[..., ::2, ::2].any()


def on_tokens(layer: Any, x: Tensor) -> Draw:
    """The factor of each number, or the numbers before and after: a row for each token or sample."""
    height, width = x.flatten(0, -2).shape
    wide = max(1, height // width)

    def rows(values: Tensor) -> Tensor:
        return values.reshape(height, width).repeat_interleave(wide, 1)

    def draw() -> Drawing:
        drawn = [layer(x) for _ in range(PANELS)]
        if layer.drops == "zero":
            factors = torch.stack([rows(y / x) for y in drawn])
            return Drawing(factor_panels([f"tokens, draw {n}" for n in range(1, PANELS + 1)], factors), factors)
        kept = torch.stack([(y == x).float() for y in drawn[1:]])
        shown = [rows(y.clamp(min=x.min() - 1)) for y in (x, *drawn[1:])]
        return Drawing(value_panels(["tokens, before", *(f"tokens, draw {n}" for n in (1, 2, 3))], shown), kept)

    return draw


def example_of(layer: Any) -> Tensor:
    """What the class has as an example for one that takes no maps, without zeros."""
    x: Tensor = layer.example_inputs(UNITS)[0]
    return x.abs().flatten(0, -2)[:UNITS] + 0.1


def on_images(layer: Any, data: Data) -> Draw:
    """The photograph with things missing, and the factor, the mean of those of the three colours."""
    scale = torch.std_mean(data.photographs, dim=(0, 2, 3), keepdim=True)

    def draw() -> Drawing:
        y = layer(data.images)
        after = y * scale[0] + scale[1]
        factors = (y / data.images).mean(1)
        masks = factor_panels([f"image {number}, factor" for number in (1, 2)], factors)
        photographs = [photograph_panel(f"image {number}", each) for number, each in enumerate(after, 1)]
        return Drawing([photographs[0], masks[0], photographs[1], masks[1]], factors)

    return draw


def combined(layer: Any, data: Data) -> Draw:
    """The factor of either operand of a sum, found with the other one at 0."""
    a, b = data.maps, data.others
    zeros = torch.zeros_like(a)
    titles = [f"sample {sample}, {operand} operand" for sample in (1, 2) for operand in ("1st", "2nd")]

    def draw() -> Drawing:
        state = torch.get_rng_state()
        of_a = layer(a, zeros) / a
        torch.set_rng_state(state)  # the same numbers again
        of_b = layer(zeros, b) / b
        factors, over = (torch.stack(pair, 1)[:, :, SHOWN[0]].flatten(0, 1) for pair in ((of_a, of_b), (a, b)))
        return Drawing(factor_panels(titles, factors, over), factors)

    return draw


def swapped(layer: Any, data: Data) -> Draw:
    """What goes into the layer, what it gives without the regularizer and with it, and how it differs."""
    inputs = inputs_of_host(layer, data)
    titles = ["the layer as it was", "the layer now", "now, drawn again"]

    def draw() -> Drawing:
        plain, now, again = (plane(y) for y in (layer.own(*inputs), layer(*inputs), layer(*inputs)))
        given = value_panels(["sample 1, into the layer"], [plane(inputs)])
        if is_activation(layer.host):
            return Drawing(given + value_panels(titles[:2], [plain, now]) + factor_panels(["factor"], [now / plain]))
        return Drawing(given + value_panels(titles, [plain, now, again]))

    return draw


def inputs_of_host(layer: Any, data: Data) -> tuple[Any, ...]:
    """The maps where the layer takes them, the edge of 14 x 14 of them, or what the class has as an example."""
    maps = data.before if is_activation(layer.host) else data.maps
    choices = [(maps,), (maps[..., :14, :14],)]
    if hasattr(layer, "example_inputs"):
        choices.append(layer.example_inputs(2))
    for inputs in choices:
        try:
            layer.own(*inputs)
        except (RuntimeError, ValueError):
            continue
        return inputs
    host = type(layer.host).__name__
    raise SurgeryError(f"{layer.site_id}: expected a host that takes maps, got {host}; give it `example_inputs`")


def is_activation(host: nn.Module) -> bool:
    """Whether a layer is one of torch's activations: it works element by element, on what is of either sign."""
    return type(host).__module__ == nn.ReLU.__module__


def plane(result: Any) -> Tensor:
    """Of whatever a layer takes or gives, the first sample, as (H, W)."""
    x = tree_leaves(result)[0][0]
    if x.dim() > 2:
        x = x[min(SHOWN[0], len(x) - 1)]
    while x.dim() > 2:
        x = x[0]
    return x if x.dim() == 2 else x.view(1, -1)


def linear_weights(layer: Any, data: Data) -> Draw:
    """The factor of each weight of a linear layer; each sample has its own."""
    host = nn.Linear(UNITS, UNITS, bias=False)
    layer.bind(host)
    units = torch.eye(UNITS).expand(2, UNITS, UNITS)  # what these come to are the weights

    def draw() -> Drawing:
        factors = torch.cat([layer(units) / host.weight.T for _ in range(2)]).transpose(1, 2)
        titles = [f"weights, sample {sample}{again}" for again in ("", ", again") for sample in (1, 2)]
        return Drawing(factor_panels(titles, factors), factors)

    return draw


def recurrent_weights(layer: Any, data: Data) -> Draw:
    """The factor of each hidden-to-hidden weight; all samples have the same."""
    host = nn.RNN(1, UNITS, nonlinearity="relu", bias=False, batch_first=True)
    nn.init.zeros_(host.weight_ih_l0)
    nn.init.uniform_(host.weight_hh_l0, 0.1, 1)  # which passes the ReLU
    layer.bind(host)
    nothing, units = torch.zeros(UNITS, 1, 1), torch.eye(UNITS)[None]

    def draw() -> Drawing:
        steps = [layer(nothing, units)[0][:, 0] for _ in range(PANELS)]  # one step in time
        factors = (torch.stack(steps) / host.weight_hh_l0.T).transpose(1, 2)
        return Drawing(factor_panels([f"weights, forward {n}" for n in range(1, PANELS + 1)], factors), factors)

    return draw


def by_label(layer: Any, data: Data) -> Draw:
    """The factor of each unit of vectors, sample by sample, the samples of one class below one another."""
    fresh = copy.deepcopy(layer)
    classes = torch.arange(UNITS) * LABELS // UNITS
    titles = ["before a validation", "in order of class", "another batch", "another, shuffled"]

    def factor(of: Any, labels: Tensor) -> Tensor:
        units = torch.rand(UNITS, UNITS) + 0.1
        with of.batch(labels=labels):
            return of(units) / units

    def draw() -> Drawing:
        with layer.batch(validation=(torch.rand(UNITS, UNITS), classes)):
            others = classes[torch.randperm(UNITS)]
            whose = ((fresh, classes), (layer, classes), (layer, classes), (layer, others))
            factors = torch.stack([factor(*each) for each in whose])
        return Drawing(factor_panels(titles, factors), factors)

    return draw


Scene = Callable[[Any, Data], Draw]
BY_KIND: dict[str, Scene] = {"insert": inserted, "combine": combined, "swap": swapped}
# Those that drop weights, which no output shows, or go by labels: what is not named here is drawn by its kind.
OF_WEIGHTS: dict[str, Scene] = {"dropconnect": linear_weights, "weight_drop": recurrent_weights}
BY_NAME: dict[str, Scene] = {**OF_WEIGHTS, "nsdropout": by_label}


def scene_of(name: str, layer: Any) -> Scene:
    """The scene of a regularizer."""
    scene = BY_NAME.get(name) or BY_KIND.get(layer.kind)
    if scene is None:
        raise SurgeryError(f"{name}: expected one of the kinds {', '.join(BY_KIND)}, got {layer.kind}; draw it by name")
    return scene


# ---- one regularizer ----


def new_layer(name: str, shape: tuple[int, ...]) -> Any:
    """The regularizer as it comes by default, for maps of `shape`, or bound to the layer of its own examples."""
    cls = catalogue.load("regularizers", name)
    layer = cls()
    if layer.kind == "insert" and hasattr(layer, "example_inputs"):  # it takes no maps
        shape = tuple((cls.example_inputs(2)[0] if name in BY_NAME else example_of(layer)).shape)
        layer.build(channel_axis=-1, channels=shape[-1], shape=shape, site_id=name)
        return layer
    layer.build(channel_axis=1, channels=shape[1], shape=shape, site_id=name)
    if layer.kind == "swap":
        layer.bind(cls.example_host())
    with torch.no_grad():  # what would be learned, made up: from half to one and a half
        for parameter in layer.parameters():
            parameter.copy_(torch.linspace(0.5, 1.5, parameter.numel())[torch.randperm(parameter.numel())])
    return layer


@torch.no_grad()
def group(name: str, data: Data, seed: int) -> Group:
    """Draw one regularizer and measure what it drops; the same whichever others are drawn."""
    torch.manual_seed(seed)
    layer = new_layer(name, tuple(data.maps.shape))
    draw = scene_of(name, layer)(layer, data)
    drawings = [draw() for _ in range(DRAWS)]
    drawing = max(drawings, key=lambda each: (each.drops_some, each.varies))  # the first of the best
    arguments = layer.extra_repr() + (", learned parameters made up" if list(layer.parameters()) else "")
    if name in OF_WEIGHTS:
        words = told("of the weights dropped", [each.factors == 0 for each in drawings], layer.expected_drop(()))
    else:
        words = share(layer, data)
    return Group(name, year_of(layer.paper), layer.summary, arguments, words, drawing.panels)


def share(layer: Any, data: Data) -> str:
    """What was measured over many draws, in words."""
    if layer.uncounted:
        return f"not counted: {layer.uncounted}"
    inputs = {"insert": (data.maps,), "combine": (data.maps, data.others)}.get(layer.kind)
    if inputs is None:
        inputs = inputs_of_host(layer, data)
    elif layer.kind == "insert" and hasattr(layer, "example_inputs"):
        inputs = (example_of(layer),)
    plain = layer.own(*inputs) if layer.kind == "swap" else sum(inputs[1:], inputs[0])
    zero = layer.drops == "zero"
    lost = [y == 0 if zero else y != plain for y in (layer(*inputs) for _ in range(DRAWS))]
    return told("dropped" if zero else "changed", lost, layer.expected_drop(tuple(inputs[0].shape)))


def told(what: str, draws: Sequence[Tensor], expected: float) -> str:
    """The share that is true in many draws, in words."""
    measured = torch.stack([each.double().mean() for each in draws]).mean().item()
    return f"{measured:.1%} {what} in {len(draws)} draws (expected {expected:.1%})"


def year_of(paper: str) -> str:
    """The year that a reference names, or else that of its arXiv number."""
    named = re.search(r"\b(?:19|20)\d\d\b", re.sub(r"(arXiv:|doi )\S+", "", paper))
    number = re.search(r"arXiv:(\d\d)", paper)
    return named.group() if named else f"20{number.group(1)}" if number else "no year"


# ---- the picture ----


class Page:
    """A figure with a grid of cells, each with words above and a row of panels below."""

    def __init__(self, cells: int) -> None:
        self.columns = min(COLUMNS, cells)
        rows = -(-cells // self.columns)
        self.size = self.columns * CELL[0], rows * CELL[1] + MARGIN
        self.figure = Figure(figsize=self.size, dpi=100, facecolor="white")

    def corner(self, cell: int) -> tuple[float, float]:
        """Where a cell begins, from the left and from the top, in inches."""
        row, column = divmod(cell, self.columns)
        return column * CELL[0] + MARGIN, row * CELL[1] + MARGIN

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        """Axes at a place in inches."""
        full_width, full_height = self.size
        place = left / full_width, 1 - (top + height) / full_height, width / full_width, height / full_height
        return self.figure.add_axes(place)

    def write(self, left: float, top: float, words: str, **how: Any) -> None:
        """Words that begin at a place in inches."""
        self.figure.text(left / self.size[0], 1 - top / self.size[1], words, va="top", **how)

    def put(self, cell: int, name: str, lines: Sequence[str], panels: Sequence[Panel]) -> None:
        """Fill a cell: the name and lines on it, and the panels, whose axes are labelled by the name."""
        left, top = self.corner(cell)
        self.write(left, top, name, fontsize=12, fontweight="bold")
        wrapped = [part for line in lines for part in textwrap.wrap(line, 104)]
        self.write(left, top + 0.22, "\n".join(wrapped), fontsize=9, linespacing=1.15)
        for number, panel in enumerate(panels):
            axes = self.axes(left + number * (PANEL + GAP), top + WORDS + TITLE, PANEL, PANEL)
            axes.imshow(panel.pixels, interpolation="nearest", aspect="auto")
            axes.set(xticks=[], yticks=[], label=name)
            axes.set_title(panel.title, fontsize=8, pad=3)
            if panel.note:
                box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 2}
                axes.text(0.5, 0.5, panel.note, transform=axes.transAxes, ha="center", va="center", bbox=box)

    def put_legend(self, cell: int, seed: int) -> None:
        """Fill a cell with the two scales of colours, in words."""
        left, top = self.corner(cell)
        about = f"one draw each: of {DRAWS} with seed {seed} the first that drops something and keeps something"
        self.write(left, top, "colours", fontsize=12, fontweight="bold")
        self.write(left, top + 0.22, about, fontsize=9)
        width = CELL[0] - 2 * MARGIN
        for below, words, scale, names in (
            (0.75, "factor of an element; its value as light and shade", (FACTOR_RANGE, FACTORS), FACTOR_NAMES),
            (1.75, "values before and after, or into and out of a layer", (None, VALUES), {0: "low", 1: "high"}),
        ):
            self.write(left, top + below, words, fontsize=9)
            bar = self.axes(left + 0.3, top + below + 0.2, width - 0.6, 0.2)
            self.figure.colorbar(ScalarMappable(*scale), cax=bar, orientation="horizontal")
            bar.set_xticks(list(names), list(names.values()), fontsize=9)


def input_panels(data: Data) -> list[Panel]:
    """The photographs and some of what the net makes of them."""
    maps = [value_panels([title], [x])[0] for title, x in zip(SHOWN_TITLES, shown(data.maps), strict=True)]
    images = [photograph_panel(f"image {number}", each) for number, each in enumerate(data.photographs, 1)]
    return [images[0], maps[0], images[1], maps[2]]


def picture(names: Sequence[str], seed: int) -> Figure:
    """The whole gallery: the inputs, the legend, and a cell for each regularizer."""
    data = Data.new(seed)
    page = Page(len(names) + 2)
    about = "two photographs, and of each one of the feature maps that a net with random weights makes of it"
    page.put(0, "inputs", [about], input_panels(data))
    page.put_legend(1, seed)
    for cell, name in enumerate(names, 2):
        each = group(name, data, seed)
        page.put(cell, name, [f"{each.year}: {each.summary}", each.arguments, each.share], each.panels)
    return page.figure


def drawn(figure: Figure) -> Iterator[str]:
    """The names of the regularizers that a picture has panels of."""
    known = set(catalogue.names("regularizers"))
    yield from dict.fromkeys(axes.get_label() for axes in figure.axes if axes.get_label() in known)


def main() -> None:
    """Draw, and say where it lies."""
    parser = argparse.ArgumentParser(description="Draw what each regularizer does into one picture.")
    parser.add_argument("names", nargs="*", metavar="name", help="regularizers; all by default")
    parser.add_argument("--out", type=Path, default=Path("mask_gallery.png"), help="the PNG file to write")
    parser.add_argument("--seed", type=int, default=0, help="of the nets' weights and of the draws")
    given = parser.parse_args()
    try:
        figure = picture(given.names or catalogue.names("regularizers"), given.seed)
    except SurgeryError as error:  # such as a name that there is not
        raise SystemExit(str(error)) from None
    given.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(given.out, format="png")
    console.print(f"drew {', '.join(drawn(figure))}", soft_wrap=True)
    console.print(f"wrote {given.out.resolve()}", soft_wrap=True)


if __name__ == "__main__":
    main()
