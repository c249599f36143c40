"""Compare the compressed model with the masked one: nothing is handed back that does not compute the same."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dropsurgery.capture import Inputs
from dropsurgery.capture.levels import map_tree
from dropsurgery.errors import SurgeryError
from dropsurgery.regularizers._base import Regularizer
from dropsurgery.regularizers.structural_dropout import StructuralDropout

Attempt = Callable[[bool], nn.Module]
_TOLERANCE = 1e-5
_EXACT = 1e-9
"""In float64, which decides where rounding is larger than the tolerance."""


def agreeing(gm: nn.Module, attempts: Iterable[Attempt], widths: Mapping[str, int], inputs: Inputs) -> nn.Module:
    """The first of some narrow models that computes what the masked one does, in eval mode, on the example.

    Where more than that differs in the model's own dtype, both in float64 decide: it may be rounding alone.

    Args:
        gm: the model to be compressed.
        attempts: each makes a narrow model; in float64 if it is given True.
        widths: how many units each site keeps.
        inputs: the example.

    Raises:
        SurgeryError: there is none; says what is wrong with the first.
    """
    dtype = dtype_of(gm)
    values = numbers(inputs, gm)
    expected = _masked_outputs(gm, widths, values)
    problem = ""
    for attempt in attempts:
        try:
            model = attempt(False)
            difference = _difference(expected, _outputs(model, values))
            doubtful = _TOLERANCE < difference < math.inf and dtype != torch.float64
            if doubtful and _exact_difference(gm, attempt(True), widths, values) <= _EXACT:
                return model
        except SurgeryError:
            raise
        except Exception as error:
            problem = problem or (
                f"does not run on the example ({type(error).__name__}: {error}): its forward goes by sizes that it "
                "keeps elsewhere than in its layers"
            )
            continue
        if difference <= _TOLERANCE:
            return model
        problem = problem or (
            f"differs from the masked one by {difference:.2g} of the largest output, where {_TOLERANCE:g} was "
            "expected: its forward does other than its graph says, or mixes channels in a way that no rule knows"
        )
    raise SurgeryError(
        f"compress: the narrow model {problem}. Nothing was changed; leave sites out of `widths` to find which it is"
    )


def _exact_difference(gm: nn.Module, model: nn.Module, widths: Mapping[str, int], values: Inputs) -> float:
    """The difference of a narrow model in float64 and a copy of the masked one in it."""
    wide = copy.deepcopy(gm).double()
    values = map_tree(values, lambda item: item.double() if _is_float(item) else item)
    return _difference(_masked_outputs(wide, widths, values), _outputs(model, values))


def _masked_outputs(gm: nn.Module, widths: Mapping[str, int], values: Inputs) -> list[Tensor]:
    with _masked(gm, widths):
        expected = _outputs(gm, values)
    if not all(bool(torch.isfinite(each).all()) for each in expected if _is_float(each)):
        raise SurgeryError(
            "compress: the masked model gives numbers that are not finite on the example, so that nothing can be "
            "compared: give example_inputs with numbers that it is made for"
        )
    return expected


def _difference(expected: list[Tensor], got: list[Tensor]) -> float:
    """The largest difference of any output, as a share of that output's largest number."""
    if [each.shape for each in expected] != [each.shape for each in got]:
        return math.inf
    return max((_relative(one, two) for one, two in zip(expected, got, strict=True)), default=0.0)


def _relative(expected: Tensor, got: Tensor) -> float:
    wide = torch.complex128 if expected.is_complex() else torch.float64
    one, two = expected.to(wide), got.to(wide)
    largest = float(one.abs().max()) if one.numel() else 0.0
    difference = float((one - two).abs().max()) if one.numel() else 0.0
    return difference / largest if largest else difference


@contextmanager
def _masked(gm: nn.Module, widths: Mapping[str, int]) -> Iterator[None]:
    """Every site of structural dropout at its width, and all other regularizers out of the way."""
    surgery: Any = gm.surgery
    full = {site: each.full_width for site, each in _structural(surgery).items()}
    with ExitStack() as stack:
        stack.enter_context(surgery.width({**full, **widths}))
        for site, each in surgery.regularizers.items():
            if isinstance(each, Regularizer) and site not in full:
                handle = each.register_forward_hook(_undone)
                stack.callback(handle.remove)
        yield


def _structural(surgery: Any) -> dict[str, StructuralDropout]:
    return {site: each for site, each in surgery.regularizers.items() if isinstance(each, StructuralDropout)}


def _undone(regularizer: Any, args: tuple[Any, ...], result: Any) -> Any:
    """What stands in a stripped model in a regularizer's place."""
    if regularizer.kind == "swap":
        return regularizer.own(*args)
    return sum(args[1:], args[0]) if regularizer.kind == "combine" else args[0]


def _outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """The tensors that a model gives in eval mode, without gradients; its modes are as before afterwards."""
    modes = {module: module.training for module in model.modules()}
    devices = list({tensor.device for tensor in model.parameters() if tensor.is_cuda})
    found: list[Tensor] = []
    try:
        model.eval()
        with torch.no_grad(), torch.random.fork_rng(devices), torch.backends.cudnn.flags(allow_tf32=False):
            torch.manual_seed(0)
            args, kwargs = map_tree(inputs, lambda item: item.clone() if isinstance(item, Tensor) else item)
            given = model(*args, **kwargs)
            map_tree(given, lambda item: found.append(item) if isinstance(item, Tensor) else None)
    finally:
        for module, mode in modes.items():
            module.training = mode
    return found


def numbers(inputs: Inputs, model: nn.Module) -> Inputs:
    """Example arguments with numbers in them: the user's own where they are any, else noise of the same shape."""
    device, dtype = device_of(model), dtype_of(model)
    generator = torch.Generator().manual_seed(0)

    def made(item: Any) -> Any:
        if not isinstance(item, Tensor):
            return item
        if not _is_float(item):
            fake = type(item) is not Tensor or item.is_meta
            return torch.zeros(item.shape, dtype=item.dtype, device=device) if fake else item.to(device)
        if type(item) is Tensor and not item.is_meta and bool(torch.isfinite(item).all()) and bool(item.std() > 0):
            return item.to(device, dtype)
        return torch.randn(item.shape, generator=generator).to(device, dtype)

    made_inputs: Inputs = map_tree(inputs, made)
    return made_inputs


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype that a model computes in: that of its first weight."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def device_of(model: nn.Module) -> torch.device:
    """Where a model is: where its first weight is."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _is_float(item: Any) -> bool:
    return isinstance(item, Tensor) and item.is_floating_point()
