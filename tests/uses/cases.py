"""All laws on one use of a model: what is called, how, and the ways into it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from dropsurgery import apply_recipe, find_sites
from tests.laws import checks
from tests.laws.models import EDGES, STEPS, everywhere, ready

Build = Callable[[], nn.Module]


def images(size: int = 64, batch: int = 2, channels: int = 3) -> Tensor:
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(size))


def calling(x: Tensor) -> checks.Call:
    return lambda model: model(x.clone())


def made(build: Build) -> nn.Module:
    """A model with the same random weights each time, none of which hides its branch."""
    torch.manual_seed(0)
    return ready(build())


def converted(model: nn.Module, example: Any, recipe: Any = None, *, steps: int = 0) -> fx.GraphModule:
    """What a recipe (dropout on every edge, by default) makes of a model, some steps into its schedule."""
    gm = apply_recipe(model, recipe or everywhere(), example_inputs=example, total_steps=STEPS)
    for _ in range(steps):
        gm.surgery.step()
    return gm


def check_flat(gm: fx.GraphModule, call: checks.Call) -> None:
    """Law 3: the flat graph computes what the tree does."""
    flat = gm.surgery.flatten()
    for training in (False, True):
        tree = checks.run(gm, call, training)
        with checks.restored(gm):
            flat.train(training)
            torch.manual_seed(3)
            assert checks.equal(tree.outputs, call(flat)), f"the flat graph differs, training={training}"


def check_use(
    model: nn.Module, example: Any, call: checks.Call, *, copies: bool = True, files: bool = True
) -> fx.GraphModule:
    """All that a use has to keep; gives the converted model at the end of its schedule."""
    with checks.check_untouched(model):
        gm = converted(model, example)
    assert gm.surgery.regularizers
    checks.check_outputs(model, gm, call)
    checks.check_state(model, gm)
    checks.check_identity(model, gm)
    checks.check_hooks(model, gm, call)
    for other in (copy.deepcopy(gm), checks.saved(gm)) if copies else ():
        checks.check_copy(gm, other, call)
    for _ in range(STEPS):
        gm.surgery.step()
    check_flat(gm, call)
    checks.check_noise(gm, call)
    checks.check_way(gm, "forward", call)
    return gm


def check_ways(model: nn.Module, gm: fx.GraphModule, ways: Mapping[str, checks.Call]) -> None:
    """Law 6: each way into a loud model gives the model's numbers in eval, and meets its sites in training."""
    for name, way in ways.items():
        checks.check_same(checks.run(model, way, False), checks.run(gm, way, False))
        checks.check_way(gm, name.partition(" ")[0], way)


def check_part(whole: nn.Module, example: Any, name: str, part_example: Any) -> None:
    """A part of a bigger model has the sites that it has alone, with the same facts about its own maps."""

    def facts(model: nn.Module, inputs: Any, prefix: str = "") -> dict[str, Any]:
        # Not `stem` and `classifier`: what is an end of the part is none of the whole.
        sites = [site for pattern in EDGES for site in find_sites(model, pattern, example_inputs=inputs)]
        own = [site for site in sites if site.id.startswith(prefix)]
        return {site.id.removeprefix(prefix): (site.shape, site.channels, site.channel_axis) for site in own}

    alone = facts(whole.get_submodule(name), part_example)
    inside = facts(whole, example, f"{name}.")
    assert alone, "no sites"
    missing = {key for key, known in alone.items() if inside.get(key) != known}
    assert not missing, f"not found, or with other facts, within the whole: {sorted(missing)[:5]}"
