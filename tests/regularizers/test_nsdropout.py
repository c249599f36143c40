"""NSDropout: its masks against the formula, what is told it and when, what it knows and keeps, and what leaks."""

from __future__ import annotations

import copy
import importlib.util
import pickle
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from dropsurgery import PlanError, SurgeryError, SurgeryWarning, apply_recipe, diff, strip
from dropsurgery.recipe import load_recipe
from dropsurgery.regularizers.nsdropout import PATIENCE, NSDropout, furthest, label_masks, nsdropout

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "nsdropout_leak.py"


# ---- the formula, by plain loops ----


def reference(
    x: np.ndarray, y: np.ndarray, x_val: np.ndarray, y_val: np.ndarray, p: float, distance: str = "signed"
) -> dict[int, np.ndarray]:
    """The mask of each class that is on both sides, 1 for kept."""
    units, masks = x.shape[1], {}
    for label in set(y.tolist()) & set(y_val.tolist()):
        d = x[y == label].mean(0) - x_val[y_val == label].mean(0)
        d = np.abs(d) if distance == "abs" else d
        order = sorted(range(units), key=lambda unit: (-d[unit], unit))
        masks[label] = np.ones(units, dtype=bool)
        masks[label][order[: round(Fraction(str(p)) * units)]] = False
    return masks


