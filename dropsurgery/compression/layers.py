"""The layers that a cut ends at: which axis of a weight makes a channel, and which one reads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from dropsurgery.capture.dataflow import shape_of
from dropsurgery.compression.relations import Ends, Multiplied, Never, Relation, Stuck
from dropsurgery.kinds import kind_of

LAYERS = ("linear", "conv", "conv_transpose")


@dataclass(frozen=True)
class Layer:
    """A linear layer or a convolution, called as a module or as a function.

    `rows` and `columns` are the axes of the weight that outputs and inputs lie on; in a depthwise convolution, in which
    each channel makes `times` others, both are the first. `in_axis` and `out_axis` are those of the tensors.
    """

    node: fx.Node
    in_axis: int
    out_axis: int
    rows: int
    columns: int
    groups: int = 1
    times: int = 0

    @property
    def depthwise(self) -> bool:
        """Whether each channel is read by itself."""
        return self.times > 0

    @property
    def relation(self) -> Relation:
        """How a cut of its input lies in its output."""
        if self.depthwise:
            return Multiplied(self.times)
        if self.groups > 1:
            return Never(f"is a convolution of {self.groups} groups, of which each must keep as many channels")
        others = {axis: axis for axis in range(self.in_axis)} if kind_of(self.node) == "linear" else {}
        return Ends(self.in_axis, self.out_axis, others, "mixes the positions on the axis that is cut")

    def tensor(self, name: str) -> fx.Node | Tensor | None:
        """Its weight or bias: a tensor of the module, or the node that a function takes."""
        module = self.node.meta.get("module")
        if module is None:
            given: Any = argument(self.node, name, {"weight": 1, "bias": 2}[name])
            return given if isinstance(given, fx.Node) else None
        return parameter_of(module, name)


def layer_of(node: fx.Node) -> Layer | None:
    """The layer that a node calls; None where it calls none."""
    kind = kind_of(node)
    if kind not in LAYERS or node.meta.get("opaque"):
        return None
    source = node.args[0] if node.args else None
    before, after = shape_of(source) if isinstance(source, fx.Node) else None, shape_of(node)
    if before is None or after is None:
        raise Stuck("takes or gives what is no single tensor, or takes it by name")
    if kind == "linear":
        return Layer(node, len(before) - 1, len(after) - 1, 0, 1)
    return _convolution(node, before, after, transposed=kind == "conv_transpose")


def _convolution(node: fx.Node, before: tuple[int, ...], after: tuple[int, ...], *, transposed: bool) -> Layer:
    module = node.meta.get("module")
    if module is None:
        groups = argument(node, "groups", 6, 1)
        if groups != 1:
            raise Stuck("is a convolution written as a function of several groups, whose number is written in its code")
    else:
        groups = module.groups
    if module is not None and len(before) != len(module.kernel_size) + 2:
        raise Stuck("takes a single sample without a batch axis")
    rows, columns = (1, 0) if transposed else (0, 1)
    if groups == 1:
        return Layer(node, 1, 1, rows, columns)
    times = after[1] // before[1] if groups == before[1] and after[1] % before[1] == 0 else 0
    if transposed and times > 1:
        raise Stuck(f"is a transposed convolution that makes {times} channels of each")
    return Layer(node, 1, 1, 0, 0, groups, times)


def parameter_of(module: nn.Module, name: str) -> Tensor | None:
    """A layer's own tensor of that name; None where there is none.

    Raises:
        Stuck: the layer computes it, as a parametrization or a weight norm does.
    """
    if name in module._parameters:
        return module._parameters[name]
    if name in module._buffers:
        return module._buffers[name]
    if getattr(module, name, None) is None:
        return None
    raise Stuck(f"computes its {name} from others (a parametrization or a weight norm): remove that first")


def resize(module: nn.Module, *, out: int | None = None, into: int | None = None) -> dict[str, int]:
    """The attributes of a layer that say how many channels it has, with what they become."""
    sizes: dict[str, int] = {}
    if isinstance(module, nn.Linear):
        names: tuple[str, str] = ("out_features", "in_features")
    elif isinstance(module, (_ConvNd, _ConvTransposeNd)):
        names = ("out_channels", "in_channels")
    else:
        names = ("num_features", "num_features")
    sizes.update({names[1]: into} if into is not None else {})
    sizes.update({names[0]: out} if out is not None else {})
    return {name: size for name, size in sizes.items() if hasattr(module, name)}


def argument(node: fx.Node, name: str, position: int, default: Any = None) -> Any:
    """What a call gives for a parameter, by name or by position."""
    if name in node.kwargs:
        return node.kwargs[name]
    return node.args[position] if len(node.args) > position else default
