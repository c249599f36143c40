"""NSDropout: drop, by the label, the units furthest from their validation mean (Shunk 2022, arXiv:2201.06938).

    d_c = mean(x | y = c) - mean(x_val | y_val = c)          for each class c; x (B, D), d_c (D,)
    M_c = 0 at the round(p * D) largest d_c, 1 elsewhere
    x → x * M_y / (1 - p)                                    in training; each sample has the mask of its own label

The first mean is that of the training batch, the second that of a validation; `gm.surgery.batch` brings labels and
validation in, as the graph carries neither:

    for epoch in range(epochs):
        with gm.surgery.batch(validation=(x_val, y_val)):    # one forward in eval mode; or a loader of such pairs
            for x, y in loader:
                with gm.surgery.batch(labels=y):
                    loss = criterion(gm(x), y)
                    ...                                      # backward too, where activations are checkpointed

Means are kept until the next validation. Before the first one it is ordinary dropout: each unit by itself, with
probability p. After it nothing is random. round takes halves to the even number; of equal distances the unit of lower
index goes first. No gradient flows through means and masks, only through x * M_y / (1 - p).

The text calls for the units "furthest" from the mean, which is `distance: abs`; the author's code
(JoshuaShunk/NSDropout), which is followed by default, takes the largest signed differences. In that code the backward
pass leaves 1 / (1 - p) out, here it does not.

What happens at test time is where this departs from the author's code, for a reason:

    eval_rule: identity               x, the default
    eval_rule: mean                   x * (mean over classes of their last masks) / (1 - p)
    eval_rule: intersection           x where the last masks of all classes keep it, 0 elsewhere
    eval_rule: last_mask_true_label   x * M_y with y the TRUE LABEL of each test sample: the author's procedure

The last one leaks the labels: a net trained so reads the class off the pattern of zeros. `examples/nsdropout_leak.py`
trains on Gaussian noise with labels drawn at random, where no classifier of the inputs can beat chance, and prints as
accuracy on other such noise (mean of the seeds, lowest to highest; one thread of a CPU):

    masks in eval                         5 classes, D = 64, 5 seeds    10 classes, D = 128, 3 seeds
    of the true labels                    0.728 (0.594 to 0.826)        0.883 (0.882 to 0.884)
    none                                  0.209 (0.170 to 0.222)        0.097 (0.092 to 0.101)
    of shuffled labels                    0.198 (0.186 to 0.216)        0.098 (0.090 to 0.104)
    of shuffled labels, as these labels   0.716 (0.590 to 0.774)        0.877 (0.871 to 0.880)

The author's published error rates come from that procedure and are no error rates of a classifier that is given images
alone. So it asks for `i_know_this_leaks_labels: true`, for labels in eval too, warns at each forward, and nothing that
is measured with it is a score. `mean` and `intersection` need no labels; that they do any good nobody has shown.
With `gm.surgery.active()` in eval it is ordinary dropout, without labels.

The library's choices: a class of a training batch that the validation has not is an error; what the validation has
beyond the batch needs no mask. The number of classes is that of the first validation. Within a batch spread over
processes, each goes by the means of its own part. On CUDA sums over a batch are added up in no fixed order, as
everywhere in torch, unless `torch.use_deterministic_algorithms(True)` asks for it.

Placement: the author's nets have it behind the first hidden ReLU (recipe nsdropout_vgg), on (B, D); recipe
nsdropout_classifier has it on the pooled features that a classifier reads. A map of one position is taken as (B, D),
other maps and tokens are refused: there a mask for each class and element would be as large as K samples.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from dropsurgery.errors import SurgeryError, SurgeryWarning
from dropsurgery.regularizers._base import Keys, Rate, Regularizer, check_state, rate_tensor, require
from dropsurgery.regularizers._labels import ClassSums, check_labels, pairs
from dropsurgery.regularizers._taxonomy import Taxonomy
from dropsurgery.regularizers._tracing import is_traced, is_transformed
from dropsurgery.regularizers._uniform import scale_of, uniform

Distance = Literal["signed", "abs"]
EvalRule = Literal["identity", "intersection", "mean", "last_mask_true_label"]
LEAK: EvalRule = "last_mask_true_label"
_IN_WORDS: dict[str, str] = {
    "identity": "identity",
    "intersection": "times 1 where the last masks of all classes are 1, else 0",
    "mean": "times the mean over the classes of their last masks, over 1 - p",
    LEAK: "times the last mask of each sample's TRUE LABEL, which leaks it: no score of this model says anything",
}
_STATE = ("means", "seen", "masks", "masked")
PATIENCE = 1000  # steps
_HALF = 4e-7  # a share of the units that ends on a half does so, though float32 says a little more or less


class Told(Keys, Protocol):
    """Where labels come from within a model (`dropsurgery.context.Context`)."""

    labels: Tensor | None

    def labels_of_forward(self) -> Tensor | None:
        """Return the labels of this forward's batch, if they were told."""


