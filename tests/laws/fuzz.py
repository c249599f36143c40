"""Random small models as real Python source: classes drawn by hypothesis from a table of things that forwards do.

A statement of the table takes feature maps (B, 4, H, W) and gives one, at any H and W, so that whatever is put together
runs; what it does on the way is what a recording could get wrong. These words of a statement are replaced:

    v           the new map                       a, b        maps that are there already
    m, m2 …     attributes of its own             t, t2 …     variables of its own
    BODY        statements that make v from a and b
    Map Pair Dict Named Listed Keyed Options      further classes, called by what goes in and comes out (`_KINDS`)

A line with % belongs into the `__init__` of the class.
"""

from __future__ import annotations

import linecache
import re
import sys
import textwrap
import zlib
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

MODULE = "fuzzed"
"""The name under which drawn source is imported: pickles look classes up in it."""
CHANNELS = 4

_HEADER = """\
import collections, contextlib, functools, math, operator
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

Result = collections.namedtuple("Result", "main other")

class Net(nn.Module):
    width = 4

    @property
    def twice(self):
        return 2 * self.width

    @staticmethod
    def gate(x):
        return x * x.sigmoid()

    def half(self, x):
        return x[:, : self.twice // 2] * 0.5

class Scale(Net):
    factor = 0.5

    def forward(self, x):
        return x * self.factor

class DropPath(Net):
    def forward(self, x):
        if not self.training:
            return x
        return x * (torch.rand(x.shape[0], 1, 1, 1) > 0.3) / 0.7

def scaled(factor, module, args, output):
    return output * factor

def halved(module, args):
    return (args[0] * 0.5, *args[1:])
"""

