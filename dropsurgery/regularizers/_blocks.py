"""Zero random blocks of a CPU tensor at little more than the cost of copying it, eager and compiled.

Few seeds (the usual case) are drawn as the gaps between them, and each block is zeroed where it lies,
through an overlapping view whose first dimension is where a block starts; for backward they are kept, a
fraction of a byte a cell. Many seeds are drawn as a mask of bytes, spread by doubling, multiplied with in one
go, and kept. A mask that holds for all channels of a sample, or for a whole map, is made a factor of few
operations. A compiled graph keeps 24 bytes, and draws the same once more for backward.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dropsurgery.regularizers._coverage import seed_probability
from dropsurgery.regularizers._tracing import is_traced

Scaled = tuple[Tensor, float, "Blocks | Tensor | None"]
CPU = torch.device("cpu")  # said at each tensor made here: the user may have set another default
_WIDE = (torch.float32, torch.float64)  # a factor in a narrower type would round the scale
_PART = 1 << 17  # elements that are worked on at once
_FEW = 1 << 14
_TABLE, _PRODUCTS = 1 << 15, 1 << 20  # entries of a table of blocks, and how many products with it are worth while
_ROWS = 255  # as many bytes of 0 or 1 as a byte can add up


class _Layout(NamedTuple):
    """What follows from maps, their size and a block; see `Draw`."""

    region: tuple[int, ...]
    whole: bool
    cells: int
    entries: int
    is_tabled: bool


@lru_cache(maxsize=1024)
def _layout(maps: tuple[int, int], size: tuple[int, ...], block: tuple[int, ...]) -> _Layout:
    inner = tuple(length - k + 1 for length, k in zip(size, block, strict=True))
    positions, points, number = math.prod(inner), math.prod(size), math.prod(maps)
    whole, table = positions == 1 < points, positions * points
    small = number * positions <= _FEW and table <= _TABLE and number * table <= _PRODUCTS
    is_tabled = small and math.prod(block) > 1 and not whole
    return _Layout((*maps, *inner), whole, number * points, number if whole else number * points, is_tabled)


@dataclass(frozen=True)
class Draw:
    """Blocks on `maps` = (B, C) or (B, 1) maps of `size` cells, seeded with probability `gamma`.

    The size is (L,), (H, W) or (D, H, W). A seed is the first corner of its `block`, where that lies wholly
    inside of the map.
    """

    maps: tuple[int, int]
    size: tuple[int, ...]
    block: tuple[int, ...]
    gamma: float
    key: int

    @property
    def region(self) -> tuple[int, ...]:
        """The positions of seeds: (B, C or 1, H - kh + 1, W - kw + 1)."""
        return _layout(self.maps, self.size, self.block).region

    @property
    def whole(self) -> bool:
        """Whether a block is a whole map of several cells, so that one number a map says all."""
        return _layout(self.maps, self.size, self.block).whole

    @property
    def cells(self) -> int:
        """How many cells the mask says of whether they are dropped."""
        return _layout(self.maps, self.size, self.block).cells

    @property
    def entries(self) -> int:
        """How many entries the mask has."""
        return _layout(self.maps, self.size, self.block).entries

    @property
    def is_tabled(self) -> bool:
        """Whether blocks are looked up in a table: small maps, and few of them."""
        return _layout(self.maps, self.size, self.block).is_tabled

    def is_sparse(self) -> bool:
        """Whether zeroing block by block costs less than a mask."""
        # In nanoseconds, as measured forward and backward: 60 a seed and 3.2 a cell of its block, against 1.5 a
        # position to draw the bytes and 0.8 a cell to spread and use the mask.
        positions = math.prod(self.region)
        by_block = self.gamma * positions * (60 + 3.2 * math.prod(self.block))
        return by_block < 1.5 * positions + 0.8 * self.cells

    def seeds(self) -> Tensor:
        """Return the flat positions of the seeds in `region`, ascending; their gaps are geometric."""
        return _positions(math.prod(self.region), self.gamma, self._generator())

    def mask(self) -> Tensor:
        """Return bytes (B, C or 1, H, W), 1 where dropped; each length is 1 where a block is the whole map."""
        if self.is_tabled:
            return (self._covered() != 0).view(torch.uint8)
        region, seeds = self.region, self._marked()
        if math.prod(region[2:]) == 1 or math.prod(self.block) == 1:
            return seeds
        mask = torch.zeros(*self.maps, *self.size, dtype=torch.uint8, device=CPU)
        inside: tuple[slice, ...] = tuple(slice(length) for length in region)
        mask[inside] = seeds
        # No block leaves its row or map, so the mask can be spread as if it were one long row.
        step = 1
        for length, k in zip(reversed(self.size), reversed(self.block), strict=True):
            _spread_(mask.view(-1), step, k)
            step *= length
        return mask

    def kept(self, dtype: torch.dtype) -> Tensor:
        """Return what `mask` does as numbers, 0 where dropped and 1 where kept."""
        if self.is_tabled:
            return self._covered().eq_(0).to(dtype)
        if math.prod(self.region[2:]) == 1 and self.entries <= _FEW:
            kept = torch.empty(self.region, dtype=dtype, device=CPU)
            torch.gt(_words(kept.numel(), self._generator()), _limit(self.gamma), out=kept.view(-1))
            return kept
        return (self.mask() ^ 1).to(dtype)

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.key)

    def _marked(self) -> Tensor:
        """Bytes of the shape of `region`, 1 where a seed is."""
        seeds = torch.empty(self.region, dtype=torch.uint8, device=CPU)
        _bernoulli_(seeds.view(-1), self.gamma, self._generator())
        return seeds

    def _covered(self) -> Tensor:
        """How many blocks each cell is under, in few operations instead of many small ones."""
        table = _table(self.size, self.block)
        seeds = torch.empty(math.prod(self.maps), len(table), dtype=torch.float32, device=CPU)
        seeds.bernoulli_(self.gamma, generator=self._generator())
        return torch.mm(seeds, table).view(*self.maps, *self.size)

    def count(self, blocks: Blocks) -> int:
        """How many cells the blocks cover; a cell under two of them counts once."""
        positions = math.prod(self.region[2:])
        maps = torch.div(blocks.seeds, positions, rounding_mode="floor")
        again = maps[1:] == maps[:-1]
        first = torch.ones_like(maps, dtype=torch.bool)  # of its map
        first[1:] = ~again
        crowded = ~first
        crowded[:-1] |= again
        alone = len(maps) - int(crowded.view(torch.uint8).sum())
        # Only where a map has several can they overlap: those maps alone are marked, one after the other.
        numbers = first[crowded].cumsum(0) - 1
        few = replace(self, maps=(int(numbers[-1]) + 1 if len(numbers) else 0, 1))
        mask = torch.zeros(*few.maps, *self.size, dtype=torch.uint8, device=CPU)
        few.fill_(mask, Blocks(blocks.seeds[crowded] % positions + numbers * positions), 1)
        return alone * math.prod(self.block) + count_ones(mask)

    def fill_(self, x: Tensor, blocks: Blocks, value: int) -> None:
        """Write `value` into the blocks in `x` (B, C, ...): fresh and dense."""
        if not len(blocks.seeds):
            return
        steps = x.stride()[2:]
        room = x.numel() - sum((length - 1) * step for length, step in zip(self.block, steps, strict=True))
        # Seen from where a block may start: all of its cells.
        windows = x.as_strided((room, *self.block), (1, *steps))
        windows.index_fill_(0, blocks.starts(self.region, x.stride()), value)


class Blocks:
    """The seeds of a sparse draw, and where they lie in memory, which forward, count and backward mostly share."""

    def __init__(self, seeds: Tensor) -> None:
        self.seeds = seeds
        self._strides: Sequence[int] | None = None
        self._starts = seeds

    def starts(self, region: Sequence[int], strides: Sequence[int]) -> Tensor:
        """Where the blocks begin in an array of these strides."""
        if strides != self._strides:
            self._strides, self._starts = strides, _offsets(self.seeds, region, strides)
        return self._starts


def _offsets(flat: Tensor, sizes: Sequence[int], strides: Sequence[int]) -> Tensor:
    """Flat positions in an array of `sizes` → where they lie in memory with these `strides`."""
    dims: list[tuple[int, int]] = []
    for size, stride in zip(sizes, strides, strict=True):
        if dims and dims[-1][1] == size * stride:  # lies in memory as one dimension would
            dims[-1] = dims[-1][0] * size, stride
        else:
            dims.append((size, stride))
    offsets = flat * dims[-1][1]
    for (_, outer), (size, stride) in zip(dims[-2::-1], dims[:0:-1], strict=True):
        flat = torch.div(flat, size, rounding_mode="floor")
        offsets.add_(flat, alpha=outer - size * stride)
    return offsets


def count_ones(mask: Tensor) -> int:
    """Sum of contiguous bytes that are 0 or 1: eight at once, in rows that add up without a carry."""
    flat = mask.view(-1)
    if flat.numel() < _PART // 4:
        return int(flat.sum())
    whole = flat.numel() // (8 * _ROWS) * (8 * _ROWS)
    lanes = flat[:whole].view(torch.int64).view(_ROWS, -1).sum(0)
    return int(lanes.view(torch.uint8).sum()) + int(flat[whole:].sum())


def _words(count: int, generator: torch.Generator) -> Tensor:
    """Random words of 31 bits."""
    return torch.empty(count, dtype=torch.int32, device=CPU).random_(generator=generator)


def _limit(p: float) -> int:
    """The last of such words that count as drawn, at probability `p`."""
    return round(p * 2**31) - 1


def _bernoulli_(marks: Tensor, p: float, generator: torch.Generator) -> None:
    """Set each byte to 1 with probability `p`, else to 0.

    To draw takes longer than all else that is done with a mask, and a byte is a quarter of the usual float. By a
    random byte each is set with a probability of 256ths; a few more are drawn for what is left of `p`.
    """
    if len(marks) <= _FEW:  # not worth the operations
        torch.le(_words(len(marks), generator), _limit(p), out=marks.view(torch.bool))
        return
    if p >= 1:
        marks.fill_(1)
        return
    limit = int(p * 256)
    for part in torch.split(marks, _PART):
        words = torch.empty((len(part) + 7) // 8, dtype=torch.int64, device=CPU)
        drawn = words.random_(-(2**63), None, generator=generator).view(torch.uint8)
        torch.lt(drawn[: len(part)], limit, out=part.view(torch.bool))
    marks.index_fill_(0, _positions(len(marks), (256 * p - limit) / (256 - limit), generator), 1)


def _positions(end: int, p: float, generator: torch.Generator) -> Tensor:
    """Draw each of 0 … end - 1 with probability `p`, ascending; the gaps between them are geometric."""
    if p == 0:
        return torch.empty(0, dtype=torch.int64, device=CPU)
    rate = -math.log1p(-p)
    room = int(end * p + 6 * math.sqrt(end * p)) + 8  # seldom too small
    last, found = -1.0, []
    while last < end:
        # -log(1 - u) / rate is exponential, its floor geometric; float64, or small rates lose gaps.
        numbers = torch.rand(room, dtype=torch.float64, device=CPU, generator=generator)
        gaps = numbers.neg_().log1p_().mul_(-1 / rate)
        found.append(gaps.floor_().clamp_(max=end).add_(1).cumsum_(0).add_(last))
        last = found[-1][-1].item()
    positions = torch.cat(found)
    return positions[: int(torch.searchsorted(positions, end))].long()


@lru_cache(maxsize=64)
def _table(size: tuple[int, ...], block: tuple[int, ...]) -> Tensor:
    """Which cells the block at each position covers: (positions, cells) of 0 and 1."""
    table = torch.ones(1, 1, device=CPU)
    for length, k in zip(size, block, strict=True):
        begin, cell = torch.arange(length - k + 1, device=CPU)[:, None], torch.arange(length, device=CPU)
        table = torch.kron(table, ((cell >= begin) & (cell < begin + k)).float())
    return table


def _spread_(flat: Tensor, step: int, length: int) -> None:
    """Let each 1 mark the `length - 1` bytes after it, `step` apart, in as few doublings as it takes."""
    done = 1
    while done < length:
        more = min(done, length - done)
        flat[more * step :] |= flat[: -more * step].clone()
        done += more


def _draw(x: Tensor, block: Sequence[int], share_channels: bool, gamma: float, key: int) -> Draw:
    batch, channels, *size = x.shape
    return Draw((batch, 1 if share_channels else channels), tuple(size), tuple(block), gamma, key)


def _marks(x: Tensor, draw: Draw) -> Blocks | Tensor:
    """The draw as blocks or as a mask of bytes, whichever costs less on `x`; a mask smaller than `x` always does."""
    small = draw.whole or draw.maps[1] < x.shape[1]
    return draw.mask() if small or not draw.is_sparse() else Blocks(draw.seeds())


def _scaled(
    x: Tensor, draw: Draw, rescale: float | None, marks: Blocks | Tensor | None = None, in_place: bool = False
) -> Scaled:
    """Return the draw carried out on `x`, its scale (`rescale`, or by None cells / kept cells), and its marks."""
    if x.numel() == 0:
        return x.clone(), 1.0, None
    if _is_light(x, draw):
        factor, rescale = _factor(draw, rescale, x.dtype)
        return x * factor, rescale, None
    marks = _marks(x, draw) if marks is None else marks
    if rescale is None:
        cells = draw.cells if isinstance(marks, Blocks) else marks.numel()
        kept = cells - (draw.count(marks) if isinstance(marks, Blocks) else count_ones(marks))
        rescale = cells / kept if kept else 0.0
    if not isinstance(marks, Blocks) and x.dtype in _WIDE:
        return _masked(x, marks, rescale, in_place), rescale, marks
    y = x.mul_(rescale) if in_place else x * rescale
    if isinstance(marks, Blocks):
        draw.fill_(y, marks, 0)
    else:
        y *= marks ^ 1  # bytes: a bool mask takes three times as long
    return y, rescale, marks


def _masked(x: Tensor, marks: Tensor, rescale: float, in_place: bool) -> Tensor:
    """`x` times the scale where bytes are 0, in one go; the bytes are widened a quarter at a time."""
    if marks.numel() < x.numel():  # few, but too many to be kept as wide as `x` is
        return x * (marks ^ 1).to(x.dtype).mul_(rescale)
    y = x if in_place else torch.empty_like(x)
    for part, dropped, made in in_parts(x, marks, y, most=max(_PART, x.numel() // 4)):
        torch.mul(part, (dropped ^ 1).to(x.dtype).mul_(rescale), out=made)
    return y


def _is_light(x: Tensor, draw: Draw) -> bool:
    """Whether the mask, as wide as `x` is, takes no more than a byte for each element of `x`."""
    return x.dtype in _WIDE and draw.entries * x.itemsize <= x.numel()


def _factor(draw: Draw, rescale: float | None, dtype: torch.dtype) -> tuple[Tensor, float]:
    """The draw as what to multiply with, and the scale in it (by None cells / kept cells)."""
    kept = draw.kept(dtype)
    if rescale is None:
        # Float32 adds up this many ones exactly.
        left = float(kept.sum() if kept.numel() < 1 << 24 else kept.sum(dtype=torch.float64))
        rescale = kept.numel() / left if left else 0.0
    return kept.mul_(rescale), rescale


def in_parts(*tensors: Tensor, most: int = _PART) -> Iterator[tuple[Tensor, ...]]:
    """Go through tensors (B, ...) of one shape some samples at a time, or where all are contiguous some elements.

    What is made on the way then takes little memory, and lies in the cache.
    """
    if all(each.is_contiguous() for each in tensors):
        yield from zip(*(torch.split(each.view(-1), most) for each in tensors), strict=True)
    else:
        yield from by_samples(*tensors, most=most)


def by_samples(*tensors: Tensor, most: int = _PART) -> Iterator[tuple[Tensor, ...]]:
    """Go through tensors (B, ...) of one shape, not empty, some samples at a time: at most so many elements."""
    rows = max(1, most * tensors[0].shape[0] // tensors[0].numel())
    yield from zip(*(torch.split(each, rows) for each in tensors), strict=True)


def fresh_key() -> Tensor:
    """Draw a key from torch's global generator."""
    # By an operator of torch's own, which compilers know to be random: no two of its calls are merged into one.
    return torch.randint(1 << 53, (), device=CPU)  # what a float64 holds


