"""Losses: tensors in, ``LossOutput`` out. Nothing here knows of a model, a process group or a file.

    from ft.losses import dpo, grpo, nll        # the losses
    from ft.losses import advantage, ebft, importance   # rooms of pure functions around them

Names are imported when first used, so that a recipe can be read, shown and checked without importing torch. No
module bears the name of a function: importing a module would put it in the function's place.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ft.losses import advantage, ebft, entropy, importance, kl
    from ft.losses.clipped import grpo
    from ft.losses.distill import generalized_jsd, linear_jsd, sampled_kl, topk_jsd
    from ft.losses.ebft import ebft_loss, feature_matching
    from ft.losses.pairs import dpo, ld_sums, wpo_weights
    from ft.losses.policy_gradient import cispo, dppo, gmpo, luspo, reinforce, rloo, sapo, vespo
    from ft.losses.preference import bco, cpo, density_ratio, kto, kto_kl, orpo, simpo
    from ft.losses.reward import bradley_terry, stepwise
    from ft.losses.sft import dft, nll
    from ft.losses.watch import drift

_FUNCTIONS = {
    "clipped": ("grpo",),
    "distill": ("generalized_jsd", "linear_jsd", "sampled_kl", "topk_jsd"),
    "ebft": ("ebft_loss", "feature_matching"),
    "pairs": ("dpo", "ld_sums", "wpo_weights"),
    "policy_gradient": ("cispo", "dppo", "gmpo", "luspo", "reinforce", "rloo", "sapo", "vespo"),
    "preference": ("bco", "cpo", "density_ratio", "kto", "kto_kl", "orpo", "simpo"),
    "reward": ("bradley_terry", "stepwise"),
    "sft": ("dft", "nll"),
    "watch": ("drift",),
}
_MODULES = ("advantage", "ebft", "entropy", "importance", "kl")
_HOME = {name: module for module, names in _FUNCTIONS.items() for name in names}

__all__ = [
    "advantage",
    "bco",
    "bradley_terry",
    "cispo",
    "cpo",
    "density_ratio",
    "dft",
    "dpo",
    "dppo",
    "drift",
    "ebft",
    "ebft_loss",
    "entropy",
    "feature_matching",
    "generalized_jsd",
    "gmpo",
    "grpo",
    "importance",
    "kl",
    "kto",
    "kto_kl",
    "ld_sums",
    "linear_jsd",
    "luspo",
    "nll",
    "orpo",
    "reinforce",
    "rloo",
    "sampled_kl",
    "sapo",
    "simpo",
    "stepwise",
    "topk_jsd",
    "vespo",
    "wpo_weights",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"ft.losses.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'ft.losses' has no attribute {name!r}")
    return getattr(import_module(f"ft.losses.{_HOME[name]}"), name)
