"""Small nets, each with one way in which a cut goes on or is stopped, and what puts sites into them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dropsurgery import apply_recipe
from dropsurgery.matching import After, Pattern, ops

PATTERNS = {
    f"any_{kind}": Pattern(f"any_{kind}", forms=[ops(it=kind)], edges={"output": After("it")})
    for kind in ("activation", "norm", "conv")
}
"""Patterns of one operation, to put a site anywhere; tests register them while they run."""


def operated(model: nn.Module, *entries: dict[str, Any], shape: tuple[int, ...], seed: int = 0) -> Any:
    """A model in eval mode and float64, with numbers in all its tensors, and structural dropout at the entries' sites.

    An entry names a pattern, an edge and the modules; what else it holds are arguments of the regularizer.
    """
    torch.manual_seed(seed)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point() and tensor.dim() == 1:
                tensor.uniform_(0.5, 1.5)
    model = model.double().eval()
    made = []
    for index, entry in enumerate(entries):
        place = {key: entry[key] for key in ("pattern", "edge") if key in entry}
        arguments = {key: value for key, value in entry.items() if key not in ("pattern", "edge", "module", "where")}
        where = entry.get("where", {}) | ({"module": entry["module"]} if "module" in entry else {})
        made.append(
            {
                "name": f"e{index}",
                **place,
                "insert": "structural_dropout",
                "where": where,
                "with": {"p": 0.5} | arguments,
            }
        )
    recipe = {"version": 1, "name": "sites", "summary": "sites", "entries": made}
    return apply_recipe(model, recipe, example_inputs=torch.randn(shape, dtype=torch.float64), total_steps=10)


def at(module: str, pattern: str = "any_activation", edge: str = "output", **more: Any) -> dict[str, Any]:
    """An entry for the sites of one module."""
    return {"module": [module], "pattern": pattern, "edge": edge, **more}


class Net(nn.Module):
    """Layers by name, and a forward that a subclass writes."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)


