"""Running ahead: the next batches of answers are drawn while this one trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from attrs import evolve, field, frozen, validators

from ft.methods.grpo import GRPO
from ft.types import Asks, Batch, Context, Counts, Example, LogProbs, LossOutput


def _bare(method: Ahead, attribute: Any, value: GRPO) -> None:
    if value.iterations > 1 and method.by > 1:
        raise ValueError("'by' must be 1 with iterations over 1: answers would be several batches old")


@frozen
class Ahead:
    """``method``, with its answers drawn up to ``by`` batches ahead by a sampler beside the trainer (a server).

    An answer's policy is at most ``by`` batches (``by`` x iterations steps) older than the one that trains on it, and
    by as many more as ``GRPO.replay`` held it; the log says how old. ``GRPO.correction`` makes up for it, or
    ``GRPO.old="sampler"`` counts it as part of the ratio. A run that is resumed draws what it had drawn ahead again,
    and says so.
    """

    method: GRPO = field(validator=_bare)
    """What trains."""
    by: int = field(default=1, kw_only=True, validator=validators.ge(1))
    """Batches that are drawn ahead."""

    @property
    def asks(self) -> Asks:
        return evolve(self.method.asks, ahead=self.by)

    @property
    def rewards(self) -> Any:
        return self.method.rewards

    @property
    def sampling(self) -> Any:
        return self.method.sampling

    def examples(self, step: int, ctx: Context) -> Sequence[Example]:
        return self.method.examples(step, evolve(ctx, ahead=self.by if hasattr(ctx.sampler, "take") else 0))

    def prepare(self, batch: Batch, policy: Any) -> Batch:
        return self.method.prepare(batch, policy)

    def loss(self, logprobs: LogProbs, batch: Batch, counts: Counts) -> LossOutput:
        return self.method.loss(logprobs, batch, counts)
