"""The laws that every file of the folder keeps, run on its own `examples`; each law is also fed a breach.

What a law needs to know, a class declares, next to what `Regularizer` asks of it:

- `kind`: "insert" is called with one tensor and gives that very tensor where it is silent; "combine" is called with
  two and gives their sum; "swap" is bound to the layer that its static method `example_host()` gives, and gives what
  that layer's own forward gives. The static method `example_inputs(batch)` gives the inputs, batch first, of one that
  does not take maps (B, C, H, W), or whose host does not.
- `drops`: "zero", or "other", where nothing need become zero and what changed is counted instead.
- `uncounted`: why what was dropped cannot be counted in the output (noise on every element); such a class is measured
  by its own tests.
- `by_values`: how much is dropped hangs on the values, and `realised_drop` counts it on those it is given.
- `random = False`, on the class or one instance: it draws no numbers.
- `learned`: names of the parameters that it adds to the model, made by `build`; it begins as the identity.
- `needs_labels`: it is told them by its own `batch(labels=…, validation=…)`, of features that `example_inputs` gives;
  its attribute `labels` are those of the batch, and each forward of the laws is given some.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import pickle
import re
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from dropsurgery import catalogue
from dropsurgery.context import Context
from dropsurgery.errors import SurgeryError
from dropsurgery.regularizers._base import Rate, Regularizer
from dropsurgery.regularizers._uniform import uniform

Inputs = tuple[Tensor, ...]
SHAPE = (8, 6, 14, 14)
SHAPES = ((1, 1, 1, 1), (2, 3, 5, 9), (1, 4, 7, 7), (3, 1, 2, 1), (0, 3, 7, 7))
CLASSES = 3  # of those that need labels
PRODUCERS = ((), ("activation", "relu"), ("norm", "batch_norm"))
PLACES = (  # shapes, each with the axis of its channels
    *(((4, 6), -1), ((4, 10, 6), -1), ((4, 6, 10), 1), ((4, 6, 9, 10), 1), ((4, 9, 10, 6), -1)),
    *(((4, 6, 5, 9, 7), 1), ((4, 5, 9, 7, 6), -1), ((4, 10, 6), None), ((4, 6, 9, 10), None)),
)


class Make:
    """Makes layers of one class and one set of arguments: each the same, bound and built where it has to be."""

    def __init__(self, cls: type[Regularizer], **arguments: Any) -> None:
        self.cls = cls
        self.arguments = arguments

    def __call__(self, shape: tuple[int, ...] = SHAPE) -> Regularizer:
        """Return one that has been trained: where it learns, what it learned differs from what it began with."""
        layer = self.fresh(shape)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.copy_(torch.linspace(0.5, 1.5, parameter.numel()).view_as(parameter))
        return layer

    def fresh(self, shape: tuple[int, ...] = SHAPE) -> Regularizer:
        layer = self.cls(**self.arguments)
        if needs_labels(layer):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                (features,) = layer.example_inputs(4 * CLASSES)
            with layer.batch(validation=(features, some_labels(features))):
                pass
            tell_labels(layer, (torch.empty(SHAPE[0]),))
            layer.register_forward_pre_hook(tell_labels)
        if learned(layer):
            layer.build(channel_axis=1, channels=shape[1], shape=shape, site_id="site")
        if layer.kind == "swap":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                layer.bind(self.cls.example_host())
        return layer


def learned(layer: Regularizer) -> tuple[str, ...]:
    return getattr(layer, "learned", ())


def is_random(layer: Regularizer) -> bool:
    return getattr(layer, "random", True)


def needs_labels(layer: Regularizer) -> bool:
    return getattr(layer, "needs_labels", False)


def some_labels(x: Tensor) -> Tensor:
    return torch.arange(len(x), device=x.device) % CLASSES


def tell_labels(layer: Any, inputs: Inputs) -> None:
    """A pre-hook: each batch has its labels. A compiler sees nothing of it where there are as many as before."""
    if layer.labels is None or len(layer.labels) != len(inputs[0]):
        layer.labels = some_labels(inputs[0])


def takes_other_inputs(layer: Regularizer) -> bool:
    return hasattr(layer, "example_inputs")


def inputs_of(layer: Regularizer, shape: tuple[int, ...] = SHAPE) -> Inputs:
    """Random inputs; where the class gives its own, only their batch is that of `shape`."""
    if takes_other_inputs(layer):
        return layer.example_inputs(shape[0])
    return tuple(torch.randn(shape) for _ in range(2 if layer.kind == "combine" else 1))


def leaves(inputs: Inputs, dtype: torch.dtype | None = None) -> Inputs:
    """Copies of the inputs, those with a gradient ready to take one."""
    copies = (x.detach().clone() for x in inputs)
    return tuple(x.to(dtype).requires_grad_() if x.is_floating_point() else x for x in copies)


def plain(layer: Regularizer, inputs: Inputs) -> Any:
    """What it stands in for, or comes after, gives without it."""
    if layer.kind == "swap":
        return type(layer.host).forward(layer.host, *inputs)
    return sum(inputs[1:], inputs[0])


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(tree_leaves(a), tree_leaves(b), strict=True))


def close(a: Any, b: Any) -> bool:
    return all(torch.allclose(x, y, atol=1e-6) for x, y in zip(tree_leaves(a), tree_leaves(b), strict=True))


def is_silent(layer: Regularizer, inputs: Inputs, y: Any) -> bool:
    """Whether `y` is what there would be without the layer: for an insertion, the very input."""
    if layer.kind == "insert" and not learned(layer):
        return y is inputs[0]
    return same(y, plain(layer, inputs))


def total(y: Any) -> Tensor:
    """A number that hangs on each output, and not on each alike."""
    parts = [each.float().square().sum() for each in tree_leaves(y) if each.is_floating_point()]
    return sum(parts[1:], parts[0])


def gradients(layer: Regularizer, inputs: Inputs) -> list[Tensor | None]:
    """Of the inputs, of what the layer learned, and of its host."""
    host = layer.host.parameters() if layer.kind == "swap" else ()
    return [each.grad for each in (*inputs, *layer.parameters(), *host)]


def agree(a: list[Tensor | None], b: list[Tensor | None]) -> bool:
    return all(
        x is y is None or (x is not None and y is not None and torch.allclose(x, y, rtol=1e-4, atol=1e-5))
        for x, y in zip(a, b, strict=True)
    )


def rates_of(layer: Regularizer) -> list[str]:
    return [name for name, _ in layer.named_buffers() if name == "p" or name.startswith("p_")]


def set_rates(layer: Regularizer, value: float) -> None:
    for name in rates_of(layer):
        layer.set_rate(name, value)


def draws(layer: Regularizer, inputs: Inputs, times: int = 1, seed: int = 0) -> list[Any]:
    torch.manual_seed(seed)
    return [layer(*inputs) for _ in range(times)]


def repeat_or_not(layer: Regularizer, runs: list[Any]) -> bool:
    """Whether what one layer gave in several runs differs, or is the same if it draws no numbers."""
    return all(same(y, runs[0]) for y in runs) != is_random(layer)


# ---- the laws ----


def declares_itself(make: Make) -> None:
    layer = make()
    assert layer.kind in ("insert", "swap", "combine", "wrap")
    assert layer.paper and layer.summary and layer.examples and layer.eval_rule
    assert layer.placement and layer.shapes
    assert layer.drops in ("zero", "other") and isinstance(layer.uncounted, str)
    assert layer.needs or layer.kind != "swap"
    assert learned(layer) == () or layer.eval_rule != "identity"
    assert rates_of(layer)
    for name, argument in catalogue.arguments(type(layer)).items():
        assert argument.annotation is not inspect.Parameter.empty and not argument.required, name
    for name in rates_of(layer):
        assert catalogue.arguments(type(layer))[name].annotation == Rate
        assert f"{name}=" in repr(layer)


def off_is_identity(make: Make) -> None:
    silent, resting, trained = make.fresh(), make.fresh().eval(), make().eval()
    inputs = inputs_of(silent)
    state = torch.get_rng_state()
    set_rates(silent, 0.0)
    assert is_silent(silent, inputs, silent(*inputs))
    assert is_silent(silent, inputs, silent.eval()(*inputs))
    if resting.eval_rule == "identity" or learned(resting):
        assert is_silent(resting, inputs, resting(*inputs))
    assert same(trained(*inputs), trained(*inputs))
    assert torch.equal(torch.get_rng_state(), state)


def forced_runs_in_eval(make: Make) -> None:
    layer = make().eval()
    inputs = inputs_of(layer)
    resting = layer(*inputs)
    layer.forced = True
    runs = [y for y in draws(layer, inputs, 60) if not same(y, plain(layer, inputs)) and not same(y, resting)]
    assert runs
    if layer.drops == "zero" and layer.kind == "insert":
        assert any(bool((y == 0).any()) for y in runs)


def keeps_only_what_it_learns_in_state_dict(make: Make) -> None:
    layer, twin = make(), make.fresh()
    names = sorted(learned(layer))
    assert sorted(layer.state_dict()) == sorted(name for name, _ in layer.named_parameters()) == names
    twin.load_state_dict(layer.state_dict())
    assert all(torch.equal(twin.get_parameter(name), layer.get_parameter(name)) for name in names)
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


def refuses_places_in_words(make: Make) -> None:
    """What `build` lets pass, forward can take; the rest is refused with the name of the site, and what was there."""
    if make().kind == "swap":  # it is `bind` that looks at the place
        with pytest.raises(SurgeryError, match=r"(?s)\w+.*: expected .+, got .+"):
            make.cls(**make.arguments).bind(nn.Identity())
        return
    taken = 0
    for (shape, axis), producer in itertools.product(PLACES, PRODUCERS):
        layer = make.cls(**make.arguments)
        layer.producer = producer
        try:
            layer.build(channel_axis=axis, channels=shape[axis or 0], shape=shape, site_id="a.b#0:c.d")
        except SurgeryError as error:
            assert re.match(r"\w+ at a\.b#0:c\.d: expected .+, got .+", str(error), re.S), error
            continue
        taken += 1
        if needs_labels(layer):
            layer.register_forward_pre_hook(tell_labels)
        inputs = tuple(torch.randn(shape) for _ in range(2 if layer.kind == "combine" else 1))
        y = layer(*inputs)
        assert y.shape == shape and y.isfinite().all()
        assert 0 < layer.expected_drop(shape) < 1 or learned(layer)  # some have to learn first what to drop
    assert taken


def repeats_by_global_seed(make: Make) -> None:
    layer = make()
    inputs = inputs_of(layer)
    first = draws(layer, inputs, 40)
    assert same(first, draws(layer, inputs, 40))
    assert repeat_or_not(layer, first)


def repeats_by_key(make: Make) -> None:
    inputs = inputs_of(make())

    def run(site: str, seed: int, noise: int) -> list[Any]:
        layer = make()
        layer.context, layer.site_id = Context(seed), site
        torch.manual_seed(noise)
        return [layer(*(x + 0 * torch.rand(()).to(x.dtype) for x in inputs)) for _ in range(40)]

    first = run("a", seed=1, noise=2)
    assert same(first, run("a", seed=1, noise=3))
    assert repeat_or_not(make(), first)
    for other in (run("b", seed=1, noise=2), run("a", seed=2, noise=2)):
        assert same(first, other) != is_random(make())


def survives_copies(make: Make) -> None:
    layer = make()
    inputs = inputs_of(layer)
    set_rates(layer, 0.4)
    layer.context, layer.site_id = Context(), "site"
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert repr(twin) == repr(layer) and twin.site_id == "site"
        assert same(draws(layer, inputs, 5), draws(twin, inputs, 5))
        set_rates(twin, 0.0)
        assert learned(twin) or is_silent(twin, inputs, twin(*inputs))
        assert all(layer.get_buffer(name) != 0 for name in rates_of(layer))


def compiles_with_a_moving_rate(make: Make) -> None:
    eager, compiled = make(), make()
    for layer in (eager, compiled):
        layer.context, layer.site_id = Context(seed=3), "site"
    given = inputs_of(eager)
    whole = _compiles_whole(eager, given)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(compiled, fullgraph=whole, backend=counter)
    for step, rate in enumerate((0.0, 0.1, 0.2, 0.3, 0.0, 0.4)):
        outcomes = []
        for layer, call in ((eager, eager), (compiled, run)):
            set_rates(layer, rate)
            layer.context.step = step
            inputs = leaves(given)
            y = call(*inputs)
            total(y).backward()
            outcomes.append((y, gradients(layer, inputs)))
        (y, grads), (compiled_y, compiled_grads) = outcomes
        assert close(compiled_y, y) and agree(compiled_grads, grads)
    assert counter.frame_count <= 2 or not whole


def _compiles_whole(layer: Regularizer, inputs: Inputs) -> bool:
    """Whether the host alone becomes one graph, which torch refuses to make of an LSTM."""
    if layer.kind != "swap":
        return True
    torch._dynamo.reset()
    try:
        torch.compile(copy.deepcopy(layer.host), fullgraph=True, backend="eager")(*inputs)
    except torch._dynamo.exc.TorchDynamoException:
        return False
    return True


def recomputes_the_same(make: Make) -> None:
    """Where a checkpoint runs forward once more, inside backward, it meets the numbers of the first time."""
    given = [inputs_of(make()) for _ in range(6)]
    ways = (False, True) if given[0][0].is_floating_point() else (False,)  # True needs an input with a gradient
    for seed in (None, 5):

        def run(how: Callable[..., Any], seed: int | None = seed) -> tuple[list[Any], list[Tensor | None]]:
            layer = make()
            layer.context, layer.site_id = Context(seed), "site"
            torch.manual_seed(0)
            calls = []
            for each in given:  # all forwards before all backwards, as in gradient accumulation
                inputs = leaves(each)
                calls.append((inputs, how(layer, *inputs)))
                torch.rand(3)
            for _, y in calls:
                total(y).backward()
            grads = [x.grad for inputs, _ in calls for x in inputs]
            return [y for _, y in calls], grads + gradients(layer, ())

        expected, grads = run(lambda layer, *inputs: layer(*inputs))
        for reentrant in ways:

            def how(layer: Regularizer, *inputs: Tensor, reentrant: bool = reentrant) -> Any:
                # Flat, as one way of checkpointing gives no gradients to tensors within tuples within tuples.
                return checkpoint(lambda *xs: tuple(tree_leaves(layer(*xs))), *inputs, use_reentrant=reentrant)

            y, recomputed = run(how)
            assert close(y, expected) and agree(recomputed, grads)


def takes_every_shape(make: Make) -> None:
    layer = make()
    layer.context = Context(seed=1)
    (x, *rest) = inputs_of(layer)
    with torch.device("meta"):  # a default device that is not the input's
        assert all(y.device == x.device for y in tree_leaves(layer(x, *rest)))
        assert 0 < layer.expected_drop(tuple(x.shape)) < 1
    for shape, dtype in itertools.product(SHAPES, (torch.float32, torch.float64, torch.bfloat16, torch.float16)):
        if layer.kind == "swap" and not takes_other_inputs(layer):
            shape = shape[0], *SHAPE[1:]  # the host says what the rest has to be
        for mixed in (False, True):
            _takes(make(shape), shape, dtype, mixed)


def _takes(layer: Regularizer, shape: tuple[int, ...], dtype: torch.dtype, mixed: bool) -> None:
    inputs = leaves(inputs_of(layer, shape), dtype)
    if layer.kind == "swap":
        layer.host.to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16) if mixed else nullcontext():
        try:
            expected = plain(layer, inputs)
        except RuntimeError:  # some hosts take no empty batch, or not that dtype
            assert layer.kind == "swap"
            return
        y = layer(*inputs)
    total(y).backward()
    for got, wanted in zip(tree_leaves(y), tree_leaves(expected), strict=True):
        assert got.shape == wanted.shape and got.dtype == wanted.dtype and got.isfinite().all()
    assert all(x.grad.isfinite().all() for x in inputs if x.requires_grad)


def keeps_the_layout(make: Make) -> None:
    layer = make()
    inputs = inputs_of(layer)
    alike = close if layer.kind == "swap" else same  # a host may add up in another order
    (expected,), (dense, *_) = draws(layer, inputs), tree_leaves(plain(layer, inputs))
    assert tree_leaves(expected)[0].stride() == dense.stride()
    grads = []
    for turn in (torch.clone, _sliced, _channels_last):
        turned = tuple(turn(x) for x in inputs)
        (y,), (dense, *_) = draws(make(), turned), tree_leaves(plain(layer, turned))
        assert alike(y, expected)
        assert turn is _sliced or tree_leaves(y)[0].stride() == dense.stride()
        starts = tuple(turn(x).detach().requires_grad_(x.is_floating_point()) for x in inputs)
        first = tree_leaves(draws(make(), starts)[0])[0]
        first.backward(torch.ones(first.shape))  # a contiguous gradient for all
        grads.append([x.grad for x in starts if x.requires_grad])
    assert alike(grads[0], grads[1]) and alike(grads[0], grads[2])


def _sliced(x: Tensor) -> Tensor:
    return torch.stack([x, x], -1).flatten(-2)[..., ::2]


def _channels_last(x: Tensor) -> Tensor:
    return x.to(memory_format=torch.channels_last) if x.dim() == 4 else x.clone()


def reads_nothing_from_the_device(make: Make) -> None:
    layer = make()
    inputs = inputs_of(layer)
    layer.to("meta")  # where a tensor has no value to be read
    if layer.kind == "swap":
        layer.host.to("meta", torch.bfloat16)
    inputs = leaves(tuple(x.to("meta") for x in inputs), torch.bfloat16)
    y, expected = layer(*inputs), plain(layer, inputs)
    total(y).backward()
    for got, wanted in zip(tree_leaves(y), tree_leaves(expected), strict=True):
        assert got.is_meta and got.shape == wanted.shape and got.dtype == wanted.dtype


def keeps_little_for_backward(make: Make) -> None:
    """At most a byte an element, and what is the caller's anyway."""
    layer = make()
    if layer.kind == "swap":  # layers keep what they keep
        return
    inputs = leaves(inputs_of(layer))
    own = {each.untyped_storage().data_ptr() for each in (*inputs, *layer.parameters(), *layer.buffers())}
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        y = layer(*inputs)
    assert sum(size for where, size in kept.items() if where not in own) <= y.numel() + 4096


