"""How positions of an operand lie in a result: a cut is followed down from the one, and up from the other.

A cut is one axis of a tensor and a table with a row for each position on it. A relation carries it over to another
tensor; None says that nothing of it goes on, and `Stuck` that no cut may pass here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

Shape = tuple[int, ...]


class Stuck(Exception):
    """A cut cannot pass an operation; says why, as the end of a sentence that begins with the operation."""


class Cut(NamedTuple):
    """What is known of the positions on one axis of a tensor: `table` is (positions, columns), the first 1 for gone."""

    axis: int
    table: Tensor

    @property
    def gone(self) -> Tensor:
        """Which positions are cut out."""
        return self.table[:, 0] > 0


class Relation(Protocol):
    """What is the same place in an operand and in the result."""

    def down(self, cut: Cut) -> Cut | None:
        """The operand's cut, in the result."""

    def up(self, cut: Cut) -> Cut | None:
        """The result's cut, in the operand."""


@dataclass(frozen=True)
class Aligned:
    """Element by element, with broadcasting."""

    operand: Shape
    result: Shape

    def down(self, cut: Cut) -> Cut | None:
        """Axes count from the last."""
        axis = cut.axis + len(self.result) - len(self.operand)
        if self.result[axis] != self.operand[cut.axis]:
            raise Stuck("repeats the axis that is cut")
        return Cut(axis, cut.table)

    def up(self, cut: Cut) -> Cut | None:
        """An axis that the operand does not have, or has with one position, stays as it is."""
        axis = cut.axis - len(self.result) + len(self.operand)
        if axis < 0 or (self.operand[axis] == 1 and self.result[cut.axis] != 1):
            return None
        return Cut(axis, cut.table)


@dataclass(frozen=True)
class Axes:
    """Some axes of the operand, whole, as axes of the result; `reason` is why no cut passes on any other.

    Of the axes of the result that are `repeated` the operand has one position, or none: they ask nothing of it.
    """

    moves: Mapping[int, int]
    reason: str
    repeated: frozenset[int] = frozenset()

    def down(self, cut: Cut) -> Cut | None:
        """To where the axis went."""
        if cut.axis not in self.moves:
            raise Stuck(self.reason)
        return Cut(self.moves[cut.axis], cut.table)

    def up(self, cut: Cut) -> Cut | None:
        """To where the axis came from."""
        if cut.axis in self.repeated:
            return None
        sources = [source for source, axis in self.moves.items() if axis == cut.axis]
        if not sources:
            raise Stuck(self.reason)
        return Cut(sources[0], cut.table)


@dataclass(frozen=True)
class Regrouped:
    """The same numbers in the same order under another shape: a reshape."""

    operand: Shape
    result: Shape

    def down(self, cut: Cut) -> Cut | None:
        """From the axes that were put together, or taken apart."""
        return _regrouped(cut, self.operand, self.result)

    def up(self, cut: Cut) -> Cut | None:
        """The other way."""
        return _regrouped(cut, self.result, self.operand)


@dataclass(frozen=True)
class Piece:
    """The operand is a piece of the result: one of those that are concatenated."""

    axis: int
    start: int
    length: int
    whole: int

    def down(self, cut: Cut) -> Cut | None:
        """Into its place; what lies beside it is not cut by this."""
        if cut.axis != self.axis:
            return cut
        table = cut.table.new_zeros(self.whole, cut.table.shape[1])
        table[self.start : self.start + self.length] = cut.table
        return Cut(self.axis, table)

    def up(self, cut: Cut) -> Cut | None:
        """Its own part."""
        if cut.axis != self.axis:
            return cut
        table = cut.table[self.start : self.start + self.length]
        return Cut(self.axis, table) if bool(table[:, 0].any()) else None


@dataclass(frozen=True)
class Whole:
    """The result is a piece of the operand: one of those that it is split into."""

    piece: Piece

    def down(self, cut: Cut) -> Cut | None:
        """The part that the piece has."""
        return self.piece.up(cut)

    def up(self, cut: Cut) -> Cut | None:
        """The piece in its place."""
        return self.piece.down(cut)