def conv(inputs: int, outputs: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


# -- where a cut goes on ---------------------------------------------------------------------------------------------
class Flattened(Net):
    """A map becomes a vector: blocks of H·W columns."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 8), n=nn.BatchNorm2d(8), act=nn.ReLU(), pool=nn.MaxPool2d(2), b=nn.Linear(8 * 16, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.flatten(self.pool(self.act(self.n(self.a(x)))), 1))


class Viewed(Flattened):
    """The same with `view` and a permute before it."""

    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.n(self.a(x)))
        batch, channels, height, width = x.shape
        x = x.permute(0, 2, 3, 1).reshape(batch, height * width, channels)
        return self.b(x).mean(1)


class Summed(Net):
    """Two branches are added, and cut together."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 8), b=conv(3, 8), act1=nn.ReLU(), act2=nn.ReLU(), c=conv(8, 4), last=nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.a(x)) + self.act2(self.b(x))
        return self.last(self.c(x).mean((2, 3)))


class Concatenated(Net):
    """Two branches are concatenated, and cut apart."""

    def __init__(self) -> None:
        super().__init__(
            a=conv(3, 8), b=conv(3, 6), act1=nn.ReLU(), act2=nn.ReLU(), n=nn.BatchNorm2d(14), c=conv(14, 4)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.cat([self.act1(self.a(x)), self.act2(self.b(x))], 1)).mean((2, 3))


class Depthwise(Net):
    """A depthwise convolution follows the channels; `bias` makes numbers of zeros."""

    def __init__(self, bias: bool = False, times: int = 1, norm: bool = False) -> None:
        super().__init__(
            a=conv(3, 8),
            act=nn.ReLU(),
            d=conv(8, 8 * times, groups=8, bias=bias),
            n=nn.BatchNorm2d(8 * times) if norm else nn.Identity(),
            act2=nn.ReLU(),
            c=conv(8 * times, 4, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.act2(self.n(self.d(self.act(self.a(x)))))).mean((2, 3))


class Gated(Net):
    """Squeeze and excitation: the gate is as wide as what it gates."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 8), act=nn.SiLU(), r=conv(8, 2, 1), e=conv(2, 8, 1), c=conv(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.a(x))
        gate = torch.sigmoid(self.e(F.relu(self.r(x.mean((2, 3), keepdim=True)))))
        return self.c(x * gate).mean((2, 3))


class GatedUnit(Net):
    """A gated linear unit, whose halves are cut alike; by itself it splits into sizes that are written in its code."""

    def __init__(self, unit: nn.Module | None = None) -> None:
        super().__init__(a=nn.Linear(6, 16), unit=unit or nn.Identity(), b=nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if isinstance(self.unit, nn.GLU):
            return self.b(self.unit(x))
        value, gate = x.split(8, -1)
        return self.b(value * torch.tanh(gate))


class Functional(Net):
    """Convolutions and a scale that are the net's own parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(8, 3, 3, 3)), nn.Parameter(torch.randn(4, 8, 1, 1))
        self.scale, self.bias = nn.Parameter(torch.randn(8, 1, 1)), nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.conv2d(x, self.first, self.bias, padding=1) * self.scale)
        return F.conv2d(x, self.second).mean((2, 3))


class Multilayer(Net):
    """Linear, norm, activation, linear; with a PReLU of one weight a unit."""

    def __init__(self, act: nn.Module | None = None, norm: nn.Module | None = None, bias: bool = True) -> None:
        super().__init__(
            a=nn.Linear(6, 12, bias=bias),
            n=norm or nn.BatchNorm1d(12),
            act=act or nn.ReLU(),
            drop=nn.Dropout(0.1),
            b=nn.Linear(12, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.drop(self.act(self.n(self.a(x)))))


class Heads(Net):
    """Attention whose forward reads the number of heads, and another number that is the same."""

    def __init__(self, heads: int = 4, size: int = 4, norm: bool = False) -> None:
        width = heads * size
        super().__init__(
            qkv=nn.Linear(6, 3 * width),
            n=nn.LayerNorm(width) if norm else nn.Identity(),
            proj=nn.Linear(width, 6),
            head=nn.Linear(6, 2),
        )
        self.heads, self.size = heads, size

    def forward(self, x: Tensor) -> Tensor:
        batch, count, _ = x.shape
        qkv = self.qkv(x).reshape(batch, count, 3, self.heads, self.size).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, count, self.heads * self.size)
        return self.head((x + self.proj(self.n(y))).mean(1))


class Fixed(Heads):
    """The number of heads is written in the code."""

    def forward(self, x: Tensor) -> Tensor:
        batch, count, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, count, 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head((x + self.proj(self.n(y))).mean(1))


class Pair(Net):
    """Two layers with an activation between."""

    def __init__(self) -> None:
        super().__init__(a=nn.Linear(6, 12), act=nn.Tanh(), b=nn.Linear(12, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.act(self.a(x)))


class Shared(Net):
    """One pair of layers, called twice."""

    def __init__(self) -> None:
        super().__init__(pair=Pair(), last=nn.Linear(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.pair(torch.relu(self.pair(x))))


class Within(Net):
    """A forward that goes by its data, and calls a pair of layers."""

    def __init__(self) -> None:
        super().__init__(pair=Pair(), last=nn.Linear(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        if float(x.sum()) > 1e9:
            x = x * 2
        return self.last(self.pair(x))


# -- where it is stopped ---------------------------------------------------------------------------------------------
class Telling(Pair):
    """A pair of layers that also gives what lies between."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x = self.act(self.a(x))
        return self.b(x), x


class Outwards(Within):
    """A forward that stays Python and takes what is cut."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = Telling()

    def forward(self, x: Tensor) -> Tensor:
        if float(x.sum()) > 1e9:
            x = x * 2
        x, between = self.pair(x)
        return self.last(x) * between.mean()


class Branched(Net):
    """The masked tensor is added to one that nobody masks, which another layer reads as well."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 8), b=conv(8, 8), act=nn.ReLU(), act2=nn.ReLU(), c=conv(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.a(x))
        return self.c(x + self.act2(self.b(x))).mean((2, 3))


class Grouped(Net):
    """A convolution of two groups reads what is cut."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 8), act=nn.ReLU(), c=conv(8, 4, groups=2))

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.act(self.a(x))).mean((2, 3))


class Tied(Net):
    """One weight in two layers, of which one is cut."""

    def __init__(self) -> None:
        super().__init__(a=nn.Linear(6, 6), act=nn.ReLU(), b=nn.Linear(6, 6), c=nn.Linear(6, 3))
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(self.act(self.a(x)))))


class Twice(Net):
    """One layer called twice, on what is cut and on what is not."""

    def __init__(self) -> None:
        super().__init__(a=nn.Linear(6, 6), act=nn.ReLU(), c=nn.Linear(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.a(self.act(self.a(x)))) + self.c(x)


class Output(Net):
    """What is cut is a result of the model."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 8), act=nn.ReLU(), c=conv(8, 4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.act(self.a(x))
        return self.c(x), x


class Python(nn.Module):
    """A forward that goes by its data."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if float(x.sum()) > 1e9 else x + 1


class Opaque(Net):
    """A part that stays Python reads what is cut."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 8), act=nn.ReLU(), part=Python(), c=conv(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.part(self.act(self.a(x)))).mean((2, 3))


class Shuffled(Net):
    """An operation without a rule reads what is cut."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 8), act=nn.ReLU(), shuffle=nn.PixelShuffle(2), sort=nn.Identity(), c=conv(2, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.shuffle(self.act(self.a(x)))).mean((2, 3))


class Sorted(Net):
    """The same, written as a function."""

    def __init__(self) -> None:
        super().__init__(a=nn.Linear(6, 8), act=nn.ReLU(), c=nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.cumsum(self.act(self.a(x)), -1))
