"""What a node computes, whichever way it is written: `nn.ReLU`, `F.relu`, `torch.relu_` and `x.relu()` are one thing.

`kinds_of` names a node generally (`conv`) and precisely (`conv2d`); `kind_of` gives the general name alone. Modules
are told by torch class, subclasses included; `meta["identity"]` marks stochastic layers that are silent in eval.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import fx, nn

from dropsurgery.records import TensorFact

_NOT_POINTWISE = (nn.MultiheadAttention, nn.Softmax, nn.Softmin, nn.LogSoftmax, nn.Softmax2d, nn.GLU)
_ACTIVATIONS = tuple(
    cls
    for cls in vars(nn.modules.activation).values()
    if inspect.isclass(cls) and issubclass(cls, nn.Module) and cls not in (nn.Module, *_NOT_POINTWISE)
)
# The first class that fits gives the kinds, so the special ones stand before the general.
_MODULES: tuple[tuple[tuple[type[nn.Module], ...], tuple[str, ...]], ...] = (
    ((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), ("conv_transpose",)),
    ((nn.Conv1d,), ("conv", "conv1d")),
    ((nn.Conv2d,), ("conv", "conv2d")),
    ((nn.Conv3d,), ("conv", "conv3d")),
    ((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), ("norm", "instance_norm")),
    ((nn.modules.batchnorm._BatchNorm,), ("norm", "batch_norm")),
    ((nn.GroupNorm,), ("norm", "group_norm")),
    ((nn.LayerNorm,), ("norm", "layer_norm")),
    ((nn.RMSNorm,), ("norm", "rms_norm")),
    ((nn.Linear,), ("linear",)),
    ((nn.RNNBase,), ("rnn",)),
    ((nn.RNNCellBase,), ("rnn_cell",)),
    ((nn.Embedding,), ("embedding",)),
    ((nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d), ("pool", "adaptive_pool")),
    ((nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d), ("pool", "adaptive_pool")),
    ((nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d), ("pool", "max_pool")),
    ((nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d), ("pool", "avg_pool")),
    ((nn.LPPool1d, nn.LPPool2d, nn.LPPool3d), ("pool", "lp_pool")),
    ((nn.Upsample, nn.PixelShuffle), ("upsample",)),
    ((nn.Sigmoid, nn.Hardsigmoid), ("activation", "sigmoid")),
    ((nn.ReLU, nn.ReLU6), ("activation", "relu")),
    ((nn.SELU,), ("activation", "selu")),
    ((nn.GLU,), ("glu",)),
    ((nn.Softmax, nn.Softmax2d), ("softmax",)),
    ((nn.MultiheadAttention,), ("attention",)),
    ((nn.Flatten, nn.Unflatten), ("layout",)),
    ((nn.Identity, nn.modules.dropout._DropoutNd), ("identity",)),
)
# Names under torch.nn.functional, torch and torch.Tensor (there as methods), in-place forms (`relu_`) included.
_NAMES: dict[tuple[str, ...], tuple[str, ...]] = {
    ("conv", "conv1d"): ("conv1d",),
    ("conv", "conv2d"): ("conv2d",),
    ("conv", "conv3d"): ("conv3d",),
    ("conv_transpose",): ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    ("norm", "batch_norm"): ("batch_norm",),
    ("norm", "group_norm"): ("group_norm",),
    ("norm", "layer_norm"): ("layer_norm",),
    ("norm", "instance_norm"): ("instance_norm",),
    ("norm", "rms_norm"): ("rms_norm",),
    ("linear",): ("linear",),
    ("embedding",): ("embedding",),
    ("pool", "adaptive_pool"): tuple(f"adaptive_{how}_pool{n}d" for how in ("avg", "max") for n in (1, 2, 3)),
    ("pool", "max_pool"): ("max_pool1d", "max_pool2d", "max_pool3d"),
    ("pool", "avg_pool"): ("avg_pool1d", "avg_pool2d", "avg_pool3d"),
    ("pool", "lp_pool"): ("lp_pool1d", "lp_pool2d", "lp_pool3d"),
    ("upsample",): ("interpolate", "upsample", "pixel_shuffle"),
    ("identity",): ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout"),
    ("add",): ("add",),
    ("mul",): ("mul", "multiply"),
    ("cat",): ("cat", "concat", "concatenate"),
    ("reduction",): ("sum", "max", "logsumexp"),
    ("reduction", "mean"): ("mean",),
    ("reduction", "amax"): ("amax",),
    ("glu",): ("glu",),
    ("softmax",): ("softmax",),
    ("matmul",): ("matmul", "mm", "bmm", "addmm", "baddbmm", "einsum"),
    ("attention",): ("scaled_dot_product_attention",),
    ("layout",): (
        *("reshape", "view", "flatten", "unflatten", "squeeze", "unsqueeze", "expand", "expand_as", "view_as"),
        *("contiguous", "to", "type", "type_as", "float", "half", "bfloat16", "clone"),
    ),
    ("layout", "permute"): ("permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis"),
    ("activation", "sigmoid"): ("sigmoid", "hardsigmoid"),
    ("activation", "relu"): ("relu", "relu6"),
    ("activation", "selu"): ("selu",),
    ("activation",): (
        *(
            "leaky_relu",
            "rrelu",
            "prelu",
            "elu",
            "celu",
            "gelu",
            "silu",
            "mish",
            "tanh",
        ),
        *(
            "logsigmoid",
            "hardswish",
            "hardtanh",
            "softplus",
            "softsign",
            "threshold",
        ),
    ),
}
_OPERATORS: dict[Any, tuple[str, ...]] = {
    operator.add: ("add",),
    operator.iadd: ("add",),
    operator.mul: ("mul",),
    operator.imul: ("mul",),
    operator.matmul: ("matmul",),
}
_METHODS = {name + end: kinds for kinds, names in _NAMES.items() for name in names for end in ("", "_")}
_FUNCTIONS: dict[Any, tuple[str, ...]] = _OPERATORS | {
    getattr(home, name): kinds
    for name, kinds in _METHODS.items()
    for home in (torch, F)
    if callable(getattr(home, name, None))
}
KINDS = frozenset(kind for kinds in _METHODS.values() for kind in kinds) | {
    "norm_act",
    "rnn",
    "rnn_cell",
    *(f"{norm}_act" for norm in ("batch_norm", "group_norm", "layer_norm", "instance_norm", "rms_norm")),
}
"""Every word that `kinds_of` can say."""


def kinds_of(node: fx.Node) -> tuple[str, ...]:
    """The kinds of a node, the general one first, then the precise one; empty for what has no name here."""
    known: tuple[str, ...] | None = node.meta.get("kinds")
    if known is None:  # patterns ask each node many times
        known = node.meta["kinds"] = _kinds(node)
    return known


def _kinds(node: fx.Node) -> tuple[str, ...]:
    if node.meta.get("identity"):
        return ("identity",)
    if node.op == "call_module":
        module = node.meta.get("module")
        return _module_kinds(module) if module is not None else ()
    if node.op == "call_function":
        return _FUNCTIONS.get(node.target, ())
    if node.op == "call_method":
        return _METHODS.get(str(node.target), ())
    return ()


def kind_of(node: fx.Node) -> str | None:
    """The general kind of a node: conv, norm, norm_act, activation, add, cat, linear …; None where it has none.

    `norm_act` is a leaf that normalises and activates at once, such as a batch norm that holds a ReLU.
    """
    kinds = kinds_of(node)
    return kinds[0] if kinds else None


def _module_kinds(module: nn.Module) -> tuple[str, ...]:
    kinds = _class_kinds(type(module))
    if kinds and kinds[0] == "norm" and module._modules and any(map(_activates, module.children())):
        return ("norm_act", f"{kinds[1]}_act")
    return kinds


def _class_kinds(cls: type[nn.Module]) -> tuple[str, ...]:
    known = _known_classes.get(cls)
    if known is None:
        fitting = (kinds for classes, kinds in _MODULES if issubclass(cls, classes))
        known = _known_classes[cls] = next(fitting, ("activation",) if issubclass(cls, _ACTIVATIONS) else ())
    return known


_known_classes: WeakKeyDictionary[type[nn.Module], tuple[str, ...]] = WeakKeyDictionary()


def _activates(child: nn.Module) -> bool:
    """Whether what a norm holds is its activation, torch's or the model's own: no layer, no identity."""
    kinds = _module_kinds(child)
    return kinds[0] == "activation" if kinds else not any(map(_module_kinds, child.modules()))


def tensor_inputs(node: fx.Node) -> list[fx.Node]:
    """The arguments that carry tensors (parameters too), each once, in order; shapes and sizes left out."""
    return [source for source in node.all_input_nodes if holds_tensor(source.meta.get("value"))]


def holds_tensor(value: Any) -> bool:
    """Whether a node's value is a tensor or a container with one in it."""
    if type(value) is TensorFact:
        return True
    if isinstance(value, dict):
        value = tuple(value.values())
    return isinstance(value, (tuple, list)) and any(map(holds_tensor, value))


