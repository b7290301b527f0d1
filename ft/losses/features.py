"""Features of a sequence from the hidden states of a frozen model: normalise, pool, whiten. No loss is taken here.

Shapes: T packed tokens, S sequences, F layers taken from the model, D width of one feature vector, P prompts (or blocks
of a prompt; any number of leading dimensions), G samples of one prompt. Reductions are float32, float64 stays float64.

Source of the method: Jelassi et al., "Matching Features, Not Tokens" (arXiv 2603.12248). Where the authors' code and
other ports of it differ, the authors' way is the default and the other one an option.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ft.losses.reduce import check_number, check_option, upcast


def unit(x_ND: Tensor) -> Tensor:
    """``x / |x|`` over the last dimension; the zero vector stays zero, with a finite gradient (elsewhere it is NaN)."""
    x_ND = upcast(x_ND)
    square_N1 = x_ND.square().sum(-1, keepdim=True)
    empty_N1 = square_N1 == 0
    return x_ND / torch.where(empty_N1, 1.0, square_N1).sqrt()


def normalise(hidden_TFD: Tensor, *, by: str = "joint") -> Tensor:
    """Features ``[..., F * D]`` from the hidden states of F layers ``[..., F, D]``, with gradients to the states.

    - ``joint`` (the authors' "concat"): the layers side by side, then one L2 norm. Length 1; loud layers weigh more.
    - ``layer`` (the authors' "stack"): every layer to length 1, then side by side. Length sqrt(F), every layer weighs
      the same. Dot products are F times larger than cosines: divide ``diversity_coef`` by F to compare with ``joint``.
    - ``none``: side by side as they are, for those who pool first and then take ``unit``.

    A layer (or, jointly, a token) of zeros stays zeros.
    """
    check_option("normalise(by=)", by, ("joint", "layer", "none"))
    if hidden_TFD.ndim < 2:
        raise ValueError(f"normalise: expected hidden states [..., layers, width], got {tuple(hidden_TFD.shape)}")
    if by == "layer":
        return unit(hidden_TFD).flatten(-2)
    side_by_side = upcast(hidden_TFD).flatten(-2)
    return unit(side_by_side) if by == "joint" else side_by_side


def pool(
    hidden_TD: Tensor,
    seq_T: Tensor,
    sequences: int,
    *,
    method: str = "last",
    completion_T: Tensor | None = None,
) -> Tensor:
    """One vector per sequence, ``[S, D]`` (``[S, 3 D]`` for quartiles), from packed tokens; gradients to the tokens.

    - ``last``: the last token. ``mean``: the mean over all tokens. ``completion_mean``: over those of ``completion_T``.
    - ``quartiles``: the tokens at floor(L/4), floor(L/2), floor(3L/4) of a sequence of L, side by side.

    Args:
        seq_T: the sequence of each token, 0 .. S-1, in any order of sequences; S marks filler, which is never read.
        completion_T: bool, True where the *input* token belongs to the completion. This is not the mask of trained
            targets, which stands one place earlier: a feature is read after a token, a target is predicted before it.
            ``last`` and ``quartiles`` look among these tokens alone when it is given; ``mean`` refuses it.

    A sequence without any such token gives zeros. Unselected tokens may hold anything, NaN included.
    """
    _check_pool(hidden_TD, seq_T, method, completion_T)
    keep_T = seq_T < sequences if completion_T is None else (seq_T < sequences) & completion_T
    if method in ("mean", "completion_mean"):
        return _mean(hidden_TD, seq_T, keep_T, sequences)
    if not hidden_TD.shape[0]:
        return upcast(hidden_TD).sum(0).expand(sequences, -1).repeat(1, 1 if method == "last" else 3)
    order_T, start_S, count_S = _ranks(seq_T, keep_T, sequences)
    quarters = {"last": (count_S - 1,), "quartiles": (count_S // 4, count_S // 2, 3 * count_S // 4)}[method]
    present_S1 = (count_S > 0)[:, None]
    last = hidden_TD.shape[0] - 1
    picks = (upcast(hidden_TD[order_T[(start_S + q_S).clamp(0, last)]]) for q_S in quarters)
    return torch.cat([torch.where(present_S1, pick_SD, 0.0) for pick_SD in picks], dim=-1)


def _check_pool(hidden_TD: Tensor, seq_T: Tensor, method: str, completion_T: Tensor | None) -> None:
    check_option("pool(method=)", method, ("last", "mean", "completion_mean", "quartiles"))
    if hidden_TD.ndim != 2 or seq_T.shape != hidden_TD.shape[:1]:
        raise ValueError(
            f"pool: expected hidden_TD [T, D] and seq_T [T], got {tuple(hidden_TD.shape)} and {tuple(seq_T.shape)}"
        )
    if method == "completion_mean" and completion_T is None:
        raise ValueError("pool(method='completion_mean'): expected completion_T, got None")
    if method == "mean" and completion_T is not None:
        raise ValueError("pool(method='mean'): takes every token; expected completion_T=None, or 'completion_mean'")
    if completion_T is not None and (completion_T.shape != seq_T.shape or completion_T.dtype != torch.bool):
        raise ValueError(
            f"pool: expected completion_T bool {tuple(seq_T.shape)}, got {completion_T.dtype} "
            f"{tuple(completion_T.shape)}"
        )


def _mean(hidden_TD: Tensor, seq_T: Tensor, keep_T: Tensor, sequences: int) -> Tensor:
    """Mean of the kept tokens of each sequence, zeros where there is none."""
    kept_TD = torch.where(keep_T[:, None], upcast(hidden_TD), 0.0)
    total_SD = kept_TD.new_zeros(sequences + 1, hidden_TD.shape[1]).index_add(0, seq_T, kept_TD)
    count_S = kept_TD.new_zeros(sequences + 1).index_add(0, seq_T, keep_T.to(kept_TD.dtype))
    return (total_SD / count_S.clamp(min=1)[:, None])[:sequences]


def _ranks(seq_T: Tensor, keep_T: Tensor, sequences: int) -> tuple[Tensor, Tensor, Tensor]:
    """The kept tokens sorted by sequence, in order within it; where each sequence starts there; and its count."""
    key_T = torch.where(keep_T, seq_T, sequences)
    count_S = seq_T.new_zeros(sequences + 1).index_add(0, key_T, torch.ones_like(key_T))[:sequences]
    return torch.argsort(key_T, stable=True), count_S.cumsum(0) - count_S, count_S


def whiten(
    gen_PGD: Tensor,
    ref_PD: Tensor,
    *,
    side: str = "sample",
    reference: str = "whitened",
    tol: float = 1e-5,
    valid_PG: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Whiten the samples of each prompt among themselves: ``(gen_PGD, ref_PGD)``, one reference row per sample.

    With X = U S V^T the samples of one prompt [G, D], not centred, and singular values up to ``tol`` of the largest
    left out, the samples become U V^T either way. The reference y becomes

    - ``sample`` (the authors): row j of W [y; ..; y] with W = (X X^T)^-1/2 = U S^-1 U^T, that is (W 1)_j y.
    - ``feature``: y V S^-1 V^T, the same row for each sample: y is projected on the span of the samples.

    (W 1)_j can be negative (two samples much alike), and then the cosine with row j changes its sign although nothing
    about y did. ``reference="raw"`` leaves y as it is; the cosine then differs from ``sample`` by that sign alone.

    Two things to know. With at most D samples of full rank the rows of U V^T are orthonormal, so ``diversity`` of them
    is zero whatever they are; only (near-)duplicates change that. And each whitened sample depends on all the others,
    so no leave-one-out baseline of whitened features is independent of the sample it is for.

    Args:
        valid_PG: bool, False for a missing sample (its row is read as zeros and comes out as zeros).

    Leading dimensions are free; put the layers there to whiten each by itself. Nothing is differentiated: the SVD's
    gradient is unbounded where singular values meet. On a GPU ``torch.linalg.svd`` waits for the device, so this
    belongs where rewards are made and not inside the step. A row that is not finite raises ``torch.linalg.LinAlgError``
    rather than passing features on unwhitened.
    """
    check_option("whiten(side=)", side, ("sample", "feature"))
    check_option("whiten(reference=)", reference, ("whitened", "raw"))
    check_number("whiten(tol=)", tol, 0.0, 1.0)
    gen_PGD, ref_PD = _detached_pair(gen_PGD, ref_PD, valid_PG)
    u_PGK, s_PK, vt_PKD = torch.linalg.svd(gen_PGD, full_matrices=False)
    kept_PK = s_PK > tol * s_PK[..., :1]
    inverse_PK = torch.where(kept_PK, 1.0 / torch.where(kept_PK, s_PK, 1.0), 0.0)
    white_PGD = (u_PGK * kept_PK[..., None, :]) @ vt_PKD
    ref_PGD = ref_PD[..., None, :].expand_as(gen_PGD)
    if reference == "whitened" and side == "feature":
        along_PK = (vt_PKD @ ref_PD[..., None])[..., 0] * inverse_PK
        ref_PGD = (along_PK[..., None, :] @ vt_PKD).expand_as(gen_PGD)
    elif reference == "whitened":
        ones_PG = torch.ones_like(gen_PGD[..., 0]) if valid_PG is None else valid_PG.to(gen_PGD.dtype)
        along_PK = (u_PGK.mT @ ones_PG[..., None])[..., 0] * inverse_PK
        ref_PGD = (u_PGK @ along_PK[..., None]) * ref_PGD
    if valid_PG is None:
        return white_PGD, ref_PGD
    here_PG1 = valid_PG[..., None]  # their rows are rounding only, but a rounding has a direction
    return torch.where(here_PG1, white_PGD, 0.0), torch.where(here_PG1, ref_PGD, 0.0)


def _detached_pair(gen_PGD: Tensor, ref_PD: Tensor, valid_PG: Tensor | None) -> tuple[Tensor, Tensor]:
    if gen_PGD.ndim < 2 or ref_PD.shape != (*gen_PGD.shape[:-2], gen_PGD.shape[-1]):
        raise ValueError(
            f"whiten: expected gen [..., samples, width] and ref [..., width], got {tuple(gen_PGD.shape)} and "
            f"{tuple(ref_PD.shape)}"
        )
    if valid_PG is not None and valid_PG.shape != gen_PGD.shape[:-1]:
        raise ValueError(f"whiten: expected valid {tuple(gen_PGD.shape[:-1])}, got {tuple(valid_PG.shape)}")
    gen_PGD, ref_PD = upcast(gen_PGD.detach()), upcast(ref_PD.detach())
    return (gen_PGD if valid_PG is None else torch.where(valid_PG[..., None], gen_PGD, 0.0)), ref_PD
