"""What a law demands of a model and of what surgery made of it, as checks that raise AssertionError.

Each takes a plain model and an emitted one (or any other pair, which `test_checks.py` uses to see each of them fail).
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from dropsurgery import SurgeryError, diff, strip

SLOTS = "_surgery"
INTERNAL = frozenset(nn.Module().__dict__)
PLAIN = (int, float, str, bool, tuple, type(None))
Call = Callable[[nn.Module], Any]


def tensors(tree: Any) -> list[Tensor]:
    """All tensors of nested containers, in order."""
    if isinstance(tree, Tensor):
        return [tree]
    items = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ()
    return [tensor for item in items for tensor in tensors(item)]


def equal(one: Any, other: Any) -> bool:
    """Whether two results hold the same numbers, of the same dtypes."""
    left, right = tensors(one), tensors(other)
    return len(left) == len(right) and all(
        a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(left, right, strict=True)
    )


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Put back modes and buffers, and drop gradients."""
    modes = {module: module.training for module in model.modules()}
    saved = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        with torch.inference_mode(False), torch.no_grad():
            for module, name, buffer, before in saved:
                module._buffers[name] = buffer.copy_(before)
        for module, mode in modes.items():
            module.training = mode
        model.zero_grad()


@dataclass(frozen=True)
class Run:
    """All that one call did: outputs, random state, buffers, gradients, and how many numbers autograd kept."""

    outputs: list[Tensor]
    random: Tensor
    buffers: dict[str, Tensor]
    gradients: dict[str, Tensor]
    kept: int


def run(model: nn.Module, call: Call, training: bool, seed: int = 3) -> Run:
    """Call a model in a mode under a seed, backward included where it trains, and leave it as it was."""
    with restored(model):
        model.train(training)
        torch.manual_seed(seed)
        with counting(model) as kept:
            result = call(model)
        random = torch.get_rng_state()
        outputs = tensors(result)
        buffers = {name: value.clone() for name, value in model.named_buffers() if SLOTS not in name}
        if training and torch.is_grad_enabled():
            sum(output.float().square().mean() for output in outputs if output.requires_grad).backward()  # type: ignore[union-attr]
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return Run(outputs, random, buffers, gradients, sum(kept.values()))


@contextmanager
def counting(model: nn.Module) -> Iterator[dict[int, int]]:
    """How many numbers autograd keeps besides parameters, by storage."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # a node that keeps its own output would never be freed

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def check_same(one: Run, other: Run) -> None:
    """Two runs did the same, bit for bit."""
    assert one.outputs, "nothing came out"
    assert all(bool(torch.isfinite(output).all()) for output in one.outputs), "numbers that hide differences"
    assert equal(one.outputs, other.outputs), "other outputs"
    assert torch.equal(one.random, other.random), "random numbers were drawn"
    assert list(one.buffers) == list(other.buffers), "other buffers"
    assert equal(one.buffers, other.buffers), "buffers were updated otherwise"
    assert list(one.gradients) == list(other.gradients), "other parameters have gradients"
    assert equal(one.gradients, other.gradients), "other gradients"


def check_outputs(model: nn.Module, gm: nn.Module, call: Call) -> None:
    """Law 1: equal in eval and in training while all rates are 0, toggled freely."""
    for training in (False, True, False):
        check_same(run(model, call, training), run(gm, call, training))


def check_error(model: nn.Module, gm: nn.Module, call: Call) -> None:
    """Law 2: what the model refuses, its rewritten self refuses in the same words."""
    errors = []
    for module in (model, gm):
        try:
            run(module, call, training=False)
        except Exception as error:
            errors.append((type(error), str(error)))
    assert len(errors) == 2, "not refused"
    assert errors[0] == errors[1], "refused otherwise"


def check_noise(gm: fx.GraphModule, call: Call) -> None:
    """The regularizers do something in training, and nothing in eval."""
    with gm.surgery.active(p=0.3):
        forced = run(gm, call, training=False)
    assert not equal(run(gm, call, training=False).outputs, forced.outputs), "no noise when forced"
    assert not equal(run(gm, call, True, seed=1).outputs, run(gm, call, True, seed=2).outputs), "no noise in training"
    assert equal(run(gm, call, False, seed=1).outputs, run(gm, call, False, seed=2).outputs), "noise in eval"


def check_state(model: nn.Module, gm: nn.Module) -> None:
    """Law 4: names, order, dtypes and the tensors themselves."""
    assert list(model.state_dict()) == list(gm.state_dict())
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in gm.named_parameters()]
    assert all(a is b for a, b in zip(model.parameters(), gm.parameters(), strict=True)), "other parameters"
    buffers = [(name, buffer) for name, buffer in gm.named_buffers() if SLOTS not in name]
    assert [name for name, _ in model.named_buffers()] == [name for name, _ in buffers]
    assert all(a is b for a, (_, b) in zip(model.buffers(), buffers, strict=True)), "other buffers"


def own_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of the model itself by path."""
    return {name: module for name, module in model.named_modules() if SLOTS not in name.split(".")}


def check_identity(model: nn.Module, gm: nn.Module) -> None:
    """Law 5: the class of every module, the tree, and the plain attributes."""
    assert isinstance(gm, fx.GraphModule), "no GraphModule"
    theirs, ours = own_modules(model), own_modules(gm)
    assert list(ours) == list(theirs), "another tree"
    for name, module in theirs.items():
        assert isinstance(ours[name], type(module)), f"{name}: another class"
        assert type(ours[name]).__name__ == type(module).__name__, f"{name}: another class name"
        assert not hasattr(module, "__len__") or len(ours[name]) == len(module), f"{name}: another length"  # type: ignore[arg-type]
        plain = {k: v for k, v in module.__dict__.items() if isinstance(v, PLAIN) and k not in INTERNAL}
        for key, value in plain.items():
            assert ours[name].__dict__[key] == value, f"{name}.{key} differs"


