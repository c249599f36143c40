"""Gating Dropout: now and then all tokens stay on their own machine (Liu, Kim, Muzio, Hassan 2022, arXiv:2205.14336).

With probability p a step is dropped: each token goes to experts of the machine that it is on, and no token travels.
In the other steps, and in eval, the gate is what it was. Of E experts on R machines, n = E / R on each, expert e is on
machine e // n; token t is on machine r(t).

    mode mask      scores (..., E) of experts on other machines become a large negative number, finite in every dtype
    mode relabel   a chosen expert e (..., k) becomes r(t) * n + e mod n, and its weight is kept
    expert_drop    the whole block gives zeros, and nothing in it is called (Gate-Expert-Drop)

p is the share of dropped steps. Nothing is rescaled. Relabelling is what comes of leaving out the exchange of tokens
before and after the experts, as a public implementation (NLLB's branch of fairseq) does; masking lets the gate choose
among the local experts, so that weights which are normalised add up to 1. With one expert a machine the two agree where
weights are normalised over the chosen; else a masked gate gives the local expert the weight 1 (softmax), a relabelled
one the weight of the expert that was chosen.

Masking acts on the way to the choice alone: raw logits that a router returns, and the balance losses made of them, are
the true ones. Where a bias is added between scores and choice, scores have to be masked behind it once more (edge
selection). Of a gate whose forward stays Python the layer alone is in reach: what it gives out is masked then as well,
and a SurgeryWarning says so.

Which machines:
- in training by `torch.distributed` each process is one, and its experts are its slice of E, whether the experts are
  spread over the processes or each has all of them; `place = (own, count)` says otherwise. The layer that exchanges
  the tokens still does so, with nothing to send: to save the time, it would have to be changed itself;
- in one process machines are simulated, `virtual_ranks` of them (E if not said, one expert each), and the flattened
  tokens lie on them in parts of equal size; of a gate that limits how many tokens an expert takes, each row that it
  counts them along is divided. That regularizes, and saves nothing. With `virtual_ranks: 1`, the method as it is in
  one process, it is the identity; a SurgeryWarning says so.

All processes have to agree on the steps. The decision is a hash of seed, step and gate: nothing is communicated, and a
forward that checkpointing repeats meets the same. Without a seed several processes are refused.

Not established by the source as it was read: its rates (the default is the library's choice); whether a step's decision
holds for all gates (`scope: model`) or each gate has its own (`layer`, as in two public implementations); what weight a
local expert gets (the two modes); whether Gate-Expert-Drop tosses a second coin (here every dropped step skips). With
`per: microbatch` each forward whose gradients are added up has a decision of its own.

With `expert_drop` the parameters in a block that is skipped get no gradient: DistributedDataParallel wants
`find_unused_parameters=True`. A compiled graph computes the block all the same, and drops what it gives. A loss made of
the logits of all gates cannot be made of none: where all mixtures of a stack of layers are skipped in a forward, as
`scope: model` does, and hooks collect what parts of the last one give, it is run for them, without gradients.

Placement: the logits of a gate (recipe gating_dropout_moe), or the block (gate_expert_drop_moe).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Protocol

import torch
from annotated_types import Ge
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from dropsurgery.errors import SurgeryError, SurgeryWarning
from dropsurgery.records import Site, TensorFact
from dropsurgery.regularizers._base import Keys, Rate, Regularizer, check_count, rate_tensor, require
from dropsurgery.regularizers._gates import SCORES, away, machine_of, require_experts
from dropsurgery.regularizers._taxonomy import Taxonomy
from dropsurgery.regularizers._tracing import is_traced, require_own_numbers
from dropsurgery.regularizers._uniform import uniform
from dropsurgery.trees import own_class

Mode = Literal["mask", "relabel"]
Scope = Literal["layer", "model"]
Per = Literal["step", "microbatch"]
CPU = torch.device("cpu")
_NAME = "gating_dropout"


class StepKeys(Keys, Protocol):
    """Where keys come from that all who ask for one name get alike, for a step or for a forward."""

    def batch_key(self, site_id: str, name: str) -> Tensor:
        """Return the key of this batch's draw called `name`, a 0-dim int64 tensor on the CPU."""

    def shared_key(self, site_id: str, name: str) -> Tensor:
        """Return the key of this forward's draw called `name`, a 0-dim int64 tensor on the CPU."""