@torch.library.custom_op("dropsurgery::drop_blocks", mutates_args=())
def drop_blocks(
    x: Tensor,
    p: Tensor,
    key: Tensor,
    block: Sequence[int],
    share_channels: bool,
    exact: bool,
    counted: bool,
    scaled: bool,
) -> tuple[Tensor, Tensor]:
    """Drop blocks of `x` (B, C, ...) on the CPU; see `dropblock.drop_block` for the arguments.

    If `scaled`, rescale by what was kept (`counted`) or by 1 / (1 - p). Return the result, and what repeats
    the draw: float64 (key, gamma, scale).
    """
    draw, rescale = _planned(x, p, key, block, share_channels, exact, counted, scaled)
    y, scale, _ = _scaled(x, draw, rescale)
    return y, torch.tensor([float(key), draw.gamma, scale], dtype=torch.float64, device=CPU)


def _planned(
    x: Tensor,
    p: Tensor,
    key: Tensor,
    block: Sequence[int],
    share_channels: bool,
    exact: bool,
    counted: bool,
    scaled: bool,
) -> tuple[Draw, float | None]:
    """What to draw, and the scale where it is known before."""
    rate = float(p)
    gamma = _gamma(rate, x.shape[2:], tuple(block), exact) if x.numel() else 0.0
    rescale = None if counted else 1 / (1 - rate) if rate < 1 else 0.0
    return _draw(x, block, share_channels, gamma, int(key)), rescale if scaled else 1.0