_STATEMENTS = {
    "layers": """
        % self.m = nn.Conv2d(4, 4, 3, padding=1)
        v = self.m(a)

        % self.m = nn.Conv2d(4, 4, 3, padding=1)
        % self.m2 = nn.BatchNorm2d(4)
        v = self.m2(self.m(a))

        % self.m = nn.Conv2d(4, 4, 3, padding=1)
        % self.m2 = nn.BatchNorm2d(4)
        v = F.relu(self.m2(self.m(a))) + b

        % self.m = nn.ReLU()
        v = self.m(a)

        % self.m = nn.PReLU()
        v = self.m(a)

        % self.m = nn.GroupNorm(2, 4)
        v = self.m(a)

        % self.m = nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False)
        v = self.m(a)

        % self.m = nn.Linear(4, 4)
        v = self.m(a.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

        % self.m = nn.LayerNorm(4)
        v = self.m(a.movedim(1, -1)).movedim(-1, 1)

        % self.m = nn.Conv2d(4, 4, 3, 2, 1)
        v = F.interpolate(self.m(a), a.shape[-2:])

        % self.m = nn.ConvTranspose2d(4, 4, 3, 2, 1, 1)
        v = self.m(a)[..., :a.shape[-2], :a.shape[-1]]

        % self.m = nn.MaxPool2d(3, 1, 1)
        v = self.m(a)

        % self.m = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 4, 1), nn.Sigmoid())
        v = a * self.m(a)

        % self.m = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.SiLU())
        v = self.m(a) + a

        % self.m = nn.GRU(4, 4, batch_first=True)
        v = self.m(a.flatten(2).transpose(1, 2))[0].transpose(1, 2).reshape(a.shape)

        % self.m = nn.MultiheadAttention(4, 2, batch_first=True)
        t = a.flatten(2).transpose(1, 2)
        t, _ = self.m(t, t, t, need_weights=False)
        v = t.transpose(1, 2).unflatten(2, a.shape[2:])

        % self.m = Map()
        v = self.m(a)
    """,
    "functions": """
        v = F.relu(a)

        v = a.relu()

        v = torch.relu(a) + b

        v = a + b

        v = torch.add(a, b, alpha=0.5)

        v = a - 0.25 * b

        v = 1 - a

        v = 2.0 / (1 + a.abs())

        v = a * b.sigmoid()

        v = self.gate(a)

        v = functools.partial(torch.lerp, weight=0.25)(a, b)

        v = torch.where(a > b, a, b * 0.1)

        v = torch.cat([a, b], 1)[:, ::2]

        % self.m = nn.Conv2d(8, 4, 1)
        v = self.m(torch.cat((a, b), dim=1))

        v = torch.stack([a, b]).mean(0)

        v = sum([a, b, a])

        v = functools.reduce(operator.add, [a, b]) * 0.5

        % self.m = nn.Parameter(torch.randn(4, 4, 3, 3) / 6)
        v = F.conv2d(a, self.m, padding=1)

        % self.m = nn.Parameter(torch.randn(4))
        v = a * self.m.softmax(0).view(-1, 1, 1)

        v = F.batch_norm(a, None, None, training=True)

        % self.m = nn.GroupNorm(2, 4)
        v = F.group_norm(a, 2, self.m.weight, self.m.bias)

        v = F.layer_norm(a, a.shape[1:])

        v = F.instance_norm(a)

        v = F.avg_pool2d(a, 3, 1, 1)

        v = a / (a.amax((2, 3), keepdim=True).abs() + 1)

        v = a - a.max(1, keepdim=True).values.detach()

        t, t2 = torch.var_mean(a, 1, keepdim=True)
        v = (a - t2) * torch.rsqrt(t + 1)

        v = F.pad(a, (1, 1, 1, 1), mode='replicate')[:, :, 1:-1, 1:-1]

        v = (lambda t: t + b)(a)

        % self.m2 = F.silu
        v = self.m2(a)

        v = a.double().mul(0.5).to(b.dtype)

        v = a.half().float() if a.dtype == torch.float32 else a

        v = a.detach() + a

        % self.m = nn.Linear(4, 4, bias=False)
        v = torch.einsum('bchw,dc->bdhw', a, self.m.weight)

        % self.m = nn.Conv2d(4, 4, 1)
        v = F.conv2d(a, self.m.weight * 0.5, self.m.bias)
    """,
    "views": """
        t, t2 = a.chunk(2, 1)
        v = torch.cat([t2.relu(), t], 1)

        v = torch.cat([part * 0.5 for part in a.split(1, dim=1)], 1)

        v = torch.stack(a.unbind(1)[::-1], 1)

        v = torch.stack([image.flip(0) for image in a])

        t, *t2 = torch.split(a, [1, 3], dim=1)
        v = torch.cat([*t2, t], 1)

        t2, t3, t4, t5 = a.shape
        v = a.reshape(t2, 2, t3 // 2, t4, t5).transpose(1, 2).reshape(t2, t3, t4, t5)

        t = a.flatten(2)
        v = (torch.softmax(t @ t.transpose(-2, -1) / t.shape[-1] ** 0.5, -1) @ t).unflatten(-1, a.shape[-2:])

        % self.m = nn.Linear(4, 4)
        t = a.flatten(2).transpose(1, 2)
        t = t + F.gelu(self.m(t))
        v = t.mT.reshape(a.size(0), -1, *a.shape[2:])

        t = a.reshape(a.shape[0], 2, 2, -1).permute(1, 0, 3, 2)
        t2, t3 = t
        v = b * F.scaled_dot_product_attention(t2, t3, t3).mean((1, 2)).repeat(1, 2)[:, :, None, None]

        v = a.contiguous().view(a.shape[0], -1).view_as(a)

        v = a.mean((2, 3)).view(-1, 4, 1, 1).expand_as(a) + a

        v = a.roll((1, 1), dims=(2, 3)).expand(*a.shape)

        v = a[:, [1, 0, 3, 2]]

        v = a[:, torch.tensor([3, 2, 1, 0])]

        v = a[:, :, a.shape[2] // 2 :].mean(2, keepdim=True) + a

        v = a.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)

        v = F.fold(F.unfold(a, 3, padding=1), a.shape[-2:], 3, padding=1) / 9

        v = a + a.T.sum() * 0

        t = a.clone()
        t2 = t[:, 1:3]
        t2.mul_(0.5)
        v = t + 1

        t = a * 1.0
        t2 = t.view(t.shape)
        t2 += b
        v = t
    """,
    "sizes": """
        v = a * a.shape[-1] ** -0.5

        v = a.shape[-1] * a

        v = a / math.sqrt(a.size(1) * a.size(-1))

        v = a + torch.arange(a.shape[-1]) / a.shape[-1]

        v = a * torch.ones(a.shape[-2], a.shape[-1]).tril()

        v = a.masked_fill(torch.triu(torch.ones(a.shape[-2:], dtype=torch.bool), 1), 0.0)

        v = a + torch.linspace(-1, 1, a.shape[2])[:, None]

        v = a + torch.zeros_like(b) + b.new_ones(b.shape[1:])

        v = a + torch.full((1, 4, 1, 1), 0.5, dtype=a.dtype, device=a.device)

        v = a * torch.tensor([0.5, 1.0, 1.5, 2.0]).view(4, 1, 1)

        % self.m = nn.Parameter(torch.randn(1, 4, 4, 4))
        v = a + F.interpolate(self.m, size=a.shape[2:], mode='bilinear')

        v = F.interpolate(F.avg_pool2d(a, 2), size=a.shape[-2:], mode='nearest')

        t = a.shape[-1] % 4
        v = F.pad(a, (0, t))[..., :a.shape[-1]]

        t = max(a.shape[-2:])
        v = a / t

        t = torch.meshgrid(torch.arange(a.size(2)), torch.arange(a.size(3)), indexing='ij')
        v = a + sum(t) * 0.01

        v = a * len(a)

        v = a * a.numel() / a[0].numel()

        t = [i / 10 for i in range(a.shape[1])]
        v = a + a.new_tensor(t).view(-1, 1, 1)

        v = a.tile(1, 2, 1, 1)[:, : a.shape[1]] * int(a.shape[2])

        v = a if a.shape[-1] % 2 == 0 else F.pad(a, (0, 1))[..., 1:]

        assert a.shape[1] == 4, f'expected 4 channels, got {a.shape}'
        v = a

        if a.shape[-1] < 3:
            raise ValueError(f'too small: {tuple(a.shape)}')
        v = a * 0.5

        t = a
        while t.shape[-1] > 4:
            t = F.max_pool2d(t, 2)
        v = a + t.mean((2, 3), keepdim=True)
    """,
    "branches": """
        if a.shape[-1] > 9:
            BODY
        else:
            v = b

        if a.shape[0] == 2:
            v = a + b
        else:
            BODY

        % self.m = True
        if self.m:
            BODY
        else:
            v = a

        % self.m = None
        v = a if self.m is None else self.m(a)

        if isinstance(a, torch.Tensor) and a.ndim == 4:
            BODY
        else:
            v = None

        if a.dtype in (torch.float32, torch.bfloat16) and torch.is_tensor(b):
            BODY
        else:
            v = b

        if torch.is_grad_enabled():
            v = a * 2
        else:
            v = a + a

        if a.requires_grad:
            v = a * 0.5
        else:
            v = a / 2

        v = a * 2 if a.is_contiguous() else a + a

        if b is a:
            v = a * 0.5
        else:
            BODY

        % self.m = nn.Conv2d(4, 4, 3, padding=1)
        if isinstance(self.m, (nn.Conv2d, nn.Linear)):
            v = self.m(a)
        else:
            v = a

        if hasattr(self, 'm'):
            BODY
        else:
            v = a + 1

        % self.m = 'sum'
        if self.m == 'sum':
            v = a + b
        elif self.m == 'none':
            v = a

        % self.m = nn.Conv2d(4, 4, 1)
        v = a
        for t in range(a.shape[1] - 2):
            v = self.m(v) + t

        try:
            BODY
        except RuntimeError:
            v = a

        try:
            v = a.view(2, -1).view(a.shape)
        except RuntimeError:
            v = a.clone()

        try:
            t = self.m2
        except AttributeError:
            t = 0.5
        v = a * t
    """,
    "modes": """
        v = F.dropout(a, 0.3, self.training)

        v = F.dropout2d(a, p=0.3, training=self.training) + b

        % self.m = 0.25
        v = F.dropout(a, self.m, training=self.training)

        v = a + 0.1 * torch.rand_like(a)

        % self.m = 0.1
        v = a + torch.randn(a.shape[0], 1, 1, 1) * self.m

        % self.m = nn.Dropout(0.3)
        v = self.m(a)

        % self.m = nn.Dropout2d(0.3)
        v = b + self.m(a)

        % self.m = DropPath()
        v = b + self.m(a)

        % self.m = nn.RReLU()
        v = self.m(a)

        v = a * 0.5 if self.training else a

        if self.training:
            v = a + torch.rand(a.shape[-2:]) * 0.1
        else:
            v = a

        if self.training and torch.rand(()) is not None:
            v = a
        else:
            BODY

        if not self.training:
            v = a
        else:
            BODY

        % self.m = nn.ReLU()
        v = self.m(a) if self.m.training else a + self.m(a)

        % self.register_buffer('m2', torch.zeros(4))
        % self.register_buffer('m3', torch.ones(4))
        v = F.batch_norm(a, self.m2, self.m3, training=self.training)

        % self.m = nn.BatchNorm2d(4)
        v = F.batch_norm(a, self.m.running_mean, self.m.running_var, self.m.weight, None, self.training)
    """,
    "containers": """
        % self.m = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(3))
        v = a
        for t in self.m:
            v = t(v)

        % self.m = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(3))
        v = a
        for t2, t in enumerate(self.m):
            v = t(v) if t2 else F.relu(t(v))

        % self.m = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(3))
        % self.m2 = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2))
        v = a
        for t, t2 in zip(self.m, self.m2):
            v = v + t2(t(v)).relu()

        % self.m = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(3))
        t = [b]
        for t2 in self.m:
            t.append(t2(t[-1]))
        v = torch.stack(t).sum(0) + a

        % self.m = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(3))
        v = sum(layer(a) for layer in self.m)

        % self.m = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(3))
        v = self.m[1](self.m[0](a)) + self.m[-1](b)

        % self.m = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(3))
        v = a
        for t in reversed(self.m[1:]):
            v = t(v)

        % self.m = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(3))
        v = functools.reduce(lambda t, layer: layer(t), self.m, a)

        % self.m = nn.ModuleDict(dict(one=nn.Conv2d(4, 4, 1), two=nn.ReLU()))
        v = self.m['one'](a) + self.m['two'](b)

        % self.m = nn.ModuleDict(dict(one=nn.Conv2d(4, 4, 1), two=nn.BatchNorm2d(4), three=Map()))
        v = a
        for t2, t in self.m.items():
            v = t(v) if t2 != 'two' else v + t(v)

        % self.m = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), Map())
        v = self.m(a)

        % self.m = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.BatchNorm2d(4))
        v = self.m[1](self.m[0](a))

        % self.m = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
        v = self.m[:2](a) + self.m(b)

        % self.m = nn.Sequential(nn.Conv2d(4, 4, 1), nn.GELU())
        v = a
        for t in self.m:
            v = v + t(v)

        % self.m = nn.Sequential(collections.OrderedDict(one=nn.Sequential(nn.ReLU()), two=Map()))
        v = self.m(a)

        % self.m = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        v = a
        for t in self.m.children():
            v = t(v)

        % self.m2 = nn.Conv2d(4, 4, 1)
        % self.m3 = Map()
        v = a
        for t in ('m2', 'm3'):
            v = getattr(self, t)(v)

        % self.m = nn.ParameterList([torch.randn(4), torch.randn(4, 1, 1)])
        v = a * self.m[0].view(4, 1, 1) + self.m[1]

        % self.m = nn.Conv2d(4, 4, 1)
        % self.m2 = [self.m]
        v = self.m2[0](a)

        % self.m = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(3))
        v = self.m[len(self.m) - 1](a) * len(self.m)

        % self.m = nn.Conv2d(4, 4, 3, padding=1)
        v = self.m(a)
        v = self.m(v)

        % self.m = Map()
        v = self.m(self.m(a)) + self.m(b)

        % self.m3, self.m2 = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        % self.m2.weight = self.m3.weight
        v = self.m2(F.relu(self.m3(a)))

        % self.m3 = self.m2 = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        v = self.m2(self.m3(a))

        % self.m = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1))
        v = checkpoint_sequential(self.m, 2, a, use_reentrant=False)
    """,
    "structures": """
        % self.m = Pair()
        v, t = self.m(a)
        v = v + t

        % self.m = Pair()
        v = self.m(a)[1]

        % self.m = Dict()
        v = self.m(a)['main']

        % self.m = Dict()
        t = self.m(a)
        t['main'] = t['main'] + b
        v = sum(t.values())

        % self.m = Named()
        t = self.m(a)
        v = t.main + t[1] if isinstance(t, Result) else t

        % self.m = Listed()
        v = self.m([a, b])

        % self.m = Listed()
        t = [a]
        t.append(b * 0.5)
        v = self.m(t)

        % self.m = Listed()
        v = self.m((a,))

        % self.m = Keyed()
        v = self.m({'one': a, 'two': b})

        % self.m = Options()
        v = self.m(a, b)

        % self.m = Options()
        v = self.m(a, scale=0.5)

        % self.m = Options()
        v = self.m(y=b, x=a) + self.m(a, flip=True)

        % self.m = Options()
        v = self.m(*[a, b], **{'scale': 2.0})

        % self.m = Options()
        v = self.m(a, size=a.shape[-1])

        t = dict(x=a, y=b)
        t.update(x=t['y'])
        v = t.pop('x') + t['y']

        t = [part for part in (a, None, b) if part is not None]
        v = torch.cat(t, 1)[:, :4]

        t = Result(a, [b])
        v = t._replace(main=t.other[0]).main + a
    """,
    "in place": """
        v = a.clone()
        v += b

        v = a * 2
        v.mul_(0.5)

        t = a + 1
        v = t.relu_() + t

        % self.m = nn.Conv2d(4, 4, 3, padding=1)
        t = self.m(a)
        F.relu(t, inplace=True)
        v = t

        % self.m = nn.Conv2d(4, 4, 3, padding=1)
        % self.m2, self.m3 = nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        t = self.m2(self.m(a))
        v = self.m3(t) + t

        % self.m = nn.Conv2d(4, 4, 3, padding=1)
        t = self.m(a)
        t.add_(b)
        v = F.relu(t)

        % self.m = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        t = self.m(a)
        t += b
        v = t

        v = a.clone()
        v[:, 0] = 0

        v = a + 0
        v[:, 1:3] *= b[:, :2].sigmoid()

        v = torch.zeros_like(a)
        v[:, ::2] = a[:, ::2]
        v[:, 1::2].copy_(b[:, 1::2])

        v = torch.empty_like(a).copy_(a) + b

        t = [a, b]
        t[0] = t[0] + t[1]
        v = t[0]

        v = a + 0
        for t in v.unbind(0):
            t.add_(0.5)

        t = a.mul(2)
        t.transpose_(2, 3)
        v = t.mT

        v = a.new_zeros(a.shape).index_add_(1, torch.tensor([0, 2]), b[:, :2]) + a

        a.mul_(0.5)
        v = a

        % self.m = nn.Conv2d(4, 4, 3, padding=1)
        t = self.m(a)
        v = t + torch.sigmoid_(t.clone())
        v.clamp_(-3, 3)

        t = (a + 0)
        t.data.mul_(0.5)
        v = t

        % self.m = nn.ReLU(inplace=True)
        v = torch.add(a, b)
        self.m(v)
    """,
    "state": """
        % self.register_buffer('m', torch.zeros(()))
        self.m += 1
        v = a * self.m

        % self.register_buffer('m', torch.zeros(()))
        self.m.add_(1)
        v = a / self.m

        % self.register_buffer('m', torch.zeros(()))
        self.m = self.m + 1
        v = a / self.m

        % self.register_buffer('m', torch.zeros(4))
        if self.training:
            with torch.no_grad():
                self.m.mul_(0.9).add_(a.mean((0, 2, 3)), alpha=0.1)
        v = a - self.m.view(-1, 1, 1)

        % self.register_buffer('m', torch.zeros(()), persistent=False)
        self.m.copy_(a.detach().mean())
        v = a - self.m

        self.m = a.shape[-1]
        v = a / self.m

        self.m2 = a + b
        v = self.m2 * 0.5

        % self.m = []
        self.m.append(a.shape[-1])
        v = a * 0.5

        % self.m = {}
        if a.shape not in self.m:
            self.m[a.shape] = torch.ones(a.shape[-2:])
        v = a + self.m[a.shape]

        % self.m = torch.full((4, 1, 1), 0.5)
        v = a * self.m

        % self.m = dict(scale=0.5, shift=[1.0, 2.0])
        v = a * self.m['scale'] + self.m['shift'][0]

        % self.m = Scale()
        v = a * self.m.factor + self.m(b)

        % self.m = nn.Conv2d(4, 4, 3, padding=1)
        v = a * self.m.weight.mean()

        % self.m = nn.Conv2d(4, 4, 3, padding=1)
        v = self.m(a) * sum(p.abs().mean() for p in self.m.parameters())

        % self.m2 = nn.Conv2d(4, 4, 1)
        % self.m2.register_forward_hook(functools.partial(scaled, 0.5))
        v = self.m2(a)

        % self.m2 = Map()
        % self.m2.register_forward_pre_hook(halved)
        v = self.m2(a)

        % self.m = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1))
        v = self.m(a)

        % self.m = Map()
        % self.m.requires_grad_(False)
        v = self.m(a)

        % self.m = Map().eval()
        v = self.m(a)

        % self.m = nn.Parameter(torch.ones(1))
        v = a * next(self.parameters()).mean()

        v = torch.cat([self.half(a), self.half(b)[:, :0]], 1) * self.twice
    """,
    "contexts": """
        with torch.no_grad():
            BODY

        with torch.no_grad():
            t = a * 0.5
        v = t + b

        with torch.enable_grad():
            BODY

        with torch.autocast('cpu', dtype=torch.bfloat16):
            BODY
        v = v.float()

        with torch.autocast('cpu', enabled=False):
            BODY

        with contextlib.nullcontext():
            BODY

        with contextlib.ExitStack() as t:
            BODY

        with torch.set_grad_enabled(self.training):
            v = a * 0.5

        % self.m = Map()
        v = checkpoint(self.m, a, use_reentrant=False)

        % self.m = Map()
        v = checkpoint(self.m, a, use_reentrant=True)

        % self.m = Options()
        v = checkpoint(self.m, a, b, use_reentrant=False) if self.training else self.m(a, b)

        % self.m = nn.Conv2d(4, 4, 3, padding=1)
        v = checkpoint(lambda t: F.relu(self.m(t)) + b, a, use_reentrant=False)

        v = checkpoint(self.gate, a, use_reentrant=False)
    """,
    "data": """
        if a.sum() > 0:
            v = a
        else:
            BODY

        v = a / (1 + abs(a.mean().item()))

        v = a - a[a > 0].sum()

        v = a * float(a.detach().abs().max() < 1e6)

        if torch.isnan(a).any():
            raise ValueError('nan')
        v = a

        v = a + len(a.flatten().unique()) * 0.001
    """,
}