def tensor_users(node: fx.Node) -> list[fx.Node]:
    """The nodes that consume the tensor itself: the graph's output is one, reading a shape is not."""
    return [user for user in node.users if user.op == "output" or holds_tensor(user.meta.get("value"))]


def data_inputs(node: fx.Node) -> list[fx.Node]:
    """The arguments that carry the input's data, each once, in order: no parameters, sizes or constants."""
    return [source for source in tensor_inputs(node) if source.meta["role"] is not None]


def mixes(node: fx.Node) -> bool:
    """Whether a node is a layer that mixes channels or positions: convolution, linear, product, unknown module."""
    kind = kind_of(node)
    if kind is None and node.op == "call_module":
        module = node.meta.get("module")
        return module is None or next(module.parameters(), None) is not None
    return kind in ("conv", "conv_transpose", "linear", "rnn", "rnn_cell", "embedding", "matmul", "attention")


def positions(node: fx.Node) -> int | None:
    """How many positions a sample of a node's tensor has (pixels, tokens); None where that is unknown."""
    value, axis = node.meta.get("value"), node.meta["channel_axis"]
    if not isinstance(value, TensorFact) or axis is None or len(value.shape) < 2:
        return None
    return math.prod(value.shape[1:]) // max(1, int(value.shape[axis]))


