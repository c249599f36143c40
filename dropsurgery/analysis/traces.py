"""Equality without values: two forwards that run the same operators in the same order on the same tensors.

A model is run once on the meta device, and each operator that torch dispatches is written down with its arguments
(`record`). A second model that shares the parameters is then run on the same inputs (`replay`): each of its operators
must be the next one on the list, with the same arguments, and is given that one's result instead of being run. So the
two computed the same numbers, whatever the numbers are; and a replay costs little more than the Python around it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from dropsurgery.capture import Inputs


class NotComparable(Exception):
    """A forward of which no trace can be made without values: it asks for numbers."""


class Differs(BaseException):
    """The second forward does something else. No Exception, so that no forward catches it."""


@dataclass(frozen=True)
class Call:
    """One operator: its arguments as facts, and as they are (kept: no other tensor gets their place); its result."""

    operator: Any
    facts: Any
    kept: Any
    result: Any


@dataclass(frozen=True)
class Trace:
    """What one forward did: its operators in order, then its result as facts or what it raised (type and text)."""

    calls: list[Call]
    facts: Any
    error: tuple[type, str] | None


def record(model: nn.Module, inputs: Inputs, *, grad: bool = False) -> Trace:
    """Run a model on the meta device in its mode, with or without gradients, and write down what it does.

    Raises:
        NotComparable: it asks for values, or makes constants on its device.
    """
    with torch.set_grad_enabled(grad), _Recorder() as recorder:
        result, error = _run(model, inputs)
    if error is not None and (re.search(r"\bmeta\b", error[1]) or error[0] in (NotComparable, NotImplementedError)):
        raise NotComparable(error[1].partition("\n")[0])
    return Trace(recorder.calls, _facts(result), error)


def replay(
    trace: Trace, model: nn.Module, inputs: Inputs, *, grad: bool = False, marks: Marks | None = None
) -> str | None:
    """Run another model on the inputs of a trace; gives the first difference in words, None where there is none.

    Where the first model refused the inputs, the other one has to do so in the same words.
    """
    if trace.error is not None:
        with torch.set_grad_enabled(grad):
            _, error = _run(model, inputs)
        return None if _alike(trace.error, error) else f"expected {_told(trace.error)}, got {_told(error)}"
    try:
        with torch.set_grad_enabled(grad), _Replayer(trace, marks or Marks()) as replayer:
            result, error = _run(model, inputs)
        replayer.end(result, error)
    except Differs as difference:
        return str(difference)
    return None


class Marks:
    """Marks on tensors, to see whether what a module hands on is used: by an operator, or as part of the result."""

    def __init__(self) -> None:
        self.made: set[str] = set()
        self.used: set[str] = set()
        self._marked: dict[int, tuple[Tensor, frozenset[str]]] = {}

    @contextmanager
    def on(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        """Mark what these modules, by name, give back."""
        handles = [module.register_forward_hook(self._marking(name)) for name, module in modules.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _marking(self, name: str) -> Callable[..., Tensor]:
        def mark(module: nn.Module, args: Any, result: Tensor) -> Tensor:
            self.made.add(name)
            with _disable_current_modes():
                marked: Tensor = torch.ops.aten.alias.default(result)  # with its strides, and its gradient
            _, before = self._marked.get(id(result), (result, frozenset()))
            self._marked[id(marked)] = marked, before | {name}  # kept, so that no other tensor gets its id
            return marked

        return mark

    def see(self, tree: Any) -> None:
        """These arguments or results are used."""
        for tensor in tensors_of(tree) if self._marked else ():
            if id(tensor) in self._marked:
                self.used |= self._marked[id(tensor)][1]


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kept = (args, kwargs or {})
        if func is torch.ops.aten.lift_fresh.default and args[0].is_meta:
            raise NotComparable("it makes constants on its device, whose values a trace does not show")
        facts = _facts(kept)  # now: an operator may change the shape of what it is given
        result = _shapes.run(func, kept)
        if _is_constant(result):
            if func in _EMPTY:
                result.zero_()  # what lies there by chance is no constant
            self.calls.append(Call(func, facts, kept, result.clone()))
            return result
        if args and result is args[0]:  # in place
            self.calls.append(Call(func, facts, kept, _IN_PLACE))
            return result
        self.calls.append(Call(func, facts, kept, result))
        return _alias(result)


class _Shapes:
    """Results on the meta device, which are shapes: what was run on such shapes before is not run again."""

    limit = 50_000

    def __init__(self) -> None:
        self._known: dict[Any, Any] = {}

    def run(self, func: Any, call: tuple[Any, dict[str, Any]]) -> Any:
        """The result of an operator; views and what changes shapes in place are its own."""
        args, kwargs = call
        key = (func, _facts(call, _geometry))
        if key in self._known:
            known = self._known[key]
            if known is _IN_PLACE:
                return args[0]
            return tuple(map(_empty, known)) if isinstance(known, list) else _empty(known)
        result = func(*args, **kwargs)
        if len(self._known) == self.limit:
            self._known.clear()
        if _keeps_shapes(func) and not _is_constant(result):
            if args and result is args[0]:
                self._known[key] = _IN_PLACE
            elif not func._schema.is_mutable and all(map(_is_shape, _several(result))):
                made = [(tensor.shape, tensor.stride(), tensor.dtype) for tensor in _several(result)]
                self._known[key] = made if isinstance(result, tuple) else made[0]
        return result


_IN_PLACE = object()


@functools.cache
def _keeps_shapes(func: Any) -> bool:
    """Whether an operator gives tensors of its own, or the one that it works on in place, in its old shape."""
    returns = func._schema.returns
    views = any(value.alias_info and not value.alias_info.is_write for value in returns)
    tensors = all(isinstance(value.type, torch.TensorType) for value in returns)
    return tensors and not views and torch.Tag.inplace_view not in func.tags


def _several(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _is_constant(result: Any) -> bool:
    """Whether an operator gives numbers: constants that a forward makes for itself, on the CPU."""
    return isinstance(result, Tensor) and not result.is_meta


def _anew(call: Call, args: Any, kwargs: Any) -> Tensor:
    """The constant that a call gives, computed anew: views of it and changes in place follow. Draws are repeated."""
    made: Tensor = call.operator(*args, **kwargs)
    if call.operator in _EMPTY or torch.Tag.nondeterministic_seeded in call.operator.tags:
        made.copy_(call.result)
    return made


def _is_shape(result: Any) -> bool:
    """Whether a result is a shape and no more; some operators give nothing for what was not asked of them."""
    return isinstance(result, Tensor) and result.is_meta


def _empty(like: tuple[Any, Any, torch.dtype]) -> Tensor:
    return torch.empty_strided(like[0], like[1], dtype=like[2], device="meta")


_shapes = _Shapes()
_EMPTY = frozenset(
    (
        torch.ops.aten.empty.memory_format,
        torch.ops.aten.empty_like.default,
        torch.ops.aten.empty_strided.default,
        torch.ops.aten.new_empty.default,
        torch.ops.aten.new_empty_strided.default,
    )
)


class _Replayer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, trace: Trace, marks: Marks) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._trace = trace
        self._marks = marks
        self._at = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = (args, kwargs or {})
        if func is torch.ops.aten.copy_.default and _facts(args[0]) == _facts(args[1]):
            self._marks.see(given)
            return args[0]  # what a regularizer gave back, written where it came from: with a mark, no longer itself
        if self._at == len(self._trace.calls):
            raise Differs(f"expected the end, got {func}{self._place()}")
        call = self._trace.calls[self._at]
        if func is not call.operator:
            raise Differs(f"expected {call.operator}, got {func}{self._place()}")
        facts = _facts(given)
        if facts != call.facts:
            raise Differs(f"other arguments of {func}: {_shown(given)}, expected {_shown(call.kept)}{self._place()}")
        self._marks.see(given)
        self._at += 1
        if torch.Tag.inplace_view in func.tags:
            return func(*args, **given[1])
        if _is_constant(call.result):
            return _anew(call, args, given[1])
        return args[0] if call.result is _IN_PLACE else _alias(call.result)

    def end(self, result: Any, error: tuple[type, str] | None) -> None:
        """The forward is over: it must have come as far as the trace, and to the same end."""
        if error is not None:
            raise Differs(f"expected no error, got {_told(error)}{self._place()}")
        if self._at < len(self._trace.calls):
            raise Differs(f"expected {self._trace.calls[self._at].operator}, got the end{self._place()}")
        self._marks.see(result)
        if _facts(result) != self._trace.facts:
            raise Differs("the same operators, but another result")

    def _place(self) -> str:
        return f" (operator {self._at + 1} of {len(self._trace.calls)})"


def _run(model: nn.Module, inputs: Inputs) -> tuple[Any, tuple[type, str] | None]:
    try:
        return model(*inputs[0], **inputs[1]), None
    except Exception as error:
        return None, (type(error), str(error))


def _identity(tensor: Tensor) -> Any:
    """What makes a tensor this one: where its numbers are, not what they are; in what order it shows which of them."""
    if tensor.is_meta:
        return tensor.untyped_storage()._cdata, tensor.storage_offset(), *_geometry(tensor)
    # A constant that the forward makes: each forward has its own, so its numbers count.
    return tensor.shape, tensor.dtype, tensor.detach().reshape(-1).view(torch.uint8).numpy(force=True).tobytes()


def _geometry(tensor: Tensor) -> Any:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


_ATOMS = frozenset((int, bool, str, type(None), torch.dtype, torch.device))


def _facts(tree: Any, of: Callable[[Tensor], Any] = _identity) -> Any:
    """Arguments or results as what can be compared."""
    kind = type(tree)
    if kind in _ATOMS:  # most are: the questions below cost more
        return (kind, tree)
    if kind in (tuple, list):
        return (kind, *[_facts(item, of) for item in tree])
    if isinstance(tree, Tensor):
        return of(tree)
    if isinstance(tree, (list, tuple)):
        return (type(tree), *[_facts(item, of) for item in tree])
    if isinstance(tree, Mapping):
        return (type(tree), *[(key, _facts(value, of)) for key, value in tree.items()])
    return (type(tree), repr(tree) if isinstance(tree, float) else tree)  # nan is no nan


def _alias(tree: Any) -> Any:
    """Tensors of their own over the same numbers: whoever changes their shape does not change the trace."""
    if isinstance(tree, Tensor):
        return tree.detach()
    if isinstance(tree, (list, tuple)):
        return type(tree)(map(_alias, tree))
    return tree


def tensors_of(tree: Any) -> Iterator[Tensor]:
    """All tensors of nested lists, tuples and mappings, in order."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from tensors_of(item)
    elif isinstance(tree, Mapping):
        for item in tree.values():
            yield from tensors_of(item)


def _alike(one: tuple[type, str] | None, other: tuple[type, str] | None) -> bool:
    """Whether two errors are the same; torch's own are worded by the device, and that of a recording is not meta."""
    return one == other or (one is not None and other is not None and one[0] is other[0] is RuntimeError)


def _told(error: tuple[type, str] | None) -> str:
    return "no error" if error is None else f"{error[0].__name__}: {error[1]}"


def _shown(tree: Any) -> str:
    if isinstance(tree, Tensor):
        return f"[{'x'.join(map(str, tree.shape))}]"
    if isinstance(tree, (list, tuple)):
        return f"({', '.join(map(_shown, tree))})"
    return repr(tree)
