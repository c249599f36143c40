"""Width curves: what is measured, what is given back, where the knee lies."""

from __future__ import annotations

import builtins
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dropsurgery import SurgeryError, apply_recipe, width_curve
from dropsurgery.analysis.width_curve import WidthCurve, WidthPoint

X = torch.rand(6, 5)


def model() -> Any:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 10), nn.ReLU(), nn.Dropout(0.5), nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 3))
    entry = {"name": "e", "pattern": "hidden", "edge": "output", "insert": "structural_dropout"}
    recipe = {"version": 1, "name": "r", "patterns": {"hidden": ["linear", "activation"]}, "entries": [entry]}
    return apply_recipe(net, recipe, example_inputs=X)


def of(*pairs: tuple[float, float]) -> WidthCurve:
    return WidthCurve(tuple(WidthPoint(share, share, {}, score) for share, score in pairs))


def test_each_width_is_measured_and_all_is_as_before() -> None:
    gm = model().train()
    gm[2].eval()
    modes = [module.training for module in gm.modules()]
    seen = []

    def evaluate(net: Any) -> torch.Tensor:
        assert net is gm and not any(module.training for module in net.modules()) and not torch.is_grad_enabled()
        seen.append([site.width for site in net.surgery.regularizers.values()])
        return net(X).sum()

    curve = width_curve(gm, evaluate, [1.0, 3, 0.5, {"1#0:*": 2}])
    assert seen == [[10, 20], [3, 3], [5, 10], [2, None]]
    assert [point.width for point in curve] == [3, 0.5, {"1#0:*": 2}, 1.0]
    assert [point.share for point in curve] == [6 / 30, 15 / 30, 22 / 30, 1.0]
    assert [list(point.units.values()) for point in curve] == [[3, 3], [5, 10], [2, 20], [10, 20]]
    assert [module.training for module in gm.modules()] == modes
    for point in curve:
        with torch.no_grad(), gm.eval().surgery.width(point.width):
            assert point.score == float(gm(X).sum())
    assert all(site.width is None for site in gm.surgery.regularizers.values())


def test_all_is_as_before_after_an_error() -> None:
    gm = model().train()
    with pytest.raises(ZeroDivisionError):
        width_curve(gm, lambda net: net.eval() and 1 / 0, [3])
    with pytest.raises(SurgeryError, match="to return a number, got 'good'"):
        width_curve(gm, lambda net: "good", [3])
    assert all(module.training for module in gm.modules())
    assert all(site.width is None for site in gm.surgery.regularizers.values())


@pytest.mark.parametrize("widths", [[], [3, 0], [3, 21], 3, "35", {"1#0:*": 2}, [True], [{"2*": 1}]])
def test_bad_widths_are_refused_before_anything_is_evaluated(widths: Any) -> None:
    with pytest.raises(SurgeryError, match=r"width"):
        width_curve(model(), lambda net: pytest.fail("evaluated"), widths)


def test_other_models_are_refused() -> None:
    with pytest.raises(SurgeryError, match="expected a model made by apply_recipe"):
        width_curve(nn.Linear(2, 2), lambda net: 0.0, [1])
    with pytest.raises(SurgeryError, match="expected a function"):
        width_curve(model(), 0.5, [1])


@pytest.mark.parametrize(
    ("curve", "knee"),
    [
        (of((0.1, 0.2), (0.3, 0.8), (0.6, 0.85), (1.0, 0.9)), 0.3),
        (of((0.1, 2.0), (0.3, 0.5), (0.6, 0.45), (1.0, 0.4)), 0.3),  # a loss
        (of((0.1, 0.2), (0.3, 0.95), (0.5, 0.6), (1.0, 0.9)), 0.3),  # not monotone
        (of((0.0, 0.0), (0.25, 0.5), (0.5, 0.75), (1.0, 1.0)), 0.25),  # equally far: the narrower
        (of((0.0, 0.0), (0.5, 0.5), (1.0, 1.0)), None),  # straight
        (of((0.0, 0.0), (0.5, 0.2), (1.0, 1.0)), None),  # below the line
        (of((0.1, 0.5), (0.5, 0.7), (1.0, 0.5)), None),  # no height
        (of((0.1, 0.5), (1.0, 0.9)), None),
        (of((0.1, 0.5), (0.1, 0.6), (1.0, 0.9)), None),
        (of((0.1, 0.5), (0.5, float("nan")), (1.0, 0.9)), None),
    ],
)
def test_the_knee_is_farthest_above_the_chord(curve: WidthCurve, knee: float | None) -> None:
    found = curve.knee
    assert (None if found is None else found.share) == knee


def test_the_knee_is_that_of_an_independent_search() -> None:
    """By the distance from the straight line itself, in the plane where the curve fills the unit square."""
    torch.manual_seed(0)
    for _ in range(50):
        shares = torch.rand(9, dtype=torch.float64).sort().values
        scores = torch.rand(9, dtype=torch.float64)
        curve = of(*zip(shares.tolist(), scores.tolist(), strict=True))
        x = (shares - shares[0]) / (shares[-1] - shares[0])
        y = (scores - scores[0]) / (scores[-1] - scores[0])
        distance = (y - x) / 2**0.5
        expected = shares[distance.argmax()] if distance.max() > 1e-6 else None
        found = curve.knee
        assert (found is None) == (expected is None)
        assert found is None or found.share == expected


def test_a_table() -> None:
    text = str(of((0.1, 0.2), (0.3, 0.8), (1.0, 0.9)))
    assert text.splitlines()[0].split() == ["width", "share", "of", "units", "score"]
    assert text.splitlines()[3].split() == ["0.3", "0.3000", "0.8", "knee"]
    assert "{act1*: 2}" in str(WidthCurve((WidthPoint({"act1*": 2}, 0.1, {}, 0.5),)))


def test_a_result_is_frozen() -> None:
    curve = of((0.1, 0.2), (1.0, 0.9))
    with pytest.raises(FrozenInstanceError):
        curve.points = ()  # type: ignore[misc]
    assert len(curve) == 2


def test_a_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figure = of((0.1, 0.2), (0.3, 0.8), (1.0, 0.9)).plot(tmp_path / "curve.png")
    (axes,) = figure.axes
    assert axes.get_legend().get_texts()[0].get_text() == "knee: 0.3"
    assert (tmp_path / "curve.png").stat().st_size > 1000
    assert of((0.1, 0.2), (1.0, 0.9)).plot().axes[0].get_legend() is None


def test_a_plot_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    own = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return own(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(SurgeryError, match="expected matplotlib, which is not installed; pip install"):
        of((0.1, 0.2), (1.0, 0.9)).plot()
