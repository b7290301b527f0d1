"""Tiny random language models for tests: one per family that ft promises, built by transformers from a config.

``build(family)`` gives a seeded float32 model in eval mode, small enough for a forward in milliseconds.
``MOE`` are the mixture-of-experts families, ``DENSE`` the others, ``FAMILIES`` all of them.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

VOCAB = 128

_COMMON = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "use_cache": False,
}  # fmt: skip
_HEAD = {"head_dim": 16}
_LATENT = {
    "q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    "num_key_value_heads": 4,
}  # fmt: skip
_DELTA = {
    "head_dim": 16, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LOCAL = {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 32}
_ROUTED = {
    "n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 32,
    "n_group": 2, "topk_group": 1, "norm_topk_prob": True,
}  # fmt: skip
_SHARED = {"shared_expert_intermediate_size": 48}
_NO_GROUPS = {"n_group": 1}
_SECOND_SPARSE = {"mlp_layer_types": ["dense", "sparse"]}
_SLIDING = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}

_MOE: dict[str, dict[str, Any]] = {
    "qwen2_moe": _EXPERTS | _SHARED,
    "qwen3_moe": _HEAD | _EXPERTS | {"norm_topk_prob": True},
    "qwen3_5_moe_text": _DELTA | _EXPERTS | _SHARED,
    "qwen3_next": _DELTA | _EXPERTS | _SHARED | {"norm_topk_prob": True},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 32},
    "mixtral": _LOCAL,
    "minimax": _HEAD | _LOCAL | {"block_size": 16, "layer_types": ["linear_attention", "full_attention"]},
    "minimax_m2": _HEAD | _LOCAL,
    "mistral4": _LATENT | _ROUTED | {"first_k_dense_replace": 0},
    "deepseek_v2": _LATENT
    | _ROUTED
    | {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1}
    | {"norm_topk_prob": False, "routed_scaling_factor": 1.5},
    "deepseek_v3": _LATENT | _ROUTED | {"first_k_dense_replace": 1, "routed_scaling_factor": 2.5},
    "glm4_moe": _HEAD | _ROUTED | _NO_GROUPS | {"first_k_dense_replace": 1, "use_qk_norm": True},
    "glm4_moe_lite": _LATENT | _ROUTED | _NO_GROUPS | _SECOND_SPARSE,
    "glm_moe_dsa": _LATENT
    | _ROUTED
    | _NO_GROUPS
    | _SECOND_SPARSE
    | {"index_topk": 8, "index_head_dim": 16, "index_n_heads": 2},
    "ernie4_5_moe": {
        "moe_intermediate_size": 32, "moe_k": 2, "moe_num_experts": 8, "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1, "moe_layer_end_index": -1, "moe_layer_interval": 1,
    },
    "hunyuan_v1_moe": _HEAD | {"num_experts": 8, "moe_topk": 2, "intermediate_size": 32},
    "gemma4_text": _HEAD
    | _SLIDING
    | {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 32, "enable_moe_block": True}
    | {"global_head_dim": 32, "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": VOCAB}
    | {"tie_word_embeddings": True},
    "nemotron_h": _HEAD
    | _ROUTED
    | _NO_GROUPS
    | {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"]}
    | {"moe_shared_expert_intermediate_size": 48, "moe_latent_size": 32, "ssm_state_size": 16}
    | {"mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 2, "chunk_size": 16},
    "gpt_oss": _HEAD | _LOCAL | _SLIDING,
    "afmoe": _HEAD | _EXPERTS | _SLIDING | {"num_shared_experts": 1, "num_dense_layers": 1, "route_scale": 1.5},
    "laguna": _HEAD
    | _EXPERTS
    | _SHARED
    | _SECOND_SPARSE
    | {"layer_types": ["full_attention", "full_attention"], "moe_routed_scaling_factor": 1.5},
}  # fmt: skip

_DENSE: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": _HEAD,
    "qwen3_5_text": _DELTA,
    "gemma3_text": _HEAD | _SLIDING | {"query_pre_attn_scalar": 16, "tie_word_embeddings": True},
    "olmo2": {},
    "granite": {"tie_word_embeddings": True},
}

MOE: tuple[str, ...] = tuple(_MOE)
DENSE: tuple[str, ...] = tuple(_DENSE)
FAMILIES: tuple[str, ...] = MOE + DENSE

# Not registered with AutoModelForCausalLM by transformers 5.23.
_CLASSES = {"mistral4": ("transformers.models.mistral4.modeling_mistral4", "Mistral4ForCausalLM")}


def config(family: str, **over: Any) -> PretrainedConfig:
    """The tiny config of a family; ``over`` replaces fields."""
    return AutoConfig.for_model(family, **{**_COMMON, **(_MOE | _DENSE)[family], **over})


def model_class(family: str) -> Any:
    """The class with the language-modelling head."""
    if family in _CLASSES:
        module, name = _CLASSES[family]
        return getattr(import_module(module), name)
    return AutoModelForCausalLM._model_mapping[type(config(family))]


def build(family: str, *, seed: int = 0, scatter: bool = True, **over: Any) -> PreTrainedModel:
    """A seeded float32 model in eval mode.

    ``scatter`` adds noise to every parameter and to the router's correction biases, so that weights which a family
    initialises to a constant (norms, zero routers, zero biases) are told apart when one is lost or mixed up.
    """
    torch.manual_seed(seed)
    model = model_class(family)._from_config(config(family, **over), dtype=torch.float32).eval()
    if scatter:
        generator = torch.Generator().manual_seed(seed + 1)
        noisy = [p for _, p in model.named_parameters()]
        noisy += [b for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")]
        with torch.no_grad():
            for tensor in noisy:
                tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.02)
    return model


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random token ids that avoid the special ones."""
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))
