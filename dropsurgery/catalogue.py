"""The folder is the registry: list the regularizers and patterns, import one by name.

A file `dropsurgery/regularizers/<name>.py` is the regularizer `<name>`, a file
`dropsurgery/patterns/<name>.py` is the pattern; third parties add theirs by the entry points
`dropsurgery.regularizers` and `dropsurgery.patterns`, or with `register`.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import pkgutil
import typing
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal

from dropsurgery.errors import SurgeryError

Kind = Literal["regularizers", "patterns"]

NO_REGULARIZERS: dict[str, str] = {
    "maxout": "Maxout (Goodfellow et al. 2013, arXiv:1302.4389) is an architecture: it multiplies a layer's parameters "
    "and takes the place of its activation, so no surgery on a trained net gives it",
    "region_dropout": "region dropout (Zhang, Yang, Feng, ML-LocNet, ECCV 2018) is not determined by its source as a "
    "layer, but as a part of a training in two phases; adl hides regions, and grid_dropout cells of the input",
    "label_smoothing": "label smoothing (Szegedy et al. 2016, arXiv:1512.00567) is a loss and needs the labels: "
    "torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)",
}
"""What is asked for as a regularizer and is none: why, and what to do."""

_registered: dict[Kind, dict[str, Any]] = {"regularizers": {}, "patterns": {}}


@dataclass(frozen=True)
class Argument:
    """One argument of a regularizer, which is one key of `with:` in a recipe."""

    annotation: Any
    default: Any = inspect.Parameter.empty

    @property
    def required(self) -> bool:
        """Whether it must be given."""
        return self.default is inspect.Parameter.empty


def names(kind: Kind) -> list[str]:
    """Return the names of all regularizers or patterns, sorted; nothing is imported for it."""
    return sorted({*_files(kind), *_plugins(kind), *_registered[kind]})


def load(kind: Kind, name: str) -> Any:
    """Return the regularizer class (or the pattern) of that name.

    An unknown name is a SurgeryError that shows the nearest ones. What goes wrong while a file or plugin is
    imported is raised as it is, with its own traceback.
    """
    if name in _registered[kind]:
        return _registered[kind][name]
    if name in _files(kind):
        return _object(kind, name)
    if name in (plugins := _plugins(kind)):
        return plugins[name].load()
    if kind == "regularizers" and name in NO_REGULARIZERS:
        raise SurgeryError(f"no regularizer {name!r}: {NO_REGULARIZERS[name]}")
    known = names(kind)
    near = difflib.get_close_matches(str(name), known, n=3)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"there are: {', '.join(known)}"
    raise SurgeryError(f"no {kind.removesuffix('s')} {name!r}; {hint}")


def register(kind: Kind, name: str, thing: Any) -> None:
    """Add a regularizer class or a pattern from Python; a SurgeryError if the name is taken by another."""
    taken = name in _files(kind) or name in _plugins(kind) or _registered[kind].get(name, thing) is not thing
    if taken:
        raise SurgeryError(f"{kind.removesuffix('s')} {name!r}: expected a new name, but there is one already")
    _registered[kind][name] = thing


@functools.lru_cache(maxsize=1024)
def arguments(regularizer: type) -> dict[str, Argument]:
    """Return the constructor arguments of a regularizer class: name → annotation, default."""
    init = inspect.unwrap(regularizer.__init__)  # type: ignore[misc]
    hints = typing.get_type_hints(init, include_extras=True)
    parameters = list(inspect.signature(init).parameters.values())[1:]
    return {each.name: Argument(hints.get(each.name, Any), each.default) for each in parameters}


@functools.cache
def _files(kind: Kind) -> frozenset[str]:
    folder = importlib.import_module(f"dropsurgery.{kind}").__path__
    return frozenset(module.name for module in pkgutil.iter_modules(folder) if not module.name.startswith("_"))


def _plugins(kind: Kind) -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=f"dropsurgery.{kind}")}


@functools.cache
def _object(kind: Kind, name: str) -> Any:
    """A regularizer file holds one class of regularizer; a pattern file a constant PATTERN."""
    module = importlib.import_module(f"dropsurgery.{kind}.{name}")
    if kind == "patterns":
        return module.PATTERN
    own = [thing for thing in vars(module).values() if getattr(thing, "__module__", None) == module.__name__]
    (found,) = (thing for thing in own if isinstance(thing, type) and hasattr(thing, "expected_drop"))
    return found
