"""The value of each node on the example input, without computing it: fake tensors, and rules for common layers.

Fake tensors know shape, dtype and device and hold no data. Letting torch propagate them costs a few hundred
microseconds an op, so the layers that nearly all models are made of have rules of their own.
"""

from __future__ import annotations

import logging
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd

from dropsurgery.capture.levels import map_tree

# Where torch prints a traceback of every op that refuses its fake input, before it raises.
_torch_log = logging.getLogger("torch._subclasses.fake_tensor")
_is_autocast_enabled = torch.is_autocast_enabled  # not the one that notes who asks while a forward is recorded
# Layers whose output has the shape and dtype of their input, subclasses included.
_SAME_SHAPE = (_NormBase, nn.LayerNorm, nn.GroupNorm)
# Elementwise layers, by the class that defines their forward.
_ELEMENTWISE_FORWARDS = frozenset(
    cls.forward
    for cls in (
        nn.ReLU,
        nn.ReLU6,
        nn.SiLU,
        nn.GELU,
        nn.Sigmoid,
        nn.Tanh,
        nn.Hardswish,
        nn.Hardsigmoid,
        nn.LeakyReLU,
    )
)
_CONVS: dict[int, Callable[..., Any]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_FORWARDS = frozenset({nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward})
_BINARY = frozenset(
    {
        operator.add,
        operator.iadd,
        operator.mul,
        operator.imul,
        operator.sub,
        operator.truediv,
        torch.add,
        torch.mul,
    }
)
_UNARY = frozenset(
    {
        F.relu,
        F.relu6,
        F.silu,
        F.gelu,
        F.sigmoid,
        F.tanh,
        F.hardswish,
        F.hardsigmoid,
        torch.relu,
        torch.sigmoid,
    }
)
# Deterministic functions whose result on the meta device says all: no dispatch of fake tensors is needed.
_BY_META_NAMES = (
    "adaptive_avg_pool2d", "add", "addcmul", "amax", "amin", "avg_pool1d", "avg_pool2d", "baddbmm", "bmm", "chunk",
    "clamp", "clone", "contiguous", "conv1d", "conv2d", "conv3d", "cos", "cumsum", "detach", "div", "einsum", "exp",
    "expand", "expand_as", "flatten", "flip", "float", "gather", "group_norm", "interpolate", "layer_norm", "linear",
    "log", "log_softmax", "masked_fill", "matmul", "max_pool2d", "mean", "meshgrid", "movedim", "mul", "narrow", "neg",
    "norm", "normalize", "outer", "pad", "permute", "pixel_shuffle", "pixel_unshuffle", "pow", "repeat",
    "repeat_interleave", "reshape", "roll", "rsqrt", "select", "sigmoid", "sin", "softmax", "split", "sqrt", "squeeze",
    "stack", "sub", "sum", "swapaxes", "t", "tanh", "tile", "transpose", "type_as", "unbind", "unflatten", "unfold",
    "unsqueeze", "var", "view", "view_as", "where",
)  # fmt: skip
_BY_META = frozenset(
    [getattr(home, name) for name in _BY_META_NAMES for home in (torch, F, torch.Tensor) if hasattr(home, name)]
    + [getattr(operator, name) for name in ("getitem", "matmul", "neg", "pow", "sub", "truediv", "add", "mul")]
)


class Values(FakeTensorMode):  # type: ignore[no-untyped-call]
    """A fake-tensor mode that also tells whether an op draws random numbers.

    `drew` is set whenever one of the ops run since it was last cleared is random by its ATen tag; `running` is
    above zero while torch itself works on values.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.drew = False
        self.running = 0
        self._of_leaves: dict[Any, Any] = {}
        self._of_functions: dict[Any, Any] = {}

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.drew = True
        before = _torch_log.disabled
        _torch_log.disabled = True  # a refused input is told by the error alone
        try:
            return super().dispatch(func, types, args, kwargs)
        finally:
            _torch_log.disabled = before

    def like(
        self, tensor: torch.Tensor, shape: tuple[int, ...] | None = None, *, device: torch.device | None = None
    ) -> torch.Tensor:
        """A fake tensor of the same dtype and device: laid out alike, or of another shape and contiguous."""
        if shape is None and not tensor.is_contiguous():
            elem = torch.empty_like(_twin(tensor))
        else:  # a tenth of the time
            size = tensor.size() if shape is None else shape
            elem = torch.empty(size, dtype=tensor.dtype, device="meta")
        return self._fake(elem, device or tensor.device)

    def _fake(self, elem: torch.Tensor, device: torch.device) -> torch.Tensor:
        made: Any = FakeTensor(self, elem, device)
        made._meta = elem
        return made  # type: ignore[no-any-return]

    def _by_meta(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a function on the meta device, or remember what it gave for such arguments.

        `NotImplemented` where that would not tell all.
        """
        with torch._C.DisableTorchFunction():
            key = (function, _geometry(args), _geometry(kwargs))
            if not _hashable(key):
                return self._on_meta(function, args, kwargs)
            if key in self._of_functions:
                return map_tree(self._of_functions[key], lambda v: self._copy(v, args[0].device))
        result = self._on_meta(function, args, kwargs)
        with torch._C.DisableTorchFunction():
            if result is not NotImplemented and isinstance(args[0], FakeTensor) and _is_new(result, (args, kwargs)):
                self._of_functions[key] = map_tree(result, lambda v: _twin(v) if isinstance(v, torch.Tensor) else v)
        return result

    def _copy(self, item: Any, device: torch.device) -> Any:
        """A fake tensor laid out like another tensor, on a device; anything else as it is."""
        if not isinstance(item, torch.Tensor):
            return item
        with torch._C.DisableTorchFunction():
            elem = torch.empty_strided(item.size(), item.stride(), dtype=item.dtype, device="meta")
            return self._fake(elem, device)

    def _on_meta(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        fakes: dict[int, torch.Tensor] = {}

        def lower(item: Any) -> Any:
            if not isinstance(item, torch.Tensor):
                return item
            twin = _twin(item)
            fakes[id(twin)] = item
            return twin

        self.running += 1
        try:
            with torch._C.DisableTorchFunction(), torch.no_grad():
                lowered = map_tree((args, kwargs), lower)
                devices = {item.device if type(item) is FakeTensor else None for item in fakes.values()}
                if len(devices) != 1 or None in devices:
                    return NotImplemented
                (device,) = devices
                result = function(*lowered[0], **lowered[1])
                return map_tree(result, lambda out: self._raised(out, fakes, device))
        finally:
            self.running -= 1

    def _raised(self, item: Any, fakes: dict[int, torch.Tensor], device: Any) -> Any:
        if not isinstance(item, torch.Tensor):
            return item
        return fakes[id(item)] if id(item) in fakes else self._fake(item, device)

    def run(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function on fake values, out of sight of any torch-function mode and of autograd."""
        self.running += 1
        try:
            with torch._C.DisableTorchFunction(), torch.no_grad(), self:
                return function(*args, **kwargs)
        finally:
            self.running -= 1

    def of_leaf(self, module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        """The output of a leaf module: by rule where there is one, else by running its forward."""
        if len(args) == 1 and not kwargs and isinstance(args[0], FakeTensor) and _by_rule():
            with torch._C.DisableTorchFunction():
                if _is_elementwise(module):
                    return self.like(args[0])
                shape = _leaf_shape(module, tuple(args[0].shape)) if args[0].is_contiguous() else None
                if shape is not None:
                    return self.like(args[0], shape)
                call = _leaf_call(module)
            if call is not None:
                weights = [self._copy(item, args[0].device) for item in call[1]]
                result = self._by_meta(call[0], (args[0], *weights), {})
                if result is not NotImplemented:
                    return result
        key = _leaf_key(module, args, kwargs)
        if key is None:
            return self.run(forward, args, kwargs)
        if key not in self._of_leaves:
            self._of_leaves[key] = self.run(forward, args, kwargs)
        with torch._C.DisableTorchFunction():
            return map_tree(self._of_leaves[key], lambda v: self.like(v) if isinstance(v, FakeTensor) else v)

    def of_function(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The output of a function or operator on fake values and numbers."""
        if not _by_rule():
            return self.run(function, args, kwargs)
        with torch._C.DisableTorchFunction():
            if function in _UNARY and args and isinstance(args[0], FakeTensor):
                return self.like(args[0])
            plain = function in _BINARY and len(args) == 2 and not kwargs and isinstance(args[0], FakeTensor)
            if plain and _is_like_first(function, *args):
                return self.like(args[0])
            if function is F.scaled_dot_product_attention and _is_plain_attention(args, kwargs):
                return self.like(args[0], (*args[0].shape[:-1], args[2].shape[-1]))
            if function is torch.cat and args:
                joined = _cat_shape(*args, **kwargs)
                if joined:
                    return self.like(args[0][0], joined)
        if function in _BY_META and args:
            result = self._by_meta(function, args, kwargs)
            if result is not NotImplemented:
                return result
        return self.run(function, args, kwargs)

    def of_method(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The output of a method on fake values and numbers."""
        function = getattr(torch.Tensor, name, None)
        if isinstance(args[0], FakeTensor) and function in _BY_META and _by_rule():
            result = self._by_meta(function, args, kwargs)
            if result is not NotImplemented:
                return result
        return self.run(getattr(args[0], name), args[1:], kwargs)


def _twin(fake: Any) -> torch.Tensor:
    """A tensor on the meta device like a fake one, kept with it as long as no operation has changed its shape."""
    twin: torch.Tensor | None = getattr(fake, "_meta", None)
    if twin is None or twin.size() != fake.size() or twin.stride() != fake.stride():
        twin = torch.empty_strided(fake.size(), fake.stride(), dtype=fake.dtype, device="meta")
        if type(fake) is FakeTensor:
            vars(fake)["_meta"] = twin
    return twin


def _geometry(tree: Any) -> Any:
    """Arguments as far as a result on the meta device hangs on them."""
    kind = type(tree)
    if kind is FakeTensor:
        return (tree.shape, tree.stride(), tree.dtype, tree.device)
    if kind in (tuple, list):
        return (kind, *map(_geometry, tree))
    if kind is dict:
        return tuple((name, _geometry(item)) for name, item in tree.items())
    if kind is slice:
        return (slice, _geometry(tree.start), _geometry(tree.stop), _geometry(tree.step))
    # A number and a truth that are equal are not the same argument; a tensor with data is one of its own.
    return (kind, id(tree) if isinstance(tree, torch.Tensor) else tree)


def _is_new(result: Any, arguments: Any) -> bool:
    """Whether a function gave tensors of its own, or views, but none that it was given."""
    given: set[int] = set()
    map_tree(arguments, lambda item: given.add(id(item)))
    found: list[bool] = []
    map_tree(result, lambda item: found.append(id(item) in given) if isinstance(item, torch.Tensor) else None)
    return not any(found)


def _leaf_key(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Leaves with the same key give outputs of the same shape: same class, settings, weights' shapes and inputs."""
    if module._modules or not all(isinstance(item, FakeTensor) for item in args) or kwargs or not _by_rule():
        return None
    fields = module.__dict__.items()
    settings = tuple((name, value) for name, value in fields if isinstance(value, (int, float, str, tuple, type(None))))
    weights = tuple((name, None if w is None else w.shape) for name, w in module._parameters.items())
    with torch._C.DisableTorchFunction():
        inputs = tuple((item.shape, item.stride(), item.dtype, item.device) for item in args)
    key = (type(module), settings, weights, inputs)
    return key if _hashable(key) else None


def _hashable(key: Any) -> bool:
    try:
        hash(key)
    except TypeError:
        return False
    return True


def _by_rule() -> bool:
    """Under autocast the dtype of a result is not that of its input: the rules do not know."""
    return not (_is_autocast_enabled("cpu") or _is_autocast_enabled("cuda"))


def _is_like_first(function: Any, left: Any, right: Any) -> bool:
    """Whether the result of an elementwise operation has the shape, dtype and layout of its first operand."""
    if not left.dtype.is_floating_point and function is operator.truediv:
        return False
    if not isinstance(right, FakeTensor):
        return type(right) in (int, float) and left.dtype.is_floating_point
    if left.dtype != right.dtype or left.device != right.device:
        return False
    return (left.shape == right.shape and left.stride() == right.stride()) or _fits_into(left, right)


def _fits_into(left: Any, right: Any) -> bool:
    """Whether a tensor is broadcast to another one, which is contiguous."""
    padded = (1,) * (left.ndim - right.ndim) + tuple(right.shape)
    fits = len(padded) == left.ndim and all(b in (1, a) for a, b in zip(left.shape, padded, strict=True))
    return fits and bool(left.is_contiguous())


def _is_plain_attention(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Attention without dropout (which draws), on three tensors whose batch and heads are the same."""
    if len(args) > 4 or kwargs.get("dropout_p") or kwargs.get("enable_gqa") or len(args) < 3:
        return False
    query, key, value = args[:3]
    same = query.shape[:-2] == key.shape[:-2] == value.shape[:-2] and query.shape[-1] == key.shape[-1]
    return bool(same and key.shape[-2] == value.shape[-2] and query.dtype == key.dtype == value.dtype)


def _cat_shape(tensors: Any, dim: int = 0, **other: Any) -> tuple[int, ...] | None:
    """The shape of contiguous tensors of one dtype, joined; None for others."""
    if other or not all(isinstance(t, FakeTensor) and t.dtype == tensors[0].dtype for t in tensors):
        return None
    if not all(tensor.is_contiguous() for tensor in tensors):
        return None
    shapes = [list(tensor.shape) for tensor in tensors]
    total = sum(shape.pop(dim) for shape in shapes)
    if any(shape != shapes[0] for shape in shapes):
        return None
    rank = len(shapes[0]) + 1
    shapes[0].insert(dim % rank, total)
    return tuple(shapes[0])


def _is_elementwise(module: nn.Module) -> bool:
    """Whether the output of a layer is of the shape and layout of its input."""
    return isinstance(module, (nn.Identity, _DropoutNd)) or type(module).forward in _ELEMENTWISE_FORWARDS


def _leaf_shape(module: nn.Module, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The output shape of a common layer on a contiguous input, None where the layer has to be run to know it."""
    forward = type(module).forward
    if isinstance(module, _SAME_SHAPE):
        return shape
    if isinstance(module, _ConvNd) and forward in _CONV_FORWARDS and module.weight.is_contiguous():
        return _conv_shape(module, shape)
    if isinstance(module, nn.Linear) and forward is nn.Linear.forward and shape[-1] == module.in_features:
        return (*shape[:-1], module.out_features)
    return None


def _leaf_call(module: nn.Module) -> tuple[Callable[..., Any], tuple[Any, ...]] | None:
    """The function that a common layer is, and its arguments behind the input; None for other layers."""
    forward = type(module).forward
    if isinstance(module, _ConvNd) and forward in _CONV_FORWARDS and module.padding_mode == "zeros":
        options = (module.stride, module.padding, module.dilation, module.groups)
        return _CONVS[len(module.kernel_size)], (module.weight, module.bias, *options)
    if isinstance(module, nn.LayerNorm) and forward is nn.LayerNorm.forward:
        return F.layer_norm, (module.normalized_shape, module.weight, module.bias, module.eps)
    if isinstance(module, nn.Linear) and forward is nn.Linear.forward:
        return F.linear, (module.weight, module.bias)
    return None


def _conv_shape(conv: _ConvNd, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    rank = len(conv.kernel_size)
    if len(shape) != rank + 2 or shape[1] != conv.in_channels or isinstance(conv.padding, str):
        return None
    sizes = [
        math.floor((size + 2 * pad - dilation * (kernel - 1) - 1) / stride + 1)
        for size, pad, dilation, kernel, stride in zip(
            shape[2:], conv.padding, conv.dilation, conv.kernel_size, conv.stride, strict=True
        )
    ]
    return (shape[0], conv.out_channels, *sizes) if min(sizes) > 0 else None
