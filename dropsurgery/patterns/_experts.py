"""The experts that a gate chooses from: told by what takes its result, and by what lies beside it.

Experts are alike: as many modules of one class in one list, slices of one parameter, or branches that are stacked.
No name of a class or attribute is read.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import fx, nn

from dropsurgery.kinds import data_inputs, kind_of, mixes, tensor_inputs, tensor_users
from dropsurgery.patterns._scores import Scores, argument, name_of, reach, shape_of


@dataclass(frozen=True)
class Experts:
    """Where the experts of a gate are.

    `home` is the path of the module that holds them and the gate; None where they are in no module of their own.
    `modules` are their paths, where each is a module, `stacked` the path of the module whose parameters hold all of
    them. `mixed` is the node that sums them, for a gate that mixes all.
    """

    home: str | None
    modules: tuple[str, ...] = ()
    stacked: str | None = None
    mixed: fx.Node | None = None


def parent(path: str) -> str:
    """The path of the module around; the root's is its own."""
    return path.rpartition(".")[0]


def within(path: str, home: str) -> bool:
    """Whether a path is that of a module or of something inside it."""
    return not home or path == home or path.startswith(f"{home}.")


def place(node: fx.Node) -> str:
    """The path of what a node calls, or of the module whose forward it is in."""
    path: str = node.meta["path"] if node.op == "call_module" else node.meta["owner"]
    return path


def beside(root: nn.Module, owners: Iterable[str], experts: int, scorer: str) -> Experts | None:
    """The experts that lie in one of the modules around a gate, or two levels above, the nearest first.

    `scorer` is the path of what makes the scores, which is none of the experts.
    """
    homes = dict.fromkeys(home for owner in owners for home in (owner, parent(owner), parent(parent(owner))))
    for home in sorted(homes, key=lambda path: -path.count(".") - bool(path)):
        found = _in(root.get_submodule(home), home, experts, scorer)
        if found is not None:
            return found
    return None


def _in(home: nn.Module, path: str, experts: int, scorer: str) -> Experts | None:
    for name, module in home.named_modules():
        at = f"{path}.{name}".strip(".")
        alike = _alike_children(module, experts)
        if alike and not any(within(scorer, f"{at}.{child}".strip(".")) for child in alike):
            return Experts(path, modules=tuple(f"{at}.{child}".strip(".") for child in alike))
        if _holds_all(module, experts):
            return Experts(path, stacked=at)
    return None


def _alike_children(module: nn.Module, experts: int) -> list[str]:
    """The names of as many children of one class and size as there are experts; layers side by side are none."""
    kinds: dict[object, list[str]] = defaultdict(list)
    listed = isinstance(module, (nn.ModuleList, nn.ModuleDict))
    if isinstance(module, nn.Sequential) or len(module._modules) < experts:
        return []
    for name, child in module._modules.items():
        shapes = tuple(parameter.shape for parameter in child.parameters()) if child is not None else ()
        if child is not None and shapes and (listed or child._modules):
            kinds[type(child), shapes].append(name)
    return next((names for names in kinds.values() if len(names) == experts), [])


def _holds_all(module: nn.Module, experts: int) -> bool:
    if isinstance(module, nn.ParameterList):
        shapes = {parameter.shape for parameter in module}
        return len(module) == experts and len(shapes) == 1 and len(shapes.pop()) > 1
    if any(len(p.shape) > 2 and p.shape[0] == experts for p in module._parameters.values() if p is not None):
        return not isinstance(module, (nn.modules.conv._ConvNd, nn.MultiheadAttention))
    return False


def taken_by(scores: Scores) -> Experts | None:
    """The experts that take what a choice gives: weights that are looked up by it, or a module that counts them."""
    root = scores.scorer.graph.owning_module
    for node in _consumers(scores):
        weights = [source for source in tensor_inputs(node) if source.meta["role"] is None]
        if any(_leading(source, scores.experts) for source in weights) and (mixes(node) or name_of(node) == "getitem"):
            return Experts(
                parent(place(node)) if place(node) != scores.scorer.meta["owner"] else place(node), stacked=place(node)
            )
        owner = place(node)
        if root is None or within(scores.scorer.meta["owner"], owner) or within(place(scores.scorer), owner):
            continue
        module = root.get_submodule(owner)
        counts = (value for name, value in vars(module).items() if type(value) is int)
        if any(count == scores.experts for count in counts) and next(module.parameters(), None) is not None:
            return Experts(parent(owner), stacked=owner)
    return None


def _consumers(scores: Scores) -> Iterator[fx.Node]:
    """The nodes that take what the gate made, with something else or as a layer; and those in other modules."""
    own = scores.scorer.meta["owner"]
    for node in (scores.scorer, *scores.derived):
        for user in tensor_users(node):
            if user.op != "output" and (user not in scores.derived or not within(user.meta["owner"], own)):
                yield user


def _leading(node: fx.Node, experts: int, depth: int = 6) -> bool:
    """Whether a tensor comes from a parameter, of two axes or more, whose first one is that of the experts."""
    if node.op == "get_attr":
        return len(shape_of(node)) > 1 and shape_of(node)[0] == experts
    return depth > 0 and any(_leading(source, experts, depth - 1) for source in tensor_inputs(node))


