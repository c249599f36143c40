"""No name decides anything: the same sites with the same facts come back when every module has another name.

Two ways of renaming: on the captured graph, over every pattern and many topologies; and on the model itself, whose
children get random names (forwards still find them by the old ones), with `feature_info` scrambled.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import fx, nn

from dropsurgery import catalogue
from dropsurgery.capture import capture
from dropsurgery.capture.facts import annotate
from dropsurgery.matching import find
from dropsurgery.models import make_model
from tests.zoo import ZOO

FACTS = ("stage", "reduction", "depth", "block", "flow", "role", "channel_axis", "channels", "trainable")
MODELS = (
    "resnet18",
    "resnetv2_18",
    "efficientnet_b0",
    "densenet121",
    "vgg11_bn",
    "convnext_atto",
    "swin_tiny_patch4_window7_224",
    "vit_tiny_patch16_224",
    "pvt_v2_b0",
    "levit_128s",
    "efficientvit_m0",
    "hiera_tiny_224",
    "davit_tiny",
    "mobileone_s1",
    "cs3darknet_focus_s",
    "pnasnet5large",
    "smp:Unet:resnet18",
    "smp:UnetPlusPlus:efficientnet-b0",
    "smp:PAN:resnet18",
    "smp:UPerNet:tu-convnext_atto",
    "smp:DPT:tu-vit_tiny_patch16_224",
)


def graph_of(name: str) -> fx.Graph:
    if name in ZOO:
        return capture(ZOO[name].build(), ZOO[name].example()).view.graph
    return capture(make_model(name)).view.graph


def facts(graph: fx.Graph) -> list[tuple[Any, ...]]:
    return [tuple(node.meta.get(fact) for fact in FACTS) for node in graph.nodes if node.op != "output"]


def sites(graph: fx.Graph) -> Iterator[tuple[str, str, list[tuple[int, Any]]]]:
    """Every edge of every match of every pattern, as positions in the graph."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    for name in catalogue.names("patterns"):
        pattern = catalogue.load("patterns", name)
        for match in find(graph, pattern).matches:
            for edge in pattern.edges:
                found = match.edges(edge)
                yield name, edge, [(order[at.node], at.operand) for at in found] if isinstance(found, tuple) else []


class Names:
    """Random names, one for each old one, without a trace of its order or of its being a number."""

    def __init__(self, seed: int) -> None:
        self._random, self._made = random.Random(seed), dict[str, str]()

    def __getitem__(self, old: str) -> str:
        made = "".join(self._random.choices("abcdefghij", k=12))
        return self._made.setdefault(old, made)

    def path(self, old: str) -> str:
        return ".".join(self[part] for part in old.split(".")) if old else ""


def rename_graph(graph: fx.Graph, names: Names) -> None:
    for node in graph.nodes:
        for key in ("owner", "path"):
            if key in node.meta:
                node.meta[key] = names.path(node.meta[key])


@pytest.mark.parametrize("name", [*ZOO, *MODELS])
def test_the_same_sites_in_a_renamed_graph(name: str) -> None:
    graph = graph_of(name)
    before, found = facts(graph), list(sites(graph))
    assert found
    rename_graph(graph, Names(7))
    annotate(graph)
    assert facts(graph) == before
    assert list(sites(graph)) == found


def renamed(model: nn.Module, seed: int) -> nn.Module:
    """The model itself with a random name for every child, in place; its forwards find them by their old names."""
    names = Names(seed)
    for module in list(model.modules()):
        if module._modules:
            old = {key: names[f"{id(module)}.{key}"] for key in module._modules}
            module.__class__ = _finding(type(module), tuple(old.items()))
            children = [(old[key], child) for key, child in module._modules.items()]
            module._modules.clear()
            module._modules.update(children)
    for info in getattr(model, "feature_info", None) or ():
        info.update(module=names[str(info["module"])], reduction=3, num_chs=1)
    return model


def _finding(kind: type[nn.Module], old: tuple[tuple[str, str], ...]) -> type[nn.Module]:
    """A subclass in whose instances the children go by their old names too."""
    table = dict(old)

    def by_old_name(self: Any, name: str) -> Any:
        return kind.__getattr__(self, table.get(name, name))

    def at(self: Any, index: Any) -> Any:
        if isinstance(index, int):
            return list(self._modules.values())[index]
        if isinstance(index, str):
            return self._modules[table[index]]
        return vars(kind)["__getitem__"](self, index)

    body: dict[str, Callable[..., Any]] = {"__getattr__": by_old_name}
    if issubclass(kind, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        body["__getitem__"] = at
    if issubclass(kind, nn.ModuleDict):
        body["items"] = lambda self: [(key, self._modules[new]) for key, new in table.items()]
        body["keys"] = lambda self: list(table)
    return type(kind.__name__, (kind,), body)


@pytest.mark.parametrize("name", [*ZOO, *(name for name in MODELS if name != "pnasnet5large")])
def test_the_same_sites_in_a_renamed_model(name: str) -> None:
    before = graph_of(name)
    example = ZOO[name].example() if name in ZOO else (torch.zeros(2, 3, *_size(name), device="meta"),)
    model = renamed(ZOO[name].build() if name in ZOO else make_model(name), 11)
    after = capture(model, example).view
    assert not after.opaque
    assert [node.op for node in after.graph.nodes] == [node.op for node in before.nodes]
    assert facts(after.graph) == facts(before)
    assert list(sites(after.graph)) == list(sites(before))


def _size(name: str) -> tuple[int, int]:
    return (256, 256) if name == "cs3darknet_focus_s" else (224, 224)


def test_renaming_renames() -> None:
    model = renamed(make_model("resnet18"), 3)
    assert not any(word in path for path, _ in model.named_modules() for word in ("layer", "conv", "bn", "0", "1"))
    assert isinstance(next(model.children()), nn.Conv2d)
    assert model.conv1 is next(model.children())