def drawn(samples: int, classes: int, units: int, seed: int = 0, whole: bool = False) -> tuple[Tensor, Tensor]:
    """Features, and labels of which the first few are all classes; `whole` numbers have ties."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, units, generator=generator, dtype=torch.float64)
    y = torch.randint(classes, (samples,), generator=generator)
    y[: min(classes, samples)] = torch.arange(classes)[:samples]
    return (x.mul(2).round() if whole else x), y


def means_of(x: Tensor, y: Tensor, classes: int) -> Tensor:
    return torch.stack([x[y == label].mean(0) for label in range(classes)])


def told(layer: NSDropout, x: Tensor, y: Tensor) -> Tensor:
    with layer.batch(labels=y):
        return layer(x)


def known(x: Tensor, y: Tensor, **arguments: Any) -> NSDropout:
    """A layer that has had this validation."""
    layer = NSDropout(**arguments)
    with layer.batch(validation=(x, y)):
        return layer


# ---- N1 to N4: which units go ----


@pytest.mark.parametrize("distance", ["signed", "abs"])
@pytest.mark.parametrize("p", [0.1, 0.2, 0.5, 0.9])
@pytest.mark.parametrize(("samples", "classes", "units"), [(40, 5, 16), (200, 10, 128), (6, 20, 33), (7, 7, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_masks_are_those_of_the_formula(
    samples: int, classes: int, units: int, p: float, distance: Any, dtype: torch.dtype
) -> None:
    """Whether there are more samples or more classes; the wrong sign and the other distance fail (the controls)."""
    x, y = drawn(samples, classes, units, seed=1)
    x_val, y_val = drawn(5 * classes, classes, units, seed=2)
    masks = reference(x.numpy(), y.numpy(), x_val.numpy(), y_val.numpy(), p, distance)
    expected = torch.from_numpy(np.stack([masks[label] for label in y.tolist()]))
    layer = known(x_val.to(dtype), y_val, p=p, distance=distance)
    out = told(layer, x.to(dtype), y)
    assert torch.equal(out != 0, expected)
    assert torch.allclose(out.double(), x * expected / (1 - p), rtol=1e-6)
    assert torch.equal(layer.masks[y], expected) and layer.masked.sum() == len(y.unique())
    by_function = nsdropout(x, p, y, means_of(x_val, y_val, classes), distance)
    assert torch.equal(by_function != 0, expected)
    if units > 100 and p < 0.9:
        other = "abs" if distance == "signed" else "signed"
        assert not torch.equal(nsdropout(x, p, y, means_of(x_val, y_val, classes), other) != 0, expected)
        if distance == "signed":
            assert not torch.equal(nsdropout(-x, p, y, -means_of(x_val, y_val, classes)) != 0, expected)


@pytest.mark.parametrize("distance", ["signed", "abs"])
def test_of_equal_distances_the_first_go(distance: Any) -> None:
    """Classes of four samples of whole numbers: all means are exact, and many are equal."""
    x, y = drawn(16, 4, 50, whole=True)[0], torch.arange(4).repeat(4)
    x_val = drawn(16, 4, 50, seed=1, whole=True)[0]
    d = means_of(x, y, 4) - means_of(x_val, y, 4)
    assert len(d[0].unique()) < 40
    masks = reference(x.numpy(), y.numpy(), x_val.numpy(), y.numpy(), 0.3, distance)
    expected = np.stack([masks[label] for label in range(4)])
    for dtype in (torch.float64, torch.float32, torch.bfloat16):  # these numbers are exact in each
        layer = known(x_val.to(dtype), y, p=0.3, distance=distance)
        told(layer, x.to(dtype), y)
        assert np.array_equal(layer.masks.numpy(), expected)


@pytest.mark.parametrize("p", [0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.5, 0.55, 0.7, 0.75, 0.9, 1.0])
def test_exactly_round_of_the_share_goes(p: float) -> None:
    """Halves to the even number; the whole number below fails (the control)."""
    counts, below = {}, {}
    for units in range(1, 260):
        dropped = furthest(torch.randn(3, units), torch.tensor(p))
        (counts[units],) = set(dropped.sum(1).tolist())
        below[units] = int(Fraction(str(p)) * units)
        assert counts[units] == round(Fraction(str(p)) * units)
        assert NSDropout(p).expected_drop((8, units)) == pytest.approx(counts[units] / units)
    assert p == 1 or counts != below


@pytest.mark.parametrize("p", [0.0, 0.01, 0.2, 0.5, 1.0])
def test_both_ways_to_the_furthest_agree(p: float) -> None:
    """That of the CPU, and that of compilers, transforms and other devices; on whole numbers, with many equals."""
    for units in (1, 7, 100):
        distances = torch.randn(20, units).mul(2).round()
        mapped = torch.func.vmap(lambda x: furthest(x, torch.tensor(p)))(distances.view(4, 5, units))
        assert torch.equal(furthest(distances, torch.tensor(p)), mapped.view(20, units))


def test_samples_of_one_label_have_one_mask() -> None:
    x, y = drawn(64, 4, 50)
    layer = known(*drawn(40, 4, 50, seed=1))
    zeros = told(layer, x, y) == 0
    rows = [zeros[y == label].unique(dim=0) for label in range(4)]
    assert all(len(each) == 1 and each.sum() == 10 for each in rows)
    assert len(torch.cat(rows).unique(dim=0)) == 4


def test_before_a_validation_it_is_ordinary_dropout() -> None:
    torch.manual_seed(0)
    p, x, y = 0.3, torch.rand(200, 500) + 0.1, torch.zeros(200, dtype=torch.int64)
    layer = NSDropout(p)
    first, second = told(layer, x, y), told(layer, x, y)
    dropped = first == 0
    assert not torch.equal(dropped, second == 0)
    spread = (p * (1 - p) / x.numel()) ** 0.5
    assert abs(dropped.double().mean() - p) < 4 * spread
    assert len(dropped.unique(dim=0)) == 200  # and not by label (the control: with a validation it is)
    assert torch.allclose(first, x * ~dropped / (1 - p))
    assert layer.classes == 0 and torch.equal(nsdropout(x, 0.0), x)
    later = known(x, y, p=p)
    assert len((told(later, x, y) == 0).unique(dim=0)) == 1


def test_means_of_a_batch_hang_on_the_batch() -> None:
    """It is the difference that decides: the same units in the batch and in the validation leave the first ones."""
    x, y = drawn(40, 4, 20)
    assert torch.equal(told(known(x, y), x, y) == 0, (torch.arange(20) < 4).expand(40, 20))


# ---- N5 and what holds of any layer ----


def test_eval_is_the_identity_by_default() -> None:
    layer = known(*drawn(40, 4, 20)).eval()
    x, y = drawn(8, 4, 20, seed=3)
    state = torch.get_rng_state()
    assert layer(x) is x and told(layer, x, y) is x and layer.eval_rule == "identity"
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_gradients_pass_where_it_is_kept(dtype: torch.dtype) -> None:
    """As forward; without 1 / (1 - p), as in the author's code, it fails (the control)."""
    x, y = (each.to(dtype) if each.is_floating_point() else each for each in drawn(32, 4, 40))
    x.requires_grad_()
    layer = known(*drawn(40, 4, 40, seed=1), p=0.5)
    grad = torch.randn(x.shape, dtype=dtype)
    out = told(layer, x, y)
    out.backward(grad)
    assert out.dtype == dtype and torch.equal(x.grad, layer.masks[y] * 2 * grad)
    assert not torch.equal(x.grad, layer.masks[y] * grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masks_in_half_precision_are_those_of_the_same_numbers(dtype: torch.dtype) -> None:
    x, y = drawn(64, 4, 100)
    x_val, y_val = drawn(64, 4, 100, seed=1)
    masks = []
    for wide in (False, True):
        pair = (each.to(dtype).to(torch.float32 if wide else dtype) for each in (x, x_val))
        now, before = pair
        layer = known(before, y_val)
        told(layer, now, y)
        assert layer.means.dtype == torch.float32
        masks.append(layer.masks)
    assert torch.equal(*masks)


ODD = {
    "zeros": torch.zeros(8, 6),
    "constant": torch.full((8, 6), 3.0),
    "negative": -torch.rand(8, 6) - 0.1,
    "one unit": torch.rand(8, 1),
    "one sample": torch.rand(1, 6),
    "no sample": torch.rand(0, 6),
    "a dead unit": torch.rand(8, 6) * torch.tensor([1.0, 0, 1, 1, 1, 1]),
    "large": torch.full((8, 6), 6e4),
    "every other": torch.rand(8, 12)[:, ::2],
    "one position": torch.rand(8, 6, 1, 1).to(memory_format=torch.channels_last),
    "one position, channels at the end": torch.rand(8, 1, 1, 6),
}


@pytest.mark.parametrize("p", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ODD)
def test_odd_inputs_stay_finite(name: str, dtype: torch.dtype, p: float) -> None:
    x = ODD[name].to(dtype)
    y = torch.arange(len(x)) % 3
    layer = known(torch.rand(9, x[:1].numel() or 6), torch.arange(9) % 3, p=p)
    for given in (x, x.clone().requires_grad_()):
        out = told(layer, given, y)
        assert out.shape == x.shape and out.dtype == dtype
        assert out.isfinite().all() if name != "large" else not out.isnan().any()
        dropped = (out == 0).flatten(1).sum(1)
        assert (dropped >= round(p * x.flatten(1).shape[1])).all()
    out.nan_to_num().sum().backward()
    assert given.grad.isfinite().all()


def test_a_class_that_the_batch_has_not_keeps_its_mask() -> None:
    x, y = drawn(40, 4, 20)
    layer = known(*drawn(40, 4, 20, seed=1))
    told(layer, x, y)
    before = layer.masks.clone()
    few = y[y != 2]
    told(layer, x[y != 2] + torch.randn(20), few)
    assert torch.equal(layer.masks[2], before[2]) and not torch.equal(layer.masks, before)


# ---- what it does in eval by other rules, and the leak ----


def test_eval_rules_without_labels() -> None:
    x, y = drawn(40, 4, 20)
    test = torch.rand(5, 20, dtype=torch.float64)
    for rule in ("mean", "intersection"):
        layer = known(*drawn(40, 5, 20, seed=1), p=0.2, eval_rule=rule)
        assert torch.equal(layer.eval()(test), test)  # no mask has been made
        told(layer.train(), x, y)
        masks = layer.masks[:4].double()  # the fifth class had no sample
        factor = masks.mean(0) / 0.8 if rule == "mean" else masks.prod(0)
        assert torch.allclose(layer.eval()(test), test * factor)
        assert rule != "mean" or factor.mean() == pytest.approx(1)
        assert not torch.allclose(layer(test), test) and layer.eval_rule != "identity"
        layer.set_rate("p", 0.0)
        assert layer(test) is test


def test_the_leak_has_to_be_asked_for_twice_and_warns_each_time() -> None:
    leaking = {"eval_rule": "last_mask_true_label"}
    with pytest.raises(SurgeryError, match="eval_rule: expected `i_know_this_leaks_labels: true`"):
        NSDropout(**leaking)
    layer = known(*drawn(40, 4, 20), **leaking, i_know_this_leaks_labels=True)
    assert layer.leaks_labels and "LEAKS LABELS" in layer.uncounted and not NSDropout().leaks_labels
    x, y = drawn(40, 4, 20, seed=3)
    told(layer, x, y)
    layer.eval()
    with pytest.raises(SurgeryError, match=r"expected the labels of the batch in eval, got none"):
        layer(x)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        outs = [told(layer, x, y) for _ in range(3)]
    assert len(seen) == 3 and all(
        each.category is SurgeryWarning and "TRUE LABEL" in str(each.message) for each in seen
    )
    assert torch.equal(outs[0], x * layer.masks[y])  # no 1 / (1 - p), as in the author's code


def example() -> Any:
    spec = importlib.util.spec_from_file_location(EXAMPLE.stem, EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("seed", range(2))
def test_on_noise_true_labels_leak_and_nothing_is_learned(seed: int) -> None:
    """N6: what the warning warns of."""
    script = example()
    result = script.trial(script.Problem(), seed)
    assert result.true_label > 0.5 and result.follows > 0.5
    assert result.without < 0.3 and result.shuffled < 0.3


# ---- what is refused, with nothing changed ----


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (torch.rand(8), r"batch: labels: expected a tensor \(B,\) of integers, .*, got one of torch.float32"),
        (torch.ones(8, dtype=torch.bool), "got one of torch.bool"),
        (torch.zeros(8, 1, dtype=torch.int64), r"got one of torch.int64 and shape \(8, 1\)"),
        (torch.zeros((), dtype=torch.int64), r"shape \(\)"),
        ([0, 1], "got a list of int, int"),
        (torch.tensor([0, -1]), "expected classes counted from 0, got -1; leave samples"),
        (torch.tensor([0, 4]), "nsdropout: expected labels below 4, the number of classes of the validation, got 4"),
        (torch.tensor([0, 2]), "got labels of class 2, of which it has none; give a validation with samples of every"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels: Any, said: str) -> None:
    layer = known(torch.rand(6, 5), torch.tensor([0, 0, 1, 1, 3, 3]))
    before, means = layer.state(), torch.rand(6, 5)
    with pytest.raises(SurgeryError, match=said), layer.batch(labels=labels):
        pass
    if isinstance(labels, Tensor) and labels.dim() == 1 and not said.startswith(("batch", "got one", "expected cl")):
        bad = torch.tensor([0, 0, 1, 1, 3, 3])
        with pytest.raises(SurgeryError, match=said), layer.batch(labels=labels, validation=(means, bad)):
            pass
    assert layer.labels is None and all(
        torch.equal(a, b) for a, b in zip(before.values(), layer.state().values(), strict=True)
    )


@pytest.mark.parametrize(
    ("validation", "said"),
    [
        (
            torch.rand(4, 5),
            r"validation: expected a pair \(inputs for the model, labels\), .*, got one of torch.float32",
        ),
        ((torch.rand(4, 5), [0, 1, 0, 1]), "got a batch that is one of torch.float32"),
        ([(torch.rand(4, 5),)], "got a batch that is a tuple of Tensor"),
        (7, "got int"),
        ((torch.rand(4, 5), torch.rand(4)), r"validation: labels: expected a tensor \(B,\) of integers"),
        (
            (torch.rand(4, 5), torch.tensor([0, 1, 2])),
            "expected a label for each of 4 samples of the validation, got 3",
        ),
        ((torch.rand(4, 5), torch.tensor([0, 1, -1, 2])), "expected classes counted from 0, got -1"),
        ([], "expected at least one sample, got none"),
        ((torch.rand(0, 5), torch.zeros(0, dtype=torch.int64)), "expected at least one sample, got none"),
        (
            (torch.rand(4, 5), torch.tensor([0, 1, 2, 9])),
            "expected classes below 3, as many as the first validation had",
        ),
        ([(torch.rand(2, n), torch.tensor([0, 1])) for n in (5, 6)], "expected 5 units, .*, got 6"),
    ],
)
def test_validations_that_do_not_fit_are_refused(validation: Any, said: str) -> None:
    layer = known(torch.rand(6, 5), torch.arange(6) % 3)
    before = layer.state()
    with pytest.raises(SurgeryError, match=said), layer.batch(validation=validation):
        pass
    assert all(torch.equal(a, b) for a, b in zip(before.values(), layer.state().values(), strict=True))


def test_refusals_in_forward_and_in_words() -> None:
    x, y = torch.rand(4, 5), torch.tensor([0, 1, 2, 0])
    for layer in (NSDropout(), known(x, y)):
        with pytest.raises(SurgeryError, match=r"in training, got none; run forward, .* `with layer.batch\(labels=lab"):
            layer(x)
        with pytest.raises(SurgeryError, match="expected a label for each of 4 samples of the batch, got 3"):
            told(layer, x, y[:3])
    with pytest.raises(SurgeryError, match=r"as many units as those of the validation, got \(4, 6\), and \(3, 5\)"):
        told(known(x, y), torch.rand(4, 6), y)
    with pytest.raises(SurgeryError, match="batch: expected labels, a validation, or both"), NSDropout().batch():
        pass
    with pytest.raises(SurgeryError, match="expected the label of each sample"):
        nsdropout(x, 0.2, None, torch.rand(3, 5))
    with pytest.raises(SurgeryError, match="labels: expected classes below 2, got 2"):
        nsdropout(x, 0.2, y, torch.rand(2, 5))
    for name, value in (("distance", "far"), ("eval_rule", "best"), ("i_know_this_leaks_labels", 1)):
        with pytest.raises(SurgeryError, match=rf"{name}: expected .*, got {value!r}"):
            NSDropout(**{name: value})
    with pytest.raises(SurgeryError, match=r"nsdropout at a: expected one vector .*, got a tensor of shape \(2, 5, 4"):
        NSDropout().build(channel_axis=1, channels=5, shape=(2, 5, 4, 4), site_id="a")
    with pytest.raises(SurgeryError, match=r"expected a p that drops a unit, above 0.25, got 0.2 of 2 units"):
        NSDropout().build(channel_axis=1, channels=2, shape=(2, 2), site_id="a")
    assert repr(NSDropout(0.3, eval_rule="mean")) == "NSDropout(p=0.3, distance='signed', eval_rule='mean')"


def test_labels_are_those_of_the_with_around_it() -> None:
    x, y = drawn(8, 4, 20)
    layer = known(*drawn(40, 4, 20, seed=1))
    outer, inner = y, (y + 1) % 4
    expected = {id(each): told(layer, x, each) for each in (outer, inner)}
    with layer.batch(labels=outer):
        assert torch.equal(layer(x), expected[id(outer)])
        with pytest.raises(KeyError), layer.batch(labels=inner):
            assert torch.equal(layer(x), expected[id(inner)])
            raise KeyError
        with layer.batch(validation=(x, y)):
            layer(x)
        outer += 1  # a copy was taken
        assert layer.labels.max() < 4
    assert layer.labels is None


# ---- in a model ----


class Net(nn.Module):
    """Convolution and norm, pooling, a hidden layer and a head; `again` repeats the hidden part in backward."""

    def __init__(self, again: bool | None = None) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()
        self.hidden, self.relu, self.head = nn.Linear(8, 30), nn.ReLU(), nn.Linear(30, 4)
        self.again = again

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.relu(self.hidden(self.act(self.norm(self.conv(x))).mean((2, 3)))))


ENTRY = {"name": "a", "pattern": "classifier", "edge": "input", "insert": "nsdropout", "with": {"p": 0.2}}
TWO = [ENTRY, {"name": "b", "pattern": "conv_bn_act", "insert": "dropout", "with": {"p": 0.5}}]


def operated(net: nn.Module, entries: Any = None, seed: int | None = None, **arguments: Any) -> Any:
    entry = ENTRY | {"with": {"p": 0.2, **arguments}}
    recipe = {"version": 1, "name": "r", "entries": entries or [entry]}
    return apply_recipe(net, recipe, example_inputs=torch.rand(2, 3, 8, 8), seed=seed)


def images(samples: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(samples, 3, 8, 8, generator=generator)
    return x, torch.arange(samples) % 4


def site(gm: Any) -> NSDropout:
    return next(each for each in gm.surgery.regularizers.values() if isinstance(each, NSDropout))


def features(gm: Any, x: Tensor) -> np.ndarray:
    """What arrives at the site in eval."""
    found: list[Tensor] = []
    handle = site(gm).register_forward_pre_hook(lambda module, args: found.append(args[0]))
    with torch.no_grad():
        copy_of_modes = gm.training
        gm.eval()(x)
        gm.train(copy_of_modes)
    handle.remove()
    return found[0].double().numpy()


def test_a_validation_gives_the_means_and_changes_nothing_else() -> None:
    torch.manual_seed(0)
    gm = operated(Net(), TWO).train()
    gm.norm.eval()  # as one who freezes a norm does
    x, y = images(22)
    expected = features(gm, x)
    gm.norm.eval()
    before = copy.deepcopy(gm.state_dict())
    modes, state = [module.training for module in gm.modules()], torch.get_rng_state()
    with gm.surgery.batch(validation=(x, y)):
        pass
    means = np.stack([expected[y.numpy() == label].mean(0) for label in range(4)])
    assert np.allclose(site(gm).means.numpy(), means, rtol=1e-6, atol=1e-7)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), gm.state_dict().values(), strict=True))
    assert [module.training for module in gm.modules()] == modes and torch.equal(torch.get_rng_state(), state)
    assert all(each.training and not each.forced for each in gm.surgery.regularizers.values())
    assert gm.surgery.current_step == 0 and all(p.grad is None for p in gm.parameters())


