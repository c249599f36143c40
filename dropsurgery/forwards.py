"""Generated forwards: compiled from a recorded level with the regularizers called in it, one variant a signature.

A generated forward never runs where its recording may not hold. What Python had decided while recording (from sizes,
dtypes, the values of arguments that are no tensors, the mode) is part of a signature; another signature is recorded
anew. Attributes that the forward read are watched where they are set (`emission.Surgical`).
"""

from __future__ import annotations

import contextvars
import copy
import functools
import hashlib
import inspect
import linecache
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from dropsurgery.capture import Inputs, Leaf, Level, record
from dropsurgery.capture.levels import map_tree
from dropsurgery.errors import CaptureError, SurgeryError
from dropsurgery.graph import (
    LocalName,
    Operand,
    argument_of,
    build_result,
    carve,
    combine,
    give_more,
    insert_after,
    insert_on,
    local_names,
    swap,
    write_back,
)
from dropsurgery.trees import attribute_at, own_class, spread

SLOTS = "_surgery"
"""The child under which a module keeps the regularizers of the edits that it owns."""
OWN: LocalName = (f"{SLOTS}.own", 0)
"""The call of a leaf's own forward in its generated one."""


@functools.cache
def _no_data() -> FakeTensorMode:
    return FakeTensorMode(allow_non_fake_inputs=True)  # at its first use: the first one takes a second to make


@dataclass(frozen=True)
class LocalEdit:
    """An edit within its owner: on the output of a node, or (with `operand`) on one of its arguments.

    `kind`: the regularizer comes after the node ("insert"), or takes its place, be it a sum ("combine") or the call of
    a layer's own forward ("swap"). `also` are arguments of other nodes that take the result of the same call, `but` the
    users that keep the value as it was, `takes` the arguments whose tensors the regularizer gets besides.
    """

    name: LocalName
    operand: int | tuple[int, int] | None
    slot: str
    site_id: str
    kind: str = "insert"
    also: tuple[tuple[LocalName, Operand], ...] = ()
    but: tuple[LocalName, ...] = ()
    takes: tuple[tuple[LocalName, Operand], ...] = ()


@dataclass(frozen=True)
class Spec:
    """What is kept of an example tensor: enough to record a forward again."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool
    stride: tuple[int, ...]

    def tensor(self) -> torch.Tensor:
        """A fake tensor like the example, laid out as it was."""
        empty = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")
        return FakeTensor(_no_data(), empty, self.device).requires_grad_(self.requires_grad)


@dataclass(eq=False)
class Variant:
    """A generated forward for one signature. `missing` are edits that have no place in it."""

    graph: fx.Graph
    run: Callable[..., Any]
    missing: tuple[LocalEdit, ...] = ()


@dataclass
class Owner:
    """What a rewritten module knows of its own rewriting; everything else is derived from it.

    `example` are the arguments it was recorded with (specs for tensors), `edits` what was inserted. `exact` asks for
    full signatures (shapes, dtypes, devices …), else only structure is compared: which arguments are tensors of which
    rank, and the values of the others. `by_mode` says that training and eval have variants of their own, `by_rank`
    that the forward asked for a rank; `foreign` are attributes of children that it read, `children` those of a
    Sequential, whose forward goes by them.
    """

    edits: tuple[LocalEdit, ...]
    example: Inputs
    exact: bool = False
    by_mode: bool = False
    by_rank: bool = False
    guarded_tensors: tuple[str, ...] = ()
    foreign: tuple[tuple[str, str], ...] = ()
    children: tuple[str, ...] = ()
    watched: dict[str, Any] = field(default_factory=dict)
    variants: dict[Any, Variant] = field(default_factory=dict)

    def dispatches(self, forward: Callable[..., Any]) -> bool:
        """Whether calls of this forward have to be told apart at all: not where all it ever takes are tensors."""
        args, kwargs = self.example
        plain = all(isinstance(item, Spec) for item in args) and not kwargs
        more = len(inspect.signature(forward).parameters) > len(args) + 1 or bool(self.children)
        return not plain or more or self.exact or self.by_mode or self.by_rank or bool(self.foreign)


def clean(graph: fx.Graph) -> fx.Graph:
    """A copy without the fake values of the recording."""
    made = fx.Graph()
    moved: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        moved[node] = made.node_copy(node, lambda n: moved[n])
        moved[node].meta = {key: node.meta[key] for key in ("region", "random") if key in node.meta}
    return made


def graph_key(graph: fx.Graph) -> tuple[Any, ...]:
    """What a graph computes, comparable between recordings."""
    order = {node: index for index, node in enumerate(graph.nodes)}

    def leaf(item: Any) -> Any:
        return ("node", order[item]) if isinstance(item, fx.Node) else item

    return tuple((n.op, n.target, repr(map_tree((n.args, n.kwargs), leaf))) for n in graph.nodes)


# -- generating a forward ----------------------------------------------------------------------------------------
def install(module: nn.Module, owner: Owner, level: Level | None = None) -> None:
    """Derive everything from the owner's edits and example: guards, watched attributes, the first variant."""
    module.__dict__["_owner"] = owner
    owner.children = tuple(module._modules) if isinstance(module, nn.Sequential) else ()
    getattr(module, SLOTS).forget_parts()
    args, kwargs = tensors_of(owner.example)
    if level is None:
        level = _recorded(module, args, kwargs, training=False)
    _note(owner, level)
    if OWN in local_names(level.graph):
        getattr(module, SLOTS).add_module("own", Own(module))
    variants = {module.training: _variant(module, owner, level)}
    if level.reads_training:
        other = _recorded(module, args, kwargs, training=True)
        _note(owner, other)
        owner.by_mode = graph_key(level.graph) != graph_key(other.graph) or level.sets != other.sets
        if owner.by_mode:
            variants = {False: _variant(module, owner, level), True: _variant(module, owner, other)}
    for mode, variant in variants.items():
        if variant.missing:
            raise CaptureError(lost(module, variant.missing))
        if any(name == "training" for _, name in owner.foreign):
            continue  # the modes of children are their own: recorded as they are, at the first call
        owner.variants[_signature(module, owner, mode, args, kwargs)] = variant
    module.__dict__["_graph"] = next(iter(variants.values())).graph
    module.recompile()  # type: ignore[operator]
    choose_forward(module)


