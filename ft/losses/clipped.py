"""The clipped policy gradient of the GRPO family, packed. Shapes: T packed tokens, S sequences.

``terms`` and ``finish`` are what all policy-gradient losses share; ``ft.losses.policy_gradient`` has those that differ
in kind. ``seq_T`` numbers the sequences 0 .. S-1 (filler S), so nothing is padded.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from ft.losses import aggregate as average
from ft.losses import kl as kl_terms
from ft.losses.aggregate import Sequences
from ft.losses.elementwise import Mask, bounded, greater, less, with_slope
from ft.losses.reduce import Count, check_number, check_option, detached, share, upcast
from ft.types import LossOutput

LEVELS = {"token": "token", "sequence": "geometric", "sequence_token": "geometric", "sequence_sum": "sequence"}


class Terms(NamedTuple):
    """What a policy term is made of; 0 wherever the mask is False, but for ``raw_logp_T``."""

    raw_logp_T: Tensor  # as given, whatever stands at untrained places
    adv_T: Tensor
    mask: Mask
    seq_T: Tensor | None
    sequences: Sequences | None  # of seq_T
    drift_T: Tensor  # logp - old_logp of each token, with gradient
    log_ratio_T: Tensor  # the same at the level asked for, held to +-20
    ratio_T: Tensor  # its exp, detached
    by_token: bool  # log_ratio_T is drift_T, held

    def logp_T(self) -> Tensor:
        """With gradient. A function, so that losses of the ratio alone do not pay for it."""
        return self.mask.keep(self.raw_logp_T)


class Common(TypedDict, total=False):
    """Options that every policy-gradient loss takes; ``grpo`` says what they mean."""

    seq_T: Tensor | None
    aggregate: str
    constant: float | None
    is_weight_T: Tensor | None
    keep_T: Tensor | None
    ref_logp_T: Tensor | None
    kl_coef: float
    kl: str
    kl_bias_correction: bool
    tokens: Count | None
    seqs: Count | None


def grpo(
    logp_T: Tensor,
    old_logp_T: Tensor | None,
    adv_T: Tensor,
    mask_T: Tensor,
    *,
    seq_T: Tensor | None = None,
    level: str = "token",
    clip: tuple[float, float] | None = (0.2, 0.2),
    dual_clip: float | None = None,
    aggregate: str = "token",
    constant: float | None = None,
    is_weight_T: Tensor | None = None,
    keep_T: Tensor | None = None,
    ref_logp_T: Tensor | None = None,
    kl_coef: float = 0.0,
    kl: str = "k3",
    kl_bias_correction: bool = False,
    tokens: Count | None = None,
    seqs: Count | None = None,
) -> LossOutput:
    """Clipped surrogate: with r = exp(logp - old_logp), A the advantage and w the importance weight, at each token

        x = -min(min(r, dual_clip) A, clamp(r, 1 - clip[0], 1 + clip[1]) A) * w * keep  +  kl_coef * KL(logp, ref_logp)

    averaged by ``aggregate`` (see ``ft.losses.aggregate.mean``). By name:

    | loss | options |
    |---|---|
    | DAPO, BNPO (arXiv:2503.14476) | ``aggregate="token"``; over the step, or over the call's own tokens |
    | GRPO (arXiv:2402.03300) | ``aggregate="sequence"`` |
    | Dr. GRPO (arXiv:2503.20783) | ``aggregate="constant", constant=<longest completion>`` |
    | GSPO (arXiv:2507.18071) | ``level="sequence", aggregate="sequence"`` |

    Differentiated: ``logp_T``, in the ratio and in the KL. Stopped: every other tensor.

    Args:
        logp_T: the policy's log-prob of each target token; any float type, reduced in float32 (float64 stays).
        old_logp_T: of the policy the step began with. None: the policy now, so r = 1 and the gradient is REINFORCE's.
        adv_T: the advantage, one number per token.
        mask_T: bool, True where the token is trained.
        seq_T: the sequence of each token; needed by every sequence level, and by the aggregates over sequences.
        level: of r. ``"token"``; ``"sequence"``, the geometric mean over the sequence, whose gradient spreads evenly
            over its tokens; ``"sequence_token"``, that value with each token's own gradient (GSPO-token, for
            advantages that differ within a sequence); ``"sequence_sum"``, the whole sequence's ratio.
        clip: how far r may go (below 1, above 1) before it stops counting; None for no clipping.
        dual_clip: the most that r may count where A < 0, over 1 + clip[1] (arXiv:1912.09729; "delta" in
            INTELLECT-2, arXiv:2505.07291).
        is_weight_T: multiplies the policy term, after clipping; from ``ft.losses.importance.weights``.
        keep_T: multiplies the policy term too: sequences masked by their KL, tokens chosen by their entropy. The
            denominator still counts what is dropped.
        ref_logp_T: the reference's log-probs. With ``kl_coef=0`` the KL is reported and does not train.
        kl: the estimator, see ``ft.losses.kl``. ``kl_bias_correction`` multiplies it by r (with its gradient). The KL
            is touched by neither ``is_weight_T`` nor ``keep_T``.
        tokens, seqs: the step's global denominators; by default this call's own. Means to log are over ``tokens``.

    Returns:
        Besides the loss, ``sums``: ``policy_loss``, ``ratio`` (mean), ``approx_kl`` (k3 of the policy against the old
        one, token by token), ``clip_low`` (share of tokens with A < 0 and r under the range), ``clip_high`` (A > 0
        and r over it), ``clip_dual``, ``kl``, and with weights ``is_weight`` (mean) and ``is_zero`` (share of tokens
        with weight 0), ``kept``. ``maxes``: ``ratio_max`` and ``ratio_inverse_max`` (so the least ratio is
        1 / ratio_inverse_max); both are 0 where nothing is trained.

    Edge cases: a call with nothing trained is 0 with a gradient of zeros. Log-ratios are held to +-20 before exp, and
    carry no gradient beyond. Whatever stands at untrained positions, NaN included, is never seen.
    """
    _check_clip(clip, dual_clip)
    t = terms("grpo", logp_T, old_logp_T, adv_T, mask_T, seq_T, level)
    policy_T, clipped = _surrogate(t, clip, dual_clip)
    return finish(
        policy_T, t, clipped=clipped, aggregate=aggregate, constant=constant, is_weight_T=is_weight_T, keep_T=keep_T,
        ref_logp_T=ref_logp_T, kl_coef=kl_coef, kl=kl, kl_bias_correction=kl_bias_correction, tokens=tokens, seqs=seqs,
    )  # fmt: skip


def terms(
    what: str,
    logp_T: Tensor,
    old_logp_T: Tensor | None,
    adv_T: Tensor,
    mask_T: Tensor,
    seq_T: Tensor | None,
    level: str = "token",
) -> Terms:
    """Check and mask the inputs of a policy loss, and raise the log-ratio to ``level`` (see ``grpo``)."""
    check_option("level", level, tuple(LEVELS))
    average.check_tokens(what, mask_T, seq_T, logp_T=logp_T, old_logp_T=old_logp_T, adv_T=adv_T)
    mask = Mask(mask_T)
    old_logp_T = (logp_T if old_logp_T is None else old_logp_T).detach()
    drift_T = mask.keep(upcast(logp_T) - upcast(old_logp_T))
    sequences = None if seq_T is None else Sequences(seq_T, mask_T)
    log_ratio_T = _at_level(drift_T, sequences, level)
    ratio_T = log_ratio_T.detach().exp()
    adv_T = mask.keep(adv_T.detach())
    by_token = LEVELS[level] == "token"
    return Terms(logp_T, adv_T, mask, seq_T, sequences, drift_T, log_ratio_T, ratio_T, by_token)


def _at_level(drift_T: Tensor, sequences: Sequences | None, level: str) -> Tensor:
    raised_T = drift_T
    if LEVELS[level] != "token":
        if sequences is None:
            raise ValueError(f"level={level!r}: expected seq_T, the sequence of each token; got None")
        raised_T = sequences.mean(drift_T) if LEVELS[level] == "geometric" else sequences.sum(drift_T)
    if level == "sequence_token":
        return raised_T.detach().clamp(-kl_terms.BOUND, kl_terms.BOUND) + (drift_T - drift_T.detach())
    return bounded(raised_T, kl_terms.BOUND)


def finish(
    policy_T: Tensor,
    t: Terms,
    *,
    clipped: Mapping[str, Tensor] | None = None,
    aggregate: str = "token",
    constant: float | None = None,
    is_weight_T: Tensor | None = None,
    keep_T: Tensor | None = None,
    ref_logp_T: Tensor | None = None,
    kl_coef: float = 0.0,
    kl: str = "k3",
    kl_bias_correction: bool = False,
    tokens: Count | None = None,
    seqs: Count | None = None,
) -> LossOutput:
    """Weigh the policy term, average it, add the KL, and gather what is logged. ``clipped``: bool [T] by name."""
    _check_kl(ref_logp_T, kl_coef, kl, kl_bias_correction)
    mask_T = t.mask.mask_T
    average.check_tokens("policy loss", mask_T, t.seq_T, is_weight_T=is_weight_T, keep_T=keep_T, ref_logp_T=ref_logp_T)
    factors = {name: t.mask.keep(x.detach()) for name, x in (("is", is_weight_T), ("keep", keep_T)) if x is not None}
    for factor_T in factors.values():
        policy_T = policy_T * factor_T
    tokens = mask_T.sum() if tokens is None else tokens
    options: dict[str, Any] = {"constant": constant, "tokens": tokens, "seqs": seqs, "sequences": t.sequences}
    mean = partial(average.mean, mask_T=mask_T, seq_T=t.seq_T, how=aggregate, **options)
    loss = policy_loss = mean(policy_T)
    sums = {"policy_loss": policy_loss, **_watch(t, clipped or {}, factors, is_weight_T, tokens)}
    if ref_logp_T is not None:
        kl_T = kl_terms.estimate(t.logp_T(), t.mask.keep(ref_logp_T.detach()), kind=kl)
        sums["kl"] = share(kl_T.detach().sum(), tokens)
        if kl_coef:
            loss = loss + kl_coef * mean(kl_T * t.log_ratio_T.exp() if kl_bias_correction else kl_T)
    return LossOutput(loss=loss, sums=detached(sums), maxes=_extremes(t))


def _surrogate(t: Terms, clip: tuple[float, float] | None, dual_clip: float | None) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped term and what was clipped, 1.0 or 0.0 by name. Exactly what is clipped has no gradient."""
    with torch.no_grad():
        cost_T = -t.adv_T
        whole_T = value_T = t.ratio_T * cost_T
        if dual_clip is not None:
            value_T = t.ratio_T.clamp(max=dual_clip).mul_(cost_T)
        if clip is not None:
            value_T = torch.maximum(value_T, t.ratio_T.clamp(1 - clip[0], 1 + clip[1]).mul_(cost_T))
        clipped = _clipped(t, clip, dual_clip)
        slope_T = whole_T
        for hit_T in clipped.values():
            slope_T = torch.addcmul(slope_T, slope_T, hit_T, value=-1)
    return with_slope(t.log_ratio_T, value_T, slope_T), clipped


