"""Notices what leaves no trace in a graph: activation checkpoints, and questions about autocast and grad mode."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
import torch.utils.checkpoint

if TYPE_CHECKING:
    from dropsurgery.capture.frame import Frame
    from dropsurgery.capture.recorder import Recorder

# What `checkpoint` itself calls: newer versions of torch keep the shorter name for others only.
_GENERATOR = "_checkpoint_without_reentrant_generator"
_GENERATOR += "_impl" if hasattr(torch.utils.checkpoint, _GENERATOR + "_impl") else ""
_OPTIONS = ("preserve_rng_state", "context_fn", "determinism_check", "debug")


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

    with (
        mock.patch.object(home, "CheckpointFunction", Reentrant),
        mock.patch.object(home, _GENERATOR, generator),
        mock.patch.object(torch, "is_autocast_enabled", ask(torch.is_autocast_enabled)),
        mock.patch.object(torch, "is_grad_enabled", ask(torch.is_grad_enabled)),
    ):
        yield
