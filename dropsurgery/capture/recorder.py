"""Recording: one graph for each module of the tree, one level deep, made by running each forward once.

The forwards run on a throw-away copy of the tree (a probe) under fake tensors: nothing of the model given is
touched, patched or computed. Each call of a child becomes one `call_module` node of its caller's graph and,
unless the child is a leaf, a level of its own. A forward that cannot be recorded stays opaque, and only that:
it is run once more, plainly, on fake values or on numbers, so that its children are recorded all the same.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode

from dropsurgery.capture.frame import Frame, placeholders
from dropsurgery.capture.levels import Component, Inputs, Leaf, Level, Opaque, describe, is_leaf, kept, map_tree
from dropsurgery.capture.nodes import drop_unused
from dropsurgery.capture.numbers import fakes_in, has_data, made_up, numbers_in
from dropsurgery.capture.probes import Intercepted, forward_of, make_probe
from dropsurgery.capture.siblings import Siblings
from dropsurgery.capture.traced import OPERATORS, Traced, Untraceable
from dropsurgery.capture.values import Values
from dropsurgery.capture.watching import draws, same_draws, watched
from dropsurgery.errors import CaptureError
from dropsurgery.graph import IN_PLACE
from dropsurgery.trees import collectors_of, copy_tree, home_of_hook, hooks_of, path_below, paths_of

_LOCK = threading.RLock()


class ModelFailed(Exception):
    """The model's own forward raised on plain values: its error is the cause."""


@dataclass(frozen=True)
class _Observed:
    """A call that a forward made while it ran plainly."""

    probe: nn.Module
    inputs: Inputs
    output: Any


