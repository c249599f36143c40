"""What is at work while a regularizer runs: compilers, tensor subclasses and modes, transforms, autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch._C import _functorch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from dropsurgery.errors import SurgeryError

_PLAIN = (Tensor, torch.nn.Parameter)


def is_traced(x: Tensor) -> bool:
    """Whether something looks on at what is done to `x`, so that its values must not be read."""
    looks = torch.compiler.is_compiling() or type(x) not in _PLAIN or _get_current_dispatch_mode() is not None
    return looks or is_transformed()


def is_transformed() -> bool:
    """Whether a transform of `torch.func` (grad, vmap …) is at work, which knows torch's own operators only."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def full_precision(device: str) -> AbstractContextManager[object]:
    """Without autocast, in whose precision products say too little."""
    enabled = device != "meta" and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if enabled else nullcontext()


def require_own_numbers(where: str) -> None:
    """Raise a SurgeryError where a seeded draw would hold for all entries of a `vmap` that asked for another each."""
    if not is_transformed():
        return
    for each in _functorch.get_interpreter_stack() or ():
        if each.key() == _functorch.TransformType.Vmap:
            asked = _functorch.CVmapInterpreterPtr(each).randomness()
            if asked != _functorch.RandomnessType.Same:
                raise SurgeryError(
                    f"{where or 'a regularizer'}: expected vmap with randomness='same', since a seeded model draws one "
                    f"mask for all entries, got randomness={asked.name.lower()!r}; pass randomness='same', or apply "
                    "the recipe without a seed"
                )