def nsdropout(
    x: Tensor,
    p: float | Tensor,
    labels: Tensor | None = None,
    validation_means: Tensor | None = None,
    distance: Distance = "signed",
    *,
    key: Tensor | None = None,
) -> Tensor:
    """Drop of each sample of `x` the units whose mean over its class is furthest above that of the validation.

    Args:
        x: (B, ...); each of the D elements of a sample is a unit.
        p: share of the units that is dropped, in [0, 1].
        labels: the class of each sample, integers (B,); may be None before there is a validation.
        validation_means: (K, D), the mean of each class's units; None for ordinary dropout, which is the first step.
        distance: "signed" or "abs", by which units are compared.
        key: what ordinary dropout depends on, a 0-dim int64 CPU tensor; None for torch's global generator.

    Raises:
        SurgeryError: an argument is out of range, or does not fit `x`.
    """
    rate = rate_tensor(p, x.device)
    _check_distance(distance)
    if validation_means is None:
        return _times(x, uniform(x.shape, x.device, key) >= rate, rate)
    if labels is None:
        raise SurgeryError("nsdropout: expected the label of each sample where there are validation means, got none")
    readable = labels.is_cpu and not is_traced(labels)  # its values may be looked at, and need not be waited for
    check_labels(labels, "nsdropout: labels", readable)
    _check_labels_of(x, labels, "nsdropout")
    _check_units(x, validation_means, "nsdropout")
    classes = len(validation_means)
    if readable and len(labels):
        require(int(labels.max()) < classes, "nsdropout: labels", f"classes below {classes}", int(labels.max()))
    return _times(x, label_masks(x, labels, validation_means, rate, distance).view(x.shape), rate)


def label_masks(
    x: Tensor, labels: Tensor, validation_means: Tensor, p: Tensor, distance: Distance = "signed"
) -> Tensor:
    """Return which units of each sample are kept, (B, D): those of the mask of its label."""
    with torch.no_grad():
        units = x.detach().flatten(1).to(torch.promote_types(x.dtype, torch.float32))
        labels, samples, classes = labels.long(), len(labels), len(validation_means)
        # A row for each class, or where there are more classes than samples, for the first sample of each.
        by_class = classes <= samples or not samples
        index, rows = (labels, classes) if by_class else (_first_alike(labels), samples)
        sums = units.new_zeros(rows, units.shape[1]).index_add(0, index, units)
        counts = units.new_zeros(rows).index_add(0, index, units.new_ones(samples))
        there = validation_means if by_class else validation_means[labels]
        differences = sums / counts.clamp(min=1)[:, None] - there
        return furthest(differences if distance == "signed" else differences.abs(), p).logical_not()[index]


