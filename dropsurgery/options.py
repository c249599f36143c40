"""Other options for the parameter groups of an optimizer while it makes a step, and their own back after it.

They are given by torch's step hooks, so that it does not matter who calls `optimizer.step()`: a loop, a GradScaler, a
trainer that hands it a closure, whose forwards say what they want only while the step is under way.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Mapping
from typing import Any, Protocol

from torch._compile import _disable_dynamo  # torch.compiler.disable imports dynamo at once
from torch.optim import Optimizer

_known: weakref.WeakKeyDictionary[Optimizer, StepOptions] = weakref.WeakKeyDictionary()


class Asker(Protocol):
    """Whoever wants options of an optimizer."""

    def wanted_options(self) -> Mapping[str, float]:
        """Return the options that groups are to have in the step that is made now, by the names torch gives them."""


class StepOptions:
    """What one optimizer's groups are given for the length of a step.

    An option that a group does not have, or has at 0, stays so: biases and norms that are spared from weight decay
    stay spared. Of several wishes the largest counts. Groups get back what they had when the step is done; where an
    exception left it, before the next one, or when `restore` is called, as it is before a state_dict is made.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._askers: weakref.WeakSet[Any] = weakref.WeakSet()
        self._given: list[tuple[dict[str, Any], str, float, Any]] = []  # group, option, its value now, its own
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)
        optimizer.register_state_dict_pre_hook(lambda _: self.restore())

    @staticmethod
    def of(optimizer: Optimizer) -> StepOptions:
        """Return those of an optimizer; there is one for each."""
        if optimizer not in _known:
            _known[optimizer] = StepOptions(optimizer)
        return _known[optimizer]

    def add(self, asker: Asker) -> None:
        """Ask for its wishes at each step from now on, as long as it lives."""
        self._askers.add(asker)

    def discard(self, asker: Asker) -> None:
        """Ask no more."""
        self.restore()
        self._askers.discard(asker)

    def restore(self) -> None:
        """Give the groups back what they had; what others have set meanwhile is left alone."""
        while self._given:
            group, name, given, own = self._given.pop()
            if group.get(name) == given:
                group[name] = own

    @_disable_dynamo
    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        if is_nested(optimizer):
            return None
        self.restore()
        self._give(optimizer)
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if not callable(closure):
            return None

        def closure_first() -> Any:
            result = closure()
            self._give(optimizer)
            return result

        if "closure" in kwargs:
            return args, {**kwargs, "closure": closure_first}
        return (args[0], closure_first, *args[2:]), kwargs

    @_disable_dynamo
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not is_nested(optimizer):
            self.restore()

    def _give(self, optimizer: Optimizer) -> None:
        wanted: dict[str, float] = {}
        for asker in self._askers:
            merge_options(wanted, asker.wanted_options())
        for group in optimizer.param_groups:
            for name, value in wanted.items():
                own = group.get(name)
                if own and own != value:
                    self._given.append((group, name, value, own))
                    group[name] = value


def merge_options(wanted: dict[str, float], more: Mapping[str, float]) -> None:
    """Add the wishes of another; of two for one option the larger counts."""
    for name, value in more.items():
        wanted[name] = max(value, wanted.get(name, value))


def is_nested(optimizer: Optimizer) -> bool:
    """Whether this is `super().step()` within the optimizer's own step(): torch runs the hooks of both."""
    hooked = type(optimizer).step.__code__
    frame, calls = sys._getframe(), 0
    while frame := frame.f_back:  # type: ignore[assignment]
        calls += frame.f_code is hooked and frame.f_locals.get("self") is optimizer
    return calls > 1
