"""What acts on gates and experts, in transformers' mixtures with random weights, by the recipes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dropsurgery import PlanError, SurgeryWarning, apply_recipe, diff, plan_recipe, strip

transformers = pytest.importorskip("transformers")

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
BATCH, LENGTH, EXPERTS = 2, 8, 4


def mixtral(**options: Any) -> nn.Module:
    config = {**SMALL, "num_key_value_heads": 2, "num_local_experts": EXPERTS, "num_experts_per_tok": 2}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**config, **options))


def qwen() -> nn.Module:
    config = {"num_key_value_heads": 2, "num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    shared = {"shared_expert_intermediate_size": 16, "norm_topk_prob": True}
    return transformers.Qwen2MoeForCausalLM(transformers.Qwen2MoeConfig(**SMALL, **config, **shared))


def gpt_oss() -> nn.Module:
    config = {"num_key_value_heads": 2, "head_dim": 8, "num_local_experts": EXPERTS, "num_experts_per_tok": 2}
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(**SMALL, **config))


def deepseek() -> nn.Module:
    heads = {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "v_head_dim": 8}
    heads |= {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
    experts = {"n_routed_experts": EXPERTS, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
    config = {
        **SMALL,
        **heads,
        **experts,
        "moe_intermediate_size": 16,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
    }
    model = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**config))
    for name, buffer in model.named_buffers():
        if "correction_bias" in name:
            buffer.copy_(3 * torch.randn(EXPERTS))
    return model


def switch() -> nn.Module:
    config = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 24, "num_heads": 4, "num_layers": 2}
    experts = {"num_decoder_layers": 2, "num_experts": EXPERTS, "expert_capacity": 2, "num_sparse_encoder_layers": 1}
    quiet = {"num_sparse_decoder_layers": 1, "router_jitter_noise": 0.0, "dropout_rate": 0.0}
    config = transformers.SwitchTransformersConfig(**config, **experts, **quiet)
    return transformers.SwitchTransformersForConditionalGeneration(config)


MODELS: dict[str, Callable[..., nn.Module]] = {
    each.__name__: each for each in (mixtral, qwen, gpt_oss, deepseek, switch)
}
GATES = {"mixtral": 2, "qwen": 2, "gpt_oss": 2, "deepseek": 1, "switch": 2}


def made(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name](**options).eval()


def words(name: str) -> dict[str, Tensor]:
    torch.manual_seed(1)
    first = {"input_ids": torch.randint(64, (BATCH, LENGTH))}
    return first | {"decoder_input_ids": torch.randint(64, (BATCH, LENGTH))} if name == "switch" else first


def operated(model: nn.Module, recipe: Any, name: str, *, seed: int | None = 0, **overrides: Any) -> Any:
    return apply_recipe(model, recipe, example_inputs=words(name), overrides=overrides.get("overrides"), seed=seed)


def at(p: float, *entries: str, **options: Any) -> dict[str, Any]:
    given = {"p": p, **options}
    return {"overrides": {f"{entry}.with.{key}": value for entry in entries for key, value in given.items()}}


def gating(model: nn.Module, name: str, p: float, **options: Any) -> Any:
    return operated(model, "gating_dropout_moe", name, **at(p, "scores", "scores with their bias", **options))


def entry(regularizer: str, edge: str, **arguments: Any) -> dict[str, Any]:
    place = {"name": "e", "pattern": "moe_gate", "edge": edge, "insert": regularizer, "with": arguments}
    return {"version": 1, "name": "r", "entries": [place]}


class Seen:
    """What some modules take and give."""

    def __init__(self, model: nn.Module, wanted: Callable[[str, nn.Module], bool]) -> None:
        self.taken: list[Any] = []
        self.given: list[Any] = []
        for name, module in model.named_modules():
            if wanted(name, module):
                module.register_forward_hook(self._note)

    def _note(self, module: nn.Module, taken: Any, given: Any) -> None:
        self.taken.append(taken)
        self.given.append(given)


# ---- Gating Dropout ----


@pytest.mark.parametrize("name", MODELS)
def test_sites_identity_and_type(name: str) -> None:
    """As many sites as gates; the same numbers in eval, and in training at rate 0; keys, order, classes."""
    model, given = made(name), words(name)
    gm = gating(model, name, 0.0)
    edges = [edit.site.edge for edit in gm.surgery.plan.edits]
    assert edges.count("logits") == GATES[name] and edges.count("selection") == (name == "deepseek")
    assert list(gm.state_dict()) == list(model.state_dict()) and isinstance(gm, type(model))
    wanted = {type(module).__name__ for module in model.modules()}
    assert wanted <= {type(module).__name__ for module in gm.modules()}
    for mode in (False, True):
        torch.manual_seed(2)
        expected = model.train(mode)(**given).logits
        torch.manual_seed(2)
        assert torch.equal(gm.train(mode)(**given).logits, expected)
    dropped = gating(model, name, 1.0)
    assert torch.equal(dropped.eval()(**given).logits, model.eval()(**given).logits)
    torch.manual_seed(2)
    assert not torch.allclose(dropped.train()(**given).logits, expected, atol=1e-4)


@pytest.mark.parametrize("name", ["mixtral", "qwen", "gpt_oss", "deepseek"])
def test_each_token_goes_to_its_machine(name: str) -> None:
    """At p = 1 with one expert a machine the experts' block gives what the local expert alone gives, with weight 1."""
    model = made(name)
    gm = gating(model, name, 1.0).train()

    def holds_all(module: nn.Module) -> bool:
        return any(p.ndim == 3 and len(p) == EXPERTS for p in module.parameters(recurse=False))

    seen = Seen(gm, lambda _, module: holds_all(module))
    with torch.no_grad():
        gm(**words(name))
    assert len(seen.given) == GATES[name]
    plain = [module for module in model.modules() if holds_all(module)]
    local = (torch.arange(BATCH * LENGTH) * EXPERTS // (BATCH * LENGTH))[:, None]
    for module, taken, given in zip(plain, seen.taken, seen.given, strict=True):
        weight = torch.full(local.shape, 2.5 if name == "deepseek" else 1.0)  # DeepSeek's routed_scaling_factor
        expected = module(taken[0].reshape(-1, 32), local, weight)
        assert torch.allclose(given.reshape(-1, 32), expected, atol=1e-6)


def test_corrected_scores_are_masked_twice_or_refused() -> None:
    model = made("deepseek")
    with pytest.raises(PlanError, match="add an entry on `pattern: moe_gate, edge: selection`"):
        operated(model, entry("gating_dropout", "logits"), "deepseek")
    with pytest.raises(PlanError, match="add an entry on `pattern: moe_gate, edge: logits`"):
        operated(model, entry("gating_dropout", "selection"), "deepseek")


def test_losses_of_balance_see_the_true_router() -> None:
    model = made("mixtral", output_router_logits=True)
    given = words("mixtral") | {"labels": words("mixtral")["input_ids"]}
    expected = model.train()(**given)
    same = gating(model, "mixtral", 0.0).train()(**given)
    assert torch.equal(same.loss, expected.loss) and torch.equal(same.aux_loss, expected.aux_loss)
    dropped = gating(model, "mixtral", 1.0).train()(**given)
    assert torch.equal(dropped.router_logits[0], expected.router_logits[0])
    assert all(each.abs().max() < 1e3 for each in dropped.router_logits) and dropped.aux_loss.isfinite()
    dropped.loss.backward()
    assert not torch.equal(dropped.logits, expected.logits)


def test_no_more_tokens_exceed_the_capacity_of_switch() -> None:
    """32 of 2 x 16 places are there: all tokens fit along the sequence that is counted."""
    model, given = made("switch"), words("switch")

    def kept(net: nn.Module) -> list[int]:
        seen = Seen(net, lambda name, _: name.endswith("mlp.router"))
        with torch.no_grad():
            net(**given)
        return [int(each[0].sum()) for each in seen.given]

    normal = kept(model.train())
    assert kept(gating(made("switch"), "switch", 1.0).train()) == [16, 16] and max(normal) < 16


def test_relabelled_indices_stay_on_their_machine() -> None:
    model = made("mixtral")
    gm = operated(model, entry("gating_dropout", "indices", mode="relabel", p=1.0, virtual_ranks=2), "mixtral").train()
    seen = Seen(gm, lambda name, _: name.endswith("mlp.gate"))
    plain = Seen(model.train(), lambda name, _: name.endswith("mlp.gate"))
    with torch.no_grad():
        gm(**words("mixtral"))
        model(**words("mixtral"))
    own = (torch.arange(16) // 8)[:, None]
    assert all(torch.equal(each[2] // 2, own.expand(16, 2)) for each in seen.given)
    assert torch.equal(seen.given[0][2] % 2, plain.given[0][2] % 2)
    assert torch.equal(seen.given[0][1], plain.given[0][1])  # the weights are those of the experts that were chosen


def test_recipes_say_what_they_do() -> None:
    gm = gating(made("mixtral"), "mixtral", 0.2)
    assert diff(gm).count("gating_dropout") >= 2
    audit = gm.surgery.audit()
    assert all(row.expected == pytest.approx(0.15) for row in audit)
    with warnings.catch_warnings():
        warnings.simplefilter("error", SurgeryWarning)
        plain = strip(gm)
    assert type(plain) is type(made("mixtral"))


def trained(gm: Any, steps: int) -> list[Tensor]:
    """The gradients of some steps."""
    optimizer, given, found = torch.optim.SGD(gm.parameters(), lr=0.05), words("mixtral"), []
    for _ in range(steps):
        optimizer.zero_grad()
        gm(**given, labels=given["input_ids"]).loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in gm.parameters() if p.grad is not None]))
        optimizer.step()
    return found


def test_checkpointing_in_the_model_decides_alike() -> None:
    plain, checkpointed = (gating(made("mixtral"), "mixtral", 0.5).train() for _ in range(2))
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for a, b in zip(trained(plain, 6), trained(checkpointed, 6), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


# ---- Gate-Expert-Drop ----


@pytest.mark.parametrize("name", MODELS)
def test_mixtures_are_skipped(name: str) -> None:
    model, given = made(name), words(name)
    gm = operated(model, "gate_expert_drop_moe", name, **at(1.0, "mixtures")).train()
    sites = [edit.site for edit in gm.surgery.plan.edits]
    assert len(sites) == GATES[name] and {edit.kind for edit in gm.surgery.plan.edits} == {"swap"}
    blocks = {site.module for site in sites}
    seen = Seen(gm, lambda path, _: path in blocks)
    gm(**given).logits.square().sum().backward()
    assert len(seen.given) == GATES[name]
    for result in seen.given:
        tensors = result if isinstance(result, tuple) else (result,)
        assert not any(each.any() for each in tensors) and tensors[0].shape == (BATCH, LENGTH, 32)
    grads = {path: p.grad for path, p in gm.named_parameters()}
    inside = [path for path in grads if any(path.startswith(f"{block}.") for block in blocks)]
    assert inside and all(grads[path] is None for path in inside)
    assert any(grad is not None for grad in grads.values())
    assert torch.equal(gm.eval()(**given).logits, model.eval()(**given).logits)


def test_one_mixture_skipped_leaves_the_loss_of_balance() -> None:
    model = made("mixtral", output_router_logits=True)
    given = words("mixtral") | {"labels": words("mixtral")["input_ids"]}
    recipe = entry("gating_dropout", "block", expert_drop=True, p=1.0)
    recipe["entries"][0]["where"] = {"index": 0}
    out = operated(model, recipe, "mixtral").train()(**given)
    assert out.aux_loss.isfinite() and len(out.router_logits) == 1


def test_a_block_needs_to_be_asked_for() -> None:
    with pytest.raises(PlanError, match="needs an edge that a tensor travels on"):
        operated(made("mixtral"), entry("gating_dropout", "block"), "mixtral")
    with pytest.raises(PlanError, match="needs an edge named"):
        operated(made("mixtral"), entry("gating_dropout", "logits", expert_drop=True), "mixtral")


# ---- the others ----


def test_jitter_reaches_the_router_alone() -> None:
    model, given = made("mixtral"), words("mixtral")
    gm = operated(model, "router_jitter_switch", "mixtral", **at(1.0, "inputs of gates", epsilon=0.2)).train()
    assert len(gm.surgery.plan.edits) == 2
    routers, experts = (Seen(gm, lambda path, _, end=end: path.endswith(end)) for end in ("mlp.gate", "mlp.experts"))
    plain = Seen(model.train(), lambda path, _: path.endswith("mlp.gate"))
    with torch.no_grad():
        gm(**given)
        model(**given)
    assert torch.equal(routers.taken[0][0].view(-1, 32), experts.taken[0][0].view(-1, 32))
    assert torch.equal(routers.taken[0][0], plain.taken[0][0])
    assert not torch.allclose(routers.given[0][0], plain.given[0][0], atol=1e-4)


@pytest.mark.parametrize("noise", ["gumbel", "normal", "noisy_top_k"])
def test_noise_leaves_the_logits_that_are_given_out(noise: str) -> None:
    model, given = made("mixtral", output_router_logits=True), words("mixtral")
    gm = operated(model, entry("router_noise", "logits", noise=noise, scale=4.0), "mixtral").train()
    seen, plain = (Seen(net, lambda path, _: path.endswith("mlp.gate")) for net in (gm, model.train()))
    out, expected = gm(**given), model(**given)
    assert torch.equal(seen.given[0][0], plain.given[0][0])
    assert not torch.equal(seen.given[0][2], plain.given[0][2])
    learned = [path for path, _ in gm.named_parameters() if path.endswith("noise_weight")]
    assert len(learned) == (2 if noise == "noisy_top_k" else 0)
    if learned:
        out.logits.square().sum().backward()
        grads = [p.grad for path, p in gm.named_parameters() if path in learned]
        assert all(grad.shape == (32, EXPERTS) and grad.any() for grad in grads)
    assert torch.equal(gm.eval()(**given).logits, model.eval()(**given).logits)
    assert not torch.allclose(out.logits, expected.logits, atol=1e-4)


@pytest.mark.parametrize("name", ["mixtral", "switch"])
@pytest.mark.parametrize("regularizer", ["expert_output_masking", "topk_assignment_drop"])
def test_all_outputs_masked_are_none(regularizer: str, name: str) -> None:
    """At p = 1 every mixture gives 0, which Gate-Expert-Drop would do too: the same logits."""
    given = words(name)
    gm = operated(made(name), entry(regularizer, "probabilities", p=1.0), name).train()
    skipped = operated(made(name), "gate_expert_drop_moe", name, **at(1.0, "mixtures")).train()
    with torch.no_grad():
        assert torch.allclose(gm(**given).logits, skipped(**given).logits, atol=1e-6)
    half = operated(made(name), entry(regularizer, "probabilities", p=0.5), name).train()
    with torch.no_grad():
        assert not torch.allclose(half(**given).logits, skipped(**given).logits, atol=1e-5)


def test_dropout_inside_experts() -> None:
    """At p = 1 the hidden units of mixtral's experts are 0, and with them what they give."""
    given = words("mixtral")
    gm = operated(made("mixtral"), "expert_dropout_switch", "mixtral", **at(1.0, "hidden units of experts")).train()
    seen = Seen(gm, lambda path, _: path.endswith("mlp.experts"))
    with torch.no_grad():
        gm(**given)
    assert seen.given and not any(each.any() for each in seen.given)
    plan = plan_recipe(made("switch"), "expert_dropout_switch", example_inputs=words("switch"))
    assert len(plan.edits) == 2 * EXPERTS
