"""Patterns over a flat graph: what matched and where, and for what almost did, why not.

A pattern is written the way the model is: the operations in order of their execution.

    PATTERN = Pattern(
        "conv_bn",
        forms=[ops(conv="conv", norm="norm")],
        edges={"output": After("norm"), "conv": After("conv"), "input": Into("conv")},
    )

Operations are named by kind (`dropsurgery.kinds`), so that module, functional, method and in-place forms are one
thing; so are activations and frozen norms that are written out in several operations. Each is the only consumer of
the one before; what is an identity in eval mode (dropout, `nn.Identity`) is walked over, and so is a change of the
order of axes (a LayerNorm over channels last); reading a shape is no use.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

from torch import fx

from dropsurgery.errors import SurgeryError
from dropsurgery.kinds import KINDS, compound, holds_tensor, kind_of, kinds_of, skip, skip_identities, tensor_users
from dropsurgery.records import Edge, GateFact

__all__ = [
    "After",
    "Found",
    "Into",
    "Layer",
    "Match",
    "Miss",
    "Op",
    "Pattern",
    "called",
    "chain",
    "find",
    "kind_of",
    "ops",
    "units",
]


@dataclass(frozen=True)
class Op:
    """A template of one node, captured under `name`; `kind=None` fits any node."""

    name: str
    kind: str | None = None

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise SurgeryError(f"expected a name for an operation of a pattern, got {self.name!r}")
        if self.kind is not None and self.kind not in KINDS:
            near = difflib.get_close_matches(self.kind, sorted(KINDS), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(KINDS))}"
            raise SurgeryError(f"operation {self.name!r}: no kind {self.kind!r}; {hint}")


@dataclass(frozen=True)
class Match:
    """One place where a pattern fits: its captured nodes by name."""

    pattern: Pattern
    nodes: Mapping[str, fx.Node]

    def edges(self, name: str) -> tuple[Edge, ...] | Miss:
        """The edges of that name (one, but for joins with two branches); a Miss where this place has none.

        Raises:
            SurgeryError: the pattern has no edge of that name at all.
        """
        if name not in self.pattern.edges:
            near = difflib.get_close_matches(name, self.pattern.edges, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has: {', '.join(self.pattern.edges)}"
            raise SurgeryError(f"pattern {self.pattern.name!r} has no edge {name!r}; {hint}")
        return self.pattern.edges[name](self)


@dataclass(frozen=True)
class Miss:
    """Why a pattern does not fit at `node`; `depth` counts the operations that did fit. Falsy."""

    reason: str
    node: fx.Node
    depth: int = 0

    def __bool__(self) -> bool:
        return False


@dataclass(frozen=True)
class Found:
    """All matches of a pattern in topological order, and the misses: places where its first operation fits."""

    matches: tuple[Match, ...]
    misses: tuple[Miss, ...]

    def nearest(self, count: int = 3) -> tuple[Miss, ...]:
        """The misses that got furthest, one for each reason."""
        return nearest(self.misses, count)


def nearest(misses: Sequence[Miss], count: int = 3) -> tuple[Miss, ...]:
    """The misses that got furthest, one for each reason."""
    by_reason: dict[str, Miss] = {}
    for miss in sorted(misses, key=lambda miss: -miss.depth):
        by_reason.setdefault(miss.reason, miss)
    return tuple(by_reason.values())[:count]


EdgeRule = Callable[[Match], "tuple[Edge, ...] | Miss"]
Form = tuple[Op, ...]


@dataclass(frozen=True)
class Pattern:
    """A chain of operations, in one or several forms, with named edges (the default first).

    `check` gets what fits one of the `forms` and returns why it is no match after all, or None. `gate` says, of an edge
    by its name, what is known of the gate of a mixture of experts that it belongs to.
    """

    name: str
    forms: Sequence[Form]
    edges: Mapping[str, EdgeRule]
    check: Callable[[Match], str | None] | None = field(default=None)
    gate: Callable[[Match, str, Edge], GateFact] | None = field(default=None)

    def __post_init__(self) -> None:
        if not self.forms or not all(self.forms):
            raise SurgeryError(f"pattern {self.name!r}: expected at least one operation in each form")
        if not self.edges:
            raise SurgeryError(f"pattern {self.name!r}: expected at least one edge")
        for form in self.forms:
            names = [op.name for op in form]
            if len(set(names)) < len(names):
                raise SurgeryError(f"pattern {self.name!r}: expected distinct names of operations, got {names}")
        known = {op.name for form in self.forms for op in form}
        for edge, rule in self.edges.items():
            if isinstance(rule, (After, Into, Layer)) and rule.name not in known:
                raise SurgeryError(
                    f"pattern {self.name!r}: edge {edge!r} is at an operation {rule.name!r} that no form has"
                )

    @property
    def default_edge(self) -> str:
        """The edge that a recipe means when it names none."""
        return next(iter(self.edges))

    def match(self, node: fx.Node) -> Match | Miss:
        """Try each form with its first operation at `node`; of several misses, the one that got furthest."""
        misses = []
        for form in self.forms:
            result = _match_form(self, form, node)
            if isinstance(result, Match):
                reason = self.check(result) if self.check else None
                if reason is None:
                    return result
                result = Miss(reason, node, len(form))
            misses.append(result)
        return max(misses, key=lambda miss: miss.depth)


def find(graph: fx.Graph, pattern: Pattern) -> Found:
    """All places of an annotated flat graph where a pattern fits, and where its first operation alone does."""
    matches: list[Match] = []
    misses: list[Miss] = []
    first = {form[0].kind for form in pattern.forms}
    for node in graph.nodes:
        if node.meta["role"] is None:  # computes on parameters, sizes or constants only
            continue
        if None not in first and first.isdisjoint(kinds_of(node)):
            continue
        result = pattern.match(node)
        if isinstance(result, Match):
            matches.append(result)
        elif result.depth:
            misses.append(result)
    return Found(tuple(matches), tuple(misses))


def _match_form(pattern: Pattern, form: Form, start: fx.Node) -> Match | Miss:
    nodes: dict[str, fx.Node] = {}
    node = start
    for depth, op in enumerate(form):
        if depth:
            following = _next(node, op)
            if isinstance(following, Miss):
                return replace(following, depth=depth)
            node, fits = following
        else:
            fits = op.kind is None or op.kind in kinds_of(node)
        if not fits:
            return Miss(_unexpected(node, op, list(nodes.values())), node, depth)
        nodes[op.name] = node
    return Match(pattern, nodes)


def _next(node: fx.Node, op: Op) -> tuple[fx.Node, bool] | Miss:
    """The node that goes on with a tensor, or the last of several that do the operation together; whether it fits."""
    users = list(skip_identities(node, tensor_users))
    for following in (users, list(skip(node, tensor_users, ("identity", "permute")))):
        if len(following) == 1 and (op.kind is None or op.kind in kinds_of(following[0])):
            return following[0], True
    together = compound(node)
    if together is not None and together[0] == op.kind:
        return together[1], True
    return (users[0], False) if len(users) == 1 else Miss(f"{called(node)} has {len(users)} users", node)


def _unexpected(node: fx.Node, op: Op, before: list[fx.Node]) -> str:
    if not before:
        return f"{called(node)} is no {op.kind}"
    return f"{called(before[-1])} is followed by {called(node)}, not by {op.kind}"


def called(node: fx.Node) -> str:
    """What to call a node in a reason: its precise kind, or what it runs."""
    if node.op == "output":
        return "the result of the net"
    kinds = kinds_of(node)
    if kinds and kinds[0] not in ("activation", "layout"):
        return kinds[-1].replace("_act", " with activation").replace("_", " ")
    module = node.meta.get("module")
    if module is not None:
        return type(module).__name__
    return str(node.target) if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def ops(**kinds: str) -> Form:
    """A form from names and kinds, in order: `ops(conv="conv", norm="norm")`."""
    return tuple(Op(name, kind) for name, kind in kinds.items())


def units(*parts: Sequence[Form]) -> list[Form]:
    """Every form that takes one of the alternatives for each part in turn."""
    return [tuple(op for form in choice for op in form) for choice in product(*parts)]


@dataclass(frozen=True)
class After:
    """The result of an operation, for all its users; a Miss where it is hidden inside a leaf with the next one."""

    name: str

    def __call__(self, match: Match) -> tuple[Edge, ...] | Miss:
        if self.name in match.nodes:
            return (Edge(match.nodes[self.name]),)
        return _inside(match)


def _inside(match: Match) -> Miss:
    leaf = next(node for node in match.nodes.values() if kind_of(node) == "norm_act")
    return Miss(f"{called(leaf)} is one layer, nothing between norm and activation can be reached", leaf)


@dataclass(frozen=True)
class Into:
    """One argument of an operation, by its position."""

    name: str
    operand: int = 0

    def __call__(self, match: Match) -> tuple[Edge, ...] | Miss:
        node = match.nodes[self.name]
        given = node.args[self.operand] if len(node.args) > self.operand else None
        if isinstance(given, fx.Node) and not holds_tensor(given.meta.get("value")):
            return Miss(f"{called(node)} takes a number there, not a tensor", node)
        if isinstance(given, fx.Node):
            return (Edge(node, self.operand),)
        return Miss(f"{called(node)} takes its input by keyword, only positions can be reached", node)


@dataclass(frozen=True)
class Layer:
    """The layer itself, to be swapped; a Miss where the operation is no call of a layer (`F.max_pool2d`)."""

    name: str

    def __call__(self, match: Match) -> tuple[Edge, ...] | Miss:
        if self.name not in match.nodes:
            return _inside(match)
        node = match.nodes[self.name]
        if "module" not in node.meta:
            return Miss(f"{called(node)} is a function, and no layer that can be swapped", node)
        return (Edge(node, layer=True),)


def chain(name: str, kinds: Sequence[str]) -> Pattern:
    """A pattern from kinds alone, as recipes declare them: `conv_gn_act: [conv2d, group_norm, activation]`.

    Its edges are `output`, one after each operation but the last, called by its kind (`conv2d`, and `conv2d_2` for a
    second one), and `input`. A norm and an activation in a row may also be one leaf.

    Raises:
        SurgeryError: no kinds, or a word that is none.
    """
    if isinstance(kinds, str) or not kinds:
        raise SurgeryError(f"pattern {name!r}: expected a list of kinds, got {kinds!r}")
    names = list(_numbered(kinds))
    template = tuple(Op(label, kind) for label, kind in zip(names, kinds, strict=True))
    edges: dict[str, EdgeRule] = {"output": After(names[-1])}
    edges.update({label: After(label) for label in names[:-1]})
    edges["input"] = Into(names[0])
    return Pattern(name, list(_with_leaves(template)), edges)


def _numbered(kinds: Sequence[str]) -> Iterator[str]:
    for index, kind in enumerate(kinds):
        earlier = list(kinds[:index]).count(kind)
        yield f"{kind}_{earlier + 1}" if earlier else kind


def _with_leaves(template: Form) -> Iterator[Form]:
    """The template, and each variant in which a norm and the activation after it are one leaf."""
    if not template:
        yield ()
        return
    for rest in _with_leaves(template[1:]):
        yield (template[0], *rest)
    if len(template) > 1 and f"{template[0].kind}_act" in KINDS and template[1].kind == "activation":
        for rest in _with_leaves(template[2:]):
            yield (Op(template[1].name, f"{template[0].kind}_act"), *rest)