def differentiates_twice(make: Make) -> None:
    layer = make()
    inputs = leaves(inputs_of(layer))
    wanted = [x for x in inputs if x.requires_grad] or list(layer.host.parameters())
    first = torch.autograd.grad(total(layer(*inputs)), wanted, create_graph=True)
    for grad in torch.autograd.grad(total(first), wanted):
        assert grad.isfinite().all() and grad.any()


def drops_what_it_expects(make: Make) -> None:
    layer = make()
    inputs = tuple(x.abs() + 0.1 if x.is_floating_point() else x for x in inputs_of(layer))
    expected = layer.expected_drop(tuple(inputs[0].shape))
    assert 0 < expected < 1
    if layer.uncounted:
        return
    if layer.by_values:
        expected = sum(layer.realised_drop(*inputs) for _ in range(300)) / 300
        assert 0 < expected < 1
    before = plain(layer, inputs)
    by_zeros = layer.drops == "zero" or layer.by_values
    changed = (y == 0 if by_zeros else y != before for y in draws(layer, inputs, 300))
    shares = torch.stack([each.double().mean() for each in changed])
    assert abs(shares.mean() - expected) <= 4 * shares.std() / len(shares) ** 0.5


def follows_transforms_of_functions(make: Make) -> None:
    """`torch.func.grad` belongs to the result that was drawn; `vmap` draws apart or alike as asked, by a seed alike."""
    layer = make()
    inputs = inputs_of(layer)
    if inputs[0].is_floating_point():
        inputs = tuple(x.abs() + 0.1 for x in inputs)
        y, pull = torch.func.vjp(lambda *given: tree_leaves(layer(*given))[0], *inputs)
        grad = pull(torch.ones_like(y))[0]
        assert grad.isfinite().all() and grad.any()
        if layer.kind == "insert" and layer.drops == "zero" and not learned(layer):
            assert torch.equal(grad == 0, y == 0)
    if _maps_over(lambda *given: plain(layer, given), inputs):
        _maps_as_asked(layer, inputs)


