"""The models of a recipe: they check YAML, the JSON Schema is made from them, planning reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BeforeValidator,
    Field,
    PlainSerializer,
    WithJsonSchema,
)

from dropsurgery.records import Site

from . import selection
from .reading import shown
from .timing import Schedule, ScheduleSpec, Strict

Item = TypeVar("Item")

_WHOLE = {"type": "integer", "minimum": 0}
_COMPARISON = {"type": "string", "pattern": r"^\s*(>=|<=|==|>|<)\s*\d{1,12}\s*$"}
_EDGE = {"type": "string", "pattern": r".\.[^.]+$"}
_FRACTION = {"type": "number", "minimum": 0, "maximum": 1}


def _parse_include(value: object) -> tuple[str, ...]:
    items = value if isinstance(value, list) else [value]
    if not all(isinstance(item, str) and item for item in items):
        raise ValueError(f"expected the name of a recipe or a path below this file's folder, got {shown(value)}")
    return tuple(items)


def _from_digits(key: object) -> object:
    return int(key) if isinstance(key, str) and key.isdecimal() else key  # JSON has text keys only


def _one_or_more(item: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [item, {"type": "array", "items": item, "minItems": 1}]}


_text = PlainSerializer(str, return_type=str)
Whole = Annotated[tuple[int, ...], BeforeValidator(selection.parse_whole), WithJsonSchema(_one_or_more(_WHOLE))]
Integers = Annotated[
    tuple[int, ...],
    BeforeValidator(selection.parse_integers),
    WithJsonSchema(_one_or_more({"type": "integer"})),
]
Depth = Annotated[
    tuple[float, float],
    BeforeValidator(selection.parse_depth),
    WithJsonSchema({"type": "array", "items": _FRACTION, "minItems": 2, "maxItems": 2}),
]
Block = Annotated[
    selection.Blocks,
    BeforeValidator(selection.parse_block),
    PlainSerializer(lambda block: str(block) if block.end else list(block.indices)),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "pattern": r"^\s*(first|last)\s+\d{1,3}(\.\d{1,6})?\s*%\s*$"},
                *_one_or_more({"type": "integer"})["anyOf"],
            ]
        }
    ),
]
Path = Annotated[
    tuple[str, ...],
    BeforeValidator(selection.parse_path),
    WithJsonSchema(_one_or_more({"enum": list(selection.PATHS)})),
]
Role = Annotated[
    tuple[str, ...],
    BeforeValidator(selection.parse_role),
    WithJsonSchema(_one_or_more({"enum": list(selection.ROLES)})),
]
Globs = Annotated[
    tuple[selection.PathPattern, ...],
    BeforeValidator(selection.parse_globs),
    PlainSerializer(lambda patterns: [pattern.text for pattern in patterns]),
    WithJsonSchema(_one_or_more({"type": "string", "minLength": 1, "maxLength": selection.MAX_PATTERN})),
]
Edges = Annotated[tuple[str, ...], BeforeValidator(selection.parse_edges), WithJsonSchema(_one_or_more(_EDGE))]
Comparison = Annotated[
    selection.Comparison,
    BeforeValidator(selection.parse_comparison),
    _text,
    WithJsonSchema({"anyOf": [_WHOLE, _COMPARISON]}),
]
Expect = Annotated[
    selection.Comparison,
    BeforeValidator(selection.parse_expect),
    _text,
    WithJsonSchema({"anyOf": [_WHOLE, {"const": "any"}, _COMPARISON]}),
]
Name = Annotated[str, Field(min_length=1, max_length=100, pattern=r"^\S([^\n\t]*\S)?$")]
Factor = Annotated[float, Field(ge=0)]
RoleName = Literal["backbone", "encoder", "decoder", "skip", "head"]
Stage = Annotated[int, BeforeValidator(_from_digits), Field(ge=0)]
Chain = Annotated[
    tuple[Name, ...],
    BeforeValidator(lambda kinds: tuple(kinds) if isinstance(kinds, list) else kinds),
    Field(min_length=2, max_length=20),
]


class Where(Strict):
    """Which of the pattern's sites are meant: all selectors that are set must hold."""

    stage: Whole | None = None
    """Resolution stage of the backbone; the stem is 0, ResNet's layer1 to layer4 are 1 to 4."""
    reduction: Whole | None = None
    """Input size divided by feature size."""
    depth: Depth | None = None
    """Position along the model, from 0 to 1, both ends included."""
    block: Block | None = None
    """Which of the repeated blocks: 'last 50%', 'first 25%' or indices (negative: from the end)."""
    path: Path | None = None
    """Between fork and residual add: on the branch, on the shortcut, or on the trunk (neither)."""
    role: Role | None = None
    """Part of the model."""
    module: Globs | None = None
    """Globs on the module path ('layer4.*'), or regular expressions after 're:'."""
    exclude: Globs | None = None
    """Module paths to leave out, written as for `module`."""
    index: Integers | None = None
    """Which of the entry's sites, counted in the model's order (negative: from the end)."""
    every: Annotated[int, Field(ge=1)] | None = None
    """Each n-th of the entry's sites, beginning with the first."""
    min_size: Annotated[int, Field(ge=1)] | None = None
    """Smallest allowed height and width (or number of tokens)."""
    channels: Comparison | None = None
    """Number of channels: a count or a comparison such as '>=64'."""
    trainable: bool | None = None
    """Whether the parameters just before the site are trained."""
    not_on: Edges | None = None
    """Leave out what is also this 'pattern.edge'."""

    def matches_facts(self, site: Site) -> bool:
        """Whether every selector on the site's own facts holds: all but `index`, `every` and `not_on`."""
        return self.why_not(site) is None

    def why_not(self, site: Site) -> str | None:
        """The first selector that refuses the site, as `stage is 2`; None when all hold."""
        return next((f"{name} is {fact}" for name, fact, holds in self._asked(site) if not holds), None)

    def pick(self, sites: Sequence[Item]) -> tuple[Item, ...]:
        """Of an entry's sites in the model's order, those that `index` and `every` leave."""
        wanted = range(len(sites)) if self.index is None else {index % len(sites) for index in self._within(sites)}
        return tuple(site for at, site in enumerate(sites) if at in wanted and at % (self.every or 1) == 0)

    def _within(self, sites: Sequence[object]) -> Iterator[int]:
        return (index for index in self.index or () if -len(sites) <= index < len(sites))

    def _asked(self, site: Site) -> Iterator[tuple[str, object, bool]]:
        """Each selector that is set: its name, the site's fact, whether it holds."""
        paths = (site.owner, site.module)
        asked: list[tuple[str, object, Callable[[], bool]]] = [
            ("stage", site.stage, lambda: site.stage in (self.stage or ())),
            ("reduction", site.reduction, lambda: site.reduction in (self.reduction or ())),
            ("depth", site.depth, lambda: site.depth is not None and _within(site.depth, self.depth)),
            ("block", site.block, lambda: self.block is not None and self.block.holds(site.block)),
            ("path", site.path, lambda: site.path in (self.path or ())),
            ("role", site.role, lambda: site.role in (self.role or ())),
            ("module", site.module, lambda: _any_fits(self.module, paths)),
            ("exclude", site.module, lambda: not _any_fits(self.exclude, paths)),
            ("min_size", _size(site), lambda: (_size(site) or 0) >= (self.min_size or 0)),
            (
                "channels",
                site.channels,
                lambda: self.channels is not None and self.channels.holds(site.channels),
            ),
            ("trainable", site.trainable, lambda: site.trainable == self.trainable),
        ]
        return ((name, fact, holds()) for name, fact, holds in asked if getattr(self, name) is not None)


