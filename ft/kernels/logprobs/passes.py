"""The two passes over the vocabulary, block of positions by block and tile of tokens by tile.

What is done with the logits of one tile is given by the implementation (``Tile``): plain torch in ``reference.py``,
Triton in ``triton.py``.

Shapes: N positions, V vocabulary, D model width, r LoRA rank; R positions of a block and C tokens of a tile.

Each position's target is kept apart from the other tokens. With o = logsumexp over the others and t the target's z,

    logp = logsigmoid(t - o)        1 - p_target = sigmoid(o - t)
    d logp / d hidden = (1 - p_target) * (dz_target - sum over others of softmax_others * dz_other)

which keep full relative precision where the model is almost certain, also when products are rounded to 16 bits;
1 - p formed from p, or a target's row summed with the others, would lose it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from attrs import frozen
from torch import Tensor

from ft.kernels.logprobs.tiles import (
    FORBIDDEN,
    Head,
    Options,
    Work,
    accumulate,
    flatness,
    low_rank,
    make_work,
    spans,
)


@frozen(kw_only=True, eq=False)
class Tile:
    """Where a tile lies: a block's hidden states and targets, and the tokens first .. last of the head."""

    hidden_RD: Tensor
    low_Rr: Tensor | None
    target_R: Tensor
    part: Head
    first: int
    options: Options
    work: Work


# ---- forward --------------------------------------------------------------------------------------------------------


class Block:
    """Running sums over the vocabulary for one block of positions, relative to the largest other logit so far."""

    def __init__(self, R: int, D: int, r: int, jacobian: bool, wide: torch.dtype, device: torch.device):
        def full(value: float, *shape: int) -> Tensor:
            return torch.full(shape, value, dtype=wide, device=device)

        self.target_R1 = full(math.nan, R, 1)  # a target that is in no tile stays NaN
        self.most_R1 = full(0.1 * FORBIDDEN, R, 1)
        self.sum_R1 = full(0.0, R, 1)  # of exp(z - most)
        self.first_R1 = full(0.0, R, 1)  # of exp(z - most) * (z - most)
        self.head_RD = full(0.0, R, D) if jacobian else None  # of exp(z - most) * head
        self.B_Rr = full(0.0, R, r) if jacobian and r else None

    def shrink(self, factor_R1: Tensor) -> None:
        """Bring the products with the head to a new ``most``."""
        for sums in (self.head_RD, self.B_Rr):
            if sums is not None:
                sums.mul_(factor_R1)

    def gather(self, tile_RC: Tensor, part: Head, work: Work) -> None:
        """Add the products of a tile of exp(z - most), in the products' type, with the head."""
        for sums, weight in ((self.head_RD, part.weight_VD), (self.B_Rr, part.B_Vr)):
            if sums is not None and weight is not None:
                accumulate(sums, tile_RC, weight, work)

    def results(self, options: Options) -> tuple[Tensor, Tensor, Tensor | None]:
        """(logp_R1, logsumexp of all z, entropy)."""
        others_R1 = self.most_R1 + self.sum_R1.log()
        logp_R1 = F.logsigmoid(self.target_R1 - others_R1)
        lse_R1 = torch.logaddexp(self.target_R1, others_R1)
        return logp_R1, lse_R1, self._entropy(logp_R1, others_R1) if options.entropy else None

    def _entropy(self, logp_R1: Tensor, others_R1: Tensor) -> Tensor:
        """Entropy of target-or-other, plus that among the others where it is one of them."""
        logq_R1 = F.logsigmoid(others_R1 - self.target_R1)
        among_R1 = self.sum_R1.log() - self.first_R1 / self.sum_R1
        other_R1 = torch.where(logq_R1 > -1000.0, logq_R1.exp() * (among_R1 - logq_R1), 0.0)
        return other_R1 - torch.where(logp_R1 > -1000.0, logp_R1.exp() * logp_R1, 0.0)

    def jacobian(self, target_R: Tensor, head: Head, options: Options) -> Tensor:
        """d logp / d hidden."""
        assert self.head_RD is not None
        others_R1 = self.most_R1 + self.sum_R1.log()
        other_R1 = torch.sigmoid(others_R1 - self.target_R1).mul_(options.slope)
        flat_R1 = flatness(self.target_R1, options)
        mean_R1 = self.sum_R1.clamp(min=torch.finfo(self.sum_R1.dtype).tiny)
        grad_RD = self.head_RD.div_(mean_R1).neg_().add_(head.weight_VD[target_R] * flat_R1).mul_(other_R1)
        if self.B_Rr is not None and head.A_rD is not None and head.B_Vr is not None:
            grad_Rr = self.B_Rr.div_(mean_R1).neg_().add_(head.B_Vr[target_R] * flat_R1).mul_(other_R1)
            grad_RD.addmm_(grad_Rr, head.A_rD.to(grad_Rr.dtype), alpha=head.s)
        return grad_RD


