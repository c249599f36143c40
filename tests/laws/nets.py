"""Small nets, each with one thing in its forward that a recording could get wrong."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Base(nn.Module):
    """Two convolutions with norms and an activation: what edits hang on."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.act = nn.ReLU()

    def first(self, x: Tensor) -> Tensor:
        return self.act(self.bn1(self.conv1(x)))

    def second(self, x: Tensor) -> Tensor:
        return x + self.bn2(self.conv2(x))


class BranchOnSize(Base):
    """Both branches hold all sites."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if x.shape[-1] > 16:
            x = F.avg_pool2d(x, 2)
        return self.second(x)


class SkipOnSize(Base):
    """Small images go round the residual branch and its sites."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(x) if x.shape[-1] >= 16 else x


class SizeInArithmetic(Base):
    """Sizes as numbers in a reshape and in a scale."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        batch, channels, height, width = x.shape
        x = x.reshape(batch, channels, height * width).reshape(batch, channels, height, width)
        return self.second(x) / (int(height) * width) ** 0.5


class Refuses(Base):
    """Its own error for sizes that it does not take."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] % 8:
            raise ValueError(f"width must be a multiple of 8, got {x.shape[-1]}")
        return self.second(self.first(x))


class Random(Base):
    """Functional dropout in a forward of its own, and noise that is there in eval too."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.first(x), 0.5, self.training)
        return self.second(x) + torch.rand(x.shape[0], 1, 1, 1)


class OtherOutputsInTraining(Base):
    """An auxiliary output in training only."""

    def forward(self, x: Tensor) -> Any:
        x = self.first(x)
        out = self.second(x)
        return (out, x.mean((2, 3))) if self.training else out


class Constants(Base):
    """Tensors made in the forward, a plain tensor attribute, a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = torch.full((1, 4, 1, 1), 0.5)
        self.register_buffer("hidden", torch.full((1, 4, 1, 1), 2.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x) * self.plain + torch.tensor(0.25) + torch.zeros(4, 1, 1)
        return self.second(x) * self.hidden + torch.arange(x.shape[-1])


class InPlace(Base):
    """Changes a tensor that is read later under its old name, and its own input."""

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(0.5)
        y = self.bn1(self.conv1(x))
        z = F.relu_(y)
        out = self.bn2(self.conv2(z))
        out[:, 0] = 0
        out += y
        return out


class Counts(Base):
    """Writes to a buffer and to an attribute in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.second(self.first(x)) * self.calls


class Sets(nn.Module):
    """Sets an attribute and replaces a buffer in its forward: no graph can say that."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = BranchOnSize()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        self.calls = self.calls + 1
        self.width = x.shape[-1]
        return self.inner(x) * self.calls / self.width


class Result(NamedTuple):
    logits: Tensor
    features: dict[str, Tensor]


class Structured(Base):
    """Optional and keyword arguments, a named tuple with a dict for a result."""

    def forward(self, x: Tensor, mask: Tensor | None = None, *, scale: float = 1.0, flip: bool = False) -> Result:
        x = self.first(x)
        if mask is not None:
            x = x * mask
        x = self.second(x) * scale
        return Result(x.flip(1) if flip else x, {"mean": x.mean((2, 3))})


class ListInput(Base):
    """Takes a list of tensors."""

    def forward(self, images: list[Tensor]) -> Tensor:
        return self.second(torch.cat([self.first(image) for image in images]))


class DataDependent(Base):
    """Python looks at the data: cannot be recorded, its child can."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = BranchOnSize()

    def forward(self, x: Tensor) -> Tensor:
        x = -x if float(x.sum()) > 0 else x
        return self.inner(x)


class ClassFlag(Base):
    """A flag on the class, which an instance may override."""

    negate = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x))
        return -x if self.negate else x


class ChildFlag(nn.Module):
    """Reads an attribute of a child, and a list of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.repeats = ClassFlag(), [1.0, 2.0]
        self.body.power = 1
        self.tail = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        x = self.tail(self.body(x)) ** self.body.power
        return x + sum(factor * x for factor in self.repeats)


class Tied(nn.Module):
    """One weight in two convolutions, one norm under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.two.weight = self.one.weight
        self.norm = self.again = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.relu(self.again(self.two(F.relu(self.norm(self.one(x))))))


class Checkpointed(Base):
    """Checkpoints a part of its own forward, in either of torch's two ways."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.stem = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.utils.checkpoint.checkpoint(self.first, self.stem(x), use_reentrant=self.reentrant)
        return self.second(x)