def skip_identities(node: fx.Node, step: Callable[[fx.Node], list[fx.Node]]) -> Iterator[fx.Node]:
    """The nodes that `step` leads to, with identities (dropout in eval mode, `nn.Identity`) walked through."""
    return skip(node, step, ("identity",))


def skip(node: fx.Node, step: Callable[[fx.Node], list[fx.Node]], kinds: tuple[str, ...]) -> Iterator[fx.Node]:
    """The nodes that `step` leads to, with nodes of some kinds walked through."""
    for near in step(node):
        if any(kind in kinds for kind in kinds_of(near)):
            yield from skip(near, step, kinds)
        else:
            yield near


def compound(source: fx.Node) -> tuple[str, fx.Node] | None:
    """What several nodes compute together from one tensor: a kind, and the node that ends it; None where nothing known.

    - an activation written out: nodes without parameters that work point by point, one of them an activation, and
      meet in one node: `x * sigmoid(1.702 * x)`, `x * relu6(x + 3) / 6`;
    - a frozen batch norm: a product with one constant and a sum with another.
    """
    users = list(skip_identities(source, tensor_users))
    if len(users) == 1 and kind_of(users[0]) == "mul":
        (scaled,) = users
        shifted = list(skip_identities(scaled, tensor_users))
        if len(shifted) == 1 and kind_of(shifted[0]) == "add" and _by_parameter(scaled) and _by_parameter(shifted[0]):
            return "norm", shifted[0]
    end = _meeting(source)
    return None if end is None else ("activation", end)


def _by_parameter(node: fx.Node) -> bool:
    return len(data_inputs(node)) == 1 and len(tensor_inputs(node)) == 2


def _meeting(source: fx.Node) -> fx.Node | None:
    """The node that ends an activation written out in several."""
    inside: set[fx.Node] = {source}
    for _ in range(_LONGEST_ACTIVATION):
        open_ends = {user for node in inside for user in tensor_users(node)} - inside
        if not open_ends:
            return None
        node = min(open_ends)
        if not _point_by_point(node) or not inside.issuperset(tensor_inputs(node)):
            return None
        inside.add(node)
        ends = [each for each in inside if not inside.issuperset(tensor_users(each))]
        if ends == [node] and len(inside) > 2 and any(kind_of(each) == "activation" for each in inside):
            return node
    return None


_LONGEST_ACTIVATION = 12
_POINT_BY_POINT = frozenset(("sub", "rsub", "div", "truediv", "pow", "square", "neg", "exp", "erf", "clamp", "sqrt"))


def _point_by_point(node: fx.Node) -> bool:
    if kind_of(node) in ("activation", "add", "mul", "identity"):
        return True
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    return name.rstrip("_") in _POINT_BY_POINT


@dataclass(frozen=True)
class ConvFact:
    """What a convolution's call says: extents per spatial axis, width of its output, groups."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    out_channels: int


def conv_fact(node: fx.Node) -> ConvFact | None:
    """The settings of a convolution, module or function; None if the node is none or hides its weight."""
    if kind_of(node) != "conv":
        return None
    module = node.meta.get("module")
    if module is not None:
        return ConvFact(module.kernel_size, module.stride, module.dilation, module.groups, module.out_channels)
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    weight: Any = given.get("weight")
    weight = weight.meta.get("value") if isinstance(weight, fx.Node) else None
    if not isinstance(weight, TensorFact):
        return None
    kernel = weight.shape[2:]
    stride, dilation = (_per_axis(given.get(name, 1), len(kernel)) for name in ("stride", "dilation"))
    groups = given.get("groups", 1)
    return ConvFact(kernel, stride, dilation, groups if isinstance(groups, int) else 1, weight.shape[0])


def _per_axis(given: Any, axes: int) -> tuple[int, ...]:
    values = given if isinstance(given, (tuple, list)) else (given,) * axes
    return tuple(value if isinstance(value, int) else 1 for value in values)