def mixed(scores: Scores) -> tuple[Experts | None, str]:
    """The experts that a gate without a choice mixes: stacked branches, slices of a parameter, products one by one."""
    reason = "nothing mixes experts by it"
    for alias in scores.aliases.values():
        if not alias.scores:
            continue
        found = _one_by_one(alias.node, scores)
        if found is not None:
            return found, ""
        for user in tensor_users(alias.node):
            if user.op == "output" or user in scores.aliases:
                continue
            found = _contracted(user, alias.node, scores)
            if found is not None:
                return found, ""
            if kind_of(user) == "mul":
                reason = "it scales what it is multiplied with, and mixes no experts (squeeze and excitation)"
            elif kind_of(user) == "matmul":
                reason = (
                    "what it weights are no experts: neither stacked branches nor slices of a parameter (attention)"
                )
    return None, reason


def _contracted(node: fx.Node, weights: fx.Node, scores: Scores) -> Experts | None:
    """A product with stacked branches or with a parameter that holds all experts."""
    if kind_of(node) not in ("matmul", "mul"):
        return None
    for other in tensor_inputs(node):
        if other is weights or other in scores.derived:
            continue
        stack = _stack_behind(other, scores.experts)
        if stack is not None:
            return _branches(stack, scores, node)
        slices = kind_of(node) == "matmul" and other.meta["role"] is None and _leading(other, scores.experts)
        if slices and _used_as_weight(node):
            return Experts(None, stacked=place(node), mixed=node)
    return None


def _stack_behind(node: fx.Node, experts: int, depth: int = 5) -> list[fx.Node] | None:
    """The branches that a tensor stacks, as many as there are experts, each with a layer of its own."""
    if name_of(node) in ("stack", "cat", "concat", "concatenate"):
        given = argument(node, 0, "tensors")
        branches = [each for each in given if isinstance(each, fx.Node)] if isinstance(given, (list, tuple)) else []
        return branches if len(set(branches)) == experts and _siblings(branches) else None
    if depth and (kind_of(node) == "layout" or name_of(node) == "getattr") and len(data_inputs(node)) == 1:
        return _stack_behind(data_inputs(node)[0], experts, depth - 1)
    return None


def _siblings(branches: list[fx.Node]) -> bool:
    """Whether each branch comes from layers of its own."""
    layers = [_last_layer(branch) for branch in branches]
    return None not in layers and len(set(layers)) == len(layers)


def _last_layer(node: fx.Node, depth: int = 30) -> fx.Node | None:
    while depth:
        if mixes(node):
            return node
        inputs = data_inputs(node)
        if len(inputs) != 1 and kind_of(node) not in ("add", "mul"):
            return None
        node, depth = inputs[0], depth - 1
        if not data_inputs(node):
            return None
    return None


def _used_as_weight(node: fx.Node, depth: int = 6) -> bool:
    """Whether what was mixed is the weight of a layer: it meets other data there."""
    users = [user for user in tensor_users(node) if user.op != "output"]
    for user in users:
        others = [source for source in data_inputs(user) if source is not node]
        if (mixes(user) or user.meta.get("opaque")) and others:
            return True
        if depth and not others and kind_of(user) in ("layout", "add", "mul") and _used_as_weight(user, depth - 1):
            return True
    return False


def _one_by_one(weights: fx.Node, scores: Scores) -> Experts | None:
    """Slices of the weights, each multiplied with the result of one of as many layers."""
    slices = [user for user in tensor_users(weights) if name_of(user) in ("getitem", "select", "narrow")]
    parts = [user for user in tensor_users(weights) if name_of(user) in ("unbind", "chunk", "split", "tensor_split")]
    if len(parts) == 1:
        slices = [user for user in parts[0].users if name_of(user) == "getitem"]
    if len(slices) != scores.experts:
        return None
    products = [_product(each, scores) for each in slices]
    if any(product is None for product in products):
        return None
    others = [source for p in products if p is not None for source in data_inputs(p) if source not in scores.derived]
    if len(set(others)) != scores.experts or not _siblings(others):
        return None
    sums = set(reach(products[0])) if products[0] is not None else set()
    for product in products[1:]:
        sums &= set(reach(product)) if product is not None else set()
    return _branches(others, scores, min(sums) if sums else None)


def _branches(ends: list[fx.Node], scores: Scores, mixed: fx.Node | None) -> Experts:
    """Experts that are branches of one forward; where each is in a module of its own, those."""
    places = [place(end) for end in ends]
    around = _common(places)
    own = [path[len(around) :].strip(".").partition(".")[0] for path in places]
    modules = [f"{around}.{name}".strip(".") for name in own] if all(own) and len(set(own)) == len(own) else []
    return Experts(_common([*places, place(scores.scorer)]), tuple(modules), mixed=mixed)


def _product(node: fx.Node, scores: Scores, depth: int = 4) -> fx.Node | None:
    """The product of one slice of the weights with something else."""
    users = [user for user in tensor_users(node) if user.op != "output"]
    if len(users) != 1 or not depth:
        return None
    (user,) = users
    if kind_of(user) == "mul" and any(source not in scores.derived for source in data_inputs(user)):
        return user
    return _product(user, scores, depth - 1) if user in scores.derived else None


def _common(paths: list[str]) -> str:
    """The path of the smallest module around all of these."""
    split = [path.split(".") for path in paths]
    shared = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    common = ".".join(shared)
    return parent(common) if common in paths else common
