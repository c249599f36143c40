"""Models by name, as recipes (`tested_on`) and the command line give them.

resnet50                    a name in timm.list_models()
resnet50(output_stride=16)  the same with options of its constructor: words and Python literals, separated by commas
smp:Unet:resnet34           segmentation-models-pytorch: architecture and encoder (its own, or `tu-` and a timm name)
torchvision:vgg11           a name in torchvision.models.list_models()
package.module:factory      anything else, on the command line only
"""

from __future__ import annotations

import ast
import difflib
import fnmatch
import functools
import importlib
import inspect
from collections.abc import Iterable, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import nn

from dropsurgery.errors import SurgeryError

SMP, TORCHVISION = "smp:", "torchvision:"
_SMP_HOME = "segmentation_models_pytorch"


def make_model(name: str, device: str = "meta") -> nn.Module:
    """Build a timm, SMP or torchvision model with random weights.

    By default it is on the meta device: all of its structure, no weights, no memory.

    Raises:
        SurgeryError: no such name (the nearest ones are shown), its library is not installed, or cannot build it.
    """
    _check(name)
    if name.startswith(SMP):
        return _smp(name, device)
    return _torchvision(name, device) if name.startswith(TORCHVISION) else _timm(name, device)


def model_names(globs: Iterable[str]) -> list[str]:
    """The names that fit some globs, each once: those of one glob in the order of its library.

    `*` is all of timm; `smp:*:*` all of SMP's architectures and own encoders, `smp:Unet:tu-*` timm's encoders;
    `torchvision:*` torchvision's. What has no wildcard is taken as it is and need not be listed anywhere.

    Raises:
        SurgeryError: a glob fits no name, or its library is not installed.
    """
    return list(dict.fromkeys(name for glob in globs for name in _fitting(glob)))


def example_inputs(name: str) -> Any:
    """Example arguments for a torchvision model, on the meta device; None where the model says itself what it takes.

    Two samples each: images (2, 3, 224, 224), clips (2, 3, 16, 224, 224), two frames (2, 3, 128, 128) for optical
    flow, and a list of two images (3, 320, 320) for a detector.
    """
    if not name.startswith(TORCHVISION):
        return None
    name = name.removeprefix(TORCHVISION)
    task = _library("torchvision.models").get_model_builder(name).__module__.split(".")[2]
    if task == "detection":
        return ([torch.empty(3, 320, 320, device="meta") for _ in range(2)],)
    if task == "optical_flow":
        return tuple(torch.empty(2, 3, 128, 128, device="meta") for _ in range(2))
    if task == "video":
        return torch.empty(2, 3, 16, 224, 224, device="meta")
    side = 299 if "inception" in name else 224  # the one classifier that takes no smaller images in training
    return torch.empty(2, 3, side, side, device="meta")


def family(name: str) -> str:
    """The module that defines a model: `resnet` for timm's resnet18, `smp.Unet`, `torchvision.detection.retinanet`."""
    if name.startswith(SMP):
        return f"smp.{name.split(':')[1]}"
    if name.startswith(TORCHVISION):
        home: str = _library("torchvision.models").get_model_builder(name.removeprefix(TORCHVISION)).__module__
        return home.replace(".models", "")
    return _timm_modules().get(_options(name)[0].partition(".")[0], "timm")


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


def _fitting(glob: str) -> list[str]:
    if not any(sign in glob for sign in "*?["):
        _check(glob)
        return [glob]
    found = [name for name in _listed(glob) if fnmatch.fnmatchcase(name, glob)]
    if not found:
        raise SurgeryError(
            f"no model name fits {glob!r}; names look like resnet18, smp:Unet:resnet34, torchvision:vgg11"
        )
    return found


