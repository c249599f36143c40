"""Models by name, as recipes (`tested_on`) and the command line give them.

resnet50                    a name in timm.list_models()
smp:Unet:resnet34           segmentation-models-pytorch: architecture and encoder
package.module:factory      anything else, on the command line only
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import torch
from torch import nn

from dropsurgery.errors import SurgeryError


def make_model(name: str) -> nn.Module:
    """Build a timm or SMP model on the meta device: all of its structure, no weights, no memory.

    Raises:
        SurgeryError: no such name (the nearest ones are shown), or its library is not installed.
    """
    return _smp(name) if name.startswith("smp:") else _timm(name)


def call_factory(name: str) -> nn.Module:
    """Import `package.module` and call its `factory` without arguments. This runs the code that `name` names.

    Raises:
        SurgeryError: it cannot be imported, or the call raises.
    """
    path, _, factory = name.partition(":")
    try:
        made: nn.Module = getattr(importlib.import_module(path), factory)()
    except Exception as error:
        raise SurgeryError(f"model {name!r}: {type(error).__name__}: {error}") from error
    return made


def _timm(name: str) -> nn.Module:
    timm = _library("timm")
    _known(f"model {name!r} in timm", name.partition(".")[0], timm.list_models())
    return _built(name, timm.create_model, name, pretrained=False)


def _smp(name: str) -> nn.Module:
    smp = _library("segmentation_models_pytorch")
    _, _, rest = name.partition(":")
    architecture, _, encoder = rest.partition(":")
    known = {cls.__name__: cls for cls in smp.MODEL_ARCHITECTURES_MAPPING.values()}
    _known(f"architecture {architecture!r} in segmentation-models-pytorch", architecture, known)
    if not encoder.startswith("tu-"):  # any encoder of timm's
        _known(f"encoder {encoder!r} in segmentation-models-pytorch", encoder, smp.encoders.get_encoder_names())
    return _built(name, known[architecture], encoder, encoder_weights=None)


def _built(name: str, make: Any, *args: Any, **options: Any) -> nn.Module:
    try:
        with torch.device("meta"):
            model: nn.Module = make(*args, **options)
    except Exception as error:
        raise SurgeryError(f"model {name!r} cannot be built: {type(error).__name__}: {error}") from error
    return model


def _library(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise SurgeryError(f"{name} is not installed: pip install 'dropsurgery[models]'") from None


def _known(what: str, name: str, known: Iterable[str]) -> None:
    names = list(known)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "see its own list of models"
        raise SurgeryError(f"no {what}; {hint}")
