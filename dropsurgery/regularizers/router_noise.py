"""Router noise: add noise to the scores of a gate before it chooses (Shazeer et al. 2017, arXiv:1701.06538, and kin).

    scores s (..., E) → s + noise, in training; one draw a score

    noise noisy_top_k   N(0, 1) * (softplus(x W) + 0.01)   x (..., d) what the gate reads, W (d, E) learned, 0 at first
    noise gumbel        scale * Gumbel(0, 1)
    noise normal        scale * N(0, 1) / E

`noisy_top_k` is of Shazeer et al.; `gumbel` is the option of st-moe-pytorch (noise_gates) and DeepSpeed's "RSample";
`normal` is tutel's gate_noise, which is `scale`. The noise acts on the way to the choice, and on the weights made of
the same scores; raw logits that a router returns besides stay the true ones.

p, which the sources have not, is the share of tokens whose scores get noise: 1 is theirs, less is for schedules.
Nothing is dropped.

W is a parameter that the net did not have, `noise_weight` under `_surgery` in its state_dict: build the optimizer after
the surgery. It is used in training alone, so that eval is the same without.

Placement: the logits of a gate (pattern moe_gate, edge logits).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from annotated_types import Gt
from torch import Tensor, nn

from dropsurgery.errors import SurgeryError
from dropsurgery.regularizers._base import Rate, Regularizer, rate_tensor, require
from dropsurgery.regularizers._gates import require_experts
from dropsurgery.regularizers._taxonomy import Taxonomy
from dropsurgery.regularizers._tracing import full_precision
from dropsurgery.regularizers._uniform import uniform

Noise = Literal["noisy_top_k", "gumbel", "normal"]
FLOOR = 1e-2  # of the standard deviation
_SMALLEST = 2.0**-25  # half of the least number above 0 that is drawn: its logarithm is finite


def router_noise(
    scores: Tensor,
    p: float | Tensor = 1.0,
    noise: Noise = "gumbel",
    *,
    scale: float | Tensor = 1.0,
    axis: int = -1,
    key: Tensor | None = None,
) -> Tensor:
    """Add noise to the scores (..., E) of each token, with probability `p`.

    Args:
        scores: of the experts.
        p: the share of tokens, in [0, 1].
        noise: "gumbel", "normal" (by E), or "noisy_top_k", whose `scale` is `deviations(x, weight)`.
        scale: what the noise is multiplied by; a number, or a tensor of the scores' shape.
        axis: where the experts are.
        key: what the random numbers depend on, a 0-dim int64 CPU tensor; None for torch's global generator.

    Raises:
        SurgeryError: an argument is out of range.
    """
    require(noise in ("noisy_top_k", "gumbel", "normal"), "noise", "'noisy_top_k', 'gumbel' or 'normal'", noise)
    require(scores.dim() > 0, "input of router_noise", "scores of experts (..., E)", tuple(scores.shape))
    tokens = [1 if i == axis % scores.dim() else length for i, length in enumerate(scores.shape)]
    count = torch.Size(tokens).numel()
    parts = 1 if noise == "gumbel" else 2
    numbers = uniform((parts * scores.numel() + count,), scores.device, key)
    own, coins = numbers[: numbers.numel() - count].view(parts, *scores.shape), numbers[-count:] if count else numbers
    made = gumbel(own[0]) if noise == "gumbel" else normal(own[0], own[1])
    if noise == "normal":
        scale = scale / scores.shape[axis]
    added = torch.where(coins.view(tokens) < rate_tensor(p, scores.device), made * scale, 0.0)
    return (scores + added).to(scores.dtype)


def gumbel(numbers: Tensor) -> Tensor:
    """Return numbers of the Gumbel distribution, made of uniform ones in [0, 1)."""
    return -torch.log(-torch.log(numbers.clamp(min=_SMALLEST)))


def normal(first: Tensor, second: Tensor) -> Tensor:
    """Return normal numbers, made of two uniform ones in [0, 1) each (Box and Muller)."""
    return torch.sqrt(-2 * torch.log1p(-first)) * torch.cos(2 * math.pi * second)


def deviations(x: Tensor, weight: Tensor) -> Tensor:
    """Return the standard deviation of noisy top-k's noise: softplus(x W) + 0.01, of x (..., d) and W (d, E)."""
    with full_precision(x.device.type):
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.softplus(x.to(wide) @ weight.to(wide)) + FLOOR


