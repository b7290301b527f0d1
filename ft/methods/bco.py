"""Binary classifier optimisation: tell good answers from bad ones by their reward against a reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import attrs
from attrs import evolve, field, frozen, validators

from ft import losses
from ft.errors import RecipeError
from ft.methods import rated
from ft.types import Asks, Batch, Context, Counts, Example, LogProbs, LossOutput


def _limit(method: BCO, attribute: attrs.Attribute[Any], value: float) -> None:
    if value != attribute.default and method.density is None:
        raise ValueError(f"'{attribute.name}' must be left alone without a function in density")


def _ordered(method: BCO, attribute: attrs.Attribute[Any], value: float) -> None:
    if value < method.low:
        raise ValueError(f"'high' must be at least low={method.low:g}")


@frozen(kw_only=True)
class BCO:
    """A logistic loss on beta (log-prob - reference's) above or below the step's mean of it.

    The mean is over all answers of the step on all ranks, known from a forward without gradient. It is exact, where
    the paper's moving average mixes in policies of the past: nothing is carried from step to step, and a run that was
    stopped goes on as if it had not been. A pair counts as one good and one bad answer. Formula and source:
    ``ft.losses.bco``.
    """

    beta: float = field(default=0.1, validator=validators.gt(0.0))
    """Scale of the rewards. They are compared with the step's own mean, so a step should hold both kinds of answers."""
    density: Callable[..., Any] | None = None
    """For good and bad answers whose prompts differ in kind (the paper's UDM): a function that takes a list of prompts
    and gives of each the probability p that it is one of the good answers' prompts, from a classifier trained
    beforehand. A bad answer then weighs p / (1 - p), a good one 1. None: all weigh 1."""
    low: float = field(default=0.5, validator=[validators.ge(0.0), _limit])
    """Smallest weight of a bad answer, with `density`."""
    high: float = field(default=10.0, validator=[validators.gt(0.0), _limit, _ordered])
    """Largest weight of a bad answer, with `density`."""

    asks = Asks(reference="logps")

    def examples(self, step: int, ctx: Context) -> Sequence[Example]:
        drawn = rated.draw(step, ctx)
        return drawn if self.density is None else _weighted(drawn, self, ctx)

    def prepare(self, batch: Batch, policy: Any) -> Batch:
        from ft.models.reference import policy_logps, reference_logps

        ref_logp_T = reference_logps(policy, batch)
        reward_S = self.beta * rated.sums(policy_logps(policy, batch) - ref_logp_T, batch)
        return evolve(batch, ref_logp_T=ref_logp_T, baseline_S=reward_S)

    def loss(self, logprobs: LogProbs, batch: Batch, counts: Counts) -> LossOutput:
        assert batch.ref_logp_T is not None
        weight_S = None if batch.ce_T is None else batch.ce_T[batch.cu_S1[:-1].long()]
        out = losses.bco(
            rated.sums(logprobs.logp_T, batch),
            rated.sums(batch.ref_logp_T, batch),
            rated.good(batch),
            weight_S=weight_S,
            delta=rated.baseline(counts),
            beta=self.beta,
            labels=rated.labels(counts),
            units=counts.seqs,
        )
        return rated.with_lengths(out, batch, counts)


def _weighted(examples: Sequence[Example], method: BCO, ctx: Context) -> list[Example]:
    """The examples with the weight of each, at all its tokens, in the cross-entropy that BCO is.

    Raises:
        RecipeError: the function does not give one probability for each prompt.
    """
    import numpy as np
    import torch

    assert method.density is not None
    prompts = [ctx.tokenizer.decode(rated.prompt(example), skip_special_tokens=True) for example in examples]
    p_S = np.asarray(method.density(prompts), np.float32)
    if p_S.shape != (len(prompts),) or not ((p_S >= 0) & (p_S <= 1)).all():
        raise RecipeError(
            "the density function must give one probability for each prompt",
            where="method.density",
            expected=f"{len(prompts)} numbers from 0 to 1",
            got=f"shape {p_S.shape}, {p_S.min(initial=np.inf):g} to {p_S.max(initial=-np.inf):g}",
            fix="let it return [float, ...] in the order of the prompts",
        )
    weight_S = losses.density_ratio(torch.from_numpy(p_S), low=method.low, high=method.high).tolist()
    return [evolve(e, ce_L=np.full(len(e), w, np.float32)) for e, w in zip(examples, weight_S, strict=True)]