def tell_apart(module: nn.Module, levels: list[Level]) -> None:
    """A module that is called several times: where its calls differ in their graphs, compare signatures exactly."""
    if len({graph_key(level.graph) for level in levels}) == 1 and all(level.sets == levels[0].sets for level in levels):
        return
    owner: Owner = module.__dict__["_owner"]
    owner.exact = True
    owner.variants.clear()
    for level in levels:
        _note(owner, level)
        signature = _signature(module, owner, module.training, *tensors_of(map_tree(level.inputs, spec_of)))
        owner.variants[signature] = _variant(module, owner, level)
    choose_forward(module)


def _note(owner: Owner, level: Level) -> None:
    """Take over what a level took for granted."""
    owner.exact = owner.exact or bool(level.guards)
    owner.by_rank = owner.by_rank or level.asks_rank
    owner.guarded_tensors = tuple({*owner.guarded_tensors, *level.guarded_tensors})
    plain = {key: value for key, value in level.reads.items() if not isinstance(value, nn.Module)}
    owner.foreign = tuple({*owner.foreign, *(key for key in plain if key[0])})
    owner.watched.update(
        # Of a module only that it was read: any other in its place is recorded anew.
        {
            name: None if isinstance(value, nn.Module) else value
            for (path, name), value in level.reads.items()
            if not path and name != "training"
        }
    )


def _recorded(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, training: bool | None) -> Level:
    if stands_in(module):
        return leaf_level(module, (args, kwargs))
    level = record(module, args, kwargs, training=training)
    if isinstance(level, Level):
        return level
    if isinstance(level, Leaf):
        return leaf_level(module, (args, kwargs))
    raise CaptureError(f"the forward of {own_class(module).__name__} cannot be recorded as it is now: {level.reason}")


def stands_in(module: nn.Module) -> bool:
    """Whether a regularizer stands in for the forward of a module, whatever that holds."""
    owner: Owner | None = module.__dict__.get("_owner")
    return owner is not None and any(edit.kind == "swap" for edit in owner.edits)


def leaf_level(module: nn.Module, inputs: Inputs, path: str = "") -> Level:
    """The level of a module that is one operation: a call of its own class's forward."""
    return Level(module, path, whole_call(module, OWN[0]), inputs)


def _variant(module: nn.Module, owner: Owner, level: Level) -> Variant:
    graph = clean(level.graph)
    missing = apply_edits(graph, owner.edits, module)
    for index, rerun in enumerate(level.regions):
        nodes = [node for node in graph.nodes if node.meta.get("region") == index]
        slots: Slots = getattr(module, SLOTS)
        name = f"region{len(slots._modules)}"
        slots.add_module(name, Region(module, _compiled(carve(graph, nodes, f"{SLOTS}.{name}")), rerun))
    if level.sets:
        _set_attributes(graph, module, level.sets)
    build_result(graph)
    graph.lint()
    return Variant(graph, _compiled(graph), missing)


