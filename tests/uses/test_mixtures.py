"""transformers' mixtures of experts from tiny random configs: opaque at the root, with surgery inside."""

from __future__ import annotations

import copy
import importlib
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, fx, nn

from dropsurgery import PlanError, SurgeryError, SurgeryWarning, apply_recipe, catalogue, find_sites, strip
from dropsurgery.analysis import routers
from dropsurgery.capture import Opaque, capture
from dropsurgery.regularizers._base import Rate, Regularizer

BASE: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
MIXED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SWITCH: dict[str, Any] = {
    "vocab_size": 32,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 2,
    "num_sparse_encoder_layers": 1,
    "num_decoder_layers": 2,
    "num_sparse_decoder_layers": 1,
    "num_heads": 2,
    "num_experts": 4,
    "expert_capacity": 4,
    "dropout_rate": 0.0,
    "router_jitter_noise": 0.0,
    "decoder_start_token_id": 0,
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "mixtral": lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(num_local_experts=4, **BASE)),
    "qwen2_moe": lambda: transformers.Qwen2MoeForCausalLM(
        transformers.Qwen2MoeConfig(shared_expert_intermediate_size=16, **MIXED, **BASE)
    ),
    "switch": lambda: transformers.SwitchTransformersForConditionalGeneration(
        transformers.SwitchTransformersConfig(**SWITCH)
    ),
}
SITES = {
    "mixtral": {"logits": 2, "selection": 0, "input": 2, "probabilities": 2, "indices": 2, "hidden": 2, "output": 2},
    "switch": {"logits": 2, "selection": 0, "input": 2, "probabilities": 2, "indices": 0, "hidden": 8, "output": 2},
}
SITES["qwen2_moe"] = SITES["mixtral"]


def inputs(model: nn.Module, length: int = 8, **more: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(0, 32, (2, length), generator=generator)
    given: dict[str, Any] = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = ids.flip(1)
    return {**given, **more}


def losses(model: nn.Module, **more: Any) -> dict[str, Any]:
    given = inputs(model, **more)
    return {**given, "labels": given["input_ids"], "output_router_logits": True}


def tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(dict(output)) if isinstance(leaf, Tensor)]


def same(one: Any, other: Any) -> bool:
    ours, theirs = tensors(one), tensors(other)
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]().eval()


def edited(model: nn.Module, edge: str, insert: str = "dropout", **arguments: Any) -> fx.GraphModule:
    entry = {"name": "gate", "pattern": "moe_gate", "edge": edge, "insert": insert, "with": arguments}
    recipe = {"version": 1, "name": "mixture", "entries": [entry]}
    return apply_recipe(model, recipe, example_inputs=inputs(model))


@pytest.mark.parametrize("name", MODELS)
def test_the_root_is_opaque_and_all_edges_are_there(name: str) -> None:
    model = made(name)
    before = copy.deepcopy(model.state_dict())
    captured = capture(model, inputs(model))
    assert isinstance(captured.root, Opaque)
    sites = find_sites(model, "moe_gate", example_inputs=inputs(model))
    counts = {edge: sum(site.edge.partition("[")[0] == edge for site in sites) for edge in SITES[name]}
    assert counts == SITES[name]
    facts = {(site.gate.experts, site.gate.k, site.gate.returned) for site in sites if site.gate}
    assert facts == {(4, 1 if name == "switch" else 2, True)}
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("edge", ["logits", "input", "probabilities", "hidden", "output"])
@pytest.mark.parametrize("name", MODELS)
def test_nothing_changes_at_rate_zero(name: str, edge: str) -> None:
    """Outputs, losses (the balance loss too), what hooks record, in eval and in training, at other lengths."""
    model = made(name)
    gm = edited(model, edge, p=0.5)
    assert isinstance(gm, fx.GraphModule) and isinstance(gm, type(model)) and type(gm).__name__ == type(model).__name__
    assert list(gm.state_dict()) == list(model.state_dict())
    with torch.no_grad():
        for length in (8, 5):
            assert same(gm(**losses(model, length=length)), model(**losses(model, length=length)))
    gm.train(), model.train()
    for regularizer in gm.surgery.regularizers.values():
        regularizer.set_rate("p", 0.0)
    assert same(gm(**losses(model)), model(**losses(model)))
    owners = [module for module in gm.modules() if module.__dict__.get("_owner") is not None]
    kinds = {type(module) for module in model.modules()}
    assert owners and all(type(owner).__mro__[2] in kinds for owner in owners)


@pytest.mark.parametrize("name", MODELS)
def test_balance_losses_see_the_true_router(name: str) -> None:
    """With other numbers in the first gate's choice, what the first router gives out is still its own."""
    model = made(name)
    gm = edited(model, "logits", p=0.9)
    gm.train(), model.train()
    torch.manual_seed(0)
    ours = gm(**losses(model))
    theirs = model(**losses(model))
    assert not torch.equal(ours.logits, theirs.logits)
    first, own = (output.get("router_logits") or output["encoder_router_logits"] for output in (ours, theirs))
    flat, plain = (torch.utils._pytree.tree_leaves(each) for each in (first, own))
    assert any(map(torch.equal, flat, plain))
    ours.loss.backward()
    assert all(parameter.grad is None or torch.isfinite(parameter.grad).all() for parameter in gm.parameters())


