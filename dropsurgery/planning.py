"""(captured model, recipe) → plan: which regularizer goes where, at which rate. Pure: nothing is changed.

For each entry: the sites of its pattern's edge, those that `where` leaves, a rate for each, then one edit for each
edge of the graph however many entries name it.
"""

from __future__ import annotations

import inspect
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from torch import fx

from dropsurgery import catalogue
from dropsurgery.capture import Captured
from dropsurgery.errors import PlanError, SurgeryError, SurgeryWarning
from dropsurgery.graph import works_in_place
from dropsurgery.kinds import data_inputs, kind_of, kinds_of, tensor_inputs
from dropsurgery.matching import Found, Match, Miss, Pattern, chain, find, nearest
from dropsurgery.recipe import Entry, Recipe
from dropsurgery.records import Edge, Edit, Site, TensorFact
from dropsurgery.schedules import Schedule, check_count

ADOPT = "adopt"
# Under which name stochastic layers keep their rate, the usual ones first.
_RATE_NAMES = ("p", "drop_prob", "drop_rate", "prob")
_KINDS = ("insert", "combine", "swap")


@dataclass(frozen=True)
class Plan:
    """What `apply_recipe` will do, or has done.

    `edits` are in the order in which they are carried out; `hits` counts them per entry, after merging; `misses`
    holds, for an entry that hit nothing, what came nearest and why it was none; `notes` says what was merged or left.
    """

    recipe: Recipe
    model: str
    edits: tuple[Edit, ...]
    hits: dict[str, int]
    misses: dict[str, tuple[str, ...]]
    notes: tuple[str, ...]
    total_steps: int | None = None

    def __str__(self) -> str:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        for column in ("site", "stage", "shape", "regularizer", "p", "schedule", "entry"):
            table.add_column(column, no_wrap=True)
        for edit in self.edits:
            table.add_row(*_row(edit))
        console = Console(width=400, no_color=True, highlight=False)
        with console.capture() as captured:
            console.print(table)
        lines = [line.rstrip() for line in captured.get().splitlines()]
        counts = ", ".join(f"{name}: {count}" for name, count in self.hits.items())
        end = f"{len(self.edits)} edits on {self.model} by {self.recipe.name} ({counts})"
        rules = [f"in eval: {rule} at {count} sites" for rule, count in self.eval_rules().items()]
        return "\n".join([*lines, "", end, *rules, *self.notes])

    def eval_rules(self) -> Counter[str]:
        """What regularizers do in eval mode, in words, where that is anything, and at how many sites."""
        return Counter(edit.eval_rule for edit in self.edits if edit.eval_rule != "identity")

    def detached(self) -> Plan:
        """The same plan without the graph that its sites point into: what an emitted model carries."""
        return replace(self, edits=tuple(replace(edit, site=replace(edit.site, at=None)) for edit in self.edits))


def _row(edit: Edit) -> tuple[str, ...]:
    schedule: Schedule = edit.schedule
    start, final = edit.p * schedule.start, edit.p * schedule.final
    shape = "x".join(map(str, edit.site.shape))
    stage = "-" if edit.site.stage is None else str(edit.site.stage)
    rates = f"{start:g} → {final:g}"
    return edit.site.id, stage, shape, edit.regularizer, rates, str(schedule), edit.entry


class Sites:
    """All sites of one captured model, found pattern by pattern as they are asked for."""

    def __init__(self, captured: Captured, patterns: dict[str, Pattern] | None = None) -> None:
        self.graph = captured.view.graph
        self._declared = patterns or {}
        self._found: dict[str, Found] = {}

    def pattern(self, name: str) -> Pattern:
        """A pattern that the recipe declares, or one of the catalogue's."""
        loaded: Pattern = self._declared.get(name) or catalogue.load("patterns", name)
        return loaded

    def found(self, name: str) -> Found:
        """All matches and misses of a pattern."""
        if name not in self._found:
            self._found[name] = find(self.graph, self.pattern(name))
        return self._found[name]

    def of(self, pattern: str, edge: str) -> list[Site]:
        """The sites of a pattern's edge, in the order of the graph."""
        made: dict[str, Site] = {}
        for match in self.found(pattern).matches:
            for site in self._of_match(match, pattern, edge):
                made.setdefault(site.id, site)  # a module called again is one site
        return list(made.values())

    @staticmethod
    def _of_match(match: Match, pattern: str, edge: str) -> Iterator[Site]:
        edges = match.edges(edge)
        if not isinstance(edges, tuple):
            return
        for index, at in enumerate(edges):
            if "level_node" in at.node.meta or at.module is not None:
                if at.node.op != "output" and _is_thrown_away(at.node):
                    continue
            elif not at.layer:  # called by a forward that stays opaque: no graph holds this edge
                continue
            site = site_at(at, pattern, f"{edge}[{index}]" if len(edges) > 1 else edge)
            yield replace(site, gate=match.pattern.gate(match, edge, at)) if match.pattern.gate else site

    @cached_property
    def stochastic(self) -> list[Site]:
        """The stochastic layers that the model already has, with a rate above 0."""
        nodes = [node for node in self.graph.nodes if node.meta.get("identity") and rate_name(node.meta["module"])]
        made = {site.id: site for site in (site_at(Edge(node), ADOPT, "output") for node in nodes)}
        return list(made.values())


