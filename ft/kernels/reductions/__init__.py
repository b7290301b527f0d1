"""Small reductions of RL and EBFT losses in one pass each, for loops of one's own that take their losses on a GPU.

``ft.losses`` keeps its own torch maths (it imports torch alone, and runs on anything); these give the same numbers
with one kernel where that launches dozens, always in the same order, and nothing waits for the device:

- ``segment_sum``: per-sequence sums of packed tokens; ``ft.data.pack.segment_sum`` for ids in order.
- ``policy_gradient_sums``: the clipped surrogate of ``ft.losses.grpo`` at token level, and what it logs. A weight per
  token stands for importance weights and for the average: 1, or 1 / the length of its sequence.
- ``similarity``: ``alignment`` and ``diversity`` of ``ft.losses.ebft``, which are rewards there and have no gradient;
  here they have one, for those who train through features.

Shapes: T packed tokens, S sequences, P prompts (any number of leading dimensions), G samples of one prompt, D width.
"""

from __future__ import annotations

import math
from types import ModuleType

import torch
from torch import Tensor

from ft.errors import ModelError
from ft.kernels.launch import check
from ft.kernels.reductions import reference
from ft.kernels.reductions.reference import PolicySums

MOST_SAMPLES = 64
"""Samples of a prompt that Triton's ``similarity`` takes."""


def segment_sum(x_T: Tensor, seq_T: Tensor, S: int, *, impl: str = "auto") -> Tensor:
    """x_S[s] = sum over t with seq_T[t] = s of x_T[t], for x of shape (T,) or (T, D).

    ``seq_T`` is in order, 0 .. S-1, as packing makes it; S marks filler, which stands last and is never read (on a
    CPU any order is refused, elsewhere it is not looked at). Summed and returned in float32 (float64 stays). A
    sequence without tokens gives 0. Differentiable in ``x_T``.
    """
    if not 1 <= x_T.ndim <= 2 or seq_T.shape != x_T.shape[:1]:
        raise _shapes("segment_sum", "x (T,) or (T, D), seq (T,)", x_T, seq_T)
    if seq_T.device.type == "cpu" and seq_T.numel() and (seq_T.diff().lt(0).any() or seq_T[0] < 0 or seq_T[-1] > S):
        raise ModelError("seq_T of segment_sum is not in order", expected=f"0 .. {S}, never falling")
    return _implementation(impl, x_T, seq_T).segment_sum(x_T, seq_T, S)


def policy_gradient_sums(
    logp_T: Tensor,
    old_logp_T: Tensor,
    adv_T: Tensor,
    mask_T: Tensor,
    *,
    weight_T: Tensor | None = None,
    clip: tuple[float, float] | None = (0.2, 0.2),
    dual_clip: float | None = None,
    impl: str = "auto",
) -> PolicySums:
    """Sums over the trained tokens of the clipped surrogate and of what is logged about it.

        d = logp - old_logp, held to +-20,  r = exp(d),  A the advantage,  w the weight
        loss = sum_t -w_t A_t c_t,    c = min(r, 1 + clip[1])                        where A > 0
                                      c = min(max(r, 1 - clip[0]), dual_clip)        where A < 0

    ``loss`` has a gradient in ``logp_T``: -w A r, and 0 where c is not r or d is held. Nothing else has. Divide by
    a count of the step. Untrained positions may hold anything, NaN included.
    """
    tensors = [logp_T, old_logp_T, adv_T, mask_T] + ([] if weight_T is None else [weight_T])
    if logp_T.ndim != 1 or any(t.shape != logp_T.shape for t in tensors) or mask_T.dtype != torch.bool:
        raise _shapes("policy_gradient_sums", "tensors (T,), the mask bool", *tensors)
    # No clip is one that nothing lies beyond.
    low, high = (1.0 - clip[0], 1.0 + clip[1]) if clip else (0.0, math.inf)
    dual = math.inf if dual_clip is None else dual_clip
    if not (0 <= low <= 1 <= high and dual > (high if clip else 1)):
        raise ModelError("a clip that is no range around 1", expected="0 <= clip[0] <= 1, clip[1] >= 0, dual_clip "
                         "over 1 + clip[1]", got=f"clip={clip}, dual_clip={dual_clip}")  # fmt: skip
    run = _implementation(impl, logp_T, old_logp_T, adv_T, mask_T).policy_gradient_sums
    return run(logp_T, old_logp_T, adv_T, mask_T, weight_T, (low, high, dual))


def similarity(
    gen_PGD: Tensor, ref_PD: Tensor, *, valid_PG: Tensor | None = None, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """``(alignment_PG, diversity_PG)`` of samples' features with a reference and with one another.

        alignment_j = 2 cos(phi_j, ref)        diversity_j = 2 / (n - 1) sum_{k != j} phi_j . phi_k

    over the n valid samples of a prompt; 0 for a missing sample, for a lone one's diversity and for a zero vector's
    cosine. ``ref`` is (P, D), or (P, G, D) with a row per sample. float32 (float64 stays), with a gradient to ``gen``
    (``ref`` is stopped). Source: ``ft.losses.ebft``, where the choices are explained.
    """
    wanted = (gen_PGD.shape, (*gen_PGD.shape[:-2], gen_PGD.shape[-1]))
    if gen_PGD.ndim < 2 or ref_PD.shape not in wanted:
        raise _shapes("similarity", "gen (..., G, D), ref (..., D) or like gen", gen_PGD, ref_PD)
    if valid_PG is not None and (valid_PG.shape != gen_PGD.shape[:-1] or valid_PG.dtype != torch.bool):
        raise _shapes("similarity", "valid (..., G), bool", gen_PGD, valid_PG)
    if impl == "auto" and gen_PGD.shape[-2] > MOST_SAMPLES:
        impl = "torch"
    if impl == "triton" and gen_PGD.shape[-2] > MOST_SAMPLES:
        raise ModelError("too many samples of a prompt for Triton", expected=f"{MOST_SAMPLES} or fewer",
                         got=str(gen_PGD.shape[-2]), fix='impl="torch"')  # fmt: skip
    return _implementation(impl, gen_PGD, ref_PD).similarity(gen_PGD, ref_PD.detach(), valid_PG)


def _implementation(impl: str, *tensors: Tensor) -> ModuleType:
    exact = any(t.dtype == torch.float64 for t in tensors)
    if check("torch" if exact and impl == "auto" else impl, *tensors) == "torch":
        return reference
    if exact:
        raise ModelError("Triton's reductions have no float64", fix="use impl='torch', or float32")
    from ft.kernels.reductions import triton

    return triton


def _shapes(what: str, expected: str, *tensors: Tensor) -> ModelError:
    got = ", ".join(f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in tensors)
    return ModelError(f"tensors of {what} do not fit each other", expected=expected, got=got)


__all__ = ["PolicySums", "policy_gradient_sums", "segment_sum", "similarity"]