class RouterNoise(Regularizer):
    """`router_noise` as a layer; identity in eval.

    Attributes:
        noise_weight: W of noisy top-k, (d, E), learned; None for other noise, and before it is known how large it is.
    """

    paper = "Shazeer et al.: Outrageously Large Neural Networks, ICLR 2017, arXiv:1701.06538"
    summary = "adds noise to a gate's scores before it chooses"
    placement = "the logits of a gate: pattern moe_gate, edge logits"
    shapes = "scores (..., E)"
    needs = "a mixture of experts (pattern moe_gate); noisy top-k an optimizer built after surgery"
    examples = ({"p": 0.5}, {"p": 0.3, "noise": "normal"})
    taxonomy = Taxonomy(transforms=("data", "architecture"), space="hidden")
    drops = "other"
    takes: ClassVar[tuple[str, ...]] = ("input",)

    p: Tensor
    noise_weight: nn.Parameter | None

    def __init__(
        self,
        p: Rate = 1.0,
        noise: Noise = "gumbel",
        scale: Annotated[float, Gt(0)] = 1.0,
        features: int | None = None,
        experts: int | None = None,
    ) -> None:
        super().__init__(p=p)
        require(noise in ("noisy_top_k", "gumbel", "normal"), "noise", "'noisy_top_k', 'gumbel' or 'normal'", noise)
        is_number = isinstance(scale, int | float) and not isinstance(scale, bool) and 0 < scale < math.inf
        require(is_number, "scale", "a number above 0", scale)
        self.noise: Noise = noise
        self.scale = scale
        self.channel_axis = -1
        self.noise_weight = None
        if noise == "noisy_top_k":
            self.learned = ("noise_weight",)  # type: ignore[misc]
            if features is not None and experts is not None:
                self.noise_weight = nn.Parameter(torch.zeros(features, experts))

    @classmethod
    def takes_by(cls, arguments: Mapping[str, Any]) -> tuple[str, ...]:
        """Return "input" for noisy top-k, whose noise goes by what the gate reads; nothing for other noise."""
        return cls.takes if arguments.get("noise") == "noisy_top_k" else ()

    @staticmethod
    def example_inputs(batch: int) -> tuple[Tensor, ...]:
        """Return an input for tests: scores of six experts."""
        return (torch.randn(batch, 7, 6),)

    def build(self, *, channel_axis: int | None, channels: int | None, shape: tuple[int, ...], site_id: str) -> None:
        """Take the facts, and make W of noisy top-k; a SurgeryError where they do not say what it needs."""
        super().build(channel_axis=channel_axis, channels=channels, shape=shape, site_id=site_id)
        require_experts(self, "router_noise", channels, channel_axis)
        if self.noise != "noisy_top_k":
            return
        if self.gate is None or self.gate.features is None:
            raise SurgeryError(
                f"router_noise at {site_id}: expected a gate whose input is known (pattern moe_gate, edge logits) to "
                "learn noisy top-k's weight for, got none; use `noise: gumbel` there"
            )
        self.noise_weight = nn.Parameter(torch.zeros(self.gate.features, self.gate.experts))

    def forward(self, scores: Tensor, x: Tensor | None = None) -> Tensor:
        """Return the scores with noise; themselves when not active. `x` is what the gate reads, for noisy top-k."""
        if not self.active:
            return scores
        scale: float | Tensor = self.scale
        if self.noise == "noisy_top_k":
            if self.noise_weight is None or x is None:
                raise SurgeryError(
                    "router_noise: noisy top-k expected `features` and `experts` where it is used alone, and to be "
                    "called with the scores and with what the gate reads"
                )
            scale = deviations(x, self.noise_weight).view(scores.shape) * self.scale
        return router_noise(scores, self.p, self.noise, scale=scale, axis=self.channel_axis, key=self.next_key())

    def expected_drop(self, shape: tuple[int, ...]) -> float:
        """Return p: the share of tokens whose scores get noise. Nothing is dropped."""
        return self._rates["p"]

    def extra_repr(self) -> str:
        """Return the rate, the noise and its scale."""
        return f"{super().extra_repr()}, noise={self.noise!r}, scale={self.scale:g}"
