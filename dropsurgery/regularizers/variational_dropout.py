"""Variational dropout of recurrent layers (Gal, Ghahramani, NeurIPS 2016, arXiv:1512.05287): one mask for all steps.

    gates_t = W_ih (x_t * m_x) + b_ih + W_hh (h_{t-1} * m_h) + b_hh      y_t = h_t * m_o, for the last layer alone
    m ~ Bernoulli(1 - p) / (1 - p) with `p_input`, `p_hidden` and `p_output`, drawn anew in each forward

Each layer and direction has its own m_x (B, inputs) and m_h (B, outputs), which hold for all steps of a sequence; m_o
is (B, directions * outputs). What a step carries over besides its products stays whole: an LSTM's c_{t-1}, a GRU's
z * h_{t-1}, and h_t as the layers above get it. A GRU is torch's: r multiplies what W_hh gives to n.

`tied`: one mask for all gates. With `tied: false` each gate has its own, (gates, B, inputs) and (gates, B, outputs), as
in the authors' code for the large language model (yaringal/BayesianRNN), whose rates 0.5, 0.3 and 0.5 are the defaults.
`mask: sample` draws for each sequence, and goes step by step in Python. `mask: batch` draws one for all sequences: to
mask an input of all of them is to mask columns of the weights, so that torch's fused kernel can run. Rows of words are
dropped by `embedding_dropout`. `nn.LSTM(dropout=…)`, which draws at each step anew, goes on as it is.

`mask_group` is how many rows of the batch, one after another, share their masks. Nets that fold an axis of the image
into the batch, as Sequencer does with rows and columns, have one mask an image by `mask_group: image`. How many rows an
image has is read off the example that the recipe was applied with, and holds for sequences as long as there.
"""

from __future__ import annotations

from math import prod
from typing import Annotated, Any, Literal, NamedTuple

import torch
from annotated_types import Ge
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from dropsurgery.errors import SurgeryError
from dropsurgery.regularizers._base import Rate, Regularizer, check_count, check_rate, require
from dropsurgery.regularizers._hosts import filled, run_with
from dropsurgery.regularizers._recurrent import GATES, Noise, compiled_as_recurrent, recur, require_recurrent, scaled
from dropsurgery.regularizers._taxonomy import Taxonomy
from dropsurgery.regularizers._uniform import scale_of, uniform

Mask = Literal["sample", "batch"]
Group = Annotated[int, Ge(1)] | Literal["image"]


class Factors(NamedTuple):
    """What a recurrent layer's values are multiplied by: one `Noise` for each layer and direction, and the output's."""

    parts: list[Noise]
    output: Tensor | None


def variational_dropout(
    layer: nn.RNNBase,
    input: Any,
    hx: Any = None,
    p_input: float | Tensor = 0.5,
    p_hidden: float | Tensor = 0.3,
    p_output: float | Tensor = 0.5,
    *,
    tied: bool = True,
    mask: Mask = "sample",
    group: int = 1,
    numbers: Tensor | None = None,
    key: Tensor | None = None,
) -> Any:
    """Return what an `nn.LSTM`, `nn.GRU` or `nn.RNN` gives for `input` and `hx` with masks that all steps share.

    Args:
        layer: the layer, with any options; its weights are used as they are.
        input: a tensor with or without batch, or a PackedSequence.
        hx: the initial states as the layer takes them.
        p_input: the probability to drop an element of what each layer takes; a number 0 draws nothing.
        p_hidden: of the state that each step takes.
        p_output: of what the last layer gives.
        tied: whether the gates share their masks.
        mask: "sample" for masks of each sequence's own, "batch" for one that all share.
        group: how many sequences of the batch, one after another, share the masks of `mask="sample"`.
        numbers: uniform numbers in [0, 1) to draw by, flat, as many as `draws` says; none draws them here.
        key: a 0-dim int64 CPU tensor that the numbers depend on; None for torch's global generator.

    A SurgeryError where a rate is a number out of [0, 1], or `group` does not divide the batch.
    """
    rates = tuple(p if isinstance(p, Tensor) else check_rate("p", p) for p in (p_input, p_hidden, p_output))
    like, batch = _data(input), _batch(layer, input)
    rows = 1 if mask == "batch" else _groups(batch, group)
    factors = factors_of(layer, rows, rates, like, tied=tied, numbers=numbers, key=key)
    if mask == "batch":
        y, last = fused(layer, input, hx, factors.parts)
    else:
        order = input.sorted_indices if isinstance(input, PackedSequence) else None
        factors = _by_row(factors, group, order)
        y, last = recur(layer, input, hx, lambda part: factors.parts[part.index])
    return (y if factors.output is None else scaled(y, factors.output, layer.batch_first)), last


