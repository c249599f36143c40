"""Recording: one graph for each module of the tree, one level deep, made by running each forward once.

The forwards run on a throw-away copy of the tree (a probe) under fake tensors: nothing of the model given is
touched, patched or computed. Each call of a child becomes one `call_module` node of its caller's graph and,
unless the child is a leaf, a level of its own. A forward that cannot be recorded stays opaque, and only that:
it is run once more on plain fake values so that its children are recorded all the same.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode

from dropsurgery.capture.frame import Frame, drop_unused, placeholders
from dropsurgery.capture.levels import Component, Leaf, Level, Opaque, describe, is_leaf, map_tree
from dropsurgery.capture.probes import Intercepted, forward_of, make_probe
from dropsurgery.capture.traced import INPLACE, OPERATORS, Traced, Untraceable
from dropsurgery.capture.values import Values
from dropsurgery.capture.watching import draws, same_draws, watched
from dropsurgery.errors import CaptureError
from dropsurgery.trees import HOOKS, copy_tree, paths_of

_LOCK = threading.RLock()


class ModelFailed(Exception):
    """The model's own forward raised on plain values: its error is the cause."""


class Recorder(TorchFunctionMode):
    """Records the calls of one model. Use through `record`."""

    def __init__(self, root: nn.Module, training: bool | None) -> None:
        super().__init__()
        copies = copy_tree(root, make_probe, share_tensors=False)
        self.root = copies[root]
        self.original = {copy: module for module, copy in copies.items()}
        self.values = Values()
        self.frames: list[Frame] = []
        self._opaque: list[Opaque] = []
        self._paths = paths_of(self.root)
        for probe in self.original:
            fields = probe.__dict__
            fields["_own_forward"] = fields.pop("forward", None)
            fields["forward"] = Intercepted(probe)
            if training is not None:
                fields["training"] = training
            fields["_recorder"] = self
            for name in HOOKS:
                hooks = probe.__dict__.get(name)
                if isinstance(hooks, dict):
                    hooks.clear()

    def fake(self, tree: Any) -> Any:
        """The tree with each tensor replaced by a fake one of the same shape, dtype, device and grad flag."""

        def leaf(item: Any) -> Any:
            if not isinstance(item, torch.Tensor):
                return item
            with torch.no_grad(), self.values:
                made = torch.empty_like(item, dtype=item.dtype, device=item.device)
            return made.requires_grad_(item.requires_grad)

        return map_tree(tree, leaf)

    def release(self) -> None:
        """Let go of the model's tensors now: probes stand in cycles, and would keep them until garbage is collected."""
        for probe in self.original:
            probe.__dict__.clear()
        self.original.clear()
        self._paths.clear()

    # -- names ------------------------------------------------------------------------------------------------
    def relative(self, probe: nn.Module, owner: str) -> str:
        below = _below(self._paths[probe], owner)
        if not below:
            raise Untraceable(f"calls module '{self._paths[probe][0]}', which is not below it")
        return below

    # -- calls ------------------------------------------------------------------------------------------------
    def record_call(self, probe: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Record one call on plain fake values: what was called, and the value that it gave."""
        path = self._paths[probe][0]
        module = self.original[probe]
        forward = forward_of(probe)
        if is_leaf(module):
            with self.aside():
                return Leaf(module, path), self.values.of_leaf(module, forward, args, kwargs)
        frame = Frame(self, probe, path)
        with same_draws():
            try:
                return frame.level, self._run_level(frame, forward, args, kwargs)
            except ModelFailed:
                raise
            except (Exception, Untraceable) as error:
                failed = error
            finally:
                frame.close()
        with same_draws():
            return self._run_opaque(probe, path, failed, args, kwargs)

    def _run_level(self, frame: Frame, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        frame.level.inputs = map_tree((args, kwargs), lambda item: item)  # lists of its own: the forward may change them
        with frame.binding():
            traced_args, traced_kwargs = placeholders(frame, forward, args, kwargs)
        drawn = draws()
        self.frames.append(frame)
        try:
            with self:
                result = forward(*traced_args, **traced_kwargs)
        finally:
            self.frames.pop()
        frame.settle()
        if draws() != drawn:
            raise Untraceable("draws random numbers that are not torch's")
        output = frame.to_nodes(result)
        frame.give_back()
        frame.graph.output(output)
        drop_unused(frame.graph, {guard.node for guard in frame.level.guards})
        frame.level.output = frame.to_values(result)
        return frame.level.output

    def _run_opaque(
        self, probe: nn.Module, path: str, error: BaseException, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Opaque, Any]:
        opaque = Opaque(self.original[probe], path, f"{type(error).__name__}: {error}")
        frames, self.frames = self.frames, []
        for module in probe.modules():  # it may write to them
            for tensors in (module._parameters, module._buffers):
                tensors.update(self.fake(dict(tensors)))
        self._opaque.append(opaque)
        try:
            with torch.no_grad(), self.values:
                value = forward_of(probe)(*args, **kwargs)
        except ModelFailed:
            raise
        except (Exception, Untraceable) as failure:
            raise ModelFailed(path) from failure
        finally:
            self.frames = frames
            self._opaque.pop()
        return opaque, value

    def intercept(self, probe: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a probe's forward does instead of itself."""
        if self.frames:
            return self.frames[-1].call_child(probe, args, kwargs)
        if self._opaque:
            call, value = self.record_call(probe, args, kwargs)
            self._opaque[-1].components.append(Component(call, (args, kwargs), value))
            return value
        return forward_of(probe)(*args, **kwargs)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Run something of the model without recording it."""
        frames, opaque = self.frames, self._opaque
        self.frames, self._opaque = [], []
        try:
            yield
        finally:
            self.frames, self._opaque = frames, opaque

    def read(self, probe: nn.Module, name: str, value: Any) -> Any:
        """The forward under recording read an attribute: a tensor becomes a node, all else is taken for granted."""
        if not self.frames or self.values.running:
            return value
        frame = self.frames[-1]
        if type(value) is Traced:  # set by this forward
            return value
        if isinstance(value, torch.Tensor):
            return frame.attribute(value, probe, name)
        if not isinstance(value, Traced):
            below = _below(self._paths[probe], frame.path) if probe is not frame.probe else ""
            frame.note_read(below, name, value)
        return value

    def writes(self, probe: nn.Module, name: str, value: Any) -> bool:
        """Whether an attribute is really set.

        No graph can say it. But `self.x += 1` only gives `x` back to itself, and what was made from sizes and constants
        alone, to be used again, can as well be made anew at each call.
        """
        if not self.frames or self.values.running:
            return True
        frame = self.frames[-1]
        if probe is frame.probe and frame.makes_anew(name, value):
            return True
        if type(value) is Traced and value._node.target in INPLACE:
            changed = value._node.args[0]
            if isinstance(changed, fx.Node) and changed.op == "get_attr" and changed.target == name:
                return False
        raise Untraceable(f"sets its attribute {name!r}")

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


def _below(paths: tuple[str, ...], owner: str) -> str:
    """The first of the paths that lies below the owner, relative to it; empty where none does."""
    if not owner:
        return next((path for path in paths if path), "")
    return next((path[len(owner) + 1 :] for path in paths if path.startswith(owner + ".")), "")


def record(
    root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, path: str = "", training: bool | None = False
) -> Level | Opaque | Leaf:
    """Record one call of the module at `path` below `root` (the root itself by default).

    Args:
        root: the model; it is not touched.
        args, kwargs: tensors of any device, only their shapes, dtypes and devices count.
        path: which module is called with them.
        training: the mode of every module while it is recorded; None leaves each its own.

    Raises:
        CaptureError: the model's own forward raises on these inputs; its error is the cause.
    """
    with _LOCK, torch.random.fork_rng(devices=[]):
        recorder = Recorder(root, training)
        probe = recorder.root.get_submodule(path)
        faked = recorder.fake((args, kwargs))
        try:
            with recorder.aside(), watched(recorder):
                call: Level | Opaque | Leaf = recorder.record_call(probe, *faked)[0]
                return call
        except ModelFailed as failure:
            where = f", in '{failure}'" if str(failure) else ""
            raise CaptureError(
                f"the model's forward raises on the example input {describe(args, kwargs)}{where}: "
                f"{failure.__cause__!r}. Give `example_inputs` that the model accepts."
            ) from failure.__cause__
        finally:
            recorder.release()
