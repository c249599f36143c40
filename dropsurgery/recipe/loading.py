"""From a name, a path, a dict or a `Recipe` to a checked `Recipe`: files, includes, defaults, overrides."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dropsurgery.errors import RecipeError

from .arguments import suggestion
from .checking import EntryChecker, merged, tidied, validate
from .models import Entry, Header, Recipe, RecipeFile
from .reading import MAX_BYTES, Budget, Node, Place, Problems, read_plain, read_yaml, refuse, shown

MAX_FILES = 32
_FIELDS = "|".join(field.alias or name for name, field in Entry.model_fields.items())
_KEY_FIELD = re.compile(rf"\.(?:{_FIELDS})(?:\.|$)")


def recipes_folder() -> Path:
    """The folder of the bundled recipes: inside the package as installed, beside it in a source tree."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def bundled() -> list[str]:
    """Names of the bundled recipes, sorted."""
    return sorted(path.stem for path in recipes_folder().glob("*.yaml"))


def load_recipe(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    *,
    overrides: Mapping[str, Any] | Sequence[str] | None = None,
) -> Recipe:
    """Read and check a recipe; a RecipeError lists all of its problems, each with line, column and path.

    `recipe` is a bundled name with or without `.yaml`, a path (a text with a slash or a `Path`), a dict, or a
    `Recipe`, which is given back. `overrides` change single values, `{"conv branch.with.p": 0.2}` or
    `["conv branch.with.p=0.2"]`: an entry's name and a path inside it, `defaults` and a path for every entry
    that does not say otherwise, or `clock`.
    """
    if isinstance(recipe, Recipe):
        if not overrides:
            return recipe
        recipe = recipe.to_dict()
    problems = Problems()
    loader = _Loader(problems, _read_overrides(overrides or {}, problems))
    return loader.load(recipe)


@dataclass(frozen=True)
class _Source:
    """One document of a recipe: its tree, and its file if it has one."""

    node: Node
    path: Path | None = None