def _set_attributes(graph: fx.Graph, module: nn.Module, values: dict[str, Any]) -> None:
    """Let a generated forward begin by setting what the module's own forward sets."""
    slots: Slots = getattr(module, SLOTS)
    name = f"sets{len(slots._modules)}"
    slots.add_module(name, Sets(module, values))
    first = next(node for node in graph.nodes if node.op != "placeholder")
    with graph.inserting_before(first):
        graph.call_module(f"{SLOTS}.{name}")


def apply_edits(graph: fx.Graph, edits: tuple[LocalEdit, ...], module: nn.Module) -> tuple[LocalEdit, ...]:
    """Insert the regularizers into a level's graph; gives the edits that found no place."""
    names = local_names(graph)
    missing = []
    # Operands first: an edit on an output must see the users that they leave. Of several on one output the last
    # comes first, since each is put right behind the node.
    on_operands = [edit for edit in edits if edit.operand is not None]
    on_outputs = [edit for edit in reversed(edits) if edit.operand is None and edit.kind == "insert"]
    in_place_of = [edit for edit in edits if edit.kind != "insert"]
    for edit in (*on_operands, *on_outputs, *in_place_of):
        node = names.get(edit.name)
        target = f"{SLOTS}.{edit.slot}"
        if node is None:
            missing.append(edit)
        elif edit.kind == "swap":
            swap(node, target)
        elif edit.kind == "combine":
            region = node.meta.get("region")
            _in_region(combine(node, target, module_of=module.get_submodule), region)
        elif not all(name in names for name, _ in (*edit.also, *edit.takes)):
            missing.append(edit)
        else:
            made = _inserted(node, edit, target, names, module)
            _in_region(made, node.meta.get("region"))
    return tuple(missing)


def _inserted(
    node: fx.Node, edit: LocalEdit, target: str, names: dict[LocalName, fx.Node], module: nn.Module
) -> fx.Node:
    more = [argument_of(names[name], operand) for name, operand in edit.takes]
    if edit.operand is None:
        but = [names[name] for name in edit.but if name in names]
        made = insert_after(node, target, module_of=module.get_submodule, but=but)
    else:
        also = [(names[name], operand) for name, operand in edit.also]
        made = insert_on(node, edit.operand, target, module_of=module.get_submodule, also=also)
    if more:
        give_more(made, more)
    return made


def _in_region(made: fx.Node, region: int | None) -> None:
    if region is not None:
        made.meta["region"] = region
        if made.target is write_back:
            _in_region(made.all_input_nodes[1], region)


def _compiled(graph: fx.Graph) -> Callable[..., Any]:
    """The graph as a function of (self, *inputs)."""
    code = graph.python_code("self")
    # A name of its own, so that tracebacks show the lines.
    name = f"<dropsurgery {hashlib.sha1(code.src.encode()).hexdigest()[:12]}>"
    linecache.cache[name] = (len(code.src), None, code.src.splitlines(keepends=True), name)
    namespace = dict(code.globals)
    exec(compile(code.src, name, "exec"), namespace)
    return namespace["forward"]  # type: ignore[no-any-return]


class Slots(nn.Module):
    """Holds the regularizers of one owner, and the parts of its forward that are called by name."""

    def forget_parts(self) -> None:
        """Drop what is derived from the owner's forward."""
        for name in [name for name, child in self._modules.items() if isinstance(child, Part)]:
            del self._modules[name]

    def __deepcopy__(self, memo: dict[int, Any]) -> Slots:
        made: Slots = object.__new__(Slots)
        memo[id(self)] = made
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made

    def __getstate__(self) -> dict[str, Any]:
        fields = dict(self.__dict__)
        fields["_modules"] = {k: child for k, child in self._modules.items() if not isinstance(child, Part)}
        return fields


class Part(nn.Module):
    """A part of its owner's forward; derived, so that it goes into no file."""

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        # Kept out of `_modules`: this is a part of the owner, not the other way round.
        self.__dict__["_of"] = owner
        self.training = owner.training


class Region(Part):
    """The part of a generated forward that runs under the model's own activation checkpoint."""

    def __init__(self, owner: nn.Module, function: Callable[..., Any], rerun: Callable[..., Any]) -> None:
        super().__init__(owner)
        self._function = function
        self._rerun = rerun

    def forward(self, *inputs: Any) -> Any:
        """Run the part through `torch.utils.checkpoint`, as the model's own forward does."""
        return self._rerun(functools.partial(self._function, self.__dict__["_of"]), *inputs)


