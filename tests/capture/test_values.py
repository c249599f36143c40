"""The rules for common layers and functions give the shapes and layouts that torch itself gives on real tensors."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dropsurgery.capture.values import Values


def laid_out(shape: tuple[int, ...]) -> list[Tensor]:
    """Tensors of one rank: contiguous, transposed, strided, and of maps two with channels last, one cut from tokens."""
    base = torch.randn(shape)
    channels_last = []
    if len(shape) == 4:
        tokens = torch.randn(shape[0], 1 + shape[2] * shape[3], shape[1])  # the first is no pixel
        pixels = tokens[:, 1:].transpose(1, 2).unflatten(2, shape[2:])
        channels_last = [base.to(memory_format=torch.channels_last), pixels]
    return [base, *channels_last, base.transpose(-1, -2), base[..., ::2]]


TENSORS = [x for shape in ((2, 3, 6, 8), (2, 1, 4, 4), (2, 6, 8), (2, 3, 4, 6, 4)) for x in laid_out(shape)]


def fake(values: Values, x: Tensor) -> Tensor:
    return values._copy(x, x.device)


def picture(tree: Any) -> Any:
    """Shapes and dtypes, and whether a tensor lies as its shape says or with its channels last."""
    if isinstance(tree, (tuple, list)):
        return [picture(item) for item in tree]
    if not isinstance(tree, Tensor):
        return tree
    last = tree.ndim == 4 and tree.is_contiguous(memory_format=torch.channels_last)
    return tuple(tree.shape), tree.dtype, tree.device, tree.is_contiguous(), last


def outcome(function: Callable[[], Any]) -> Any:
    try:
        return picture(function())
    except Exception:  # what torch refuses must be refused here too, whatever the words
        return "refused"


def same_as_torch(x: Tensor, real: Callable[[Tensor], Any], of_fake: Callable[[Values, Tensor], Any]) -> None:
    values = Values()
    expected = outcome(lambda: real(x))
    assert outcome(lambda: of_fake(values, fake(values, x))) == expected
    assert outcome(lambda: of_fake(values, fake(values, x))) == expected, "the second time, when it is remembered"


@pytest.mark.parametrize("mode", ["nearest", "linear", "bilinear", "bicubic", "trilinear", "area", "nearest-exact"])
@pytest.mark.parametrize(
    "how",
    [
        {"size": 5},
        {"size": (5, 3)},
        {"scale_factor": 2},
        {"scale_factor": 0.5},
        {"scale_factor": 1.7},
        {"scale_factor": (1.5, 2.0)},
        {"size": 5, "antialias": True},
        {"scale_factor": 1.7, "recompute_scale_factor": True},
        {"size": 5, "scale_factor": 2},
        {},
    ],
    ids=str,
)
def test_maps_of_another_size(mode: str, how: dict[str, Any]) -> None:
    for x in TENSORS:
        same_as_torch(
            x,
            lambda x: F.interpolate(x, mode=mode, **how),
            lambda values, x: values.of_function(F.interpolate, (x,), {"mode": mode, **how}),
        )


LAYERS = [
    *(nn.LayerNorm(length, elementwise_affine=False) for length in (8, 6, 4, 5)),
    nn.AdaptiveAvgPool2d(1), nn.AdaptiveAvgPool2d((3, None)), nn.AvgPool2d(2), nn.AvgPool2d(3, 2, 1, True, False),
    nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1, 1, ceil_mode=True), nn.MaxPool2d(2, return_indices=True),
    nn.Flatten(), nn.Flatten(2), nn.Flatten(0, 1), nn.Identity(), nn.ReLU(), nn.BatchNorm2d(3).eval(),
    nn.Conv2d(3, 5, 3, 2, 1), nn.Conv2d(3, 3, 3, groups=3), nn.Conv2d(3, 5, 1).to(memory_format=torch.channels_last),
    nn.Conv2d(3, 3, 3, groups=3).to(memory_format=torch.channels_last),
    nn.Conv1d(6, 4, 3), nn.Linear(8, 5), nn.Linear(4, 5),
]  # fmt: skip


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: f"{layer}{[w.stride() for w in layer.parameters()]}")
def test_layers(layer: nn.Module) -> None:
    with torch.no_grad():
        for x in TENSORS:
            if isinstance(layer, nn.BatchNorm2d) and not x.is_contiguous():
                continue  # run on torch's fake tensors, which do not tell the layout of torch's kernels there
            same_as_torch(x, layer, lambda values, x: values.of_leaf(layer, layer.forward, (x,), {}))


@pytest.mark.parametrize("x", TENSORS, ids=lambda x: f"{tuple(x.shape)}{x.stride()}")
def test_functions(x: Tensor) -> None:
    calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
        *((F.layer_norm, ((length,),), {}) for length in (8, 6, 4, 5)),
        *((torch.cat, (axis,), {}) for axis in (0, 1, -1)),
        (torch.stack, (), {"dim": 1}),
    ]
    for function, options, named in calls:

        def call(x: Tensor, function: Any = function, options: Any = options, named: Any = named) -> Any:
            return function(x if function is F.layer_norm else [x, x], *options, **named)

        def of_fake(values: Values, x: Tensor, function: Any = function, o: Any = options, n: Any = named) -> Any:
            return values.of_function(function, (x if function is F.layer_norm else [x, x], *o), n)

        same_as_torch(x, call, of_fake)
    mixed = [x, x.contiguous()]
    values = Values()
    faked = [fake(values, each) for each in mixed]
    assert picture(values.of_function(torch.cat, (faked, 1), {})) == picture(torch.cat(mixed, 1))


def operands(shape: tuple[int, ...]) -> list[Tensor]:
    """Tensors of one shape: laid out along each order of axes, cut from larger ones, and expanded."""
    orders = [torch.randn([shape[axis] for axis in order]) for order in itertools.permutations(range(len(shape)))]
    laid = [
        x.permute([order.index(axis) for axis in range(len(shape))])
        for x, order in zip(orders, itertools.permutations(range(len(shape))), strict=True)
    ]
    larger = torch.randn([extent + 1 for extent in shape])
    cut = [x[tuple(slice(extent) for extent in shape)] for x in (larger, larger.transpose(0, -1))]
    fitting = [x for x in cut if x.shape == shape]
    return [*laid, *fitting, torch.randn(1, *shape[1:]).expand(shape), torch.randn(shape[:-1]).unsqueeze(-1)]


def layout(x: Tensor) -> Any:
    """Shape, and the strides that matter: along a single element there is no way to go."""
    return x.shape, [stride for extent, stride in zip(x.shape, x.stride(), strict=True) if extent > 1]


@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 3, 2), (2, 1, 3), (1, 3, 1), (2, 3, 4, 5)], ids=str)
def test_elementwise_functions_of_two_lay_their_result_out_as_torch_does(shape: tuple[int, ...]) -> None:
    functions = (operator.add, torch.mul, operator.sub, operator.truediv)
    for left, right in itertools.product(operands(shape), repeat=2):
        values = Values()
        got = values.of_function(operator.add, (fake(values, left), fake(values, right)), {})
        assert layout(got) == layout(left + right), (left.stride(), right.stride())
    for x, function, swapped in itertools.product(operands(shape), functions, (False, True)):
        values = Values()
        args = (2.0, x) if swapped and function is not torch.mul else (x, 2.0)
        got = values.of_function(function, tuple(fake(values, a) if a is x else a for a in args), {})
        assert layout(got) == layout(function(*args)), (function, x.stride())


def test_numbers() -> None:
    values = Values()
    functions = (operator.floordiv, operator.mod, operator.truediv, operator.eq, operator.pow, operator.sub)
    for function, (a, b) in itertools.product(functions, [(7, 2), (7.0, 2), (True, 3), (-7, 2), (1, 0)]):
        expected = outcome(lambda function=function, a=a, b=b: function(a, b))
        got = outcome(lambda function=function, a=a, b=b: values.of_function(function, (a, b), {}))
        assert got == expected and type(got) is type(expected)
