"""What a forward sees while it is recorded: stand-ins that know their value and write down what is done with them.

A `Traced` stands for one node of the graph under construction. Structure (rank, the length of a tuple, whether
something is a tensor at all) is answered from the value; arithmetic and torch functions become nodes. Where Python
has to know a number or a truth (`if`, `int`, `range`, an f-string), it gets the one of the example, and the recorder is
told, so that the graph is never used where the answer could be another one.
"""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import fx
from torch._subclasses import FakeTensor

from dropsurgery.graph import add_node

if TYPE_CHECKING:
    from dropsurgery.capture.frame import Frame


class Untraceable(BaseException):
    """A forward does something that no graph of its own can say; the module that owns it stays as it is.

    No `Exception`, so that a forward's own `except` does not take it for an error of its own.
    """


# Read off the value, and the same for every input of the same rank and kind.
_STRUCTURE = frozenset({"ndim", "is_sparse", "is_quantized", "is_nested", "names", "layout", "is_mkldnn"})
# Read off the value, but another input may have another: a guard.
_GUARDED = frozenset(
    {"dtype", "device", "requires_grad", "itemsize", "is_cuda", "is_meta", "is_cpu", "is_mps", "is_xpu"}
)
# Methods whose Python answer may differ between inputs of the same rank.
_GUARDED_CALLS = frozenset({"is_contiguous", "is_floating_point", "is_complex", "get_device", "type", "stride"})
_DATA = frozenset({"item", "tolist", "numpy", "cpu_numpy", "__array__", "nonzero", "is_nonzero"})
_ALIASES = frozenset({"T", "mT", "H", "mH", "data", "real", "imag", "grad"})


class TracedSize(tuple[Any, ...]):
    """`torch.Size` of traced numbers."""

    def __repr__(self) -> str:
        return repr(torch.Size(int(size) for size in self))

    __str__ = __repr__

    def numel(self) -> Any:
        return math.prod(self)


class Traced:
    """A node of the graph under construction, with its value on the example input."""

    __slots__ = ("_frame", "_node", "_value")

    def __init__(self, frame: Frame, node: fx.Node, value: Any) -> None:
        object.__setattr__(self, "_frame", frame)
        object.__setattr__(self, "_node", node)
        object.__setattr__(self, "_value", value)

    # `isinstance(x, torch.Tensor)` and `isinstance(n, int)` ask for `__class__` when the type itself does not fit.
    @property  # type: ignore[misc]  # read-only: nothing assigns it
    def __class__(self) -> type:
        kind = type(self._value)
        return torch.Tensor if issubclass(kind, FakeTensor) else kind

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        raise Untraceable(f"{func} reached outside of the recording")

    def __repr__(self) -> str:
        if isinstance(self._value, torch.Tensor):
            return f"Traced({self._node.name})"
        return repr(self._known("the text"))

    def __getattr__(self, name: str) -> Any:
        value = self._value
        if name == "shape" and isinstance(value, torch.Tensor):
            return self._frame.shape_of(self)
        if name in _STRUCTURE:
            self._frame.level.asks_rank = True
            return getattr(value, name)
        if name in _GUARDED:
            known = getattr(value, name)
            self._frame.tensor_guard(self._node, name, known)
            return known
        if name in _DATA:
            raise Untraceable(f".{name}() needs the data of a tensor")
        if name in _ALIASES:
            return self._frame.call_function(getattr, (self, name), {})
        attribute = getattr(value, name)  # an AttributeError here is what the model would see
        if name.startswith("__"):
            return attribute
        if name.startswith("_") or not callable(attribute):
            raise Untraceable(f"asks for .{name}")
        return self._method(name)

    def _method(self, name: str) -> Callable[..., Any]:
        def method(*args: Any, **kwargs: Any) -> Any:
            if name == "size" and isinstance(self._value, torch.Tensor):
                shape = self._frame.shape_of(self)
                return shape[args[0] if args else kwargs["dim"]] if args or kwargs else shape
            if name in {"dim", "ndimension"}:
                self._frame.level.asks_rank = True
                return self._value.ndim
            if name in _GUARDED_CALLS and (name != "type" or not (args or kwargs)):
                return self._frame.guarded_method(name, (self, *args), kwargs)
            return self._frame.call_method(name, (self, *args), kwargs)

        return method

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise Untraceable(f"sets .{name} of a tensor")

    # -- where Python must know -------------------------------------------------------------------------------
    def _known(self, how: str) -> Any:
        if isinstance(self._value, torch.Tensor):
            raise Untraceable(f"{how} needs the data of a tensor")
        self._frame.guard(self._node, self._value, how)
        return self._value

    def __bool__(self) -> bool:
        return bool(self._known("the truth"))

    def __int__(self) -> int:
        return int(self._known("int()"))

    def __float__(self) -> float:
        return float(self._known("float()"))

    def __index__(self) -> int:
        # torch's own argument parser asks too, and then takes the number symbolically: `Frame` sorts the two apart.
        caller = sys._getframe(1)
        if isinstance(self._value, torch.Tensor) or not isinstance(self._value, int):
            raise TypeError(f"{type(self._value).__name__} cannot be interpreted as an integer")
        self._frame.index_guard(caller, self._node, self._value)
        return self._value

    def __str__(self) -> str:
        return str(self._known("the text"))

    def __format__(self, spec: str) -> str:
        return format(self._known("the text"), spec)

    def __hash__(self) -> int:
        return id(self) if isinstance(self._value, torch.Tensor) else hash(self._known("the hash"))

    def __len__(self) -> int:
        first = self._frame.shape_of(self)[0]
        self._frame.guard(first._node, first._value, "len()")
        return int(first._value)

    def __iter__(self) -> Iterator[Any]:
        return iter(
            [
                self[index]  # type: ignore[index]  # set below, with all other operators
                for index in range(len(self))
            ]
        )

    def __contains__(self, item: Any) -> NoReturn:
        raise Untraceable("`in` needs the data of a tensor")

    def __round__(self, digits: Any = None) -> Any:
        return round(self._known("round()"), digits)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._frame.call_function(operator.setitem, (self, key, value), {})