class Sets(Part):
    """The plain attributes that its owner's forward sets."""

    def __init__(self, owner: nn.Module, values: dict[str, Any]) -> None:
        super().__init__(owner)
        self._values = values

    def forward(self) -> None:
        """Set them."""
        self.__dict__["_of"].__dict__.update(self._values)


class Own(Part):
    """The forward of the owner's own class, whole: what a leaf's generated forward begins with."""

    @property
    def inplace(self) -> bool:
        """Whether it changes its input."""
        return bool(getattr(self.__dict__["_of"], "inplace", False))

    def train(self, mode: bool = True) -> Own:
        """Set the mode of the owner too: a flat graph holds this part alone."""
        super().train(mode)
        owner: nn.Module = self.__dict__["_of"]
        owner.training = mode
        for name, child in owner._modules.items():
            if name != SLOTS and child is not None:
                child.train(mode)
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run it."""
        owner: nn.Module = self.__dict__["_of"]
        forward = own_class(owner).forward
        given, named = spread(forward, args)
        return forward(owner, *given, **named, **kwargs)


# -- choosing a variant --------------------------------------------------------------------------------------------
def choose_forward(module: nn.Module) -> None:
    """Give the module's class its forward: the only variant there is, or one that chooses among them."""
    owner: Owner = module.__dict__["_owner"]
    cls: Any = type(module)
    first = next(iter(owner.variants.values()), None)
    told_apart = first is None or owner.dispatches(own_class(module).forward)
    cls.forward = _dispatch if first is None or told_apart else first.run
    _guard_ways(module)


def _dispatch(self: Any, *args: Any, **kwargs: Any) -> Any:
    owner: Owner = self._owner
    variant = owner.variants.get(_signature(self, owner, self.training, args, kwargs))
    if variant is None:
        variant = _record_variant(self, owner, args, kwargs)
    if variant.missing:
        _refuse_missing(self, variant.missing)
    return variant.run(self, *args, **kwargs)