class Recorder(TorchFunctionMode):
    """Records the calls of one model. Use through `record`."""

    def __init__(
        self, root: nn.Module, training: bool | None, start: str, *, share: bool, watches_draws: bool = False
    ) -> None:
        super().__init__()
        copies = copy_tree(root, make_probe, share_tensors=False)
        self.root = copies[root]
        self.original = {copy: module for module, copy in copies.items()}
        self.values = Values()
        self.frames: list[Frame] = []
        self._observed: list[_Observed] | None = None
        # By the originals: to ask a probe for its children is slow.
        paths = paths_of(root)
        self._paths = {copies[module]: paths[module] for module in paths}
        self.siblings = Siblings(self.values, self.original, paths)
        if not share:
            self.siblings.stop()
        self.start = self.root.get_submodule(start)
        self.watches_draws = watches_draws
        self._refused: dict[str, str] = {}
        self._signatures: dict[Any, inspect.Signature] = {}
        hooked = [(copy, name) for module, copy in copies.items() for name in hooks_of(module)]
        collectors = collectors_of(self.root) if hooked else []
        self._collectors = {id(collector) for collector in collectors}
        packages = set(filter(_is_installed, {_package(type(module)) for module in copies} - {"torch"}))
        for probe in self.original:
            fields = probe.__dict__
            fields["_own_forward"] = fields.pop("forward", None)
            fields["forward"] = Intercepted(probe)
            if training is not None:
                fields["training"] = training
            fields["_recorder"] = self
        for probe, name in hooked:
            hooks = probe.__dict__[name]
            for key in [key for key, hook in hooks.items() if not self._is_own(hook, packages)]:
                del hooks[key]

    def _same_draws(self) -> Any:
        return same_draws() if self.watches_draws else nullcontext()

    def _is_own(self, hook: Any, packages: set[str]) -> bool:
        """Whether a hook is a part of the model (it collects what a forward gives out), and not put there by a user."""
        home = home_of_hook(hook)
        within = isinstance(home, nn.Module) and home in self.original
        return within or id(home) in self._collectors or _package(hook) in packages

    def fake(self, tree: Any, known: dict[int, Any] | None = None, device: torch.device | None = None) -> Any:
        """The tree with each tensor replaced by a fake one of its shape, dtype, device (or `device`) and grad flag.

        `known` holds by id what was made before: one tensor in two trees stays one.
        """

        def leaf(item: Any) -> Any:
            if not isinstance(item, torch.Tensor):
                return item
            if known is not None and id(item) in known:
                return known[id(item)]
            if torch._C._len_torch_dispatch_stack() == 0 and item.layout is torch.strided:
                made = self.values.like(item, device=device)
            else:
                with torch.no_grad(), self.values:
                    made = torch.empty_like(item, dtype=item.dtype, device=device or item.device)
            made.requires_grad_(item.requires_grad)
            if known is not None:
                known[id(item)] = made
            return made

        return map_tree(tree, leaf)

    def release(self) -> None:
        """Let go of the model's tensors now: probes stand in cycles, and would keep them until garbage is collected."""
        for probe in self.original:
            probe.__dict__.clear()
        self.original.clear()
        self._paths.clear()
        self.siblings.release()

    # -- names ------------------------------------------------------------------------------------------------
    def relative(self, probe: nn.Module, owner: str) -> str:
        below = path_below(self._paths[probe], owner)
        if not below:
            raise Untraceable(f"calls module '{self._paths[probe][0]}', which is not below it")
        return below

    def signature_of(self, forward: Any) -> inspect.Signature:
        """The signature of a forward; to ask for it takes long, and a class has one for all its modules."""
        if type(forward) is not functools.partial or len(forward.args) != 1 or forward.keywords:
            return inspect.signature(forward)
        if forward.func not in self._signatures:
            self._signatures[forward.func] = inspect.signature(forward)
        return self._signatures[forward.func]

    # -- calls ------------------------------------------------------------------------------------------------
    def _shielded(self, probe: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A leaf's forward on fake buffers: in training it may write to them."""

        def run(*args: Any, **kwargs: Any) -> Any:
            for module in probe.modules():
                module._buffers.update(self.fake(dict(module._buffers)))
            return forward(*args, **kwargs)

        return run

    def record_call(
        self, probe: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], data: Inputs | None = None
    ) -> tuple[Any, Any]:
        """Record one call on fake values: what was called, and the value that it gave.

        `data` are the arguments as numbers, where they are known.
        """
        path = self._paths[probe][0]
        module = self.original[probe]
        forward = forward_of(probe)
        if is_leaf(module):
            with self.aside():
                value = self.values.of_leaf(module, self._shielded(probe, forward), args, kwargs)
            if not isinstance(module, nn.Linear) or isinstance(value, torch.Tensor):
                return Leaf(module, path), value
            # A subclass that gives more than a linear layer does is more than one: a router with its choice.
        key = self.siblings.key(probe, args, kwargs)
        known = None if key is None else self.siblings.level_of(key, probe, args, kwargs)
        if known is not None:
            return known, known.output
        frame = Frame(self, probe, path)
        with self._same_draws():
            try:
                value = self._run_level(frame, forward, args, kwargs)
                if key is not None:
                    self.siblings.keep(key, frame.level, args, kwargs)
                return frame.level, value
            except ModelFailed:
                raise
            except (Exception, Untraceable) as error:
                failed = error
            finally:
                frame.close()
        opaque = Opaque(module, path, f"{type(failed).__name__}: {failed}", (args, kwargs), line=_line_of(failed))
        with self._same_draws(), self.aside():
            return opaque, self._run_opaque(opaque, probe, data)

    def _run_level(self, frame: Frame, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        frame.level.inputs = map_tree((args, kwargs), lambda item: item)  # the forward may change lists given to it
        with frame.binding():
            traced_args, traced_kwargs = placeholders(frame, forward, args, kwargs)
        drawn = draws() if self.watches_draws else None
        self.frames.append(frame)
        try:
            with self:
                result = forward(*traced_args, **traced_kwargs)
        finally:
            self.frames.pop()
        frame.settle()
        if self.watches_draws and draws() != drawn:
            raise Untraceable("draws random numbers that are not torch's")
        output = frame.to_nodes(result)
        frame.give_back()
        frame.graph.output(output)
        drop_unused(frame.graph, {guard.node for guard in frame.level.guards})
        frame.level.output = frame.to_values(result)
        return frame.level.output

    def _run_opaque(self, opaque: Opaque, probe: nn.Module, data: Inputs | None) -> Any:
        """Run a forward that stays Python once, as it is; then record what it called."""
        known: dict[int, Any] = {}
        try:
            value, calls = self._observe(probe, opaque.inputs, fakes_in(probe, self))
        except ModelFailed:
            raise
        except (Exception, Untraceable) as failure:
            value, calls = self._observe_on_data(opaque, probe, failure, data)
            opaque.on_data = True
        # Made-up numbers are on the CPU; what they stand for is where the model is.
        device = torch.device("meta") if opaque.on_data and _on_meta(opaque.module) else None

        def faked(tree: Any) -> Any:
            return self.fake(tree, known, device) if opaque.on_data else tree

        for call in calls:
            inputs, output = faked(call.inputs), faked(call.output)
            made: Level | Opaque | Leaf = Leaf(self.original[call.probe], self._paths[call.probe][0])
            if not is_leaf(made.module):
                made, _ = self.record_call(call.probe, inputs[0], inputs[1], call.inputs if opaque.on_data else None)
            opaque.components.append(Component(made, inputs, output))
            for probe in self._not_met(call, calls) if opaque.on_data else ():
                made, output = self.record_call(probe, inputs[0], inputs[1], call.inputs)
                opaque.components.append(Component(made, inputs, output))
        return faked(value)

    def _not_met(self, call: _Observed, calls: list[_Observed]) -> list[nn.Module]:
        """The modules beside the first called of a list that numbers left out, as they do experts: others call them."""
        called = {other.probe: None for other in calls}
        for home in self.start.modules():
            beside = [child for child in home._modules.values() if child is not None and _alike(child, call.probe)]
            if isinstance(home, (nn.ModuleList, nn.ModuleDict)) and call.probe in beside:
                first = next(probe for probe in called if probe in beside)
                return [child for child in beside if child not in called] if first is call.probe else []
        return []

    def _observe_on_data(
        self, opaque: Opaque, probe: nn.Module, failure: BaseException, data: Inputs | None
    ) -> tuple[Any, list[_Observed]]:
        """What only numbers can tell: run the forward on some.

        Raises:
            ModelFailed: it refuses them as well, and they are those that it is to take.
            Untraceable: it refuses numbers that were only made up; its caller may know the right ones.
        """
        try:
            value, calls = self._observe(probe, data or made_up(opaque.inputs), numbers_in(probe))
            return value, calls or self._calls_of_ones(opaque, probe)
        except ModelFailed:
            raise
        except (Exception, Untraceable) as error:
            alike = type(error) is type(failure) and str(error) == str(failure)
            self._refused.setdefault(str(error), opaque.path)
            if data is not None or alike or probe is self.start:
                raise ModelFailed(self._refused[str(error)]) from error
            raise Untraceable(f"'{opaque.path}' refuses made-up numbers: {error}") from error

    def _calls_of_ones(self, opaque: Opaque, probe: nn.Module) -> list[_Observed]:
        """What a forward calls on ones for whole numbers: on zeros, a mask of what goes to whom, it called nothing."""
        if not any(next(child.parameters(), None) is not None for child in probe.children()):
            return []
        try:
            return self._observe(probe, made_up(opaque.inputs, whole=1), numbers_in(probe))[1]
        except (Exception, Untraceable):  # ones are no indices there
            return []

    def _observe(
        self, probe: nn.Module, inputs: Inputs, tensors: AbstractContextManager[None]
    ) -> tuple[Any, list[_Observed]]:
        """Run a forward plainly, while `tensors` holds others in it, and note the calls that it makes itself."""
        self._observed = []
        self.siblings.stop()  # a forward that runs as it is may change anything
        try:
            with tensors, torch.no_grad():
                args, kwargs = kept(inputs)
                value = forward_of(probe)(*args, **kwargs)
            return value, self._observed
        finally:
            self._observed = None

    def intercept(self, probe: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a probe's forward does instead of itself."""
        if self.frames:
            return self.frames[-1].call_child(probe, args, kwargs)
        if self._observed is None:
            return forward_of(probe)(*args, **kwargs)
        observed, self._observed = self._observed, None
        try:
            inputs = kept((args, kwargs))
            value = forward_of(probe)(*args, **kwargs)
        finally:
            self._observed = observed
        observed.append(_Observed(probe, inputs, map_tree(value, lambda item: item)))
        return value

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Run something of the model without recording it."""
        frames, observed = self.frames, self._observed
        self.frames, self._observed = [], None
        try:
            yield
        finally:
            self.frames, self._observed = frames, observed

    def read(self, probe: nn.Module, name: str, value: Any) -> Any:
        """The forward under recording read an attribute: a tensor becomes a node, all else is taken for granted."""
        if not self.frames or self.values.running:
            return value
        frame = self.frames[-1]
        if isinstance(value, Traced) or (probe is frame.probe and name in frame.level.sets):  # set by this forward
            return value
        if id(value) in self._collectors:
            raise Untraceable(f"takes from its attribute {name!r} what hooks have put there")
        if isinstance(value, torch.Tensor):
            return frame.attribute(value, probe, name)
        below = path_below(self._paths[probe], frame.path) if probe is not frame.probe else ""
        frame.note_read(below, name, value)
        return value

    def writes(self, probe: nn.Module, name: str, value: Any) -> bool:
        """Whether an attribute is really set.

        No graph can say it. But `self.x += 1` only gives `x` back to itself, and what was made from sizes and constants
        alone, to be used again, can as well be made anew at each call.
        """
        if not self.frames or self.values.running:
            self.siblings.stop()
            return True
        frame = self.frames[-1]
        if isinstance(value, nn.Module) and probe.__dict__["_modules"].get(name) is value:
            return False  # it is there already
        if probe is frame.probe and (frame.notes_down(name, value) or frame.makes_anew(name, value)):
            return True
        if probe is frame.probe and frame.holds(name, value):
            return False
        if isinstance(value, Traced) and value._node.target in IN_PLACE:
            changed = value._node.args[0]
            if isinstance(changed, fx.Node) and changed.op == "get_attr" and changed.target == name:
                return False
        raise Untraceable(f"sets its attribute {name!r}")

    def moves(self, probe: nn.Module, fn: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module | None:
        """A module's tensors are sent somewhere: the module where all are there already, None where nothing records.

        Raises:
            Untraceable: they would be others than before.
        """
        if not self.frames or self.values.running:
            return None
        frame = self.frames[-1]
        for module in probe.modules():
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is None:
                    continue
                with torch._C.DisableTorchFunction():
                    before = self.fake(tensor)
                if self.values.run(fn, (before,), {}) is not before:
                    raise Untraceable(f"sends the tensors of '{self._paths[probe][0]}' elsewhere")
                held = frame.attribute(tensor, module, name)
                frame.tensor_guard(held._node, "dtype", tensor.dtype)
                frame.tensor_guard(held._node, "device", tensor.device)
        return probe

    # -- torch functions --------------------------------------------------------------------------------------
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.frames:
            return func(*args, **kwargs)
        frame = self.frames[-1]
        frame._parsed(sys._getframe(1))
        name = getattr(func, "__name__", "")
        if func is torch._C._set_grad_enabled:
            frame.set_grad(*args)
            with torch._C.DisableTorchFunction():
                return func(*args)
        if name == "__get__":  # a property of a tensor that this forward made or holds for itself
            with torch._C.DisableTorchFunction():
                return func(*args)
        if name in OPERATORS or (name.startswith("__r") and "__" + name[3:] in OPERATORS):
            function = OPERATORS.get(name) or OPERATORS["__" + name[3:]]
            return frame.call_function(function, args if name in OPERATORS else args[::-1], kwargs)
        if inspect.ismethoddescriptor(func):
            return frame.call_method(name, args, kwargs)
        return frame.call_function(func, args, kwargs)


def _line_of(error: BaseException) -> str:
    """The last line of the model's own code, or of a library's that it calls, at which an error was met."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith((_HERE, _TORCH)) and frame.line]
    return f"{Path(own[-1].filename).name}:{own[-1].lineno} `{own[-1].line}`" if own else ""


_HERE = str(Path(__file__).parents[1])
_TORCH = str(Path(torch.__file__).parent)


def _alike(one: nn.Module, other: nn.Module) -> bool:
    """Whether two probes are of one class and hold tensors of the same shapes."""
    if type(one) is not type(other):
        return False
    held, others = ({name: p.shape for name, p in probe.named_parameters()} for probe in (one, other))
    return held == others


def _on_meta(module: nn.Module) -> bool:
    """Whether a module's tensors hold no numbers."""
    return any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))