def _is_thrown_away(node: fx.Node) -> bool:
    """Whether the model itself does not use what a node gives; where it works in place, others see what it did."""
    unused = all("identity" in kinds_of(user) and _is_thrown_away(user) for user in node.users)
    return unused and not node.meta.get("given") and not works_in_place(node, lambda _: node.meta["module"])


def site_at(at: Edge, pattern: str, edge: str) -> Site:
    """A site with its facts: those of the value that travels there, and the place of the node that it belongs to."""
    node, source = at.node, at.source
    if at.layer:  # what a layer takes is what its stand-in will take
        source = data_inputs(node)[0]
    meta, value = node.meta, source.meta.get("value")
    return Site(
        id=f"{meta['path']}#{meta['call']}:{pattern}.{edge}"
        if at.module is None
        else f"{at.module}#0:{pattern}.{edge}",
        module=at.module or (meta["path"] if node.op == "call_module" else meta["owner"]),
        pattern=pattern,
        edge=edge,
        stage=meta["stage"],
        reduction=source.meta["reduction"],
        depth=meta["depth"],
        block=meta["block"],
        path=_flow(at),
        role=meta["role"],
        shape=value.shape if isinstance(value, TensorFact) else (),
        channels=source.meta["channels"],
        channel_axis=source.meta["channel_axis"],
        # Nothing lies before the net's input: what counts is whom it goes to.
        trainable=(node if source.op == "placeholder" else source).meta["trainable"],
        owner=meta["owner"],
        producer=_producer(source),
        at=at,
    )


def _producer(source: fx.Node) -> tuple[str, ...]:
    """The kinds of the operation that a value comes from, identities walked through."""
    while "identity" in kinds_of(source) and data_inputs(source):
        source = data_inputs(source)[0]
    return kinds_of(source)


def _flow(at: Edge) -> str | None:
    join = at.node.meta.get("join")
    if join is not None and at.operand is not None:
        return "shortcut" if at.operand == join.shortcut else "branch"
    flow: str | None = at.source.meta["flow"]
    return flow


def rate_name(module: Any) -> str | None:
    """The attribute in which a stochastic layer keeps its rate, if that is above 0."""
    rates = (name for name in _RATE_NAMES if isinstance(getattr(module, name, None), float))
    return next((name for name in rates if getattr(module, name) > 0), None)


def plan(
    captured: Captured,
    recipe: Recipe,
    *,
    total_steps: int | None = None,
    steps_per_epoch: int | None = None,
    sites: Sites | None = None,
) -> Plan:
    """Plan a recipe on a captured model.

    Args:
        captured: the model and its flat view.
        recipe: a checked recipe.
        total_steps: length of the training in optimizer steps; needed where a schedule gives steps or epochs.
        steps_per_epoch: needed where a schedule gives epochs.
        sites: those of the model, where they have been looked for before.

    Raises:
        PlanError: an entry hits nothing or not what it expects, two entries collide, a rate leaves [0, 1], or a
            length is no count.
    """
    check_count("total_steps", total_steps)
    check_count("steps_per_epoch", steps_per_epoch)
    return _Planner(captured, recipe, (total_steps, steps_per_epoch), sites).plan()


