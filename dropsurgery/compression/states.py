"""What a mask leaves of each tensor that is cut: where it is zero, and which factor is still to be multiplied in.

A channel may be taken away where whatever reads it reads zeros. At a site the mask makes them; a batch norm, a bias or
a sigmoid makes other numbers of zeros again. The factor U / c of a site travels on through what commutes with it, into
the columns of the next layer; where something on the way does not, as a GELU, it goes into the layer before the site.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from dropsurgery.capture.levels import map_tree
from dropsurgery.compression.layers import Layer, layer_of
from dropsurgery.compression.relations import Cut, Stuck
from dropsurgery.compression.rules import Operand, Position, positions_of
from dropsurgery.compression.spreading import Blocked, Flow, Mark, Spread
from dropsurgery.kinds import kind_of
from dropsurgery.records import Edge, TensorFact

GONE, LIVE, FACTOR = range(3)
"""The columns of a state: cut out; of those, not zero in the masked model; what the narrow tensor still lacks."""
_CLOSE = 1e-9


class Unfolded(Exception):
    """A factor has come to an operation that does not commute with it."""

    def __init__(self, node: fx.Node) -> None:
        super().__init__()
        self.node = node


@dataclass
class States:
    """The states of all tensors that are cut, and what follows for the layers.

    `columns` are the factors of a layer's inputs, `rows` those of its outputs (or of a norm's). `why` says in words
    what last made numbers of zeros.
    """

    after: dict[fx.Node, Cut] = field(default_factory=dict)
    columns: dict[fx.Node, Cut] = field(default_factory=dict)
    rows: dict[fx.Node, Tensor] = field(default_factory=dict)
    why: dict[fx.Node, str] = field(default_factory=dict)


def follow(flow: Flow, marks: Sequence[Mark], cuts: Spread) -> States:
    """Follow zeros and factors through everything that is cut.

    Raises:
        Blocked: a layer reads channels that are to be cut and are not zero, or a factor can be folded nowhere.
    """
    rows: dict[fx.Node, Tensor] = {}
    folded: set[str] = set()
    while True:
        walk = _Walk(flow, marks, cuts, rows)
        try:
            return walk.run()
        except Unfolded as stopped:
            pending = walk.pending[stopped.node] - folded
            if not pending:
                reason = "does not commute with the factor U / c, and neither does what comes before the site"
                raise Blocked(stopped.node, f"{reason} (`normalize: false`)", walk.pending[stopped.node]) from None
            for mark in marks:
                if mark.site in pending:
                    _fold_back(flow, mark, rows)
            folded |= pending


class _Walk:
    def __init__(self, flow: Flow, marks: Sequence[Mark], cuts: Spread, rows: dict[fx.Node, Tensor]) -> None:
        self.flow, self.cuts = flow, cuts
        self.states = States(rows=rows)
        self.pending: dict[fx.Node, frozenset[str]] = defaultdict(frozenset)
        self._marks: dict[tuple[fx.Node, Position | None], list[Mark]] = defaultdict(list)
        for mark in marks:
            for edge in mark.edges:
                self._marks[edge.node, edge.operand].append(mark)

    def run(self) -> States:
        """Every node in the order in which they are computed."""
        for node in self.flow.graph.nodes:
            sources = [source for _, source in positions_of(node)]
            if node in self.cuts.cuts or any(source in self.cuts.cuts for source in sources):
                self._visit(node)
        return self.states

    def _visit(self, node: fx.Node) -> None:
        try:
            self._step(node)
        except Stuck as stuck:
            raise Blocked(node, str(stuck), self.cuts.sites[node]) from None

    def _step(self, node: fx.Node) -> None:
        rule = self.flow.rule(node, self.cuts.sites[node])
        taken = [(operand, self._seen(node, operand)) for operand in rule.operands]
        for operand, _ in taken:
            self.pending[node] |= self.pending[operand.source]
            for mark in self._marks[node, operand.position]:
                self.pending[node] |= {mark.site}
        layer = layer_of(node)
        if layer is not None and taken[0][1] is not None:
            self._read(layer, taken[0][1], self.cuts.sites[taken[0][0].source])
        cut = self.cuts.cuts.get(node)
        if cut is None:
            return
        table = EFFECTS[rule.effect](_Step(node, cut, taken, layer))
        table[:, GONE] = cut.table[:, GONE]
        if node in self.states.rows:
            table[:, FACTOR] = table[:, FACTOR] / self.states.rows[node]
        self._explain(node, table, rule.effect, taken)
        state = Cut(cut.axis, table)
        for mark in self._marks[node, None]:
            state = self._masked(state, mark, node)
            self.pending[node] |= {mark.site}
        self.states.after[node] = state
        if bool(((state.table[:, FACTOR] - 1).abs() < _CLOSE).all()):
            self.pending[node] = frozenset()

    def _seen(self, node: fx.Node, operand: Operand) -> Cut | None:
        """An operand's state as this node sees it, behind the masks on this edge."""
        state = self.states.after.get(operand.source)
        if state is not None:
            for mark in self._marks[node, operand.position]:
                state = self._masked(state, mark, operand.source)
        return state

    @staticmethod
    def _masked(state: Cut, mark: Mark, source: fx.Node) -> Cut:
        asked = mark.cut(source)
        table = state.table.clone()
        table[asked.gone, LIVE] = 0
        table[:, FACTOR] *= asked.table[:, 1]
        return Cut(state.axis, table)

    def _read(self, layer: Layer, state: Cut, sites: frozenset[str]) -> None:
        """A layer reads a tensor that is cut."""
        if state.axis != layer.in_axis:
            return
        if not layer.depthwise and bool((state.table[:, LIVE] > 0).any()):
            source: Any = layer.node.args[0]
            why = self.states.why.get(source, "no site masks them")
            raise Blocked(layer.node, f"reads channels that are to be cut and are not zero: {why}", sites)
        self.states.columns[layer.node] = state

    def _explain(self, node: fx.Node, table: Tensor, effect: str, taken: list[tuple[Operand, Cut | None]]) -> None:
        """Note why a tensor is not zero where it is to be cut."""
        if not bool((table[:, LIVE] > 0).any()):
            return
        live = [op.source for op, cut in taken if cut is not None and bool((cut.table[:, LIVE] > 0).any())]
        zeros = [op.source for op, cut in taken if cut is not None and op.source not in live]
        here = Blocked(node, "").where()
        layer = layer_of(node)
        if effect == "made" or (layer is not None and not layer.depthwise):
            self.states.why[node] = f"no site masks what {here} makes"
        elif zeros and not live:
            self.states.why[node] = f"{here} makes other numbers of the zeros"
        elif zeros and effect != "multiplied":
            shown = ", ".join(Blocked(source, "").where() for source in live)
            self.states.why[node] = f"{here} adds to the zeros what is not masked alike, from {shown}"
        else:
            known = [self.states.why[source] for source in live if source in self.states.why]
            self.states.why[node] = known[0] if known else f"no site masks what {here} gives"