def test_also_within_active_and_inference_mode_and_as_batches() -> None:
    """However it comes, and in whatever parts, the means are the same."""
    torch.manual_seed(0)
    gm = operated(Net(), TWO).train()
    x, y = images(22)
    found = []

    def note(validation: Any) -> None:
        with gm.surgery.batch(validation=validation):
            found.append(site(gm).means)

    note((x, y))
    with gm.surgery.active(p=0.9):
        note([x, y.to(torch.uint8)])
        assert all(each.forced for each in gm.surgery.regularizers.values())
    with torch.inference_mode():
        note(((x,), y))
    note(DataLoader(TensorDataset(x, y), batch_size=5))
    note(({"x": part}, of) for part, of in zip(x.split(3), y.split(3), strict=True))
    note([(x[:1], y[:1]), (x[1:1], y[1:1]), (x[1:], y[1:])])
    for one, other in pairwise(found):
        assert torch.allclose(one, other, rtol=1e-6, atol=1e-7)  # the net itself rounds by the batch's size
    with gm.surgery.batch(labels=y):
        gm(x).sum().backward()


def test_a_first_validation_in_inference_mode() -> None:
    """What is kept of it is written to in training; and is saved from there, and loaded there."""
    gm, x, y = operated(Net()).train(), *images(8)
    with torch.inference_mode():
        with gm.surgery.batch(validation=(x, y)):
            state = gm.surgery.state_dict()
        layer = known(x.flatten(1), y)
    other = operated(Net()).train()
    with torch.inference_mode():
        other.surgery.load_state_dict(state)
    for each in (gm, other):
        with each.surgery.batch(labels=y):
            each(x).sum().backward()
        assert site(each).masked.all() and not site(copy.deepcopy(each)).means.is_inference()
    told(layer, x.flatten(1), y)


