"""The one clock: moves the schedules of a model, one optimizer step at a time, and writes the rates.

Step 0 is the rate before the first update. By default an optimizer that holds parameters of the model moves
it, through torch's global step hook: whatever happens between two updates cannot be miscounted.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import torch
from torch import nn
from torch._compile import _disable_dynamo  # torch.compiler.disable imports dynamo at once
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from .context import Context
from .errors import PlanError, SurgeryError, SurgeryWarning
from .options import StepOptions, is_nested, merge_options
from .schedules import Schedule, check_count, needs_total_steps

Clock = Literal["optimizer", "forward", "manual"]
SILENT_FORWARDS = 50
_STATE_VERSION = 1

_schedulers: weakref.WeakSet[Scheduler] = weakref.WeakSet()
_hooks: list[Any] = []


class HasRates(Protocol):
    """What the clock needs of a regularizer."""

    def set_rate(self, name: str, value: float) -> None:
        """Write the rate called `name`."""

    def after_step(self) -> None:
        """The optimizer has updated the weights."""


@dataclass(frozen=True, eq=False)
class Slot:
    """A regularizer, the final rate of each of its arguments `p` and `p_*`, and the schedule they follow."""

    regularizer: HasRates
    targets: Mapping[str, float]
    schedule: Schedule


class Scheduler:
    """The clock of one model: `current_step` of `total_steps`, and the rates of `slots` that follow from it.

    `parameters` gives the model's parameters when asked; an optimizer that holds any of them is the model's.
    `clock` says what moves it: "optimizer" (found by itself or named by `attach`; the first call of `step`
    makes it manual), "forward" (`on_forward`) or "manual" (`step`). A schedule that needs `total_steps` and
    does not have it is a PlanError.
    """

    _owner: weakref.ref[Optimizer] | None
    _fixed: float | None
    _options: StepOptions | None

    def __init__(
        self,
        slots: Sequence[Slot],
        parameters: Callable[[], Iterable[nn.Parameter]],
        *,
        total_steps: int | None = None,
        clock: Clock = "optimizer",
        context: Context | None = None,
    ) -> None:
        _check_total_steps(total_steps, slots)
        if clock not in get_args(Clock):
            raise PlanError(f"clock: expected one of {', '.join(get_args(Clock))}, got {clock!r}")
        self.slots = tuple(slots)
        self.parameters = parameters
        self.total_steps = total_steps
        self.clock: Clock = clock
        self.context = context
        self.current_step = 0
        self._forward_begun = False
        self._warned = False
        self._join()
        self.apply()

    @property
    def progress(self) -> float:
        """The share of the training that is done, in [0, 1]; 0 where its length is not known (nor needed)."""
        return min(1.0, self.current_step / self.total_steps) if self.total_steps else 0.0

    @property
    def finished(self) -> bool:
        """Whether no schedule has anything left to change."""
        scheduled = (slot.schedule for slot in self.slots if needs_total_steps(slot.schedule))
        return all(self.progress >= min(schedule.end, 1.0) for schedule in scheduled)

    def apply(self) -> None:
        """Write all rates anew, as they are to be at the current step."""
        self._written.clear()
        self._move_to(self.current_step)

    @property
    def held(self) -> float | None:
        """The rate that all regularizers are held at, if they are."""
        return self._fixed

    def hold(self, rate: float | None) -> None:
        """Hold all regularizers at `rate` while the clock goes on; None gives them back to their schedules."""
        self._fixed = rate
        self.apply()

    def step(self) -> None:
        """Move the clock one step by hand; a SurgeryError where something else moves it already."""
        if self.clock == "forward":
            raise SurgeryError("step(): this clock counts forwards (`clock: forward`); drop one of the two")
        if self._owner is not None:
            raise SurgeryError(
                f"step(): an optimizer already moves this clock (now at step {self.current_step}), and "
                "no step may count twice; drop the call, or write `clock: manual` to move it by hand alone"
            )
        self.clock = "manual"
        self._advance()

    def attach(self, optimizer: Optimizer) -> None:
        """Let the steps of this optimizer, and of no other one, move the clock."""
        if self.clock != "optimizer":
            raise SurgeryError(f"attach(): this clock is moved otherwise (`clock: {self.clock}`); drop one of the two")
        if not isinstance(optimizer, Optimizer) or not getattr(type(optimizer).step, "hooked", False):
            raise SurgeryError(
                "attach(): expected a torch.optim.Optimizer whose step() runs torch's step hooks, got "
                f"{type(optimizer).__name__}; give the optimizer inside it, or call step() after each update"
            )
        if not self._holds(optimizer):
            raise SurgeryError(
                f"attach(): this {type(optimizer).__name__} holds no parameter of the model; build it from "
                "those of the model that has the regularizers"
            )
        options = self._step_options()
        self._check_ranks(options)
        if self._options is not None:
            self._options.discard(self)
            self._options = None
        self._owner = weakref.ref(optimizer)
        if options:
            _warn_of_options(optimizer, options)
            self._options = StepOptions.of(optimizer)
            self._options.add(self)

    def wanted_options(self) -> dict[str, float]:
        """The options that the attached optimizer is to have in the step that ends this batch."""
        return self._step_options(acted=True)

    # Dynamo would compile anew at every step: it guards on numbers that it sees change.
    @_disable_dynamo
    def on_forward(self, module: nn.Module, args: object) -> None:
        """Count a training forward: a forward pre-hook of the root, for `clock: forward`.

        The first one runs at step 0, each later one moves the clock first: backward, and what checkpointing
        recomputes in it, meets the rate of its forward.
        """
        if not (module.training and _is_training_pass()):
            return
        if self._forward_begun:
            self._advance()
        self._forward_begun = True

    def end_step(self) -> None:
        """End the step of the last training forward (`clock: forward`), as the next one would: a state is taken."""
        if self._forward_begun:
            self._forward_begun = False
            self._advance()

    def notice_forward(self) -> None:
        """Be told of a training forward: warns once where the clock should move and does not."""
        if self.clock == "forward" or self._warned or not _is_training_pass():
            return
        self._silent_forwards += 1
        if self._silent_forwards < SILENT_FORWARDS or (self.finished and not self._holds_a_batch()):
            return
        self._warned = True
        length = f" of {self.total_steps}" if self.total_steps else ""
        what = "what is drawn once a batch stays as it was drawn" if self.finished else "the rates do not move"
        warnings.warn(
            f"{self._silent_forwards} training forwards, and the clock still stands at step "
            f"{self.current_step}{length}: {what}. {self._advice()} "
            "(Nothing is wrong if gradients are accumulated over more forwards than these.)",
            SurgeryWarning,
            stacklevel=2,
        )

    def state_dict(self) -> dict[str, int | str | None]:
        """The clock in plain types; with `clock: forward` the step that the next forward will run at."""
        if self._options is not None:  # a state is taken: the optimizer's may be too
            self._options.restore()
        return {
            "version": _STATE_VERSION,
            "step": self.current_step + self._forward_begun,
            "total_steps": self.total_steps,
            "clock": self.clock,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to the saved step and write its rates; warns where `total_steps` differs: this model's counts.

        A SurgeryError where `state` is not what `state_dict` gives.
        """
        _check_state(state)
        saved = state["total_steps"]
        if saved != self.total_steps and not (saved is None or self.total_steps is None):
            warnings.warn(
                f"the clock was saved at step {state['step']} of {saved}, and this model has total_steps="
                f"{self.total_steps}, which counts; to go on as before, apply the recipe with {saved}",
                SurgeryWarning,
                stacklevel=2,
            )
        if state["clock"] == "manual" and self.clock == "optimizer" and self._owner is None:
            self.clock = "manual"
        self.current_step = state["step"]
        self._forward_begun = False
        self.apply()

    def metadata(self) -> dict[str, int | str | None]:
        """The copy of the state that travels with the model's own state_dict."""
        return self.state_dict()

    def load_metadata(self, metadata: Mapping[str, Any] | None) -> None:
        """Take that copy back; where there is none (None) the clock stays, with a warning if it had moved."""
        if metadata is not None:
            self.load_state_dict(metadata)
        elif self.state_dict()["step"] and any(needs_total_steps(slot.schedule) for slot in self.slots):
            warnings.warn(
                f"this state_dict carries no clock, which stays at step {self.current_step} of "
                f"{self.total_steps}; if the weights are of another step, load its surgery.state_dict() too",
                SurgeryWarning,
                stacklevel=2,
            )

    def copy_for(
        self,
        slots: Sequence[Slot],
        parameters: Callable[[], Iterable[nn.Parameter]],
        context: Context | None = None,
    ) -> Scheduler:
        """The clock of a copy of the model, at the same step; inert until an optimizer holds the copy."""
        copy = Scheduler(slots, parameters, total_steps=self.total_steps, clock=self.clock, context=context)
        copy.current_step = self.current_step
        copy._forward_begun = self._forward_begun
        copy.apply()
        return copy

    def __getstate__(self) -> dict[str, Any]:
        passing = ("_owner", "_options", "_held", "_other_steps", "_silent_forwards", "_written", "_fixed")
        return {name: value for name, value in self.__dict__.items() if name not in passing}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._join()

    def _join(self) -> None:
        """Set up what belongs to this process alone, and have the hook see this clock."""
        self._owner = None
        self._options = None
        self._held: weakref.WeakKeyDictionary[Optimizer, tuple[tuple[int, int], bool]] = weakref.WeakKeyDictionary()
        self._other_steps = False
        self._silent_forwards = 0
        self._written: dict[Schedule, float] = {}
        self._fixed = None
        if self.context is not None:
            one_batch = weakref.WeakMethod(self._is_one_batch)
            self.context.one_batch = lambda: (known := one_batch()) is not None and known()
        _schedulers.add(self)
        if not _hooks:
            _hooks.append(register_optimizer_step_post_hook(_after_optimizer_step))

    def _advance(self) -> None:
        """One more step is done: the rates of the next one, and what constrains the weights that were updated."""
        self._move_to(self.current_step + 1)
        for slot in self.slots:
            slot.regularizer.after_step()

    def _move_to(self, step: int) -> None:
        self.current_step = step
        self._silent_forwards = 0
        self._other_steps = False
        if self.context is not None:
            self.context.step = step
        progress = self.progress
        factors = {schedule: schedule.factor(progress) for schedule in {slot.schedule for slot in self.slots}}
        for slot in self.slots:
            factor = factors[slot.schedule]
            if factor != self._written.get(slot.schedule):
                for name, target in slot.targets.items():
                    slot.regularizer.set_rate(name, target * factor if self._fixed is None else self._fixed)
        self._written = factors

    def _on_optimizer_step(self, optimizer: Optimizer) -> None:
        if self.clock != "optimizer" or not self._holds(optimizer):
            return
        owner = self._owner and self._owner()
        if owner is None:  # the first one, or the one before is gone
            self._owner = weakref.ref(optimizer)
            self._tell_of_options()
        elif owner is not optimizer:
            self._other_steps = True
            return
        if not is_nested(optimizer) and not _is_skipped(optimizer):
            self._advance()

    def _holds(self, optimizer: Optimizer) -> bool:
        """Whether the optimizer has a parameter of the model; looked up anew when its groups have changed."""
        groups = optimizer.param_groups
        size = len(groups), sum(len(group["params"]) for group in groups)
        known = self._held.get(optimizer)
        if known is None or known[0] != size:
            own = {id(parameter) for parameter in self.parameters()}
            known = size, any(id(parameter) in own for group in groups for parameter in group["params"])
            self._held[optimizer] = known
        return known[1]

    def _is_one_batch(self) -> bool:
        """Whether something is known to end this step, so that the forwards until then belong together.

        A clock that is moved, or was; before, gradients that more are added to.
        """
        if self.clock != "optimizer" or self.current_step or self._owner is not None:
            return True
        return any(parameter.grad is not None for parameter in self.parameters())

    def _holds_a_batch(self) -> bool:
        return self.context is not None and self.context.has_drawn_for_batch and self._is_one_batch()

    def _step_options(self, acted: bool = False) -> dict[str, float]:
        """What the regularizers (or those that have acted on this batch) want of the optimizer in their steps."""
        wanted: dict[str, float] = {}
        for slot in self.slots:
            regularizer: Any = slot.regularizer
            options = getattr(regularizer, "step_options", None)
            if options and (not acted or regularizer.acted()):
                merge_options(wanted, options)
        return wanted

    def _check_ranks(self, options: Mapping[str, float]) -> None:
        ranks = torch.distributed.get_world_size() if _is_distributed() else 1
        if options and ranks > 1 and (self.context is None or self.context.seed is None):
            raise SurgeryError(
                f"attach(): expected a seed, as each of the {ranks} processes of this training would draw by itself "
                f"in which steps its optimizer has {_said(options)}, and their weights would drift apart; apply the "
                "recipe with one seed in all of them, apply_recipe(..., seed=0)"
            )

    def _tell_of_options(self) -> None:
        options = self._step_options()
        if options:
            warnings.warn(
                f"regularizers of this model want {_said(options)} of the optimizer in the steps in which they act, "
                "and only one that is named gets it: call surgery.attach(optimizer), or leave the wish out",
                SurgeryWarning,
                stacklevel=2,
            )

    def _advice(self) -> str:
        if self.clock == "manual":
            return "Call surgery.step() after each update."
        if self._other_steps:
            return "It follows another optimizer than the one that steps now: call surgery.attach(optimizer)."
        return (
            "No optimizer that holds parameters of this model has made a step: build it from this model's "
            "parameters, or call surgery.step() after each update, or write `clock: forward` in the recipe."
        )