class _Loader:
    """Reads one recipe with its includes, under one budget."""

    def __init__(self, problems: Problems, overrides: list[tuple[str, Node]]) -> None:
        self.problems, self.budget, self.overrides = problems, Budget(), overrides
        self.entries: dict[str, Node] = {}
        self.patterns: dict[str, Node] = {}
        self.files = 0

    def load(self, recipe: str | Path | Mapping[str, Any]) -> Recipe:
        source = self.open(recipe)
        header = self.gather(source, ())
        self.override_entries()
        if not self.entries:
            self.problems.add(source.node.place.inside("entries"), "a recipe needs at least one entry")
        checker = EntryChecker(self.patterns, self.problems)
        nodes = [tidied(node) for node in self.entries.values()]
        checked = [(entry, node) for node in nodes if (entry := checker.check(node)) is not None]
        checker.check_expressions(checked)
        self.problems.check()
        assert header is not None  # or there would be a problem
        fields = {name: getattr(header, name) for name in Header.model_fields}
        if "name" not in header.model_fields_set and source.path is not None:
            fields["name"] = source.path.stem
        fields["patterns"] = {name: tuple(node.plain()) for name, node in self.patterns.items()}
        return Recipe(**fields, entries=tuple(entry for entry, _ in checked))

    def open(self, recipe: object) -> _Source:
        """The document that the user names."""
        if isinstance(recipe, Mapping):
            return _Source(read_plain(recipe, Place(), self.problems, self.budget))
        if isinstance(recipe, str) and not _has_slash(recipe):
            return self.open_bundled(recipe, Place())
        if not isinstance(recipe, str | Path):
            raise RecipeError(f"expected a recipe's name, a path, a dict or a Recipe, got {type(recipe).__name__}")
        return self.read(Path(recipe), str(recipe))

    def open_bundled(self, name: str, place: Place) -> _Source:
        stem = name.removesuffix(".yaml")
        if stem not in bundled():
            hint = suggestion(stem, bundled(), "the bundled ones are")
            if Path(name[:200]).is_file():
                hint = f"for the file in this folder write {shown('./' + name)}"
            refuse(place, f"no bundled recipe {shown(name)}; {hint}")
        return self.read(recipes_folder() / f"{stem}.yaml", f"{stem}.yaml")

    def read(self, path: Path, label: str) -> _Source:
        place = Place(label if label.isprintable() else shown(label))
        self.files += 1
        if self.files > MAX_FILES:
            refuse(place, f"a recipe includes at most {MAX_FILES - 1} files")
        content = _content(path, place, self.budget)
        return _Source(read_yaml(content, place, self.problems, self.budget), path.resolve())

    def gather(self, source: _Source, above: tuple[Path, ...]) -> RecipeFile | None:
        """Add the entries and patterns of a document, those of its includes first."""
        node = source.node
        if not node.is_mapping:
            refuse(node.place, f"expected a mapping with version: and entries:, got {shown(node.plain())}")
        clock = [value for key, value in self.overrides if key == "clock"]
        if clock and not above:
            node = replace(node, value={**node.value, "clock": clock[-1]})
        header = validate(RecipeFile, node, self.problems)
        for child in _items(node, "include"):
            if isinstance(child.value, str):
                self.include(child, source, above)
        if "patterns" in node.value and node.value["patterns"].is_mapping:
            self.patterns.update(node.value["patterns"].value)
        self.add_entries(node)
        return header

    def include(self, child: Node, source: _Source, above: tuple[Path, ...]) -> None:
        name, place = child.value, child.place
        above = (*above, source.path) if source.path is not None else above
        if not _has_slash(name):
            found = self.open_bundled(name, place)
        elif source.path is None:
            refuse(place, "only a recipe in a file includes by path; use a bundled recipe's name")
        else:
            path = _below(source.path.parent, name, place)
            folder = os.path.dirname(source.node.place.source)
            found = self.read(path, os.path.normpath(os.path.join(folder, name)))
        if found.path in above:
            refuse(place, f"{shown(name)} includes itself in a circle")
        self.gather(found, above)

    def add_entries(self, node: Node) -> None:
        defaults = node.value.get("defaults", Node({}))
        if not defaults.is_mapping:
            return  # the models say so
        if "name" in defaults.value:
            self.problems.add(defaults.value["name"].place, "a name belongs to one entry, not into the defaults")
        for key, value in self.overrides:
            if key.startswith("defaults."):
                defaults = _with_value(defaults, tuple(key.split(".")[1:]), value, self.problems)
        own: dict[str, Node] = {}
        for entry in _items(node, "entries"):
            if entry.is_mapping:
                entry = _named(merged(defaults, entry))
                name = str(entry.value["name"].value)
                if name in own:
                    text = f"the entry name {shown(name)} is there twice; give each entry a name of its own"
                    self.problems.add(entry.value["name"].place, text)
                if name == "defaults" or name.startswith("defaults."):
                    self.problems.add(entry.value["name"].place, "'defaults' is taken; choose another name")
                own[name] = entry
        self.entries.update(own)

    def override_entries(self) -> None:
        for key, value in self.overrides:
            if key == "clock":
                continue
            if key.startswith("defaults."):
                if not any(_comes_from(entry, value.place) for entry in self.entries.values()):
                    self.problems.add(value.place, "no entry takes this from the defaults; override the entries")
                continue
            names = [name for name in self.entries if key.startswith(f"{name}.")]
            if key in self.entries:
                self.problems.add(value.place, f"expected a value of this entry, such as {shown(key + '.with.p')}")
                continue
            if not names:
                known = [*self.entries, "defaults", "clock"]
                text = _KEY_FIELD.split(key, maxsplit=1)[0]
                self.problems.add(value.place, f"no entry {shown(text)}; {suggestion(text, known)}")
                continue
            name = max(names, key=len)
            path = tuple(key[len(name) + 1 :].split("."))
            self.entries[name] = _with_value(self.entries[name], path, value, self.problems)


def _has_slash(text: str) -> bool:
    return "/" in text or os.sep in text