class Scale(Strict):
    """Factors on an entry's rates by a fact of the site; a site that no key names keeps its rate."""

    stage: dict[Stage, Factor] = Field(default_factory=dict, json_schema_extra={"propertyNames": {"pattern": r"^\d+$"}})
    """Factor per stage, such as {3: 0.25}."""
    role: dict[RoleName, Factor] = Field(default_factory=dict)
    """Factor per part of the model."""

    def factor(self, site: Site) -> float:
        """What multiplies the rates at this site."""
        by_stage: Mapping[Any, float] = self.stage
        by_role: Mapping[Any, float] = self.role
        return by_stage.get(site.stage, 1.0) * by_role.get(site.role, 1.0)

    @property
    def largest(self) -> float:
        """The largest factor that any site can get."""
        return max([1.0, *self.stage.values()]) * max([1.0, *self.role.values()])


class Entry(Strict):
    """One line of a recipe: this regularizer, on this edge of this pattern, at these sites."""

    name: Name
    """What overrides, plan and diff call this entry; by default its pattern and edge."""
    pattern: str | None = None
    """A pattern of the catalogue or of `patterns:`; only `insert: adopt` can do without."""
    edge: str | None = None
    """One of the pattern's edges; its first one by default."""
    where: Where = Where()
    """Which of the pattern's sites are meant."""
    insert: str
    """The regularizer, or `adopt` to take over the stochastic layers that the model already has."""
    arguments: dict[str, Any] = Field(default_factory=dict, alias="with")
    """The regularizer's arguments; p is the share that is dropped."""
    scale: Scale = Scale()
    """Factors on the rates, per stage or role: {stage: {3: 0.25}}."""
    schedule: Schedule = ScheduleSpec()
    """How the rates grow during training; constant by default."""
    depth_rule: Literal["constant", "linear", "linear0", "cells"] = "constant"
    """How the rates vary over the entry's sites by depth: linear is l/L, linear0 begins at 0."""
    expect: Expect = selection.Comparison(">=", 1)
    """How many sites must be hit: a count, a comparison or 'any'."""
    optional: bool = False
    """Whether hitting nothing is fine."""
    stack: bool = False
    """Whether this edit may share an edge with another one that differs."""