def _package(thing: Any) -> str:
    """The top-level package of a class or function, seen through partials and bound methods."""
    while isinstance(thing, functools.partial):
        thing = thing.func
    return str(getattr(thing, "__module__", None) or "").partition(".")[0]


def _is_installed(package: str) -> bool:
    """Whether a package is a library, and not the user's own project, whose hooks are no part of a model."""
    file = getattr(sys.modules.get(package), "__file__", None) or ""
    return "site-packages" in file or "dist-packages" in file


def record(
    root: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    path: str = "",
    training: bool | None = False,
    share: bool = True,
) -> Level | Opaque | Leaf:
    """Record one call of the module at `path` below `root` (the root itself by default).

    Args:
        root: the model; it is not touched.
        args, kwargs: tensors of any device, only their shapes, dtypes and devices count.
        path: which module is called with them.
        training: the mode of every module while it is recorded; None leaves each its own.
        share: whether the levels of modules that cannot be told apart may have one graph.

    Raises:
        CaptureError: the model's own forward raises on these inputs; its error is the cause.
    """
    with _LOCK, torch.random.fork_rng(devices=[]), _no_autocast_cache(), same_draws() as drawn:
        call = _record(Recorder(root, training, path, share=share), args, kwargs)
        if drawn():  # to look after each forward would take longer than all the rest, and hardly any draws such numbers
            call = _record(Recorder(root, training, path, share=False, watches_draws=True), args, kwargs)
        return call


@contextmanager
def _no_autocast_cache() -> Iterator[None]:
    """Else it would keep fake copies of the weights, and real calls would take them."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def _record(recorder: Recorder, args: Any, kwargs: Any) -> Level | Opaque | Leaf:
    faked = recorder.fake((args, kwargs))
    data = (args, kwargs) if has_data((args, kwargs)) else None
    try:
        with recorder.aside(), watched(recorder):
            call: Level | Opaque | Leaf = recorder.record_call(recorder.start, faked[0], faked[1], data)[0]
            return call
    except ModelFailed as failure:
        where = f", in '{failure}'" if str(failure) else ""
        raise CaptureError(
            f"the model's forward raises on the example input {describe(args, kwargs)}{where}: "
            f"{failure.__cause__!r}. Give `example_inputs` that the model accepts."
        ) from failure.__cause__
    finally:
        recorder.release()
