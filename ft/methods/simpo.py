"""SimPO: prefer the chosen answer by its mean log-prob, with a margin and without a reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from attrs import field, frozen, validators

from ft import losses
from ft.methods import pairs
from ft.types import Batch, Context, Counts, Example, LogProbs, LossOutput


@frozen(kw_only=True)
class SimPO:
    """A logistic loss on the difference of length-normalised log-probs, averaged over all of a step's pairs.

    Formula and sources: ``ft.losses.simpo``.
    """

    beta: float = field(default=2.0, validator=validators.gt(0.0))
    """Scale of the rewards."""
    gamma: float = 1.0
    """The margin itself; published settings often give gamma / beta."""
    alpha: float = 0.0
    """AlphaPO's shape of the reward; 0 is SimPO."""
    label_smoothing: float = field(default=0.0, validator=validators.and_(validators.ge(0.0), validators.lt(0.5)))
    """Share of pairs taken to be labelled the wrong way round."""

    def examples(self, step: int, ctx: Context) -> Sequence[Example]:
        return pairs.draw(step, ctx)

    def prepare(self, batch: Batch, policy: Any) -> Batch:
        pairs.check(batch)
        return batch

    def loss(self, logprobs: LogProbs, batch: Batch, counts: Counts) -> LossOutput:
        out = losses.simpo(
            *pairs.means(logprobs.logp_T, batch),
            beta=self.beta,
            gamma=self.gamma,
            alpha=self.alpha,
            label_smoothing=self.label_smoothing,
            units=counts.units,
        )
        return pairs.with_lengths(out, batch, counts)
