"""The laws that every file of the folder keeps, run on its own `examples`; each law is also fed a breach."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from dropsurgery import catalogue
from dropsurgery.context import Context
from dropsurgery.errors import SurgeryError
from dropsurgery.regularizers._base import Rate, Regularizer
from dropsurgery.regularizers._uniform import uniform

Make = Callable[[], Regularizer]
SHAPE = (8, 6, 14, 14)


def rates_of(layer: Regularizer) -> list[str]:
    return [name for name, _ in layer.named_buffers() if name == "p" or name.startswith("p_")]


def set_rates(layer: Regularizer, value: float) -> None:
    for name in rates_of(layer):
        layer.set_rate(name, value)


def draws(layer: Regularizer, x: Tensor, times: int = 1, seed: int = 0) -> list[Tensor]:
    torch.manual_seed(seed)
    return [layer(x) for _ in range(times)]


# ---- the laws ----


def declares_itself(make: Make) -> None:
    layer = make()
    assert layer.kind in ("insert", "swap", "combine", "wrap")
    assert layer.paper and layer.summary and layer.examples and layer.eval_rule
    assert rates_of(layer)
    for name, argument in catalogue.arguments(type(layer)).items():
        assert argument.annotation is not inspect.Parameter.empty and not argument.required, name
    for name in rates_of(layer):
        assert catalogue.arguments(type(layer))[name].annotation == Rate
        assert f"{name}=" in repr(layer)


def off_is_identity(make: Make) -> None:
    x, state = torch.randn(SHAPE), torch.get_rng_state()
    silent = make()
    set_rates(silent, 0.0)
    assert silent(x) is x
    assert silent.eval()(x) is x
    resting = make().eval()
    if resting.eval_rule == "identity":
        assert resting(x) is x
    else:
        assert torch.equal(resting(x), resting(x))
    assert torch.equal(torch.get_rng_state(), state)


def forced_runs_in_eval(make: Make) -> None:
    layer = make().eval()
    layer.forced = True
    x = torch.randn(SHAPE)
    assert any(not torch.equal(y, x) and bool((y == 0).any()) for y in draws(layer, x, 60))


def keeps_nothing_in_state_dict(make: Make) -> None:
    layer = make()
    assert not layer.state_dict() and not list(layer.parameters())
    layer.load_state(layer.state())


def keeps_rates_in_float32(make: Make) -> None:
    for convert in (nn.Module.half, nn.Module.bfloat16, nn.Module.double, lambda m: m.to(torch.float16)):
        layer = make()
        set_rates(layer, 0.1)
        convert(layer)
        for name in rates_of(layer):
            rate = layer.get_buffer(name)
            assert rate.dtype == torch.float32 and rate.shape == () and torch.equal(rate, torch.tensor(0.1))


def refuses_bad_rates(make: Make) -> None:
    layer = make()
    for name in rates_of(layer):
        for bad in (-0.1, 1.5, float("nan"), "0.1", True, None):
            with pytest.raises(SurgeryError, match=rf"{name}: expected a number in \[0, 1\], got"):
                type(layer)(**{name: bad})
            with pytest.raises(SurgeryError, match=rf"{name}: expected a number in \[0, 1\], got"):
                layer.set_rate(name, bad)
        assert layer.get_buffer(name) == type(layer)(**{name: float(layer.get_buffer(name))}).get_buffer(name)
    with pytest.raises(SurgeryError, match="expected one of"):
        layer.set_rate("rate", 0.1)


def repeats_by_global_seed(make: Make) -> None:
    layer, x = make(), torch.randn(SHAPE)
    first = draws(layer, x, 40)
    assert all(torch.equal(a, b) for a, b in zip(first, draws(layer, x, 40), strict=True))
    assert any(not torch.equal(a, first[0]) for a in first)


def repeats_by_key(make: Make) -> None:
    x = torch.randn(SHAPE)

    def run(site: str, seed: int, noise: int) -> list[Tensor]:
        layer = make()
        layer.context, layer.site_id = Context(seed), site
        torch.manual_seed(noise)
        return [layer(x + 0 * torch.rand(())) for _ in range(40)]

    first = run("a", seed=1, noise=2)
    assert all(torch.equal(a, b) for a, b in zip(first, run("a", seed=1, noise=3), strict=True))
    assert any(not torch.equal(a, first[0]) for a in first)
    for other in (run("b", seed=1, noise=2), run("a", seed=2, noise=2)):
        assert any(not torch.equal(a, b) for a, b in zip(first, other, strict=True))


def survives_copies(make: Make) -> None:
    layer, x = make(), torch.randn(SHAPE)
    set_rates(layer, 0.4)
    layer.context, layer.site_id = Context(), "site"
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert repr(twin) == repr(layer) and twin.site_id == "site"
        assert all(torch.equal(a, b) for a, b in zip(draws(layer, x, 5), draws(twin, x, 5), strict=True))
        set_rates(twin, 0.0)
        assert twin(x) is x and all(layer.get_buffer(name) != 0 for name in rates_of(layer))


def compiles_with_a_moving_rate(make: Make) -> None:
    eager, compiled = make(), make()
    for layer in (eager, compiled):
        layer.context, layer.site_id = Context(seed=3), "site"
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(compiled, fullgraph=True, backend=counter)
    for step, rate in enumerate((0.0, 0.1, 0.2, 0.3, 0.0, 0.4)):
        outcomes = []
        for layer, call in ((eager, eager), (compiled, run)):
            set_rates(layer, rate)
            layer.context.step = step
            x = torch.linspace(1, 2, 8 * 6 * 14 * 14).reshape(SHAPE).requires_grad_()
            y = call(x)
            y.sum().backward()
            outcomes.append((y.detach(), x.grad))
        (y, grad), (compiled_y, compiled_grad) = outcomes
        assert torch.allclose(compiled_y, y) and torch.allclose(compiled_grad, grad)
    assert counter.frame_count <= 2


def recomputes_the_same(make: Make) -> None:
    for seed in (None, 5):
        for reentrant in (False, True):
            layer = make()
            layer.context, layer.site_id = Context(seed), "site"
            torch.manual_seed(0)
            runs = []
            for _ in range(6):  # all forwards before all backwards, as in gradient accumulation
                x = torch.randn(SHAPE).abs_().add_(0.1).requires_grad_()
                runs.append((x, checkpoint(lambda x, layer=layer: layer(x).square(), x, use_reentrant=reentrant)))
                torch.rand(3)
            for x, y in runs:
                y.sum().backward()
                # y = (s x)^2 and so dy/dx = 2 y / x, unless s was not the same.
                assert torch.allclose(x.grad, 2 * y.detach() / x.detach())


def takes_every_shape(make: Make) -> None:
    layer, x = make(), torch.ones(SHAPE)
    layer.context = Context(seed=1)
    with torch.device("meta"):  # a default device that is not the input's
        assert layer(x).device == x.device and 0 < layer.expected_drop(SHAPE) < 1
    for shape in ((1, 1, 1, 1), (2, 3, 5, 9), (1, 4, 7, 7), (3, 1, 2, 1), (0, 3, 7, 7)):
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            x = torch.ones(shape, dtype=dtype, requires_grad=True)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = make()(x)
            y.sum().backward()
            assert y.shape == x.shape and y.dtype == dtype
            assert y.isfinite().all() and x.grad.isfinite().all()


def keeps_the_layout(make: Make) -> None:
    plain = torch.randn(SHAPE)
    last = plain.to(memory_format=torch.channels_last)
    sliced = torch.randn(8, 6, 14, 28)[..., ::2].copy_(plain)
    expected = draws(make(), plain)[0]
    assert expected.is_contiguous()
    for x in (last, sliced):
        assert torch.equal(draws(make(), x)[0], expected)
    assert draws(make(), last)[0].stride() == last.stride()
    grads = []
    for x in (plain, last):
        x = x.detach().clone().requires_grad_()
        draws(make(), x)[0].backward(torch.ones(SHAPE))  # a contiguous gradient for both
        grads.append(x.grad)
    assert torch.equal(*grads)


def reads_nothing_from_the_device(make: Make) -> None:
    layer = make().to("meta")  # where a tensor has no value to be read
    x = torch.empty(SHAPE, device="meta", dtype=torch.bfloat16, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.is_meta and y.shape == x.shape and y.dtype == x.dtype


def drops_what_it_expects(make: Make) -> None:
    layer = make()
    expected = layer.expected_drop(SHAPE)
    shares = torch.stack([(y == 0).double().mean() for y in draws(layer, torch.ones(SHAPE), 300)])
    assert 0 < expected < 1
    assert abs(shares.mean() - expected) <= 4 * shares.std() / len(shares) ** 0.5


LAWS = [
    declares_itself,
    off_is_identity,
    forced_runs_in_eval,
    keeps_nothing_in_state_dict,
    keeps_rates_in_float32,
    refuses_bad_rates,
    repeats_by_global_seed,
    repeats_by_key,
    survives_copies,
    compiles_with_a_moving_rate,
    recomputes_the_same,
    takes_every_shape,
    keeps_the_layout,
    reads_nothing_from_the_device,
    drops_what_it_expects,
]
CASES = [
    (name, example)
    for name in catalogue.names("regularizers")
    for example in catalogue.load("regularizers", name).examples
]


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize(("name", "example"), CASES, ids=str)
def test_law(name: str, example: dict, law: Callable[[Make], None]) -> None:
    torch.manual_seed(0)
    law(lambda: catalogue.load("regularizers", name)(**example))


# ---- the laws, tested: a regularizer that keeps them all, and one breach of each ----


class Kept(Regularizer):
    paper, summary, examples = "a paper", "a summary", ({"p": 0.2},)

    def __init__(self, p: Rate = 0.2) -> None:
        super().__init__(p=p)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(x) if self.active else x

    def drop(self, x: Tensor) -> Tensor:
        u = uniform(x.shape, x.device, self.next_key())
        return x * ((u >= self.p) / (1 - self.p)).to(x.dtype)

    def expected_drop(self, shape: tuple[int, ...]) -> float:
        return float(self.p)


class Nameless(Kept):
    paper = ""


class Restless(Kept):
    def forward(self, x: Tensor) -> Tensor:
        return self.drop(x) if self.training else x


class Unforced(Kept):
    def forward(self, x: Tensor) -> Tensor:
        return self.drop(x) if self.training and self._nonzero else x


class Saved(Kept):
    def __init__(self, p: Rate = 0.2) -> None:
        super().__init__(p)
        self.register_buffer("seen", torch.zeros(()))


class Halved(Kept):
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Regularizer:
        return nn.Module._apply(self, fn, recurse)


class Lenient(Kept):
    def set_rate(self, name: str, value: float) -> None:
        self.p.fill_(min(max(float(value or 0), 0), 1))


class Elsewhere(Kept):
    generator = torch.Generator().manual_seed(0)

    def drop(self, x: Tensor) -> Tensor:
        return x * (torch.rand(x.shape, generator=self.generator) >= self.p)


class Unkeyed(Kept):
    def drop(self, x: Tensor) -> Tensor:
        return x * (torch.rand_like(x) >= self.p)


class Uncopied(Kept):
    def __deepcopy__(self, memo: dict) -> Regularizer:
        return self


class Baked(Kept):
    def drop(self, x: Tensor) -> Tensor:
        return x * (uniform(x.shape, x.device, self.next_key()) >= self._rates["p"])


class Growing(Kept):
    def drop(self, x: Tensor) -> Tensor:
        return super().drop(x).float()


class Flattening(Kept):
    def drop(self, x: Tensor) -> Tensor:
        return super().drop(x).contiguous()


class Reading(Kept):
    def drop(self, x: Tensor) -> Tensor:
        return x * (uniform(x.shape, x.device, self.next_key()) >= float(self.p))


class Boastful(Kept):
    def expected_drop(self, shape: tuple[int, ...]) -> float:
        return 0.25


BREACHES = [
    (declares_itself, Nameless),
    (off_is_identity, Restless),
    (forced_runs_in_eval, Unforced),
    (keeps_nothing_in_state_dict, Saved),
    (keeps_rates_in_float32, Halved),
    (refuses_bad_rates, Lenient),
    (repeats_by_global_seed, Elsewhere),
    (repeats_by_key, Unkeyed),
    (survives_copies, Uncopied),
    (compiles_with_a_moving_rate, Baked),
    (recomputes_the_same, Elsewhere),
    (takes_every_shape, Growing),
    (keeps_the_layout, Flattening),
    (reads_nothing_from_the_device, Reading),
    (drops_what_it_expects, Boastful),
]


@pytest.mark.parametrize(("law", "breach"), BREACHES, ids=lambda each: each.__name__)
def test_law_sees_its_breach(law: Callable[[Make], None], breach: type[Kept]) -> None:
    torch.manual_seed(0)
    law(Kept)
    with pytest.raises((AssertionError, pytest.fail.Exception, RuntimeError)):
        law(breach)


def test_each_law_has_a_breach() -> None:
    assert [law for law, _ in BREACHES] == LAWS
