"""Gating Dropout and Gate-Expert-Drop in transformers' mixtures with random weights, by the recipes."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dropsurgery import PlanError, SurgeryWarning, apply_recipe, diff, strip
from tests.regularizers.mixtures import (
    BATCH,
    EXPERTS,
    GATES,
    LENGTH,
    MODELS,
    by_recipe,
    called,
    made,
    operated,
    seen,
    words,
)

GATING, SKIPPING = "gating_dropout_moe", "gate_expert_drop_moe"


def logits(model: nn.Module, name: str, training: bool, **options: Any) -> Tensor:
    torch.manual_seed(2)
    return model.train(training)(**words(name), **options).logits


@pytest.mark.parametrize("name", MODELS)
def test_sites_identity_and_type(name: str) -> None:
    """As many sites as gates; the same numbers in eval, and in training at rate 0; keys, order, classes."""
    model, gm = made(name), by_recipe(GATING, name)
    edges = [edit.site.edge for edit in gm.surgery.plan.edits]
    assert edges.count("logits") == GATES[name] and edges.count("selection") == (name == "deepseek")
    assert list(gm.state_dict()) == list(model.state_dict()) and isinstance(gm, type(model))
    wanted = [type(module) for module in model.modules()]
    assert all(any(isinstance(module, cls) for module in gm.modules()) for cls in wanted)
    expected = logits(model, name, True)
    with gm.surgery.active(p=0.0):
        assert torch.equal(logits(gm, name, True), expected)
    with gm.surgery.active(p=1.0):
        assert not torch.allclose(logits(gm, name, True), expected, atol=1e-4)
    assert torch.equal(logits(gm, name, False), logits(model, name, False))


@pytest.mark.parametrize("name", ["mixtral", "qwen", "gpt_oss", "deepseek"])
def test_each_token_goes_to_its_machine(name: str) -> None:
    """At p = 1 with one expert a machine the experts' block gives what the local expert alone gives, with weight 1."""
    model, gm = made(name), by_recipe(GATING, name).train()

    def holds_all(_: str, module: nn.Module) -> bool:
        return any(p.ndim == 3 and len(p) == EXPERTS for p in module.parameters(recurse=False))

    with torch.no_grad(), gm.surgery.active(p=1.0), seen(gm, holds_all) as calls:
        gm(**words(name))
    plain = [module for path, module in model.named_modules() if holds_all(path, module)]
    local = (torch.arange(BATCH * LENGTH) * EXPERTS // (BATCH * LENGTH))[:, None]
    assert len(plain) == len(calls) == GATES[name]
    for module, (taken, given) in zip(plain, calls, strict=True):
        weight = torch.full(local.shape, 2.5 if name == "deepseek" else 1.0)  # DeepSeek's routed_scaling_factor
        assert torch.allclose(given.reshape(-1, 32), module(taken[0].reshape(-1, 32), local, weight), atol=1e-6)


def test_corrected_scores_are_masked_twice_or_refused() -> None:
    for edge, other in (("logits", "selection"), ("selection", "logits")):
        with pytest.raises(PlanError, match=f"add an entry on `pattern: moe_gate, edge: {other}`"):
            operated("deepseek", {"edge": edge, "insert": "gating_dropout"})


def test_losses_of_balance_see_the_true_router() -> None:
    model, gm = made("mixtral", output_router_logits=True), by_recipe(GATING, "mixtral", output_router_logits=True)
    given = words("mixtral") | {"labels": words("mixtral")["input_ids"]}
    expected = model.train()(**given)
    with gm.train().surgery.active(p=0.0):
        same = gm(**given)
    assert torch.equal(same.loss, expected.loss) and torch.equal(same.aux_loss, expected.aux_loss)
    with gm.surgery.active(p=1.0):
        dropped = gm(**given)
    assert torch.equal(dropped.router_logits[0], expected.router_logits[0])
    assert all(each.abs().max() < 1e3 for each in dropped.router_logits) and dropped.aux_loss.isfinite()
    assert not torch.equal(dropped.logits, expected.logits)


def test_no_more_tokens_exceed_the_capacity_of_switch() -> None:
    """2 x 8 places an expert and sequence are asked for: all tokens fit along the sequence that is counted."""
    gm, kept = by_recipe(GATING, "switch").train(), {}
    for p in (0.0, 1.0):
        with torch.no_grad(), gm.surgery.active(p=p), seen(gm, called("mlp.router")) as calls:
            gm(**words("switch"))
        kept[p] = [int(given[0].sum()) for _, given in calls]
    assert kept[1.0] == [16, 16] and max(kept[0.0]) < 16


def test_relabelled_indices_stay_on_their_machine() -> None:
    entry = {"edge": "indices", "insert": "gating_dropout", "with": {"mode": "relabel", "p": 1.0, "virtual_ranks": 2}}
    found = []
    for net in (operated("mixtral", entry).train(), made("mixtral").train()):
        with torch.no_grad(), seen(net, called("mlp.gate")) as calls:
            net(**words("mixtral"))
        found.append([given for _, given in calls])
    relabelled, plain = found
    assert all(torch.equal(each[2] // 2, (torch.arange(16) // 8)[:, None].expand(16, 2)) for each in relabelled)
    assert torch.equal(relabelled[0][2] % 2, plain[0][2] % 2)
    assert torch.equal(relabelled[0][1], plain[0][1])  # the weights are those of the experts that were chosen


def test_recipes_say_what_they_do() -> None:
    gm = by_recipe(GATING, "mixtral")
    assert diff(gm).count("gating_dropout") >= 2
    assert all(row.expected == pytest.approx(0.15) for row in gm.surgery.audit())
    with warnings.catch_warnings():
        warnings.simplefilter("error", SurgeryWarning)
        assert type(strip(gm)) is type(made("mixtral"))


def trained(checkpointed: bool) -> list[Tensor]:
    """The gradients of some steps."""
    torch.manual_seed(0)
    overrides = {f"{entry}.with.p": 0.5 for entry in ("scores", "scores with their bias")}
    gm: Any = apply_recipe(
        MODELS["mixtral"](), GATING, example_inputs=words("mixtral"), overrides=overrides, seed=0
    ).train()
    if checkpointed:
        gm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer, given, found = torch.optim.SGD(gm.parameters(), lr=0.05), words("mixtral"), []
    for _ in range(6):
        optimizer.zero_grad()
        gm(**given, labels=given["input_ids"]).loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in gm.parameters() if p.grad is not None]))
        optimizer.step()
    return found


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
def test_checkpointing_in_the_model_decides_alike() -> None:
    plain, again = trained(False), trained(True)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(plain, again, strict=True))


