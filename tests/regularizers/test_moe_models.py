"""Noise on gates, and what drops experts, in transformers' mixtures with random weights."""

from __future__ import annotations

import pytest
import torch

from dropsurgery import plan_recipe
from tests.regularizers.mixtures import EXPERTS, by_recipe, called, made, operated, seen, words


def test_jitter_reaches_the_router_alone() -> None:
    model, gm, given = made("mixtral"), by_recipe("router_jitter_switch", "mixtral").train(), words("mixtral")
    assert len(gm.surgery.plan.edits) == 2
    with torch.no_grad(), seen(gm, called("mlp.gate")) as routers, seen(gm, called("mlp.experts")) as experts:
        gm(**given)
    with torch.no_grad(), seen(model.train(), called("mlp.gate")) as plain:
        model(**given)
    assert torch.equal(routers[0][0][0].view(-1, 32), experts[0][0][0].view(-1, 32))
    assert torch.equal(routers[0][0][0], plain[0][0][0])
    jittered, before = routers[0][1][0], plain[0][1][0]
    assert not torch.equal(jittered, before) and torch.allclose(jittered, before, atol=0.1)


@pytest.mark.parametrize("noise", ["gumbel", "normal", "noisy_top_k"])
def test_noise_leaves_the_logits_that_are_given_out(noise: str) -> None:
    model, given = made("mixtral", output_router_logits=True), words("mixtral")
    entry = {"edge": "logits", "insert": "router_noise", "with": {"noise": noise, "scale": 4.0}}
    gm = operated("mixtral", entry, output_router_logits=True).train()
    with seen(gm, called("mlp.gate")) as noisy, seen(model.train(), called("mlp.gate")) as plain:
        out, expected = gm(**given), model(**given)
    assert torch.equal(noisy[0][1][0], plain[0][1][0]) and not torch.equal(noisy[0][1][2], plain[0][1][2])
    learned = [p for path, p in gm.named_parameters() if path.endswith("noise_weight")]
    assert len(learned) == (2 if noise == "noisy_top_k" else 0)
    if learned:
        out.logits.square().sum().backward()
        assert all(p.shape == (32, EXPERTS) and p.grad.any() for p in learned)
    assert not torch.allclose(out.logits, expected.logits, atol=1e-4)
    assert torch.equal(gm.eval()(**given).logits, model.eval()(**given).logits)


@pytest.mark.parametrize(
    ("regularizer", "name"), [("expert_output_masking", "mixtral"), ("topk_assignment_drop", "switch")]
)
def test_all_outputs_masked_are_none(regularizer: str, name: str) -> None:
    """At p = 1 every mixture gives 0; at p = 0.5 not all are."""
    gm = operated(name, {"edge": "probabilities", "insert": regularizer, "with": {"p": 0.5}}).train()
    shares = []
    for p in (0.5, 1.0):
        with torch.no_grad(), gm.surgery.active(p=p), seen(gm, called("mlp.experts")) as calls:
            gm(**words(name))
        shares.append(float(torch.stack([(given == 0).float().mean() for _, given in calls]).mean()))
    assert len(calls) == 2 and 0 < shares[0] < 0.95 and shares[1] == 1.0


def test_dropout_inside_experts() -> None:
    """At p = 1 the hidden units of mixtral's experts are 0, and with them what they give."""
    gm = by_recipe("expert_dropout_switch", "mixtral").train()
    with torch.no_grad(), gm.surgery.active(p=1.0), seen(gm, called("mlp.experts")) as calls:
        gm(**words("mixtral"))
    assert len(calls) == 2 and not any(given.any() for _, given in calls)
    plan = plan_recipe(made("switch"), "expert_dropout_switch", example_inputs=words("switch"))
    assert len(plan.edits) == 2 * EXPERTS