@dataclass(frozen=True)
class Statement:
    """Lines of a forward, and those of the `__init__` that it needs."""

    forward: tuple[str, ...]
    init: tuple[str, ...]


def _statements(text: str) -> list[Statement]:
    """The statements of a text, which blank lines part."""
    found = []
    for block in textwrap.dedent(text).strip().split("\n\n"):
        lines = block.splitlines()
        init = tuple(line[2:] for line in lines if line.startswith("% "))
        found.append(Statement(tuple(line for line in lines if not line.startswith("%")), init))
    return found


STATEMENTS = {group: _statements(text) for group, text in _STATEMENTS.items()}


@dataclass(frozen=True)
class _Kind:
    """What a class takes and gives: parameters, lines that name the maps `x` and `y` among them, and the result."""

    parameters: str
    begin: tuple[str, ...]
    result: str


_KINDS = {
    "Map": _Kind("x", ("y = x",), "v"),
    "Pair": _Kind("x", ("y = x",), "v, w"),
    "Dict": _Kind("x", ("y = x",), "{'main': v, 'other': w}"),
    "Named": _Kind("x", ("y = x",), "Result(v, w)"),
    "Aux": _Kind("x", ("y = x",), "(v, w) if self.training else v"),
    "Listed": _Kind("maps", ("x, y = maps[0], maps[-1]",), "v"),
    "Keyed": _Kind("maps", ("x, y = maps['one'], maps.get('two', maps['one'])",), "v"),
    "Options": _Kind(
        "x, y=None, *, scale=1.0, flip=False, size=None, **rest",
        ("y = x * scale if y is None else y", "if flip:", "    x = x.flip(-1)"),
        "v * scale if size is None else v / size",
    ),
}
ROOTS = ("Map", "Pair", "Dict", "Named", "Aux", "Listed", "Keyed", "Options")
_BEGINNINGS: tuple[tuple[str, ...], ...] = (
    (),
    ("if x.shape[-1] < 7:", "    return {}"),
    ("if x.shape[-1] < 5:", "    raise ValueError(f'too small: {{tuple(x.shape)}}')"),
    ("if not self.training and x.shape[-1] > 11:", "    return {}"),
)
_EARLY = {"Pair": "x, y", "Dict": "{'main': x, 'other': y}", "Named": "Result(x, y)"}
_WORDS = re.compile(rf"\b(?:v|a|b|t\d?|m\d?|{'|'.join(_KINDS)})\b")