def test_means_over_batches_are_exact() -> None:
    """A mean of the batches' means fails (the control)."""
    x, y = drawn(101, 4, 30)
    x = x.float()
    whole = known(x, y).means
    parts = [(x[:7], y[:7]), (x[7:60], y[7:60]), (x[60:], y[60:])]
    layer = NSDropout()
    with layer.batch(validation=parts):
        assert torch.equal(layer.means, whole)
    assert torch.equal(whole, means_of(x.double(), y, 4).float())
    mean_of_means = torch.stack([means_of(a, b, 4) for a, b in parts]).nanmean(0)
    assert not torch.allclose(mean_of_means, whole, atol=1e-3)


def test_a_failing_validation_changes_nothing() -> None:
    torch.manual_seed(0)
    gm = operated(Net(), TWO).train()
    x, y = images(8)
    with gm.surgery.batch(labels=y, validation=(x, y)):
        gm(x)
    before, modes = site(gm).state(), [module.training for module in gm.modules()]

    def breaking() -> Any:
        yield x, y
        raise KeyError("the disk is gone")

    for validation, error in (
        ((torch.rand(4, 5, 8, 8), y[:4]), RuntimeError),
        (breaking(), KeyError),
        ((x, y[:5]), SurgeryError),
        ((None, y), SurgeryError),
        ((x, torch.zeros(8, dtype=torch.int64)), SurgeryError),  # the labels' other classes are not in it
    ):
        with pytest.raises(error), gm.surgery.batch(labels=y, validation=validation):
            pass
        assert gm.surgery.context.labels is None and site(gm).reading is None
        assert all(torch.equal(a, b) for a, b in zip(before.values(), site(gm).state().values(), strict=True))
        assert [module.training for module in gm.modules()] == modes