def gating_dropout(
    x: Tensor,
    p: float | Tensor,
    mode: Mode = "mask",
    *,
    experts: int | None = None,
    machines: int | None = None,
    machine: int | None = None,
    axis: int = -1,
    along: int | None = None,
    key: Tensor | None = None,
) -> Tensor:
    """With probability `p`, for all tokens at once, keep each token to the experts of its machine.

    Args:
        x: scores (..., E), or with `mode` "relabel" the chosen experts as integers, (..., k) or (tokens,).
        p: probability that the step is dropped, in [0, 1].
        mode: "mask" or "relabel".
        experts: E, which indices do not tell; of scores it is the length of `axis`.
        machines: R, a divisor of E; None for E, so that each expert has a machine of its own.
        machine: the one that all tokens are on; None where they lie on all of them, in parts of equal size.
        axis: of the scores, where the experts are.
        along: the axis of `x` that is divided among the machines; None to divide the flattened tokens.
        key: what the decision depends on, a 0-dim int64 CPU tensor; None for torch's global generator.

    Raises:
        SurgeryError: an argument is out of range, or `experts` cannot be divided among the machines.
    """
    _check_mode(mode)
    count = x.shape[axis] if mode == "mask" else experts
    require(count is not None, "experts", "their number where indices are relabelled", count)
    parts = _machines(count, machines)
    dropped = decision(rate_tensor(p, x.device), key)
    return _kept_local(x, dropped, mode, count, parts, machine, axis, along)  # type: ignore[arg-type]


def _kept_local(
    x: Tensor,
    dropped: Tensor | None,
    mode: Mode,
    count: int,
    parts: int,
    machine: int | None,
    axis: int,
    along: int | None,
) -> Tensor:
    """Scores masked or indices relabelled if `dropped`; None where that is known."""
    if mode == "mask":
        shape = [1 if i == axis % x.dim() else length for i, length in enumerate(x.shape)]
        places = machine_of(tuple(shape), parts, along, x.device) if machine is None else machine
        return mask_scores(x, dropped, places, parts, axis=axis)
    tokens = (*x.shape[:-1], 1) if x.dim() > 1 else tuple(x.shape)
    places = machine_of(tokens, parts, along, x.device) if machine is None else machine
    return relabel(x, dropped, places, parts, count)


def decision(p: Tensor, key: Tensor | None) -> Tensor:
    """Whether the step is dropped, a 0-dim bool; of a key, the same on whatever device."""
    return uniform((), CPU, key) < p


def mask_scores(
    scores: Tensor, dropped: Tensor | None, machine: Tensor | int, machines: int, *, axis: int = -1
) -> Tensor:
    """Return the scores, of experts on other machines than the token's half of the dtype's least number if `dropped`.

    None for `dropped` is for true.

    Half, so that two of them still add up to a finite number; by infinities a sum or a product could be NaN.
    """
    gone = away(scores, machine, machines, axis)
    if dropped is not None:
        gone = gone & dropped.to(scores.device)
    return torch.where(gone, torch.finfo(scores.dtype).min / 2, scores)


def relabel(indices: Tensor, dropped: Tensor | None, machine: Tensor | int, machines: int, experts: int) -> Tensor:
    """Return the chosen experts (..., k), if `dropped` (None: it is) each in its place on the token's own machine."""
    each = experts // machines
    local = machine * each + indices % each
    return (local if dropped is None else torch.where(dropped.to(indices.device), local, indices)).to(indices.dtype)


@dataclass
class Stack:
    """All mixtures of a stack of layers, each of which may be skipped: which ones a forward has met, and how.

    A forward that meets one again is another forward.
    """

    count: int
    met: set[str] = field(default_factory=set)
    ran: bool = False

    def is_left_out(self, site_id: str, skipped: bool) -> bool:
        """Note what becomes of a mixture; gives whether it is the last one, and all of them were skipped."""
        if torch._C._current_graph_task_id() != -1:  # a forward that checkpointing repeats
            return False
        if site_id in self.met:
            self.met.clear()
            self.ran = False
        self.met.add(site_id)
        self.ran = self.ran or not skipped
        return len(self.met) == self.count and not self.ran