@dataclass(frozen=True, repr=False)
class Program:
    """A drawn model: its source, the class of the root and the kind of that."""

    source: str
    root: str
    kind: str

    def __repr__(self) -> str:
        return f"<{self.root}>{self.source.removeprefix(_HEADER)}"

    def build(self) -> nn.Module:
        """A new model, its numbers always the same."""
        name = f"<{MODULE} {zlib.crc32(self.source.encode())}>"
        module = sys.modules.get(MODULE)
        if module is None or module.__file__ != name:
            linecache.cache[name] = (len(self.source), None, self.source.splitlines(keepends=True), name)
            module = sys.modules[MODULE] = ModuleType(MODULE)
            module.__file__ = name
            exec(compile(self.source, name, "exec"), module.__dict__)
        torch.manual_seed(0)
        made: nn.Module = getattr(module, self.root)()
        return made

    def example(self, batch: int = 2, height: int = 8, width: int = 8) -> Any:
        """Example inputs, as `apply_recipe` takes them."""
        return self.examples(batch, height, width)[0]

    def examples(self, batch: int = 2, height: int = 8, width: int = 8) -> list[Any]:
        """The example inputs, and other ways to call the model with tensors of these sizes."""
        generator = torch.Generator().manual_seed(height)
        x, y = torch.randn(2, batch, CHANNELS, height, width, generator=generator)
        both = {"x": x, "y": y}
        ways: dict[str, list[Any]] = {
            "Listed": [([x, y],), ((x,),), ([x, x, y],)],
            "Keyed": [({"one": x, "two": y},), ({"two": y, "one": x},), ({"one": y},)],
            "Options": [both | {"scale": 0.5}, both | {"scale": 2.0, "flip": True}, {"x": x, "size": 4}],
        }
        return ways.get(self.kind, [x])


