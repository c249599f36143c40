"""ADL against its formula in NumPy: the coin, what the mask hides, and what flows through the importance map."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from dropsurgery import apply_recipe
from dropsurgery.errors import SurgeryError
from dropsurgery.regularizers.adl import ADL, attention_dropout

NEVER = 1e-30  # a rate at which the mask is never drawn, and the map still is weighed


def shown(x: np.ndarray, gamma: float) -> np.ndarray:
    """Where the drop mask is 1, sample by sample."""
    mask = np.zeros((len(x), 1, *x.shape[2:]))
    for sample, maps in zip(mask, x, strict=True):
        attention = maps.mean(0)
        sample[0] = attention < gamma * attention.max()
    return mask


def importance(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x.mean(1, keepdims=True)))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("shape", [(4, 5, 7, 9), (1, 1, 3, 2), (3, 2, 1, 1)])
def test_the_mask_hides_the_most_active_area(shape: tuple[int, ...], gamma: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64)
    y = attention_dropout(x, 1.0, gamma).numpy()
    assert np.array_equal(y, x.numpy() * shown(x.numpy(), gamma))


def test_other_masks_fail_the_same_check() -> None:
    """The negative controls: hiding the least active area, and a maximum over the whole batch."""
    torch.manual_seed(0)
    x = torch.rand(4, 5, 7, 9, dtype=torch.float64).numpy()
    y, mask = attention_dropout(torch.from_numpy(x), 1.0, 0.9).numpy(), shown(x, 0.9)
    over_batch = x.mean(1, keepdims=True) < 0.9 * x.mean(1).max()
    assert not np.array_equal(y, x * (1 - mask)) and not np.array_equal(y, x * over_batch)


def test_the_importance_map_weighs_what_is_not_hidden() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 5, 7, 9, dtype=torch.float64)
    y = attention_dropout(x, NEVER)
    assert np.allclose(y.numpy(), x.numpy() * importance(x.numpy()), rtol=1e-12)


def test_one_coin_a_batch() -> None:
    """Heads with probability p, and the same for all samples; a coin for each sample would fail."""
    torch.manual_seed(0)
    p, times = 0.75, 4000
    x = torch.rand(3, 2, 4, 4) + 0.1
    heads = torch.stack([(attention_dropout(x, p) == 0).flatten(1).any(1) for _ in range(times)])
    assert torch.equal(heads, heads[:, :1].expand_as(heads))
    assert abs(heads[:, 0].double().mean() - p) <= 4 * math.sqrt(p * (1 - p) / times)


def test_gradient_flows_through_the_importance_map() -> None:
    """d/dx of sum x s(a) is s + sum_c x s (1 - s) / C; without the second term (the control) it is another."""
    torch.manual_seed(0)
    x = torch.randn(4, 5, 7, 9, dtype=torch.float64, requires_grad=True)
    attention_dropout(x, NEVER).sum().backward()
    values = x.detach().numpy()
    s = importance(values)
    expected = s + values.sum(1, keepdims=True) * s * (1 - s) / values.shape[1]
    assert np.allclose(x.grad.numpy(), expected, rtol=1e-10)
    assert not np.allclose(x.grad.numpy(), np.broadcast_to(s, values.shape), rtol=1e-3)


def test_gradient_of_the_mask_is_the_mask() -> None:
    x = torch.randn(4, 5, 7, 9, requires_grad=True)
    attention_dropout(x, 1.0).sum().backward()
    assert torch.equal(x.grad, torch.from_numpy(shown(x.detach().numpy(), 0.9)).float().expand_as(x))


@pytest.mark.parametrize("p", [NEVER, 1.0])
def test_derivatives_to_the_second(p: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: attention_dropout(x, p), x)
    assert torch.autograd.gradgradcheck(lambda x: attention_dropout(x, p), x)


def test_maps_at_and_below_zero() -> None:
    """All below 0: nothing is above gamma times the maximum. A maximum of 0: what is 0 goes. All 0: all goes."""
    below = -torch.rand(2, 3, 4, 4) - 0.1
    assert torch.equal(attention_dropout(below, 1.0), below)
    touching = below.clone()
    touching[:, :, 1, 2] = 0
    assert torch.equal(attention_dropout(touching, 1.0), touching)
    assert not attention_dropout(torch.zeros(2, 3, 4, 4), 1.0).any()
    assert not attention_dropout(torch.ones(2, 3, 4, 4), 1.0).any()


@pytest.mark.parametrize("p", [NEVER, 1.0])
def test_sums_beyond_float16(p: float) -> None:
    """2048 channels of 60000 add up to far more than 65504; a sum in float16 is infinite."""
    x = torch.full((1, 2048, 2, 2), 60000.0, dtype=torch.float16)
    x[..., 0, 0] = 0
    x.requires_grad_()
    y = attention_dropout(x, p)
    y.float().sum().backward()
    assert y.dtype == torch.float16 and y.isfinite().all() and x.grad.isfinite().all()
    assert torch.equal(y == 0, (x == 0) if p == NEVER else torch.ones_like(x, dtype=torch.bool))
    assert x.detach().sum(1).isinf().any()  # as the attention would be, and the gradient of the importance map


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_hides_what_float32_hides(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.rand(8, 64, 14, 14).to(dtype)
    assert torch.equal(attention_dropout(x, 1.0), attention_dropout(x.float(), 1.0).to(dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attention_dropout(x, 1.0), attention_dropout(x.float(), 1.0).to(dtype))


@pytest.mark.parametrize("p", [NEVER, 1.0])
def test_channels_at_the_end(p: float) -> None:
    torch.manual_seed(0)
    x = torch.rand(4, 6, 5, 7)
    layer = ADL(p)
    layer.build(channel_axis=-1, channels=6, shape=(4, 5, 7, 6), site_id="a")
    assert torch.allclose(layer(x.movedim(1, -1)).movedim(-1, 1), attention_dropout(x, p), rtol=1e-6)
    last = attention_dropout(x.to(memory_format=torch.channels_last), p)
    assert torch.allclose(last, attention_dropout(x, p), rtol=1e-6)
    assert last.is_contiguous(memory_format=torch.channels_last)


def test_a_sample_does_not_hang_on_the_others() -> None:
    x, other = torch.rand(2, 3, 5, 5), torch.rand(2, 3, 5, 5)
    mixed = torch.cat([x[:1], 10 * other[1:]])
    for p in (NEVER, 1.0):
        assert torch.equal(attention_dropout(mixed, p)[0], attention_dropout(x, p)[0])


def test_refusals() -> None:
    for bad in (-0.1, 1.5, True, "0.9"):
        with pytest.raises(SurgeryError, match=r"gamma: expected a number in \[0, 1\], got"):
            ADL(gamma=bad)
    with pytest.raises(SurgeryError, match="input of adl: expected 4 dimensions"):
        attention_dropout(torch.ones(2, 3, 4), 0.5)
    with pytest.raises(SurgeryError, match=r"adl at a: expected maps .*\(2, 196, 64\).*; use dropout there"):
        ADL().build(channel_axis=-1, channels=64, shape=(2, 196, 64), site_id="a")
    for shape, axis in (((2, 64, 1, 1), 1), ((2, 1, 1, 64), -1)):
        with pytest.raises(SurgeryError, match="adl at a: expected maps of more than one point"):
            ADL().build(channel_axis=axis, channels=64, shape=shape, site_id="a")


def test_repr_and_share() -> None:
    assert repr(ADL()) == "ADL(p=0.75, gamma=0.9)"
    assert ADL(0.5).expected_drop((2, 3, 4, 4)) == 0.5


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = torch.nn.Conv2d(4, 4, 3, padding=1), torch.nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x) + x)


def test_behind_the_activation_of_a_block() -> None:
    """Where the recipe adl_resnet puts it: what follows the block's last ReLU is masked, and eval is as before."""
    torch.manual_seed(0)
    net, x = torch.nn.Sequential(Block(), torch.nn.Flatten(), torch.nn.Linear(4 * 64, 2)), torch.randn(2, 4, 8, 8)
    entry = {"name": "end", "pattern": "block_end", "insert": "adl", "with": {"p": 1.0}}
    recipe = {"version": 1, "name": "r", "patterns": {"block_end": ["add", "activation"]}, "entries": [entry]}
    gm = apply_recipe(net, recipe, example_inputs=x)
    expected = net[2](net[1](attention_dropout(net[0](x), 1.0)))
    assert torch.equal(gm.train()(x), expected) and torch.equal(gm.eval()(x), net(x))