def _maps_over(call: Callable[..., Any], inputs: Inputs) -> bool:
    """Whether torch itself can map over a host."""
    try:
        torch.func.vmap(call)(*(x[None] for x in inputs))
    except RuntimeError:
        return False
    return True


def _maps_as_asked(layer: Regularizer, inputs: Inputs) -> None:
    entries = [torch.stack([x] * 32) for x in inputs]

    def mapped(randomness: str) -> Tensor:
        return tree_leaves(torch.func.vmap(layer, randomness=randomness)(*entries))[0]

    apart, alike = mapped("different"), mapped("same")
    assert all(torch.equal(y, alike[0]) for y in alike)
    assert all(torch.equal(y, apart[0]) for y in apart) != is_random(layer)
    if layer.drops == "zero" and not layer.uncounted and not layer.by_values:
        shares = torch.stack([(y == 0).double().mean() for y in torch.cat([apart, mapped("different")])])
        expected = layer.expected_drop(tuple(inputs[0].shape))
        assert abs(shares.mean() - expected) <= 4 * shares.std() / len(shares) ** 0.5
    layer.context, layer.site_id = Context(seed=3), "site"
    assert torch.equal(*mapped("same")[:2])
    if is_random(layer):
        with pytest.raises(SurgeryError, match="randomness='same'"):
            mapped("different")


