"""What becomes of scores: the ways of a gate's logits through casts, masks and activations to the choice of experts.

A tensor is followed as long as it holds one number for each expert: through casts, shapes, scaling, a bias, noise,
masks and whatever else works point by point. What is computed from logits and parameters alone is the gate's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from dropsurgery.graph import Operand
from dropsurgery.kinds import data_inputs, kind_of, kinds_of, mixes, tensor_inputs, tensor_users
from dropsurgery.records import TensorFact

CHOICES = frozenset({"topk", "argmax", "sort", "argsort", "max", "kthvalue", "msort"})
_RISING = {"sigmoid": "sigmoid", "hardsigmoid": "sigmoid", "softplus": "softplus", "exp": "exp"}
_POINTWISE = frozenset(
    {
        *("clamp", "clamp_min", "clamp_max", "clip", "nan_to_num", "tanh", "sqrt", "log", "log1p", "square", "pow"),
        *("abs", "neg", "relu", "gelu", "silu", "elu", "leaky_relu", "logsigmoid", "detach", "clone", "contiguous"),
    }
)
_ARITHMETIC = frozenset({"add", "iadd", "sub", "isub", "mul", "imul", "div", "truediv", "itruediv", "div_", "where"})
_MASKED = frozenset({"masked_fill", "where"})
_COMPARED = frozenset({"lt", "le", "gt", "ge", "less", "greater", "less_equal", "greater_equal"})
_MOST = 200


def name_of(node: fx.Node) -> str:
    """What a node runs, by its plain name: functions, methods, in-place forms and operators alike."""
    if node.op == "call_module":
        module = node.meta.get("module")
        return type(module).__name__.lower() if module is not None else ""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name.rstrip("_")


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """The shape of a node's tensor; empty where it is no single tensor."""
    value = node.meta.get("value")
    return value.shape if isinstance(value, TensorFact) else ()


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a call, by position or by name."""
    return node.kwargs.get(name, node.args[position] if len(node.args) > position else default)


def axis_of(node: fx.Node, default: int | None = -1) -> int | None:
    """The axis that a softmax, a choice or a sum goes over, counted from the end of its input; None where unknown."""
    module = node.meta.get("module")
    if isinstance(module, (nn.Softmax, nn.LogSoftmax)):
        dim: Any = module.dim
    elif name_of(node) == "topk":
        dim = argument(node, 2, "dim", default)
    else:
        dim = argument(node, 1, "dim", default)
    sources = tensor_inputs(node)
    rank = len(shape_of(sources[0])) if sources else 0
    if isinstance(dim, (list, tuple)):
        dim = dim[0] if len(dim) == 1 else None
    if dim is None and kind_of(node) == "softmax":  # as torch takes it
        dim = 0 if rank in (0, 1, 3) else 1
    return (dim - rank if dim >= 0 else dim) if isinstance(dim, int) and rank else None


@dataclass(frozen=True)
class Alias:
    """A tensor with one number for each expert, on the experts' `axis`: logits, or what `scores` made of them.

    `corrected` is the addition of a tensor, of one number for each expert, that lies on the way; `before` the alias
    that it was made of.
    """

    node: fx.Node
    axis: int
    scores: str = ""
    activation: fx.Node | None = None
    corrected: fx.Node | None = None
    before: fx.Node | None = None


@dataclass
class Scores:
    """All that is computed from the logits of one scorer alone."""

    scorer: fx.Node
    axis: int
    experts: int
    aliases: dict[fx.Node, Alias] = field(default_factory=dict)
    derived: dict[fx.Node, None] = field(default_factory=dict)
    choices: list[fx.Node] = field(default_factory=list)
    across: list[fx.Node] = field(default_factory=list)
    """Softmaxes and choices over another axis than that of the experts."""

    @property
    def logits(self) -> list[Alias]:
        """The aliases before any activation."""
        return [alias for alias in self.aliases.values() if not alias.scores]

    @property
    def activations(self) -> list[fx.Node]:
        """The nodes that make scores of logits."""
        return list(dict.fromkeys(alias.activation for alias in self.aliases.values() if alias.activation is not None))


def follow(scorer: fx.Node, axis: int) -> Scores:
    """Follow the logits that a scorer gives."""
    scores = Scores(scorer, axis, shape_of(scorer)[axis])
    scores.aliases[scorer] = Alias(scorer, axis)
    known: set[fx.Node] = {scorer}
    queue = [user for user in tensor_users(scorer) if user.op != "output"]
    # In the order of the graph, so that all that a node takes is known before it.
    while queue and len(known) < _MOST:
        node = min(queue)
        queue = [other for other in queue if other is not node]
        inputs = data_inputs(node)
        if node in known or not inputs:
            continue
        own = all(source in known for source in inputs) and not _ends(node)
        made = _alias(scores, node, own)
        if own or made is not None:
            known.add(node)
            scores.derived[node] = None
            queue += [user for user in tensor_users(node) if user.op != "output"]
        if made is not None:
            scores.aliases[node] = made
        else:
            _note_choice(scores, node)
    return scores


def _ends(node: fx.Node) -> bool:
    """Whether a node is a layer: what it makes of scores is no more the gate's."""
    return mixes(node) or kind_of(node) in ("norm", "norm_act", "pool", "cat")