# ---- masks ----


def draws(layer: nn.RNNBase, rows: int, drawn: tuple[bool, ...] = (True, True, True), *, tied: bool = True) -> int:
    """How many uniform numbers `factors_of` draws by; `drawn` says of input, hidden and output whether it is masked."""
    return sum(prod(shape) for shape, _ in _shapes(layer, rows, drawn, tied))


def factors_of(
    layer: nn.RNNBase,
    rows: int,
    rates: tuple[float | Tensor, ...],
    like: Tensor,
    *,
    tied: bool = True,
    numbers: Tensor | None = None,
    key: Tensor | None = None,
) -> Factors:
    """Return the factors of `rows` sequences, 0 or 1 / (1 - p), in the dtype of `like`.

    An element is dropped where its number is below p. The numbers lie in the order of layers and directions as in hx,
    the input's before the state's, the gates' one after another, and the output's at the end.
    """
    drawn = tuple(isinstance(p, Tensor) or p > 0 for p in rates)
    shapes = _shapes(layer, rows, drawn, tied)
    sizes = [prod(shape) for shape, _ in shapes]
    if numbers is None:
        numbers = uniform([sum(sizes)], like.device, key)
    tensors = [torch.as_tensor(p, dtype=torch.float32, device=like.device) for p in rates]
    scales = [scale_of(p) for p in tensors]
    made = iter(
        torch.where(piece.view(shape) >= tensors[which], scales[which], 0.0).to(like.dtype)
        for piece, (shape, which) in zip(torch.split(numbers, sizes), shapes, strict=True)
    )
    inputs, hidden, output = drawn
    count = len(layer.all_weights)
    parts = [Noise(next(made) if inputs else None, next(made) if hidden else None) for _ in range(count)]
    return Factors(parts, next(made) if output else None)


def _shapes(layer: nn.RNNBase, rows: int, drawn: tuple[bool, ...], tied: bool) -> list[tuple[tuple[int, ...], int]]:
    """The shape of each mask, and which rate it has."""
    directions = 2 if layer.bidirectional else 1
    width = layer.proj_size or layer.hidden_size
    gates = () if tied or GATES[layer.mode] == 1 else (GATES[layer.mode],)
    shapes = []
    for index in range(layer.num_layers * directions):
        inputs = layer.input_size if index < directions else directions * width
        shapes += [((*gates, rows, inputs), 0), ((*gates, rows, width), 1)]
    shapes.append(((rows, directions * width), 2))
    return [(shape, which) for shape, which in shapes if drawn[which]]


def _by_row(factors: Factors, group: int, order: Tensor | None) -> Factors:
    """The factors of groups, for the rows of a batch in the order in which they are packed."""

    def of_rows(factor: Tensor | None) -> Tensor | None:
        if factor is None:
            return None
        factor = factor if group == 1 else factor.repeat_interleave(group, -2)
        return factor if order is None else factor.index_select(-2, order)

    parts = [Noise(of_rows(part.inputs), of_rows(part.hidden)) for part in factors.parts]
    return Factors(parts, of_rows(factors.output))