def furthest(distances: Tensor, p: Tensor) -> Tensor:
    """Return (K, D) whether a number of `distances` (K, D) is among the round(p * D) largest of its row.

    Of equals the first are. `p` is a 0-dim tensor.
    """
    units = distances.shape[1]
    count = _count(p, units)
    if distances.is_cpu and not is_traced(distances):
        # A tenth of the time of a sort.
        level = distances.kthvalue(units + 1 - max(1, int(count)), 1, keepdim=True).values
        above, equal = distances > level, distances == level
        return above | (equal & (equal.cumsum(1, dtype=torch.int32) <= count - above.sum(1, keepdim=True)))
    order = distances.argsort(dim=1, descending=True, stable=True)
    first = torch.arange(units, device=order.device) < count
    return torch.zeros_like(order, dtype=torch.bool).scatter(1, order, first.expand_as(order))


class NSDropout(Regularizer):
    """`nsdropout` as a layer; identity in eval, unless `eval_rule` says otherwise.

    Alone it is told labels and validation by its own `batch`, as a model is by `gm.surgery.batch`.

    Attributes:
        means: (K, D), those of the last validation; None before the first.
        seen: (K,) on the CPU, which classes that validation had.
        masks: (K, D), which units the last mask of each class kept; `masked` (K,) whether it has had one.
        labels: of the batch, where it is used alone; `batch` sets them.
        reading: what a validation's features are added to, while its forward runs.
    """

    paper = "Shunk: Neuron-Specific Dropout, 2022, arXiv:2201.06938"
    summary = "drops, by the label, the units furthest from their mean over a validation"
    placement = "behind the first hidden ReLU: recipe nsdropout_vgg; before the classifier: nsdropout_classifier"
    shapes = "(B, D), maps of one position"
    needs = "the labels of each training batch and a validation: `with gm.surgery.batch(labels=…, validation=(x, y))`"
    taxonomy = Taxonomy(
        transforms=("data", "architecture"),
        space="hidden",
        randomness="deterministic",
        dependence=("label", "dataset"),
    )
    examples = (
        {"p": 0.2},
        {"p": 0.5, "distance": "abs"},
        {"p": 0.2, "eval_rule": "mean"},
        {"p": 0.2, "eval_rule": "intersection"},
    )
    uncounted = "which units go hangs on labels and a validation: round(p * D) of each sample"
    random = False  # but for the steps before the first validation
    needs_labels = True

    p: Tensor
    context: Told | None = None
    masks: Tensor
    masked: Tensor

    def __init__(
        self,
        p: Rate = 0.2,
        distance: Distance = "signed",
        eval_rule: EvalRule = "identity",
        i_know_this_leaks_labels: bool = False,
    ) -> None:
        super().__init__(p=p)
        _check_distance(distance)
        require(eval_rule in _IN_WORDS, "eval_rule", f"one of {', '.join(map(repr, _IN_WORDS))}", eval_rule)
        _check_leak(eval_rule, i_know_this_leaks_labels)
        self.distance: Distance = distance
        self.policy: EvalRule = eval_rule
        self.eval_rule = _IN_WORDS[eval_rule]
        self.leaks_labels = eval_rule == LEAK
        if self.leaks_labels:
            self.uncounted = f"{type(self).uncounted}; its eval rule LEAKS LABELS: no score of this model says anything"
        self.labels: Tensor | None = None
        self.reading: ClassSums | None = None
        self.means: Tensor | None = None
        self._waited = 0
        self._forget()

    @staticmethod
    def example_inputs(batch: int) -> tuple[Tensor, ...]:
        """Return a batch for tests."""
        return (torch.randn(batch, 12),)

    @property
    def where(self) -> str:
        """What it is called in errors."""
        return f"nsdropout at {self.site_id}" if self.site_id else "nsdropout"

    @property
    def classes(self) -> int:
        """How many there are; 0 before the first validation."""
        return 0 if self.means is None else len(self.means)

    def build(self, *, channel_axis: int | None, channels: int | None, shape: tuple[int, ...], site_id: str) -> None:
        """Take the facts; a SurgeryError unless there is one vector a sample, of which p drops some unit."""
        units = math.prod(shape[1:])
        if len(shape) < 2 or units != max(shape[1:]):
            raise SurgeryError(
                f"nsdropout at {site_id}: expected one vector for each sample, (B, D) or a map of one position, got a "
                f"tensor of shape {shape}; use it on pooled features, or dropout there"
            )
        if self._rates["p"] and not _counted(self._rates["p"], units):
            raise SurgeryError(
                f"nsdropout at {site_id}: expected a p that drops a unit, above {0.5 / units:.3g}, got "
                f"{self._rates['p']:g} of {units} units, which rounds to none; give a larger p"
            )
        super().build(channel_axis=channel_axis, channels=channels, shape=shape, site_id=site_id)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` with units dropped by its labels; `x` itself when not active, but for `eval_rule`."""
        if self.reading is not None:
            return self._read(x)
        if self.active:
            return self._trained(x) if self.training else nsdropout(x, self.p, key=self.next_key())
        if self.training or not self._nonzero or self.policy == "identity":
            return x
        return self._at_rest(x)

    @contextmanager
    def batch(self, *, labels: Tensor | None = None, validation: Any = None) -> Iterator[None]:
        """Tell a layer that is used alone the labels of its batch, and the features and labels of a validation.

        The arguments, and what is refused, are those of `gm.surgery.batch`; what a model takes are features here.
        """
        require(labels is not None or validation is not None, "batch", "labels, a validation, or both", None)
        outer = self.labels
        told = outer if labels is None else check_labels(labels, "batch: labels")
        found = None if validation is None else self._found(validation)
        if told is not None:
            self.require_known(told, None if found is None else found[1])
        if found is not None:
            self.remember(*found)
        self.labels = outer if labels is None else labels.clone()
        try:
            yield
        finally:
            self.labels = outer

    def require_known(self, labels: Tensor, seen: Tensor | None = None) -> None:
        """A SurgeryError where `labels` have a class that the validation (by default the last one) has not."""
        seen = self.seen if seen is None and self.means is not None else seen
        if seen is None or not len(labels) or labels.is_meta:
            return
        host = labels.to("cpu", torch.int64)
        if (largest := int(host.max())) >= len(seen):
            raise SurgeryError(
                f"{self.where}: expected labels below {len(seen)}, the number of classes of the validation, "
                f"got {largest}; give a validation with samples of every class"
            )
        absent = sorted(set(host[~seen[host]].tolist()))
        if absent:
            raise SurgeryError(
                f"{self.where}: expected classes that the validation has samples of, got labels of class "
                f"{', '.join(map(str, absent[:5]))}, of which it has none; give a validation with samples of every "
                "class"
            )

    @torch.inference_mode(False)  # wherever it is called: what is kept is written to in training
    def remember(self, means: Tensor, seen: Tensor) -> None:
        """Take the means of a validation, (K, D), and which classes it had, (K,) on the CPU."""
        self.means, self.seen = means.clone(), seen.clone()
        if self.masks.shape != means.shape:
            self.masks = torch.ones(means.shape, dtype=torch.bool, device=means.device)
            self.masked = torch.zeros(len(means), dtype=torch.bool, device=means.device)

    def after_step(self) -> None:
        """Count the steps without a validation, and say once where there are so many that it seems forgotten."""
        if self.means is not None or not self._nonzero:
            return
        self._waited += 1
        if self._waited == PATIENCE:
            warnings.warn(
                f"{self.where}: {PATIENCE} steps, and no validation was given, so that it still is ordinary dropout; "
                "give one by `with gm.surgery.batch(validation=(x_val, y_val)):`",
                SurgeryWarning,
                stacklevel=2,
            )

    def expected_drop(self, shape: tuple[int, ...]) -> float:
        """Return the share of the units: p, to a whole number of them."""
        units = math.prod(shape[1:])
        return _counted(self._rates["p"], units) / units

    def state(self) -> dict[str, Tensor]:
        """Return the means of the validation and the last masks; of no length before there are any."""
        means = torch.zeros(0, 0, device="cpu") if self.means is None else self.means
        known = (means, self.seen, self.masks, self.masked)
        return {name: value.detach().clone() for name, value in zip(_STATE, known, strict=True)}

    @torch.inference_mode(False)
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` returned."""
        means: Any = state.get("means") if isinstance(state, Mapping) else None
        is_table = isinstance(means, Tensor) and means.dim() == 2 and means.is_floating_point()
        like = means if is_table else torch.zeros(0, 0, device="cpu")
        seen = torch.zeros(len(like), dtype=torch.bool, device="cpu")
        masks = torch.zeros(like.shape, dtype=torch.bool, device="cpu")
        check_state(state, dict(zip(_STATE, (like, seen, masks, seen), strict=True)))
        self._forget()
        if len(means):
            device = torch.device("cpu") if self.p.is_meta else self.p.device
            self.means, self.seen = means.to(device, copy=True), state["seen"].to("cpu", torch.bool, copy=True)
            self.masks, self.masked = (state[name].to(device, torch.bool, copy=True) for name in ("masks", "masked"))

    def extra_repr(self) -> str:
        """Return the rate, the distance, and the eval rule if it is not the identity."""
        rule = "" if self.policy == "identity" else f", eval_rule={self.policy!r}"
        return f"{super().extra_repr()}, distance={self.distance!r}{rule}"

    # -- forward, case by case --------------------------------------------------------------------------------------
    @_disable_dynamo
    def _read(self, x: Tensor) -> Tensor:
        """Add the features of a validation to what is known of it; they pass as they are."""
        assert self.reading is not None and self.reading.labels is not None
        self.reading.add(x.flatten(1), self.reading.labels)
        return x

    def _trained(self, x: Tensor) -> Tensor:
        labels = self._labels(x)
        if self.means is None:
            return nsdropout(x, self.p, key=self.next_key())
        self._settle(x)
        _check_units(x, self.means, self.where)
        kept = label_masks(x, labels, self.means.to(x.device), self.p, self.distance)
        if not (is_transformed() or x.is_meta):  # a transform of torch.func lets nothing out
            self.masks[labels] = kept
            self.masked[labels] = True
        return _times(x, kept.view(x.shape), self.p)

    def _at_rest(self, x: Tensor) -> Tensor:
        """What `eval_rule` makes of `x` in eval."""
        labels = self._labels(x) if self.leaks_labels else None
        if self.means is None:
            return x
        self._settle(x)
        _check_units(x, self.masks, self.where)
        masks, masked = self.masks.to(x.device), self.masked.to(x.device)
        if labels is not None:
            _warn_of_leak(self.where)
            return x * masks[labels].view(x.shape)
        if self.policy == "intersection":
            factor = masks.logical_or(masked.logical_not()[:, None]).all(0).to(x.dtype)
        else:
            mean = (masks * masked[:, None]).sum(0) / masked.sum().clamp(min=1)
            factor = torch.where(masked.any(), mean * scale_of(self.p), 1.0).to(x.dtype)
        return x * factor.view(x.shape[1:])

    def _labels(self, x: Tensor) -> Tensor:
        """The labels of the batch that `x` belongs to."""
        labels = self.labels
        if labels is None and self.context is not None:
            labels = self.context.labels if is_traced(x) else self.context.labels_of_forward()
        if labels is None:
            told, mode = (
                ("gm.surgery" if self.context is not None else "layer"),
                "training" if self.training else "eval",
            )
            raise SurgeryError(
                f"{self.where}: expected the labels of the batch in {mode}, got none; run forward, and backward where "
                f"activations are checkpointed, within `with {told}.batch(labels=labels):`, and give a validation once "
                f"an epoch, `with {told}.batch(labels=labels, validation=(x_val, y_val)):`"
            )
        _check_labels_of(x, labels, self.where)
        return labels.to(x.device, torch.int64)

    # -- what it knows ------------------------------------------------------------------------------------------------
    def _found(self, validation: Any) -> tuple[Tensor, Tensor]:
        sums = ClassSums(self.where, self.classes)
        for features, labels in pairs(validation):
            require(isinstance(features, Tensor), "validation", "features and labels", type(features).__name__)
            sums.add(features.flatten(1), labels)
        return sums.means()

    def _forget(self) -> None:
        cpu = torch.device("cpu")
        self.means = None
        self.seen = torch.zeros(0, dtype=torch.bool, device=cpu)
        self.masks = torch.zeros(0, 0, dtype=torch.bool, device=cpu)
        self.masked = torch.zeros(0, dtype=torch.bool, device=cpu)

    def _settle(self, x: Tensor) -> None:
        """Have means and masks where `x` is; not on the meta device, which would lose them."""
        assert self.means is not None
        if self.means.device != x.device and not x.is_meta:
            self._move(x.device)

    def _move(self, device: torch.device) -> None:
        if self.means is not None:
            self.means = self.means.to(device)
            self.masks, self.masked = self.masks.to(device), self.masked.to(device)

    def _apply(self, fn: Any, recurse: bool = True) -> Regularizer:
        # Means and masks are no buffers: they follow to a device, keep their dtype, and survive the meta device.
        super()._apply(fn, recurse)
        if not self.p.is_meta:
            self._move(self.p.device)
        return self


def _check_distance(distance: Distance) -> None:
    require(distance in ("signed", "abs"), "distance", "'signed' or 'abs'", distance)


def _check_leak(eval_rule: EvalRule, known: bool) -> None:
    require(isinstance(known, bool), "i_know_this_leaks_labels", "true or false", known)
    if eval_rule == LEAK and not known:
        raise SurgeryError(
            f"eval_rule: expected `i_know_this_leaks_labels: true` beside {LEAK!r}, got none: it picks masks by the "
            "true labels of the test samples, which the model then reads off them, so that no score of it says "
            "anything; 'identity', 'mean' and 'intersection' need no labels"
        )


def _check_labels_of(x: Tensor, labels: Tensor, where: str) -> None:
    if len(labels) != len(x):
        raise SurgeryError(f"{where}: expected a label for each of {len(x)} samples of the batch, got {len(labels)}")


def _check_units(x: Tensor, known: Tensor, where: str) -> None:
    """A SurgeryError unless what is `known` of each class has a number for each unit of a sample."""
    if x.dim() < 2 or known.dim() != 2 or known.shape[1] != math.prod(x.shape[1:]):
        raise SurgeryError(
            f"{where}: expected samples of as many units as those of the validation, got {tuple(x.shape)}, and "
            f"{tuple(known.shape)} for means by class"
        )


def _times(x: Tensor, kept: Tensor, p: Tensor) -> Tensor:
    """`x` over 1 - p where it is kept, 0 elsewhere; for backward a byte an element is held."""
    scale = torch.where(p < 1, (1 - p).reciprocal(), 1.0)  # at p = 1 nothing is kept
    return x * kept * scale.to(x.dtype)


def _count(p: Tensor, units: int) -> Tensor:
    """round(p * D), halves to the even number."""
    twice = 2 * p * units
    whole = twice.round()
    return torch.where((twice - whole).abs() <= _HALF * whole, whole, twice).div(2).round()


def _counted(p: float, units: int) -> int:
    return round(Fraction(str(p)) * units)


def _first_alike(labels: Tensor) -> Tensor:
    """Of each sample the first one that has the same label."""
    return (labels[:, None] == labels).int().argmax(1)


@_disable_dynamo
def _warn_of_leak(where: str) -> None:
    # With a registry of its own, or Python would show it once and never again.
    message = (
        f"{where}: in eval each sample has the mask of its TRUE LABEL, from which the net can tell the label: on pure "
        "noise too it then finds most of them (examples/nsdropout_leak.py). No accuracy, loss or other score of these "
        "outputs says anything of the model; `eval_rule: identity` is the honest one"
    )
    warnings.warn_explicit(message, SurgeryWarning, __file__, 1, module=__name__, registry={})
