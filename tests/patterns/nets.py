"""Small nets for the cases at the border: a thing in another spelling, and what only looks like it.

`NETS[name]` is a `ZooModel`; most are one forward, written as a function of the module and its input.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo import ZooModel


class Net(nn.Module):
    """Some layers, and a forward that is a function of them and the input."""

    def __init__(self, function: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def pair(inputs: int, outputs: int) -> nn.Sequential:
    """Two convolutions without padding, as in the U-Net paper."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3), nn.ReLU(), nn.Conv2d(outputs, outputs, 3), nn.ReLU())


def crop(skip: Tensor, like: Tensor) -> Tensor:
    edge = (skip.shape[2] - like.shape[2]) // 2
    return skip[:, :, edge : edge + like.shape[2], edge : edge + like.shape[3]]


class ValidUNet(nn.Module):
    """The original U-Net on three levels: the skips are cropped, there are no norms."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.bottom = pair(3, 8), pair(8, 16), pair(16, 32)
        self.up2, self.up1 = nn.ConvTranspose2d(32, 16, 2, 2), nn.ConvTranspose2d(16, 8, 2, 2)
        self.merge2, self.merge1 = pair(32, 16), pair(16, 8)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.down1(x)
        second = self.down2(F.max_pool2d(first, 2))
        x = self.up2(F.dropout(self.bottom(F.max_pool2d(second, 2)), 0.5, self.training))
        x = self.up1(self.merge2(torch.cat((crop(second, x), x), 1)))
        return self.head(self.merge1(torch.cat((crop(first, x), x), 1)))


def strided_pair(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    convs = nn.Conv2d(inputs, outputs, 3, stride, 1), nn.Conv2d(outputs, outputs, 3, 1, 1)
    norms = nn.InstanceNorm2d(outputs, affine=True), nn.InstanceNorm2d(outputs, affine=True)
    return nn.Sequential(convs[0], norms[0], nn.LeakyReLU(), convs[1], norms[1], nn.LeakyReLU())


class StridedUNet(nn.Module):
    """nnU-Net's way down, with the stride in a level's first convolution; a resize and a convolution on the way up."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.bottom = strided_pair(3, 8, 1), strided_pair(8, 16, 2), strided_pair(16, 32, 2)
        self.up2, self.up1 = nn.Conv2d(32, 16, 3, padding=1), nn.Conv2d(16, 8, 3, padding=1)
        self.merge2, self.merge1 = strided_pair(32, 16, 1), strided_pair(16, 8, 1)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.down1(x)
        second = self.down2(first)
        x = F.leaky_relu(self.up2(F.interpolate(self.bottom(second), scale_factor=2.0)))
        x = self.merge2(torch.cat([second, x], 1))
        x = F.leaky_relu(self.up1(F.interpolate(x, scale_factor=2.0)))
        return self.head(self.merge1(torch.cat([first, x], dim=-3)))