def _data(input: Any) -> Tensor:
    data: Tensor = input.data if isinstance(input, PackedSequence) else input
    return data


def _batch(layer: nn.RNNBase, input: Any) -> int:
    if isinstance(input, PackedSequence):
        return int(input.batch_sizes[0])  # on the CPU wherever the data are
    if input.dim() != 3:
        return 1
    return int(input.shape[0 if layer.batch_first else 1])


def _groups(batch: int, group: int) -> int:
    require(
        batch % group == 0, "batch of variational_dropout", f"whole groups of {group} rows that share a mask", batch
    )
    return batch // group


# ---- the fused kernel ----


def fused(layer: nn.RNNBase, input: Any, hx: Any, parts: list[Noise]) -> Any:
    """Return what the layer's own forward gives, with factors of a single row, for all sequences, on its weights."""
    layer._update_flat_weights()  # or forward does it, and puts the unmasked weights back
    weights: list[Any] = []
    for part, names in zip(parts, layer._all_weights, strict=True):
        factors = {"weight_ih": part.inputs, "weight_hh": part.hidden}
        weights += [_masked(getattr(layer, name), factors.get(name[:9])) for name in names]
    return run_with(layer, "_flat_weights", weights, input, hx)


def _masked(weight: Tensor, factor: Tensor | None) -> Tensor:
    """A weight (gates * cells, width) with columns masked, by gate where the factor is."""
    if factor is None:
        return weight
    if factor.dim() == 2:
        return weight * factor
    return (weight.view(len(factor), -1, weight.shape[1]) * factor).view(weight.shape)


# ---- the layer ----


