"""The clipped policy gradient of the GRPO family, packed. Shapes: T packed tokens, S sequences.

``finish``, and ``ft.losses.terms``, are what all policy-gradient losses share; ``ft.losses.policy_gradient`` has those
that differ in kind. Sequences are told apart by ``seq_T`` or ``cu_S1``, so nothing is padded.

Each loss gives its value and its slope, both worked out without a graph, and ``finish`` ties the two together in one
node: a graph of twenty nodes took three times as long and held as many tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypedDict

import torch
from torch import Tensor

from ft.losses import aggregate as average
from ft.losses import kl as kl_terms
from ft.losses.elementwise import Lay, greater, less, with_slope
from ft.losses.reduce import Count, at_least_one, check_number, check_option, check_same, upcast
from ft.losses.terms import Score, Spread, Term, Terms, hold, known, terms
from ft.types import LossOutput


class Common(TypedDict, total=False):
    """Options that every policy-gradient loss takes; ``grpo`` says what they mean."""

    seq_T: Tensor | None
    cu_S1: Tensor | None
    adv_S: Tensor | None
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
    adv_T: Tensor | None,
    mask_T: Tensor,
    *,
    seq_T: Tensor | None = None,
    cu_S1: Tensor | None = None,
    adv_S: Tensor | None = None,
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

        x = -min(c A, clamp(r, 1 - clip[0], 1 + clip[1]) A) * w * keep  +  kl_coef * KL(logp, ref_logp)

    with c = min(r, dual_clip) where A < 0 and c = r elsewhere, averaged by ``aggregate`` (see
    ``ft.losses.aggregate.mean``). By name:

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
        adv_T: the advantage, one number per token; None where ``adv_S`` has it, one per sequence of ``cu_S1``. Ratios
            of sequences are then worked out by sequence, in less time and memory; the results are the same.
        mask_T: bool, True where the token is trained.
        seq_T, cu_S1: the sequence of each token (0 .. S-1 in any order, filler S), or where each sequence begins and
            the last one ends ([S + 1], filler after it). One of them is needed by every sequence level, and by the
            aggregates over sequences. ``cu_S1`` is the faster, and on a device adds up in the same order every time.
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
        tokens, seqs: the step's global denominators; by default this call's own. Means to log are over ``tokens``,
            whatever the aggregate. ``seqs`` is refused with ``aggregate="token"``, which has no use for it.

    Returns:
        Besides the loss, ``sums``: ``policy_loss``, ``clip_low`` (share of tokens with A < 0 and r under the range),
        ``clip_high`` (A > 0 and r over it), ``clip_dual``, ``kl``, and with weights ``is_weight`` (mean) and
        ``is_zero`` (share of tokens with weight 0), ``kept``. How far the policy has moved is no part of a loss:
        ``ft.losses.drift`` tells.

    Edge cases: a call with nothing trained is 0 with a gradient of zeros. Log-ratios are held to +-20 before exp, and
    carry no gradient beyond. Whatever stands at untrained positions, NaN included, is never seen.
    """
    _check_clip(clip, dual_clip)
    t = terms("grpo", logp_T, old_logp_T, adv_T, mask_T, seq_T=seq_T, cu_S1=cu_S1, adv_S=adv_S, level=level)
    term, clipped = _surrogate(t, clip, dual_clip)
    return finish(
        term, t, clipped=clipped, aggregate=aggregate, constant=constant, is_weight_T=is_weight_T, keep_T=keep_T,
        ref_logp_T=ref_logp_T, kl_coef=kl_coef, kl=kl, kl_bias_correction=kl_bias_correction, tokens=tokens, seqs=seqs,
    )  # fmt: skip


