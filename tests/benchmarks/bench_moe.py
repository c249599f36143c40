"""What acts on gates and experts beside `x * c` and the plain formulas: `python tests/benchmarks/bench_moe.py`.

Forward and backward, on the tensors of a layer with 4096 tokens. A gate's scores are small beside what its experts
compute, so that the bounds on them are of the time that a call takes at all. Exit code 1 where a bound is missed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from bench_dropblock import keep_memory
from bench_regularizers import PLAINLY, Bound, Call, Case, ours, tried
from torch import Tensor

TOKENS = 4096
SLACK = 0.5e-3  # seconds, beside which a gate's own operations are small
SHAPES = {"scores of 8 experts": (TOKENS, 8), "scores of 64 experts": (TOKENS, 64)}


def gumbel_plainly(x: Tensor) -> Tensor:
    return x - torch.log(-torch.log(torch.rand_like(x).clamp(min=1e-7)))


def jitter_plainly(x: Tensor) -> Tensor:
    return x * torch.empty_like(x).uniform_(0.99, 1.01)


def masked_plainly(x: Tensor) -> Tensor:
    return x * (torch.rand_like(x) >= 0.2)


def local_plainly(x: Tensor) -> Tensor:
    """Each token on the machine of one expert, in parts of equal size."""
    tokens, experts = x.shape
    machine = torch.arange(tokens).view(-1, 1) * experts // tokens
    return x.masked_fill(torch.arange(experts) != machine, torch.finfo(x.dtype).min / 2)


def gates() -> Iterator[Case]:
    for what, shape in SHAPES.items():
        calls: dict[str, Call] = {
            "dropped steps": ours("gating_dropout", p=1.0),
            "other steps": ours("gating_dropout", p=1e-30),
            "gumbel": ours("router_noise", noise="gumbel"),
            "normal": ours("router_noise", noise="normal"),
            "masked plainly": local_plainly,
            PLAINLY: gumbel_plainly,
        }
        bounds = [Bound("dropped steps", "masked plainly", 1.2, SLACK), Bound("other steps", "x * c", 1.5, SLACK)]
        bounds += [Bound(each, PLAINLY, 3.0, SLACK) for each in ("gumbel", "normal")]
        yield Case(what, shape, calls, tuple(bounds), rounds=31, shares=False)


def weights() -> Iterator[Case]:
    calls: dict[str, Call] = {
        "output masking": ours("expert_output_masking", p=0.2),
        "assignment drop": ours("topk_assignment_drop", p=0.2),
        "renormalised": ours("topk_assignment_drop", p=0.2, renormalise=True),
        PLAINLY: masked_plainly,
    }
    bounds = tuple(Bound(each, PLAINLY, 2.0, SLACK) for each in calls if each != PLAINLY)
    yield Case("weights of 2 experts a token", (TOKENS, 2), calls, bounds, rounds=31, shares=False)


def wide() -> Iterator[Case]:
    calls: dict[str, Call] = {"jitter": ours("router_jitter"), PLAINLY: jitter_plainly}
    yield Case("what a gate reads", (TOKENS, 1024), calls, (Bound("jitter", PLAINLY, 3.0),), shares=False)
    calls = {"expert dropout": ours("expert_dropout", p=0.3), "F.dropout": lambda x: F.dropout(x, 0.3)}
    bounds = (Bound("expert dropout", "F.dropout", 1.0),)
    yield Case("hidden units of experts", (2 * TOKENS, 1024), calls, bounds, shares=False)


def main() -> int:
    torch.set_num_threads(2)
    torch.manual_seed(0)
    missed = [line for case in (*gates(), *weights(), *wide()) for line in tried(case)]
    print("\n" + "\n".join(missed or ["every bound holds"]))
    return 1 if missed else 0


if __name__ == "__main__":
    keep_memory()
    sys.exit(main())