class TracedItem(Traced):
    """One of the sizes of a shape; it becomes a node when something is done with it."""

    __slots__ = ("_index", "_made", "_shape")

    def __init__(self, frame: Frame, shape: fx.Node, index: int, value: int) -> None:
        object.__setattr__(self, "_frame", frame)
        object.__setattr__(self, "_value", value)
        object.__setattr__(self, "_shape", shape)
        object.__setattr__(self, "_index", index)
        object.__setattr__(self, "_made", None)

    @property
    def _node(self) -> fx.Node:
        if self._made is None:
            made = add_node(self._frame.graph, "call_function", operator.getitem, (self._shape, self._index))
            made.meta["value"] = self._value
            object.__setattr__(self, "_made", made)
        node: fx.Node = self._made
        return node


def _forward(function: Callable[..., Any]) -> Callable[..., Any]:
    def apply(self: Traced, *args: Any) -> Any:
        return self._frame.call_function(function, (self, *args), {})

    return apply


def _reflected(function: Callable[..., Any]) -> Callable[..., Any]:
    def apply(self: Traced, other: Any) -> Any:
        return self._frame.call_function(function, (other, self), {})

    return apply


_BINARY = (
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "matmul",
    "lshift",
    "rshift",
    "and",
    "or",
    "xor",
)
_AUGMENTED = tuple(f"i{name}" for name in _BINARY)
_OTHER = ("lt", "le", "eq", "ne", "gt", "ge", "neg", "pos", "invert", "abs", "getitem")
OPERATORS: dict[str, Callable[..., Any]] = {}
"""Special method → the function of `operator` that does the same, and `__radd__` and its kin with None."""

for _name in (*_BINARY, *_AUGMENTED, *_OTHER):
    _function = getattr(operator, f"{_name}_" if _name in {"and", "or"} else _name)
    OPERATORS[f"__{_name}__"] = _function
    setattr(Traced, f"__{_name}__", _forward(_function))
    if _name in _BINARY:
        setattr(Traced, f"__r{_name}__", _reflected(_function))
for _name in ("floor", "ceil", "trunc"):
    setattr(Traced, f"__{_name}__", _forward(getattr(math, _name)))