def test_what_a_router_sets_is_set() -> None:
    """Switch's router writes down the dtype that it was given; so does the generated forward, also in a copy."""
    model = made("switch")
    gm = edited(model, "logits", p=0.5)
    for copied in (gm, copy.deepcopy(gm), _loaded(gm)):
        router = next(m for m in copied.modules() if type(m).__name__ == "SwitchTransformersTop1Router")
        router.__dict__.pop("input_dtype", None)
        with torch.no_grad():
            assert same(copied(**inputs(model)), model(**inputs(model)))
        assert router.input_dtype is torch.float32
    assert same(strip(gm)(**inputs(model)), model(**inputs(model)))


def _loaded(gm: nn.Module) -> Any:
    file = io.BytesIO()
    pickle.dump(gm, file)
    file.seek(0)
    return pickle.load(file)


def test_a_model_that_ran_before() -> None:
    """transformers sets hooks at its first call that asks for router logits."""
    model = made("mixtral")
    plain = model(**losses(model))
    gm = edited(model, "logits", p=0.5)
    with torch.no_grad():
        assert same(gm(**losses(model)), plain)


class Skips(Regularizer):
    """Leaves a whole mixture out in training."""

    kind = "swap"
    examples = ({"p": 1.0},)
    p: Tensor

    def __init__(self, p: Rate = 1.0) -> None:
        super().__init__(p=p)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Give zeros."""
        return torch.zeros_like(args[0]) if self.active else self.own(*args, **kwargs)


class Compares(Regularizer):
    """Takes the logits and what the scorer reads."""

    takes = ("input",)
    examples = ({"p": 1.0},)
    p: Tensor

    def __init__(self, p: Rate = 1.0) -> None:
        super().__init__(p=p)

    def forward(self, logits: Tensor, x: Tensor) -> Tensor:
        """Remember what the input was."""
        self.seen = (logits.detach(), x.detach())
        return logits


@pytest.fixture
def registered() -> Iterator[None]:
    for name, cls in (("skips_for_tests", Skips), ("compares_for_tests", Compares)):
        catalogue._registered["regularizers"][name] = cls
    yield
    for name in ("skips_for_tests", "compares_for_tests"):
        del catalogue._registered["regularizers"][name]


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("name", MODELS)
def test_a_whole_mixture_is_swapped(name: str) -> None:
    model = made(name)
    gm = edited(model, "block", "skips_for_tests")
    with torch.no_grad():
        assert same(gm(**losses(model)), model(**losses(model)))
    gm.train()
    seen: list[Tensor] = []
    for site in gm.surgery.plan.edits:
        gm.get_submodule(site.site.module).register_forward_hook(lambda module, args, output: seen.append(output))
    gm(**inputs(model)).logits.sum().backward()
    assert len(seen) == 2 and not any(output.any() for output in seen)
    experts = [p for key, p in gm.named_parameters() if ".experts." in key]
    assert experts and all(p.grad is None for p in experts)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("name", ["mixtral", "switch"])
def test_a_regularizer_takes_the_input_too(name: str) -> None:
    model = made(name)
    gm = edited(model, "logits", "compares_for_tests")
    gm(**inputs(model))
    for edit in gm.surgery.plan.edits:
        logits, x = gm.surgery.regularizers[edit.site.id].seen
        router = model.get_submodule(edit.site.owner)
        weight = next(router.parameters())
        torch.testing.assert_close(logits, x @ weight.t())


def dbrx() -> nn.Module:
    torch.manual_seed(0)
    ffn = {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2, "ffn_act_fn": {"name": "silu"}}
    attention = {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4}
    sizes = {"d_model": 16, "n_heads": 2, "n_layers": 2, "max_seq_len": 32, "vocab_size": 32}
    config = transformers.DbrxConfig(ffn_config=ffn, attn_config=attention, **sizes)
    return transformers.DbrxForCausalLM(config).eval()


def test_what_hooks_collect_is_of_the_model_alone() -> None:
    """A block that is recorded anew, as the model runs, has a router in it whose results a hook collects."""
    model = dbrx()
    gm = edited(model, "logits", p=0.5)
    with torch.no_grad():
        for length in (8, 5):
            assert same(gm(**losses(model, length=length)), model(**losses(model, length=length)))
    ours = gm.train()(**losses(model, length=7))
    assert [logits.shape for logits in ours.router_logits] == [(14, 4)] * 2
    ours.loss.backward()


def test_only_noise_that_goes_by_the_input_asks_for_it() -> None:
    model = dbrx()
    gm = edited(model, "logits", "router_noise", noise="gumbel", scale=5.0)
    with torch.no_grad():
        assert same(gm(**losses(model)), model(**losses(model)))
        assert not torch.equal(gm.train()(**inputs(model)).logits, model(**inputs(model)).logits)
    with pytest.raises(SurgeryError, match="router_noise needs the input"):
        edited(model, "logits", "router_noise", noise="noisy_top_k")


def test_what_is_told_of_places_without_a_gate() -> None:
    """The nearest reason: of an edge that a gate has not, of a gate that is refused, of a model without any."""
    with pytest.raises(PlanError, match=r"ffn.router.layer: the experts are in no graph"):
        edited(dbrx(), "hidden")
    phimoe = transformers.PhimoeForCausalLM(transformers.PhimoeConfig(num_local_experts=4, **BASE)).eval()
    with pytest.raises(PlanError, match=r"nearest:\n *model.layers.0.mlp.router.linear: sparsemixer") as told:
        edited(phimoe, "logits")
    assert "stays Python" not in str(told.value)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**BASE)).eval()
    with pytest.raises(PlanError, match="hit 0; nothing comes near 'moe_gate'"):
        edited(llama, "logits")


def jetmoe() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "kv_channels": 8}
    config = transformers.JetMoeConfig(num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, **sizes)
    return transformers.JetMoeForCausalLM(config).eval()


def test_mixtures_that_are_run_by_their_methods() -> None:
    """JetMoe's attention calls no mixture, but methods of one: there is no forward to stand in for."""
    model = jetmoe()
    gm = edited(model, "block", "gating_dropout", expert_drop=True, p=1.0)
    assert [edit.site.module for edit in gm.surgery.plan.edits] == [f"model.layers.{i}.mlp" for i in range(2)]
    with torch.no_grad():
        assert same(gm(**losses(model)), model(**losses(model)))
        assert not torch.equal(gm.train()(**losses(model)).logits, model(**losses(model)).logits)
    with pytest.raises(PlanError, match="hidden units of experts are in no graph"):
        edited(model, "hidden")


