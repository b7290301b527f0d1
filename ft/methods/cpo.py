"""Contrastive preference optimisation: prefer the chosen answer, and go on learning it. No reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

from attrs import Attribute, field, frozen, validators

from ft import losses
from ft.methods import pairs
from ft.types import Batch, Context, Counts, Example, LogProbs, LossOutput

Kind = Literal["sigmoid", "hinge", "ipo"]


def _smoothing(method: CPO, attribute: Attribute[Any], value: float) -> None:
    if value and method.kind != "sigmoid":
        raise ValueError(f"'label_smoothing' must be 0 with {method.kind}; it is for sigmoid")


@frozen(kw_only=True)
class CPO:
    """A preference loss on log-prob sums (a mean over pairs) and the likelihood of the chosen answers (over tokens).

    Formula and source: ``ft.losses.cpo``.
    """

    kind: Kind = field(default="sigmoid", validator=validators.in_(get_args(Kind)))
    """The preference loss."""
    beta: float = field(default=0.1, validator=validators.gt(0.0))
    """Scale of the rewards."""
    label_smoothing: float = field(default=0.0, validator=[validators.ge(0.0), validators.lt(0.5), _smoothing])
    """Share of pairs taken to be labelled the wrong way round (sigmoid)."""
    sft: float = field(default=1.0, validator=validators.ge(0.0))
    """Weight of the likelihood of chosen answers."""

    def examples(self, step: int, ctx: Context) -> Sequence[Example]:
        return pairs.draw(step, ctx)

    def prepare(self, batch: Batch, policy: Any) -> Batch:
        pairs.check(batch)
        return pairs.weigh_chosen(batch)

    def loss(self, logprobs: LogProbs, batch: Batch, counts: Counts) -> LossOutput:
        out = losses.cpo(
            *pairs.sums(logprobs.logp_T, batch),
            kind=self.kind,
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            lengths=pairs.lengths(batch),
            sft=self.sft,
            tokens=counts.ce_tokens if self.sft else None,
            units=counts.units,
        )
        return pairs.with_lengths(out, batch, counts)