class _Planner:
    def __init__(
        self, captured: Captured, recipe: Recipe, times: tuple[int | None, int | None], sites: Sites | None
    ) -> None:
        self.captured = captured
        self.recipe = recipe
        self.times = times
        declared = {name: chain(name, kinds) for name, kinds in recipe.patterns.items()}
        self.sites = sites if sites is not None and not declared else Sites(captured, declared)
        self.placed: dict[Any, list[Edit]] = {}
        self.called: Counter[str] = Counter()
        self.notes: list[str] = []
        self.misses: dict[str, tuple[str, ...]] = {}
        self.problems: list[str] = []

    def plan(self) -> Plan:
        for index, entry in enumerate(self.recipe.entries):
            self._entry(entry, f"entries[{index}] '{entry.name}'")
        edits = [edit for edits in self.placed.values() for edit in edits]
        self.problems += _shared_layers(self.sites.graph, edits)
        self.problems += _incomplete(edits)
        hits = Counter(edit.entry for edit in edits)
        counts = {entry.name: hits[entry.name] for entry in self.recipe.entries}
        for index, entry in enumerate(self.recipe.entries):
            self._expected(entry, f"entries[{index}] '{entry.name}'", counts[entry.name])
        if self.problems:
            head = f"{self.recipe.name} does not fit {type(self.captured.model).__name__}:"
            raise PlanError("\n  ".join([head, *self.problems]))
        if not edits:
            warnings.warn(
                f"{self.recipe.name} changes nothing on {type(self.captured.model).__name__}: "
                "all entries are optional, and none hits anything",
                SurgeryWarning,
                stacklevel=4,
            )
        order = {node: index for index, node in enumerate(self.sites.graph.nodes)}
        edits.sort(key=lambda edit: order[edit.site.at.node] if edit.site.at else 0)
        name = type(self.captured.model).__name__
        return Plan(self.recipe, name, tuple(edits), counts, self.misses, tuple(self.notes), self.times[0])

    def _entry(self, entry: Entry, where: str) -> None:
        try:
            candidates = self._candidates(entry)
            schedule = entry.schedule.resolve(*self.times)
            chosen = self._chosen(entry, candidates)
            if not chosen:
                self.misses[entry.name] = tuple(self._nearest(entry, candidates))
            rule = _eval_rule(entry) if chosen else ""
            for site, share in chosen:
                self._place(entry, replace(self._edit(entry, site, share, schedule), eval_rule=rule))
        except SurgeryError as error:
            self.problems.append(f"{where}: {error}")

    def _candidates(self, entry: Entry) -> list[Site]:
        if entry.pattern is None:
            return self.sites.stochastic
        pattern = self.sites.pattern(entry.pattern)
        return self.sites.of(entry.pattern, entry.edge or pattern.default_edge)

    def _chosen(self, entry: Entry, candidates: list[Site]) -> list[tuple[Site, float]]:
        """The sites that `where` leaves, each with its share of the rate by the entry's depth rule."""
        shares = [1.0] * len(candidates) if entry.depth_rule == "cells" else _depth_shares(entry.depth_rule, candidates)
        refused = {_key(site.at) for name in entry.where.not_on or () for site in self._named(name)}
        left = [
            (site, share)
            for site, share in zip(candidates, shares, strict=True)
            if entry.where.matches_facts(site) and _key(site.at) not in refused
        ]
        chosen = list(entry.where.pick(left))
        # The others may well be in no block: what joins the cells, or the head.
        return [(site, _cell_share(site)) for site, _ in chosen] if entry.depth_rule == "cells" else chosen

    def _named(self, name: str) -> list[Site]:
        pattern, _, edge = name.rpartition(".")
        return self.sites.of(pattern, edge)

    def _edit(self, entry: Entry, site: Site, share: float, schedule: Schedule) -> Edit:
        factor = share * entry.scale.factor(site)
        if entry.insert == ADOPT:
            module = site.at.node.meta["module"] if site.at else None
            name = str(rate_name(module))
            p = _scaled(site, name, float(entry.arguments.get("p", getattr(module, name))), factor)
            return Edit(site, ADOPT, type(module).__name__, p, schedule, entry.name, {name: p})
        cls = catalogue.load("regularizers", entry.insert)
        kind = cls.kind_by(entry.arguments)
        _check_kind(kind, entry, site)
        arguments = dict(entry.arguments)
        for name, value in rates_of(cls, arguments).items():
            arguments[name] = _scaled(site, name, value, factor)
        p = max(rates_of(cls, arguments).values(), default=0.0)
        return Edit(site, kind, entry.insert, arguments.get("p", p), schedule, entry.name, arguments)

    def _place(self, entry: Entry, edit: Edit) -> None:
        """Put an edit on its edge: alone, merged with an equal one, or stacked."""
        # An adopted layer stays where it is and takes no edge: layers in a row do not meet.
        key = (edit.kind, edit.site.module) if edit.kind in (ADOPT, "swap") else _key(edit.site.at)
        if edit.kind == "combine":  # what stands in for a sum leaves the edge behind it free
            key = (edit.kind, key)
        there = self.placed.setdefault(key, [])
        for index, other in enumerate(there):
            if (other.regularizer, other.arguments, other.schedule) == (
                edit.regularizer,
                edit.arguments,
                edit.schedule,
            ):
                there[index] = replace(other, merged=(*other.merged, f"{entry.name}: {edit.site.id}"))
                self.notes.append(f"merged: {edit.site.id} of '{entry.name}' is {other.site.id} of '{other.entry}'")
                return
        if there and not entry.stack:
            other = there[-1]
            raise PlanError(
                f"{edit.site.id}: {edit.regularizer}{edit.arguments} meets {other.regularizer}{other.arguments} of "
                f"'{other.entry}' on one edge; leave one out, or say `stack: true` in the later entry to have both"
            )
        if there and edit.kind in ("combine", "swap"):
            raise PlanError(f"{edit.site.id}: {there[-1].regularizer} stands there already, and two cannot")
        site = edit.site
        if there and there[0].site.at is not site.at:  # the same place in the graph: they run in the entries' order
            site = replace(site, at=there[0].site.at, owner=there[0].site.owner)
        same = self.called[site.id]
        self.called[site.id] += 1
        if same:
            site = replace(site, id=f"{site.id}+{same}")
        edit = replace(edit, site=site)
        there.append(edit)

    def _expected(self, entry: Entry, where: str, count: int) -> None:
        missed = "".join(f"\n      {line}" for line in self.misses.get(entry.name, ()))
        if count == 0 and entry.optional:
            self.notes.append(f"'{entry.name}' hits nothing (optional){missed}")
        elif not entry.expect.holds(count) and not any(line.startswith(where) for line in self.problems):
            merged = sum(note.startswith("merged") and f"of '{entry.name}' is" in note for note in self.notes)
            also = f" ({merged} merged into earlier entries; `expect: any` accepts that)" if merged else ""
            near = f"; nearest:{missed}" if missed else f"; nothing comes near '{entry.pattern}'"
            self.problems.append(f"{where}: expected {entry.expect} sites, hit {count}{also}{near}")

    def _nearest(self, entry: Entry, candidates: Sequence[Site]) -> Iterable[str]:
        """Why an entry hits nothing: the sites that `where` refused, or the places where the pattern almost fits."""
        if candidates:
            edge = f"{candidates[0].pattern}.{candidates[0].edge.partition('[')[0]}"
            reasons = Counter(entry.where.why_not(site) or "left out by index, every or not_on" for site in candidates)
            yield f"{len(candidates)} sites of {edge}, refused by where: " + ", ".join(
                f"{reason} ({count}x)" for reason, count in reasons.most_common(5)
            )
        elif entry.pattern is None:
            yield "the model has no stochastic layer with a rate above 0 (timm builds none at rate 0)"
        else:
            found = self.sites.found(entry.pattern)
            edge = entry.edge or self.sites.pattern(entry.pattern).default_edge
            without = [miss for match in found.matches if isinstance(miss := match.edges(edge), Miss)]
            for miss in nearest(without) or found.nearest():
                yield f"{miss.node.meta.get('path', 'the output')}: {miss.reason}"


