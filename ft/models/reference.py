"""The reference of a preference method: what the model said before training. Shapes: T positions of a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from ft.errors import RecipeError
from ft.models import lora
from ft.models.policy import Policy, logprobs
from ft.types import Batch


def reference_logps(policy: Policy, batch: Batch) -> Tensor:
    """Log-probs [T] of a batch under the base model: the policy with its adapters off and without dropout.

    The base is the reference also of a run that starts from a saved adapter.

    Raises:
        RecipeError: all weights are trained, so that no reference is left.
    """
    scorer = policy.scorer
    if not lora.adapter_entries(scorer.model):
        raise RecipeError(
            "this method compares the model with a reference, and full fine-tuning keeps none",
            where="adapter",
            expected="adapters: with them switched off, the model is its own reference",
            got="none: all weights are trained",
            fix="train adapters, adapter=LoRA(...), or use a method without a reference: SimPO, ORPO or CPO",
        )
    with lora.disabled(scorer.model):
        return policy_logps(policy, batch)


def policy_logps(policy: Policy, batch: Batch) -> Tensor:
    """Log-probs [T] of a batch under the policy as it is, without dropout and without gradient."""
    scorer = policy.scorer
    training = scorer.training
    scorer.eval()
    try:
        with torch.no_grad():
            return logprobs(policy, batch).logp_T
    finally:
        scorer.train(training)