@dataclass(frozen=True)
class _Step:
    """A node whose result is cut, with the states of what it takes."""

    node: fx.Node
    cut: Cut
    taken: list[tuple[Operand, Cut | None]]
    layer: Layer | None

    def states(self) -> list[Tensor | None]:
        """What each operand brings to the positions of the result."""
        found: list[Tensor | None] = []
        for operand, cut in self.taken:
            carried = None if cut is None else operand.relation.down(cut)
            found.append(None if carried is None else carried.table)
        return found

    def fresh(self) -> Tensor:
        """As a layer makes it: numbers everywhere, and no factor."""
        table = torch.ones(len(self.cut.table), 3, dtype=torch.float64)
        table[:, GONE] = self.cut.table[:, GONE]
        table[:, LIVE] = table[:, GONE]
        return table

    def bare(self, table: Tensor | None) -> None:
        """Refuse a factor that is still to come."""
        if table is not None and bool(((table[:, FACTOR] - 1).abs() > _CLOSE)[table[:, GONE] == 0].any()):
            raise Unfolded(self.node)


def _made(step: _Step) -> Tensor:
    return step.fresh()


def _layer_made(step: _Step) -> Tensor:
    """A layer: its rows make numbers. One that the axis passes by works on each position alone."""
    layer, table = step.layer, step.fresh()
    (state,) = step.states()
    assert layer is not None
    if state is None:
        return table
    shifts = layer.tensor("bias") is not None
    table[:, LIVE] = table[:, GONE] if shifts else state[:, LIVE]
    if not layer.depthwise:  # its columns take no factor along this axis
        if shifts:
            step.bare(state)
        table[:, FACTOR] = state[:, FACTOR]
    return table


def _carried(step: _Step) -> Tensor:
    state = next((state for state in step.states() if state is not None), None)
    return step.fresh() if state is None else state.clone()


def _stirred(step: _Step) -> Tensor:
    for state in step.states():
        step.bare(state)
    return step.fresh()


def _bent(step: _Step) -> Tensor:
    """An operation on each number that keeps no factor; zeros stay zeros if f(0) = 0."""
    states = step.states()
    for state in states:
        step.bare(state)
    if len(states) != 1 or states[0] is None or not _keeps_zero(step.node):
        return step.fresh()
    return states[0].clone()


def _alike(step: _Step) -> Tensor:
    """Operands that must lack the same factor."""
    states = [state for state in step.states() if state is not None]
    table = states[0].clone()
    for state in states[1:]:
        kept = table[:, GONE] == 0
        if bool(((state[:, FACTOR] - table[:, FACTOR]).abs() > _CLOSE)[kept].any()):
            raise Unfolded(step.node)
        table[:, LIVE] = torch.maximum(table[:, LIVE], state[:, LIVE])
    return table


def _added(step: _Step) -> Tensor:
    states = step.states()
    table = _alike(step)
    numbers = [item for item in step.node.args[:2] if isinstance(item, (int, float)) and item != 0]
    if numbers or len(states) < 2 or any(state is None for state in states):
        step.bare(table)
        table[:, LIVE] = table[:, GONE]
    return table


