"""The head of a model that scores: its class in transformers, its fresh weights, and what is saved of it.

A scoring model is a trunk and ``score``, one linear layer, as transformers builds it for most families:
``...ForSequenceClassification`` for rewards (the score of a sequence stands at its last token that is not padding) and
``...ForTokenClassification`` for process rewards. Shapes: N scored positions, D model width, C scores per position.
"""

from __future__ import annotations

import hashlib
from copy import deepcopy
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GenericForSequenceClassification, GenericForTokenClassification

from ft.dist import copy_into
from ft.errors import ModelError
from ft.types import Asks

NAME = "score"
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")  # fields of configs
TASKS = {"lm": "CAUSAL_LM", "score": "SEQ_CLS", "steps": "TOKEN_CLS"}  # peft's names, by ``Asks.head``
_KINDS: dict[str, tuple[Any, Any, str, Any]] = {
    "score": (
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        AutoModelForSequenceClassification,
        "ForSequenceClassification",
        GenericForSequenceClassification,
    ),
    "steps": (
        MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
        AutoModelForTokenClassification,
        "ForTokenClassification",
        GenericForTokenClassification,
    ),
}


def planned(config: PretrainedConfig, asks: Asks) -> PretrainedConfig:
    """The config with the number of scores that ``asks`` wants, where it wants any."""
    if asks.head == "lm":
        return config
    config = deepcopy(config)
    config.num_labels = asks.classes
    return config


def scoring_class(config: PretrainedConfig, head: str, causal: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """transformers' class for a scoring model of this family; where it has none, one of the same make.

    Args:
        causal: the family's causal language model.
    """
    return _KINDS[head][0].get(type(config), None) or _made(head, causal)


def check(model: PreTrainedModel) -> None:
    """Refuse a family whose own scoring model is made in another way.

    Raises:
        ModelError: the head is more than one linear layer.
    """
    if not isinstance(getattr(model, NAME, None), nn.Linear):
        raise ModelError(
            f"the head of {type(model).__name__} is not one linear layer called {NAME!r}",
            where="model",
            fix="choose a family whose scoring model is of that make, such as llama or qwen3",
        )


def carry_routing(model: Any) -> None:
    """Say beside the head what the router's balance loss asks of a language model: experts, and how many answer."""
    config = model.config.get_text_config()
    experts = next((n for name in _EXPERTS if (n := getattr(config, name, None))), None)
    per_token = getattr(config, "num_experts_per_tok", None)
    if experts and per_token:
        model.num_experts, model.num_experts_per_tok = experts, per_token


def is_ours(model: PreTrainedModel) -> bool:
    """Whether transformers has no class for this scoring model, so that ``register`` must go before loading."""
    return hasattr(type(model), "ft_made")


@lru_cache(maxsize=64)
def _made(head: str, causal: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """A scoring class for a family without one, as transformers makes them for others."""
    _, _, ending, generic = _KINDS[head]
    family = next(base for base in causal.__mro__[1:] if PreTrainedModel in base.__bases__)
    facts = {"__module__": causal.__module__, "config_class": causal.config_class, "ft_made": True}
    return type(causal.__name__.removesuffix("ForCausalLM") + ending, (generic, family), facts)


def register(family: str) -> None:
    """Let transformers' AutoModelFor{Sequence,Token}Classification load ``family`` where it has no class of its own.

    Needed once per process, for families of which ft said so while training: register("qwen3_5_moe_text").

    Raises:
        ModelError: an unknown family, or one without a causal language model.
    """
    from ft.models.load import causal_class  # which builds on this file

    if family not in CONFIG_MAPPING:
        raise ModelError(f"transformers knows no model type {family!r}", where="family")
    config_class: Any = CONFIG_MAPPING[family]
    for kind, (mapping, auto, _, _) in _KINDS.items():
        if mapping.get(config_class, None) is None:
            # without exist_ok transformers passes over its own configs, and does not say so
            auto.register(config_class, _made(kind, causal_class(config_class())), exist_ok=True)


def parts(model: Any) -> dict[str, nn.Parameter]:
    """The head's parameters by name, none for a language model."""
    module = getattr(model, NAME, None)
    return {f"{NAME}.{leaf}": p for leaf, p in module.named_parameters()} if isinstance(module, nn.Module) else {}


def train(model: Any) -> None:
    """Train the head, in float32, beside adapters."""
    module = getattr(model, NAME).float()
    for p in module.parameters():
        p.requires_grad_(True)


@torch.no_grad()
def init(model: Any, seed: int) -> None:
    """A fresh head: normal with the family's spread, biases zero; a function of the seed and the parameter's name."""
    spread = getattr(model.config.get_text_config(), "initializer_range", None) or 0.02
    for name, p in parts(model).items():
        key = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=7).digest()
        rng = torch.Generator().manual_seed(int.from_bytes(key, "little"))
        value = torch.zeros(p.shape) if p.ndim == 1 else torch.randn(p.shape, generator=rng) * spread
        copy_into(p, value)


def scores(hidden_ND: Tensor, model: Any) -> Tensor:
    """score_NC, float32. Without the dropout that some classes put before their head in training."""
    module = getattr(model, NAME)
    bias = None if module.bias is None else module.bias.float()
    return F.linear(hidden_ND.float(), module.weight.float(), bias)
