"""Clustering dropout: units that respond alike share a rate, and those that respond little are dropped more often.

    x (..., D) → x * m / (1 - pi)        m_d ~ Bernoulli(1 - pi_d), one draw a unit and row; in front of a linear layer

    r_d     what unit d responds with        the K-means groups of r have centres c_1 … c_K, and sizes n_1 … n_K
    t_k     (c_k - min c) / (max c - min c)  1/2 where all centres are one
    pi_k    p + s * (spread * (1/2 - t_k) - mean)      mean: of spread * (1/2 - t_k) over the units, weighted by n_k

Inspired by Wen, Ke, Xie, Shen: Clustering-Based Adaptive Dropout for CNN-Based Classification, ACPR 2019 (LNCS 12046,
2020, pages 46-58, doi 10.1007/978-3-030-41404-7_4). No code was published, and of the paper no more than abstract,
introduction and conclusion is openly to be read. They say: what is grouped by clustering are the features that a fully
connected layer reads, its weights, or the derivatives of either; a group shares one rate; the larger the response of a
group, the lower its rate; the rates are updated in the course of training by the groups' mean response; it was tried in
the fully connected layer of a ResNet-18.

All else is the library's choice, and not the paper's: the number of groups (`k`, 4), their algorithm (K-means on one
axis, begun at the quantiles (j + 1/2) / K, 20 steps of Lloyd's iteration), the line from response to rate and its
`spread` (0.4), the mean rate p (0.5), the interval of the updates (`interval`, 100 optimizer steps), the average over
batches (`ema`, 0.9) and the rescale by 1 / (1 - pi). `source` says what r is:

    feature       the average over batches of the mean |x_d|
    derivative    the same of the mean |dL/dx_d|, the gradient of what the layer reads, taken by a tensor's hook
    weight        the mean over the outputs of |W[:, d]|, as it is when the groups are made anew

A weight that is masked in whole columns, for each row by itself, is an input that is masked: so all three act on what
the layer reads, and the weights stay as they are. The mean of pi over the units is p at all times; s is 1, or as much
less as keeps every pi in [0, 0.95], for small p and large. Until the groups are made for the first time, after
`interval` steps, pi is p. At p = 1 all is dropped.

Responses are collected in training, of forwards that activation checkpointing repeats once, and over all forwards of
one optimizer step; not within transforms of functions (`torch.func`), and not while p is 0. What is not finite is left
out. In a distributed training they are added up over all processes of the default group after each optimizer step, so
that all have the same rates; all of them have to take the same steps.

Placement: the layer that makes the result, as in the paper's ResNet-18 (recipe clustering_dropout_classifier).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Le, Lt
from torch import Tensor, nn

from dropsurgery.errors import SurgeryError
from dropsurgery.regularizers._base import Rate, Regularizer, check_count, check_state, rate_tensor, require
from dropsurgery.regularizers._clusters import k_means, offsets_of, rates_of
from dropsurgery.regularizers._hosts import filled, require_host
from dropsurgery.regularizers._responses import add_response, handle_of, summed_over_processes, watch_gradient
from dropsurgery.regularizers._taxonomy import Taxonomy
from dropsurgery.regularizers._tracing import is_transformed
from dropsurgery.regularizers._uniform import scale_of, uniform

Source = Literal["feature", "weight", "derivative"]
_STATE = ("response", "seen", "labels", "centres")
_BUFFERS = (*_STATE, "offsets", "pi", "total", "rows")


def clustering_dropout(
    x: Tensor,
    response: Tensor,
    p: float | Tensor,
    k: int = 4,
    spread: float = 0.4,
    *,
    channel_axis: int = -1,
    key: Tensor | None = None,
) -> Tensor:
    """Drop the units of `x` with the rates of their groups, and divide the others by 1 - rate.

    Args:
        x: of any shape with D units on an axis.
        response: of each unit, (D,).
        p: the mean rate, in [0, 1].
        k: number of groups, 2 or more, and no more than D.
        spread: by how much the rate falls from the group of the least response to that of the largest, in [0, 1].
        channel_axis: where the units are.
        key: what the random numbers depend on, a 0-dim int64 CPU tensor; None for torch's global generator.

    Raises:
        SurgeryError: `response` does not fit `x`, or an argument is out of range.
    """
    _check_groups(k, spread)
    units = x.shape[channel_axis]
    require(response.shape == (units,), "response", f"one number for each of {units} units", tuple(response.shape))
    require(k <= units, "k", f"no more groups than the {units} units", k)
    with torch.no_grad():
        wide = response.to(torch.promote_types(response.dtype, torch.float32))
        rates = rates_of(offsets_of(*k_means(wide, k), spread), rate_tensor(p, x.device))
    return drop_units(x, rates, channel_axis=channel_axis, key=key)


def drop_units(x: Tensor, rates: Tensor, *, channel_axis: int = -1, key: Tensor | None = None) -> Tensor:
    """Drop each element of `x` with the rate (D,) of its unit, and divide the others by 1 - rate."""
    axis = channel_axis % x.dim()
    shaped = rates.view([-1 if each == axis else 1 for each in range(x.dim())])
    return x * keep_factor(uniform(x.shape, x.device, key), shaped).to(x.dtype)


def keep_factor(numbers: Tensor, rates: Tensor) -> Tensor:
    """Return what elements are multiplied by whose draws are `numbers`, in [0, 1): 0 below the rate, else its scale."""
    return torch.where(numbers >= rates, scale_of(rates), 0.0)


class ClusteringDropout(Regularizer):
    """Clustering dropout in front of a linear layer; in eval that layer's own forward.

    Attributes:
        response: (D,), what each unit responds with, averaged over batches; `seen` (0-dim): whether there is any.
        labels: (D,), the group of each unit; `centres`: (k,), the mean response of each group.
        pi: (D,), the rates at which the units are dropped.
        steps: the optimizer steps counted so far.
    """

    kind = "swap"
    paper = (
        "inspired by Wen et al.: Clustering-Based Adaptive Dropout for CNN-Based Classification, ACPR 2019, "
        "doi 10.1007/978-3-030-41404-7_4"
    )
    summary = (
        "drops what a linear layer reads, groups of small response more often; inspired by its paper, which leaves "
        "open the clustering, the number of groups, the map from response to rate, the interval and the averages"
    )
    placement = "in front of the classifier: recipe clustering_dropout_classifier"
    shapes = "what the layer takes, (..., D)"
    needs = "a linear layer whose weight is a plain parameter, with as many inputs as groups at least"
    examples = (
        {"p": 0.5},
        {"p": 0.3, "source": "weight", "k": 2, "spread": 0.6, "interval": 1},
        {"p": 0.5, "source": "derivative", "k": 3},
    )
    taxonomy = Taxonomy(transforms=("data", "architecture"), space="hidden", dependence=("dataset", "parameters"))
    drops = "other"
    uncounted = "inputs are dropped, and an output is the sum of many"

    p: Tensor
    response: Tensor
    seen: Tensor
    labels: Tensor
    centres: Tensor
    offsets: Tensor
    pi: Tensor
    total: Tensor
    rows: Tensor

    def __init__(
        self,
        p: Rate = 0.5,
        source: Source = "feature",
        k: Annotated[int, Ge(2)] = 4,
        spread: Annotated[float, Ge(0), Le(1)] = 0.4,
        interval: Annotated[int, Ge(1)] = 100,
        ema: Annotated[float, Ge(0), Lt(1)] = 0.9,
    ) -> None:
        super().__init__(p=p)
        known = source in ("feature", "weight", "derivative")
        require(known, "source", "'feature', 'weight' or 'derivative'", source)
        _check_groups(k, spread)
        check_count("interval", interval, 1)
        require(_is_number(ema) and 0 <= ema < 1, "ema", "a number in [0, 1)", ema)
        self.source = source
        self.k = k
        self.spread = spread
        self.interval = interval
        self.ema = ema
        self.steps = 0
        self._handle = handle_of(self)

    @staticmethod
    def example_host() -> nn.Module:
        """Return a small layer for tests."""
        return filled(nn.Linear(14, 5))

    def bind(self, host: nn.Module) -> None:
        """Stand in for a linear layer; a SurgeryError where it is none, hides its weight, or has too few inputs."""
        known = isinstance(host, nn.Linear) and host._parameters.get("weight") is not None
        expected = "a linear layer whose weight is a plain parameter (dropout takes others)"
        require_host(known, "clustering_dropout", self.site_id, expected, host)
        units: int = host.in_features  # type: ignore[assignment]
        if self.k > units:
            raise SurgeryError(
                f"clustering_dropout at {self.site_id or 'a layer'}: expected at least {self.k} features to make k = "
                f"{self.k} groups of, got a layer that reads {units}; ask for fewer groups (`k`)"
            )
        super().bind(host)
        if "pi" not in self._buffers or len(self.pi) != units:
            for name, value in self._fresh(units, self.weight_of_layer().device).items():
                self.register_buffer(name, value, persistent=False)

    def weight_of_layer(self) -> Tensor:
        """Return the weight (out, D) of the layer whose inputs are dropped."""
        weight: Tensor = self.bound().weight  # type: ignore[assignment]
        return weight

    def forward(self, input: Tensor) -> Tensor:
        """Return what the layer gives with inputs dropped; its own forward's result when not active."""
        if not self.active:
            own: Tensor = self.own(input)
            return own
        self.bound()
        looks_on = self.training and not is_transformed()
        if looks_on and self.source == "feature":
            add_response(input.detach(), self.total, self.rows)
        x = drop_units(input, self.pi, key=self.next_key())
        y: Tensor = self.own(x)
        if looks_on and self.source == "derivative":
            self._watch(x, y)
        return y

    def after_step(self) -> None:
        """Count an optimizer step, and take up what was collected for it; every `interval` steps, make the groups."""
        self.steps += 1
        with torch.no_grad():
            if self.source != "weight":
                self._take_up()
            if self.steps % self.interval == 0:
                self._regroup()

    def set_rate(self, name: str, value: float) -> None:
        """Set the mean rate, and the units' with it."""
        super().set_rate(name, value)
        self._set_pi()

    def expected_drop(self, shape: tuple[int, ...]) -> float:
        """Return p, the mean of the units' rates."""
        return self._rates["p"]

    def state(self) -> dict[str, Tensor]:
        """Return the responses, the groups, and the optimizer steps counted; nothing before it has a layer."""
        if "pi" not in self._buffers:
            return {}
        steps = torch.tensor(self.steps, device="cpu")
        return {name: self.get_buffer(name).detach().clone() for name in _STATE} | {"steps": steps}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` returned."""
        check_state(state, self.state())
        if not state:
            return
        labels, numbers = state["labels"], (state["response"], state["centres"])
        is_group = bool(((labels >= 0) & (labels < self.k)).all())
        require(is_group, "state: labels", f"groups in 0 … {self.k - 1}", f"{labels.min()} … {labels.max()}")
        finite = all(bool(each.isfinite().all()) for each in numbers)
        require(finite, "state: response and centres", "finite numbers", "others")
        require(int(state["steps"]) >= 0, "state: steps", "0 or more", int(state["steps"]))
        for name in _STATE:
            self.get_buffer(name).copy_(state[name])
        self.steps = int(state["steps"])
        self.total.zero_()
        self.rows.zero_()
        self._set_offsets()

    def extra_repr(self) -> str:
        """Return the mean rate, what the groups are made of, and when."""
        groups = f"source={self.source!r}, k={self.k}, spread={self.spread:g}"
        return f"{super().extra_repr()}, {groups}, interval={self.interval}, ema={self.ema:g}"

    def _watch(self, x: Tensor, y: Tensor) -> None:
        """Collect the gradient of `x`, what the layer reads, in backward; by that of `y` where `x` has none."""
        if x.requires_grad:
            watch_gradient(x, self._handle, of_output=False)
        elif y.requires_grad:
            watch_gradient(y, self._handle, of_output=True)

    def _take_up(self) -> None:
        """The batch's mean response into the average; where nothing was collected, the average stays."""
        total, rows = summed_over_processes(self.total, self.rows)
        mean = total / rows.clamp(min=1)
        average = torch.where(self.seen, torch.lerp(mean, self.response, self.ema), mean)
        self.response.copy_(torch.where(rows > 0, average, self.response))
        self.seen.logical_or_(rows > 0)
        self.total.zero_()
        self.rows.zero_()

    def _regroup(self) -> None:
        """Group the units anew by their responses; where those are not finite, the groups stay."""
        if self.source == "weight":
            weight = self.weight_of_layer().detach()
            wide = torch.promote_types(weight.dtype, torch.float32)
            self.response.copy_(weight.abs().mean(0, dtype=wide))
            self.seen.fill_(True)
        labels, centres = k_means(self.response, self.k)
        finite = self.response.isfinite().all()
        self.labels.copy_(torch.where(finite, labels, self.labels))
        self.centres.copy_(torch.where(finite, centres, self.centres))
        self._set_offsets()

    def _set_offsets(self) -> None:
        self.offsets.copy_(offsets_of(self.labels, self.centres, self.spread))
        self._set_pi()

    def _set_pi(self) -> None:
        if "pi" in self._buffers:  # there are units once there is a layer
            self.pi.copy_(rates_of(self.offsets, self._rates["p"]))

    def _fresh(self, units: int, device: torch.device) -> dict[str, Tensor]:
        """What there is before the first step; float32, whatever the layer's dtype."""
        counts = {"centres": (self.k,), "rows": (), "seen": ()}
        dtypes = {"labels": torch.int64, "seen": torch.bool}
        made = {
            name: torch.zeros(counts.get(name, (units,)), dtype=dtypes.get(name, torch.float32), device=device)
            for name in _BUFFERS
        }
        return made | {"pi": torch.full((units,), self._rates["p"], dtype=torch.float32, device=device)}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Regularizer:
        # As the rates: moved, and not cast; without a value where there was no memory, they begin anew.
        before = {name: self.get_buffer(name) for name in _BUFFERS if name in self._buffers}
        super()._apply(fn, recurse)
        for name, known in before.items():
            device = self.get_buffer(name).device
            fresh = self._fresh(len(self.pi), device) if known.is_meta else {}
            self._buffers[name] = fresh[name] if fresh else known.to(device)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._handle = handle_of(self)  # a copy has sums of its own


def _check_groups(k: int, spread: float) -> None:
    check_count("k", k, 2)
    require(_is_number(spread) and 0 <= spread <= 1, "spread", "a number in [0, 1]", spread)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
