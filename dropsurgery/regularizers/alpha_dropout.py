"""Alpha dropout: dropout that keeps mean 0 and variance 1 after SELU (Klambauer et al. 2017, arXiv:1706.02515).

    x → a * (x * M + low * (1 - M)) + b      M ~ Bernoulli(1 - p), one draw an element
    low = -1.7581, what SELU gives at -infinity;  a = ((1 - p) * (1 + p * low^2))^-1/2;  b = -a * p * low

The dropped take SELU's lowest value instead of 0, which the paper writes alpha', and the affine step gives the
output the mean and variance that an input of mean 0 and variance 1 has. The paper writes q = 1 - p. The same as
torch.nn.AlphaDropout; `channels: true` draws once for a channel of a sample, as torch.nn.FeatureAlphaDropout
does. Placement: after SELU; after other activations mean and variance are not kept (recipes/alpha_dropout_selu.yaml;
no model of timm or SMP has a SELU as it is built by name, but most take one: `act_layer="selu"`).
"""

from __future__ import annotations

from torch import Tensor

from dropsurgery.regularizers._base import Rate, rate_tensor, require
from dropsurgery.regularizers._maps import TOKENS, MapRegularizer, channels_at
from dropsurgery.regularizers._taxonomy import Taxonomy
from dropsurgery.regularizers._uniform import keep_scale
from dropsurgery.regularizers.dropout import drop

LOW = -1.0507009873554805 * 1.6732632423543772  # minus SELU's scale and alpha


def alpha_dropout(
    x: Tensor,
    p: float | Tensor,
    *,
    channels: bool = False,
    channel_axis: int | None = None,
    key: Tensor | None = None,
) -> Tensor:
    """Set each element of `x` to SELU's lowest value with probability `p`, and keep mean 0 and variance 1.

    With `channels`, whole channels of a sample: `x` is then (B, C, H, W) or (B, C, D, H, W), or has its channels
    at `channel_axis`, which has to be given at rank 3. `key`, a 0-dim int64 CPU tensor, is what the random numbers
    depend on; None for torch's global generator. A SurgeryError if `p` is a number out of [0, 1].
    """
    rate = rate_tensor(p, x.device)
    # Seen from the lowest value it is plain dropout; in float32, as small numbers would be lost in bfloat16.
    raised = (x if x.itemsize > 2 else x.float()) - LOW
    if channels:
        axis = channels_at(x, channel_axis, "alpha_dropout")
        shape = [x.shape[i] if i in (0, axis) else 1 for i in range(x.dim())]
        dropped = raised * keep_scale(shape, rate, raised, key)
    else:
        dropped = drop(raised, rate, key, in_place=True)
    return dropped.add_(LOW).mul_(((1 - rate) / (1 + rate * LOW**2)).sqrt()).to(x.dtype)


class AlphaDropout(MapRegularizer):
    """`alpha_dropout` as a layer; identity in eval."""

    paper = "Klambauer et al.: Self-Normalizing Neural Networks, NeurIPS 2017, arXiv:1706.02515"
    summary = "sets elements to the lowest value of SELU, and keeps mean and variance"
    placement = "after SELU: alpha_dropout_selu"
    shapes = f"any shape; with `channels` {TOKENS}"
    needs = "inputs of mean 0 and variance 1, as after SELU"
    examples = ({"p": 0.1}, {"p": 0.4}, {"p": 0.2, "channels": True})
    taxonomy = Taxonomy(transforms=("data", "architecture"), space="hidden")
    drops = "other"
    uncounted = "what is kept changes too, so that mean and variance stay"

    p: Tensor

    def __init__(self, p: Rate = 0.1, channels: bool = False) -> None:
        super().__init__(p=p)
        require(isinstance(channels, bool), "channels", "true or false", channels)
        self.channels = channels

    def build(self, *, channel_axis: int | None, channels: int | None, shape: tuple[int, ...], site_id: str) -> None:
        """Take the facts; a SurgeryError where whole channels are to be dropped and nobody knows the axis."""
        build = super().build if self.channels else super(MapRegularizer, self).build
        build(channel_axis=channel_axis, channels=channels, shape=shape, site_id=site_id)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` with elements (or channels) at the lowest value; `x` itself when not active."""
        if not self.active:
            return x
        return alpha_dropout(x, self.p, channels=self.channels, channel_axis=self.told_axis, key=self.next_key())

    def expected_drop(self, shape: tuple[int, ...]) -> float:
        """Return p, whatever the shape."""
        return self._rates["p"]

    def extra_repr(self) -> str:
        """Return the rate, and whether channels are dropped as one."""
        return f"{super().extra_repr()}, channels=True" if self.channels else super().extra_repr()
