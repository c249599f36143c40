"""Notices what leaves no trace in a graph: activation checkpoints, questions and changes of torch's global state."""

from __future__ import annotations

import functools
import inspect
import random
import sys
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.attention
import torch.utils.checkpoint

from dropsurgery.capture.frame import under
from dropsurgery.capture.traced import Traced, Untraceable

if TYPE_CHECKING:
    from dropsurgery.capture.frame import Frame
    from dropsurgery.capture.recorder import Recorder

# What `checkpoint` itself calls: newer versions of torch keep the shorter name for others only.
_GENERATOR = "_checkpoint_without_reentrant_generator"
_GENERATOR += "_impl" if hasattr(torch.utils.checkpoint, _GENERATOR + "_impl") else ""
_OPTIONS = ("preserve_rng_state", "context_fn", "determinism_check", "debug")
_QUESTIONS = ("is_autocast_enabled", "get_autocast_dtype", "is_grad_enabled", "is_inference_mode_enabled")
# What changes a state that a graph knows nothing of, or hands a stand-in to C++ code, which would take it for a tensor.
_UNSAYABLE: tuple[tuple[Any, str], ...] = (
    (torch.inference_mode, "__enter__"),
    (torch.autograd.graph.saved_tensors_hooks, "__enter__"),
    (torch, "manual_seed"),
    (torch, "get_rng_state"),
    (torch, "set_rng_state"),
    (torch.nn.attention, "_sdpa_kernel"),
    (torch.nested, "nested_tensor"),
    (torch.jit.ScriptFunction, "__call__"),
    (torch.nn.Module, "register_forward_hook"),
    (torch.nn.Module, "register_forward_pre_hook"),
)
# They take sizes one by one, which torch's own argument parser refuses where the first is a stand-in.
_BY_SIZE = ("zeros", "ones", "empty", "rand", "randn")
_BUILTIN = (types.BuiltinFunctionType, types.BuiltinMethodType)
_NUMBERS = frozenset({"number", "Scalar", "int", "float", "bool", "SymInt"})
_NOTHING = object()


@functools.cache
def _by_number() -> tuple[tuple[dict[str, Any], dict[str, Callable[..., Any]]], ...]:
    """The functions of each of torch's rooms that take a number, for which a tensor may be given.

    Their argument parser takes what says that it is a tensor for one in C++, and would read the number of a stand-in
    out of memory that holds none, which crashes the interpreter.
    """
    rooms: list[tuple[dict[str, Any], dict[str, Callable[..., Any]]]] = []
    for room in (torch, torch.special, torch.linalg, torch.fft):
        found: dict[str, Callable[..., Any]] = {
            name: made for name, made in vars(room).items() if isinstance(made, _BUILTIN) and name[0] != "_"
        }
        rooms.append((vars(room), found))
    known = rooms[0][1]
    schemas = [(schema.name.partition("::"), schema) for schema in torch._C._jit_get_all_schemas()]
    asking = {name for (home, _, name), schema in schemas if name in known and home == "aten" and _asks_number(schema)}
    rooms[0] = (vars(torch), {name: known[name] for name in asking - _OF_DATA})
    return tuple(rooms)


def _asks_number(schema: Any) -> bool:
    """Whether a form of an operator takes a number besides other things."""
    asked = {str(each.type).removeprefix("Optional[").removesuffix("]") for each in schema.arguments}
    return len(schema.arguments) > 1 and not asked.isdisjoint(_NUMBERS)


# They make tensors of whatever they are given, by rules of their own.
_OF_DATA = frozenset({"tensor", "as_tensor", *_BY_SIZE})


@contextmanager
def watched(recorder: Recorder) -> Iterator[None]:
    """While recording, mark checkpointed regions and note what Python asks torch for."""
    watch = _Watch(recorder)
    home = torch.utils.checkpoint
    with ExitStack() as patches:
        for place, name, made in (
            (home, "CheckpointFunction", watch.reentrant(home.CheckpointFunction)),
            (home, _GENERATOR, watch.generator(getattr(home, _GENERATOR))),
            (torch.autograd.Function, "apply", watch.apply()),
            (torch.autocast, "__enter__", watch.enter(torch.autocast.__enter__)),
            (torch.autocast, "__exit__", watch.leave(torch.autocast.__exit__)),
            *((torch, name, watch.question(getattr(torch, name))) for name in _QUESTIONS),
            *((place, name, watch.unsayable(place, name)) for place, name in _UNSAYABLE),
            *((torch, name, watch.by_size(getattr(torch, name))) for name in _BY_SIZE),
        ):
            patches.callback(_restore, place, name, vars(place).get(name, _NOTHING))
            setattr(place, name, made)
        for room, functions in _by_number():
            patches.callback(room.update, functions)
            room.update({name: watch.by_number(real) for name, real in functions.items()})
        yield