class Header(Strict):
    """What a recipe says about itself."""

    version: Literal[1]
    """The format; this is format 1."""
    name: Name = "unnamed"
    """By default the file's name."""
    summary: str = ""
    """What it does, in a line."""
    reference: str = ""
    """Paper and code that the placement comes from."""
    tested_on: dict[str, Annotated[int, Field(ge=0)]] = Field(default_factory=dict)
    """Number of edits per model, which the test suite checks."""
    clock: Literal["optimizer", "forward", "manual"] = "optimizer"
    """What moves the schedules: optimizer steps, training forwards, or calls of gm.surgery.step()."""
    patterns: dict[Name, Chain] = Field(default_factory=dict)
    """Chains of node kinds, to be used as patterns: {conv_gn_act: [conv2d, group_norm, activation]}."""


class RecipeFile(Header):
    """A recipe as it is written, before includes and defaults are merged."""

    include: Annotated[
        tuple[str, ...], BeforeValidator(_parse_include), WithJsonSchema(_one_or_more({"type": "string"}))
    ] = ()
    """Bundled recipes by name, or files beside or below this one ('./base.yaml'); they come first."""
    defaults: dict[str, Any] = Field(default_factory=dict)
    """Merged into each entry of this file that does not say otherwise."""
    entries: list[dict[str, Any]] = Field(default_factory=list)
    """What to insert where; an entry replaces an included one of the same name."""


class Recipe(Header):
    """A recipe that is checked and complete: includes, defaults and overrides are merged into its entries."""

    entries: tuple[Entry, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, JSON too, that `load_recipe` reads as an equal recipe."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


def _within(value: float, bounds: tuple[float, float] | None) -> bool:
    return bounds is not None and bounds[0] <= value <= bounds[1]


def _any_fits(patterns: tuple[selection.PathPattern, ...] | None, paths: tuple[str, ...]) -> bool:
    return any(pattern.holds(path) for pattern in patterns or () for path in paths)


def _size(site: Site) -> int | None:
    """The smallest dimension besides batch and channels; None where there is no other."""
    rank = len(site.shape)
    besides = {0} if site.channel_axis is None else {0, site.channel_axis, site.channel_axis + rank}
    return min((size for axis, size in enumerate(site.shape) if axis not in besides), default=None)
