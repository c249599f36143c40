"""From cuts and factors to weights: which positions of which tensors stay, and what they are multiplied by.

Nothing is changed here. A tensor that is used in several places must be sliced alike in all of them.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from dropsurgery.capture import Captured
from dropsurgery.compression.layers import LAYERS, Layer, layer_of, parameter_of, resize
from dropsurgery.compression.relations import Cut, Stuck
from dropsurgery.compression.rules import name_of
from dropsurgery.compression.spreading import Blocked, Spread
from dropsurgery.compression.states import FACTOR, States
from dropsurgery.kinds import kind_of, tensor_users
from dropsurgery.trees import attribute_at

_NORM_TENSORS = ("weight", "bias", "running_mean", "running_var")


@dataclass(frozen=True, eq=False)
class Pick:
    """What stays on one axis of a tensor, and the factors of what stays; None for no factor."""

    kept: Tensor
    factors: Tensor | None = None

    def same(self, other: Pick) -> bool:
        """Whether both do the same."""
        one, two = (torch.ones(len(each.kept)) if each.factors is None else each.factors for each in (self, other))
        return torch.equal(self.kept, other.kept) and torch.allclose(one.double(), two.double(), rtol=1e-12, atol=0)

    def of(self, tensor: Tensor, axis: int) -> Tensor:
        """The part that stays, in the tensor's own dtype; factors are multiplied in float64."""
        part = tensor.index_select(axis, self.kept.to(tensor.device))
        if self.factors is None:
            return part
        shape = [1] * tensor.dim()
        shape[axis] = -1
        wide = torch.promote_types(tensor.dtype, torch.float64)
        return (part.to(wide) * self.factors.to(tensor.device).view(shape)).to(tensor.dtype)


@dataclass
class Slices:
    """What is to be done: tensors by id, each with its picks by axis; and the sizes that layers say of themselves."""

    tensors: dict[int, dict[int, Pick]] = field(default_factory=dict)
    sizes: dict[tuple[nn.Module, str], int] = field(default_factory=dict)


def slices(captured: Captured, cuts: Spread, states: States) -> Slices:
    """Work out all slices.

    Raises:
        Blocked: a tensor is shared with what stays as it is, or is none that can be sliced.
    """
    made = _Making(captured, cuts, states)
    for node in captured.view.graph.nodes:
        try:
            made.visit(node)
        except Stuck as stuck:
            raise Blocked(node, str(stuck), made.sites(node)) from None
    return made.finish()