# ---- Gate-Expert-Drop ----


@pytest.mark.parametrize("name", MODELS)
def test_mixtures_are_skipped(name: str) -> None:
    model, gm = made(name), by_recipe(SKIPPING, name)
    sites = [edit.site for edit in gm.surgery.plan.edits]
    assert len(sites) == GATES[name] and {edit.kind for edit in gm.surgery.plan.edits} == {"swap"}
    blocks = {site.module for site in sites}
    gm.zero_grad()
    with gm.surgery.active(p=1.0), seen(gm, lambda path, _: path in blocks) as calls:
        logits(gm, name, True).square().sum().backward()
    assert len(calls) == GATES[name]
    for _, given in calls:
        tensors = given if isinstance(given, tuple) else (given,)
        assert not any(each.any() for each in tensors) and tensors[0].shape == (BATCH, LENGTH, 32)
    grads = {path: p.grad for path, p in gm.named_parameters()}
    inside = [path for path in grads if any(path.startswith(f"{block}.") for block in blocks)]
    assert inside and all(grads[path] is None for path in inside)
    assert any(grad is not None for grad in grads.values())
    gm.zero_grad()
    assert torch.equal(logits(gm, name, False), logits(model, name, False))


def test_one_mixture_skipped_leaves_the_loss_of_balance() -> None:
    arguments = {"expert_drop": True, "p": 1.0}
    entry = {"edge": "block", "insert": "gating_dropout", "with": arguments, "where": {"index": 0}}
    given = words("mixtral") | {"labels": words("mixtral")["input_ids"]}
    out = operated("mixtral", entry, output_router_logits=True).train()(**given)
    assert out.aux_loss.isfinite() and len(out.router_logits) == 1


@pytest.mark.parametrize("name", ["mixtral", "switch"])
def test_all_mixtures_skipped_leave_the_loss_of_balance(name: str) -> None:
    """Of each stack of layers the last gate gives its logits; nothing learns by them, and no random number is lost."""
    model = made(name)
    arguments = {"expert_drop": True, "p": 1.0, "scope": "model"}
    whole = operated(name, {"edge": "block", "insert": "gating_dropout", "with": arguments})
    bare = words(name)
    given = bare | {"labels": bare["input_ids"], "output_router_logits": True}
    for gm in (whole.train(), copy.deepcopy(whole).train()):
        torch.manual_seed(3)
        gm(**bare)  # the first one finds no hooks, and runs no gate
        before = torch.rand(())
        for _ in range(2):
            gm.zero_grad()
            with seen(gm, called("mlp.gate" if name == "mixtral" else "mlp.router")) as routers:
                torch.manual_seed(3)
                out = gm(**given)
                after = torch.rand(())
            assert len(routers) == (1 if name == "mixtral" else 2) and out.loss.isfinite()
            assert torch.equal(after, before)
            out.loss.backward()
        blocks = {edit.site.module for edit in gm.surgery.plan.edits}
        assert all(p.grad is None for path, p in gm.named_parameters() if any(path.startswith(f"{b}.") for b in blocks))
    if name == "mixtral":
        assert len(out.router_logits) == 1 and out.aux_loss.isfinite()
        assert not torch.equal(out.logits, model.train()(**given).logits)


def test_no_mixture_is_run_for_losses_that_others_give_to() -> None:
    """Half of the steps drop a mixture; as many routers as mixtures run, but where all were skipped, one."""
    gm = operated("mixtral", {"edge": "block", "insert": "gating_dropout", "with": {"expert_drop": True, "p": 0.5}})
    given, counts = words("mixtral") | {"output_router_logits": True}, []
    gm.train()
    for _ in range(12):
        with torch.no_grad(), seen(gm, called("mlp.experts")) as experts:
            out = gm(**given)
        counts.append((len(out.router_logits), len(experts)))
        gm.surgery.step()
    assert set(counts) == {(1, 1), (2, 2)}


def test_a_block_needs_to_be_asked_for() -> None:
    with pytest.raises(PlanError, match="needs an edge that a tensor travels on"):
        operated("mixtral", {"edge": "block", "insert": "gating_dropout"})
    with pytest.raises(PlanError, match="needs an edge named"):
        operated("mixtral", {"edge": "logits", "insert": "gating_dropout", "with": {"expert_drop": True}})