@frozen(kw_only=True, eq=False)
class Forward:
    logp_N: Tensor
    lse_N: Tensor
    entropy_N: Tensor | None
    jacobian_ND: Tensor | None


Add = Callable[[Block, Tile], None]
"""Bring one tile into a block's sums; the tile's memory is free afterwards."""


def forward(
    hidden_ND: Tensor, head: Head, target_N: Tensor, options: Options, *, jacobian: bool, add: Add, tiles: int
) -> Forward:
    """One pass over the vocabulary for each block of positions. ``tiles``: how many wide tiles ``add`` works in."""
    work = make_work(hidden_ND, head.weight_VD, tiles)
    (N, D), V, device = hidden_ND.shape, len(head.weight_VD), hidden_ND.device
    empty = {"dtype": work.wide, "device": device}
    logp_N, lse_N = torch.empty(N, **empty), torch.empty(N, **empty)
    entropy_N = torch.empty(N, **empty) if options.entropy else None
    jacobian_ND = torch.empty(N, D, **empty) if jacobian else None
    for start, stop in spans(N, work.rows):
        hidden_RD, target_R = hidden_ND[start:stop].to(work.dtype), target_N[start:stop]
        low_Rr = low_rank(hidden_RD, head, work.dtype)
        block = Block(stop - start, D, 0 if low_Rr is None else low_Rr.shape[1], jacobian, work.wide, device)
        for first, last in spans(V, work.cols):
            part = head.columns(first, last, work.dtype)
            tile = Tile(hidden_RD=hidden_RD, low_Rr=low_Rr, target_R=target_R, part=part, first=first,
                        options=options, work=work)  # fmt: skip
            add(block, tile)
        logp_R1, lse_R1, entropy_R1 = block.results(options)
        logp_N[start:stop], lse_N[start:stop] = logp_R1[:, 0], lse_R1[:, 0]
        if entropy_N is not None and entropy_R1 is not None:
            entropy_N[start:stop] = entropy_R1[:, 0]
        if jacobian_ND is not None:
            jacobian_ND[start:stop] = block.jacobian(target_R, head, options)
    return Forward(logp_N=logp_N, lse_N=lse_N, entropy_N=entropy_N, jacobian_ND=jacobian_ND)


# ---- backward of a trained head --------------------------------------------------------------------------------------


@frozen(kw_only=True, eq=False)
class Scores:
    """What forward leaves for backward, and the gradient that arrives; all in the sums' type."""

    grad_N: Tensor  # times the slope of z
    logp_N: Tensor
    lse_N: Tensor

    def rows(self, start: int, stop: int) -> Scores:
        return Scores(grad_N=self.grad_N[start:stop], logp_N=self.logp_N[start:stop], lse_N=self.lse_N[start:stop])


GradientTile = Callable[[Tile, Scores, Tensor | None], Tensor]
"""(tile, scores of its rows, bias_C) -> d loss / d(product + bias) of a tile, in the products' type; its column sums
are added to ``bias_C`` where that is given."""


