"""A process reward model: a judgement of each step of an answer, given the steps before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import attrs
from attrs import field, frozen, validators

from ft import losses
from ft.errors import DataError
from ft.types import Asks, Batch, Context, Counts, Example, LogProbs, LossOutput


@frozen(kw_only=True)
class Stepwise:
    """Judge the steps of answers, each at its last token, averaged over all of a step's judged steps on all ranks.

    What is saved loads as transformers' ``...ForTokenClassification``. Formula and sources: ``ft.losses.stepwise``.
    """

    scores: Literal[1, 2] = field(default=2, validator=validators.in_((1, 2)))
    """2: a score for bad and one for good, whose softmax is their probability. 1: one score, whose sigmoid is the
    probability of a good step; labels may then lie between 0 and 1."""

    @property
    def asks(self) -> Asks:
        return Asks(head="steps", classes=self.scores)

    def examples(self, step: int, ctx: Context) -> Sequence[Example]:
        assert ctx.data is not None
        return [self._judged(example) for example in ctx.data.draw(step, ctx.examples, ctx.seed)]

    def prepare(self, batch: Batch, policy: Any) -> Batch:
        return batch

    def loss(self, logprobs: LogProbs, batch: Batch, counts: Counts) -> LossOutput:
        assert logprobs.score_TC is not None
        label_T = batch.mask_T.float() if batch.label_T is None else batch.label_T  # None: a filler batch
        one = self.scores == 1
        return losses.stepwise(
            logprobs.score_TC[:, 0] if one else logprobs.score_TC,
            label_T if one else label_T.long(),
            mask_N=batch.mask_T,
            units=counts.tokens,
        )

    def _judged(self, example: Example) -> Example:
        """The example marked where a step's last token goes in, and so one token on: nothing comes out of the last."""
        import numpy as np

        label_L = example.label_L
        if label_L is None:
            raise DataError(
                "this method learns from judged steps, and this row has none",
                where=example.source,
                expected='"prompt", "completions" (a list of steps) and "labels" (one for each step)',
                got="a row of another format",
                fix="give rows steps with labels, or choose another method",
            )
        if self.scores == 2 and not np.isin(label_L[example.mask_L], (0.0, 1.0)).all():
            raise DataError(
                "a label between good and bad, where two scores are to tell them apart",
                where=example.source,
                expected="true or false (1 or 0) for each step",
                got=", ".join(f"{label:g}" for label in label_L[example.mask_L]),
                fix="set method.scores=1",
            )
        tokens_L = np.append(example.tokens_L, example.tokens_L[-1])
        mask_L, label_L = (np.concatenate([x_L[:1] * 0, x_L]) for x_L in (example.mask_L, label_L))
        return attrs.evolve(example, tokens_L=tokens_L, mask_L=mask_L.astype(bool), label_L=label_L)