_gamma = lru_cache(maxsize=1024)(seed_probability)


@torch.library.custom_op("dropsurgery::repeat_drop_blocks", mutates_args=())
def repeat_drop_blocks(x: Tensor, record: Tensor, block: Sequence[int], share_channels: bool) -> Tensor:
    """Carry out once more, on `x` of the same shape, the draw that left this `record`."""
    key, gamma, scale = record.tolist()
    return _scaled(x, _draw(x, block, share_channels, gamma, int(key)), scale)[0]


class _Eager(torch.autograd.Function):
    """What the operators do, without their cost a call, and with the seeds kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, draw: Draw, rescale: float | None, marks: Blocks | Tensor | None, in_place: bool
    ) -> Tensor:
        y, scale, marks_now = _scaled(x, draw, rescale, marks, in_place)
        if y is x:
            ctx.mark_dirty(x)
        ctx.draw, ctx.scale = draw, scale
        ctx.sparse = isinstance(marks_now, Blocks)
        if marks_now is not None:
            ctx.save_for_backward(marks_now.seeds if isinstance(marks_now, Blocks) else marks_now)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # asked for once only: activation checkpoints demand it
        marks = (Blocks(*saved) if ctx.sparse else saved[0]) if saved else None
        if not torch.is_grad_enabled():
            return _scaled(grad, ctx.draw, ctx.scale, marks)[0], None, None, None, None
        return _Eager.apply(grad, ctx.draw, ctx.scale, marks, False), None, None, None, None


def run(
    x: Tensor,
    p: Tensor,
    key: Tensor | None,
    block: Sequence[int],
    share_channels: bool,
    exact: bool,
    counted: bool,
    scaled: bool = True,
    in_place: bool = False,
) -> Tensor:
    """Drop blocks of `x` on the CPU: by the operator where something traces, else directly; on `in_place`, in `x`."""
    key = fresh_key() if key is None else key
    if is_traced(x):
        y: Tensor = drop_blocks(x, p, key, block, share_channels, exact, counted, scaled)[0]
        return y
    draw, rescale = _planned(x, p, key, block, share_channels, exact, counted, scaled)
    if x.numel() and _is_light(x, draw):
        return x * _factor(draw, rescale, x.dtype)[0]
    direct: Tensor = _Eager.apply(x, draw, rescale, None, in_place)
    return direct


@drop_blocks.register_fake
def _(
    x: Tensor,
    p: Tensor,
    key: Tensor,
    block: Sequence[int],
    share_channels: bool,
    exact: bool,
    counted: bool,
    scaled: bool,
) -> tuple[Tensor, Tensor]:
    return x * 1.0, torch.empty(3, dtype=torch.float64, device=CPU)


@repeat_drop_blocks.register_fake
def _(x: Tensor, record: Tensor, block: Sequence[int], share_channels: bool) -> Tensor:
    return x * 1.0


# Both are one linear map of x, which is its own adjoint: backward, and its backward, repeat the draw.
def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])
    ctx.block, ctx.share_channels = inputs[3], inputs[4]


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    (record,) = ctx.saved_tensors
    return repeat_drop_blocks(grad, record, ctx.block, ctx.share_channels), *[None] * 7


def _save_repeat(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.block, ctx.share_channels = inputs[2], inputs[3]


def _backward_repeat(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (record,) = ctx.saved_tensors
    return repeat_drop_blocks(grad, record, ctx.block, ctx.share_channels), *[None] * 3


drop_blocks.register_autograd(_backward, setup_context=_save)
repeat_drop_blocks.register_autograd(_backward_repeat, setup_context=_save_repeat)