@dataclass(frozen=True)
class Halves:
    """A gated unit: each position of the result is made of two of the operand's, one in each half."""

    axis: int

    def down(self, cut: Cut) -> Cut | None:
        """Both halves must be cut alike."""
        if cut.axis != self.axis:
            return cut
        value, gate = cut.table.chunk(2)
        if not torch.equal(value[:, 0], gate[:, 0]):
            raise Stuck("takes its values and its gates from halves that are cut differently")
        return Cut(self.axis, value)

    def up(self, cut: Cut) -> Cut | None:
        """The same in both."""
        return cut if cut.axis != self.axis else Cut(self.axis, torch.cat([cut.table, cut.table]))


@dataclass(frozen=True)
class Multiplied:
    """A depthwise convolution: each channel makes `times` channels of its own."""

    times: int

    def down(self, cut: Cut) -> Cut | None:
        """Each `times` over."""
        _channels_only(cut)
        return Cut(1, cut.table.repeat_interleave(self.times, 0))

    def up(self, cut: Cut) -> Cut | None:
        """All channels that one makes go together."""
        _channels_only(cut)
        table = cut.table.view(-1, self.times, cut.table.shape[1])
        if not bool((table[..., 0] == table[:, :1, 0]).all()):
            raise Stuck(f"makes {self.times} channels of one, of which only some would stay")
        return Cut(1, table[:, 0])


@dataclass(frozen=True)
class Ends:
    """A layer that mixes all positions of an axis: a cut on it ends here; others go on, or not for this `reason`."""

    operand: int
    result: int
    others: Mapping[int, int]
    reason: str

    def down(self, cut: Cut) -> Cut | None:
        """None on the layer's own axis."""
        return None if cut.axis == self.operand else Axes(self.others, self.reason).down(cut)

    def up(self, cut: Cut) -> Cut | None:
        """None on the layer's own axis."""
        return None if cut.axis == self.result else Axes(self.others, self.reason).up(cut)


@dataclass(frozen=True)
class Never:
    """Nothing passes."""

    reason: str

    def down(self, cut: Cut) -> Cut | None:
        """Refused."""
        raise Stuck(self.reason)

    def up(self, cut: Cut) -> Cut | None:
        """Refused."""
        raise Stuck(self.reason)


def same_axes(rank: int, shift: int = 0) -> dict[int, int]:
    """All axes, each where it was, or `shift` further back."""
    return {axis: axis + shift for axis in range(rank)}


def _channels_only(cut: Cut) -> None:
    if cut.axis != 1:
        raise Stuck("mixes the positions on the axis that is cut")


def _regrouped(cut: Cut, before: Shape, after: Shape) -> Cut | None:
    """The cut under another shape; within the axes that were put together or taken apart it must be of one axis."""
    old, new = _group(cut.axis, before, after)
    inside = [before[axis] for axis in old]
    columns = cut.table.shape[1]
    spread = [1] * len(inside)
    spread[old.index(cut.axis)] = -1
    table = cut.table.view(*spread, columns).expand(*inside, columns)
    table = table.reshape(*[after[axis] for axis in new], columns)
    for place, axis in enumerate(new):
        rows = table.movedim(place, 0).flatten(1, -2) if len(new) > 1 else table.unsqueeze(1)
        if bool((rows == rows[:, :1]).all()):
            return Cut(axis, rows[:, 0])
    raise Stuck(
        f"lays {list(before)} out as {list(after)}, in which what is cut is no whole position of any axis "
        "(a width that is a multiple of what it takes together may fit)"
    )


def _group(axis: int, before: Shape, after: Shape) -> tuple[list[int], list[int]]:
    """The fewest axes before, `axis` among them, that are together as many numbers as some axes after."""
    old, new = 0, 0
    while True:
        first_old, first_new = old, new
        olds, news = before[old : old + 1], after[new : new + 1]
        old, new = old + 1, new + 1
        while math.prod(olds) != math.prod(news):
            if math.prod(olds) < math.prod(news):
                olds, old = (*olds, before[old]), old + 1
            else:
                news, new = (*news, after[new]), new + 1
        while old < len(before) and before[old] == 1 and (new >= len(after) or after[new] != 1):
            old += 1
        while new < len(after) and after[new] == 1 and (old >= len(before) or before[old] != 1):
            new += 1
        if first_old <= axis < old:
            return list(range(first_old, old)), list(range(first_new, new))
