"""Sums over the sequences of a packed row, and the three ways of averaging a per-token loss.

Shapes: T packed tokens, S places of sums, R runs of tokens that lie together. Sequences are told apart in one of two
ways. ``cu_S1`` says where each begins, as packing lays them: sequence s owns tokens cu_S1[s] : cu_S1[s + 1], and what
comes after the last is filler; S is then the number of sequences. ``seq_T`` holds ids of 0 .. T in any order (T tokens
can never have more when sequences are numbered from 0; filler has the number after the last). Their number is then
known to no tensor's shape, and asking a device for it would stall the step: there sums lie in T + 1 places. A processor
answers at once, and sums by runs, which takes a quarter of the time; runs of one length, it sums as rows.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ft.losses.elementwise import Mask, where_over
from ft.losses.reduce import Count, check_number, check_option, check_same, share, upcast

AGGREGATES = ("token", "sequence", "constant")


def check_tokens(what: str, mask_T: Tensor, seq_T: Tensor | None, **tensors: Tensor | None) -> None:
    """Refuse shapes that would broadcast, masks that are not bool, and ids that are not integers."""
    check_same(what, mask_T=mask_T, seq_T=seq_T, **tensors)
    if mask_T.dtype != torch.bool:
        raise ValueError(f"{what}: expected mask_T of torch.bool, got {mask_T.dtype}")
    if seq_T is not None and seq_T.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{what}: expected seq_T of torch.int64 or int32, got {seq_T.dtype}")


def sequences_of(what: str, mask_T: Tensor, seq_T: Tensor | None, cu_S1: Tensor | None) -> Sequences | None:
    """The sequences that either argument tells apart; None without them, a refusal of both."""
    if cu_S1 is None:
        return None if seq_T is None else Sequences(seq_T, mask_T)
    if seq_T is not None:
        raise ValueError(f"{what}: expected seq_T or cu_S1, which say the same; got both")
    if cu_S1.dim() != 1 or not cu_S1.numel() or cu_S1.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{what}: expected cu_S1 of S + 1 integers, got {tuple(cu_S1.shape)} of {cu_S1.dtype}")
    return Sequences(None, mask_T, cu_S1)


def needs_seq(what: str, seq_T: Tensor | None) -> Tensor:
    """``seq_T``, or a refusal that says which option asked for it."""
    if seq_T is None:
        raise ValueError(f"{what}: expected seq_T, the sequence of each token; got None")
    return seq_T


class _Runs(NamedTuple):
    """The tokens that lie together. R is S, in order, where no sequence has two runs: ``place_R`` is then None."""

    start_R1: Tensor
    place_R: Tensor | None  # of each run, among the S sums
    width: int | None = None  # of every run, where they are alike and leave no token over


class Sequences:
    """Which tokens share a sequence, worked out when first asked for and once. ``mask_T`` says which are trained."""

    def __init__(self, seq_T: Tensor | None, mask_T: Tensor, cu_S1: Tensor | None = None) -> None:
        self.seq_T, self.mask_T, self.cu_S1, self.mask = seq_T, mask_T, cu_S1, Mask(mask_T)

    def sum(self, x_T: Tensor) -> Tensor:
        """At each token the sum of ``x_T`` over its own sequence. Differentiable."""
        return _SequenceSum.apply(upcast(x_T), self, False)  # type: ignore[return-value]

    def mean(self, x_T: Tensor) -> Tensor:
        """At each token the mean of ``x_T``, which is 0 where nothing is trained, over its trained tokens."""
        return _SequenceSum.apply(upcast(x_T), self, True)  # type: ignore[return-value]

    @cached_property
    def length_T(self) -> Tensor:
        """At each token the number of trained tokens of its sequence, at least 1, in float32."""
        return self.lay(self.length_S).clamp_(min=1)

    @cached_property
    def length_S(self) -> Tensor:
        """The same in the order of ``sums``."""
        return self.trained_S.clamp(min=1)

    @cached_property
    def trained(self) -> Tensor:
        """How many sequences have a trained token, 0-d."""
        return (self.trained_S > 0).sum()

    @cached_property
    def trained_S(self) -> Tensor:
        """The number of trained tokens of each, in the order of ``sums``, in float32."""
        return self.sums(self.mask.trained_T)

    @property
    def summed_in_order(self) -> bool:
        """Whether ``sums`` are fast and always the same: everywhere but for ids on a device."""
        return self._runs is not None

    def sums(self, x_T: Tensor) -> Tensor:
        """One sum for each sequence, [S], 0 in places of no sequence, of what has no gradient.

        The order is that of ``cu_S1``; of ``seq_T``'s ids it is one that only ``lay`` knows.
        """
        if self._runs is None:
            assert self.seq_T is not None
            return x_T.new_zeros(x_T.numel() + 1).index_add(0, self.seq_T, x_T)
        start_R1, place_R, width = self._runs
        if width is not None:
            sum_R = x_T.reshape(-1, width).sum(1)
        else:
            sum_R = torch.segment_reduce(x_T.contiguous(), "sum", offsets=start_R1, unsafe=True)
        return sum_R if place_R is None else torch.zeros_like(sum_R).index_add(0, place_R, sum_R)

    def lay(self, x_S: Tensor) -> Tensor:
        """The number of its sequence at each token; 0 at filler after the last of ``cu_S1``."""
        if self._runs is None:
            assert self.seq_T is not None
            return x_S.index_select(0, self.seq_T)
        start_R1, place_R, width = self._runs
        x_R = x_S if place_R is None else x_S.index_select(0, place_R)
        if width is not None:
            return x_R.repeat_interleave(width)
        like_T = x_S.new_empty(self.mask_T.shape)
        # The gradient of a sum by runs lays a number at each of its tokens, in a third of the time of ids.
        return torch.ops.aten._segment_reduce_backward(x_R, x_R, like_T, "sum", offsets=start_R1)

    def lay_trained(self, x_S: Tensor) -> Tensor:
        """The same at trained tokens, and 0 at the others."""
        width = None if self._runs is None or self._runs.place_R is not None else self._runs.width
        if width is None:
            return self.mask.keep_(self.lay(x_S))
        # Of rows, one pass does both.
        return where_over(x_S[:, None].expand(-1, width), self.mask.trained_T.view(-1, width), 0.5).view(-1)

    def weighed_(self, x_T: Tensor, weight_S: Tensor) -> Tensor:
        """``x_T`` times the number of its sequence, in its place."""
        width = None if self._runs is None or self._runs.place_R is not None else self._runs.width
        if width is None:
            return x_T.mul_(self.lay(weight_S))
        x_T.view(-1, width).mul_(weight_S[:, None])
        return x_T

    @cached_property
    def _runs(self) -> _Runs | None:
        T, on_cpu = self.mask_T.numel(), self.mask_T.device.type == "cpu"
        if self.cu_S1 is not None:
            starts = self.cu_S1.tolist() if on_cpu else [0]
            if starts[0] != 0 or starts[-1] > T or starts != sorted(starts):
                raise ValueError(f"cu_S1: expected offsets that rise from 0 to {T} at most; got {starts}")
            return _Runs(self.cu_S1, None, _width(starts, T) if on_cpu else None)
        if not on_cpu or not T:
            return None
        id_R, count_R = torch.unique_consecutive(self.seq_T, return_counts=True)
        if id_R.min() < 0 or id_R.max() > T:
            raise ValueError(f"seq_T: expected ids in 0 .. {T}, the number of tokens; got {id_R.min()} .. {id_R.max()}")
        id_S, place_R = torch.unique(id_R, return_inverse=True)
        whole = id_S.numel() == id_R.numel()
        start_R1 = F.pad(count_R.cumsum(0), (1, 0))
        return _Runs(start_R1, None if whole else place_R, _width(start_R1.tolist(), T))


def _width(starts: list[int], T: int) -> int | None:
    width = starts[1] if len(starts) > 1 else 0
    return width if width and starts[-1] == T and starts == list(range(0, T + 1, width)) else None


class _SequenceSum(torch.autograd.Function):
    """Sum or mean. Each token's gradient goes to all tokens of its sequence: the backward is the forward."""

    @staticmethod
    def forward(ctx: Any, x_T: Tensor, sequences: Sequences, mean: bool) -> Tensor:
        ctx.sequences, ctx.mean = sequences, mean
        sum_S = sequences.sums(x_T)
        return sequences.lay(sum_S / sequences.length_S if mean else sum_S)

    @staticmethod
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return _SequenceSum.apply(grad_T, ctx.sequences, ctx.mean), None, None  # type: ignore[return-value]