@_disable_dynamo
def _after_optimizer_step(optimizer: Optimizer, args: object, kwargs: object) -> None:
    for scheduler in list(_schedulers):
        scheduler._on_optimizer_step(optimizer)


def _warn_of_options(optimizer: Optimizer, options: Mapping[str, float]) -> None:
    """Warn where an optimizer has not what is wanted of it, or has more of it than is wanted."""
    for name, value in options.items():
        own = [group.get(name) for group in optimizer.param_groups]
        if not any(own):
            problem = f"has none, which stays so; give it a {name}"
        elif any(each and each > value for each in own):
            problem = f"has more in some group ({name}={max(filter(None, own)):g}), which will be lowered; ask for more"
        else:
            continue
        warnings.warn(
            f"attach(): regularizers of this model want {_said({name: value})} in the steps in which they act, and "
            f"this {type(optimizer).__name__} {problem}, or leave the wish out",
            SurgeryWarning,
            stacklevel=4,
        )


def _said(options: Mapping[str, float]) -> str:
    return ", ".join(f"{name}={value:g}" for name, value in options.items())


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _is_training_pass() -> bool:
    """Whether gradients are recorded, outside of backward: in it checkpointing only repeats forwards."""
    return torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1


def _is_skipped(optimizer: Optimizer) -> bool:
    """Whether a fused optimizer under a GradScaler met infinite gradients: it runs, and updates nothing."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found > 0)


def _check_total_steps(total_steps: int | None, slots: Sequence[Slot]) -> None:
    check_count("total_steps", total_steps)
    if total_steps is None:
        needing = {str(slot.schedule): None for slot in slots if needs_total_steps(slot.schedule)}
        if needing:
            raise PlanError(
                f"total_steps is needed by the schedule {' and '.join(needing)}: give the number of "
                "optimizer steps of the whole training, apply_recipe(..., total_steps=...)"
            )


def _check_state(state: Mapping[str, Any]) -> None:
    keys = {"version", "step", "total_steps", "clock"}
    if not isinstance(state, Mapping) or set(state) != keys:
        got = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
        raise SurgeryError(f"state of the clock: expected the keys {sorted(keys)}, got {got}")
    if state["version"] != _STATE_VERSION:
        raise SurgeryError(
            f"state of the clock: expected version {_STATE_VERSION}, got {state['version']!r}; "
            "it was saved by another version of dropsurgery"
        )
    if not _is_count(state["step"]) or not (state["total_steps"] is None or _is_count(state["total_steps"])):
        raise SurgeryError(
            f"state of the clock: expected step and total_steps as counts, got step={state['step']!r} and "
            f"total_steps={state['total_steps']!r}"
        )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
