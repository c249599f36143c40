"""Every script of `examples/` runs from end to end, in its quick form; and those that draw, draw what they should."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from torch import Tensor, nn

from dropsurgery import SurgeryError, catalogue
from dropsurgery.regularizers import Rate, Regularizer

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
GALLERY = EXAMPLES / "mask_gallery.py"
SHAPES = EXAMPLES / "segment_shapes.py"
LANGUAGE = EXAMPLES / "char_lm.py"
SCRIPTS = sorted(set(EXAMPLES.glob("*.py")) - {GALLERY, SHAPES})


def run(script: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(script), *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_there_are_examples() -> None:
    assert SCRIPTS and GALLERY.exists() and SHAPES.exists()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_example_runs(script: Path, tmp_path: Path) -> None:
    done = run(script, tmp_path, "--quick")
    assert done.returncode == 0, done.stdout + done.stderr
    assert not list(tmp_path.iterdir()), "an example leaves files behind"


def test_gallery_draws_every_regularizer(tmp_path: Path) -> None:
    done = run(GALLERY, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = done.stdout.splitlines()
    assert first == f"drew {', '.join(catalogue.names('regularizers'))}"
    (file,) = tmp_path.iterdir()
    assert file.name == "mask_gallery.png" and second == f"wrote {file}"
    pixels = imread(file)
    assert min(pixels.shape[:2]) > 1500 and file.stat().st_size > 200_000


def test_gallery_takes_names_and_refuses_unknown_ones(tmp_path: Path) -> None:
    done = run(GALLERY, tmp_path, "dropblok", "--out", "a/b.png")
    assert done.returncode == 1 and "did you mean 'dropblock'" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
    done = run(GALLERY, tmp_path, "dropblock", "--out", "a/b.png", "--seed", "1")
    assert done.stdout.startswith("drew dropblock\n") and (tmp_path / "a" / "b.png").exists()


# ---- regularizers that are new to the gallery are drawn by their kind ----


class Rows(Regularizer):
    paper, summary = "Somebody: Rows, arXiv:1901.00001", "drops rows"

    def __init__(self, p: Rate = 0.3) -> None:
        super().__init__(p=p)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(x) if self.active else x

    def drop(self, x: Tensor) -> Tensor:
        return x * (torch.rand(x.shape[0], 1, x.shape[2], 1) >= self.p)

    def expected_drop(self, shape: tuple[int, ...]) -> float:
        return self.p.item()


class Shifted(Rows):
    drops, uncounted = "other", "all is shifted"

    def drop(self, x: Tensor) -> Tensor:
        return x + torch.rand(x.shape)


class Images(Rows):
    placement = "the network's input"


class Second(Rows):
    kind, uncounted = "combine", "a sum is left"

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + self.drop(b)


class InLinear(Rows):
    kind, drops = "swap", "other"

    @staticmethod
    def example_host() -> nn.Module:
        return nn.Linear(14, 9)

    def forward(self, x: Tensor) -> Any:
        return self.drop(self.own(x))


class InRecurrent(Rows):
    kind, uncounted = "swap", "states are summed up"

    @staticmethod
    def example_host() -> nn.Module:
        return nn.GRU(5, 4, batch_first=True)

    @staticmethod
    def example_inputs(batch: int) -> tuple[Tensor, ...]:
        return (torch.randn(batch, 6, 5),)

    def forward(self, x: Tensor) -> Any:
        return self.own(x * (torch.rand(x.shape) >= self.p))


class Wrapped(Rows):
    kind = "wrap"


NEW = (Rows, Shifted, Images, Second, InLinear, InRecurrent)


def imported(script: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(script.stem, script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look their annotations up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def gallery() -> ModuleType:
    return imported(GALLERY)


@pytest.fixture
def new_names(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    for cls in (*NEW, Wrapped):
        monkeypatch.setitem(catalogue._registered["regularizers"], f"new_{cls.__name__}", cls)
    return [f"new_{cls.__name__}" for cls in NEW]


def test_gallery_draws_new_regularizers_by_kind(gallery: ModuleType, new_names: list[str]) -> None:
    figure = gallery.picture(new_names, seed=0)
    assert list(gallery.drawn(figure)) == new_names
    words = "\n".join(text.get_text() for text in figure.texts)
    assert words.count("2019: drops rows") == len(NEW) and "not counted: a sum is left" in words
    for name in new_names:
        panels = [axes for axes in figure.axes if axes.get_label() == name]
        assert len(panels) == gallery.PANELS
        for axes in panels:  # a picture, or one factor that is written into it
            assert np.ptp(axes.images[0].get_array(), axis=(0, 1)).any() or axes.texts


def test_gallery_draws_what_was_dropped(gallery: ModuleType, new_names: list[str]) -> None:
    data = gallery.Data.new(0)
    rows = gallery.group("new_Rows", data, seed=0)
    share = float(rows.share.split("%")[0])
    assert rows.share.endswith("% dropped in 100 draws (expected 30.0%)") and abs(share - 30) < 2
    dropped = np.array(gallery.FACTORS(gallery.FACTOR_RANGE(0.0))[:3])
    for panel in rows.panels:
        red = np.isclose(panel.pixels, dropped).all(-1)
        assert (red.all(1) == red.any(1)).all() and 0 < red.mean() < 1
    shown = np.stack([panel.pixels for panel in rows.panels[:2]])
    assert (np.isclose(shown[0], dropped) == np.isclose(shown[1], dropped)).all()  # the same in both channels


def test_gallery_says_which_kinds_it_knows(gallery: ModuleType, new_names: list[str]) -> None:
    with pytest.raises(SurgeryError, match="new_Wrapped: expected one of the kinds insert, combine, swap, got wrap"):
        gallery.picture(["new_Wrapped"], seed=0)


@pytest.mark.parametrize(
    ("paper", "year"),
    [
        ("Ghiasi: DropBlock, NeurIPS 2018, arXiv:1810.12890", "2018"),
        ("DeVries, Taylor: Cutout, arXiv:1708.04552", "2017"),
        ("Dental Images, ACIIDS 2021, doi 10.1007/2019_21", "2021"),
        ("Somebody: Something", "no year"),
    ],
)
def test_gallery_reads_the_year(gallery: ModuleType, paper: str, year: str) -> None:
    assert gallery.year_of(paper) == year


# ---- the segmented shapes ----


def test_segmentation_compares_and_draws(tmp_path: Path) -> None:
    done = run(SHAPES, tmp_path, "--quick", "--out", "a/b")
    assert done.returncode == 0, done.stdout + done.stderr
    for method in ("plain", "dropout", "DropBlock", "Heuristic"):
        (row,) = (line for line in done.stdout.splitlines() if line.startswith(f"│ {method} "))
        dice, _, deviation, *_ = re.findall(r"[\d.]+|±", row)
        assert 0 <= float(dice) <= 1 and float(deviation) == 0  # of one seed
    names = {"segmentations.png", "co_adaptation.png"}
    assert {file.name for file in (tmp_path / "a" / "b").iterdir()} == names
    for name in names:
        assert min(imread(tmp_path / "a" / "b" / name).shape[:2]) > 400


@pytest.fixture(scope="module")
def shapes() -> ModuleType:
    return imported(SHAPES)


def test_segmentation_draws_the_same_images_for_the_same_seed(shapes: ModuleType) -> None:
    one, again, other = (shapes.Data.new(3, seed) for seed in (1, 1, 2))
    assert torch.equal(one.images, again.images) and torch.equal(one.masks, again.masks)
    assert not torch.equal(one.images, other.images)
    assert all(0.02 < mask.mean() < 0.5 for mask in (*one.masks, *other.masks))


def test_segmentation_measures_dice(shapes: ModuleType) -> None:
    wanted = torch.zeros(2, 1, 4, 4)
    wanted[..., :2] = 1
    found = torch.full((2, 1, 4, 4), -1.0)
    assert shapes.dice(found, wanted) == 0 and shapes.dice(wanted - 0.5, wanted) == 1
    found[0, ..., 1:3] = 1  # of 8 each, 4 in common; nothing in the second image
    assert shapes.dice(found, wanted) == 0.25


def test_segmentation_puts_each_method_at_the_same_places(shapes: ModuleType) -> None:
    nets = {name: shapes.new_model(name, seed=0, steps=4) for name in shapes.METHODS}
    plans = {name: net.surgery.plan.edits for name, net in nets.items() if name != "plain"}
    assert {name: {edit.regularizer for edit in edits} for name, edits in plans.items()} == {
        "dropout": {"dropout"},
        "DropBlock": {"dropblock"},
        "Heuristic": {"heuristic_dropout"},
    }
    places = [[(edit.site.id, edit.p) for edit in edits] for edits in plans.values()]
    assert places[0] == places[1] == places[2] and len(places[0]) == 13
    weights = [list(net.state_dict().values()) for net in nets.values()]
    assert all(torch.equal(a, b) for each in weights[1:] for a, b in zip(weights[0], each, strict=True))


def test_segmentation_masks_shares_of_the_last_maps(shapes: ModuleType) -> None:
    """Without masks it is the net's own Dice; with all maps masked only the head's bias would be left."""
    torch.manual_seed(0)
    net, data = shapes.new_model("plain", 0, 1), shapes.Data.new(2, 0)
    result = shapes.tested(net, data, draws=3)
    with torch.no_grad():
        logits = net.eval()(data.images)
    assert result.dices[0] == shapes.dice(logits, data.masks) and result.lost[0] == 0
    assert torch.equal(result.found, logits > 0) and len(result.dices) == len(shapes.SHARES)
    assert len(set(result.dices)) > 3  # what is masked matters


# ---- the language model ----


@pytest.fixture(scope="module")
def language() -> ModuleType:
    return imported(LANGUAGE)


def test_language_model_compares_methods(tmp_path: Path) -> None:
    done = run(LANGUAGE, tmp_path, "--quick")
    assert done.returncode == 0, done.stdout + done.stderr
    for method in ("plain", "variational", "zoneout"):
        (row,) = (line for line in done.stdout.splitlines() if line.startswith(f"│ {method} "))
        unseen, _, deviation, *_ = re.findall(r"[\d.]+|±", row)
        assert 3 < float(unseen) < 8 and float(deviation) == 0  # of one seed
    for layer in ("variational_dropout", "zoneout"):
        assert layer in done.stdout


def test_language_model_is_tested_on_pages_that_it_has_not_read(language: ModuleType) -> None:
    settings = language.Settings(learn=5_000, test=1_000, updates=3, batch=4, steps=10)
    text = language.Text.new(settings)
    assert len(text.learn) == 5_000 and len(text.test) == 1_000
    assert max(text.learn.max(), text.test.max()) < text.characters
    pairs = list(text.batches(settings, torch.Generator().manual_seed(0)))
    assert len(pairs) == 3
    whole = text.learn.tolist()
    for piece, following in pairs:
        assert piece.shape == (4, 10) and torch.equal(piece[:, 1:], following[:, :-1])
        for line, last in zip(piece.tolist(), following[:, -1].tolist(), strict=True):
            assert any(whole[i : i + 11] == [*line, last] for i in range(len(whole) - 10))


def test_language_model_counts_bits(language: ModuleType) -> None:
    """Scores that say nothing cost log2 of the characters; the state is carried on from piece to piece."""
    letters = torch.randint(8, (4, 10))
    assert language.bits(torch.zeros(4, 10, 8), letters).item() == pytest.approx(3.0)

    class Counting(nn.Module):
        def forward(self, text: Tensor, state: Any = None) -> tuple[Tensor, Any]:
            steps = torch.arange(text.shape[1]) + (0 if state is None else state)
            scores = torch.zeros(*text.shape, 8)
            scores[:, :, 0] = 50.0 * (steps < 150)  # sure of the first character for 150 steps, then of none
            return scores, steps[-1] + 1

    assert language.tested(Counting(), torch.zeros(20 * 201, dtype=torch.int64)) == pytest.approx(3 * 50 / 200)


def test_language_models_begin_alike(language: ModuleType) -> None:
    nets = {name: language.new_model(name, seed=0, characters=9, updates=4) for name in language.METHODS}
    weights = [list(net.state_dict().values()) for net in nets.values()]
    assert all(torch.equal(a, b) for each in weights[1:] for a, b in zip(weights[0], each, strict=True))
    kinds = {
        name: [type(each).__name__ for each in net.surgery.regularizers.values()]
        for name, net in nets.items()
        if name != "plain"
    }
    assert kinds == {"variational": ["VariationalDropout"], "zoneout": ["Zoneout"]}