def _eval_rule(entry: Entry) -> str:
    """What the regularizer of an entry does in eval, in words; it may hang on its arguments."""
    if entry.insert == ADOPT:
        return "identity"
    rule: str = catalogue.load("regularizers", entry.insert)(**entry.arguments).eval_rule
    return rule


def _check_kind(kind: str, entry: Entry, site: Site) -> None:
    """Refuse a regularizer on an edge where its kind of surgery is none."""
    edge = f"{site.pattern}.{site.edge}"
    if kind not in _KINDS:
        raise PlanError(f"{entry.insert} is a {kind!r} regularizer; expected one of {', '.join(_KINDS)}")
    if (kind == "swap") != bool(site.at and site.at.layer):
        layer, tensor = "an edge named 'module' or '…_module' (the layer itself)", "an edge that a tensor travels on"
        wanted = layer if kind == "swap" else tensor
        raise PlanError(f"{site.id}: {entry.insert} ({kind}) needs {wanted}, got {edge}")
    if kind == "combine" and not (site.at and site.at.operand is None and _is_plain_sum(site.at.node)):
        raise PlanError(f"{site.id}: {entry.insert} stands in for a sum of two tensors, and {edge} is none")


def _shared_layers(graph: fx.Graph, edits: Sequence[Edit]) -> Iterator[str]:
    """What would act where it was not asked for: a stand-in for a layer that is called elsewhere too."""
    swaps = [edit for edit in edits if edit.kind == "swap"]
    nodes = [node for node in graph.nodes if "module" in node.meta] if swaps else []
    # By their names: what lies in a module that is called again is one site.
    calls = Counter(module for module, _, _ in {(n.meta["module"], n.meta["path"], n.meta["call"]) for n in nodes})
    for edit in swaps:
        count = calls[edit.site.at.node.meta["module"]] if edit.site.at and edit.site.at.module is None else 0
        sites = 1 + len(edit.merged)
        if count > sites:
            yield (
                f"{edit.site.id}: '{edit.site.module}' is called {count} times, of which {sites} are sites; "
                f"{edit.regularizer} would act in all of them. Leave it out (`where: {{exclude: …}}`)"
            )