def _listed(glob: str) -> Iterator[str]:
    """All names of the library that a glob is about."""
    if glob.startswith(TORCHVISION):
        yield from (TORCHVISION + name for name in _library("torchvision.models").list_models())
    elif glob.startswith(SMP):
        if glob.rpartition(":")[2].startswith("tu-"):
            encoders = [f"tu-{name}" for name in _timm_names()]
        else:
            encoders = _smp_encoders()
        yield from (f"{SMP}{architecture}:{encoder}" for architecture in _architectures() for encoder in encoders)
    else:
        yield from _timm_names()


@functools.cache
def _timm_modules() -> dict[str, str]:
    timm = _library("timm")
    return {name: module for module in timm.list_modules() for name in timm.list_models(module=module)}


def _timm_names() -> Sequence[str]:
    names: Sequence[str] = _library("timm").list_models()
    return names


def _architectures() -> dict[str, Any]:
    return {cls.__name__: cls for cls in _library(_SMP_HOME).MODEL_ARCHITECTURES_MAPPING.values()}


def _smp_encoders() -> list[str]:
    names: list[str] = _library(_SMP_HOME).encoders.get_encoder_names()
    return names


def _check(name: str) -> None:
    """Raise SurgeryError for a name that no library knows."""
    if name.startswith(SMP):
        architecture, _, encoder = name.removeprefix(SMP).partition(":")
        _known(f"architecture {architecture!r} in segmentation-models-pytorch", architecture, _architectures())
        if not encoder.startswith("tu-"):  # any encoder of timm's
            _known(f"encoder {encoder!r} in segmentation-models-pytorch", encoder, _smp_encoders())
    elif name.startswith(TORCHVISION):
        short = name.removeprefix(TORCHVISION)
        _known(f"model {short!r} in torchvision", short, _library("torchvision.models").list_models())
    else:
        plain, _ = _options(name)
        _known(f"model {plain!r} in timm", plain.partition(".")[0], _timm_names())


def _timm(name: str, device: str) -> nn.Module:
    plain, options = _options(name)
    return _built(name, device, _library("timm").create_model, plain, pretrained=False, **options)


def _options(name: str) -> tuple[str, dict[str, Any]]:
    """The name of a timm model without what stands in brackets behind it, and that."""
    plain, opened, inside = name.partition("(")
    if not opened:
        return plain, {}
    pairs = [each.partition("=") for each in inside.removesuffix(")").split(",")]
    if not inside.endswith(")") or not all(key.strip().isidentifier() and value.strip() for key, _, value in pairs):
        raise SurgeryError(f"model {name!r}: expected options as in resnet50(output_stride=16, act_layer=selu)")
    return plain, {key.strip(): _literal(value.strip()) for key, _, value in pairs}


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _smp(name: str, device: str) -> nn.Module:
    architecture, _, encoder = name.removeprefix(SMP).partition(":")
    return _built(name, device, _architectures()[architecture], encoder, encoder_weights=None)


def _torchvision(name: str, device: str) -> nn.Module:
    models, short = _library("torchvision.models"), name.removeprefix(TORCHVISION)
    taken = inspect.signature(models.get_model_builder(short)).parameters
    weights = {option: None for option in ("weights", "weights_backbone") if option in taken}
    return _built(name, device, models.get_model, short, **weights)


def _built(name: str, device: str, make: Any, *args: Any, **options: Any) -> nn.Module:
    def build(where: str) -> nn.Module:
        with torch.device(where):
            model: nn.Module = make(*args, **options)
        return model

    try:
        return build(device)
    except Exception as error:
        failed = error
    try:  # some constructors compute with the values of tensors
        return build("cpu").to(device)
    except Exception as error:
        raise SurgeryError(f"model {name!r} cannot be built: {type(error).__name__}: {error}") from failed


def _library(name: str) -> ModuleType:
    top = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != top:
            raise
        raise SurgeryError(f"{top} is not installed: pip install 'dropsurgery[models]'") from None


def _known(what: str, name: str, known: Iterable[str]) -> None:
    names = list(known)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "see its own list of models"
        raise SurgeryError(f"no {what}; {hint}")