def _content(path: Path, place: Place, budget: Budget) -> bytes:
    """What the file holds; nothing is read of one that is too large or no regular file."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            refuse(place, "expected a file, got a folder or a device")
        with path.open("rb") as file:
            content = file.read(budget.bytes + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise RecipeError(f"{place}: the recipe cannot be read: {reason}") from None
    if len(content) > budget.bytes:
        size = max(status.st_size, len(content))
        refuse(place, f"the file has {size} bytes; a recipe has at most {MAX_BYTES}, its includes counted")
    budget.bytes -= len(content)
    return content


def _below(folder: Path, name: str, place: Place) -> Path:
    """The file `name` in `folder` or below it, links followed."""
    try:
        path = (folder / name).resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise RecipeError(f"{place}: {shown(name)} cannot be read: {error}") from None
    if Path(name).is_absolute() or not path.is_relative_to(folder):
        refuse(place, f"{shown(name)} leads out of this recipe's folder; include files beside or below it")
    return path


def _items(node: Node, key: str) -> list[Node]:
    """The children under `key`, a list or one alone."""
    if key not in node.value:
        return []
    found = node.value[key]
    return found.value if isinstance(found.value, list) else [found]


def _named(entry: Node) -> Node:
    """`entry` with a name: its own, or the pattern with its edge."""
    if isinstance(entry.value.get("name", Node(None)).value, str):
        return entry
    words = [entry.value[key].value for key in ("pattern", "edge") if key in entry.value]
    if "name" in entry.value or not all(isinstance(word, str) for word in words):
        return replace(entry, value={"name": Node(None, entry.place), **entry.value})
    name = Node(".".join(words) or "adopt", entry.place)
    return replace(entry, value={"name": name, **entry.value})


def _comes_from(node: Node, place: Place) -> bool:
    """Whether `node`, or something in it, was written at `place`."""
    if node.place == place:
        return True
    children = node.value.values() if node.is_mapping else node.value if isinstance(node.value, list) else ()
    return any(_comes_from(child, place) for child in children)


def _read_overrides(overrides: Mapping[str, Any] | Sequence[str], problems: Problems) -> list[tuple[str, Node]]:
    """Each override's key and value, which carries the key as its place."""
    budget, read = Budget(), []
    if isinstance(overrides, Mapping):
        pairs = list(overrides.items())
    elif isinstance(overrides, list | tuple):
        pairs = [
            text.partition("=")[::2] if isinstance(text, str) and "=" in text else (text, None) for text in overrides
        ]
    else:
        raise RecipeError(f'expected overrides {{"entry.with.p": 0.2}} or ["entry.with.p=0.2"], got {shown(overrides)}')
    for key, value in pairs:
        if not isinstance(key, str) or len(key) > 300 or (value is None and not isinstance(overrides, Mapping)):
            raise RecipeError(f"expected an override such as 'conv branch.with.p=0.2', got {shown(key)}")
        place = Place(path=f"overrides[{key!r}]")
        key = key.strip()
        if isinstance(overrides, Mapping):
            read.append((key, read_plain(value, place, problems, budget)))
        else:
            read.append(
                (
                    key,
                    read_yaml((value.strip() or "null").encode(errors="surrogatepass"), place, problems, budget),
                )
            )
    return read


def _with_value(node: Node, path: tuple[str, ...], value: Node, problems: Problems) -> Node:
    """A copy of the mapping `node` with `value` at `path`."""
    key: str | int = int(path[0]) if re.fullmatch(r"\d{1,9}", path[0]) else path[0]
    child = value
    if path[1:]:
        below = node.value.get(key, Node({}, value.place))
        if key == "schedule" and isinstance(below.value, str):
            below = Node({"kind": below}, below.place)
        if not below.is_mapping:
            problems.add(value.place, f"{shown(key)} is {shown(below.plain())}: there is nothing below it to override")
            return node
        child = _with_value(below, path[1:], value, problems)
    return replace(node, value={**node.value, key: child}, keys={**node.keys, key: value.place})
