"""Write a compressed model to a file: as itself, as its weights, by torch.export, or as ONNX."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import nn

from dropsurgery.capture import Inputs
from dropsurgery.errors import SurgeryError

ENDINGS = {
    ".pt": "the model itself, for torch.load",
    ".pth": "its state_dict",
    ".pt2": "a program of torch.export",
    ".onnx": "ONNX",
}
_PART = 2**30  # bytes of weights from which ONNX keeps them in a file of their own


def export(model: nn.Module, path: Path, inputs: Inputs) -> None:
    """Write a model to a file, of which the ending says how; programs are of its eval mode and the example's shapes.

    Raises:
        SurgeryError: no such ending, a library that is not installed, or the exporter refuses the model.
    """
    require_ending(path)
    modes = {module: module.training for module in model.modules()}
    try:
        if path.suffix == ".pt":
            torch.save(model, path)
        elif path.suffix == ".pth":
            torch.save(model.state_dict(), path)
        else:
            _program(model.eval(), path, inputs)
    except Exception as error:
        what = ENDINGS[path.suffix]
        raise SurgeryError(f"{path}: cannot be written as {what}: {type(error).__name__}: {error}") from error
    finally:
        for module, mode in modes.items():
            module.training = mode


def require_ending(path: Path) -> None:
    """Raise SurgeryError unless a model can be written to a file of that name here."""
    if path.suffix not in ENDINGS:
        known = ", ".join(f"{ending} ({what})" for ending, what in ENDINGS.items())
        raise SurgeryError(f"{path}: expected one of the endings {known}")
    if path.suffix == ".onnx":
        _require_onnx()


def _program(model: nn.Module, path: Path, inputs: Inputs) -> None:
    args, kwargs = inputs
    with torch.no_grad():
        if path.suffix == ".pt2":
            torch.export.save(torch.export.export(model, args, kwargs), path)
            return
        beside = sum(p.numel() * p.element_size() for p in model.parameters()) > _PART
        torch.onnx.export(model, args, path, kwargs=kwargs, dynamo=True, external_data=beside, verbose=False)


def _require_onnx() -> None:
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise SurgeryError(
            f"ONNX: expected onnx and onnxscript, of which {' and '.join(missing)} is not installed: "
            "pip install 'dropsurgery[onnx]'"
        )