def test_words_of_a_model() -> None:
    gm = operated(Net()).train()
    x, y = images(8)
    where = r"nsdropout at head#0:classifier.input: "
    with pytest.raises(
        SurgeryError, match=where + r".* in training, got none; .*`with gm.surgery.batch\(labels=labels, val"
    ):
        gm(x)
    with pytest.raises(SurgeryError, match=r"batch: expected labels=…, .*, or both, got neither"), gm.surgery.batch():
        pass
    said = where + "expected a label for each of 8 samples of the batch, got 7"
    with pytest.raises(SurgeryError, match=said), gm.surgery.batch(labels=y[:7]):
        gm(x)
    plain = operated(Net(), [TWO[1]])
    said = "no regularizer of this model goes by labels"
    with pytest.warns(SurgeryWarning, match=said), plain.surgery.batch(labels=y, validation=(x, y)):
        plain(x)
    with gm.surgery.batch(labels=y, validation=(x, y)):
        y += 1  # a copy was taken
        gm(x)
        assert gm.surgery.context.labels.max() < 4
    assert gm.eval()(x).shape == (8, 4)  # without any


def test_steps_by_label_do_not_compile_anew() -> None:
    torch.manual_seed(0)
    eager, compiled = (operated(Net()) for _ in range(2))
    compiled.load_state_dict(eager.state_dict())
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(compiled, backend=counter, fullgraph=True)
    frames = []
    for step in range(7):
        x, y = images(12, seed=step)
        y = y.roll(step)
        outs = []
        for gm, call in ((eager, eager), (compiled, run)):
            validation = images(16, seed=99 + step) if step in (2, 5) else None
            with gm.surgery.batch(labels=y, validation=validation):
                out = call(x)
                out.sum().backward()
            outs.append(out)
        assert torch.allclose(*outs, atol=1e-5) or step < 2  # ordinary dropout draws by itself
        assert torch.equal(site(eager).masks, site(compiled).masks)
        frames.append(counter.frame_count)
    assert frames == [1, 1, 2, 2, 2, 2, 2]


