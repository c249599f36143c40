"""A layer whose forward a regularizer stands in for: its own class, and its own forward on other weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dropsurgery.errors import SurgeryError


def own_class(host: nn.Module) -> type[nn.Module]:
    """Return the class that the user wrote: after surgery a layer is of a subclass, made for it, that says which."""
    own: type[nn.Module] = getattr(type(host), "_own_class", type(host))
    return own


def run_with(host: nn.Module, field: str, value: Any, *args: Any) -> Any:
    """Run a layer's own forward with another value in one of its fields, for this call alone."""
    # `torch.func.functional_call` would call the layer, and so whatever stands in for its forward.
    before = host.__dict__[field]
    try:
        host.__dict__[field] = value
        return own_class(host).forward(host, *args)
    finally:
        host.__dict__[field] = before


def require_host(holds: bool, layer: str, site_id: str, expected: str, host: nn.Module) -> None:
    """Raise a SurgeryError that says which layer was expected as host, and which one came."""
    if not holds:
        raise SurgeryError(f"{layer} at {site_id or 'a layer'}: expected {expected}, got {own_class(host).__name__}")


def filled(host: nn.Module) -> nn.Module:
    """Return a layer with fixed numbers of either sign as its weights; none are drawn for it."""
    with torch.no_grad():
        for parameter in host.parameters():
            parameter.copy_(torch.arange(1.0, parameter.numel() + 1).mul(2.4).sin().view_as(parameter))
    return host
