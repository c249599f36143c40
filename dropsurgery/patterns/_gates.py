"""The parts of a gate: what scores experts, what makes weights of it, what chooses, and who takes the result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from dropsurgery.graph import Operand
from dropsurgery.kinds import data_inputs, kind_of, kinds_of, tensor_inputs, tensor_users
from dropsurgery.matching import called
from dropsurgery.patterns._experts import Experts, beside, mixed, place, taken_by, within
from dropsurgery.patterns._scores import (
    CHOICES,
    Alias,
    Scores,
    argument,
    axis_of,
    chosen,
    compared_with_maximum,
    follow,
    name_of,
    operand_of,
    shape_of,
)
from dropsurgery.records import TensorFact

MOST_EXPERTS = 4096


@dataclass(frozen=True)
class Gate:
    """One gate. `choice` is the last choice among all experts, `activation` what makes weights of scores.

    `weights` is the tensor that leaves for the experts, on the experts' `weights_axis` where it has one for each;
    `corrected` the sum with a bias that the choice alone sees.
    """

    scores: Scores
    operand: Operand
    experts: Experts
    activation: fx.Node | None = None
    kind: str = ""
    choice: fx.Node | None = None
    order: str = ""
    corrected: fx.Node | None = None
    weights: fx.Node | None = None
    weights_axis: int | None = None
    lone: bool = False


@dataclass(frozen=True)
class Refusal:
    """Why a scorer is no gate, and how near it came: 0 for a layer like any other, 3 for a gate without experts."""

    reason: str
    depth: int


def gate_at(node: fx.Node) -> Gate | Refusal:
    """The gate whose scores a node makes."""
    known: Gate | Refusal | None = node.meta.get("gate")
    if known is None:
        known = node.meta["gate"] = _gate_at(node)
    return known


def _gate_at(node: fx.Node) -> Gate | Refusal:
    scorer = _scorer(node)
    if scorer is None:
        return Refusal("no product with weights", 0)
    axis, operand, objection = scorer
    if not shape_of(node) or node.meta.get("role") is None:
        return Refusal("no tensor", 0)
    if _is_lone(node):
        return _lone(node)
    scores = follow(node, axis)
    if not (scores.activations or scores.choices or scores.across):
        return Refusal("neither activated nor chosen from", 0)
    reason = objection or _objection(scores)
    if reason is not None:
        return Refusal(reason, 2 if scores.choices else 1)
    if operand is None:
        return Refusal(f"{called(node)} takes its input by keyword, only positions can be reached", 2)
    return _sparse(scores, operand) if scores.choices else _dense(scores, operand)


def _scorer(node: fx.Node) -> tuple[int, Operand | None, str | None] | None:
    """The experts' axis of a product with weights, where it takes its input, and why it scores no experts."""
    kind, data = kind_of(node), data_inputs(node)
    if kind == "conv":
        return 1 - len(shape_of(node)), 0, "the scores come from a convolution, no scorer of experts is one"
    if kind not in ("linear", "matmul") or not data:
        return None
    if len(data) > 1:
        return -1, None, "both operands of the scores are data: an attention"
    operand = operand_of(node, data[0])
    if kind == "linear":
        return -1, operand, None
    if name_of(node) == "einsum":
        axis = _einsum_axis(node, data[0])
        return (
            (axis, operand, None)
            if axis is not None
            else (-1, operand, "its weights give more axes than that of the experts")
        )
    tensors = [item for item in node.args if isinstance(item, fx.Node)]
    first = tensors[:1] == [data[0]] or name_of(node) in ("addmm", "baddbmm")
    return -1 if first else -2, operand, None


def _einsum_axis(node: fx.Node, data: fx.Node) -> int | None:
    """The one axis of an einsum's result that its weights alone have, counted from the end."""
    equation = node.args[0] if node.args else None
    if not isinstance(equation, str) or "->" not in equation or len(node.args) != 3:
        return None
    left, result = equation.replace(" ", "").split("->")
    given = dict(zip(node.args[1:], left.split(","), strict=False))
    letters = [letter for letter in result if letter not in given.get(data, "") and letter.isalpha()]
    return result.index(letters[0]) - len(result) if len(letters) == 1 else None


