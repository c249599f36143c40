"""What every regularizer is: a Module whose rates are buffers, off at rate 0, told its facts by `build`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Protocol

import torch
from annotated_types import Ge, Le
from torch import Tensor, nn

from dropsurgery.errors import SurgeryError
from dropsurgery.records import Behind, GateFact, Site
from dropsurgery.regularizers._taxonomy import Taxonomy
from dropsurgery.regularizers._tracing import require_own_numbers
from dropsurgery.trees import is_by_position, own_class, spread

Rate = Annotated[float, Ge(0), Le(1)]


class Keys(Protocol):
    """Where a seeded model gets its random numbers from (`dropsurgery.context.Context`)."""

    seed: int | None

    def key(self, site_id: str) -> Tensor | None:
        """Return the key of this site's next draw, a 0-dim int64 tensor on the CPU; None without a seed."""


def require(holds: bool, name: str, expected: str, got: object) -> None:
    """Raise a SurgeryError that says what `name` was expected to be and what it was."""
    if not holds:
        raise SurgeryError(f"{name}: expected {expected}, got {got!r}")


def check_rate(name: str, value: object) -> float:
    """Return `value` as a float; a SurgeryError unless it is a number in [0, 1]."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    require(is_number and 0 <= value <= 1, name, "a number in [0, 1]", value)  # type: ignore[operator]
    return float(value)  # type: ignore[arg-type]


def check_count(name: str, value: object, least: int) -> None:
    """A SurgeryError unless `value` is an integer of `least` or more."""
    is_count = isinstance(value, int) and not isinstance(value, bool) and value >= least
    require(is_count, name, f"an integer of {least} or more", value)


def check_state(state: object, like: Mapping[str, Tensor]) -> None:
    """A SurgeryError unless `state` has tensors of the names, shapes and dtypes of those in `like`, and no more."""
    names = ", ".join(sorted(like)) or "no entries"
    if not isinstance(state, Mapping):
        raise SurgeryError(f"state: expected {names}, got {type(state).__name__}")
    require(set(state) == set(like), "state", names, sorted(map(str, state)))
    for name, known in like.items():
        value = state[name]
        is_tensor = isinstance(value, Tensor)
        fits = is_tensor and (value.shape, value.dtype) == (known.shape, known.dtype)
        got = (value.dtype, tuple(value.shape)) if is_tensor else value
        require(fits, f"state: {name}", f"a tensor of {known.dtype} and shape {tuple(known.shape)}", got)


def rate_tensor(p: float | Tensor, device: torch.device) -> Tensor:
    """Return `p` as a 0-dim tensor; a SurgeryError if it is a number out of [0, 1] (tensors are not read)."""
    return p if isinstance(p, Tensor) else torch.tensor(check_rate("p", p), dtype=torch.float32, device=device)


class Regularizer(nn.Module):
    """Base of all regularizers: works alone like any layer, and by `build` and `context` within a model.

    A rate is an argument named `p` or `p_*`: always the share (or probability) that is DROPPED. It is kept
    in a 0-dim float32 buffer of that name, outside of the state_dict, so that a compiled model sees it move.

    Attributes:
        kind: of surgery. "insert": forward takes the tensor that travels on an edge. "combine": it stands in for a
            sum, and forward takes its operands. "swap": it stands in for the forward of one layer, its `host`, and
            forward takes what that takes.
        paper, summary: where it comes from, and what it does in one line.
        placement: where its paper puts it, and the recipe that does so.
        shapes: what it accepts, as users read it.
        needs: what it needs besides its input, such as the host's class; empty for nothing.
        examples: arguments under which the contract's tests run it.
        taxonomy: its labels after Kukačka et al. (`_taxonomy`).
        producer: kinds of the operation that its input comes from, such as ("activation", "relu"); set before `build`.
        asks_behind: whether it has to know what its output goes to.
        behind: what its output goes to, set before `build`; None where it did not ask, and alone.
        images: the batch of the model's example input, where it is known; set before `build`.
        takes: names of further edges of the pattern whose tensors forward gets after the first one.
        gate: what is known of the gate of a mixture of experts that its site belongs to; set before `build`.
        asks_example: of a "swap", whether it has to know what its host took and gave on the example.
        given: what that was, arguments and keyword arguments, tensors as `TensorFact`; None where it did not ask, and
            where that is not known.
        returns: what the host gave for it, likewise.
        drops: what becomes of the dropped: "zero", or "other" (noise, a mean, another element).
        uncounted: why what was dropped cannot be counted in its output; empty where zeros are what was dropped.
        by_values: whether how much is dropped hangs on the values, so that `realised_drop` has to count it on them.
        learned: names of the parameters that it adds to the model.
        random: whether it draws numbers.
        needs_labels: whether it goes by the labels of each training batch; then it has what `LabelUser` says.
        leaks_labels: whether its eval rule tells the model the labels it is tested on, so that its scores say nothing.
        eval_rule: "identity", or in words what it does in eval mode.
        step_options: what the attached optimizer's groups are to have in the steps whose batch it `acted` on, by the
            names that torch gives the options; a group that has none of it (0) keeps none.
    """

    kind: ClassVar[str] = "insert"
    paper: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    placement: ClassVar[str] = ""
    shapes: ClassVar[str] = "any shape"
    needs: ClassVar[str] = ""
    examples: ClassVar[tuple[dict[str, Any], ...]] = ()
    asks_behind: ClassVar[bool] = False
    asks_example: bool = False
    taxonomy: ClassVar[Taxonomy | None] = None
    drops: ClassVar[str] = "zero"
    uncounted: str = ""
    by_values: ClassVar[bool] = False
    learned: ClassVar[tuple[str, ...]] = ()
    takes: ClassVar[tuple[str, ...]] = ()
    random: bool = True
    needs_labels: ClassVar[bool] = False
    leaks_labels: bool = False

    eval_rule: str = "identity"
    step_options: Mapping[str, float] = MappingProxyType({})
    channel_axis: int = 1
    producer: tuple[str, ...] = ()
    behind: Behind | None = None
    images: int | None = None
    gate: GateFact | None = None
    returns: Any = None
    given: Any = None
    site_id: str = ""
    context: Keys | None = None
    forced: bool = False

    def __init__(self, **rates: float) -> None:
        super().__init__()
        self._rates = {name: check_rate(name, value) for name, value in rates.items()}
        for name, value in self._rates.items():
            self.register_buffer(name, torch.tensor(value, dtype=torch.float32), persistent=False)
        # A flag of its own: a compiled forward is guarded by it, and by no rate's value.
        self._nonzero = any(self._rates.values())

    @classmethod
    def kind_by(cls, arguments: Mapping[str, Any]) -> str:
        """Return the kind of surgery with these arguments of a recipe: `kind`, where it does not hang on them."""
        return cls.kind

    @classmethod
    def takes_by(cls, arguments: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the further edges whose tensors it gets with these arguments: `takes`, unless it hangs on them."""
        return cls.takes

    @classmethod
    def incomplete(cls, sites: Sequence[Site]) -> Iterator[str]:
        """Say what is missing where a plan has it at these `sites` and at no others; nothing mostly."""
        return iter(())

    @classmethod
    def meet(cls, model: nn.Module, fellows: Sequence[Regularizer]) -> None:
        """Tell all of this class in a model, in the plan's order, of each other: when it is made, and in each copy."""

    @property
    def active(self) -> bool:
        """Whether forward changes its input now: in training (or forced), at a rate above 0."""
        return (self.training or self.forced) and self._nonzero

    def set_rate(self, name: str, value: float) -> None:
        """Set the rate `name` to `value` in [0, 1], in place: a compiled model need not be compiled again."""
        require(name in self._rates, "rate", f"one of {sorted(self._rates)}", name)
        self._rates[name] = check_rate(name, value)
        self.get_buffer(name).fill_(value)
        self._nonzero = any(self._rates.values())

    def build(self, *, channel_axis: int | None, channels: int | None, shape: tuple[int, ...], site_id: str) -> None:
        """Take the facts of the site; a SurgeryError says why this regularizer cannot work there."""
        if channel_axis is not None:
            self.channel_axis = channel_axis
        self.site_id = site_id

    @property
    def host(self) -> nn.Module | None:
        """The layer whose forward it stands in for (kind "swap"); None for other kinds, and before `bind`."""
        return self.__dict__.get("_host")

    def bound(self) -> nn.Module:
        """The host: its weights, its options, its own forward; a SurgeryError where there is none."""
        host = self.host
        require(host is not None, type(self).__name__, "to be bound to a layer by `bind`", None)
        return host  # type: ignore[return-value]

    def bind(self, host: nn.Module) -> None:
        """Stand in for the forward of a layer; a SurgeryError where that is no layer that it knows."""
        # Kept out of `_modules`: the layer holds the regularizer, not the other way round.
        self.__dict__["_host"] = host
        # Known once: to ask for a signature takes longer than many a layer.
        self.__dict__["_by_position"] = is_by_position(own_class(host).forward)

    def own(self, *args: Any, **kwargs: Any) -> Any:
        """The host's own forward: that of its class, and not the one that calls this stand-in.

        `args` are the values of its parameters in order, of `*args` a tuple, of `**kwargs` a dict.
        """
        host = self.bound()
        forward: Any = own_class(host).forward
        if self.__dict__.get("_by_position"):
            return forward(host, *args, **kwargs)
        given, named = spread(forward, args)
        return forward(host, *given, **named, **kwargs)

    def acted(self) -> bool:
        """Whether it acted on the batch of this optimizer step; asked for where there are `step_options`."""
        return self.active

    def after_step(self) -> None:
        """Called each time that the clock has moved by an optimizer step, for what constrains weights."""

    def expected_drop(self, shape: tuple[int, ...]) -> float:
        """Return the expected share of an input of `shape` that is dropped at the current rates."""
        raise NotImplementedError

    def state(self) -> dict[str, Tensor]:
        """Return what must be saved to resume, besides rates and clock."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` returned; a SurgeryError where it is not that, and nothing is changed."""
        check_state(state, {})

    def next_key(self) -> Tensor | None:
        """Return the key of the next draw, or None where torch's global generator is to be used."""
        if self.context is None:
            return None
        if self.context.seed is not None:
            require_own_numbers(self.site_id)
        return self.context.key(self.site_id)

    def extra_repr(self) -> str:
        """Return the rates; subclasses append their options."""
        return ", ".join(f"{name}={value:g}" for name, value in self._rates.items())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Regularizer:
        # `.half()`, `.to(dtype)` and the like move the rates, and leave their dtype and value alone.
        before = {name: self.get_buffer(name) for name in self._rates}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, rate in before.items():
            device = self.get_buffer(name).device
            known = torch.tensor(self._rates[name], device=device) if rate.is_meta else rate.to(device)
            self._buffers[name] = known
        return self
