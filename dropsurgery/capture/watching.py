"""Notices what leaves no trace in a graph: activation checkpoints, and questions about autocast and grad mode."""

from __future__ import annotations

import functools
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

    reentrant, plain = home.CheckpointFunction, home._checkpoint_without_reentrant_generator

    class Reentrant:
        @staticmethod
        def apply(function: Any, preserve: bool, *args: Any) -> Any:
            asked = frame()
            rerun = functools.partial(home.checkpoint, use_reentrant=True, preserve_rng_state=preserve)
            if asked is None:
                return reentrant.apply(function, preserve, *args)
            with asked.region(rerun):
                return function(*args)

    def generator(
        function: Any, preserve: bool, context_fn: Any, check: str, debug: bool, *rest: Any, **kw: Any
    ) -> Any:
        asked = frame()
        if asked is None:
            yield from plain(function, preserve, context_fn, check, debug, *rest, **kw)
            return
        rerun = functools.partial(
            home.checkpoint,
            use_reentrant=False,
            preserve_rng_state=preserve,
            context_fn=context_fn,
            determinism_check=check,
            debug=debug,
        )
        with asked.region(rerun):
            yield

    with (
        mock.patch.object(home, "CheckpointFunction", Reentrant),
        mock.patch.object(home, "_checkpoint_without_reentrant_generator", generator),
        mock.patch.object(torch, "is_autocast_enabled", ask(torch.is_autocast_enabled)),
        mock.patch.object(torch, "is_grad_enabled", ask(torch.is_grad_enabled)),
    ):
        yield