def _objection(scores: Scores) -> str | None:
    """Why scores are not those of experts, whatever takes them."""
    if scores.across:
        node = scores.across[0]
        over = (
            "tokens choose no expert there, experts choose tokens"
            if name_of(node) in CHOICES
            else "over tokens, not experts"
        )
        return f"{called(node)} over axis {axis_of(node)}, and the experts' is {scores.axis}: {over}"
    if scores.experts == 1:
        return "a gate of one: with E = 1 there is nothing to choose from"
    if scores.experts > MOST_EXPERTS:
        return f"{scores.experts} scores: words of a vocabulary, not experts"
    if compared_with_maximum(scores) is not None:
        return (
            "sparsemixer: it masks the logits by their distance to the largest, and under another mask its second "
            "choice would be left to chance"
        )
    return None


# -- with a choice -------------------------------------------------------------------------------------------------
def _sparse(scores: Scores, operand: Operand) -> Gate | Refusal:
    choice = max(scores.choices)
    before = _source(scores, choice)
    if not before.scores:  # the second of two choices may be made on the logits again
        before = next((each for c in scores.choices if (each := _source(scores, c)).scores), before)
    activation, kind, order = _activation(scores, choice, before)
    if activation is None:
        return Refusal(f"{called(choice)} of scores that no softmax or sigmoid makes weights of", 2)
    experts = _experts(scores, choice)
    if experts is None:
        return Refusal(
            f"candidate: {order} over {scores.experts} scores, but no {scores.experts} experts are in sight", 3
        )
    corrected = _corrected(scores, before)
    weights, axis = _weights(scores, choice, activation)
    return Gate(scores, operand, experts, activation, kind, choice, order, corrected, weights, axis)


def _source(scores: Scores, choice: fx.Node) -> Alias:
    return next(scores.aliases[source] for source in data_inputs(choice) if source in scores.aliases)


def _activation(scores: Scores, choice: fx.Node, before: Alias) -> tuple[fx.Node | None, str, str]:
    """What makes weights of scores, its kind, and how it and the choice follow each other."""
    how = "argmax_onehot" if name_of(choice) in ("argmax", "max") else "topk"
    if before.scores:
        return before.activation, before.scores, how if how == "argmax_onehot" else f"{before.scores}_{how}"
    # After it, or beside it: the choice is made on the logits, and weights are made of those that were chosen.
    for node in scores.derived:
        kind = "softmax" if kind_of(node) == "softmax" else "sigmoid" if "sigmoid" in kinds_of(node) else ""
        kind = kind or {"softplus": "softplus", "exp": "exp"}.get(name_of(node), "")
        if kind:
            return node, kind, f"topk_{kind}"
    return None, "", how


def _experts(scores: Scores, choice: fx.Node) -> Experts | None:
    scorer = scores.scorer
    root: Any = scorer.graph.owning_module
    found = None
    if root is not None:
        owners = dict.fromkeys((choice.meta["owner"], scorer.meta["owner"]))
        found = beside(root, owners, scores.experts, place(scorer))
    return found or taken_by(scores) or mixed(scores)[0]


def _corrected(scores: Scores, before: Alias) -> fx.Node | None:
    """The sum with a bias, if the weights are looked up in scores without it."""
    sources = [node.args[0] for node in scores.derived if _looks_up(node, scores)]
    plain = [scores.aliases[source] for source in sources if isinstance(source, fx.Node)]
    return before.corrected if any(alias.corrected is None for alias in plain) else None


def _looks_up(node: fx.Node, scores: Scores) -> bool:
    """Whether a node takes the scores of the chosen out of all."""
    if not node.args or node.args[0] not in scores.aliases:
        return False
    by_place = any(each in scores.derived for each in data_inputs(node)[1:])
    return (name_of(node) in _LOOKUPS and by_place) or (
        name_of(node) in ("mul", "where", "masked_fill") and by_place and _comes_from_choice(node, scores)
    )