class VariationalDropout(Regularizer):
    """`variational_dropout` in place of a recurrent layer's forward; in eval that forward itself."""

    kind = "swap"
    paper = "Gal, Ghahramani: Dropout in Recurrent Neural Networks, NeurIPS 2016, arXiv:1512.05287"
    summary = "drops inputs, states and outputs of an LSTM, GRU or RNN, the same ones at all time steps"
    placement = "in recurrent layers: variational_dropout_lstm; in Sequencer, by image: variational_dropout_sequencer"
    shapes = "what the layer takes: sequences of either layout, with or without batch, packed ones"
    needs = "an nn.LSTM, nn.GRU or nn.RNN"
    taxonomy = Taxonomy(transforms=("data", "architecture"), space="hidden")
    examples = (
        {"p_input": 0.5, "p_hidden": 0.3, "p_output": 0.5},
        {"p_input": 0.3, "p_hidden": 0.2, "p_output": 0.0, "tied": False},
        {"p_input": 0.3, "p_hidden": 0.5, "p_output": 0.2, "mask": "batch"},
    )
    drops = "other"
    uncounted = "inputs and states are dropped in the middle of the layer"

    p_input: Tensor
    p_hidden: Tensor
    p_output: Tensor

    def __init__(
        self,
        p_input: Rate = 0.5,
        p_hidden: Rate = 0.3,
        p_output: Rate = 0.5,
        tied: bool = True,
        mask: Mask = "sample",
        mask_group: Group = 1,
    ) -> None:
        super().__init__(p_input=p_input, p_hidden=p_hidden, p_output=p_output)
        require(isinstance(tied, bool), "tied", "true or false", tied)
        require(mask in ("sample", "batch"), "mask", "'sample' or 'batch'", mask)
        if mask_group != "image":
            check_count("mask_group", mask_group, 1)
        require(mask == "sample" or mask_group == 1, "mask_group", "1, since `mask: batch` has one mask", mask_group)
        self.tied = tied
        self.mask: Mask = mask
        self.mask_group = mask_group
        self._example: tuple[int, ...] | None = None
        # Flags of their own, as `_nonzero` is: what is not dropped need not be drawn.
        self._drawn = {name: value > 0 for name, value in self._rates.items()}

    @property
    def p(self) -> Tensor:
        """The largest of its rates, as the plan has it."""
        return torch.maximum(torch.maximum(self.p_input, self.p_hidden), self.p_output)

    @staticmethod
    def example_host() -> nn.Module:
        """Return a small layer for tests."""
        return filled(nn.GRU(5, 4, num_layers=2, bidirectional=True, batch_first=True))

    @staticmethod
    def example_inputs(batch: int) -> tuple[Tensor, ...]:
        """Return an input for that layer: `batch` sequences."""
        return (torch.randn(batch, 6, 5),)

    def set_rate(self, name: str, value: float) -> None:
        """Set the rate `name`, and note whether there is anything to draw for it."""
        super().set_rate(name, value)
        self._drawn = {name: value > 0 for name, value in self._rates.items()}

    def build(self, *, channel_axis: int | None, channels: int | None, shape: tuple[int, ...], site_id: str) -> None:
        """Take the facts of the site: for `mask_group: image`, the shape that the layer was called with."""
        super().build(channel_axis=channel_axis, channels=channels, shape=shape, site_id=site_id)
        self._example = shape

    def bind(self, host: nn.Module) -> None:
        """Stand in for an LSTM, GRU or RNN; a SurgeryError where it is none, or an image's rows cannot be told."""
        require_recurrent("variational_dropout", self.site_id, host)
        super().bind(host)
        if self.mask_group == "image":
            self._rows_of_an_image()

    @compiled_as_recurrent
    def forward(self, input: Any, hx: Any = None) -> Any:
        """Return what the layer gives with masks in it; its own forward's result when not active."""
        if not self.active:
            return self.own(input, hx)
        host: nn.RNNBase = self.bound()  # type: ignore[assignment]
        return variational_dropout(
            host,
            input,
            hx,
            *(self.get_buffer(name) if drawn else 0.0 for name, drawn in self._drawn.items()),
            tied=self.tied,
            mask=self.mask,
            group=self._group(input),
            key=self.next_key(),
        )

    def _group(self, input: Any) -> int:
        """How many rows share their masks in this batch."""
        if isinstance(self.mask_group, int):
            return self.mask_group
        rows, steps = self._rows_of_an_image()
        if rows == 1:
            return 1
        got = tuple(_data(input).shape)
        known = not isinstance(input, PackedSequence) and len(got) == 3
        if not known or got[self._axes()[1]] != steps or got[self._axes()[0]] % rows:
            raise SurgeryError(
                f"variational_dropout at {self.site_id}: expected {rows} sequences of {steps} steps an image, as in "
                f"the example that the recipe was applied with, got {list(got)}; apply it with `example_inputs` of "
                "the size that is trained on, or leave `mask_group` at 1"
            )
        return rows

    def _axes(self) -> tuple[int, int]:
        """The axes of the batch and of the steps."""
        return (0, 1) if self.bound().batch_first else (1, 0)

    def _rows_of_an_image(self) -> tuple[int, int]:
        """How many rows of the layer's batch an image had in the example, and how many steps."""
        shape, (batch_axis, step_axis) = self._example, self._axes()
        if shape is None or len(shape) != 3 or not self.images or shape[batch_axis] % self.images:
            raise SurgeryError(
                f"variational_dropout at {self.site_id or 'a layer'}: `mask_group: image` expected a layer whose batch "
                f"is a multiple of the model's, got {list(shape or ())} for {self.images or 'unknown'} images; say how "
                "many rows share a mask (`mask_group: 16`), or leave `mask_group` at 1"
            )
        return shape[batch_axis] // self.images, shape[step_axis]

    def expected_drop(self, shape: tuple[int, ...]) -> float:
        """Return p_input, the share of the first layer's input."""
        return self._rates["p_input"]

    def extra_repr(self) -> str:
        """Return the rates, whether gates share masks, and who else does."""
        group = "" if self.mask_group == 1 else f", mask_group={self.mask_group!r}"
        return f"{super().extra_repr()}, tied={self.tied}, mask={self.mask!r}{group}"
