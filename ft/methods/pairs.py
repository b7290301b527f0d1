"""What methods on pairs share: where the two answers lie in a batch, and their sums.

A pair is a unit of two examples, the chosen one first. Packing keeps them side by side, so that sequences 2p and
2p + 1 of a batch are pair p. Shapes: T positions of a batch, S sequences, P pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from attrs import evolve

from ft.errors import DataError, RecipeError
from ft.types import Batch, Context, Counts, Example, LossOutput

if TYPE_CHECKING:
    from torch import Tensor


def draw(step: int, ctx: Context, *, margin: bool = False) -> Sequence[Example]:
    """The pairs of a step.

    Args:
        margin: each must say how much better its chosen answer is.

    Raises:
        DataError: rows that are not pairs; a pair without a margin.
    """
    assert ctx.data is not None
    examples = ctx.data.draw(step, ctx.examples, ctx.seed)
    units: dict[int | None, int] = {}
    for example in examples:
        units[example.unit] = units.get(example.unit, 0) + 1
    for example in examples:
        if example.unit is None or units[example.unit] != 2:
            raise _not_a_pair(example.source)
        if margin and example.margin is None:
            raise DataError(
                "this method asks for a margin, and this row has none",
                where=example.source,
                expected='"margin", or "score_chosen" and "score_rejected"',
                got="a pair without it",
                fix="fill it in, or set method.margin=False",
            )
    return examples


def together(examples: Sequence[Example], ctx: Context) -> list[Example]:
    """The same pairs as one unit, which packing keeps whole: for losses that compare the pairs of a step.

    Other ranks have nothing to do then.

    Raises:
        RecipeError: they are longer than a micro-batch.
    """
    from ft.data.pack import positions
    from ft.data.share import share_prompts

    unit = [evolve(example, unit=0) for example in examples]
    least = positions(share_prompts(unit))  # what a model forwards that can share prompts; any other forwards more
    if ctx.tokens is not None and least > ctx.tokens:
        raise RecipeError(
            "this method sorts all pairs of a step among each other, and they are longer than a micro-batch",
            where="batch.tokens",
            expected=f"room for {len(unit) // 2} pairs, which take {least} positions or more",
            got=str(ctx.tokens),
            fix=f"set batch.tokens={least} or more, or fewer pairs: batch.examples; eval.examples for held-out rows",
        )
    return unit


def check(batch: Batch) -> None:
    """Refuse sequences that are not pairs. It reads what lies on the host: both answers come from one row.

    Raises:
        DataError: a sequence is without its other answer.
    """
    for chosen, rejected in zip(batch.sources[::2], batch.sources[1::2], strict=False):
        if chosen != rejected:
            raise _not_a_pair(chosen)
    if len(batch.lengths) % 2:
        raise _not_a_pair(batch.sources[-1])


def _not_a_pair(source: str) -> DataError:
    return DataError(
        "this method learns from pairs, and this row is none",
        where=source,
        expected="a chosen and a rejected answer in each row, of training rows and held-out rows alike",
        got="a row without its other answer",
        fix='give rows "chosen" and "rejected", or choose another method',
    )


def split(x_S: Tensor) -> tuple[Tensor, Tensor]:
    """(chosen_P, rejected_P) of what is known of each sequence."""
    return x_S[0::2], x_S[1::2]


def sums(x_T: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """(chosen_P, rejected_P): the sum of ``x_T`` over each answer. Empty, with a graph, for a filler batch."""
    from ft.data.pack import segment_sum

    return split(segment_sum(x_T, batch.seq_T, len(batch.lengths)))


def number(counts: Counts) -> Any:
    """How many pairs a step has. Units may hold several (``together``)."""
    return counts.seqs / 2


def lengths(batch: Batch) -> tuple[Tensor, Tensor]:
    """(chosen_P, rejected_P): trained tokens of each answer, at least 1."""
    chosen_P, rejected_P = sums(batch.mask_T, batch)
    return chosen_P.clamp(min=1), rejected_P.clamp(min=1)


def with_lengths(out: LossOutput, batch: Batch, counts: Counts) -> LossOutput:
    """The same loss, and the answers' mean lengths among its numbers, for losses that have no use for lengths."""
    n_w, n_l = (n_P.sum() / number(counts) for n_P in lengths(batch))
    return evolve(out, sums={**out.sums, "lengths/chosen": n_w, "lengths/rejected": n_l})


def means(logp_T: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """(chosen_P, rejected_P): the mean log-prob of each answer's trained tokens."""
    (chosen_P, rejected_P), (n_w, n_l) = sums(logp_T, batch), lengths(batch)
    return chosen_P / n_w, rejected_P / n_l


def weigh_chosen(batch: Batch) -> Batch:
    """The same batch with a cross-entropy weight of 1 on the chosen answers and 0 elsewhere.

    Thereby ``Counts.ce_tokens`` is the step's number of trained tokens of chosen answers: the denominator of a
    likelihood term.
    """
    return evolve(batch, ce_T=(batch.seq_T % 2 == 0).float())