_LOOKUPS = frozenset({"gather", "getitem", "take_along_dim", "index_select"})


def _comes_from_choice(node: fx.Node, scores: Scores) -> bool:
    """Whether a mask of the chosen is what a node takes besides."""
    seen: list[fx.Node] = data_inputs(node)[1:]
    for each in seen:  # it grows meanwhile
        if each in scores.choices:
            return True
        seen += [source for source in data_inputs(each) if source in scores.derived and source not in seen]
    return False


def _weights(scores: Scores, choice: fx.Node, activation: fx.Node) -> tuple[fx.Node | None, int | None]:
    """The weights as they leave the module that chooses, and the experts' axis where they have one for each."""
    home = choice.meta["owner"]
    start = _first_weights(scores, choice, activation)
    if start is None:
        return None, None
    node = start
    while True:
        users = [
            user for user in tensor_users(node) if _goes_on(user, node, scores) and within(user.meta["owner"], home)
        ]
        if len(users) != 1:
            break
        node = users[0]
    while (
        kind_of(node) == "layout" and len(shape_of(node)) != len(shape_of(data_inputs(node)[0])) and node is not start
    ):
        node = data_inputs(node)[0]
    alias = scores.aliases.get(node)
    axis = (
        alias.axis
        if alias is not None
        else -1
        if shape_of(node)[-1:] == (scores.experts,) and _spread(node, scores)
        else None
    )
    return node, axis


def _first_weights(scores: Scores, choice: fx.Node, activation: fx.Node) -> fx.Node | None:
    """The first tensor that holds the scores of the chosen: those that the choice gives, or those looked up by it."""
    for node in scores.derived:
        if name_of(node) in ("gather", "take_along_dim") and choice < node and _of_scores(node, scores):
            return node
    for node in sorted(scores.choices, reverse=True):
        values, _ = chosen(node)
        if values is not None and any(user.op == "output" or not _only_compares(user) for user in tensor_users(values)):
            return values
    if activation > choice:
        return activation
    masked = [node for node in scores.aliases if choice < node and scores.aliases[node].scores]
    return masked[0] if masked else activation


def _only_compares(node: fx.Node) -> bool:
    return name_of(node) in ("lt", "le", "gt", "ge", "eq", "ne") or (
        name_of(node) == "getitem" and all(map(_only_compares, tensor_users(node)))
    )


def _of_scores(node: fx.Node, scores: Scores) -> bool:
    source = node.args[0] if node.args else None
    return source in scores.aliases


_KEPT = frozenset(
    {"to", "float", "type", "type_as", "clamp", "add", "iadd", "itruediv", "truediv", "div", "mul", "imul"}
)


def _goes_on(user: fx.Node, node: fx.Node, scores: Scores) -> bool:
    """Whether a node makes weights of weights: another form of them, scaled, or divided by their own sum."""
    if user.op == "output" or user not in scores.derived:
        return False
    if kind_of(user) in ("softmax", "layout", "identity") or "sigmoid" in kinds_of(user):
        return True
    if name_of(user) in ("scatter", "scatter_add", "masked_fill", "normalize", "nan_to_num", "softplus", "exp", "sqrt"):
        return True
    first = user.args[0] if user.args else None
    return name_of(user) in _KEPT and first is node and shape_of(user) == shape_of(node)


def _spread(node: fx.Node, scores: Scores) -> bool:
    """Whether weights of the chosen were written to their places among all experts."""
    while node in scores.derived:
        if name_of(node) in ("scatter", "scatter_add", "scatter_reduce"):
            return True
        inputs = [source for source in data_inputs(node) if source in scores.derived]
        if not inputs:
            return False
        node = inputs[0]
    return False