def _clipped(t: Terms, clip: tuple[float, float] | None, dual_clip: float | None) -> dict[str, Tensor]:
    clipped, negative_T = {}, less(t.adv_T, 0)
    if dual_clip is not None:
        clipped["clip_dual"] = greater(t.ratio_T, dual_clip).mul_(negative_T)
    if clip is not None:
        clipped["clip_low"] = less(t.ratio_T, 1 - clip[0]).mul_(negative_T)
        clipped["clip_high"] = greater(t.ratio_T, 1 + clip[1]).mul_(greater(t.adv_T, 0))
    return clipped


@torch.no_grad()
def _watch(
    t: Terms, clipped: Mapping[str, Tensor], factors: Mapping[str, Tensor], is_weight_T: Tensor | None, tokens: Count
) -> dict[str, Tensor]:
    """Means over the trained tokens. Everything summed is finite, so a product with the mask selects."""
    drift_T = t.drift_T.detach().clamp(-kl_terms.BOUND, kl_terms.BOUND)
    totals = {
        "ratio": torch.dot(t.ratio_T, t.mask.trained_T.to(t.ratio_T.dtype)),
        "approx_kl": _k3_sum(drift_T, t.ratio_T if t.by_token else drift_T.exp()),
        **{name: hit_T.sum() for name, hit_T in clipped.items()},
    }
    if is_weight_T is not None:
        totals |= {"is_weight": factors["is"].sum(), "is_zero": ((is_weight_T == 0) & t.mask.mask_T).sum()}
    if "keep" in factors:
        totals["kept"] = factors["keep"].sum()
    means = share(torch.stack([x.to(t.ratio_T.dtype) for x in totals.values()]), tokens)
    return dict(zip(totals, means.unbind(), strict=True))


