"""Relations against an independent reading: positions written into a tensor, and looked up behind the operation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dropsurgery.compression.relations import Aligned, Axes, Cut, Halves, Multiplied, Piece, Regrouped, Stuck, Whole


def cut(axis: int, kept: list[int], size: int) -> Cut:
    gone = torch.ones(size, dtype=torch.float64)
    gone[kept] = 0
    return Cut(axis, gone.unsqueeze(1))


def masked(shape: tuple[int, ...], asked: Cut) -> Tensor:
    """Ones where a tensor stays, zeros where it is cut."""
    view = [1] * len(shape)
    view[asked.axis] = -1
    return (1 - asked.table[:, 0]).view(view).expand(shape)


def same(found: Cut | None, expected: Tensor) -> None:
    assert found is not None
    assert torch.equal(masked(tuple(expected.shape), found), expected)


RESHAPES = [
    ((2, 6, 4, 4), (2, 96), 1, [0, 1, 2]),
    ((2, 96), (2, 6, 4, 4), 1, [*range(32), *range(64, 80)]),
    ((2, 5, 12), (2, 5, 3, 4), 2, [4, 5, 6, 7]),
    ((2, 5, 3, 4), (2, 5, 12), 2, [0, 2]),
    ((2, 5, 3, 4), (2, 5, 12), 3, [0, 2]),
    ((2, 5, 12), (2, 5, 3, 4), 2, [0, 2, 4, 6, 8, 10]),
    ((2, 6), (1, 2, 6, 1, 1), 1, [0, 3]),
    ((1, 2, 6, 1, 1), (2, 6), 2, [5]),
    ((2, 7, 7, 6), (2, 49, 6), 3, [1, 2]),
    ((8, 6), (2, 4, 6), 1, [1, 2]),
    ((2, 4, 6), (8, 6), 2, [1, 2]),
    ((6,), (2, 3), 0, [0, 1, 2]),
]


@pytest.mark.parametrize(("before", "after", "axis", "kept"), RESHAPES)
def test_reshape(before: tuple[int, ...], after: tuple[int, ...], axis: int, kept: list[int]) -> None:
    asked = cut(axis, kept, before[axis])
    expected = masked(before, asked).reshape(after)
    down = Regrouped(before, after).down(asked)
    same(down, expected)
    assert down is not None
    same(Regrouped(before, after).up(down), masked(before, asked))


@pytest.mark.parametrize(
    ("before", "after", "axis", "kept"),
    [((2, 12), (2, 3, 4), 1, [0, 1, 2]), ((2, 3, 4), (2, 4, 3), 1, [0]), ((4, 6), (24,), 0, [])],
)
def test_a_cut_through_the_middle_of_positions_is_refused(
    before: tuple[int, ...], after: tuple[int, ...], axis: int, kept: list[int]
) -> None:
    asked = cut(axis, kept, before[axis])
    if not kept:  # a whole axis is cut: nothing of it is the middle of a position
        assert bool(Regrouped(before, after).down(asked).gone.all())  # type: ignore[union-attr]
        return
    with pytest.raises(Stuck, match="whole position"):
        Regrouped(before, after).down(asked)


def test_broadcasting() -> None:
    gate = Aligned((2, 6, 1, 1), (2, 6, 4, 4))
    same(gate.down(cut(1, [0, 1], 6)), masked((2, 6, 4, 4), cut(1, [0, 1], 6)))
    assert gate.up(cut(2, [0, 1], 4)) is None
    bias = Aligned((6,), (2, 5, 6))
    same(bias.down(cut(0, [0], 6)), masked((2, 5, 6), cut(2, [0], 6)))
    same(bias.up(cut(2, [0], 6)), masked((6,), cut(0, [0], 6)))
    assert bias.up(cut(1, [0], 5)) is None


def test_pieces() -> None:
    piece = Piece(1, 4, 6, 14)
    down = piece.down(cut(1, [0, 1], 6))
    assert down is not None and torch.nonzero(down.gone).flatten().tolist() == [6, 7, 8, 9]
    up = piece.up(cut(1, [0, 4, 10], 14))
    assert up is not None and torch.nonzero(~up.gone).flatten().tolist() == [0]
    assert piece.up(cut(1, list(range(4, 14)), 14)) is None
    whole = Whole(piece)
    assert torch.equal(whole.up(cut(1, [0, 1], 6)).gone, down.gone)  # type: ignore[union-attr]


def test_halves() -> None:
    halves = Halves(1)
    up = halves.up(cut(1, [0, 2], 3))
    assert up is not None and torch.nonzero(~up.gone).flatten().tolist() == [0, 2, 3, 5]
    same(halves.down(up), masked((2, 3), cut(1, [0, 2], 3)))
    with pytest.raises(Stuck, match="halves"):
        halves.down(cut(1, [0, 1, 2, 3], 6))


def test_channels_that_make_several() -> None:
    relation = Multiplied(2)
    down = relation.down(cut(1, [0, 2], 3))
    assert down is not None and torch.nonzero(~down.gone).flatten().tolist() == [0, 1, 4, 5]
    same(relation.up(down), masked((1, 3), cut(1, [0, 2], 3)))
    with pytest.raises(Stuck, match="only some"):
        relation.up(cut(1, [0, 1, 2], 6))


def test_axes() -> None:
    permuted = Axes({0: 0, 1: 3, 2: 1, 3: 2}, "moves axes")
    x = torch.empty(2, 6, 4, 5)
    same(permuted.down(cut(1, [0], 6)), masked(tuple(x.shape), cut(1, [0], 6)).permute(0, 2, 3, 1))
    pooled = Axes({0: 0, 1: 1}, "pools over it")
    with pytest.raises(Stuck, match="pools over it"):
        pooled.down(cut(2, [0], 4))
    with pytest.raises(Stuck, match="pools over it"):
        pooled.up(cut(2, [0], 4))
