"""Loss on held-out rows, by the same path as training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from attrs import evolve

from ft.dist import World
from ft.models.policy import Policy
from ft.rollout.facts import facts
from ft.train import step
from ft.types import Context, Dataset, Example, Given, Method, asked


def held_out_examples(
    method: Method, data: Dataset, context: Context, examples: int | None = None
) -> Sequence[Example]:
    """What the method makes of the first ``examples`` rows."""
    rows = min(data.rows, examples or data.rows)
    held_out = Given(examples=[example for i in range(rows) for example in data.row(i)])
    return method.examples(0, evolve(context, data=held_out, examples=rows))


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
    if asked(method).rows == "prompts":
        return answered(data, context, examples)
    chosen = held_out_examples(method, data, context, examples)
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


def answered(data: Dataset, context: Context, examples: int | None = None) -> dict[str, float]:
    """Rewards of the likeliest answer to each of the first ``examples`` prompts."""
    assert context.sampler is not None and context.judge is not None
    prompts = [data.row(i)[0] for i in range(min(data.rows, examples or data.rows))]
    context.sampler.sync(-1)
    groups = context.sampler.rollout(prompts, 1, -1, greedy=True)
    told = facts([context.judge.score([rollout for group in groups for rollout in group])])
    return {f"eval/{name}": told[name] for name in told if name not in ("groups_alike", "reward_std")}
