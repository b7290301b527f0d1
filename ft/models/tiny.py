"""Look-alikes: the same architecture and pattern of layers, small enough for any machine.

``shrink`` goes by the names of config fields, not by a list of families: widths and counts are cut to a ceiling, the
ratios an architecture relies on (query to key heads, value to key heads, experts to groups) are kept, and lists with
one entry per layer are cut to a whole period of their pattern, so that every kind of layer is left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from ft.errors import ModelError
from ft.models.load import text_config

HIDDEN, HEAD, HEADS, EXPERTS, TOP_K, LAYERS, VOCAB = 64, 16, 4, 8, 2, 2, 512
LONGEST_PERIOD = 8

# Ceilings by field; a field that is absent, None or smaller stays as it is.
_CEILINGS: dict[str, int] = {
    "hidden_size": HIDDEN, "head_dim": HEAD, "global_head_dim": 2 * HEAD, "v_head_dim": HEAD,
    "qk_nope_head_dim": HEAD // 2, "qk_rope_head_dim": HEAD // 2, "q_lora_rank": 32, "kv_lora_rank": 16,
    "intermediate_size": 128, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32, "moe_latent_size": 32, "hidden_size_per_layer_input": 8,
    "query_pre_attn_scalar": HEAD, "linear_key_head_dim": HEAD, "linear_value_head_dim": HEAD,
    "ssm_state_size": 16, "mamba_num_heads": 4, "mamba_head_dim": HEAD, "n_groups": 2, "chunk_size": 32,
    "mamba_n_heads": 8, "mamba_d_head": HEAD, "mamba_d_ssm": 8 * HEAD, "mamba_d_state": 16, "mamba_chunk_size": 32,
    "block_size": 64, "index_head_dim": HEAD, "index_n_heads": 16, "index_topk": 64, "sliding_window": 64,
    "num_nextn_predict_layers": 0, "mtp_num_hidden_layers": 0,
    "num_experts": EXPERTS, "num_local_experts": EXPERTS, "n_routed_experts": EXPERTS, "moe_num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K, "moe_topk": TOP_K, "moe_k": TOP_K, "top_k_experts": TOP_K,
}  # fmt: skip
_QUERY_AND_KEY_HEADS = (
    ("num_attention_heads", "num_key_value_heads"),
    ("linear_num_value_heads", "linear_num_key_heads"),
)
_LEADING_DENSE = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
_STEPS = ("decoder_sparse_step", "moe_layer_interval")

# Families whose transformers defaults describe a model without experts.
_AS_EXPERTS: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "gemma4_text": {
        "enable_moe_block": True,
        "num_experts": 8,
        "top_k_experts": 2,
        "moe_intermediate_size": 32,
        "hidden_size_per_layer_input": 0,
    },
    "hunyuan_v1_moe": {"num_experts": 8, "moe_topk": 2, "head_dim": 128},
}


def config_by_family(family: str, vocab_size: int = VOCAB) -> PretrainedConfig:
    """A tiny config of a family, where no model's own config is at hand. Raises ModelError for an unknown one."""
    if family not in CONFIG_MAPPING:
        near = [name for name in CONFIG_MAPPING if family.split("_")[0] in name][:10]
        raise ModelError(
            f"transformers knows no model type {family!r}", where="model.family", expected=", ".join(near) or "llama"
        )
    config = text_config(AutoConfig.for_model(family))
    return shrink(type(config)(**_AS_EXPERTS.get(config.model_type, {})), vocab_size)


def shrink(config: PretrainedConfig, vocab_size: int = VOCAB) -> PretrainedConfig:
    """A config of the same architecture: width 64, 8 experts of which 2 answer, one whole period of layers.

    A vision-language model gives its text tower. Special token ids beyond ``vocab_size`` become None.
    """
    config = deepcopy(text_config(config))
    facts = {k: v for k, v in config.to_dict().items() if not k.startswith("_")}
    n = _depth(facts)
    changes = _ceilings(facts) | _tokens(facts, vocab_size) | _heads(facts) | _groups(facts) | _layers(facts, n)
    small = {**facts, **changes}
    for derived in ("qk_head_dim", *(["head_dim"] if "kv_lora_rank" in facts else [])):
        small.pop(derived, None)
    return type(config).from_dict(small | _rotary(small))


def _ceilings(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _cap(facts[k], most) for k, most in _CEILINGS.items() if isinstance(facts.get(k), (int, float, list))}


def _cap(value: Any, most: int) -> Any:
    return [min(v, most) for v in value] if isinstance(value, list) else min(value, most)


