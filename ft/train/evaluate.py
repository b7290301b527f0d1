"""Loss on held-out rows, by the same path as training."""

from __future__ import annotations

import torch
from attrs import evolve

from ft.dist import World
from ft.models.policy import Policy
from ft.train import step
from ft.types import Context, Dataset, Given, Method


@torch.no_grad()
def evaluate(
    policy: Policy,
    method: Method,
    data: Dataset,
    world: World,
    context: Context,
    *,
    tokens: int,
    examples: int | None = None,
) -> dict[str, float]:
    """Mean loss and the method's other numbers over the first ``examples`` rows (all by default).

    The method makes its examples of them as of a step's rows. Dropout is off while it runs. Every rank must call it,
    and gets the same numbers.
    """
    rows = min(data.rows, examples or data.rows)
    held_out = Given(examples=[example for i in range(rows) for example in data.row(i)])
    chosen = method.examples(0, evolve(context, data=held_out, examples=rows))
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