def test_a_model_that_is_compiled_in_place_takes_a_validation() -> None:
    """Which runs as it is: nothing is compiled for it, and no graph has to be whole."""
    torch.manual_seed(0)
    gm, x, y = operated(Net()).train(), *images(8)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    gm.compile(backend=counter, fullgraph=True)
    for _ in range(3):
        with gm.surgery.batch(labels=y, validation=(x, y)):
            gm(x).sum().backward()
    assert counter.frame_count == 1 and site(gm).masked.all()


def test_a_validation_that_is_forgotten_is_asked_for_once() -> None:
    layer = NSDropout()
    for _ in range(PATIENCE - 1):
        layer.after_step()
    with pytest.warns(SurgeryWarning, match="1000 steps, and no validation was given"):
        layer.after_step()
    silent = known(*drawn(8, 2, 10))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for each in (layer, silent, NSDropout(0.0)):
            for _ in range(PATIENCE + 1):
                each.after_step()


def test_labels_of_checkpointed_forwards_are_their_own() -> None:
    """Two batches, both forwards before both backwards, repeated within the second `with`."""
    x, y = zip(*(images(8, seed=each) for each in range(2)), strict=True)
    y = (y[0], (y[1] + 1) % 4)
    validation = images(16, seed=9)

    def run(how: Callable[..., Tensor]) -> list[Tensor]:
        torch.manual_seed(0)
        gm = operated(Net()).train()
        body = nn.Sequential(gm.conv, gm.norm.eval(), gm.act)
        tail = site(gm)
        losses = []
        for each, labels in zip(x, y, strict=True):
            with gm.surgery.batch(labels=labels, validation=None if losses else validation):
                hidden = gm.relu(gm.hidden(body(each).mean((2, 3))))
                losses.append(gm.head.__class__.forward(gm.head, how(tail, hidden)).square().sum())
                if len(losses) == 2:
                    sum(losses).backward()
        return [gm.hidden.weight.grad, gm.conv.weight.grad]

    expected = run(lambda layer, hidden: layer(hidden))
    for reentrant in (False, True):
        got = run(lambda layer, hidden, reentrant=reentrant: checkpoint(layer, hidden, use_reentrant=reentrant))
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(expected, got, strict=True))
    forgetting = run(
        lambda layer, hidden: checkpoint(layer, hidden, use_reentrant=False, preserve_rng_state=False)
    )  # the control: then nothing tells which forward is repeated, and the first has the second's labels
    assert not all(torch.allclose(a, b, atol=1e-6) for a, b in zip(expected, forgetting, strict=True))


