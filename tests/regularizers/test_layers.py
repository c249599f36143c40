"""DropConnect, weight drop, Hinton's dropout, standout: each in place of a layer's forward, against plain formulas."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from dropsurgery.errors import SurgeryError
from dropsurgery.regularizers._base import Regularizer
from dropsurgery.regularizers.dropconnect import DropConnect, drop_connect
from dropsurgery.regularizers.dropout import dropout
from dropsurgery.regularizers.hinton_dropout import HintonDropout, bound_norms_
from dropsurgery.regularizers.standout import Standout, keep_probability
from dropsurgery.regularizers.weight_drop import WeightDrop


def bound(layer: Regularizer, host: nn.Module) -> Any:
    layer.bind(host)
    return layer


def share_is(drop: Tensor, p: float) -> bool:
    """Whether independent draws were dropped with probability p, within 4 standard errors."""
    return bool(abs(drop.double().mean() - p) <= 4 * math.sqrt(p * (1 - p) / drop.numel()))


def mean_is(draws: Tensor, expected: Tensor) -> bool:
    """Whether the mean over the first axis is as expected, within 5 standard errors at each of many places."""
    error = draws.std(0) / math.sqrt(len(draws)) + 1e-6
    return bool(((draws.mean(0) - expected).abs() <= 5 * error).all())


def element_by_element(drop: Tensor) -> bool:
    """Whether neighbours in a mask (..., rows, columns) were dropped independently, down and right."""
    deviation = drop.double() - drop.double().mean()
    variance = deviation.square().mean()
    pairs = (deviation[..., 1:, :] * deviation[..., :-1, :], deviation[..., :, 1:] * deviation[..., :, :-1])
    return all(bool(abs(pair.mean()) <= 4 * variance / math.sqrt(pair.numel())) for pair in pairs)


def between_samples(drop: Tensor) -> bool:
    """Whether the masks (B, ...) of different samples were drawn independently."""
    deviation = drop.double() - drop.double().mean()
    pair = deviation[1:] * deviation[:-1]
    return bool(abs(pair.mean()) <= 4 * deviation.square().mean() / math.sqrt(pair.numel()))


# ---- DropConnect ----


def masked_weights(layer: Regularizer, batch: int, seed: int = 0) -> Tensor:
    """The weight (out, in) that each sample met: what the layer makes of the rows of an identity matrix."""
    torch.manual_seed(seed)
    width = layer.host.in_features
    zero = layer(torch.zeros(batch, 1, width))
    torch.manual_seed(seed)
    return (layer(torch.eye(width).expand(batch, width, width)) - zero).transpose(1, 2)


def test_dropconnect_has_a_mask_for_each_sample() -> None:
    p, host = 0.3, nn.Linear(40, 30, bias=False)
    layer = bound(DropConnect(p), host)
    weights = masked_weights(layer, 20)
    drop = weights == 0
    assert share_is(drop, p) and element_by_element(drop) and between_samples(drop)
    assert torch.allclose(weights, ~drop * host.weight / (1 - p), atol=1e-6)
    x = torch.randn(20, 40)
    torch.manual_seed(0)
    y = layer(x)
    expected = [
        [float(np.dot(row, sample)) for row in w] for w, sample in zip(weights.tolist(), x.tolist(), strict=True)
    ]
    assert torch.allclose(y, torch.tensor(expected), atol=1e-5)


def test_masks_of_the_wrong_kind_are_seen() -> None:
    torch.manual_seed(0)
    inputs = (torch.rand(20, 1, 40) < 0.3).expand(20, 30, 40)  # dropout on the inputs
    outputs = (torch.rand(20, 30, 1) < 0.3).expand(20, 30, 40)  # on the outputs
    assert not element_by_element(inputs) and not element_by_element(outputs)
    batch = bound(DropConnect(0.3, "batch"), nn.Linear(40, 30, bias=False))
    drop = masked_weights(batch, 20) == 0
    assert share_is(drop[0], 0.3) and element_by_element(drop[0]) and not between_samples(drop)


def test_dropconnect_masks_the_bias_by_itself() -> None:
    p, host = 0.4, nn.Linear(6, 500)
    torch.manual_seed(0)
    y = bound(DropConnect(p), host)(torch.zeros(40, 6))
    drop = y == 0
    assert share_is(drop, p) and between_samples(drop)
    assert torch.allclose(y, ~drop * host.bias / (1 - p))
    torch.manual_seed(0)
    one = bound(DropConnect(p, "batch"), host)(torch.zeros(40, 6))
    assert share_is(one[0] == 0, p) and torch.equal(one, one[:1].expand_as(one))
    for scope in ("sample", "batch"):
        spared = bound(DropConnect(p, scope, bias=False), host)(torch.zeros(40, 6))
        assert torch.equal(spared, host.bias.expand(40, -1))


class Seen(nn.Conv2d):
    """A convolution with a forward of its own, which notes the weights that it runs on."""

    def forward(self, x: Tensor) -> Tensor:
        self.__dict__["seen"] = self.weight, self.bias
        return super().forward(F.pad(x, (1, 0, 1, 0)))


def test_dropconnect_runs_the_own_forward_on_one_mask_a_batch() -> None:
    torch.manual_seed(0)
    p, host = 0.25, Seen(16, 40, 3)
    parameters = dict(host.named_parameters())
    layer = bound(DropConnect(p, "batch"), host)
    y = layer(torch.ones(4, 16, 6, 6))
    weight, bias = host.__dict__["seen"]
    drop = weight == 0
    assert y.shape == (4, 40, 5, 5)
    assert share_is(drop, p) and torch.allclose(weight, ~drop * host.weight / (1 - p))
    assert share_is(bias == 0, p) and torch.allclose(bias, (bias != 0) * host.bias / (1 - p))
    y.sum().backward()
    assert torch.equal(host.weight.grad == 0, drop)
    assert list(host.state_dict()) == ["weight", "bias"]
    assert all(each is parameters[name] for name, each in host.named_parameters())
    layer.eval()(torch.ones(1, 16, 6, 6))
    assert host.__dict__["seen"][0] is host.weight


def test_the_own_weights_come_back_after_an_error() -> None:
    host = nn.Linear(4, 3)
    weight = host.weight
    with pytest.raises(RuntimeError):
        bound(DropConnect(0.5, "batch"), host)(torch.ones(2, 5))
    assert host.weight is weight and isinstance(weight, nn.Parameter)


@pytest.mark.parametrize("scope", ["sample", "batch"])
@pytest.mark.parametrize("shape", [(7, 12), (7, 5, 12), (7, 2, 3, 12), (12,)])
def test_the_mean_over_masks_is_the_layer(scope: Any, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    host, x = nn.Linear(12, 5), torch.randn(shape)
    layer = bound(DropConnect(0.3, scope), host)
    with torch.no_grad():
        draws = torch.stack([layer(x) for _ in range(800)])
        assert mean_is(draws, host(x))
        assert not mean_is(draws * 0.7, host(x))  # without the rescale
    assert x.dim() == 1 or layer(x[:0]).shape == host(x[:0]).shape
    assert torch.equal(layer.eval()(x), host(x))


def test_a_mask_for_each_sample_is_kept_for_backward_and_one_for_the_batch_is_not() -> None:
    host, x, kept = nn.Linear(64, 50), torch.randn(16, 64), {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    for scope, most in (("sample", 4 * 16 * 64 * 50), ("batch", 4 * 64 * 50)):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            bound(DropConnect(0.5, scope), host)(x)
        assert sum(kept.values()) <= most + x.nbytes + 4096


class LowRank(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 3)
        self.update = nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.linear(x, self.update)


def test_dropconnect_refuses_what_it_cannot_mask() -> None:
    for host in (nn.Conv2d(3, 4, 3), LowRank(), nn.Identity()):
        with pytest.raises(SurgeryError, match=r"dropconnect at a: expected a linear layer .*`scope: batch`.*, got"):
            layer = DropConnect()
            layer.site_id = "a"
            layer.bind(host)
    hidden = parametrizations.weight_norm(nn.Linear(4, 3))
    for host in (hidden, nn.ConvTranspose2d(3, 4, 3), nn.Identity()):
        with pytest.raises(SurgeryError, match=r"expected a linear layer or a convolution .* plain parameter, got"):
            DropConnect(scope="batch").bind(host)
    assert bound(DropConnect(scope="batch"), LowRank())(torch.ones(2, 4)).shape == (2, 3)
    with pytest.raises(SurgeryError, match="scope: expected 'sample' or 'batch', got 'row'"):
        DropConnect(scope="row")  # type: ignore[arg-type]
    with pytest.raises(SurgeryError, match="expected to be bound"):
        DropConnect()(torch.ones(2, 4))


@pytest.mark.parametrize("layer", [DropConnect(), DropConnect(scope="batch"), HintonDropout()])
def test_a_layer_whose_class_was_made_for_it_runs_its_own_forward(layer: Regularizer) -> None:
    host, x = nn.Linear(4, 3), torch.randn(2, 4)
    expected = bound(copy.deepcopy(layer).eval(), copy.deepcopy(host))(x)
    fields = {"_own_class": nn.Linear, "forward": lambda self, x: layer(x), "__module__": nn.Linear.__module__}
    host.__class__ = type("Linear", (nn.Linear,), fields)
    layer.bind(host)
    assert host(x).shape == (2, 3)  # and no endless recursion
    layer.eval()
    assert torch.equal(host(x), expected)


def test_dropconnect_as_a_function() -> None:
    x, weight = torch.randn(3, 4), torch.randn(5, 4)
    assert torch.allclose(drop_connect(x, weight, None, 0.0), x @ weight.T, atol=1e-6)
    assert not drop_connect(x, weight, weight[:, 0], 1.0).any()
    first, again = (drop_connect(x, weight, None, 0.5, key=torch.tensor(7)) for _ in range(2))
    assert torch.equal(first, again)
    with pytest.raises(SurgeryError, match=r"p: expected a number in \[0, 1\], got"):
        drop_connect(x, weight, None, 1.5)


# ---- weight drop ----

RNNS: list[Callable[[], nn.RNNBase]] = [
    lambda: nn.RNN(3, 5, nonlinearity="relu"),
    lambda: nn.GRU(3, 5, num_layers=2, batch_first=True),
    lambda: nn.LSTM(3, 5, num_layers=2, bidirectional=True),
    lambda: nn.LSTM(3, 5, num_layers=2, proj_size=2, bidirectional=True, bias=False),
]


def flat(result: Any) -> list[Tensor]:
    if isinstance(result, PackedSequence):
        return [result.data, result.batch_sizes]
    return [each for part in result for each in flat(part)] if isinstance(result, tuple) else [result]


def same(a: Any, b: Any) -> bool:
    return all(torch.allclose(x, y, atol=1e-6) for x, y in zip(flat(a), flat(b), strict=True))


def masks_of(host: nn.RNNBase, p: float, seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {name: dropout(weight, p) for name, weight in host.named_parameters() if name.startswith("weight_hh")}


@pytest.mark.parametrize("make", RNNS)
def test_weight_drop_is_the_layer_on_masked_recurrent_weights(make: Callable[[], nn.RNNBase]) -> None:
    torch.manual_seed(0)
    host = make()
    layer, other = bound(WeightDrop(0.5), host), copy.deepcopy(host)
    directions = (2 if host.bidirectional else 1) * host.num_layers
    width = host.proj_size or 5
    h, c = torch.randn(directions, 4, width), torch.randn(directions, 4, 5)
    state = (h, c) if isinstance(host, nn.LSTM) else h
    unsorted = pack_sequence([torch.randn(n, 3) for n in (2, 4, 1, 3)], enforce_sorted=False)
    batch = torch.randn(4, 4, 3)
    for inputs in ((batch,), (batch, state), (torch.randn(4, 3),), (unsorted,), (unsorted, state)):
        torch.manual_seed(1)
        y = layer(*inputs)
        assert same(y, functional_call(other, masks_of(other, 0.5, 1), inputs))
        assert not same(y, other(*inputs))
        layer.eval()
        assert all(map(torch.equal, flat(layer(*inputs)), flat(host(*inputs))))
        layer.train()


def test_weight_drop_holds_for_all_time_steps() -> None:
    host, x = nn.RNN(3, 6), torch.randn(9, 2, 3)
    torch.manual_seed(3)
    y, last = bound(WeightDrop(0.4), host)(x)
    weight = masks_of(host, 0.4, 3)["weight_hh_l0"].detach().numpy()
    inner, bias = host.weight_ih_l0.detach().numpy(), (host.bias_ih_l0 + host.bias_hh_l0).detach().numpy()
    state = np.zeros((2, 6))
    for step, now in enumerate(x.numpy()):
        state = np.tanh(now @ inner.T + state @ weight.T + bias)
        assert np.allclose(y[step].detach().numpy(), state, atol=1e-5)
    assert np.allclose(last[0].detach().numpy(), state, atol=1e-5)


def recurrent_drop(layer: Regularizer) -> Tensor:
    """Where no gradient reached the recurrent weights."""
    layer.host.zero_grad()
    layer(torch.randn(6, 64, 3))[0].square().sum().backward()
    return layer.host.weight_hh_l0.grad == 0


class Rows(WeightDrop):
    """As awd-lstm-lm with `variational=True`: whole outputs of the gates, and in eval too."""

    @property
    def active(self) -> bool:
        return self._nonzero

    def _masked(self, weight: Tensor) -> Tensor:
        return weight * dropout(torch.ones(len(weight), 1), self.p)


class Columns(WeightDrop):
    """As Gal and Ghahramani: whole inputs of the gates."""

    def _masked(self, weight: Tensor) -> Tensor:
        return weight * dropout(torch.ones(1, weight.shape[1]), self.p)


class ForGood(WeightDrop):
    """Zeroes the parameters in place."""

    def _masked(self, weight: Tensor) -> Tensor:
        weight.data.copy_(dropout(weight.data, self.p))
        return weight


def test_weight_drop_drops_single_weights_and_spares_the_parameters() -> None:
    p = 0.3

    def keeps(layer: Regularizer) -> bool:
        torch.manual_seed(0)
        before = copy.deepcopy(layer.host.state_dict())
        x = torch.randn(6, 4, 3)
        drop = recurrent_drop(layer)
        drawn = share_is(drop, p) and element_by_element(drop) and not torch.equal(drop, recurrent_drop(layer))
        untouched = all(torch.equal(each, before[name]) for name, each in layer.host.state_dict().items())
        return drawn and untouched and torch.equal(layer.eval()(x)[0], layer.host(x)[0])

    assert keeps(bound(WeightDrop(p), nn.LSTM(3, 60)))
    assert not any(keeps(bound(wrong(p), nn.LSTM(3, 60))) for wrong in (Rows, Columns, ForGood))


def test_the_layer_stays_what_it_was_under_weight_drop() -> None:
    host = nn.LSTM(3, 5, num_layers=2)
    names, parameters = list(host.state_dict()), list(host.parameters())
    layer, x = bound(WeightDrop(0.5), host), torch.randn(4, 2, 3)
    for train in (True, False, True, False):
        layer.train(train)(x)
        assert list(host.state_dict()) == names
        assert all(a is b for a, b in zip(host.parameters(), parameters, strict=True))
        assert all(a is b for a, b in zip(host._flat_weights, parameters, strict=True))
        for twin in (copy.deepcopy(host), pickle.loads(pickle.dumps(host))):
            assert torch.equal(twin(x)[0], host(x)[0])
    renamed = nn.LSTM(3, 5, num_layers=2)  # what a parametrization does to the keys
    parametrize.register_parametrization(renamed, "weight_hh_l0", nn.Dropout(0.5))
    assert list(renamed.state_dict()) != names


def test_weight_drop_sees_weights_that_were_replaced() -> None:
    host, x = nn.GRU(3, 5), torch.randn(4, 2, 3)
    layer = bound(WeightDrop(0.5), host)
    layer(x)
    host.load_state_dict({name: torch.randn_like(each) for name, each in host.state_dict().items()}, assign=True)
    torch.manual_seed(1)
    y = layer(x)
    assert same(y, functional_call(copy.deepcopy(host), masks_of(host, 0.5, 1), (x,)))


def test_weight_drop_in_a_compiled_model() -> None:
    host, x = nn.GRU(3, 5), torch.randn(4, 2, 3)
    layer = bound(WeightDrop(0.5), host)
    for allow in (False, True):  # torch does not compile RNNs by default: it runs them as they are
        torch._dynamo.reset()
        with torch._dynamo.config.patch(allow_rnn=allow):
            compiled = torch.compile(layer, backend="eager", fullgraph=allow)
            torch.manual_seed(1)
            y = compiled(x)
        torch.manual_seed(1)
        assert same(y, layer(x)) and not same(y, host(x))


class Wrapped(nn.LSTM):
    def forward(self, x: Tensor, hx: Any = None) -> Any:
        return super().forward(x * 2, hx)


def test_weight_drop_refuses_what_it_cannot_mask() -> None:
    hidden = parametrizations.spectral_norm(nn.LSTM(3, 5), "weight_hh_l0")
    for host in (nn.LSTMCell(3, 5), Wrapped(3, 5), hidden, nn.Linear(3, 5)):
        with pytest.raises(SurgeryError, match=r"weight_drop at a layer: expected an nn.LSTM.*, got"):
            WeightDrop().bind(host)


# ---- Hinton's dropout ----


def identity(width: int) -> nn.Linear:
    host = nn.Linear(width, width)
    with torch.no_grad():
        host.weight.copy_(torch.eye(width))
    return host


def test_hinton_dropout_leaves_what_it_keeps_as_it_was() -> None:
    def holds(layer: Regularizer) -> bool:
        torch.manual_seed(0)
        x = torch.randn(400, 50)
        y = layer(x) - layer.host.bias
        kept = (y - x).abs() < 1e-6
        return share_is(~kept, 0.2) and bool((y[~kept].abs() < 1e-6).all())

    class Inverted(HintonDropout):
        def forward(self, input: Tensor) -> Tensor:
            return self.own(dropout(input, self.p))

    assert holds(bound(HintonDropout(0.2), identity(50)))
    assert not holds(bound(Inverted(0.2), identity(50)))


def test_hinton_dropout_has_the_mean_network_in_eval() -> None:
    torch.manual_seed(0)
    host, x = nn.Linear(30, 8), torch.randn(5, 30)
    layer = bound(HintonDropout(0.3), host)
    with torch.no_grad():
        draws = torch.stack([layer(x) for _ in range(3000)])
        mean = layer.eval()(x)
        assert torch.allclose(mean, F.linear(x, host.weight * 0.7, host.bias), atol=1e-6)
        assert mean_is(draws, mean)
        assert not mean_is(draws, host(x)) and not mean_is(draws, host(x) * 0.7)  # nothing scaled; the bias scaled too
    layer.set_rate("p", 0.0)
    assert torch.equal(layer(x), host(x)) and torch.equal(layer.train()(x), host(x))


def test_hinton_dropout_on_convolutions_drops_element_by_element() -> None:
    torch.manual_seed(0)
    host = nn.Conv2d(3, 3, 1, bias=False)
    with torch.no_grad():
        host.weight.copy_(torch.eye(3)[:, :, None, None])
    drop = bound(HintonDropout(0.5), host)(torch.ones(20, 3, 30, 30)) == 0
    assert share_is(drop, 0.5) and element_by_element(drop)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(20, 9), (20, 3, 2, 2)])
def test_norms_are_bounded_unit_by_unit(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    def holds(bound_: Callable[[Tensor, float], None]) -> bool:
        torch.manual_seed(0)
        weight = (torch.randn(shape) * torch.linspace(0, 2, 20).view(-1, *[1] * (len(shape) - 1))).to(dtype)
        before = weight.double().numpy().copy()
        bound_(weight, 2.0)
        expected = np.stack([row * min(1.0, 2.0 / max(np.sqrt((row**2).sum()), 1e-9)) for row in before])
        short = np.sqrt((before**2).reshape(20, -1).sum(1)) <= 2
        assert 0 < short.sum() < 20
        after = weight.double().numpy()
        exact = np.array_equal(after[short], before[short])
        return exact and np.allclose(after, expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-7)

    def all_at_once(weight: Tensor, most: float) -> None:
        weight.mul_((most / weight.norm()).clamp(max=1))

    def by_input(weight: Tensor, most: float) -> None:
        bound_norms_(weight.transpose(0, 1), most)

    assert holds(bound_norms_)
    assert not holds(all_at_once) and not holds(by_input)


def test_the_bound_holds_after_each_step_of_the_optimizer() -> None:
    torch.manual_seed(0)
    host, x = nn.Linear(10, 6), torch.randn(8, 10)
    weight = host.weight
    layer = bound(HintonDropout(0.5, max_norm=0.5), host)
    optimizer = torch.optim.SGD(host.parameters(), lr=0.5, momentum=0.9)
    longest = []
    for _ in range(5):
        layer(x).square().sum().neg().backward()
        optimizer.step()
        longest.append(float(host.weight.detach().norm(dim=1).max()))
        layer.after_step()
        assert host.weight is weight and weight.requires_grad
        assert (weight.norm(dim=1) <= 0.5 * (1 + 1e-6)).all()
    assert max(longest) > 0.6


def test_the_bound_is_off_where_there_is_none() -> None:
    host = nn.Linear(10, 6)
    nn.init.constant_(host.weight, 3.0)
    unbounded, silent, frozen = HintonDropout(0.5), HintonDropout(0.0, max_norm=1), HintonDropout(0.5, max_norm=1)
    for layer in (unbounded, silent):
        bound(layer, host).after_step()
    host.requires_grad_(False)
    bound(frozen, host).after_step()
    assert (host.weight == 3).all()
    host.requires_grad_()
    frozen.after_step()
    assert torch.allclose(host.weight.norm(dim=1), torch.ones(6))


def test_hinton_dropout_refuses_what_it_cannot_take() -> None:
    for bad in (0, -1.0, float("nan"), float("inf"), True, "3"):
        with pytest.raises(SurgeryError, match="max_norm: expected a number above 0, or none, got"):
            HintonDropout(max_norm=bad)  # type: ignore[arg-type]
    for host in (nn.ReLU(), nn.Bilinear(3, 4, 5), parametrizations.weight_norm(nn.Linear(3, 4))):
        with pytest.raises(SurgeryError, match=r"hinton_dropout at a layer: expected a linear layer.*, got"):
            HintonDropout().bind(host)


@pytest.mark.parametrize("p", [0.05, 0.6])
def test_units_are_dropped_in_low_precision_as_often(p: float) -> None:
    torch.manual_seed(0)
    host = identity(1).half()
    nn.init.zeros_(host.bias)
    y = bound(HintonDropout(p), host)(torch.full((200_000, 1), 60_000, dtype=torch.float16))
    assert share_is(y == 0, p) and y.isfinite().all() and (y[y != 0] == 60_000).all()


# ---- standout ----

Z = torch.tensor([-30.0, -3, -1, -0.25, 0, 0.25, 1, 3, 30])


def keep_by_formula(z: Tensor, p: float, alpha: float) -> list[float]:
    beta = math.log((1 - p) / p)
    return [1 / (1 + math.exp(-alpha * each - beta)) for each in z.tolist()]


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("p", [0.01, 0.5, 0.8])
def test_the_probability_to_keep_rises_with_the_pre_activation(p: float, alpha: float) -> None:
    keep = keep_probability(Z, p, alpha)
    assert torch.allclose(keep, torch.tensor(keep_by_formula(Z, p, alpha)), rtol=1e-5)
    assert math.isclose(keep[4], 1 - p, rel_tol=1e-6)
    assert (keep.diff() > 0).all() if alpha == 0.5 else (keep.diff() >= 0).all()
    assert alpha or torch.allclose(keep, torch.tensor(1 - p))


@pytest.mark.parametrize("host", [nn.ReLU(), nn.SiLU(), nn.GELU(), nn.Tanh(), nn.PReLU()])
def test_standout_draws_by_the_pre_activation(host: nn.Module) -> None:
    z = torch.linspace(-2, 2, 9).repeat(40_000, 1) + 0.05

    def holds(layer: Regularizer) -> bool:
        torch.manual_seed(0)
        with torch.no_grad():
            y, plain = layer(z), host(z)
        seen = plain[0] != 0
        kept = y[:, seen] == plain[:, seen]
        gone = y[:, seen] == 0
        shares = keep_by_formula(z[0][seen], 0.3, 2.0)
        return bool((kept ^ gone).all()) and all(map(share_is, kept.T, shares))

    class ByResult(Standout):
        def forward(self, input: Tensor) -> Tensor:
            y = self.own(input)
            return y * (torch.rand(y.shape) < keep_probability(y, self.p, self.alpha))

    class Rescaled(Standout):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) / 0.7

    assert holds(bound(Standout(0.3, 2.0), host))
    # A ReLU leaves z as it is wherever it is not 0: there, both are one.
    assert isinstance(host, nn.ReLU) or not holds(bound(ByResult(0.3, 2.0), host))
    assert not holds(bound(Rescaled(0.3, 2.0), host))


def test_standout_has_the_mean_in_eval() -> None:
    torch.manual_seed(0)
    layer = bound(Standout(0.4), nn.SiLU())
    x = torch.randn(6, 7)
    mean = layer.eval()(x)
    keep = torch.tensor(keep_by_formula(x.flatten(), 0.4, 1.0)).view_as(x)
    assert torch.allclose(mean, F.silu(x) * keep, atol=1e-6)
    layer.train()
    draws = torch.stack([layer(x) for _ in range(3000)])
    assert mean_is(draws, mean) and not mean_is(draws, F.silu(x)) and not mean_is(draws, F.silu(x) * 0.6)


def test_standout_at_the_ends() -> None:
    x = torch.tensor([-3e38, -1.0, 0.0, 1.0, 3e38], requires_grad=True)
    host = nn.Hardtanh()
    layer = bound(Standout(1.0, alpha=2.0), host)
    for training in (True, False):
        y = layer.train(training)(x)
        y.sum().backward()
        assert y.isfinite().all() and not y[1:4].any() and x.grad.isfinite().all()
    layer.set_rate("p", 0.0)
    assert torch.equal(layer(x), host(x)) and torch.equal(layer.train()(x), host(x))


@pytest.mark.parametrize("make", [nn.ReLU, nn.SiLU])
def test_standout_where_the_activation_works_in_place(make: Callable[..., nn.Module]) -> None:
    x, results = torch.randn(50, 40), []
    for inplace in (False, True):
        for training in (True, False):
            torch.manual_seed(0)
            start = x.clone().requires_grad_()
            y = bound(Standout(0.4).train(training), make(inplace=inplace))(start * 1.0)
            y.sum().backward()
            results.append((y.detach(), start.grad))
    for plain, in_place in zip(results[:2], results[2:], strict=True):
        assert all(map(torch.allclose, plain, in_place))


def test_no_gradient_goes_through_the_draw_and_all_of_it_through_the_mean() -> None:
    torch.manual_seed(0)
    x = torch.randn(200, dtype=torch.float64, requires_grad=True)
    layer = bound(Standout(0.4), nn.Tanh())
    y = layer(x)
    y.sum().backward()
    assert torch.allclose(x.grad, (y != 0) * (1 - x.tanh() ** 2))
    assert torch.autograd.gradcheck(layer.eval(), (x[:20].detach().requires_grad_(),))


def test_standout_refuses_what_is_no_activation() -> None:
    for host in (nn.Softmax(1), nn.GLU(), nn.Identity(), nn.Linear(3, 4), nn.MultiheadAttention(4, 2)):
        with pytest.raises(SurgeryError, match=r"standout at a layer: expected an activation .*, got"):
            Standout().bind(host)
    for bad in (-1.0, float("nan"), float("inf"), True, "1"):
        with pytest.raises(SurgeryError, match="alpha: expected a number of 0 or more, got"):
            Standout(alpha=bad)  # type: ignore[arg-type]