def _tokens(facts: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """The vocabulary's size, and no token id beyond it."""
    ids = {k: _inside(v, vocab_size) for k, v in facts.items() if k.endswith("_token_id") and v is not None}
    return ids | {k: vocab_size for k in ("vocab_size", "vocab_size_per_layer_input") if k in facts}


def _inside(ids: int | list[int], vocab_size: int) -> int | list[int] | None:
    if isinstance(ids, list):
        return [i for i in ids if i < vocab_size] or None
    return ids if ids < vocab_size else None


def _heads(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Four query heads, and as many key heads as the ratio leaves."""
    small: dict[str, Any] = {}
    for query, key in _QUERY_AND_KEY_HEADS:
        if many := facts.get(query):
            small[query] = min(HEADS, many)
            if facts.get(key):
                small[key] = max(1, small[query] * facts[key] // many)
    return small


def _groups(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Groups of at least two experts, of which enough are chosen to hold the experts that answer."""
    many = facts.get("n_group")
    if not many or many == 1:
        return {}
    few = min(many, EXPERTS // 2)
    return {"n_group": few, "topk_group": max(1, (facts.get("topk_group") or 1) * few // many)}


def _per_layer(facts: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Fields with one entry per layer."""
    depth = facts.get("num_hidden_layers") or len(facts.get("layers_block_type") or ())
    return {k: v for k, v in facts.items() if isinstance(v, list) and len(v) == depth and depth > 1}


def _depth(facts: Mapping[str, Any]) -> int:
    """How many layers show every kind of layer: a period of each list, one leading dense layer and a sparse one."""
    lists = _per_layer(facts)
    n = max([LAYERS, *(period(v) for k, v in lists.items() if isinstance(v[0], str) and k != "mlp_layer_types")])
    n = max([n, *(facts.get(step) or 0 for step in _STEPS)])
    return 2 * n if facts.get("num_kv_shared_layers") else n


def period(kinds: Sequence[str]) -> int:
    """Length of the shortest pattern that is seen at least twice; else of the shortest sample with every kind.

    Lists as short as that are taken whole, so that shrinking twice changes nothing.
    """
    for p in range(1, min(LONGEST_PERIOD, len(kinds) // 2) + 1):
        if all(kind == kinds[i % p] for i, kind in enumerate(kinds)):
            return p
    return max(list(kinds).index(kind) for kind in set(kinds)) + 1 if len(kinds) > LONGEST_PERIOD else len(kinds)


def _layers(facts: Mapping[str, Any], n: int) -> dict[str, Any]:
    """Cut everything that counts or lists layers to ``n``."""
    small: dict[str, Any] = {k: _cut(k, v, n, facts) for k, v in _per_layer(facts).items()}
    if "num_hidden_layers" in facts:
        small["num_hidden_layers"] = n
    small |= {k: min(facts[k], 1) for k in _LEADING_DENSE if facts.get(k)}
    if "moe_layer_end_index" in facts:
        small["moe_layer_end_index"] = -1
    if facts.get("mlp_only_layers"):
        small["mlp_only_layers"] = [i for i in facts["mlp_only_layers"] if i < n - 1]
    if facts.get("max_window_layers"):
        small["max_window_layers"] = min(n, facts["max_window_layers"])
    if facts.get("num_kv_shared_layers"):
        small["num_kv_shared_layers"] = n // 2
    if facts.get("per_layer_config"):
        own = {k: _ceilings(v) | {"head_dim": 2 * HEAD} for k, v in facts["per_layer_config"].items() if int(k) < n}
        small["per_layer_config"] = own
    return small


def _cut(name: str, values: list[Any], n: int, facts: Mapping[str, Any]) -> list[Any]:
    if name == "mlp_layer_types":  # one of the leading dense layers is enough
        leading = next((i for i, v in enumerate(values) if v != values[0]), 0)
        return (values[:1] + values[leading:])[:n] if leading else values[:n]
    if name == "num_attention_heads_per_layer":
        most = max(values)
        return [max(1, HEADS * v // most) for v in values[:n]]
    return values[:n]


def _rotary(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary parameters without lists that are as long as the old head was wide."""
    rope = facts.get("rope_parameters")
    return {"rope_parameters": _plain_rope(rope)} if isinstance(rope, dict) else {}


def _plain_rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = {k: _plain_rope(v) if isinstance(v, dict) else v for k, v in rope.items()}
    if "short_factor" in plain or "long_factor" in plain:
        plain = {"rope_type": "default", "rope_theta": plain.get("rope_theta", 10000.0)}
    if "mrope_section" in plain:
        half = max(1, int(HEAD * plain.get("partial_rotary_factor", 1.0)) // 2)
        plain["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]
    return plain