def _note_choice(scores: Scores, node: fx.Node) -> None:
    sources = [scores.aliases[source] for source in data_inputs(node) if source in scores.aliases]
    if not sources or (name_of(node) not in CHOICES and kind_of(node) != "softmax"):
        return
    if name_of(node) == "max" and len(node.args) < 2 and "dim" not in node.kwargs:
        return
    (scores.choices if axis_of(node, -1) == sources[0].axis else scores.across).append(node)


def _alias(scores: Scores, node: fx.Node, own: bool) -> Alias | None:
    """The alias that a node makes of an earlier one; None where it makes something else."""
    sources = [scores.aliases[source] for source in data_inputs(node) if source in scores.aliases]
    shape = shape_of(node)
    if not sources or not shape:
        return None
    first = sources[0]
    name, kinds = name_of(node), kinds_of(node)
    if kind_of(node) == "softmax":
        if name == "log_softmax" or axis_of(node, None) != first.axis:
            return None
        return _made(first, node, "softmax")
    rising = next((_RISING[word] for word in (*kinds, name) if word in _RISING), None)
    if rising is not None:
        return _made(first, node, rising)
    if "permute" in kinds or kind_of(node) == "layout" or name in ("type_as", "long", "int", "bool"):
        axis = _moved(node, first)
        return None if axis is None or name in ("long", "int", "bool") else _same(first, node, axis)
    if shape != shape_of(first.node):
        return None
    if kind_of(node) == "identity" or name in _POINTWISE:
        made = f"{first.scores}_{name}" if first.scores and name in ("sqrt", "square") else first.scores
        return Alias(node, first.axis, made, first.activation, first.corrected, first.node)
    return _arithmetic(scores, node, sources, own)


def _made(source: Alias, node: fx.Node, scores: str) -> Alias:
    return Alias(node, source.axis, scores, node, source.corrected, source.node)


def _same(source: Alias, node: fx.Node, axis: int | None = None) -> Alias:
    axis = source.axis if axis is None else axis
    return Alias(node, axis, source.scores, source.activation, source.corrected, source.node)


def _arithmetic(scores: Scores, node: fx.Node, sources: list[Alias], own: bool) -> Alias | None:
    name = name_of(node)
    if name not in _ARITHMETIC and name not in _MASKED and kind_of(node) not in ("add", "mul"):
        return None
    first = next((alias for alias in sources if alias.node is _main(node)), sources[0])
    others = [other for other in tensor_inputs(node) if other is not first.node]
    if not all(other.meta["role"] is None or other in scores.derived or _random(other) for other in others):
        return None
    if own and name in ("add", "iadd", "sub", "isub") and len(sources) > 1:
        return None  # two ways meet: no mask, and no noise
    corrected = first.corrected
    if name in ("add", "iadd", "sub", "isub") and any(_per_expert(other, scores.experts) for other in others):
        corrected = node
    return Alias(node, first.axis, first.scores, first.activation, corrected, first.node)


def _main(node: fx.Node) -> Any:
    """The argument that goes on, changed: of `where` the second, else the first."""
    return node.args[1] if name_of(node) == "where" and len(node.args) > 1 else node.args[0] if node.args else None