# -- without one ---------------------------------------------------------------------------------------------------
def _dense(scores: Scores, operand: Operand) -> Gate | Refusal:
    activation = scores.activations[0]
    alias = scores.aliases[activation]
    if any(name_of(user) in _LOOKUPS - {"getitem"} for each in scores.aliases for user in tensor_users(each)):
        return Refusal("the experts are looked up, not chosen by their scores: a hash router", 2)
    if alias.scores not in ("softmax", "sigmoid"):
        return Refusal(f"{alias.scores} of a layer, and no gate", 0)
    experts, reason = mixed(scores)
    if experts is None:
        return Refusal(f"{alias.scores} over {scores.experts} scores without a choice: {reason}", 1)
    last = _last(scores, alias)
    return Gate(scores, operand, experts, activation, alias.scores, None, "dense", None, last.node, last.axis)


def _last(scores: Scores, alias: Alias) -> Alias:
    """The weights after all that scales them."""
    while True:
        after = [scores.aliases[user] for user in tensor_users(alias.node) if user in scores.aliases]
        after = [
            each for each in after if kind_of(each.node) != "layout" or shape_of(each.node) == shape_of(alias.node)
        ]
        users = [user for user in tensor_users(alias.node) if user not in scores.derived]
        if len(after) != 1 or users:
            return alias
        alias = after[0]


# -- the last resort: the layer alone -------------------------------------------------------------------------------
def _is_lone(node: fx.Node) -> bool:
    """Whether a forward that stays Python called a layer: what it does with the result is in no graph."""
    return "level_node" not in node.meta and isinstance(node.meta.get("module"), nn.Linear)


def _lone(node: fx.Node) -> Gate | Refusal:
    count = shape_of(node)[-1]
    root: Any = node.graph.owning_module
    path: str = node.meta["path"]
    if root is None or count < 2 or count > MOST_EXPERTS:
        return Refusal("a layer of a forward that stays Python", 0)
    around = path.rpartition(".")[0]
    experts = beside(root, [around], count, path)
    if experts is None or any(within(path, each) for each in (*experts.modules, *filter(None, [experts.stacked]))):
        return Refusal("a layer of a forward that stays Python", 0)
    return Gate(Scores(node, -1, count), 0, experts, order="unknown", lone=True)


def returned(gate: Gate) -> bool:
    """Whether raw logits leave the module that makes them."""
    for alias in gate.scores.logits:
        level_node = alias.node.meta.get("level_node")
        if (
            level_node is not None
            and any(user.op == "output" for user in level_node.users)
            and gate.activation is not None
        ):
            return True
    return False


def capacity_axis(gate: Gate) -> int | None:
    """The axis of the logits along which the chosen tokens of an expert are counted up, to be compared with a limit."""
    rank = len(shape_of(gate.scores.scorer))
    for node in gate.scores.derived:
        if name_of(node) != "cumsum" or len(shape_of(node)) < 2:
            continue
        axis = axis_of(node, None)
        limited = any(name_of(user) in ("lt", "le", "gt", "ge") for user in _near(node))
        if axis is not None and limited and shape_of(node)[axis] != gate.scores.experts and -axis <= rank:
            return axis
    return None


def _near(node: fx.Node, depth: int = 4) -> list[fx.Node]:
    users = [user for user in tensor_users(node) if user.op != "output"]
    return users + [far for user in users if depth for far in _near(user, depth - 1)]


def count_of(gate: Gate) -> int | None:
    """How many experts are chosen for each token."""
    if gate.choice is None:
        return None
    if name_of(gate.choice) == "topk":
        k = argument(gate.choice, 1, "k")
        return k if isinstance(k, int) else None
    if name_of(gate.choice) in ("argmax", "max"):
        return len(
            {source for c in gate.scores.choices if name_of(c) in ("argmax", "max") for source in data_inputs(c)}
        )
    return None


def width_of(gate: Gate) -> int | None:
    """The width of what the scorer reads."""
    source = data_inputs(gate.scores.scorer)[:1]
    value = source[0].meta.get("value") if source else None
    return value.shape[-1] if isinstance(value, TensorFact) and value.shape else None


def weights_in(node: fx.Node) -> list[fx.Node]:
    """The tensors that a node takes and that do not hang on the input."""
    return [source for source in tensor_inputs(node) if source.meta["role"] is None]