def snapshot(model: nn.Module) -> Any:
    """A model bit for bit: every entry of every module's `__dict__`, the tensors' numbers, flags and versions."""

    def tensor(item: Tensor | None) -> Any:
        if item is None:
            return None
        data = item.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if item.numel() else b""
        return (id(item), item.data_ptr(), item._version, item.requires_grad, item.dtype, hash(data), id(item.grad))

    def entry(name: str, value: Any) -> Any:
        if name in {"_parameters", "_buffers"}:
            return id(value), tuple((key, tensor(item)) for key, item in value.items())
        if isinstance(value, dict):
            return id(value), tuple((key, id(item)) for key, item in value.items())
        if isinstance(value, (list, set)):
            return id(value), tuple(map(id, value))
        return id(value)

    return tuple(
        (path, type(module), id(module), tuple((name, entry(name, value)) for name, value in module.__dict__.items()))
        for path, module in model.named_modules(remove_duplicate=False)
    )


@contextmanager
def check_untouched(model: nn.Module) -> Iterator[None]:
    """Law 8: model, classes and torch's global state are as before, whatever happens inside."""

    def world() -> Any:
        return (
            torch.get_rng_state().numpy().tobytes(),
            torch.is_grad_enabled(),
            torch.get_default_dtype(),
            torch.get_default_device(),
            nn.Module.__call__,
            nn.Module.__getattr__,
            torch.utils.checkpoint.checkpoint,
            torch.is_grad_enabled,
            torch._C._len_torch_function_stack(),
            torch._C._len_torch_dispatch_stack(),
        )

    before, around = snapshot(model), world()
    try:
        yield
    finally:
        assert snapshot(model) == before, "the model was changed"
        assert world() == around, "something global was changed"


def hook_counts(model: nn.Module, call: Call) -> dict[tuple[str, str], int]:
    """How often each module's hooks fire in a training call."""
    counts: dict[tuple[str, str], int] = {}
    handles = []

    def counter(key: tuple[str, str]) -> Callable[..., None]:
        counts[key] = 0

        def count(*args: Any) -> None:
            counts[key] += 1

        return count

    for path, module in own_modules(model).items():
        handles.append(module.register_forward_pre_hook(counter((path, "before"))))
        handles.append(module.register_forward_hook(counter((path, "after"))))
    run(model, call, training=True)
    for handle in handles:
        handle.remove()
    return counts


def check_hooks(model: nn.Module, gm: nn.Module, call: Call) -> None:
    """Law 7: the hooks of every module fire, as often as they do in the model."""
    expected, counts = hook_counts(model, call), hook_counts(gm, call)
    assert any(expected.values())
    assert counts == expected, {key: (n, counts.get(key)) for key, n in expected.items() if counts.get(key) != n}


def ran(gm: fx.GraphModule, call: Call, training: bool) -> set[str]:
    """The paths of all modules that a call runs, and the ids of the sites."""
    found: set[str] = set()
    handles = []
    named = {**dict(gm.named_modules()), **gm.surgery.regularizers}
    for name, module in named.items():
        handles.append(module.register_forward_hook(lambda *_, name=name: found.add(name)))
    try:
        with torch.no_grad():
            run(gm, call, training)
    finally:
        for handle in handles:
            handle.remove()
    return found


def check_way(gm: fx.GraphModule, name: str, call: Call) -> None:
    """Law 6: this way into a model meets every site that lies on it, or refuses in training by its name."""
    with gm.surgery.active(p=0.0):
        visited = ran(gm, call, training=False)
    modules = dict(gm.named_modules())
    expected = set()
    for site in gm.surgery.regularizers:
        path = site.partition("#")[0]
        leaf = path in modules
        if path in visited if leaf else path.rpartition(".")[0] in visited and path.rpartition(".")[0]:
            expected.add(site)
    try:
        met = ran(gm, call, training=True)
    except SurgeryError as error:
        assert name in str(error), f"refused without a word about {name}: {error}"
        return
    assert expected <= met, f"{name} leaves out {sorted(expected - met)}"


def saved(gm: nn.Module) -> Any:
    """Through a file and back."""
    file = io.BytesIO()
    torch.save(gm, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def check_copy(gm: fx.GraphModule, other: fx.GraphModule, call: Call) -> None:
    """Law 9: a copy does the same, remembers the same, and has tensors and a clock of its own."""
    check_identity(strip(gm), other)
    assert not {p.data_ptr() for p in gm.parameters()} & {p.data_ptr() for p in other.parameters()}, "shared tensors"
    assert other.surgery.progress == gm.surgery.progress, "another step"
    assert list(other.surgery.regularizers) == list(gm.surgery.regularizers), "other sites"
    assert diff(other) == diff(gm), "another diff"
    for training in (True, False):
        check_same(run(gm, call, training), run(other, call, training))
    before = [regularizer.p.item() for regularizer in gm.surgery.regularizers.values()]
    step = gm.surgery.current_step
    other = copy.deepcopy(other)
    other.surgery.step()
    assert (gm.surgery.current_step, other.surgery.current_step) == (step, step + 1), "one clock for two"
    assert before == [regularizer.p.item() for regularizer in gm.surgery.regularizers.values()], "shared rates"