class GatingDropout(Regularizer):
    """`gating_dropout` as a layer; identity in eval.

    Attributes:
        place: (own, count), which machine this process is, and how many there are; None for its rank among all
            processes of `torch.distributed`.
    """

    paper = (
        "Liu, Kim, Muzio, Hassan: Gating Dropout: Communication-efficient Regularization for Sparsely Activated "
        "Transformers, ICML 2022, arXiv:2205.14336"
    )
    summary = "in some steps keeps tokens to the experts of their own machine"
    placement = "the logits of a gate: recipe gating_dropout_moe; the whole block: recipe gate_expert_drop_moe"
    shapes = "scores (..., E); by relabelling indices (..., k); with expert_drop what the block takes"
    needs = "a mixture of experts (pattern moe_gate)"
    examples = ({"p": 0.3}, {"p": 0.5, "virtual_ranks": 2}, {"p": 0.4, "per": "microbatch"})
    taxonomy = Taxonomy(transforms="architecture", space="hidden")
    drops = "other"

    p: Tensor
    context: StepKeys | None = None
    stack: Stack | None = None

    def __init__(
        self,
        p: Rate = 0.2,
        mode: Mode = "mask",
        expert_drop: bool = False,
        virtual_ranks: Annotated[int, Ge(1)] | None = None,
        scope: Scope = "layer",
        per: Per = "step",
        experts: Annotated[int, Ge(2)] | None = None,
    ) -> None:
        super().__init__(p=p)
        _check_mode(mode)
        require(isinstance(expert_drop, bool), "expert_drop", "true or false", expert_drop)
        require(scope in ("layer", "model"), "scope", "'layer' or 'model'", scope)
        require(per in ("step", "microbatch"), "per", "'step' or 'microbatch'", per)
        for name, count, least in (("virtual_ranks", virtual_ranks, 1), ("experts", experts, 2)):
            if count is not None:
                check_count(name, count, least)
        self.mode: Mode = mode
        self.expert_drop = expert_drop
        self.virtual_ranks = virtual_ranks
        self.scope: Scope = scope
        self.per: Per = per
        self.experts = experts
        self.place: tuple[int, int] | None = None
        if expert_drop:
            self.kind = "swap"  # type: ignore[misc]
            self.asks_example = True
            self.uncounted = "a whole block is skipped"

    @staticmethod
    def example_inputs(batch: int) -> tuple[Tensor, ...]:
        """Return an input for tests: scores of six experts."""
        return (torch.randn(batch, 6),)

    def build(self, *, channel_axis: int | None, channels: int | None, shape: tuple[int, ...], site_id: str) -> None:
        """Take the facts; a SurgeryError where it cannot work, a SurgeryWarning where it is the identity."""
        super().build(channel_axis=channel_axis, channels=channels, shape=shape, site_id=site_id)
        if self.expert_drop:
            return
        if self.mode == "mask":
            require_experts(self, _NAME, channels, channel_axis)
            self.experts = channels if self.gate is None else self.gate.experts
        else:
            self._build_relabel()
        if self.gate is not None and self.gate.order == "unknown":
            warnings.warn(
                "gating_dropout: the forward of a gate stays Python here, and its layer alone is in reach: what the "
                "gate gives out in dropped steps is masked too, and so are balance losses made of that",
                SurgeryWarning,
                stacklevel=2,
            )
        machines = _machines(self.experts, self.virtual_ranks, f"{_NAME} at {site_id}: virtual_ranks")
        if machines == 1:
            warnings.warn(
                f"gating_dropout at {site_id}: on one machine (virtual_ranks=1) all experts are local, and it is the "
                "identity; leave virtual_ranks out to simulate a machine for each expert",
                SurgeryWarning,
                stacklevel=2,
            )

    def _build_relabel(self) -> None:
        gate, where = self.gate, f"{_NAME} at {self.site_id}"
        self.experts = self.experts if gate is None else gate.experts
        if self.experts is None or (gate is not None and gate.axis is not None):
            raise SurgeryError(
                f"{where}: expected the indices of chosen experts (pattern moe_gate, edge indices) to relabel, got "
                f"{'something else' if gate is None else 'scores'}; use `mode: mask` on edge logits, or say how many "
                "`experts` there are"
            )
        if gate is not None and gate.capacity_axis is not None:
            raise SurgeryError(
                f"{where}: expected a gate whose experts take any number of tokens, got one that limits it: tokens "
                "relabelled to one expert would take each other's places; use `mode: mask` on edge logits"
            )

    @classmethod
    def kind_by(cls, arguments: Mapping[str, Any]) -> str:
        """Return "swap" for a whole block, "insert" for scores or indices."""
        return "swap" if arguments.get("expert_drop") else "insert"

    @classmethod
    def incomplete(cls, sites: Sequence[Site]) -> Iterator[str]:
        """Say at which gates scores are masked before their bias alone, or behind it alone."""
        edges: dict[str, set[str]] = {}
        for site in sites:
            gate = site.gate
            if gate is not None and gate.bias_corrected and site.edge.partition("[")[0] in ("logits", "selection"):
                edges.setdefault(gate.gate, set()).add(site.edge.partition("[")[0])
        for name, found in edges.items():
            missing = {"logits", "selection"} - found
            if len(missing) == 1:
                yield (
                    f"{_NAME} at gate {name}: it adds a bias between scores and choice, so that they have to be masked "
                    f"before it and behind it; add an entry on `pattern: moe_gate, edge: {missing.pop()}`"
                )

    @classmethod
    def meet(cls, model: nn.Module, fellows: Sequence[Regularizer]) -> None:
        """Tell blocks of one stack of layers of each other, if no other block of their class is in it."""
        stacks: dict[str, list[GatingDropout]] = {}
        paths = {id(module): path for path, module in model.named_modules()}
        for each in fellows:
            if isinstance(each, GatingDropout) and each.expert_drop and id(each.host) in paths:
                stacks.setdefault(_before_number(paths[id(each.host)]), []).append(each)
        for path, members in stacks.items():
            hosts = [each.bound() for each in members]
            kinds = set(map(own_class, hosts))
            alike = [module for module in model.get_submodule(path).modules() if own_class(module) in kinds]
            stack = Stack(len(members)) if len(alike) == len(members) else None
            for each in members:
                each.stack = stack

    def bind(self, host: nn.Module) -> None:
        """Stand in for a block that holds gate and experts; a SurgeryError unless `expert_drop` is asked for."""
        if not self.expert_drop:
            raise SurgeryError(
                f"{_NAME} at {self.site_id or 'a block'}: expected the scores of a gate (edge logits), got "
                f"{type(host).__name__}; a whole block is dropped with `expert_drop: true`"
            )
        super().bind(host)

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """Return scores masked or indices relabelled if the step is dropped; with `expert_drop` the block's zeros."""
        if self.expert_drop:
            return self._block(inputs, options)
        x: Tensor = inputs[0]
        if not self.active:
            return x
        machines, machine = self._machines(x)
        if machines == 1:
            return x
        key, along = self._key(), None if self.gate is None else self.gate.capacity_axis
        dropped = None
        if is_traced(x):
            dropped = decision(self.p, key)
        elif not uniform((), CPU, key) < self._rates["p"]:
            # Known on the CPU, by the rate that Python knows: no device is waited for, and most steps cost nothing.
            return x
        experts = self._experts(tuple(x.shape))
        return _kept_local(x, dropped, self.mode, experts, machines, machine, self._axis, along)

    def expected_drop(self, shape: tuple[int, ...]) -> float:
        """Return p times the share of experts on other machines; with `expert_drop` p."""
        if self.expert_drop:
            return self._rates["p"]
        place = self._place() if self.virtual_ranks is None else None
        machines = _machines(self._experts(shape), self.virtual_ranks) if place is None else place[1]
        return self._rates["p"] * (1 - 1 / machines)

    def extra_repr(self) -> str:
        """Return the rate, and the options that are not the default."""
        told = {"mode": self.mode, "virtual_ranks": self.virtual_ranks, "scope": self.scope, "per": self.per}
        usual = {"mode": "mask", "virtual_ranks": None, "scope": "layer", "per": "step"}
        options = [f"{name}={value!r}" for name, value in told.items() if value != usual[name]]
        return ", ".join([super().extra_repr(), *(["expert_drop=True"] if self.expert_drop else []), *options])

    # ---- where tokens and experts are ----

    @property
    def _axis(self) -> int:
        return -1 if self.gate is None or self.gate.axis is None else self.gate.axis

    def _experts(self, shape: tuple[int, ...]) -> int:
        return self.experts if self.experts is not None and self.mode == "relabel" else shape[self._axis]

    def _machines(self, x: Tensor) -> tuple[int, int | None]:
        """How many machines there are, and which one all tokens are on; None where they are on all."""
        experts = self._experts(tuple(x.shape))
        place = self._place()
        if place is None or self.virtual_ranks is not None:
            return _machines(experts, self.virtual_ranks), None
        own, count = place
        _machines(experts, count, f"{_NAME} at {self.site_id or 'a gate'}: processes")
        if self.gate is not None and self.gate.capacity_axis is not None:
            raise SurgeryError(
                f"{_NAME} at {self.site_id}: expected a gate whose experts take any number of tokens, got one that "
                f"limits it, and in dropped steps all tokens of a process would go to {experts // count} of {experts} "
                f"experts; divide each process's tokens with `virtual_ranks: {experts}`"
            )
        return count, own

    def _place(self) -> tuple[int, int] | None:
        if self.place is not None:
            return self.place
        processes = torch.distributed
        if not processes.is_available() or not processes.is_initialized() or processes.get_world_size() == 1:
            return None
        return processes.get_rank(), processes.get_world_size()

    # ---- whether the step is dropped ----

    def _key(self) -> Tensor | None:
        context = self.context
        seed = None if context is None else context.seed
        if self._place() is not None and seed is None:
            raise SurgeryError(
                f"{_NAME} at {self.site_id or 'a gate'}: expected a seed, as each process of this training would "
                "decide by itself which steps it drops; apply the recipe with one seed in all of them, "
                "apply_recipe(..., seed=0)"
            )
        if context is None:
            return None
        if seed is not None:
            require_own_numbers(self.site_id)
        gate = self.site_id if self.gate is None else self.gate.gate
        name = _NAME if self.scope == "model" else f"{_NAME}|{gate}"
        if self.training and self.per == "step":
            return context.batch_key(self.site_id, name)
        return context.shared_key(self.site_id, name)

    # ---- Gate-Expert-Drop ----

    def _block(self, inputs: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if not self.active:
            return self.own(*inputs, **options)
        x = next(each for each in tree_leaves((inputs, options)) if isinstance(each, Tensor))
        key = self._key()
        if not is_traced(x):
            # Decided on the CPU by the rate that Python knows: no device is waited for.
            skipped = bool(uniform((), CPU, key) < self._rates["p"])
            if self.stack is not None and self.stack.is_left_out(self.site_id, skipped):
                self._show(inputs, options)
            return _zeros(x, self.returns, self.given) if skipped else self.own(*inputs, **options)
        dropped = decision(self.p, key).to(x.device)
        return tree_map(
            lambda each: torch.where(dropped, 0, each) if isinstance(each, Tensor) else each,
            self.own(*inputs, **options),
        )

    def _show(self, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Run the block for hooks in it alone: on copies, without gradients, all random numbers left where they are."""
        parts = [module for module in self.bound().modules() if module is not self.bound()]
        if not any(module._forward_hooks for module in parts):
            return
        devices = list({p.device for p in self.bound().parameters() if p.is_cuda})
        with torch.no_grad(), torch.random.fork_rng(devices):
            args, kwargs = tree_map(lambda each: each.clone() if isinstance(each, Tensor) else each, (inputs, options))
            self.own(*args, **kwargs)


def _before_number(path: str) -> str:
    """The path of the list that a module lies in, the outermost one; the root's where it is in none."""
    parts = path.split(".")
    numbered = [index for index, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbered[0]]) if numbered else ""


def _zeros(x: Tensor, returns: Any, given: Any) -> Any:
    """Zeros for all that a block gives when it takes `x`, by what it gave, and was given, on the example."""
    known = [each for each in tree_leaves((given, returns)) if isinstance(each, TensorFact)]
    if not known:
        return torch.zeros_like(x)
    return tree_map(lambda each: _zero(x, known[0], each) if isinstance(each, TensorFact) else each, returns)


def _zero(x: Tensor, example: TensorFact, fact: TensorFact) -> Tensor:
    """Zeros like what a block gave: of its input's shape, with the same leading axes, or with a row for each token."""
    if fact == example:
        return torch.zeros_like(x)
    dtype = x.dtype if fact.dtype == example.dtype else fact.dtype
    if fact.shape[:1] == (math.prod(example.shape[:-1]),) != example.shape[:1]:
        return x.new_zeros((x.numel() // max(x.shape[-1], 1), *fact.shape[1:]), dtype=dtype)
    pairs = zip(fact.shape, example.shape, strict=False)
    same = next((axis for axis, (one, other) in enumerate(pairs) if one != other), min(len(fact.shape), x.dim()))
    return x.new_zeros((*x.shape[:same], *fact.shape[same:]), dtype=dtype)


def _check_mode(mode: Mode) -> None:
    require(mode in ("mask", "relabel"), "mode", "'mask' or 'relabel'", mode)


def _machines(experts: int | None, machines: int | None, name: str = "machines") -> int:
    """How many machines; a SurgeryError unless the experts can be divided among them."""
    if experts is None or machines is None:
        require(experts is None or experts >= 1, f"input of {_NAME}", SCORES, experts)
        return experts or 0
    require(machines >= 1 and experts % machines == 0, name, f"a divisor of the number of experts, {experts}", machines)
    return machines
