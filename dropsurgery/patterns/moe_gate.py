"""The gate of a mixture of experts: a product with weights gives scores, which are activated and chosen from.

    x ─ scorer ─ logits ─ softmax, sigmoid … ─ topk, argmax …  ─ weights, indices ─▶ experts      in either order
    x ─ scorer ─ logits ─ softmax, sigmoid ─ weights ─▶ all experts                                a dense gate

Found by dataflow: the scorer is a linear layer or a product with a parameter; casts, shapes, scaling, a bias, noise
and masks lie between. As many experts as there are scores have to be in sight, in what takes the weights or beside the
gate (`_experts.py`); without them it is a candidate, told among the misses and left alone. Attention, scores that come
from a convolution, a gate of one, a softmax or a choice over tokens, and sparsemixer are none.

Where a gate's forward stays Python, its linear layer is taken by itself if experts are beside it; where there is no
such layer either, the miss names the line that stands in the way.

Edges:
- `logits`: the scores before they are activated or chosen from, after casts, by one call for both; what the gate gives
  out for balance losses stays as it is. `selection`: the scores with the bias that only the choice sees.
- `input`: what the scorer alone reads. `probabilities`: the weights as they leave for the experts. `indices`: the
  experts that were chosen.
- `hidden`: what the last layer inside of each expert reads. `output`: the sum over the experts.
- `block`: the module that holds gate and experts, to be swapped.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from torch import fx

from dropsurgery.kinds import data_inputs, kind_of, mixes, tensor_inputs, tensor_users
from dropsurgery.matching import Match, Miss, Op, Pattern, called
from dropsurgery.patterns._experts import place, within
from dropsurgery.patterns._gates import Gate, Refusal, capacity_axis, count_of, gate_at, returned, width_of
from dropsurgery.patterns._scores import Scores, argument, axis_of, chosen, name_of, operand_of, shape_of
from dropsurgery.records import Edge, GateFact


@dataclass(frozen=True)
class _Gates(Pattern):
    """Matches at the scorer; how near a miss came is its own depth."""

    def match(self, node: fx.Node) -> Match | Miss:
        """The gate whose scorer is at a node; a forward that stays Python may hide one."""
        if node.meta.get("opaque"):
            return _hidden_gate(node)
        if kind_of(node) not in ("linear", "matmul", "conv"):
            return Miss("no scorer", node)
        found = gate_at(node)
        if isinstance(found, Refusal):
            return Miss(found.reason, node, found.depth)
        return Match(self, {"scorer": node})


def _hidden_gate(node: fx.Node) -> Miss:
    """A forward that stays Python, beside experts, and no linear layer to take instead."""
    root = node.graph.owning_module
    path: str = node.meta["path"]
    if root is None or not path:
        return Miss("a forward that stays Python", node)
    around = path.rpartition(".")[0]
    for home, held in ((path, root.get_submodule(path).modules()), (around, root.get_submodule(around).children())):
        inside = [
            other for other in node.graph.nodes if other is not node and within(other.meta.get("owner", "-"), home)
        ]
        told = (gate_at(other) for other in inside if kind_of(other) in ("linear", "matmul"))
        if any(map(_lists, held)) and not any(isinstance(each, Gate) or each.depth > 1 for each in told):
            why = f"{node.meta['reason']}, at {node.meta['line']}" if node.meta.get("line") else node.meta["reason"]
            # What lies further in is nearer to the gate.
            return Miss(f"unsupported: '{path}' stays Python ({why})", node, 3 + path.count("."))
    return Miss("a forward that stays Python", node)


def _lists(module: object) -> bool:
    """Whether a module may hold all experts in one parameter."""
    parameters = getattr(module, "_parameters", {})
    return any(p is not None and p.ndim == 3 and p.shape[0] > 1 for p in parameters.values())


def _gate(match: Match) -> Gate:
    found = gate_at(match.nodes["scorer"])
    assert isinstance(found, Gate), found
    return found


# -- edges -----------------------------------------------------------------------------------------------------------
def _logits(match: Match) -> tuple[Edge, ...] | Miss:
    gate = _gate(match)
    scorer = gate.scores.scorer
    if gate.lone:
        return (Edge(scorer, module=scorer.meta["path"]),)
    users = {alias.node: _decides(gate, alias.node) for alias in gate.scores.logits}
    sources = [node for node, deciding in users.items() if deciding]
    edges: list[Edge] = []
    for source in sources:
        edges += _for_some(source, users[source], gate)
    if len(edges) > 1:
        common = _common(gate, sources)
        edges = list(_for_some(*common, gate)) if common is not None else edges
    return tuple(edges) or Miss("the logits are taken by keyword, only positions can be reached", scorer)


def _decides(gate: Gate, node: fx.Node) -> list[fx.Node]:
    """The users of logits by which experts are weighted or chosen, none that only looks at shapes."""
    scores, found = gate.scores, []
    for user in tensor_users(node):
        if user.op == "output" or (user in scores.aliases and not scores.aliases[user].scores):
            continue
        if (
            user in scores.aliases
            or user in scores.choices
            or (user in scores.derived and _leads_to_choice(user, gate))
        ):
            found.append(user)
    return found


def _leads_to_choice(node: fx.Node, gate: Gate) -> bool:
    """Whether a node has a part in the choice or in the weights."""
    ends = {node for node in (gate.choice, gate.weights, gate.activation) if node is not None}
    seen: set[fx.Node] = set()
    queue = [node]
    while queue:
        each = queue.pop()
        if each in ends:
            return True
        if each not in seen and each in gate.scores.derived and name_of(each) not in ("full_like", "zeros_like"):
            seen.add(each)
            queue += [user for user in tensor_users(each) if user.op != "output"]
    return False


def _for_some(source: fx.Node, users: list[fx.Node], gate: Gate) -> list[Edge]:
    """One call for some users of a tensor, for each forward that they are in."""
    by_owner: dict[str, list[fx.Node]] = defaultdict(list)
    for user in sorted(users):
        by_owner[user.meta["owner"]].append(user)
    beside = (("input", Edge(gate.scores.scorer, gate.operand)),)
    edges = []
    for group in by_owner.values():
        positions = [(user, operand) for user in group if (operand := operand_of(user, source)) is not None]
        if len(positions) == len(group):
            (first, operand), *others = positions
            edges.append(Edge(first, operand, also=tuple(others), beside=beside))
    return edges


def _common(gate: Gate, sources: list[fx.Node]) -> tuple[fx.Node, list[fx.Node]] | None:
    """The latest form of the logits that all of these come from, and those of its users that lead to them."""
    ways = [_way(gate, source) for source in sources]
    shared = [node for node in ways[0] if all(node in way for way in ways)]
    if not shared:
        return None
    source = shared[0]
    users = [
        user
        for user in tensor_users(source)
        if user.op != "output" and (any(user in way for way in ways) or user in _decides(gate, source))
    ]
    if any(_gives_out(node, gate) for way in ways for node in way[: way.index(source)]):
        return None
    return source, users


def _way(gate: Gate, node: fx.Node) -> list[fx.Node]:
    """A form of the logits, and those before it, back to the scorer."""
    way: list[fx.Node] = []
    at: fx.Node | None = node
    while at is not None:
        way.append(at)
        at = gate.scores.aliases[at].before
    return way


def _gives_out(node: fx.Node, gate: Gate) -> bool:
    level_node = node.meta.get("level_node")
    return level_node is not None and any(user.op == "output" for user in level_node.users)


def _selection(match: Match) -> tuple[Edge, ...] | Miss:
    gate = _gate(match)
    if gate.corrected is None:
        return Miss("no bias is added for the choice alone", gate.scores.scorer)
    return (Edge(gate.corrected), *(Edge(node) for node in _filled_up(gate)))


def _filled_up(gate: Gate) -> list[fx.Node]:
    """Fills of scores between the bias and the choice by numbers that what is masked before them falls short of.

    Groups of experts that were not chosen may be filled with zeros: more than the scores of masked ones.
    """
    assert gate.choice is not None
    scores, found = gate.scores, []
    at = next((source for source in data_inputs(gate.choice) if source in scores.aliases), None)
    while at is not None and at is not gate.corrected:
        fill = argument(at, 2, "value" if name_of(at) == "masked_fill" else "other")
        if name_of(at) in ("masked_fill", "where") and not (isinstance(fill, (int, float)) and fill < _LOWEST):
            found.append(at)
        at = scores.aliases[at].before
    return found


_LOWEST = -1e30


def _input(match: Match) -> tuple[Edge, ...] | Miss:
    gate = _gate(match)
    scorer = gate.scores.scorer
    return (Edge(scorer, gate.operand, module=scorer.meta["path"] if gate.lone else None),)


def _probabilities(match: Match) -> tuple[Edge, ...] | Miss:
    gate = _gate(match)
    if gate.weights is None:
        several = "each choice has weights of its own, and no tensor holds them all" if not gate.lone else ""
        return Miss(several or _not_seen(gate, "the weights"), gate.scores.scorer)
    other = _on_another_axis(gate)
    return (Edge(gate.weights),) if other is None else other


def _on_another_axis(gate: Gate) -> Miss | None:
    """Why what was chosen cannot be taken for (..., k)."""
    axis = axis_of(gate.choice) if gate.choice is not None and gate.weights_axis is None else -1
    if axis == -1 or name_of(gate.choice) in ("argmax", "max"):  # type: ignore[arg-type]
        return None
    return Miss(f"the chosen of each token are on axis {axis}, and the last is expected", gate.scores.scorer)


def _indices(match: Match) -> tuple[Edge, ...] | Miss:
    gate = _gate(match)
    if gate.choice is None:
        return Miss(_not_seen(gate, "indices") if gate.lone else "a dense gate chooses none", gate.scores.scorer)
    _, indices = chosen(gate.choice)
    if name_of(gate.choice) in ("argmax", "max") and (count_of(gate) or 0) > 1:
        return Miss("each choice gives an index of its own, and no tensor holds them all", gate.choice)
    if indices is None:
        return Miss(f"{called(gate.choice)} gives no indices that are used", gate.choice)
    lookups = [user for user in tensor_users(indices) if user in gate.scores.derived and name_of(user) in _LOOKUPS]
    level_node = indices.meta["level_node"]
    kept = {user.meta["level_node"] for user in lookups if user.meta["owner"] == indices.meta["owner"]}
    if all(user in kept for user in level_node.users):
        return Miss("the chosen are written to their places among all experts (a mask), no indices leave", indices)
    other = _on_another_axis(gate)
    if other is not None:
        return other
    return (Edge(indices, but=tuple(user for user in lookups if user.meta["level_node"] in kept)),)


_LOOKUPS = frozenset({"gather", "scatter", "scatter_add", "one_hot", "take_along_dim", "index_select", "index_fill"})


def _hidden(match: Match) -> tuple[Edge, ...] | Miss:
    gate = _gate(match)
    graph, experts = gate.scores.scorer.graph, gate.experts
    if experts.modules:
        lasts = [_last_layer(graph, path) for path in experts.modules]
        edges = [Edge(layer, operand) for layer, operand in filter(None, lasts)]
        whole = len(edges) == len(lasts)
        return (
            tuple(edges) if whole else Miss("the experts have no hidden units, or are in no graph", gate.scores.scorer)
        )
    if gate.choice is None and not gate.lone and experts.stacked is not None:
        return Miss("the experts are weights that are summed, without units of their own", gate.scores.scorer)
    if gate.lone:
        return Miss(_not_seen(gate, "hidden units of experts"), gate.scores.scorer)
    if experts.stacked is not None:
        found = _stacked_layers(graph, experts.home or experts.stacked, gate.scores)
        if found:
            return tuple(found)
    return Miss("the experts are in no graph: their forward stays Python", gate.scores.scorer)


def _last_layer(graph: fx.Graph, expert: str) -> tuple[fx.Node, int] | None:
    """The last of several layers of an expert, and where it takes the hidden units."""
    layers = [
        node for node in graph.nodes if _is_layer(node) and within(place(node), expert) and "level_node" in node.meta
    ]
    if len(layers) < 2:
        return None
    operand = operand_of(layers[-1], data_inputs(layers[-1])[0])
    return (layers[-1], operand) if isinstance(operand, int) else None


def _is_layer(node: fx.Node) -> bool:
    return node.op != "placeholder" and node.meta.get("role") is not None and mixes(node) and bool(data_inputs(node))


def _stacked_layers(graph: fx.Graph, home: str, scores: Scores) -> list[Edge]:
    """What each product with the last parameter that holds all experts takes."""
    by_weight: dict[fx.Node, list[fx.Node]] = {}
    experts = scores.experts
    for node in graph.nodes:
        if node.meta.get("role") is None or not within(node.meta.get("owner", "-"), home) or node.op == "placeholder":
            continue
        if _rows_of(node) is not None:  # the weights of chosen experts are looked up in it, nothing is multiplied yet
            continue
        for source in tensor_inputs(node):
            weight = _parameter(source, experts)
            if weight is not None and _data(node, experts):
                by_weight.setdefault(weight, []).append(node)
    products = [
        nodes
        for nodes in by_weight.values()
        if any(len(shape_of(weight)) > 2 for weight in by_weight if by_weight[weight] is nodes)
    ]
    if len(products) < 2:
        return []
    edges = []
    for node in products[-1]:
        main = max(_data(node, experts), key=lambda source: len(shape_of(source)))
        operand = operand_of(node, main)
        if operand is None:
            return []
        edges.append(Edge(node, operand))
    return edges


def _data(node: fx.Node, experts: int) -> list[fx.Node]:
    """What a product takes besides weights, slices of them that the choice looked up included."""
    return [source for source in data_inputs(node) if _parameter(source, experts) is None]


def _parameter(node: fx.Node, experts: int, depth: int = 6) -> fx.Node | None:
    """The parameter of all experts that a tensor is a form or a slice of, or rows of by the chosen's indices."""
    looked_up = _rows_of(node)
    if looked_up is not None and depth:
        return _parameter(looked_up, experts, depth - 1)
    if node.meta["role"] is not None:
        inputs = tensor_inputs(node)
        turned = kind_of(node) == "layout" and len(inputs) == 1 and depth
        return _parameter(inputs[0], experts, depth - 1) if turned else None
    if node.op == "get_attr":
        shape = shape_of(node)
        return node if len(shape) > 2 and shape[0] == experts else None
    found = (_parameter(source, experts, depth - 1) for source in tensor_inputs(node)) if depth else ()
    return next((each for each in found if each is not None), None)


