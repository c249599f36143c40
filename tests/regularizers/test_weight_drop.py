"""Weight drop over all options of torch's recurrent layers: the layer's own kernel on masked recurrent weights."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from dropsurgery.context import Context
from dropsurgery.regularizers.dropout import dropout
from dropsurgery.regularizers.weight_drop import WeightDrop
from tests.regularizers.recurrent import FORMS, HOSTS, close, given, hosts, rows_of, same

P = 0.4


def bound(host: nn.RNNBase, p: float = P, *, training: bool = True) -> WeightDrop:
    layer = WeightDrop(p)
    layer.bind(host)
    host.train(training)
    return layer.train(training)


def masked(host: nn.RNNBase, part: str, seed: int) -> dict[str, Tensor]:
    """Weights whose name begins with `part`, masked in their order."""
    torch.manual_seed(seed)
    return {name: dropout(weight, P) for name, weight in host.named_parameters() if name.startswith(part)}


def expected(host: nn.RNNBase, call: Any, part: str = "weight_hh") -> Any:
    return rows_of(call, host, functional_call(copy.deepcopy(host), masked(host, part, 1), (call.input, call.hx)))


def seeded(layer: WeightDrop, call: Any) -> Any:
    torch.manual_seed(1)
    return layer(call.input, call.hx)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", HOSTS)
def test_it_is_the_layer_on_masked_recurrent_weights(kind: str, form: str) -> None:
    for host, with_states in itertools.product(hosts(kind), (False, True)):
        call, layer = given(host, form, with_states), bound(host)
        made = rows_of(call, host, seeded(layer, call))
        assert close(made, expected(host, call))
        assert not close(made, expected(host, call, "weight_ih"), 1e-3)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", HOSTS)
def test_at_rate_0_and_in_eval_it_is_the_layer(kind: str, form: str) -> None:
    for host, with_states in itertools.product(hosts(kind), (False, True)):
        call = given(host, form, with_states)
        for p, training in ((0.0, True), (0.0, False), (P, False)):
            layer = bound(host, p, training=training)
            made, plain = layer(call.input, call.hx), host(call.input, call.hx)
            assert type(made[0]) is type(plain[0])
            assert same(made, plain)


@pytest.mark.parametrize("kind", HOSTS)
def test_gradients_reach_the_weights_that_are_kept_and_no_others(kind: str) -> None:
    for host in hosts(kind, num_layers=2, bidirectional=True):
        call, layer = given(host, "unsorted", True), bound(host)
        host.zero_grad()
        output, _ = seeded(layer, call)
        output.data.square().sum().backward()
        for name, mask in masked(host, "weight_hh", 1).items():
            grad = host.get_parameter(name).grad
            assert grad is not None and not grad[mask == 0].any()
            assert "relu" in kind or grad[mask != 0].all()  # a unit may give 0 to all
        others = [each.grad for name, each in host.named_parameters() if not name.startswith("weight_hh")]
        assert all(grad is not None and grad.any() for grad in others)


@pytest.mark.parametrize("kind", HOSTS)
def test_masks_of_layers_and_directions_are_drawn_apart(kind: str) -> None:
    (host,) = hosts(kind, num_layers=2, bidirectional=True, batch_first=False, bias=True)
    for name, weight in host.named_parameters():
        if name.startswith("weight_hh"):
            nn.init.ones_(weight)
    call, layer, seen = given(host, "batch", True), bound(host), []

    def look(weight: Tensor | None) -> Tensor | None:
        made = drop(weight)
        seen.append(None if made is None else made != 0)
        return made

    drop, layer._masked = layer._masked, look  # type: ignore[method-assign]
    for seed in (3, 4):
        layer.context, layer.site_id = Context(seed), "site"
        layer(call.input, call.hx)
    assert len(seen) == 8
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(seen, 2))


def test_dropout_between_layers_stays() -> None:
    for host in hosts("GRU", num_layers=2):
        host.dropout = 1.0
        call, layer = given(host, "batch", False), bound(host)
        made = rows_of(call, host, seeded(layer, call))
        assert close(made, expected(host, call))
        host.dropout = 0.0
        assert not close(made, rows_of(call, host, seeded(layer, call)), 1e-3)