def test_in_eval_forced_it_is_ordinary_dropout_without_labels() -> None:
    torch.manual_seed(0)
    gm = operated(Net()).eval()
    x, y = images(8)
    with gm.surgery.batch(validation=(x, y)), gm.surgery.active(p=0.5):
        assert not torch.equal(gm(x), gm(x))
    assert torch.equal(gm(x), gm(x))


def test_tools_tell_of_it() -> None:
    net, leaking = Net(), {"eval_rule": "last_mask_true_label", "i_know_this_leaks_labels": True}
    gm = operated(net, **leaking)
    (row,) = gm.surgery.audit()
    assert row.expected == 0.2 and row.measured != row.measured and "LEAKS LABELS" in row.note
    assert "TRUE LABEL, which leaks it" in diff(gm) and "TRUE LABEL" in str(gm.surgery.plan)
    with pytest.warns(SurgeryWarning, match="TRUE LABEL"):
        strip(gm)
    with pytest.raises(PlanError, match="expected `i_know_this_leaks_labels: true`"):
        operated(net, eval_rule="last_mask_true_label")
    x, y = images(8)
    with pytest.raises(SurgeryError, match="expected the labels of the batch in eval"):
        gm.eval()(x)
    with (
        pytest.warns(SurgeryWarning, match="No accuracy, loss or other score"),
        gm.surgery.batch(labels=y, validation=(x, y)),
    ):
        gm(x)
    honest = operated(net)
    (row,) = honest.surgery.audit()
    assert "LEAKS" not in row.note and "labels" in row.note


def test_no_certificate_of_a_leak() -> None:
    from dropsurgery.analysis.certify import certify

    recipe = {"version": 1, "name": "r", "entries": [ENTRY]}
    assert certify("resnet10t", load_recipe(recipe)).misfit == ""
    leak = {"p": 0.2, "eval_rule": "last_mask_true_label", "i_know_this_leaks_labels": True}
    recipe["entries"] = [ENTRY | {"with": leak}]
    assert "labels that it is tested on" in certify("resnet10t", load_recipe(recipe)).misfit


# ---- what it knows is kept ----


def trained(gm: Any, steps: range, optimizer: torch.optim.Optimizer) -> None:
    for step in steps:
        x, y = images(12, seed=step)
        with gm.surgery.batch(labels=y, validation=images(16, seed=50 + step) if step % 3 == 1 else None):
            optimizer.zero_grad()
            F.cross_entropy(gm.train()(x), y).backward()
            optimizer.step()