def _attention(net: nn.Module, x: Tensor) -> Tensor:
    """Written out with `einsum`, the softmax a method, one layer each for queries, keys and values."""
    q, k, v = (layer(x).unflatten(-1, (2, 8)) for layer in (net.q, net.k, net.v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * 8**-0.5
    weights = F.dropout(scores.softmax(-1), 0.1, net.training)
    return x + net.out(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2))


def _linear_attention(net: nn.Module, x: Tensor) -> Tensor:
    q, k, v = net.qkv(x).chunk(3, -1)
    return x + net.out(F.relu(q) @ (F.relu(k).mT @ v))


def _torch_attention(net: nn.Module, x: Tensor) -> Tensor:
    y = net.norm(x)
    return x + net.attention(y, y, y, need_weights=False)[0]


def _softmax_of_logits(net: nn.Module, x: Tensor) -> Tensor:
    """A softmax over experts, and a product of two tensors; no values are weighted by it."""
    return net.out(x) * net.gate(x).softmax(-1)[..., :1] + (x @ x.mT) @ net.weight


def _swiglu(net: nn.Module, x: Tensor) -> Tensor:
    return x + net.down(F.silu(net.gate(x)) * net.up(x))


def _packed_glu(net: nn.Module, x: Tensor) -> Tensor:
    gate, value = net.up(x).chunk(2, dim=-1)
    return x + net.down(net.norm(F.gelu(gate) * value))


def _two_in_a_row(net: nn.Module, x: Tensor) -> Tensor:
    """Three layers: two hidden tensors, the second read by a skip too."""
    hidden = F.relu(net.first(x))
    second = torch.tanh(net.second(hidden))
    return net.third(second) + second


def _gelu_written(net: nn.Module, x: Tensor) -> Tensor:
    h = net.up(x)
    return net.down(0.5 * h * (1 + torch.tanh(0.79788 * (h + 0.044715 * h**3))))


def _frozen(net: nn.Module, x: Tensor) -> Tensor:
    """Norms that are a product and a sum with buffers, activations written out."""
    x = net.conv1(x) * net.scale.reshape(1, -1, 1, 1) + net.bias.reshape(1, -1, 1, 1)
    x = net.norm(net.conv2(x * torch.sigmoid(1.702 * x)))
    x = net.conv3(x * F.relu6(x + 3) / 6)
    return net.layer_norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).relu()


def _frozen_net() -> nn.Module:
    net = Net(_frozen, conv1=nn.Conv2d(3, 8, 3), conv2=nn.Conv2d(8, 8, 3), conv3=nn.Conv2d(8, 8, 3))
    net.norm, net.layer_norm = nn.BatchNorm2d(8), nn.LayerNorm(8)
    net.register_buffer("scale", torch.ones(8))
    net.register_buffer("bias", torch.zeros(8))
    return net


def _gates(net: nn.Module, x: Tensor) -> Tensor:
    """Two channel gates (linear layers; one convolution over the channels), then four that are something else."""
    x = net.stem(x)
    x = x * torch.sigmoid(net.expand(F.relu(net.reduce(x.mean((2, 3)))))).view(x.shape[0], -1, 1, 1).expand_as(x)
    squeezed = F.adaptive_avg_pool2d(x, 1).view(x.shape[0], 1, -1)
    x = x * F.hardsigmoid(net.across(squeezed)).view(x.shape[0], -1, 1, 1)
    other = net.other(x)
    x = other * torch.sigmoid(net.point(F.adaptive_avg_pool2d(x, 1)))  # of another tensor
    x = x * torch.sigmoid(net.spatial(x))  # for each position
    x = x * torch.sigmoid(x.mean((2, 3), keepdim=True))  # without a layer
    return x * torch.softmax(net.point(x.mean((2, 3), keepdim=True)), 1)  # shared by the channels


def _gates_net() -> nn.Module:
    convs = {"stem": nn.Conv2d(3, 8, 3), "other": nn.Conv2d(8, 8, 1), "spatial": nn.Conv2d(8, 1, 7, padding=3)}
    layers = {"reduce": nn.Linear(8, 2), "expand": nn.Linear(2, 8), "across": nn.Conv1d(1, 1, 3, padding=1)}
    return Net(_gates, **convs, **layers, point=nn.Conv2d(8, 8, 1))


def _pools(net: nn.Module, x: Tensor) -> Tensor:
    """Five over positions, the last of tokens; three over channels, over one axis and of everything."""
    x = F.avg_pool2d(F.max_pool2d(net.conv(x), 2), 2)
    x = x * torch.mean(x, dim=[-2, -1], keepdim=True) + x.amax((2, 3), keepdim=True)
    x = (x - x.mean(1, keepdim=True)) * x.mean(2, keepdim=True) + x.mean()
    return net.head(x.flatten(2).transpose(1, 2)).mean(1)


def _recurrent(net: nn.Module, x: Tensor) -> Tensor:
    """Two in a row, one of them of two layers; then the last state of a third. The cell is none."""
    x, _ = net.lstm(net.up(x))
    x, state = net.gru(x)
    _, last = net.rnn(x, state[-1:])
    return net.cell(last.squeeze(0))