def _rows_of(node: fx.Node) -> fx.Node | None:
    """The constant tensor in which rows are looked up by indices that are data; None where a node does not do that."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or name_of(node) not in ("getitem", "index_select"):
        return None
    return source if source.meta.get("role") is None and node.meta.get("role") is not None else None


def _output(match: Match) -> tuple[Edge, ...] | Miss:
    gate = _gate(match)
    scorer, experts = gate.scores.scorer, gate.experts
    if gate.choice is None and experts.mixed is not None:
        kernels = experts.home is None
        return Miss("the experts are weights that are summed", scorer) if kernels else (Edge(experts.mixed),)
    home = experts.home
    if not home or gate.lone:
        return Miss(
            _not_seen(gate, "the sum over the experts") if gate.lone else "no module holds gate and experts alone",
            scorer,
        )
    for node in reversed(scorer.graph.nodes):
        if node.meta.get("owner") == home and _is_result(node):
            return (Edge(node),)
    return Miss(f"'{home}' stays Python, or gives nothing of its own", scorer)


def _is_result(node: fx.Node) -> bool:
    """Whether a tensor is what the forward that it is in gives."""
    if node.op in ("placeholder", "output") or not shape_of(node) or "level_node" not in node.meta:
        return False
    level_node: fx.Node = node.meta["level_node"]
    return any(user.op == "output" for user in level_node.users)


def _block(match: Match) -> tuple[Edge, ...] | Miss:
    gate = _gate(match)
    home = gate.experts.home
    scorer = gate.scores.scorer
    if not home or _holds_more(gate, home):
        return Miss("no module holds gate and experts alone", scorer)
    if not any(home in (node.meta.get("owner"), node.meta.get("path")) for node in scorer.graph.nodes):
        return Miss(f"nothing calls '{home}' itself, only methods of it or its parts", scorer)
    return (Edge(scorer, layer=True, module=home),)


def _holds_more(gate: Gate, home: str) -> bool:
    """Whether a module does more than to mix experts: it adds its own input to the result, or attends."""
    for node in gate.scores.scorer.graph.nodes:
        if not within(node.meta.get("owner", "-"), home):
            continue
        inside = any(within(place(node), path) for path in gate.experts.modules)
        if (_adds_its_input(node) and not inside) or kind_of(node) == "attention":
            return True
    return False


def _adds_its_input(node: fx.Node) -> bool:
    """Whether a sum is a residual one whose shortcut does nothing, and not that with a shared expert."""
    join = node.meta.get("join")
    if join is None or join.shortcut is None:
        return False
    shortcut = node.args[join.shortcut]
    while isinstance(shortcut, fx.Node) and kind_of(shortcut) in ("layout", "identity") and shortcut is not join.fork:
        shortcut = data_inputs(shortcut)[0]
    return shortcut is join.fork


def _not_seen(gate: Gate, what: str) -> str:
    return (
        f"{what} are in no graph: the gate's forward stays Python, and its layer alone is in reach"
        if gate.lone
        else f"{what} are not told apart"
    )


# -- facts -----------------------------------------------------------------------------------------------------------
_WITH_AXIS = ("logits", "selection")


def _fact(match: Match, edge: str, at: Edge) -> GateFact:
    gate = _gate(match)
    scorer = gate.scores.scorer
    axis = gate.weights_axis if edge == "probabilities" else None
    if edge == "logits":
        alias = gate.scores.aliases.get(at.source)
        axis = alias.axis if alias is not None else gate.scores.axis
    elif edge == "selection":
        axis = gate.scores.aliases[at.source].axis
    return GateFact(
        gate=f"{scorer.meta['path']}#{scorer.meta['call']}",
        experts=gate.scores.experts,
        axis=axis,
        k=count_of(gate),
        scores=gate.kind or "unknown",
        order=gate.order,
        bias_corrected=gate.corrected is not None,
        capacity_axis=capacity_axis(gate),
        returned=returned(gate),
        features=width_of(gate),
    )


PATTERN = _Gates(
    "moe_gate",
    forms=[(Op("scorer"),)],
    edges={
        "logits": _logits,
        "selection": _selection,
        "input": _input,
        "probabilities": _probabilities,
        "indices": _indices,
        "hidden": _hidden,
        "output": _output,
        "block": _block,
    },
    gate=_fact,
)