@frozen(kw_only=True, eq=False)
class Sums:
    """Gradients in the sums' type: of all positions, or of the tokens of one tile. None where none is wanted."""

    hidden: Tensor | None
    low: Tensor | None
    weight: Tensor | None
    B: Tensor | None


def _add_tile(sums: Sums, tile_RC: Tensor, hidden_RD: Tensor, low_Rr: Tensor | None, part: Head, work: Work) -> None:
    if sums.hidden is not None:
        accumulate(sums.hidden, tile_RC, part.weight_VD, work)
    if sums.low is not None and part.B_Vr is not None:
        accumulate(sums.low, tile_RC, part.B_Vr, work)
    if sums.weight is not None:
        accumulate(sums.weight, tile_RC.T, hidden_RD, work)
    if sums.B is not None and low_Rr is not None:
        accumulate(sums.B, tile_RC.T, low_Rr, work)


Needs = tuple[bool, bool, bool, bool, bool]  # hidden, weight, bias, A, B
Grads = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def backward(
    scores: Scores,
    hidden_ND: Tensor,
    head: Head,
    target_N: Tensor,
    options: Options,
    needs: Needs,
    *,
    gradient_tile: GradientTile,
    tiles: int,
) -> Grads:
    """Gradients of sum(grad_N * logp_N), by computing each tile of logits again.

    The vocabulary is the outer loop, so that a tile's rows of the head's gradient are summed in float32 and rounded
    once, without a float32 copy of the whole.
    """
    work = make_work(hidden_ND, head.weight_VD, tiles)
    (N, D), V = hidden_ND.shape, len(head.weight_VD)

    def zeros(wanted: bool, *shape: int) -> Tensor | None:
        return torch.zeros(shape, dtype=work.wide, device=hidden_ND.device) if wanted else None

    hidden_cast_ND = hidden_ND.to(work.dtype)
    low_Nr = low_rank(hidden_cast_ND, head, work.dtype)
    r = 0 if low_Nr is None else low_Nr.shape[1]
    grad_ND, grad_Nr = zeros(needs[0], N, D), zeros(bool(r) and (needs[0] or needs[3]), N, r)
    whole = [torch.empty_like(t) if need and t is not None else None
             for t, need in ((head.weight_VD, needs[1]), (head.bias_V, needs[2]), (head.B_Vr, needs[4]))]  # fmt: skip
    for first, last in spans(V, work.cols):
        part, C = head.columns(first, last, work.dtype), last - first
        mine = zeros(needs[1], C, D), zeros(needs[2], C), zeros(needs[4], C, r)
        for start, stop in spans(N, work.rows):
            hidden_RD, low_Rr = hidden_cast_ND[start:stop], None if low_Nr is None else low_Nr[start:stop]
            tile = Tile(hidden_RD=hidden_RD, low_Rr=low_Rr, target_R=target_N[start:stop], part=part, first=first,
                        options=options, work=work)  # fmt: skip
            tile_RC = gradient_tile(tile, scores.rows(start, stop), mine[1])
            rows_RD, rows_Rr = (None if t is None else t[start:stop] for t in (grad_ND, grad_Nr))
            sums = Sums(hidden=rows_RD, low=rows_Rr, weight=mine[0], B=mine[2])
            _add_tile(sums, tile_RC, hidden_RD, low_Rr, part, work)
        for total, tile in zip(whole, mine, strict=True):
            if total is not None and tile is not None:
                total[first:last] = tile
    grad_A = None
    if grad_Nr is not None and head.A_rD is not None:
        grad_Nr *= head.s
        if grad_ND is not None:
            grad_ND.addmm_(grad_Nr, head.A_rD.to(work.wide))
        if needs[3]:
            grad_A = (grad_Nr.T @ hidden_ND.to(work.wide)).to(head.A_rD.dtype)
    return None if grad_ND is None else grad_ND.to(hidden_ND.dtype), whole[0], whole[1], grad_A, whole[2]
