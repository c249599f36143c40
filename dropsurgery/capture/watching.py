"""Notices what leaves no trace in a graph: activation checkpoints, questions and changes of torch's global state."""

from __future__ import annotations

import functools
import inspect
import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
import torch.nn.attention
import torch.utils.checkpoint

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
    (torch.autocast, "__enter__"),
    (torch.inference_mode, "__enter__"),
    (torch.autograd.graph.saved_tensors_hooks, "__enter__"),
    (torch, "manual_seed"),
    (torch, "get_rng_state"),
    (torch, "set_rng_state"),
    (torch.nn.attention, "_sdpa_kernel"),
    (torch.nested, "nested_tensor"),
    (torch.jit.ScriptFunction, "__call__"),
)
# They take sizes one by one, which torch's own argument parser refuses where the first is a stand-in.
_BY_SIZE = ("zeros", "ones", "empty", "rand", "randn")


@contextmanager
def watched(recorder: Recorder) -> Iterator[None]:
    """While recording, mark checkpointed regions and note what Python asks torch for."""
    home = torch.utils.checkpoint
    thread = threading.get_ident()

    def frame() -> Frame | None:
        mine = threading.get_ident() == thread and recorder.frames and not recorder.values.running
        return recorder.frames[-1] if mine else None

    def ask(question: Callable[..., bool]) -> Callable[..., bool]:
        def answer(*args: Any) -> bool:
            asked = frame()
            if asked:
                asked.environment_guard(question, args, question(*args))
            return question(*args)

        return answer

    reentrant, plain = home.CheckpointFunction, getattr(home, _GENERATOR)
    apply_of = inspect.getattr_static(torch.autograd.Function, "apply")

    class Reentrant:
        @staticmethod
        def apply(function: Any, preserve: bool, *args: Any) -> Any:
            asked = frame()
            rerun = functools.partial(home.checkpoint, use_reentrant=True, preserve_rng_state=preserve)
            if asked is None:
                return reentrant.apply(function, preserve, *args)
            with asked.region(rerun):
                return function(*args)

    def generator(*args: Any, **kwargs: Any) -> Any:
        asked = frame()
        if asked is None:
            yield from plain(*args, **kwargs)
            return
        given = inspect.signature(plain).bind(*args, **kwargs).arguments
        options = {name: given[name] for name in _OPTIONS if name in given}
        with asked.region(functools.partial(home.checkpoint, use_reentrant=False, **options)):
            yield

    def refused(place: Any, name: str) -> Any:
        function = getattr(place, name)

        def refuse(*args: Any, **kwargs: Any) -> Any:
            if frame():
                raise Untraceable(f"uses {place.__name__}.{name}, which no graph can say")
            return function(*args, **kwargs)

        return refuse

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if frame():
            raise Untraceable(f"uses {cls.__name__}.apply, which no graph can say")
        return apply_of.__get__(None, cls)(*args, **kwargs)

    def packed(factory: Callable[..., Any]) -> Callable[..., Any]:
        def make(*sizes: Any, **options: Any) -> Any:
            listed = frame() and any(isinstance(size, Traced) for size in sizes)
            return factory(sizes, **options) if listed else factory(*sizes, **options)

        return make

    with ExitStack() as patches:
        for place, name, made in (
            (home, "CheckpointFunction", Reentrant),
            (home, _GENERATOR, generator),
            (torch.autograd.Function, "apply", classmethod(apply)),
            *((torch, name, ask(getattr(torch, name))) for name in _QUESTIONS),
            *((place, name, refused(place, name)) for place, name in _UNSAYABLE),
            *((torch, name, packed(getattr(torch, name))) for name in _BY_SIZE),
        ):
            patches.enter_context(mock.patch.object(place, name, made))
        yield


def draws() -> Any:
    """How far the random numbers are drawn that are not torch's: Python's own, and NumPy's where it is loaded."""
    numpy = sys.modules.get("numpy.random")
    _, keys, *rest = numpy.get_state() if numpy else ((), b"")
    return random.getstate(), bytes(keys), rest


@contextmanager
def same_draws() -> Iterator[None]:
    """Put these random numbers back to where they were."""
    numpy = sys.modules.get("numpy.random")
    state, other = random.getstate(), numpy.get_state() if numpy else None
    try:
        yield
    finally:
        random.setstate(state)
        if numpy:
            numpy.set_state(other)