def _restore(place: Any, name: str, before: Any) -> None:
    """Put back what a place held itself: nothing where it was inherited."""
    if before is _NOTHING:
        delattr(place, name)
    else:
        setattr(place, name, before)


class _Watch:
    """What stands in for functions of torch while one thread records; all others get the real ones."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.thread = threading.get_ident()

    def frame(self) -> Frame | None:
        """The forward under recording, if it is the one that asks."""
        recorder = self.recorder
        mine = threading.get_ident() == self.thread and recorder.frames and not recorder.values.running
        return recorder.frames[-1] if mine else None

    def question(self, real: Callable[..., bool]) -> Callable[..., bool]:
        def ask(*args: Any) -> bool:
            answer = real(*args)
            # `no_grad` asks for what it has to put back.
            if (frame := self.frame()) and sys._getframe(1).f_globals.get("__name__") != "torch.autograd.grad_mode":
                frame.environment_guard(real, args, answer)
            return answer

        return ask

    def reentrant(self, real: Any) -> Any:
        def apply(function: Any, preserve: bool, *args: Any) -> Any:
            frame = self.frame()
            if frame is None:
                return real.apply(function, preserve, *args)
            home = torch.utils.checkpoint
            with frame.region(functools.partial(home.checkpoint, use_reentrant=True, preserve_rng_state=preserve)):
                return function(*args)

        return type("CheckpointFunction", (), {"apply": staticmethod(apply)})

    def generator(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def region(*args: Any, **kwargs: Any) -> Any:
            frame = self.frame()
            if frame is None:
                yield from real(*args, **kwargs)
                return
            given = inspect.signature(real).bind(*args, **kwargs).arguments
            options = {name: given[name] for name in _OPTIONS if name in given}
            with frame.region(functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False, **options)):
                yield

        return region

    def enter(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def enter(block: torch.autocast) -> Any:
            if frame := self.frame():
                options = (block.device, block.fast_dtype, block._enabled, block._cache_enabled)
                frame.begin_region(functools.partial(under, torch.autocast, options))
            with self.recorder.aside():  # what it asks for itself is no guard
                return real(block)

        return enter

    def leave(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def leave(block: torch.autocast, *error: Any) -> Any:
            if (frame := self.frame()) and error[0] is None:
                frame.end_region()
            with self.recorder.aside():
                return real(block, *error)

        return leave

    def apply(self) -> Any:
        real = inspect.getattr_static(torch.autograd.Function, "apply")

        def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
            self.refuse(f"{cls.__name__}.apply")
            return real.__get__(None, cls)(*args, **kwargs)

        return classmethod(apply)

    def unsayable(self, place: Any, name: str) -> Any:
        real = getattr(place, name)

        def refused(*args: Any, **kwargs: Any) -> Any:
            self.refuse(f"{place.__name__}.{name}")
            return real(*args, **kwargs)

        return refused

    def refuse(self, what: str) -> None:
        """Raise where a forward under recording does what no graph can say."""
        if self.frame():
            raise Untraceable(f"uses {what}, which no graph can say")

    def by_size(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def make(*sizes: Any, **options: Any) -> Any:
            listed = self.frame() and any(isinstance(size, Traced) for size in sizes)
            return real(sizes, **options) if listed else real(*sizes, **options)

        return make

    def by_number(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def make(*args: Any, **kwargs: Any) -> Any:
            frame = self.frame()
            if frame is None or not any(_stands_for_tensor(item) for item in (*args, *kwargs.values())):
                return real(*args, **kwargs)
            return frame.call_function(real, args, kwargs)

        return make


def _stands_for_tensor(item: Any) -> bool:
    return type(item) is Traced and isinstance(item._value, torch.Tensor)


def draws() -> Any:
    """How far the random numbers are drawn that are not torch's: Python's own, and NumPy's where it is loaded."""
    numpy = sys.modules.get("numpy.random")
    _, keys, *rest = numpy.get_state() if numpy else ((), b"")
    return random.getstate(), bytes(keys), rest


@contextmanager
def same_draws() -> Iterator[Callable[[], bool]]:
    """Put these random numbers back to where they were; gives a function that says whether any was drawn since."""
    numpy = sys.modules.get("numpy.random")
    state, other = random.getstate(), numpy.get_state() if numpy else None
    before = draws()
    try:
        yield lambda: draws() != before
    finally:
        random.setstate(state)
        if numpy:
            numpy.set_state(other)