def finish(
    term: Term | Score,
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
    """Weigh the policy term, add it up with the KL, and gather what is logged. ``clipped``: numbers of tokens, 0-d."""
    _check_kl(ref_logp_T, kl_coef, kl, kl_bias_correction)
    check_same("policy loss", mask_T=t.mask.mask_T, is_weight_T=is_weight_T, keep_T=keep_T, ref_logp_T=ref_logp_T)
    tokens = at_least_one(t.trained() if tokens is None else tokens, t.adv_N.dtype)
    scale = _scale(t, aggregate, constant, tokens, seqs)
    sums = _means(t, clipped or {}, is_weight_T, keep_T, tokens)
    total, slope_N, lay = _weighed(term, t, _factor(t, is_weight_T, keep_T), aggregate)
    times = -term.times  # losses go down where terms go up
    down = scale * times
    loss = policy_loss = total * down
    if ref_logp_T is not None:
        kl_total, kl_slope_T, sums["kl"] = _kl(t, ref_logp_T, kl, kl_bias_correction, aggregate, tokens)
        if kl_coef:
            loss = torch.add(policy_loss, kl_total * scale, alpha=kl_coef)
            slope_N, lay = _laid((slope_N, lay)).add(kl_slope_T, alpha=kl_coef / times), None
    loss = with_slope(upcast(t.logp_T), loss, slope_N, scale=down, lay=lay)
    return LossOutput(loss=loss, sums={"policy_loss": policy_loss, **sums})


def _scale(t: Terms, aggregate: str, constant: float | None, tokens: Count, seqs: Count | None) -> Count:
    """What a sum whose terms ``_each`` has weighed is multiplied by, to be this call's share of the average.

    See ``ft.losses.aggregate.mean``. A number where the count is one.
    """
    average.check_denominators(aggregate, constant, seqs)
    if aggregate == "token":
        return 1 / tokens
    if t.sequences is None and (aggregate == "sequence" or seqs is None):
        without = " without seqs" if seqs is None else ""
        raise ValueError(
            f"aggregate={aggregate!r}{without}: expected seq_T, the sequence of each token, or cu_S1; got None"
        )
    scale = 1 / at_least_one(known(t).trained if seqs is None else seqs, t.adv_N.dtype)
    return scale if constant is None else scale / constant


def _factor(t: Terms, is_weight_T: Tensor | None, keep_T: Tensor | None) -> Tensor | None:
    """What multiplies the policy term of each token beside the mask, 0 where that is False."""
    factors = [t.mask.keep(x_T) for x_T in (is_weight_T, keep_T) if x_T is not None]
    if not factors:
        return None
    return factors[0] if len(factors) == 1 else factors[0].mul_(factors[1])


def _weighed(
    term: Term | Score, t: Terms, factor_T: Tensor | None, aggregate: str
) -> tuple[Tensor, Tensor, Lay | None]:
    """The sum of a term, and its slope by logp_T (see ``Spread``). Terms are 0 where untrained: tokens need no mask."""
    if isinstance(term, Score):
        return _weighed_score(term, t, factor_T, aggregate)
    weight_N = None
    if not term.by_sequence and factor_T is None and aggregate == "sequence" and known(t).summed_in_order:
        each_S = known(t).length_S.reciprocal().to(t.adv_N.dtype)
        total = torch.dot(known(t).sums(term.value_N), each_S)
        return total, *term.spread(known(t).weighed_(term.slope_N, each_S))
    if not term.by_sequence:
        weight_N = _product(factor_T, _each(t, aggregate, by_sequence=False))
    elif factor_T is not None:
        weight_N = _product(known(t).sums(factor_T), _each(t, aggregate, by_sequence=True))
    elif aggregate != "sequence":  # where each of n tokens weighs 1 / n, sequences all weigh 1
        weight_N = known(t).trained_S
    if weight_N is None:
        return term.value_N.sum(), *term.spread(term.slope_N)
    weight_N = weight_N.to(term.value_N.dtype)
    return torch.dot(term.value_N, weight_N), *term.spread(term.slope_N.mul_(weight_N))


def _weighed_score(term: Score, t: Terms, factor_T: Tensor | None, aggregate: str) -> tuple[Tensor, Tensor, Lay | None]:
    weight_N, logp_N, lay = term.weight_N, t.masked_logp_T().to(term.weight_N.dtype), None
    by_sequence = term.by_sequence and factor_T is None
    if by_sequence:
        logp_N, lay = known(t).sums(logp_N), known(t).lay_trained
    elif term.by_sequence:
        weight_N = known(t).lay(weight_N)
    more_N = _product(factor_T, _each(t, aggregate, by_sequence=by_sequence))
    if more_N is not None:
        weight_N.mul_(more_N)
    return torch.dot(logp_N, weight_N), weight_N, lay


def _each(t: Terms, aggregate: str, *, by_sequence: bool) -> Tensor | None:
    """What a place weighs in the average: one over the sequence's length where sequences count alike."""
    if aggregate != "sequence":
        return None
    each_S = known(t).length_S.reciprocal().to(t.adv_N.dtype)
    return each_S if by_sequence else known(t).lay(each_S)


def _product(x_N: Tensor | None, y_N: Tensor | None) -> Tensor | None:
    if x_N is None or y_N is None:
        return y_N if x_N is None else x_N
    return x_N * y_N


def _laid(slope: Spread) -> Tensor:
    slope_N, lay = slope
    return slope_N if lay is None else lay(slope_N)


def _kl(
    t: Terms, ref_logp_T: Tensor, kind: str, corrected: bool, aggregate: str, tokens: Count
) -> tuple[Tensor, Tensor, Tensor]:
    """The KL's sum to be divided, that sum's slope by logp_T, and its mean over tokens."""
    apart_T = t.mask.keep_(upcast(t.logp_T.detach()) - upcast(ref_logp_T.detach()))
    value_T, slope_T = kl_terms.value_and_slope(apart_T, kind)
    mean, each_T = value_T.sum() / tokens, _each(t, aggregate, by_sequence=False)
    slope_T = t.mask.keep(slope_T) if kind == "k1" else slope_T
    if each_T is not None:
        value_T, slope_T = value_T * each_T, slope_T * each_T
    if not corrected:
        return value_T.sum(), slope_T, mean
    ratio_N = hold(t.log_ratio_N).exp()
    ratio_T = t.at_T(ratio_N)
    by_ratio_N = (known(t).sums(value_T) if t.by_sequence else value_T) * t.by_log_ratio_N(ratio_N)
    return torch.dot(value_T, ratio_T), _laid(t.spread(by_ratio_N)).addcmul(slope_T, ratio_T), mean


def _surrogate(t: Terms, clip: tuple[float, float] | None, dual_clip: float | None) -> tuple[Term, dict[str, Tensor]]:
    """The clipped term, and how many tokens were clipped, by name. Exactly what is clipped has no slope."""
    ratio_N, adv_N = t.ratio_N(), t.adv_N
    value_N = ratio_N * adv_N
    slope_N, clipped = t.by_log_ratio_N(value_N), {}
    if dual_clip is not None:
        hit_N = greater(ratio_N, dual_clip).mul_(less(adv_N, 0))
        clipped["clip_dual"] = t.counted(hit_N)
        slope_N.addcmul_(slope_N, hit_N, value=-1)
        value_N.addcmul_(hit_N, (dual_clip - ratio_N).mul_(adv_N))
    if clip is not None:
        held_N = ratio_N.clamp_(1 - clip[0], 1 + clip[1]).mul_(adv_N)
        hit_N = torch.lt(held_N, value_N, out=torch.empty_like(held_N))  # out of the range, on the advantage's side
        torch.minimum(value_N, held_N, out=value_N)
        slope_N.addcmul_(slope_N, hit_N, value=-1)
        every = t.counted(hit_N)
        clipped["clip_low"] = t.counted(torch.lt(adv_N, 0, out=held_N).mul_(hit_N))
        clipped["clip_high"] = every - clipped["clip_low"]
    return Term(value_N, slope_N, t.spread, t.by_sequence), clipped


def _means(
    t: Terms,
    clipped: Mapping[str, Tensor],
    is_weight_T: Tensor | None,
    keep_T: Tensor | None,
    tokens: Count,
) -> dict[str, Tensor]:
    """Means over ``tokens``, which are not 0."""
    totals = dict(clipped)
    if is_weight_T is not None:
        totals["is_weight"] = t.mask.keep(is_weight_T).sum()
        totals["is_zero"] = ((is_weight_T.detach() == 0) & t.mask.mask_T).sum().to(t.adv_N.dtype)
    if keep_T is not None:
        totals["kept"] = t.mask.keep(keep_T).sum()
    if not totals:
        return {}
    means = torch.stack(list(totals.values())) / tokens
    return dict(zip(totals, means.unbind(), strict=True))


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