def _words(net: nn.Module, x: Tensor) -> Tensor:
    """Two of the input's words, by layer and by function; that of the positions does not hang on the input."""
    words = x.argmax(-1)
    places = net.places(torch.arange(x.shape[1]))
    return net.head(net.words(words) + F.embedding(words, net.table) + places)


def _unrolled(net: nn.Module, x: Tensor) -> Tensor:
    """A cell, step by step."""
    state = None
    for step in range(x.shape[1]):
        state = net.cell(x[:, step], state)
    return net.head(state[0])


def _resizes(net: nn.Module, x: Tensor) -> Tensor:
    """Four that enlarge; one that shrinks, one that keeps the size, a transposed convolution of stride 1."""
    x = F.interpolate(net.conv(x), scale_factor=0.5)
    x = net.same(F.interpolate(x, size=x.shape[2:]))
    x = F.interpolate(net.up(x), scale_factor=2.0, mode="bilinear")
    return F.pixel_shuffle(net.upsample(x), 2)


def _heads(net: nn.Module, x: Tensor) -> Tensor:
    """Two classifiers, one of them a convolution and both averaged, on features behind a hidden layer."""
    x = F.adaptive_avg_pool2d(F.relu(net.norm(net.stem(x))), 1)
    features = torch.tanh(net.hidden(x.flatten(1)))
    return (net.linear(features) + net.conv(features[:, :, None, None]).flatten(1)) / 2


