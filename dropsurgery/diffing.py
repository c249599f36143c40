"""What surgery did to a model, to read: owner by owner the unified diff of its graph, then a summary.

    diff(gm)                  text, in colours on a terminal
    diff(gm, format="json")   the same for programs
    diff(gm, format="html")   one page that needs nothing else

The graph before is the one after without the calls that were inserted.
"""

from __future__ import annotations

import copy
import difflib
import html
import io
import itertools
import json
import os
import sys
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from rich.console import Console
from rich.text import Text
from torch import fx, nn

from dropsurgery.errors import SurgeryError
from dropsurgery.forwards import OWN, SLOTS, Owner
from dropsurgery.graph import undo
from dropsurgery.planning import Plan
from dropsurgery.records import Edit
from dropsurgery.trees import own_class

Format = Literal["text", "json", "html"]

_CONTEXT = 2  # unchanged lines around a change
_STYLES = {
    "title": "bold",
    "place": "cyan",
    "inserted": "bold green",
    "rewired": "green",
    "removed": "red",
    "plain": "",
}
_PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ background: #fff; color: #24292f; font: 13px/1.5 ui-monospace, Consolas, monospace; margin: 2em; }}
pre {{ overflow-x: auto; }}
.title {{ font-weight: bold; }}
.place {{ color: #0550ae; }}
.inserted {{ background: #d2f4d9; font-weight: bold; }}
.rewired {{ background: #effbf1; }}
.removed {{ background: #ffebe9; }}
</style>
<pre>
{lines}
</pre>
</html>
"""


class Line(NamedTuple):
    """One line of the diff and what it is: a key of the styles."""

    text: str
    style: str = "plain"


@dataclass(frozen=True)
class OwnerDiff:
    """The graph of one rewritten module before and after, as lines; `inserted` are the new ones among them.

    `edits` are those of this owner in the order of the graph; `hidden` those that run inside of an activation
    checkpoint, which is one call in this graph.
    """

    path: str
    cls: str
    edits: tuple[Edit, ...]
    hidden: tuple[Edit, ...]
    before: tuple[str, ...]
    after: tuple[str, ...]
    inserted: frozenset[str]

    @property
    def title(self) -> str:
        """What the owner is called."""
        return f"{self.path or 'the model itself'} ({self.cls})"

    def unified(self) -> list[str]:
        """The lines of the unified diff, without its two lines of file names."""
        lines = difflib.unified_diff(self.before, self.after, n=_CONTEXT, lineterm="")
        return list(lines)[2:]


def diff(gm: nn.Module, *, format: Format = "text", color: bool | None = None) -> str:
    """Show what `apply_recipe` changed; nothing is printed.

    Args:
        gm: a model made by `apply_recipe`.
        format: "text" to read, "json" for programs, "html" for a page on its own.
        color: terminal colours in the text; None: where standard output is a terminal.

    Raises:
        SurgeryError: `gm` was not made by `apply_recipe`, or there is no such format.
    """
    if "surgery" not in getattr(gm, "__dict__", {}):
        raise SurgeryError(f"diff: expected a model made by apply_recipe, got {type(gm).__name__}")
    if format == "json":
        return json.dumps(_facts(gm), indent=2, ensure_ascii=False)
    if format == "html":
        return _page(gm)
    if format != "text":
        raise SurgeryError(f"diff: expected format 'text', 'json' or 'html', got {format!r}")
    lines = list(_lines(gm))
    if color is None:
        color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    if color:
        return _coloured(lines)
    return "\n".join(line.text for line in lines)


def plan_facts(plan: Plan) -> dict[str, Any]:
    """A plan in plain data for JSON: the edits with the facts of their sites, hits, misses, notes."""
    return {
        "model": plan.model,
        "recipe": plan.recipe.name,
        "total_steps": plan.total_steps,
        "edits": [edit_facts(edit) for edit in plan.edits],
        "hits": plan.hits,
        "misses": plan.misses,
        "notes": plan.notes,
    }


def edit_facts(edit: Edit) -> dict[str, Any]:
    """An edit in plain data; `start` and `final` are the factors on its rates as training begins and ends."""
    schedule = edit.schedule
    told = {"kind": schedule.kind, **schedule.options, "begin": schedule.begin, "end": schedule.end}
    return {
        "site": site_facts(edit.site),
        "kind": edit.kind,
        "regularizer": edit.regularizer,
        "p": edit.p,
        "arguments": edit.arguments,
        "schedule": {**told, "start": schedule.start, "final": schedule.final},
        "entry": edit.entry,
        "merged": edit.merged,
    }


def site_facts(site: Any) -> dict[str, Any]:
    """A site in plain data: all but its place in the graph."""
    return {name: value for name, value in vars(site).items() if name != "at"}


# -- reading the emitted model -------------------------------------------------------------------------------
def _plan(gm: nn.Module) -> Plan:
    surgery: Any = gm.surgery
    plan: Plan = surgery.plan
    return plan


def _owners(gm: nn.Module) -> list[OwnerDiff]:
    """Every rewritten module, in the order of the model."""
    planned: dict[str, deque[Edit]] = defaultdict(deque)
    for edit in _plan(gm).edits:
        planned[edit.site.id].append(edit)
    found = []
    for path, module in gm.named_modules():
        owner: Owner | None = module.__dict__.get("_owner")
        if owner is not None:
            slots = {f"{SLOTS}.{edit.slot}": planned[edit.site_id].popleft() for edit in owner.edits}
            found.append(_owner_diff(path, module, slots))
    return found


def _owner_diff(path: str, module: nn.Module, slots: Mapping[str, Edit]) -> OwnerDiff:
    cls = own_class(module).__name__
    called = {OWN[0]: cls} | {target: edit.regularizer for target, edit in slots.items()}
    graph: fx.Graph = module.graph  # type: ignore[assignment]
    before = copy.deepcopy(graph)
    for node in [node for node in before.nodes if node.target in slots]:
        undo(node)
    names = _names(graph, called)
    texts = [(node, _written(node, names, called)) for node in graph.nodes]
    calls = {str(node.target): text for node, text in texts if node.target in slots}
    width = max(map(len, calls.values()), default=0)
    comments = {target: f"{text:<{width}}  # {_told(slots[target])}" for target, text in calls.items()}
    return OwnerDiff(
        path,
        cls,
        edits=tuple(slots[target] for target in calls),
        hidden=tuple(edit for target, edit in slots.items() if target not in calls),
        before=tuple(_written(node, names, called) for node in before.nodes),
        after=tuple(comments.get(str(node.target), text) for node, text in texts),
        inserted=frozenset(comments.values()),
    )


def _names(graph: fx.Graph, called: Mapping[str, str]) -> dict[str, str]:
    """Node names for readers: those of the calls that surgery made are short where nothing else is called so."""
    taken = {node.name for node in graph.nodes}
    short = {node.name: str(node.target).rpartition(".")[2] for node in graph.nodes if node.target in called}
    return {name: new for name, new in short.items() if new not in taken}


def _written(node: fx.Node, names: Mapping[str, str], called: Mapping[str, str]) -> str:
    """A node as a line: `act1 = act1(bn1)`; `called` is what to call the targets that surgery made."""
    name = names.get(node.name, node.name)
    args = [_argument(arg, names) for arg in node.args]
    options = [f"{key}={_argument(value, names)}" for key, value in node.kwargs.items()]
    if node.op == "placeholder":
        return f"{name} = input"
    if node.op == "output":
        return f"return {args[0]}"
    if node.op == "get_attr":
        return f"{name} = self.{node.target}"
    if node.op == "call_method":
        return f"{name} = {args[0]}.{node.target}({', '.join([*args[1:], *options])})"
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return f"{name} = {called.get(target, target)}({', '.join([*args, *options])})"


def _argument(value: Any, names: Mapping[str, str]) -> str:
    if isinstance(value, fx.Node):
        return names.get(value.name, value.name)
    if isinstance(value, (tuple, list)):
        inner = ", ".join(_argument(item, names) for item in value)
        if isinstance(value, list):
            return f"[{inner}]"
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {_argument(item, names)}" for key, item in value.items()) + "}"
    if isinstance(value, slice):
        return f"slice({', '.join(_argument(end, names) for end in (value.start, value.stop, value.step))})"
    return str(value) if isinstance(value, (torch.dtype, torch.device)) else repr(value)


def _told(edit: Edit) -> str:
    """Site, rate and entry of an edit in words."""
    start, final = edit.p * edit.schedule.start, edit.p * edit.schedule.final
    rate = f"p {final:g}" if start == final else f"p {start:g} → {final:g}"
    return f"{edit.site.id}  {rate} {edit.schedule}  [{edit.entry}]"


# -- text and page -------------------------------------------------------------------------------------------
def _lines(gm: nn.Module) -> Iterator[Line]:
    plan = _plan(gm)
    owners = _owners(gm)
    yield Line(f"{plan.model} after {plan.recipe.name}", "title")
    for _, group in itertools.groupby(owners, _alike):
        first, *others = group
        yield from (Line(""), Line(first.title, "title"), *_full(first))
        for other in others:
            yield Line(f"{other.title}, as {first.path}", "title")
            yield from (Line(f"+{line}", "inserted") for line in other.after if line in other.inserted)
    yield from (Line(""), Line("summary", "title"))
    yield from (Line(f"  {text}") for text in _summary(gm, owners))


def _alike(owner: OwnerDiff) -> tuple[str, ...]:
    """What the diffs of two blocks have in common that differ by the names of their sites only."""
    return (owner.cls, *(line.replace(f"  # {owner.path}", "  # ") for line in owner.unified()))


def _full(owner: OwnerDiff) -> Iterator[Line]:
    for text in owner.unified():
        if text.startswith("@@"):
            yield Line(text, "place")
        elif text.startswith("-"):
            yield Line(text, "removed")
        elif text.startswith("+"):
            yield Line(text, "inserted" if text[1:] in owner.inserted else "rewired")
        else:
            yield Line(text)
    for edit in owner.hidden:
        yield Line(f"+{edit.regularizer} inside an activation checkpoint  # {_told(edit)}", "inserted")


def _summary(gm: nn.Module, owners: list[OwnerDiff]) -> Iterator[str]:
    plan = _plan(gm)
    before, after = _node_counts(owners)
    yield f"rewritten modules: {len(owners)}; their nodes: {before} before, {after} after"
    hits = ", ".join(f"{name} {count}" for name, count in plan.hits.items())
    yield f"edits: {len(plan.edits)} ({hits})"
    in_graphs = {edit.site.id for owner in owners for edit in (*owner.edits, *owner.hidden)}
    for edit in plan.edits:
        if edit.site.id not in in_graphs:
            yield f"taken over: {edit.regularizer}  # {_told(edit)}"
        for other in edit.merged:
            yield f"merged: {other} into {edit.site.id} of {edit.entry}"
    for name, reasons in plan.misses.items():
        yield f"no site for {name}; nearest:"
        yield from (f"  {reason}" for reason in reasons)
    for rule, count in plan.eval_rules().items():
        yield f"in eval: {rule} at {count} sites"


def _node_counts(owners: list[OwnerDiff]) -> tuple[int, int]:
    return sum(len(owner.before) for owner in owners), sum(len(owner.after) for owner in owners)


def _coloured(lines: list[Line]) -> str:
    console = Console(file=io.StringIO(), force_terminal=True, color_system="standard", highlight=False, soft_wrap=True)
    with console.capture() as captured:
        console.print(Text("\n").join(Text(line.text, _STYLES[line.style]) for line in lines), end="")
    return captured.get()


def _page(gm: nn.Module) -> str:
    plan = _plan(gm)
    spans = (f'<span class="{line.style}">{html.escape(line.text)}</span>' for line in _lines(gm))
    title = html.escape(f"{plan.model} after {plan.recipe.name}")
    return _PAGE.format(title=title, lines="\n".join(spans))


def _facts(gm: nn.Module) -> dict[str, Any]:
    owners = _owners(gm)
    before, after = _node_counts(owners)
    return {
        **plan_facts(_plan(gm)),
        "nodes": {"before": before, "after": after},
        "eval_rules": _plan(gm).eval_rules(),
        "owners": [
            {
                "path": owner.path,
                "class": owner.cls,
                "sites": [edit.site.id for edit in (*owner.edits, *owner.hidden)],
                "diff": owner.unified(),
            }
            for owner in owners
        ],
    }
