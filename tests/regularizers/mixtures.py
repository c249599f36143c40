"""transformers' mixtures of experts from small random configs, and what goes in and out of their parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dropsurgery import apply_recipe

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


@lru_cache
def made(name: str, **options: Any) -> nn.Module:
    """A model with random weights, the same each time: it has to be left as it is, but for its mode."""
    torch.manual_seed(0)
    return MODELS[name](**options).eval()


def words(name: str) -> dict[str, Tensor]:
    torch.manual_seed(1)
    first = {"input_ids": torch.randint(64, (BATCH, LENGTH))}
    return first | {"decoder_input_ids": torch.randint(64, (BATCH, LENGTH))} if name == "switch" else first


@lru_cache
def by_recipe(recipe: str, name: str, **options: Any) -> Any:
    """A model with a bundled recipe in it, to be left as it is: rates are set for a while by `surgery.active`."""
    return apply_recipe(made(name, **options), recipe, example_inputs=words(name), seed=0)


def operated(name: str, entry: dict[str, Any], **options: Any) -> Any:
    """A model with one entry on its gates."""
    recipe = {"version": 1, "name": "r", "entries": [{"name": "e", "pattern": "moe_gate", **entry}]}
    return apply_recipe(made(name, **options), recipe, example_inputs=words(name), seed=0)


@contextmanager
def seen(model: nn.Module, wanted: Callable[[str, nn.Module], bool]) -> Iterator[list[tuple[Any, Any]]]:
    """What some modules take and give, call by call."""
    calls: list[tuple[Any, Any]] = []
    found = [module for name, module in model.named_modules() if wanted(name, module)]
    handles = [each.register_forward_hook(lambda _, taken, given: calls.append((taken, given))) for each in found]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def called(end: str) -> Callable[[str, nn.Module], bool]:
    """Modules whose path ends so."""
    return lambda name, _: name.endswith(end)