def _segmenter(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """A head for each pixel, which is no classifier, and one for the image, which is."""
    deep = F.relu(net.deep(F.relu(net.stem(x))))
    up = F.interpolate(deep, scale_factor=2.0)
    return net.pixels(F.relu(net.merge(up))), net.image(deep.mean((2, 3)))


def _pre_activation_written(net: nn.Module, x: Tensor) -> Tensor:
    """Functional, with GELU and dropout between; then a post-activation block, whose units are none."""
    x = net.stem(x)
    x = x + net.conv1(F.dropout(F.gelu(net.norm1(x)), 0.1, net.training))
    y = F.relu(net.norm2(net.conv2(x)))
    return F.relu(net.norm3(net.conv3(y)) + x)


def _patches(net: nn.Module, x: Tensor) -> Tensor:
    """Cut out before, then a linear layer; a second one on the tokens is no embedding."""
    batch, channels, height, width = x.shape
    x = x.reshape(batch, channels, height // 8, 8, width // 8, 8).permute(0, 2, 4, 3, 5, 1)
    return net.head(net.embed(x.reshape(batch, -1, 64 * channels)) + net.position)


def _patches_net() -> nn.Module:
    net = Net(_patches, embed=nn.Linear(192, 16), head=nn.Linear(16, 4))
    net.position = nn.Parameter(torch.zeros(1, 16, 16))
    return net


def _two_inputs_of_one(net: nn.Module, x: Tensor) -> Tensor:
    """The image scaled, then read by two convolutions."""
    x = (x - 0.5) / 0.25
    return F.relu(net.norm(net.left(x))) + net.right(x)


def _nested_dense(net: nn.Module, x: Tensor) -> Tensor:
    """A concatenation of one's own with what was made of it, once: no dense block."""
    x = net.stem(x)
    x = torch.cat([x, F.relu(net.cheap(x))], 1)
    return net.out(torch.cat([F.relu(net.one(x)), F.relu(net.two(x)), x.amax(1, keepdim=True)], 1))


_TOKENS = (2, 16, 16)
_IMAGE = (2, 3, 32, 32)


def _tokens(function: Callable[..., Tensor], **sizes: tuple[int, int]) -> ZooModel:
    def build() -> nn.Module:
        return Net(function, **{name: nn.Linear(*size) for name, size in sizes.items()})

    return ZooModel(build, _TOKENS)


def _torch_attention_net() -> nn.Module:
    return Net(_torch_attention, norm=nn.LayerNorm(16), attention=nn.MultiheadAttention(16, 2, batch_first=True))


def _logits_net() -> nn.Module:
    net = Net(_softmax_of_logits, out=nn.Linear(16, 16), gate=nn.Linear(16, 4))
    net.weight = nn.Parameter(torch.randn(16, 16))
    return net


def _packed_net() -> nn.Module:
    return Net(_packed_glu, up=nn.Linear(16, 64), norm=nn.LayerNorm(32), down=nn.Linear(32, 16))


def _recurrent_net() -> nn.Module:
    lstm, gru = nn.LSTM(16, 8, batch_first=True), nn.GRU(8, 8, num_layers=2, batch_first=True)
    return Net(
        _recurrent, up=nn.Linear(16, 16), lstm=lstm, gru=gru, rnn=nn.RNN(8, 8, batch_first=True), cell=nn.GRUCell(8, 8)
    )


def _words_net() -> nn.Module:
    net = Net(_words, words=nn.Embedding(16, 8), places=nn.Embedding(16, 8), head=nn.Linear(8, 16))
    net.table = nn.Parameter(torch.randn(16, 8))
    return net


def _mlp_mix() -> nn.Module:
    """A GLU layer; then a depthwise convolution over the tokens before the activation, as in PVT v2."""
    glu = nn.Sequential(nn.Linear(16, 32), nn.GLU(), nn.Linear(16, 16))
    depthwise = nn.Conv1d(32, 32, 3, padding=1, groups=32)

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        return net.fc2(F.gelu(net.depthwise(net.fc1(net.glu(x)).transpose(1, 2)).transpose(1, 2)))

    return Net(forward, glu=glu, fc1=nn.Linear(16, 32), depthwise=depthwise, fc2=nn.Linear(32, 16))


def _point_convs() -> nn.Module:
    """1x1 convolutions: an MLP with batch norms; a row of two that goes on with an activation, which is none."""
    mlp = [nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.GELU(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)]
    row = [nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU()]
    return nn.Sequential(*mlp, *row, nn.Conv2d(8, 8, 3))


def _conv(*sizes: int, **options: int) -> Callable[[], nn.Module]:
    return partial(nn.Conv2d, *sizes, **options)  # type: ignore[arg-type]


def _images(function: Callable[..., object], **layers: Callable[[], nn.Module]) -> ZooModel:
    return ZooModel(lambda: Net(function, **{name: make() for name, make in layers.items()}), _IMAGE)  # type: ignore[arg-type]


class SoftTree(nn.Module):
    """A decision node whose subtrees are others, or linear experts."""

    def __init__(self, depth: int, *, mirrored: bool = False) -> None:
        super().__init__()
        self.gate, self.mirrored = nn.Linear(16, 1), mirrored
        make = (lambda: nn.Linear(16, 4)) if depth == 1 else (lambda: SoftTree(depth - 1, mirrored=mirrored))
        self.left, self.right = make(), make()

    def forward(self, x: Tensor) -> Tensor:
        if self.mirrored:  # the same in other words
            share = F.dropout(torch.sigmoid(self.gate(x)), 0.1, self.training).expand(-1, -1, 4)
            return torch.add(torch.rsub(share, 1).mul(self.right(x)), torch.mul(self.left(x), share))
        share = self.gate(x).sigmoid()
        return share * self.left(x) + (1 - share) * self.right(x)


def _stacked_tree(net: Net, x: Tensor) -> Tensor:
    """The gates of all nodes by one layer."""
    share = net.gates(x).sigmoid()
    first, second = share[..., :1], share[..., 1:]
    return first * net.left(x) + (1 - first) * second * net.right(x)


def _half_mixtures(net: Net, x: Tensor) -> Tensor:
    """One product without the other; both, and a norm between them and their sum."""
    x = x * net.one(x).sigmoid()
    share = net.two(x).sigmoid()
    return net.norm(share * net.left(x)) + (1 - share) * net.right(x)


def _half_mixtures_net() -> nn.Module:
    linear = {"left": nn.Linear(16, 4), "right": nn.Linear(16, 4)}
    return Net(_half_mixtures, one=nn.Linear(16, 1), two=nn.Linear(16, 1), norm=nn.LayerNorm(4), **linear)


NETS: dict[str, ZooModel] = {
    "valid_unet": ZooModel(ValidUNet, (2, 3, 92, 92)),
    "strided_unet": ZooModel(StridedUNet, (2, 3, 32, 32)),
    "einsum_attention": _tokens(_attention, q=(16, 16), k=(16, 16), v=(16, 16), out=(16, 16)),
    "linear_attention": _tokens(_linear_attention, qkv=(16, 48), out=(16, 16)),
    "torch_attention": ZooModel(_torch_attention_net, _TOKENS),
    "softmax_of_logits": ZooModel(_logits_net, _TOKENS),
    "swiglu": _tokens(_swiglu, gate=(16, 32), up=(16, 32), down=(32, 16)),
    "packed_glu": ZooModel(_packed_net, _TOKENS),
    "two_in_a_row": _tokens(_two_in_a_row, first=(16, 32), second=(32, 16), third=(16, 16)),
    "gelu_written": _tokens(_gelu_written, up=(16, 32), down=(32, 16)),
    "mlp_mix": ZooModel(_mlp_mix, _TOKENS),
    "point_convs": ZooModel(_point_convs, _IMAGE),
    "frozen": ZooModel(_frozen_net, _IMAGE),
    "gates": ZooModel(_gates_net, _IMAGE),
    "pools": _images(_pools, conv=_conv(3, 8, 3), head=partial(nn.Linear, 8, 4)),
    "recurrent": ZooModel(_recurrent_net, _TOKENS),
    "words": ZooModel(_words_net, _TOKENS),
    "unrolled": ZooModel(lambda: Net(_unrolled, cell=nn.LSTMCell(16, 8), head=nn.Linear(8, 4)), _TOKENS),
    "resizes": _images(
        _resizes,
        conv=_conv(3, 8, 3, padding=1),
        same=partial(nn.ConvTranspose2d, 8, 8, 3, padding=1),
        up=partial(nn.ConvTranspose2d, 8, 8, 2, 2),
        upsample=partial(nn.Upsample, scale_factor=2),
    ),
    "heads": _images(
        _heads,
        stem=_conv(3, 8, 3),
        norm=partial(nn.BatchNorm2d, 8),
        hidden=partial(nn.Linear, 8, 8),
        linear=partial(nn.Linear, 8, 4),
        conv=_conv(8, 4, 1),
    ),
    "segmenter": _images(
        _segmenter,
        stem=_conv(3, 8, 3, 1, 1),
        deep=_conv(8, 8, 3, 2, 1),
        merge=_conv(8, 8, 3, 1, 1),
        pixels=_conv(8, 2, 1),
        image=partial(nn.Linear, 8, 4),
    ),
    "pre_activation_written": _images(
        _pre_activation_written,
        stem=_conv(3, 8, 3),
        norm1=partial(nn.GroupNorm, 2, 8),
        conv1=_conv(8, 8, 3, 1, 1),
        norm2=partial(nn.BatchNorm2d, 8),
        conv2=_conv(8, 8, 3, 1, 1),
        norm3=partial(nn.BatchNorm2d, 8),
        conv3=_conv(8, 8, 3, 1, 1),
    ),
    "soft_tree": ZooModel(partial(SoftTree, 2), _TOKENS),
    "soft_tree_written": ZooModel(partial(SoftTree, 2, mirrored=True), _TOKENS),
    "stacked_tree": _tokens(_stacked_tree, gates=(16, 2), left=(16, 4), right=(16, 4)),
    "half_mixtures": ZooModel(_half_mixtures_net, _TOKENS),
    "patches": ZooModel(_patches_net, _IMAGE),
    "two_readers": _images(
        _two_inputs_of_one, left=_conv(3, 8, 3), right=_conv(3, 8, 3), norm=partial(nn.BatchNorm2d, 8)
    ),
    "one_concat": _images(
        _nested_dense,
        stem=_conv(3, 8, 3),
        cheap=_conv(8, 8, 3, 1, 1),
        one=_conv(16, 8, 1),
        two=_conv(16, 8, 1),
        out=_conv(17, 4, 1),
    ),
}
"""Every net by name."""
