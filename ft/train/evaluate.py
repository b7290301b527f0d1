"""Loss on held-out rows, by the same path as training."""

from __future__ import annotations

import torch

from ft.dist import World
from ft.models.policy import Policy
from ft.train import step
from ft.types import Dataset, Method


@torch.no_grad()
def evaluate(
    policy: Policy, method: Method, data: Dataset, world: World, *, tokens: int, examples: int | None = None
) -> dict[str, float]:
    """Mean loss and the method's other numbers over the first ``examples`` rows (all by default).

    Dropout is off while it runs. Every rank must call it, and gets the same numbers.
    """
    chosen = [example for i in range(min(data.rows, examples or data.rows)) for example in data.row(i)]
    module = policy.scorer
    was_training = module.training
    module.eval()
    try:
        plan = step.plan(chosen, method, policy, world, tokens=tokens)
        out = step.reduce(step.run(plan, method, policy, world, backward=False), world)
    finally:
        module.train(was_training)
    numbers = {"loss": out.loss, **out.sums, **out.maxes, "tokens": plan.counts.tokens}
    return {f"eval/{name}": float(value) for name, value in numbers.items()}