def test_a_lone_layer_tells_that_its_gate_gives_out_masked_logits() -> None:
    model = jetmoe()
    with pytest.warns(SurgeryWarning, match="what the gate gives out in dropped steps is masked too"):
        gm = edited(model, "logits", "gating_dropout", p=1.0)
    ours = gm.train()(**losses(model))
    assert ours.aux_loss.isfinite() and max(logits.abs().max() for logits in ours.router_logits) > 1e30


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_weights_of_chosen_experts_are_looked_up(name: str) -> None:
    """transformers' `batched_mm`: the hidden units are what the product takes, and not the indices before it."""
    model = made(name)
    model.set_experts_implementation("batched_mm")
    gm = edited(model, "hidden", "expert_dropout", p=1.0)
    assert len(gm.surgery.plan.edits) == 2
    seen: list[Tensor] = []
    for path, module in gm.named_modules():
        if path.endswith("mlp.experts"):
            module.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        assert same(gm(**losses(model)), model(**losses(model)))
        seen.clear()
        gm.train()(**inputs(model))
    assert len(seen) == 2 and not any(output.any() for output in seen)


def rows_of(monkeypatch: pytest.MonkeyPatch, *names: str) -> tuple[dict[str, routers.Row], str]:
    """Rows of some classes of the sweep, named `<model>.<class>`, and its table."""
    classes = []
    for name in names:
        model, _, cls = name.partition(".")
        classes.append(getattr(importlib.import_module(f"transformers.models.{model}.modeling_{model}"), cls))
    monkeypatch.setattr(routers, "router_classes", lambda: iter(classes))
    written: list[str] = []
    return {row.name: row for row in routers.main([], written.append)}, written[0]


def test_the_sweep_over_routers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few classes of it; `python -m dropsurgery.analysis.routers` tries all."""
    matched = ("mixtral.MixtralTopKRouter", "deepseek_v3.DeepseekV3TopkRouter", "llama4.Llama4Router")
    refused = ("phimoe.PhimoeTopKRouter", "deepseek_v4.DeepseekV4HashRouter")
    rows, table = rows_of(monkeypatch, *matched, *refused)
    results = {name: row.result for name, row in rows.items()}
    wanted = dict.fromkeys(matched, "matched") | dict.fromkeys(refused, "refused")
    assert results == {name.partition(".")[2]: result for name, result in wanted.items()}
    assert "sparsemixer" in rows["PhimoeTopKRouter"].detail and "looked up" in rows["DeepseekV4HashRouter"].detail
    assert "5 classes: 3 matched, 2 refused." in table


def test_the_sweep_tells_a_mask_that_does_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routers._Mask, "forward", lambda self, logits: logits)
    rows, _ = rows_of(monkeypatch, "mixtral.MixtralTopKRouter")
    row = rows["MixtralTopKRouter"]
    assert row.result == "wrong" and "was chosen" in row.detail