def per_sequence_sum(x_T: Tensor, seq_T: Tensor) -> Tensor:
    """At each token the sum of ``x_T`` over its own sequence. Mask ``x_T`` first. Differentiable."""
    return Sequences(seq_T, x_T).sum(x_T)


def lengths(mask_T: Tensor, seq_T: Tensor) -> Tensor:
    """At each token the number of trained tokens of its sequence, at least 1, in float32."""
    return Sequences(seq_T, mask_T).length_T


def per_sequence_mean(x_T: Tensor, mask_T: Tensor, seq_T: Tensor, *, length_T: Tensor | None = None) -> Tensor:
    """At each token the mean of ``x_T`` over the trained tokens of its sequence; 0 in a sequence that has none.

    ``x_T`` must be 0 where ``mask_T`` is False. ``length_T``: ``lengths(mask_T, seq_T)``, where already known.
    """
    sequences = Sequences(seq_T, mask_T)
    return sequences.mean(x_T) if length_T is None else sequences.sum(x_T) / length_T


def count_sequences(mask_T: Tensor, seq_T: Tensor) -> Tensor:
    """How many sequences have a trained token, 0-d."""
    return Sequences(seq_T, mask_T).trained


def mean(
    x_T: Tensor,
    mask_T: Tensor,
    seq_T: Tensor | None,
    *,
    how: str,
    constant: float | None = None,
    tokens: Count | None = None,
    seqs: Count | None = None,
) -> Tensor:
    """This call's share of the step's mean of ``x_T``, which is 0 where ``mask_T`` is False.

    - ``"token"``: sum_t x_t / tokens. Every token counts alike (DAPO, BNPO).
    - ``"sequence"``: sum_s (mean over the trained tokens of s) / seqs. Every sequence counts alike (GRPO).
    - ``"constant"``: sum_t x_t / (seqs * constant): neither depends on how long answers came out (Dr. GRPO with
      ``constant`` the longest completion allowed; LUSPO with 1).

    ``tokens`` and ``seqs`` default to this call's own trained tokens, and its own sequences with a trained token.
    A sequence whose tokens are all masked therefore adds nothing and is not counted, unless ``seqs`` counts it.
    The one that ``how`` does not divide by is refused.
    """
    check_denominators(how, constant, seqs)
    if how != "token" and tokens is not None:
        raise ValueError(f"tokens: expected with aggregate='token', which divides by it; got it with {how!r}")
    if how == "token":
        return share(x_T.sum(), mask_T.sum() if tokens is None else tokens)
    sequences = None
    if how == "sequence" or seqs is None:
        needed = f"aggregate={how!r}" + (" without seqs" if seqs is None else "")
        sequences = Sequences(needs_seq(needed, seq_T), mask_T)
    if how == "sequence":
        assert sequences is not None
        x_T = x_T / sequences.length_T
    if seqs is None:
        assert sequences is not None
        seqs = sequences.trained
    total = share(x_T.sum(), seqs)
    return total if constant is None else total / constant


def check_denominators(how: str, constant: float | None, seqs: Count | None) -> None:
    """Refuse an average that is none, and denominators that it does not divide by."""
    check_option("aggregate", how, AGGREGATES)
    if (how == "constant") != (constant is not None):
        raise ValueError(f"constant: expected a number with aggregate='constant' alone; got {constant} with {how!r}")
    if constant is not None:
        check_number("constant", constant, 0, open_low=True)
    if how == "token" and seqs is not None:
        raise ValueError(
            "seqs: expected with aggregate='sequence' or 'constant', which divide by it; got it with 'token'"
        )