LAWS = [
    declares_itself,
    off_is_identity,
    forced_runs_in_eval,
    keeps_only_what_it_learns_in_state_dict,
    keeps_rates_in_float32,
    refuses_bad_rates,
    refuses_places_in_words,
    repeats_by_global_seed,
    repeats_by_key,
    survives_copies,
    compiles_with_a_moving_rate,
    recomputes_the_same,
    takes_every_shape,
    keeps_the_layout,
    reads_nothing_from_the_device,
    keeps_little_for_backward,
    differentiates_twice,
    drops_what_it_expects,
    follows_transforms_of_functions,
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
    law(Make(catalogue.load("regularizers", name), **example))


# ---- the laws, tested: regularizers of each kind that keep them all, and breaches of each ----


class Kept(Regularizer):
    paper, summary, placement, examples = "a paper", "a summary", "a place", ({"p": 0.2},)

    def __init__(self, p: Rate = 0.2) -> None:
        super().__init__(p=p)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(x) if self.active else x

    def drop(self, x: Tensor) -> Tensor:
        kept = uniform(x.shape, x.device, self.next_key()) >= self.p
        return x * kept * (1 / (1 - self.p)).to(x.dtype)

    def expected_drop(self, shape: tuple[int, ...]) -> float:
        return float(self.p)


class Noisy(Kept):
    drops = "other"

    def drop(self, x: Tensor) -> Tensor:
        return x + (uniform(x.shape, x.device, self.next_key()) < self.p).to(x.dtype)


class Joined(Kept):
    kind, uncounted = "combine", "a branch is dropped, and the other is there"

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        if not self.active:
            return a + b
        coins = uniform([len(b)] + [1] * (b.dim() - 1), b.device, self.next_key())
        return a + b * (coins >= self.p).to(b.dtype)


class Hosted(Kept):
    kind, needs, uncounted = "swap", "a Conv2d", "its input is dropped"

    def bind(self, host: nn.Module) -> None:
        if not isinstance(host, nn.Conv2d):
            raise SurgeryError(f"hosted at {self.site_id}: expected a Conv2d, got {type(host).__name__}")
        super().bind(host)

    @staticmethod
    def example_host() -> nn.Module:
        return nn.Conv2d(6, 4, 3)

    def forward(self, x: Tensor) -> Any:
        return type(self.host).forward(self.host, self.drop(x) if self.active else x)


class Words(nn.Module):
    """A layer that takes no maps, and gives more than one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 4)

    def forward(self, words: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        vectors = self.embedding(words)
        return vectors, {"mean": vectors.mean(1)}


class Worded(Kept):
    kind, needs, uncounted = "swap", "Words", "words are dropped from the middle of the layer"

    def bind(self, host: nn.Module) -> None:
        if not isinstance(host, Words):
            raise SurgeryError(f"worded at {self.site_id}: expected Words, got {type(host).__name__}")
        super().bind(host)

    @staticmethod
    def example_host() -> nn.Module:
        return Words()

    @staticmethod
    def example_inputs(batch: int) -> Inputs:
        return (torch.randint(9, (batch, 5)),)

    def forward(self, words: Tensor) -> Any:
        if not self.active:
            return type(self.host).forward(self.host, words)
        vectors = self.drop(self.host.embedding(words))
        return vectors, {"mean": vectors.mean(1)}


class Sequenced(Hosted):
    needs = "an LSTM"

    def bind(self, host: nn.Module) -> None:
        if not isinstance(host, nn.LSTM):
            raise SurgeryError(f"sequenced at {self.site_id}: expected an LSTM, got {type(host).__name__}")
        Regularizer.bind(self, host)

    @staticmethod
    def example_host() -> nn.Module:
        return nn.LSTM(5, 4, batch_first=True)

    @staticmethod
    def example_inputs(batch: int) -> Inputs:
        return (torch.randn(batch, 6, 5),)


class Strengthened(Kept):
    learned, eval_rule = ("strength",), "times the strength of its channel"

    def build(self, *, channel_axis: int | None, channels: int | None, shape: tuple[int, ...], site_id: str) -> None:
        if channel_axis is None:
            raise SurgeryError(f"strengthened at {site_id}: expected a known channel axis, got none")
        super().build(channel_axis=channel_axis, channels=channels, shape=shape, site_id=site_id)
        self.strength = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        sizes = [1] * x.dim()
        sizes[self.channel_axis] = -1
        strong = x * self.strength.to(x.dtype).view(sizes)
        return self.drop(strong) if self.active else strong


class Strongest(Strengthened):
    random, uncounted = False, "a count of channels"

    def drop(self, x: Tensor) -> Tensor:
        sizes = [1] * x.dim()
        sizes[self.channel_axis] = -1
        rank = self.strength.argsort(descending=True, stable=True).argsort()
        return x * (rank + 1 > self.p * len(rank)).view(sizes)


GOOD = [Kept, Noisy, Joined, Hosted, Worded, Sequenced, Strengthened, Strongest]


class Nameless(Kept):
    paper = ""


class Unplaced(Kept):
    placement = ""


class Shapeless(Kept):
    shapes = ""


class Needless(Hosted):
    needs = ""


class Restless(Kept):
    def forward(self, x: Tensor) -> Tensor:
        return self.drop(x) if self.training else x


class Rounding(Joined):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return super().forward(a, b) if self.active else (a.double() + b.double() + 1e-6).to(a.dtype)


class Replacing(Hosted):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x) if self.active else super().forward(x * 1.01)


class Strong(Strengthened):
    def build(self, **facts: Any) -> None:
        super().build(**facts)
        nn.init.constant_(self.strength, 2)


class Unforced(Kept):
    def forward(self, x: Tensor) -> Tensor:
        return self.drop(x) if self.training and self._nonzero else x


class Saved(Kept):
    def __init__(self, p: Rate = 0.2) -> None:
        super().__init__(p)
        self.register_buffer("seen", torch.zeros(()))


class Secret(Strengthened):
    def build(self, **facts: Any) -> None:
        super().build(**facts)
        self.other = nn.Parameter(torch.ones(()))


class Holding(Hosted):
    def bind(self, host: nn.Module) -> None:
        super().bind(host)
        self.layer = host


class Halved(Kept):
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Regularizer:
        return nn.Module._apply(self, fn, recurse)


class Lenient(Kept):
    def set_rate(self, name: str, value: float) -> None:
        self.p.fill_(min(max(float(value or 0), 0), 1))


class Trusting(Kept):
    def drop(self, x: Tensor) -> Tensor:
        b, c, _, _ = x.shape
        return x * (uniform((b, c, 1, 1), x.device, self.next_key()) >= self.p)


class Wordless(Kept):
    def build(self, *, shape: tuple[int, ...], **facts: Any) -> None:
        if len(shape) != 4:
            raise SurgeryError("no")


class Bound(Hosted):
    def bind(self, host: nn.Module) -> None:
        Regularizer.bind(self, host)


class Elsewhere(Kept):
    generator = torch.Generator().manual_seed(0)

    def drop(self, x: Tensor) -> Tensor:
        return x * (torch.rand(x.shape, generator=self.generator) >= self.p)


class Counting(Kept):
    forwards = 0

    def drop(self, x: Tensor) -> Tensor:
        self.forwards += 1
        return x * (uniform(x.shape, x.device, torch.tensor(self.forwards)) >= self.p)


class Calm(Kept):
    random = False


class Excited(Strongest):
    random = True


class Unkeyed(Kept):
    def drop(self, x: Tensor) -> Tensor:
        return x * (torch.rand_like(x) >= self.p)


class Uncopied(Kept):
    def __deepcopy__(self, memo: dict) -> Regularizer:
        return self


class Baked(Kept):
    def drop(self, x: Tensor) -> Tensor:
        return x * (uniform(x.shape, x.device, self.next_key()) >= self._rates["p"])


class BakedNoise(Noisy):
    def drop(self, x: Tensor) -> Tensor:
        return x + (uniform(x.shape, x.device, self.next_key()) < self._rates["p"])


class BakedSequence(Sequenced):
    def drop(self, x: Tensor) -> Tensor:
        return super().drop(x) if not torch.compiler.is_compiling() else x * 0.9


class ElsewhereJoined(Joined):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b * (torch.rand(len(b), 1, 1, 1, generator=Elsewhere.generator) >= self.p)


class Growing(Kept):
    def drop(self, x: Tensor) -> Tensor:
        return super().drop(x).float()


class GrowingHost(Hosted):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x).float() if self.active else super().forward(x)


class Flattening(Kept):
    def drop(self, x: Tensor) -> Tensor:
        return super().drop(x).contiguous()


class FlatteningHost(Hosted):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x).contiguous()


class Reading(Kept):
    def drop(self, x: Tensor) -> Tensor:
        return x * (uniform(x.shape, x.device, self.next_key()) >= float(self.p))


class Hoarding(Kept):
    def drop(self, x: Tensor) -> Tensor:
        return x * (uniform(x.shape, x.device, self.next_key()) >= self.p).float()


class Once(Kept):
    def drop(self, x: Tensor) -> Tensor:
        return _Once.apply(x)


class Detached(Kept):
    def drop(self, x: Tensor) -> Tensor:
        return x + (super().drop(x) - x).detach()


class Untransformed(Kept):
    def drop(self, x: Tensor) -> Tensor:
        return _Once.apply(super().drop(x))


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad * ctx.saved_tensors[0]


class Boastful(Kept):
    def expected_drop(self, shape: tuple[int, ...]) -> float:
        return 0.25


class BoastfulNoise(Noisy):
    def expected_drop(self, shape: tuple[int, ...]) -> float:
        return 0.25


class Endless(Joined):
    def expected_drop(self, shape: tuple[int, ...]) -> float:
        return 1.5


BREACHES = {
    declares_itself: [Nameless, Unplaced, Shapeless, Needless],
    off_is_identity: [Restless, Rounding, Replacing, Strong],
    forced_runs_in_eval: [Unforced],
    keeps_only_what_it_learns_in_state_dict: [Saved, Secret, Holding],
    keeps_rates_in_float32: [Halved],
    refuses_bad_rates: [Lenient],
    refuses_places_in_words: [Trusting, Wordless, Bound],
    repeats_by_global_seed: [Elsewhere, Calm, Excited],
    repeats_by_key: [Unkeyed, Calm, Excited],
    survives_copies: [Uncopied],
    compiles_with_a_moving_rate: [Baked, BakedNoise, BakedSequence],
    recomputes_the_same: [Elsewhere, ElsewhereJoined, Counting],
    takes_every_shape: [Growing, GrowingHost],
    keeps_the_layout: [Flattening, FlatteningHost],
    reads_nothing_from_the_device: [Reading],
    keeps_little_for_backward: [Hoarding],
    differentiates_twice: [Once],
    drops_what_it_expects: [Boastful, BoastfulNoise, Endless],
    follows_transforms_of_functions: [Untransformed, Elsewhere, Detached],
}


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("good", GOOD, ids=lambda cls: cls.__name__)
def test_law_is_kept_by_the_good(law: Callable[[Make], None], good: type[Kept]) -> None:
    torch.manual_seed(0)
    law(Make(good))


@pytest.mark.parametrize(
    ("law", "breach"),
    [(law, breach) for law, breaches in BREACHES.items() for breach in breaches],
    ids=lambda each: each.__name__,
)
def test_law_sees_its_breach(law: Callable[[Make], None], breach: type[Kept]) -> None:
    torch.manual_seed(0)
    with pytest.raises((AssertionError, pytest.fail.Exception, RuntimeError, ValueError)):
        law(Make(breach))


def test_each_law_has_a_breach() -> None:
    assert list(BREACHES) == LAWS
