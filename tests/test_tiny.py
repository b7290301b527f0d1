"""Look-alikes keep the architecture and the pattern of layers, are small, and can take a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, MOE
from transformers import AutoConfig

from ft.errors import ModelError
from ft.models import load
from ft.models.tiny import config_by_family, period, shrink
from ft.recipe.parts import Model


@pytest.mark.parametrize("family", [*FAMILIES, "qwen3_5_moe"])
def test_every_family_makes_a_tiny_model_that_trains(family: str) -> None:
    config = config_by_family(family)
    model = load.skeleton(config, Model(id="x", dtype="float32"))
    load.fill_random(model, 0)
    assert sum(p.numel() for p in model.parameters()) < 700_000
    x = torch.randint(3, 512, (2, 12), generator=torch.Generator().manual_seed(0))
    loss = model(input_ids=x, labels=x).loss
    loss.backward()
    assert 5.5 < loss.item() < 7.0  # ln 512 = 6.24
    lost = [n for n, p in model.named_parameters() if p.grad is None and "indexer" not in n and "bias" not in n]
    assert not lost
    experts = [n for n, p in model.named_parameters() if p.ndim == 3 and "experts" in n]
    assert bool(experts) == (family in MOE or family == "qwen3_5_moe")


def test_the_flagships_pattern_is_kept() -> None:
    """As published: 40 layers, every fourth with full attention; 256 experts of which 8 answer; 16 to 2 heads."""
    text = AutoConfig.for_model("qwen3_5_moe_text").to_dict()
    text["rope_parameters"] = {
        "rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25, "mrope_interleaved": True,
        "mrope_section": [11, 11, 10],
    }  # fmt: skip
    root: Any = AutoConfig.for_model("qwen3_5_moe", text_config=text)
    small: Any = shrink(root, 300)
    assert small.model_type == "qwen3_5_moe_text" and small.vocab_size == 300
    assert small.layer_types == ["linear_attention"] * 3 + ["full_attention"]
    assert (small.num_hidden_layers, small.num_experts, small.num_experts_per_tok) == (4, 8, 2)
    assert (small.num_attention_heads, small.num_key_value_heads) == (4, 1)  # 16 to 2 would leave half a head
    assert (small.linear_num_value_heads, small.linear_num_key_heads) == (4, 2)
    assert sum(small.rope_parameters["mrope_section"]) == 2  # half of a quarter of the head's 16
    assert small.rope_parameters["rope_theta"] == 1e7


def test_leading_dense_layers_and_groups() -> None:
    small: Any = shrink(AutoConfig.for_model("deepseek_v3"))
    assert (small.first_k_dense_replace, small.num_hidden_layers) == (1, 2)
    assert (small.n_group, small.topk_group, small.n_routed_experts) == (4, 2, 8)
    glm: Any = shrink(AutoConfig.for_model("glm_moe_dsa"))
    assert glm.mlp_layer_types == ["dense", "sparse"]
    gemma: Any = shrink(AutoConfig.for_model("gemma3_text"))
    assert gemma.layer_types == ["sliding_attention"] * 5 + ["full_attention"]


def test_what_is_small_stays_as_it_is() -> None:
    config = config_by_family("qwen3_moe")
    again = shrink(config)
    assert again.to_dict() == config.to_dict()


def test_the_config_given_is_left_alone() -> None:
    config = AutoConfig.for_model("qwen3_next")
    before = config.to_dict()
    shrink(config)
    assert config.to_dict() == before


def test_token_ids_beyond_the_vocabulary_are_dropped() -> None:
    config: Any = AutoConfig.for_model("llama", eos_token_id=[2, 128009], pad_token_id=128004, bos_token_id=1)
    small: Any = shrink(config, 260)
    assert (small.eos_token_id, small.pad_token_id, small.bos_token_id) == ([2], None, 1)


def test_period() -> None:
    assert period(["a"] * 10) == 1
    assert period(["a", "b"] * 5 + ["a"]) == 2
    assert period(["a", "a", "b"] * 4) == 3
    assert period(["a", "b", "b", "a", "c", "b", "a", "a", "b", "b"]) == 5  # no pattern: the first c is the fifth
    assert period(["a", "b", "b", "b"]) == 4  # short enough to be taken whole


def test_an_unknown_family_is_named() -> None:
    with pytest.raises(ModelError, match="no model type 'qwen9_moe'"):
        config_by_family("qwen9_moe")
