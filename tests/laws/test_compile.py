"""A moving rate compiles whole, and no step of the schedule compiles it anew."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import fx
from torch._dynamo.testing import CompileCounterWithBackend

from dropsurgery import apply_recipe
from tests.laws.models import ready

STEPS = 6
OPTIONS: dict[str, dict[str, Any]] = {
    "resnet18": {"layers": (1, 1, 1, 1)},
    "convnext_atto": {"depths": (1, 1, 1, 1)},
    "vit_tiny_patch16_224": {"img_size": 64, "depth": 2},
}


def recipe(name: str) -> Any:
    """A recipe whose rate moves all the time."""
    entry = {"name": "branch", "pattern": "residual_add", "edge": "branch", "schedule": {"kind": "linear"}}
    with_dropout = {"insert": "dropout", "with": {"p": 0.5}}
    with_depth = {"insert": "stochastic_depth", "with": {"p": 0.5}}
    if name == "resnet18":
        return "dropblock_resnet_g34"
    chosen = with_depth if name == "convnext_atto" else with_dropout
    return {"version": 1, "name": "moving", "entries": [entry | chosen]}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_whole_schedule_in_two_frames(name: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = ready(timm.create_model(name, num_classes=5, **OPTIONS[name]))
    x = torch.randn(2, 3, 64, 64)
    gm: fx.GraphModule = apply_recipe(model, recipe(name), example_inputs=x, total_steps=STEPS)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(gm, fullgraph=True, backend=counter)
    optimizer = torch.optim.SGD(gm.parameters(), lr=1e-4)
    rates = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        compiled(x).square().mean().backward()
        optimizer.step()
        rates.append(max(regularizer.p.item() for regularizer in gm.surgery.regularizers.values()))
    assert rates == sorted(set(rates))
    assert counter.frame_count <= 2
    torch.manual_seed(1)
    one = compiled(x)
    torch.manual_seed(2)
    assert not torch.equal(one, compiled(x))
    assert torch.allclose(compiled.eval()(x), gm.eval()(x), atol=1e-4)
