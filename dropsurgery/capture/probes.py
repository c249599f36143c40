"""Probes: throw-away copies of modules whose forwards are recorded instead of run, and whose reads are noted."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from dropsurgery.capture.recorder import Recorder

from dropsurgery.trees import own_class

_CALL_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
# Values on the class that an instance may override later.
_PLAIN = (bool, int, float, str, tuple, type(None))


@functools.cache
def _probe_class(cls: type[nn.Module]) -> type[nn.Module]:
    """A subclass that reports which plain attributes are read, and whose forward is recorded instead of run."""
    internal = frozenset(nn.Module().__dict__) - {"training"} | {"_recorder", "_own_forward", "forward"}

    def __getattribute__(self: Any, name: str) -> Any:
        value = object.__getattribute__(self, name)
        if name[:2] != "__" and name not in internal:
            fields = object.__getattribute__(self, "__dict__")
            if "_recorder" in fields and (name in fields or isinstance(value, _PLAIN)):
                return fields["_recorder"].read(self, name, value)
        return value

    def __getattr__(self: Any, name: str) -> Any:
        value = super(probe_class, self).__getattr__(name)
        recorder = self.__dict__.get("_recorder")  # none in what the forward itself made, such as `self.layers[1:]`
        return value if recorder is None else recorder.read(self, name, value)

    def __setattr__(self: Any, name: str, value: Any) -> None:
        recorder = self.__dict__.get("_recorder")
        if recorder is None or recorder.writes(self, name, value):
            super(probe_class, self).__setattr__(name, value)

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        fields = object.__getattribute__(self, "__dict__")
        if "_recorder" not in fields or any(fields[name] for name in _CALL_HOOKS):
            return super(probe_class, self).__call__(*args, **kwargs)
        return fields["_recorder"].intercept(self, args, kwargs)

    def _apply(self: Any, fn: Any, recurse: bool = True) -> Any:
        recorder = self.__dict__.get("_recorder")
        moved = None if recorder is None else recorder.moves(self, fn)
        return super(probe_class, self)._apply(fn, recurse) if moved is None else moved

    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        recorder = self.__dict__.get("_recorder")
        apart = nullcontext() if recorder is None or not recorder.frames else torch._C.DisableTorchFunction()
        with apart:  # to read these arguments is no operation
            return super(probe_class, self).to(*args, **kwargs)

    namespace = {
        "to": to,
        "__call__": __call__,
        "_apply": _apply,
        "__getattribute__": __getattribute__,
        "__getattr__": __getattr__,
        "__setattr__": __setattr__,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
    }
    probe_class: Any = type(cls.__name__, (cls,), namespace)
    made: type[nn.Module] = probe_class
    return made


def make_probe(module: nn.Module) -> nn.Module:
    """An empty probe for a module."""
    probe: nn.Module = object.__new__(_probe_class(own_class(module)))  # type: ignore[arg-type]
    return probe


def forward_of(probe: nn.Module) -> Callable[..., Any]:
    """The probe's real forward: that of its class, or one that somebody had put on the instance."""
    own: Callable[..., Any] | None = probe.__dict__["_own_forward"]
    return own or functools.partial(type(probe).forward, probe)


class Intercepted:
    """The instance attribute that stands before a probe's forward."""

    def __init__(self, probe: nn.Module) -> None:
        self.probe = probe

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        recorder: Recorder = self.probe.__dict__["_recorder"]
        return recorder.intercept(self.probe, args, kwargs)
