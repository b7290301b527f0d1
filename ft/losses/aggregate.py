"""Sums over the sequences of a packed row, and the three ways of averaging a per-token loss.

Shapes: T packed tokens, whose sequences are told apart by ``seq_T``. The number of sequences is known to no tensor's
shape, and asking the device for it would stall the step, so sums lie in T + 1 places: ids may be any of 0 .. T in any
order, which T tokens can never exceed when sequences are numbered from 0 (filler has the number after the last).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ft.losses.reduce import Count, check_number, check_option, check_same, segment_sum, share

AGGREGATES = ("token", "sequence", "constant")


def check_tokens(what: str, mask_T: Tensor, seq_T: Tensor | None, **tensors: Tensor | None) -> None:
    """Refuse shapes that would broadcast, masks that are not bool, and ids that are not integers."""
    check_same(what, mask_T=mask_T, seq_T=seq_T, **tensors)
    if mask_T.dtype != torch.bool:
        raise ValueError(f"{what}: expected mask_T of torch.bool, got {mask_T.dtype}")
    if seq_T is not None and seq_T.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{what}: expected seq_T of torch.int64 or int32, got {seq_T.dtype}")


def needs_seq(what: str, seq_T: Tensor | None) -> Tensor:
    """``seq_T``, or a refusal that says which option asked for it."""
    if seq_T is None:
        raise ValueError(f"{what}: expected seq_T, the sequence of each token; got None")
    return seq_T


def per_sequence_sum(x_T: Tensor, seq_T: Tensor) -> Tensor:
    """At each token the sum of ``x_T`` over its own sequence. Mask ``x_T`` first. Differentiable."""
    return segment_sum(x_T, seq_T, x_T.numel() + 1).index_select(0, seq_T)


def lengths(mask_T: Tensor, seq_T: Tensor) -> Tensor:
    """At each token the number of trained tokens of its sequence, at least 1, in float32."""
    return per_sequence_sum(mask_T, seq_T).clamp(min=1)


def per_sequence_mean(x_T: Tensor, mask_T: Tensor, seq_T: Tensor, *, length_T: Tensor | None = None) -> Tensor:
    """At each token the mean of ``x_T`` over the trained tokens of its sequence; 0 in a sequence that has none.

    ``x_T`` must be 0 where ``mask_T`` is False. ``length_T``: ``lengths(mask_T, seq_T)``, where already known.
    """
    return per_sequence_sum(x_T, seq_T) / (lengths(mask_T, seq_T) if length_T is None else length_T)


def count_sequences(mask_T: Tensor, seq_T: Tensor) -> Tensor:
    """How many sequences have a trained token, 0-d."""
    return (segment_sum(mask_T, seq_T, mask_T.numel() + 1) > 0).sum()


def mean(
    x_T: Tensor,
    mask_T: Tensor,
    seq_T: Tensor | None,
    *,
    how: str,
    constant: float | None = None,
    tokens: Count | None = None,
    seqs: Count | None = None,
    length_T: Tensor | None = None,
) -> Tensor:
    """This call's share of the step's mean of ``x_T``, which is 0 where ``mask_T`` is False.

    - ``"token"``: sum_t x_t / tokens. Every token counts alike (DAPO, BNPO).
    - ``"sequence"``: sum_s (mean over the trained tokens of s) / seqs. Every sequence counts alike (GRPO).
    - ``"constant"``: sum_t x_t / (seqs * constant): neither depends on how long answers came out (Dr. GRPO with
      ``constant`` the longest completion allowed; LUSPO with 1).

    ``tokens`` and ``seqs`` default to this call's own trained tokens, and its own sequences with a trained token.
    A sequence whose tokens are all masked therefore adds nothing and is not counted, unless ``seqs`` counts it.
    ``length_T``: ``lengths(mask_T, seq_T)``, where already known.
    """
    check_option("aggregate", how, AGGREGATES)
    if (how == "constant") != (constant is not None):
        raise ValueError(f"constant: expected a number with aggregate='constant' alone; got {constant} with {how!r}")
    if how == "token":
        return share(x_T.sum(), mask_T.sum() if tokens is None else tokens)
    if how == "sequence":
        seq_T = needs_seq(f"aggregate={how!r}", seq_T)
        x_T = x_T / (lengths(mask_T, seq_T) if length_T is None else length_T)
    if seqs is None:
        seqs = count_sequences(mask_T, needs_seq(f"aggregate={how!r} without seqs", seq_T))
    total = share(x_T.sum(), seqs)
    if constant is None:
        return total
    check_number("constant", constant, 0, open_low=True)
    return total / constant
