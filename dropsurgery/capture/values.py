"""The value of each node on the example input, without computing it: fake tensors, and rules for common layers.

Fake tensors know shape, dtype and device and hold no data. Letting torch propagate them costs a few hundred
microseconds an op, so the layers that nearly all models are made of have rules of their own.
"""

from __future__ import annotations

import logging
import math
import operator
from collections.abc import Callable, Sequence
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
# Not those that notice, while a forward is recorded, who calls them.
_is_autocast_enabled = torch.is_autocast_enabled
_empty = torch.empty
# Layers whose output has the shape and dtype of their input, subclasses included.
_SAME_SHAPE = (nn.LayerNorm, nn.GroupNorm)
# Pooling layers, by their forwards: the functions that they are, and their settings in order.
_POOLS: dict[Any, tuple[Callable[..., Any], tuple[str, ...]]] = {
    nn.AdaptiveAvgPool2d.forward: (F.adaptive_avg_pool2d, ("output_size",)),
    nn.AvgPool2d.forward: (
        F.avg_pool2d,
        ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
    ),
    nn.MaxPool2d.forward: (
        F.max_pool2d,
        ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"),
    ),
}
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
# The ways to resize maps, and how many axes such maps have, where not any number will do.
_RESIZES = {"nearest": None, "linear": 1, "bilinear": 2, "bicubic": 2, "trilinear": 3}
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
# On numbers they need nothing of torch.
_OPERATORS = frozenset(value for value in vars(operator).values() if type(value) is type(operator.add))
_NUMBERS = frozenset((int, float, bool))
# Deterministic functions whose result on the meta device says all: no dispatch of fake tensors is needed.
_BY_META_NAMES = (
    "adaptive_avg_pool2d", "add", "addcmul", "amax", "amin", "avg_pool1d", "avg_pool2d", "baddbmm", "bmm", "cat",
    "chunk", "clamp", "clone", "contiguous", "conv1d", "conv2d", "conv3d", "cos", "cumsum", "detach", "div", "einsum",
    "exp", "expand", "expand_as", "flatten", "flip", "float", "gather", "group_norm", "interpolate", "linear",
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
        self._fields: dict[torch.device, tuple[torch.device, dict[str, Any]]] = {}

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
            if _tells_order(tensor):  # `empty_like` takes ten times as long on the meta device
                strides = _dense(tensor.size(), tensor.stride())
                elem = torch.empty_strided(tensor.size(), strides, dtype=tensor.dtype, device="meta")
            else:
                elem = torch.empty_like(_twin(tensor))
        else:
            size = tensor.size() if shape is None else shape
            elem = _empty(size, dtype=tensor.dtype, device="meta")
        return self._fake(elem, device or tensor.device)

    def _made_of(self, tensors: Sequence[torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
        """A tensor of another shape made of some: with channels last where all have them there, else contiguous."""
        kept = torch.channels_last if all(map(_has_channels_last, tensors)) else torch.contiguous_format
        elem = _empty(shape, dtype=tensors[0].dtype, device="meta", memory_format=kept)
        return self._fake(elem, tensors[0].device)

    def _fake(self, elem: torch.Tensor, device: torch.device) -> torch.Tensor:
        """A fake tensor over one on the meta device; the first of a device tells what its constructor does for all."""
        known = self._fields.get(device)
        if known is None:
            made: Any = FakeTensor(self, elem, device)
            self._fields[device] = made.fake_device, dict(vars(made))
        else:
            keys, fields = known
            made = torch.Tensor._make_subclass(
                FakeTensor, elem, elem.requires_grad, dispatch_device=True, device_for_backend_keys=keys
            )
            torch._C._set_throw_on_mutable_data_ptr(made)
            vars(made).update(fields)
        vars(made)["_meta"] = elem
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
                twins, device = self._of_functions[key]
                return map_tree(twins, lambda v: self._copy(v, device))
        result = self._on_meta(function, args, kwargs)
        with torch._C.DisableTorchFunction():
            if result is not NotImplemented and _is_new(result, (args, kwargs)):
                self._of_functions[key] = map_tree(result, _twin_or_same), _device_of(args)
        return result

    def _copy(self, item: Any, device: torch.device) -> Any:
        """A fake tensor laid out like another tensor, on a device; anything else as it is."""
        if not isinstance(item, torch.Tensor):
            return item
        with torch._C.DisableTorchFunction():
            elem = torch.empty_strided(item.size(), item.stride(), dtype=item.dtype, device="meta")
            return self._fake(elem, device)

    def twin(self, fake: torch.Tensor) -> torch.Tensor:
        """Another fake tensor like one."""
        with torch._C.DisableTorchFunction():
            made: torch.Tensor = self._copy(fake, fake.device)
            return made.requires_grad_(fake.requires_grad)

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
                if type(module).forward is nn.Identity.forward:
                    return args[0]
                if _is_elementwise(module):
                    return self.like(args[0])
                shape = _leaf_shape(module, args[0])
                if shape is not None:
                    keeps = isinstance(module, _ConvNd) and not args[0].is_contiguous()
                    return self._made_of(args, shape) if keeps else self.like(args[0], shape)
        key = _leaf_key(module, args, kwargs)
        if key is None:
            return self._run_leaf(module, forward, args, kwargs)
        if key not in self._of_leaves:
            self._of_leaves[key] = self._run_leaf(module, forward, args, kwargs)
        with torch._C.DisableTorchFunction():
            return map_tree(self._of_leaves[key], lambda v: self._copy(v, v.device) if isinstance(v, FakeTensor) else v)

    def _run_leaf(self, module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        """Run a leaf: as the function that it is, on the meta device, or its forward."""
        call = _leaf_call(module) if len(args) == 1 and not kwargs and isinstance(args[0], FakeTensor) else None
        if call is not None and _by_rule():
            weights = [self._copy(item, args[0].device) for item in call[1]]
            result = self._on_meta(call[0], (args[0], *weights), {})
            if result is not NotImplemented:
                return result
        return self.run(forward, args, kwargs)

    def of_function(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The output of a function or operator on fake values and numbers."""
        if function is _BINCOUNT and _counts_known(args, kwargs):
            return self._counts(args, kwargs)
        if function in _OPERATORS and all(type(item) in _NUMBERS for item in args):
            return function(*args)
        if function is torch._assert and args and type(args[0]) is bool:
            with torch._C.DisableTorchFunction():
                return function(*args, **kwargs)
        if not _by_rule():
            return self.run(function, args, kwargs)
        with torch._C.DisableTorchFunction():
            if function in _UNARY and args and isinstance(args[0], FakeTensor):
                return self.like(args[0])
            if function in _BINARY and len(args) == 2 and not kwargs:
                first, second = args if isinstance(args[0], FakeTensor) else reversed(args)
                if isinstance(first, FakeTensor) and _is_like_first(function, first, second):
                    return self.like(first)
            if function is F.layer_norm and len(args) > 1 and _normalizes(args[0], args[1]):
                return self.like(args[0], tuple(args[0].shape))
            if function is F.scaled_dot_product_attention and _is_plain_attention(args, kwargs):
                return self.like(args[0], (*args[0].shape[:-1], args[2].shape[-1]))
            if function is torch.cat and args:
                joined = _cat_shape(*args, **kwargs)
                if joined:
                    return self._made_of(args[0], joined)
            if function is F.interpolate and args and isinstance(args[0], FakeTensor):
                resized = _resized_shape(*args, **kwargs)
                if resized:
                    return self._made_of(args[:1], resized)
        if function in _BY_META and args:
            result = self._by_meta(function, args, kwargs)
            if result is not NotImplemented:
                return result
        return self.run(function, args, kwargs)

    def _counts(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What `torch.bincount` gives where all numbers are below `minlength`, as the indices of experts are."""
        _, weights, length = _counted(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            kind = (
                torch.int64 if weights is None else torch.float32 if weights.dtype is torch.float32 else torch.float64
            )
            return self._fake(torch.empty(length, dtype=kind, device="meta"), args[0].device)

    def of_method(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The output of a method on fake values and numbers."""
        function = getattr(torch.Tensor, name, None)
        if name == "bincount" and _counts_known(args, kwargs):
            return self._counts(args, kwargs)
        if isinstance(args[0], FakeTensor) and function in _BY_META and _by_rule():
            result = self._by_meta(function, args, kwargs)
            if result is not NotImplemented:
                return result
        return self.run(getattr(args[0], name), args[1:], kwargs)


_BINCOUNT = torch.bincount  # while recording, torch holds another function by this name


def _counted(input: Any, weights: Any = None, minlength: Any = 0) -> tuple[Any, Any, Any]:
    return input, weights, minlength


def _counts_known(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether numbers are counted up to a length that is given."""
    try:
        tensor, _, length = _counted(*args, **kwargs)
    except TypeError:
        return False
    return isinstance(tensor, FakeTensor) and type(length) is int and length > 0


def _twin(fake: Any) -> torch.Tensor:
    """A tensor on the meta device like a fake one, kept with it as long as no operation has changed its shape."""
    twin: torch.Tensor | None = getattr(fake, "_meta", None)
    if twin is None or twin.size() != fake.size() or twin.stride() != fake.stride():
        twin = torch.empty_strided(fake.size(), fake.stride(), dtype=fake.dtype, device="meta")
        if type(fake) is FakeTensor:
            vars(fake)["_meta"] = twin
    return twin


def _twin_or_same(item: Any) -> Any:
    return _twin(item) if isinstance(item, torch.Tensor) else item


def _device_of(args: tuple[Any, ...]) -> torch.device:
    """Where the fake tensors of a function's arguments are."""
    first: list[torch.device] = []
    map_tree(args, lambda item: first.append(item.device) if type(item) is FakeTensor else None)
    return first[0]


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
    """Whether a tensor is broadcast to another one, whose layout the result has."""
    padded = (1,) * (left.ndim - right.ndim) + tuple(right.shape)
    fits = len(padded) == left.ndim and all(b in (1, a) for a, b in zip(left.shape, padded, strict=True))
    return fits and (bool(left.is_contiguous()) or _tells_order(left))


def _tells_order(x: Any) -> bool:
    """Whether the strides of an operand leave no question of the order of axes to the operands after it."""
    strides = x.stride()
    return 1 not in x.shape and 0 not in strides and len(set(strides)) == len(strides)


def _dense(sizes: Sequence[int], strides: Sequence[int]) -> list[int]:
    """Strides along the same order of axes, without gaps."""
    dense, step = [0] * len(sizes), 1
    for axis in sorted(range(len(sizes)), key=strides.__getitem__):
        dense[axis] = step
        step *= sizes[axis]
    return dense


def _is_plain_attention(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Attention without dropout (which draws), on three tensors whose batch and heads are the same."""
    if len(args) > 4 or kwargs.get("dropout_p") or kwargs.get("enable_gqa") or len(args) < 3:
        return False
    query, key, value = args[:3]
    same = query.shape[:-2] == key.shape[:-2] == value.shape[:-2] and query.shape[-1] == key.shape[-1]
    return bool(same and key.shape[-2] == value.shape[-2] and query.dtype == key.dtype == value.dtype)


def _cat_shape(tensors: Any, dim: int = 0, **other: Any) -> tuple[int, ...] | None:
    """The shape of tensors of one dtype, joined; None where it has to be run to know it."""
    if other or not all(isinstance(t, FakeTensor) and t.dtype == tensors[0].dtype for t in tensors):
        return None
    if not all(tensor.ndim < 5 or tensor.is_contiguous() for tensor in tensors):
        return None
    shapes = [list(tensor.shape) for tensor in tensors]
    total = sum(shape.pop(dim) for shape in shapes)
    if any(shape != shapes[0] for shape in shapes):
        return None
    rank = len(shapes[0]) + 1
    shapes[0].insert(dim % rank, total)
    return tuple(shapes[0])


def _has_channels_last(x: Any) -> bool:
    """Whether torch takes a tensor for maps with channels last: by its strides, though samples may be apart."""
    if x.ndim != 4:
        return False
    sizes, strides = x.size(), x.stride()
    least = 0 if strides[1] else math.inf
    for axis in (1, 3, 2, 0):
        # One pixel of one channel is laid out either way, and counts as channels first.
        if not sizes[axis] or strides[axis] < least or (axis == 0 and least == strides[1]):
            return False
        least = strides[axis] * max(1, sizes[axis])
    return True


def _resized_shape(
    x: Any, size: Any = None, scale_factor: Any = None, mode: str = "nearest", *other: Any, **options: Any
) -> tuple[int, ...] | None:
    """The shape of maps that were resized; None where it has to be run to know it."""
    if other or options.get("recompute_scale_factor") or options.get("antialias"):
        return None
    if mode not in _RESIZES or not x.dtype.is_floating_point:
        return None
    spatial = tuple(x.shape[2:])
    if scale_factor is None:
        size = (size,) * len(spatial) if isinstance(size, int) else size
        new = tuple(size) if isinstance(size, (tuple, list)) else ()
    else:
        factors = scale_factor if isinstance(scale_factor, (tuple, list)) else (scale_factor,) * len(spatial)
        if len(factors) != len(spatial):
            return None
        new = tuple(math.floor(length * factor) for length, factor in zip(spatial, factors, strict=True))
    known = size is None or scale_factor is None
    fits = known and len(new) == len(spatial) and all(type(length) is int and length > 0 for length in new)
    return (*x.shape[:2], *new) if fits and _RESIZES[mode] in (None, len(spatial)) else None


def _is_elementwise(module: nn.Module) -> bool:
    """Whether the output of a layer is of the shape and layout of its input."""
    return isinstance(module, (nn.Identity, _DropoutNd)) or type(module).forward in _ELEMENTWISE_FORWARDS


def _normalizes(x: Any, shape: Any) -> bool:
    """Whether a layer norm over `shape` takes a tensor; what it gives is contiguous, whatever the tensor was."""
    shape = tuple(shape)
    return isinstance(x, FakeTensor) and 0 < len(shape) <= x.ndim and tuple(x.shape[-len(shape) :]) == shape


def _leaf_shape(module: nn.Module, x: Any) -> tuple[int, ...] | None:
    """The output shape of a common layer; None where the layer has to be run to know it.

    The output is contiguous, but that of a convolution has its channels last where its input has.
    """
    forward, shape = type(module).forward, tuple(x.shape)
    if forward is nn.LayerNorm.forward:
        return shape if _normalizes(x, module.normalized_shape) else None
    if isinstance(module, _ConvNd) and forward in _CONV_FORWARDS and _is_plain(module.weight):
        return _conv_shape(module, shape) if x.ndim == 4 or x.is_contiguous() else None
    if not x.is_contiguous():
        return None
    if isinstance(module, _NormBase):
        module._check_input_dim(x)  # type: ignore[no-untyped-call]
        return shape if shape[1] == module.num_features else None
    if isinstance(module, _SAME_SHAPE):
        return shape
    if isinstance(module, nn.Linear) and forward is nn.Linear.forward and shape[-1] == module.in_features:
        return (*shape[:-1], module.out_features)
    return None


def _leaf_call(module: Any) -> tuple[Callable[..., Any], tuple[Any, ...]] | None:
    """The function that a common layer is, and its arguments behind the input; None for other layers."""
    forward = type(module).forward
    zeros = isinstance(module, _ConvNd) and forward in _CONV_FORWARDS and module.padding_mode == "zeros"
    if zeros and _is_plain(module.weight):  # else the output may be laid out like the weight
        options = (module.stride, module.padding, module.dilation, module.groups)
        return _CONVS[len(module.kernel_size)], (module.weight, module.bias, *options)
    if isinstance(module, nn.Linear) and forward is nn.Linear.forward:
        return F.linear, (module.weight, module.bias)
    if forward in _POOLS:
        function, settings = _POOLS[forward]
        return function, tuple(getattr(module, name) for name in settings)
    if forward is nn.Flatten.forward:
        return torch.flatten, (module.start_dim, module.end_dim)
    return None


def _is_plain(weight: torch.Tensor) -> bool:
    """Whether the weight of a convolution lies as its shape says, also where it has a single pixel or channel."""
    return weight.is_contiguous() and weight.stride(-1) == 1 and weight.stride(1) == math.prod(weight.shape[2:])


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