def _k3_sum(drift_T: Tensor, ratio_T: Tensor) -> Tensor:
    """Sum of expm1(d) - d, as tanh(d / 2) (exp(d) + 1) - d: as exact for small d, and half the time of expm1."""
    tanh_T = (drift_T / 2).tanh_()
    return torch.addcmul(tanh_T, tanh_T, ratio_T).sub_(drift_T).sum()


@torch.no_grad()
def _extremes(t: Terms) -> dict[str, Tensor]:
    """The greatest ratio and inverse ratio. Untrained places stand far below any, and their exp is 0."""
    log_T = t.log_ratio_T.detach()
    if not log_T.numel():
        return {name: log_T.new_zeros(()) for name in ("ratio_max", "ratio_inverse_max")}
    out_T = 1 - t.mask.trained_T
    high, low = torch.sub(log_T, out_T, alpha=1e30).amax(), torch.add(log_T, out_T, alpha=1e30).amin()
    return {"ratio_max": high.exp(), "ratio_inverse_max": (-low).exp()}


def _check_clip(clip: tuple[float, float] | None, dual_clip: float | None) -> None:
    if clip is not None:
        check_number("clip[0]", clip[0], 0, 1)
        check_number("clip[1]", clip[1], 0)
    if dual_clip is not None:
        check_number("dual_clip", dual_clip, 1 + (clip[1] if clip else 0), open_low=True)


def _check_kl(ref_logp_T: Tensor | None, kl_coef: float, kl: str, kl_bias_correction: bool) -> None:
    check_option("kl", kl, kl_terms.KINDS)
    check_number("kl_coef", kl_coef, 0)
    if ref_logp_T is None and kl_coef:
        raise ValueError(f"kl_coef: expected ref_logp_T beside a kl_coef of {kl_coef:g}; got None")
    if kl_bias_correction and not kl_coef:
        raise ValueError("kl_bias_correction: expected a kl_coef over 0, or there is nothing to correct; got 0")
