"""The handle that an emitted model carries as `gm.surgery`: what was done to it, and what is going on in it."""

from __future__ import annotations

import copy
import sys
import warnings
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.optim import Optimizer

from dropsurgery import catalogue
from dropsurgery.auditing import Audit, arriving, audited
from dropsurgery.context import Context
from dropsurgery.diffing import diff
from dropsurgery.emission import OwnHook, drop_own_hooks
from dropsurgery.errors import SurgeryError, SurgeryWarning
from dropsurgery.flattening import flatten
from dropsurgery.forwards import SLOTS, Owner
from dropsurgery.planning import ADOPT, Plan, rates_of
from dropsurgery.recipe import Recipe
from dropsurgery.records import Edit
from dropsurgery.regularizers._base import check_rate, require
from dropsurgery.regularizers._labels import ClassSums, LabelUser, check_labels, pairs
from dropsurgery.regularizers.structural_dropout import StructuralDropout
from dropsurgery.running import apart, arguments, arguments_of, cuda_devices, device_of, moved, resting
from dropsurgery.scheduler import Scheduler, Slot
from dropsurgery.widths import Widths, resolve, structural_sites

_STATE_VERSION = 1
Means = tuple[torch.Tensor, torch.Tensor]


class Surgery:
    """What an emitted model knows of its surgery.

    Attributes:
        recipe: the recipe that was applied.
        plan: what it came to on this model.
        regularizers: site id → module (for a layer that was adopted, an `Adopted` that holds it), in the order of
            the plan; `.p` is the current rate.
    """

    def __init__(self, gm: nn.Module, plan: Plan, context: Context, scheduler: Scheduler | None = None) -> None:
        self.plan = plan
        self.context = context
        self._bind(gm)
        make = self._new_scheduler if scheduler is None else scheduler.copy_for
        self.scheduler: Scheduler = make(self._slots(), self._parameters, context=context)
        self._watch()

    # -- what was done -------------------------------------------------------------------------------------------
    @property
    def recipe(self) -> Recipe:
        """The recipe that was applied."""
        return self.plan.recipe

    @property
    def graph(self) -> fx.Graph:
        """The flat rewritten graph of the whole model."""
        return self.flatten().graph

    def flatten(self) -> fx.GraphModule:
        """A classical flat GraphModule over the same modules, which computes the same as the tree."""
        return flatten(self._model())

    def print_diff(self) -> None:
        """Print what surgery changed, in colours on a terminal."""
        sys.stdout.write(diff(self._model()) + "\n")

    # -- the clock -----------------------------------------------------------------------------------------------
    @property
    def progress(self) -> float:
        """The share of the training that is done, in [0, 1]."""
        return self.scheduler.progress

    @property
    def total_steps(self) -> int | None:
        """The length of the training in optimizer steps."""
        return self.scheduler.total_steps

    @property
    def current_step(self) -> int:
        """The number of optimizer steps done."""
        return self.scheduler.current_step

    def step(self) -> None:
        """Move the clock by hand, for loops that no torch optimizer drives."""
        self.scheduler.step()

    def attach(self, optimizer: Optimizer) -> None:
        """Let the steps of this optimizer, and of no other, move the clock.

        What regularizers want of the optimizer in the steps in which they act, as focused dropout does a larger weight
        decay, its groups have for the length of those steps. A SurgeryWarning where that comes to nothing.

        Raises:
            SurgeryError: the clock is moved otherwise; no torch optimizer, or none that holds the model's parameters; a
                distributed training without a seed, in which each process would decide for itself.
        """
        self.scheduler.attach(optimizer)

    def state_dict(self) -> dict[str, Any]:
        """The clock and all regularizers' own state, in plain types and tensors; loads with `weights_only=True`.

        With `clock: forward` the step of the last forward ends here, so that all is of the same step.
        """
        self.scheduler.end_step()
        states = {site: regularizer.state() for site, regularizer in self.regularizers.items()}
        return {
            "version": _STATE_VERSION,
            "recipe": self.recipe.name,
            "scheduler": self.scheduler.state_dict(),
            "regularizers": {site: state for site, state in states.items() if state},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up where `state_dict` was taken; a SurgeryWarning where that was under another recipe.

        Raises:
            SurgeryError: not such a state, or one with sites that this model does not have, or (of the same recipe)
                without some that it has; nothing is changed.
        """
        if not isinstance(state, Mapping) or not {"scheduler", "regularizers"} <= set(state):
            raise SurgeryError(
                f"load_state_dict: expected what gm.surgery.state_dict() gives, got {type(state).__name__} "
                f"{sorted(state) if isinstance(state, Mapping) else ''}"
            )
        self._check_sites(state)
        if state.get("recipe") != self.recipe.name:
            warnings.warn(
                f"load_state_dict: this state was saved under the recipe {state.get('recipe')!r}, and this model has "
                f"{self.recipe.name!r}: the step is taken over, the rates are this recipe's",
                SurgeryWarning,
                stacklevel=2,
            )
        before = {site: self.regularizers[site].state() for site in state["regularizers"]}
        try:
            for site, own in state["regularizers"].items():
                self.regularizers[site].load_state(own)
            self.scheduler.load_state_dict(state["scheduler"])
        except Exception:
            for site, own in before.items():
                self.regularizers[site].load_state(own)
            raise

    def _check_sites(self, state: Mapping[str, Any]) -> None:
        """Refuse a state with the regularizers of another model, or without those of this one."""
        saved = state["regularizers"]
        require(isinstance(saved, Mapping), "load_state_dict: regularizers", "a state for each site", type(saved))
        unknown = sorted(set(saved) - set(self.regularizers))
        if unknown:
            raise SurgeryError(
                f"load_state_dict: this model has no site {', '.join(unknown[:3])}; same recipe and model?"
            )
        own = [site for site, regularizer in self.regularizers.items() if regularizer.state()]
        missing = [site for site in own if site not in saved]
        if missing and state.get("recipe") == self.recipe.name:
            raise SurgeryError(
                f"load_state_dict: expected the states of {len(own)} regularizers, and of {', '.join(missing[:3])} "
                "there is none; same recipe and model?"
            )

    # -- looking ---------------------------------------------------------------------------------------------------
    @contextmanager
    def active(self, p: float | None = None) -> Iterator[None]:
        """Run the regularizers in train and eval; at rate `p` if given, else at the current one.

        For robustness curves and Monte-Carlo dropout; `p=0.0` silences them. Layers that were adopted get the rate
        too, and run in training only, as ever.

        Raises:
            SurgeryError: p is not in [0, 1].
        """
        outer = self.scheduler.held
        rate = outer if p is None else check_rate("active: p", p)
        before = [(regularizer, regularizer.forced) for regularizer in self._inserted()]
        try:
            for regularizer, _ in before:
                regularizer.forced = True
            self.scheduler.hold(rate)
            yield
        finally:
            for regularizer, forced in before:
                regularizer.forced = forced
            self.scheduler.hold(outer)

    @contextmanager
    def width(self, widths: Widths) -> Iterator[None]:
        """Keep the first units at the sites of structural dropout, in train and eval, without drawing.

        Args:
            widths: units that each site keeps (an integer), a share of them (a float above 0 and up to 1), or a
                mapping of site ids, or patterns of them, to either; sites that it does not name stay as they are.

        Within a compiled model, one width after another compiles nothing anew.

        Raises:
            SurgeryError: there are no such sites, or one cannot be of that width; nothing is changed.
        """
        sites = structural_sites(self.regularizers)
        asked = resolve(sites, widths)
        before = {site: sites[site].width for site in asked}
        try:
            for site, units in asked.items():
                sites[site].set_width(units)
            yield
        finally:
            for site, former in before.items():
                sites[site].set_width(former)

    @contextmanager
    def batch(self, *, labels: torch.Tensor | None = None, validation: Any = None) -> Iterator[None]:
        """Tell regularizers that go by labels (nsdropout) what the graph does not carry, for the forwards within.

            with gm.surgery.batch(validation=(x_val, y_val)):      # each epoch
                for x, y in loader:
                    with gm.surgery.batch(labels=y):               # each step
                        ...

        Args:
            labels: (B,), the class of each sample of the training batch, counted from 0. They are wanted in training
                at any rate above 0, and hold to the end of the `with`; None leaves those of a `with` around it.
            validation: a pair (inputs for the model, labels), or batches of such pairs as a loader gives them. The
                model runs on them once, in eval mode, without gradients and regularizers that act; its norms, modes
                and torch's random state stay as they are. What comes of it is kept until the next validation.

        Labels and inputs may be on any device; where labels are on the CPU, nothing waits for an accelerator.

        Raises:
            SurgeryError: labels that are no such integers, or of a class that the validation has no sample of; nothing
                is changed then. Another number of labels than of samples is found in the forward.
        """
        users = {site: each for site, each in self.regularizers.items() if getattr(each, "needs_labels", False)}
        if labels is None and validation is None:
            raise SurgeryError("batch: expected labels=…, validation=(x, y), or both, got neither")
        if not users:
            warnings.warn(
                "batch: no regularizer of this model goes by labels, and these come to nothing; leave the `with` out",
                SurgeryWarning,
                stacklevel=3,
            )
        known = self.context.labels if labels is None else check_labels(labels, "batch: labels")
        found = {} if validation is None else self._validated(users, validation)
        for site, user in users.items():
            if known is not None:
                user.require_known(known, found[site][1] if site in found else None)
        for site, (means, seen) in found.items():
            users[site].remember(means, seen)
        told = None if labels is None else labels.to(device_of(self._model(), labels.device), torch.int64, copy=True)
        with self.context.told(told):
            yield

    def _validated(self, users: Mapping[str, LabelUser], validation: Any) -> dict[str, Means]:
        """The means of each class at each site, over a forward of the validation, and which classes there were."""
        model = self._model()
        if users and any(parameter.is_meta for parameter in model.parameters()):
            raise SurgeryError("validation: expected a model with weights, got one on the meta device")
        sums = {site: ClassSums(user.where, user.classes) for site, user in users.items()}
        before = [(regularizer, regularizer.forced) for regularizer in self._inserted()]
        with resting(model, self._inserted()), apart(cuda_devices(model)):
            try:
                for regularizer, _ in before:
                    regularizer.forced = False
                for site, user in users.items():
                    user.reading = sums[site]
                for inputs, labels in pairs(validation) if users else ():
                    for each in sums.values():
                        each.labels = labels
                    args, kwargs = moved(arguments_of(inputs, model), model)
                    model(*args, **kwargs)
            finally:
                for regularizer, forced in before:
                    regularizer.forced = forced
                for user in users.values():
                    user.reading = None
        return {site: each.means() for site, each in sums.items()}

    def audit(self, batch: Any = None) -> Audit:
        """Compare, per site, the rate asked for (at the schedule's end), the expected drop share, and the measured one.

        Args:
            batch: arguments for one call of the model (a tensor, or a tuple of them); by default noise of the
                example's shape. Of most sites the shape alone counts, and the share is measured on ones; where what is
                dropped hangs on the values, as with focused_dropout, it is measured on those that arrive there.

        The model runs once in eval mode without gradients; its mode, rates and random state are as before after it.
        """
        model = self._model()
        rows = []
        with torch.no_grad(), torch.random.fork_rng(cuda_devices(model)), self.active():
            found = self._arriving(model, arguments(batch, model))
            for edit in self.plan.edits:
                regularizer = self.regularizers.get(edit.site.id)
                if regularizer is None or edit.site.id not in found:
                    continue
                for name, rate in self._targets(edit).items() if edit.kind != ADOPT else ():
                    regularizer.set_rate(name, rate)
                rows.append(audited(edit, regularizer, found[edit.site.id]))
        return Audit(rows)

    def _arriving(self, model: nn.Module, inputs: Any) -> dict[str, torch.Tensor]:
        with resting(model, self._inserted()), self.active(p=0.0):
            return arriving(self._modules(), lambda: model(*inputs[0], **inputs[1]))

    # -- wiring ----------------------------------------------------------------------------------------------------
    def copy_for(self, gm: nn.Module) -> Surgery:
        """The handle of a copy: the same plan and step, and a clock of its own."""
        made: Surgery = object.__new__(Surgery)
        Surgery.__init__(made, gm, self.plan, copy.deepcopy(self.context), self.scheduler)
        return made

    def adopt(self, gm: nn.Module) -> None:
        """Take up with the model that was unpickled along with this handle."""
        state = self.__dict__.pop("_state")
        Surgery.__init__(self, gm, self.plan, self.context)
        self.scheduler.load_state_dict(state)

    def metadata(self) -> dict[str, Any]:
        """The clock's copy that travels in `state_dict()._metadata`."""
        return self.scheduler.metadata()

    def load_metadata(self, metadata: Mapping[str, Any] | None) -> None:
        """Take the clock from a state_dict; a SurgeryWarning where that says nothing of a begun schedule."""
        self.scheduler.load_metadata(metadata)

    def __getstate__(self) -> dict[str, Any]:
        return {"plan": self.plan, "context": self.context, "_state": self.scheduler.state_dict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)  # the rest follows in `adopt`, once the model is there

    def _bind(self, gm: nn.Module) -> None:
        self._gm = weakref.ref(gm)
        found = self._modules()
        self.regularizers: dict[str, Any] = {
            edit.site.id: Adopted(found[edit.site.id], *edit.arguments) if edit.kind == ADOPT else found[edit.site.id]
            for edit in self.plan.edits
            if edit.site.id in found
        }
        for regularizer in self._inserted():
            regularizer.context = self.context
            regularizer.forced = False  # also in a copy that is made within `active`
            if isinstance(regularizer, StructuralDropout):
                regularizer.set_width(None)  # and within `width`

    def _model(self) -> nn.Module:
        model = self._gm()
        if model is None:
            raise SurgeryError("the model of this handle is gone: keep the model, and ask it for `.surgery`")
        return model

    def _parameters(self) -> Iterator[nn.Parameter]:
        model = self._gm()
        return iter(()) if model is None else model.parameters()

    def _modules(self) -> dict[str, nn.Module]:
        """The regularizers of the tree by site, and the layers that were adopted."""
        model = self._model()
        found: dict[str, nn.Module] = {}
        for module in model.modules():
            owner: Owner | None = module.__dict__.get("_owner")
            if owner is not None:
                slots: nn.Module = getattr(module, SLOTS)
                found.update({edit.site_id: slots.get_submodule(edit.slot) for edit in owner.edits})
        adopted = (edit.site for edit in self.plan.edits if edit.kind == ADOPT)
        return found | {site.id: model.get_submodule(site.module) for site in adopted}

    def _inserted(self) -> list[Any]:
        kept = {edit.site.id for edit in self.plan.edits if edit.kind != ADOPT}
        return [regularizer for site, regularizer in self.regularizers.items() if site in kept]

    def _slots(self) -> list[Slot]:
        return [Slot(self.regularizers[edit.site.id], self._targets(edit), edit.schedule) for edit in self.plan.edits]

    @staticmethod
    def _targets(edit: Edit) -> dict[str, float]:
        if edit.kind == ADOPT:
            return dict(edit.arguments)
        return rates_of(catalogue.load("regularizers", edit.regularizer), edit.arguments)

    def _new_scheduler(self, slots: list[Slot], parameters: Any, context: Context) -> Scheduler:
        total, clock = self.plan.total_steps, self.recipe.clock
        return Scheduler(slots, parameters, total_steps=total, clock=clock, context=context)

    def _watch(self) -> None:
        """Let the first regularizer tell of training forwards, and the root count them if the recipe says so."""
        model = self._model()
        stochastic = list(self._modules().values())
        for module in (model, *stochastic):
            drop_own_hooks(module)
        scheduler = weakref.ref(self.scheduler)
        if stochastic:
            stochastic[0].register_forward_pre_hook(_Notice(scheduler))
        if self.recipe.clock == "forward":
            model.register_forward_pre_hook(_Count(scheduler))


class _Notice(OwnHook):
    def __call__(self, module: nn.Module, args: Any) -> None:
        if module.training and not torch.compiler.is_compiling():
            scheduler = self.target()
            if scheduler is not None:
                scheduler.notice_forward()


class _Count(OwnHook):
    def __call__(self, module: nn.Module, args: Any) -> None:
        scheduler = self.target()
        if scheduler is not None:
            scheduler.on_forward(module, args)


class Adopted:
    """A stochastic layer that the model brought along, under the clock: `module`, and its rate as `p`."""

    def __init__(self, module: nn.Module, rate: str) -> None:
        self.module = module
        self._rate = rate

    @property
    def p(self) -> torch.Tensor:
        """The layer's current rate, a 0-dim float32 tensor; to be set by `set_rate` alone."""
        return torch.tensor(getattr(self.module, self._rate), dtype=torch.float32)

    def set_rate(self, name: str, value: float) -> None:
        """Write the layer's own attribute."""
        setattr(self.module, name, value)

    def after_step(self) -> None:
        """Nothing: its weights, if any, are the model's."""

    def state(self) -> dict[str, torch.Tensor]:
        """Nothing: the clock says the rate."""
        return {}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take back nothing; a SurgeryError where there is something."""
        require(not state, "state", "no entries", sorted(state))

    def __repr__(self) -> str:
        return f"Adopted({self.module!r}, p={self.p:g})"