def _incomplete(edits: Sequence[Edit]) -> Iterator[str]:
    """What regularizers miss that need more than one place to do what they should."""
    by_name: dict[str, list[Site]] = {}
    for edit in edits:
        if edit.kind != ADOPT:
            by_name.setdefault(edit.regularizer, []).append(edit.site)
    for name, sites in by_name.items():
        yield from catalogue.load("regularizers", name).incomplete(sites)


def _is_plain_sum(node: fx.Node) -> bool:
    """Whether a node adds two tensors and does nothing else."""
    return kind_of(node) == "add" and len(node.args) == 2 and not node.kwargs and len(tensor_inputs(node)) == 2


def rates_of(cls: Any, arguments: dict[str, Any]) -> dict[str, float]:
    """The rates among a regularizer's arguments, defaults included: what is named `p` or `p_*`."""
    known = catalogue.arguments(cls)
    rates = {name: arguments.get(name, spec.default) for name, spec in known.items() if _is_rate(name)}
    return {name: float(value) for name, value in rates.items() if value is not inspect.Parameter.empty}


def _scaled(site: Site, name: str, value: float, factor: float) -> float:
    if not 0 <= value * factor <= 1:
        raise PlanError(f"{site.id}: {name} = {value:g} x {factor:g} is not in [0, 1]; mend `scale`")
    return value * factor


def _is_rate(name: str) -> bool:
    return name == "p" or name.startswith("p_")


def _depth_shares(rule: str, sites: Sequence[Site]) -> list[float]:
    """The share of its rate that each site gets; the operands of one join have one place in the order."""
    places = list(dict.fromkeys(site.at.node for site in sites if site.at))
    index = {node: place for place, node in enumerate(places)}
    count = len(places)
    shares = []
    for site in sites:
        place = index[site.at.node] if site.at else 0
        if rule == "linear":
            shares.append((place + 1) / count)
        elif rule == "linear0":
            shares.append(place / (count - 1) if count > 1 else 1.0)
        else:
            shares.append(1.0)
    return shares


def _cell_share(site: Site) -> float:
    if site.block is None:
        raise PlanError(f"{site.id}: depth_rule 'cells' needs repeated blocks, and this site is in none")
    index, count = site.block
    return (index + 1) / count


def _key(at: Edge | None) -> Any:
    """One key for one edge, however it is named: an operand that is its source's only use is the source's output."""
    if at is None:
        return None
    node = at.node
    if at.operand is not None:
        source = at.source
        users = [node, *(user for user, _ in at.also)]
        if set(source.users) != set(users) or any(_uses(user, source) > 1 for user in users):
            return (node, at.operand)
        node = source
    elif at.but:
        return (node, at.but)
    while node.meta.get("identity") and len(node.all_input_nodes[0].users) == 1:
        node = node.all_input_nodes[0]
    return node


def _uses(node: fx.Node, source: fx.Node) -> int:
    count = 0

    def visit(item: fx.Node) -> fx.Node:
        nonlocal count
        count += item is source
        return item

    fx.map_arg((node.args, node.kwargs), visit)
    return count