def _signature(module: Any, owner: Owner, training: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a variant depends on, of these arguments and of the world."""
    describe = _exactly if owner.exact else _roughly
    items: list[Any] = [describe(item) for item in args]
    items += [(name, describe(item)) for name, item in sorted(kwargs.items())]
    if owner.by_mode:
        items.append(training)
    if owner.exact:
        items += [
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            *(torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) for kind in ("cpu", "cuda")),
        ]
        items += [(tensor.dtype, tensor.device) for tensor in _guarded(module, owner)]
    items += [_exactly(getattr(module.get_submodule(path), name)) for path, name in owner.foreign]
    if owner.children:
        items.append(len(module._modules))
    return tuple(items)


def _exactly(item: Any) -> Any:
    if isinstance(item, torch.Tensor):
        return (tuple(item.shape), item.dtype, item.device, item.requires_grad, item.stride())
    if isinstance(item, (list, tuple)):
        return tuple([_exactly(part) for part in item])
    if isinstance(item, dict):
        return tuple([(key, _exactly(part)) for key, part in item.items()])
    return (type(item), item if isinstance(item, Hashable) else id(item))


def _roughly(item: Any) -> Any:
    if isinstance(item, torch.Tensor):
        return item.ndim
    if isinstance(item, (list, tuple)):
        return tuple([_roughly(part) for part in item])
    if isinstance(item, dict):
        return tuple([(key, _roughly(part)) for key, part in item.items()])
    return (type(item), item if isinstance(item, Hashable) else id(item))


def _guarded(module: nn.Module, owner: Owner) -> list[torch.Tensor]:
    return [attribute_at(module, path) for path in owner.guarded_tensors]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _record_variant(module: Any, owner: Owner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Variant:
    """Record the forward for a signature that was not met before.

    Where the model itself refuses the input, its own error is raised.
    """
    if owner.children and owner.children != tuple(module._modules):
        refuse_skipped(module, "to run with other children than those it had at surgery")
        return Variant(fx.Graph(), own_class(module).forward)
    if any(isinstance(item, fx.Proxy) for item in (*args, *kwargs.values())):
        raise SurgeryError(
            f"{own_class(module).__name__}: symbolic tracing cannot look into a rewritten module; "
            "gm.surgery.flatten() is one flat graph of the whole model"
        )
    key = _signature(module, owner, module.training, args, kwargs)
    try:
        with _disable_current_modes():  # a counter of operators is to see those of the model only
            level = _aside(lambda: _recorded(module, args, kwargs, training=None))
    except CaptureError as error:
        if error.__cause__ is not None:
            raise error.__cause__ from None
        refuse_skipped(module, f"to run on this input ({error})")
        return Variant(fx.Graph(), own_class(module).forward)
    exact = owner.exact
    _note(owner, level)
    if owner.exact and not exact:  # what was told apart roughly until now is not told apart enough
        owner.variants.clear()
        key = _signature(module, owner, module.training, args, kwargs)
    owner.variants[key] = _variant(module, owner, level)
    return owner.variants[key]


def _aside(record_it: Callable[[], Level]) -> Level:
    """Record with copies of the lists and dicts that context variables hold.

    The model is running: hooks of its own that collect what children give, for a list that the caller's caller will
    return, would put stand-ins there.
    """
    context = contextvars.copy_context()

    def run() -> Level:
        for variable, value in context.items():
            if isinstance(value, (list, dict, set)):
                variable.set(_copied(value))
        return record_it()

    return context.run(run)


def _copied(value: Any) -> Any:
    """A list, dict or set of its own, and those in it."""
    if not isinstance(value, (list, dict, set)):
        return value
    made: Any = copy.copy(value)
    for key in range(len(made)) if isinstance(made, list) else list(made) if isinstance(made, dict) else ():
        made[key] = _copied(made[key])
    return made


def _refuse_missing(module: nn.Module, missing: tuple[LocalEdit, ...]) -> None:
    """Training without a regularizer that was asked for would be silent."""
    slots: Slots = getattr(module, SLOTS)
    if any(slots.get_submodule(edit.slot).active for edit in missing):
        raise SurgeryError(lost(module, missing))


def lost(module: nn.Module, missing: Sequence[LocalEdit]) -> str:
    """What to say of edits that have no place in a forward."""
    names = ", ".join(f"{edit.site_id} ({edit.name[0]})" for edit in missing)
    return (
        f"the forward of {own_class(module).__name__} does not pass {names} on this input or in this mode: "
        "expected the place that was found on the example. Leave it out of the recipe, or give example_inputs "
        "of the size that you train with."
    )


# -- what leads around a generated forward -------------------------------------------------------------------------
def refuse_skipped(module: nn.Module, way: str) -> None:
    """Raise where something is about to run a part of the module without its active regularizers."""
    owner: Owner | None = module.__dict__.get("_owner")
    if owner is None or SLOTS not in {*module.__dict__, *module._modules}:
        return
    slots: Slots = getattr(module, SLOTS)
    skipped = [edit.site_id for edit in owner.edits if slots.get_submodule(edit.slot).active]
    if skipped:
        raise SurgeryError(
            f"{own_class(module).__name__}: {way} would leave out {len(skipped)} regularizers that belong to its own "
            f"forward ({', '.join(skipped[:3])}). Call the module itself, switch it to eval, or leave these sites out "
            "of the recipe (`where: {exclude: …}`)."
        )


def _guard_ways(module: nn.Module) -> None:
    """Make the class's other `forward_*` methods refuse to run where they would leave out active edits.

    They hold the class's own Python: what the generated forward inserts is not in it.
    """
    for name in dir(own_class(module)):
        method = getattr(own_class(module), name, None)
        if name.startswith("forward_") and callable(method):
            setattr(type(module), name, _guarded_way(name, method))


def _guarded_way(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def way(self: Any, *args: Any, **kwargs: Any) -> Any:
        refuse_skipped(self, f"{name}()")
        return method(self, *args, **kwargs)

    return way


def whole_call(module: nn.Module, target: str) -> fx.Graph:
    """A graph that is one call, with the parameters of the module's forward."""
    graph = fx.Graph()
    parameters = list(inspect.signature(own_class(module).forward).parameters.values())[1:]
    stars: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    nodes = [graph.placeholder(stars.get(p.kind, "") + p.name, default_value=p.default) for p in parameters]
    graph.output(graph.call_module(target, tuple(nodes)))
    return graph


# -- small things ----------------------------------------------------------------------------------------------------
def spec_of(item: Any) -> Any:
    """The spec of a tensor; anything else as it is."""
    if isinstance(item, torch.Tensor):
        # Laid out as the recording takes it: one number that was expanded stands for a tensor in its usual order.
        stride = torch.empty_like(item, device="meta").stride()
        return Spec(tuple(item.shape), item.dtype, item.device, item.requires_grad, stride)
    return item


def tensors_of(tree: Any) -> Any:
    """Nested specs as tensors."""
    return map_tree(tree, lambda item: item.tensor() if isinstance(item, Spec) else item)


def same(before: Any, after: Any) -> bool:
    """Whether an attribute was set to what it had been."""
    plain = (int, float, str, tuple, type(None))
    return before is after or (type(before) is type(after) and isinstance(after, plain) and before == after)