def test_state_stays_out_of_the_models_keys_and_is_saved(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Net()
    gm = operated(net)
    trained(gm, range(4), torch.optim.SGD(gm.parameters(), 0.1))
    assert list(gm.state_dict()) == list(net.state_dict()) and site(gm).masked.all()
    state = gm.surgery.state_dict()
    torch.save(state, tmp_path / "s.pt")
    kept = {name: value.clone() for name, value in site(gm).state().items()}
    trained(gm, range(4, 8), torch.optim.SGD(gm.parameters(), 0.1))
    assert not torch.equal(kept["masks"], site(gm).masks)
    (saved,) = state["regularizers"].values()
    assert all(torch.equal(saved[name], value) for name, value in kept.items())  # what was taken stays as it was
    other = operated(Net())
    other.surgery.load_state_dict(torch.load(tmp_path / "s.pt", weights_only=True))
    assert all(torch.equal(site(other).state()[name], value) for name, value in kept.items())
    other.surgery.load_state_dict(operated(Net()).surgery.state_dict())  # of before a validation
    assert site(other).means is None and site(other).classes == 0


def test_a_wrong_state_changes_nothing() -> None:
    layer = known(*drawn(40, 4, 20))
    before = layer.state()
    for wrong in (
        {},
        {"means": before["means"]},
        before | {"masks": before["masks"][:2]},
        before | {"other": before["seen"]},
    ):
        with pytest.raises(SurgeryError, match=r"state.*: expected"):
            layer.load_state(wrong)
        assert all(torch.equal(a, b) for a, b in zip(before.values(), layer.state().values(), strict=True))


@pytest.mark.parametrize(
    "change",
    [
        copy.deepcopy,
        lambda gm: pickle.loads(pickle.dumps(gm)),
        lambda gm: gm.half().float(),
        lambda gm: gm.double().float(),
        lambda gm: gm.to("cpu", torch.bfloat16).float(),
    ],
)
def test_state_survives_copies_and_dtypes(change: Callable[[Any], Any]) -> None:
    torch.manual_seed(0)
    gm = operated(Net())
    trained(gm, range(4), torch.optim.SGD(gm.parameters(), 0.1))
    before = site(gm).state()
    twin = change(gm)
    assert all(torch.equal(value, before[name]) for name, value in site(twin).state().items())
    assert site(twin).means.dtype == torch.float32
    trained(twin, range(4, 6), torch.optim.SGD(twin.parameters(), 0.1))
    if twin is not gm:
        assert all(torch.equal(value, before[name]) for name, value in site(gm).state().items())


def test_state_survives_the_meta_device() -> None:
    torch.manual_seed(0)
    gm = operated(Net())
    trained(gm, range(4), torch.optim.SGD(gm.parameters(), 0.1))
    weights, before = copy.deepcopy(gm.state_dict()), site(gm).state()
    x, y = images(8)
    with gm.surgery.batch(labels=y):
        expected = gm(x)
    gm.to("meta")
    with gm.surgery.batch(labels=y):
        assert gm(x.to("meta")).is_meta
    said = "validation: expected a model with weights"
    with pytest.raises(SurgeryError, match=said), gm.surgery.batch(validation=(x, y)):
        pass
    gm.to_empty(device="cpu").load_state_dict(weights)
    assert all(torch.equal(value, before[name]) for name, value in site(gm).state().items() if name != "masks")
    gm.norm.load_state_dict({name.removeprefix("norm."): value for name, value in weights.items() if "norm" in name})
    with gm.surgery.batch(labels=y):
        assert torch.equal(gm(x), expected)


KILLED = """
import os, signal, sys, torch
sys.path.insert(0, sys.argv[1])
from tests.regularizers.test_nsdropout import Net, operated, trained
torch.set_num_threads(1)
torch.manual_seed(0)
gm = operated(Net(), seed=3)
optimizer = torch.optim.Adam(gm.parameters(), 0.01)
trained(gm, range(3), optimizer)
states = {"model": gm.state_dict(), "optimizer": optimizer.state_dict(), "surgery": gm.surgery.state_dict()}
torch.save(states, sys.argv[2])
trained(gm, range(3, 4), optimizer)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_training_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """Without the surgery's state it does not (the control)."""
    file, root = tmp_path / "killed.pt", Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(root), str(file)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == -signal.SIGKILL, done.stderr

    def end(resumed: bool, whole: bool = True) -> list[Tensor]:
        torch.manual_seed(0)
        gm = operated(Net(), seed=3)
        optimizer = torch.optim.Adam(gm.parameters(), 0.01)
        if resumed:
            states = torch.load(file, weights_only=True)
            gm.load_state_dict(states["model"])
            optimizer.load_state_dict(states["optimizer"])
            if whole:
                gm.surgery.load_state_dict(states["surgery"])
        trained(gm, range(3 if resumed else 0, 6), optimizer)
        return [*gm.state_dict().values(), site(gm).means, site(gm).masks]

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        expected = end(False)
        assert all(torch.equal(a, b) for a, b in zip(expected, end(True), strict=True))
        assert not all(torch.equal(a, b) for a, b in zip(expected, end(True, whole=False), strict=True))
    finally:
        torch.set_num_threads(threads)


# ---- its recipes on real nets ----


def test_recipe_trains_a_real_net() -> None:
    import timm  # not needed by the training that is killed, which imports this file

    torch.manual_seed(0)
    net = timm.create_model("resnet18", num_classes=4)
    gm: Any = apply_recipe(net, "nsdropout_classifier", example_inputs=torch.rand(2, 3, 64, 64))
    (layer,) = gm.surgery.regularizers.values()
    x, y = torch.rand(4, 3, 64, 64), torch.tensor([0, 1, 0, 3])
    found: list[Tensor] = []
    layer.register_forward_hook(lambda module, args, out: found.append(out))
    with gm.surgery.batch(labels=y, validation=(torch.rand(4, 3, 64, 64), torch.arange(4))):
        assert layer.means.shape == (4, 512)
        found.clear()
        gm.train()(x).sum().backward()
    dropped = ~layer.masks[y]
    assert (dropped.sum(1) == round(0.2 * 512)).all() and torch.equal(dropped[0], dropped[2])
    assert not found[0][dropped].any() and layer.masked.tolist() == [True, True, False, True]
    assert all(each.grad is not None for each in gm.parameters())


def test_label_masks_needs_no_layer() -> None:
    """The mask from given numbers, as tests and users may compute it."""
    x, y = drawn(12, 3, 10)
    means = means_of(*drawn(30, 3, 10, seed=1), 3)
    kept = label_masks(x, y, means, torch.tensor(0.3))
    masks = reference(x.numpy(), y.numpy(), *(each.numpy() for each in drawn(30, 3, 10, seed=1)), 0.3)
    assert np.array_equal(kept.numpy(), np.stack([masks[label] for label in y.tolist()]))