def run(model: nn.Module, example: Any) -> Any:
    """Call a model on example inputs of any form; one more result lets `backward` run where no other takes part."""
    copied = torch.utils._pytree.tree_map_only(Tensor, torch.clone, example)
    if isinstance(copied, Tensor):
        result = model(copied)
    else:
        result = model(**copied) if isinstance(copied, dict) else model(*copied)
    return [result, torch.zeros((), requires_grad=True)]


def program(forward: str) -> Program:
    """A model of one class whose forward takes `x` and has these lines."""
    source = f"{_HEADER}\nclass Map0(Net):\n    def forward(self, x):\n{forward}\n"
    return Program(source, "Map0", "Map")


@st.composite
def programs(draw: st.DrawFn, group: str) -> Program:
    """Models that do the things of one group of statements, among others."""
    writer = _Writer(draw, group)
    kind = draw(st.sampled_from(ROOTS))
    root = writer.new_class(kind, 2)
    return Program("\n".join([_HEADER, *writer.classes]), root, kind)


@dataclass
class _Class:
    """The class under construction: what its `__init__` does, and how many names it has given out."""

    depth: int
    init: list[str] = field(default_factory=list)
    names: int = 0


class _Writer:
    """Draws classes, the inner ones first."""

    def __init__(self, draw: st.DrawFn, group: str) -> None:
        self.draw = draw
        self.group = group
        self.classes: list[str] = []
        self.by_kind: dict[str, list[str]] = {}

    def new_class(self, kind: str, depth: int) -> str:
        """Write a class of a kind that holds others down to a depth; give its name."""
        cls = _Class(depth)
        rules = _KINDS[kind]
        early = self.draw(st.sampled_from(_BEGINNINGS)) if self.draw(st.integers(0, 4)) == 4 else ()
        result = _EARLY.get(kind, "x")
        lines = [*rules.begin, *(line.format(result) if "return" in line else line.format() for line in early)]
        body, maps = self.statements(cls, ["x", "y"], self.draw(st.integers(1, 4)))
        other = self.draw(st.sampled_from(maps))
        returned = re.sub(r"\b[vw]\b", lambda word: {"v": maps[-1], "w": other}[word.group()], rules.result)
        name = f"{kind}{len(self.classes)}"
        forward = [*lines, *body, f"return {returned}"]
        self.classes.append(_rendered(name, rules.parameters, cls.init, forward))
        self.by_kind.setdefault(kind, []).append(name)
        return name

    def statements(self, cls: _Class, maps: list[str], count: int) -> tuple[list[str], list[str]]:
        """Draw statements over some maps; give their lines, and the maps that are there after them."""
        lines, maps = [], list(maps)
        for _ in range(count):
            made, new = self.statement(cls, maps)
            lines += made
            maps.append(new)
        return lines, maps

    def statement(self, cls: _Class, maps: list[str]) -> tuple[list[str], str]:
        """Draw one statement; give its lines and the map that it makes."""
        of_group = self.draw(st.booleans())
        group = self.group if of_group else self.draw(st.sampled_from(list(STATEMENTS)))
        drawn = self.draw(st.sampled_from(STATEMENTS[group]))
        names = self.names_for(cls, maps)
        lines = [line for each in drawn.forward for line in self.filled(cls, each, names)]
        cls.init += [self.replaced(cls, each, names) for each in drawn.init]
        return lines, names["v"]

    def names_for(self, cls: _Class, maps: list[str]) -> dict[str, str]:
        """What the words of one statement stand for."""
        cls.names += 1
        number = cls.names
        near = st.sampled_from(maps[::-1])
        names = {"v": f"v{number}", "a": self.draw(near), "b": self.draw(near)}
        for letter in "tm":
            names |= {f"{letter}{index}": f"{letter}{number}_{index}" for index in range(2, 6)}
            names[letter] = f"{letter}{number}"
        return names

    def filled(self, cls: _Class, line: str, names: dict[str, str]) -> list[str]:
        """A line with its words replaced, or the statements that stand for BODY."""
        if line.strip() != "BODY":
            return [self.replaced(cls, line, names)]
        inner = [names["a"], names["b"]]
        lines, maps = self.statements(cls, inner, self.draw(st.integers(0, 2)) if cls.names < 8 else 0)
        last = maps[-1] if lines else names["a"]
        return textwrap.indent("\n".join([*lines, f"{names['v']} = {last}"]), line[: -len("BODY")]).splitlines()

    def replaced(self, cls: _Class, line: str, names: dict[str, str]) -> str:
        return _WORDS.sub(lambda word: names.get(word.group()) or self.class_of(cls, word.group()), line)

    def class_of(self, cls: _Class, kind: str) -> str:
        """A class of a kind: one that there is already, a new one, or below a depth the smallest."""
        there = self.by_kind.get(kind, [])
        if there and (cls.depth == 0 or self.draw(st.booleans())):
            return self.draw(st.sampled_from(there))
        if cls.depth > 0:
            return self.new_class(kind, cls.depth - 1)
        return "Scale" if kind == "Map" else self.smallest(kind)

    def smallest(self, kind: str) -> str:
        """A class of a kind that does one thing."""
        rules = _KINDS[kind]
        name = f"{kind}{len(self.classes)}"
        returned = re.sub(r"\b[vw]\b", lambda word: {"v": "F.relu(y)", "w": "x"}[word.group()], rules.result)
        self.classes.append(_rendered(name, rules.parameters, [], [*rules.begin, f"return {returned}"]))
        return name


def _rendered(name: str, parameters: str, init: list[str], forward: list[str]) -> str:
    lines = [f"class {name}(Net):"]
    if init:
        lines += ["    def __init__(self):", "        super().__init__()", *(f"        {line}" for line in init), ""]
    lines += [f"    def forward(self, {parameters}):", *(f"        {line}" for line in forward), ""]
    return "\n".join(lines)