class _Making:
    def __init__(self, captured: Captured, cuts: Spread, states: States) -> None:
        self.model, self.graph = captured.model, captured.view.graph
        self.cuts, self.states = cuts, states
        self.result = Slices()
        self._asked: dict[int, dict[fx.Node, dict[int, Pick]]] = defaultdict(dict)
        self._uses: dict[int, list[fx.Node]] = defaultdict(list)
        self._sizes: dict[tuple[nn.Module, str], set[int]] = defaultdict(set)
        for node in self.graph.nodes:
            for tensor in self._used(node):
                self._uses[id(tensor)].append(node)

    def sites(self, node: fx.Node) -> frozenset[str]:
        """Whose cut concerns a node."""
        found = self.cuts.sites.get(node, frozenset())
        for source in node.all_input_nodes:
            found |= self.cuts.sites.get(source, frozenset())
        return found

    def _used(self, node: fx.Node) -> list[Tensor]:
        """The model's own tensors that a node uses."""
        module = node.meta.get("module")
        if module is not None:
            found = dict(module._parameters) | dict(module._buffers) if node.meta.get("opaque") else None
            tensors = found.values() if found is not None else [*module.parameters(), *module.buffers()]
            return [tensor for tensor in tensors if tensor is not None]
        used = [source for source in node.all_input_nodes if source.op == "get_attr"]
        return [tensor for tensor in map(self._attribute, used) if isinstance(tensor, Tensor)]

    def _attribute(self, node: fx.Node) -> Any:
        return attribute_at(self.model, str(node.target))

    # -- what each node asks for ---------------------------------------------------------------------------------------
    def visit(self, node: fx.Node) -> None:
        """Ask for the slices of one node's tensors."""
        cut, kind = self.cuts.cuts.get(node), kind_of(node)
        if kind in LAYERS and not node.meta.get("opaque"):
            layer = layer_of(node)
            if layer is not None:
                self._layer(layer, cut)
        elif cut is not None and kind in ("norm", "norm_act"):
            self._norm(node, cut)
        elif cut is not None and name_of(node) == "PReLU":
            self._prelu(node, cut)
        elif cut is not None and node.op == "get_attr":
            tensor = self._attribute(node)
            if not isinstance(tensor, Tensor):
                raise Stuck("is no tensor of the model")
            for user in tensor_users(node):
                self._asked[id(tensor)][user] = {cut.axis: Pick(_kept(cut))}

    def _layer(self, layer: Layer, cut: Cut | None) -> None:
        node, columns = layer.node, self.states.columns.get(layer.node)
        if cut is not None and cut.axis != layer.out_axis:
            cut = None
        if cut is None and columns is None:
            return
        weight: dict[int, Pick] = {}
        rows = self._rows(node, cut)
        if columns is not None and not layer.depthwise:
            weight[layer.columns] = Pick(_kept(columns), _factors(columns.table[:, FACTOR], columns))
        if rows is not None:
            weight[layer.rows] = rows
            self._ask(node, layer.tensor("bias"), {0: rows})
        if layer.depthwise and columns is not None and rows is not None and cut is not None:
            each = columns.table[:, FACTOR].repeat_interleave(layer.times)
            total = each * self.states.rows.get(node, torch.ones_like(each))
            weight[layer.rows] = Pick(rows.kept, _factors(total, cut))
        if layer.tensor("weight") is None:
            raise Stuck("has a weight that is computed")
        self._ask(node, layer.tensor("weight"), weight)
        module = node.meta.get("module")
        if module is not None:
            out = None if rows is None else len(rows.kept)
            into = None if columns is None else int((~columns.gone).sum())
            self._resize(module, resize(module, out=out, into=into))
            self._resize(module, {"groups": into} if layer.depthwise and into is not None else {})

    def _rows(self, node: fx.Node, cut: Cut | None) -> Pick | None:
        if cut is None:
            return None
        factors = self.states.rows.get(node)
        return Pick(_kept(cut), None if factors is None else _factors(factors, cut))

    def _norm(self, node: fx.Node, cut: Cut) -> None:
        module: nn.Module = node.meta["module"]
        names = [name for name in _NORM_TENSORS if getattr(module, name, None) is not None]
        if cut.axis != 1 or not hasattr(module, "num_features"):  # a layer norm over other axes
            return
        rows = self._rows(node, cut)
        assert rows is not None
        for name in names:
            tensor = parameter_of(module, name)
            self._ask(node, tensor, {0: rows if name in ("weight", "bias") else Pick(rows.kept)})
        self._resize(module, {"num_features": len(rows.kept)})
        if any(child is not None and next(child.parameters(), None) is not None for child in module._modules.values()):
            raise Stuck("holds a layer with weights of its own")

    def _prelu(self, node: fx.Node, cut: Cut) -> None:
        module: nn.Module = node.meta["module"]
        weight = parameter_of(module, "weight")
        if weight is None or weight.numel() == 1:
            return
        if cut.axis != 1:
            raise Stuck("has a weight for each position of another axis")
        self._ask(node, weight, {0: Pick(_kept(cut))})
        self._resize(module, {"num_parameters": int((~cut.gone).sum())})

    def _ask(self, node: fx.Node, tensor: fx.Node | Tensor | None, picks: dict[int, Pick]) -> None:
        if isinstance(tensor, fx.Node):
            if tensor.op != "get_attr":
                raise Stuck(f"has a weight that is computed ({tensor.name})")
            tensor = self._attribute(tensor)
        if tensor is not None:
            assert isinstance(tensor, Tensor)
            self._asked[id(tensor)][node] = picks

    def _resize(self, module: nn.Module, sizes: dict[str, int]) -> None:
        for name, size in sizes.items():
            self._sizes[module, name].add(size)

    # -- all of them together ---------------------------------------------------------------------------------------
    def finish(self) -> Slices:
        """The slices, if every use of a tensor asks for the same."""
        for key, asked in self._asked.items():
            (first, picks), *_ = asked.items()
            if not picks:
                continue
            for user in self._uses[key]:
                if not _same(picks, asked.get(user, {})):
                    raise Blocked(user, _shared(first, user), self.sites(first))
            self.result.tensors[key] = picks
        self.result.sizes.update({key: min(sizes) for key, sizes in self._sizes.items()})
        return self.result


def _shared(first: fx.Node, user: fx.Node) -> str:
    if first.meta.get("module") is not None and first.meta["module"] is user.meta.get("module"):
        return "is called several times, and would be cut in one of them only"
    other = Blocked(first, "").where()
    return f"uses a weight that {other} uses too, and that would be cut in one of them only"


def _same(one: dict[int, Pick], other: dict[int, Pick]) -> bool:
    return one.keys() == other.keys() and all(one[axis].same(other[axis]) for axis in one)


def _kept(cut: Cut) -> Tensor:
    return torch.nonzero(~cut.gone).flatten()


def _factors(factors: Tensor, cut: Cut) -> Tensor | None:
    """The factors of what stays; None where they are all 1."""
    kept = factors[~cut.gone]
    return None if bool((kept == 1).all()) else kept