def _per_expert(node: fx.Node, experts: int) -> bool:
    """Whether a tensor that does not hang on the input has one number for each expert."""
    shape = shape_of(node)
    return node.meta["role"] is None and bool(shape) and _numel(shape) == experts


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _random(node: fx.Node, depth: int = 6) -> bool:
    """Whether random numbers are in a tensor, as in noise that is scaled by something learned."""
    if node.meta.get("random"):
        return True
    return depth > 0 and any(_random(source, depth - 1) for source in tensor_inputs(node))


def _moved(node: fx.Node, source: Alias) -> int | None:
    """Where the experts' axis is after a change of shape or order; None where it is no axis any more."""
    before, after, name = shape_of(source.node), shape_of(node), name_of(node)
    if before == after and name not in ("permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis"):
        return source.axis
    place = source.axis % len(before)
    if name == "permute":
        dims = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], (list, tuple)) else node.args[1:]
        order = [dim % len(before) for dim in dims if isinstance(dim, int)]
        return order.index(place) - len(after) if place in order else None
    if name in ("transpose", "swapaxes", "swapdims"):
        dims = [argument(node, 1, "dim0"), argument(node, 2, "dim1")]
        if not all(isinstance(dim, int) for dim in dims):
            return None
        one, other = (int(dim) % len(before) for dim in dims)
        return {one: other, other: one}.get(place, place) - len(after)
    if name in ("movedim", "moveaxis"):
        return None
    return _reshaped(before, after, place)


def _reshaped(before: tuple[int, ...], after: tuple[int, ...], place: int) -> int | None:
    """The axis of the same extent with as many elements behind it."""
    behind = _numel(before[place + 1 :])
    if _numel(before) != _numel(after):  # expanded
        return -1 if after[-1:] == before[place:][:1] and place == len(before) - 1 else None
    for index in reversed(range(len(after))):
        if after[index] == before[place] and _numel(after[index + 1 :]) == behind:
            return index - len(after)
    return None


def operand_of(node: fx.Node, source: fx.Node) -> Operand | None:
    """At which position a node takes a tensor; None where it does so by name, or more than once."""
    found: list[Operand] = [index for index, item in enumerate(node.args) if item is source]
    for index, item in enumerate(node.args):
        if isinstance(item, (list, tuple)):
            found += [(index, inner) for inner, each in enumerate(item) if each is source]
    named = sum(item is source for item in node.kwargs.values())
    return found[0] if len(found) == 1 and not named else None


def parts_of(node: fx.Node) -> dict[int, fx.Node]:
    """The items of a node that gives several tensors, by their index."""
    return {user.args[1]: user for user in node.users if name_of(user) == "getitem" and isinstance(user.args[1], int)}


def chosen(choice: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
    """What a choice gives: the values that it picks, and their indices; None for what nothing uses."""
    if name_of(choice) in ("argmax", "argsort"):
        return None, choice
    if name_of(choice) == "msort":
        return choice, None
    items = parts_of(choice)
    return items.get(0), items.get(1)


def compared_with_maximum(scores: Scores) -> fx.Node | None:
    """A mask on the logits by their distance to the largest of them, as sparsemixer makes it."""
    for node in scores.derived:
        if name_of(node) not in _MASKED or node not in scores.aliases:
            continue
        mask = node.args[0] if name_of(node) == "where" else argument(node, 1, "mask")
        if isinstance(mask, fx.Node) and mask in scores.derived and _by_maximum(mask, scores):
            return node
    return None


def _by_maximum(mask: fx.Node, scores: Scores) -> bool:
    if name_of(mask) not in _COMPARED:
        return False
    behind, names = [mask], set()
    for node in behind:  # it grows meanwhile
        names.add(name_of(node))
        behind += [source for source in data_inputs(node) if source in scores.derived and source not in behind]
    return not names.isdisjoint(("max", "amax")) and names.isdisjoint(("topk", "sort", "kthvalue"))


def reach(start: fx.Node, limit: int = 4000) -> Iterator[fx.Node]:
    """All nodes that a tensor has a part in."""
    seen: set[fx.Node] = set()
    queue = [start]
    while queue and len(seen) < limit:
        node = queue.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        queue += [user for user in tensor_users(node) if user.op != "output"]