def _multiplied(step: _Step) -> Tensor:
    """Zero times anything is zero; factors multiply."""
    states = [state for state in step.states() if state is not None]
    table = states[0].clone()
    for state in states[1:]:
        table[:, LIVE] *= state[:, LIVE]
        table[:, FACTOR] *= state[:, FACTOR]
    return table


def _divided(step: _Step) -> Tensor:
    first, *others = step.states()
    if first is None or any(state is not None for state in others):
        return _stirred(step)
    return first.clone()


def _joined(step: _Step) -> Tensor:
    """What is concatenated, piece by piece; along another axis all are alike."""
    pieces = [(operand.relation, cut) for operand, cut in step.taken]
    if any(cut is not None and cut.axis != getattr(relation, "axis", None) for relation, cut in pieces):
        return _alike(step)
    table = step.fresh()
    for relation, cut in pieces:
        if cut is not None:
            piece: Any = relation
            table[piece.start : piece.start + piece.length] = cut.table
    return table


def _gated(step: _Step) -> Tensor:
    """A gated unit: its values bring zeros and factors, its gates must have no factor."""
    (cut,) = [cut for _, cut in step.taken if cut is not None]
    halves = step.taken[0][0].relation
    if cut.axis != getattr(halves, "axis", None):
        return cut.table.clone()
    value, gate = cut.table.chunk(2)
    step.bare(gate)
    return value.clone()


def _attended(step: _Step) -> Tensor:
    """Attention: linear in the values, in nothing else."""
    *others, value = [*step.states(), None][:3]
    for state in others:
        step.bare(state)
    return step.fresh() if value is None else value.clone()


EFFECTS: dict[str, Callable[[_Step], Tensor]] = {
    "made": _made,
    "layer": _layer_made,
    "carried": _carried,
    "stirred": _stirred,
    "shifted": _stirred,
    "bent": _bent,
    "alike": _alike,
    "added": _added,
    "multiplied": _multiplied,
    "divided": _divided,
    "joined": _joined,
    "gated": _gated,
    "attended": _attended,
}
"""What an operation does with zeros and factors, by the words of its rule."""


def _keeps_zero(node: fx.Node) -> bool:
    """Whether an operation on each number makes 0 of 0; it is run on one."""

    def zero(item: Any) -> Any:
        if not isinstance(item, fx.Node):
            return item
        value = item.meta.get("value")
        return torch.zeros(1) if isinstance(value, TensorFact) else value

    args, kwargs = map_tree((node.args, node.kwargs), zero)
    module = node.meta.get("module")
    try:
        with torch.no_grad():
            if module is not None:
                made = module(*args, **kwargs)
            elif isinstance(node.target, str):
                made = getattr(args[0], node.target)(*args[1:], **kwargs)
            else:
                made = node.target(*args, **kwargs)
    except Exception:  # what it makes is unknown then, which refuses it
        return False
    return isinstance(made, Tensor) and bool((made == 0).all())


def _fold_back(flow: Flow, mark: Mark, rows: dict[fx.Node, Tensor]) -> None:
    """Multiply a site's factor into the rows of what makes the tensor, through all that commutes with it.

    Raises:
        Blocked: something on the way does not.
    """
    done: set[fx.Node] = set()
    waiting = [(edge.source, mark.cut(edge.source)) for edge in mark.edges]
    while waiting:
        node, cut = waiting.pop()
        if node in done:
            continue
        done.add(node)
        rule = flow.rule(node, frozenset({mark.site}))
        if _takes_factors(node, rule.effect, cut):
            rows[node] = rows.get(node, torch.ones(len(cut.table), dtype=torch.float64)) * cut.table[:, 1]
            continue
        if rule.effect not in ("carried", "multiplied", "alike", "joined") or not rule.operands:
            reason = (
                "does not commute with the factor U / c of the site, and neither does what follows the site "
                "(`normalize: false`, or a site behind the activation)"
            )
            raise Blocked(node, reason, frozenset({mark.site}))
        operands = rule.operands[:1] if rule.effect == "multiplied" else rule.operands
        for operand in operands:
            above = operand.relation.up(cut)
            if above is not None:
                waiting.append((operand.source, above))


def _takes_factors(node: fx.Node, effect: str, cut: Cut) -> bool:
    """Whether factors of what a node gives can be multiplied into its weights."""
    layer = layer_of(node)
    if layer is not None:
        return cut.axis == layer.out_axis
    affine = getattr(node.meta.get("module"), "weight", None) is not None
    return effect == "shifted" and kind_of(node) == "norm" and affine  # not one that holds its activation


def marked_edges(graph: fx.Graph, edge: Edge) -> tuple[Edge, ...]:
    """The same edge in every call of the module whose forward holds it."""
    keys = ("owner", "path", "call")
    return tuple(
        Edge(node, edge.operand, edge.layer)
        for node in graph.nodes
        if all(node.meta.get(key) == edge.node.meta[key] for key in keys)
    )
