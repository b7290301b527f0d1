"""Policy gradients that differ in kind from the clipped surrogate of ``ft.losses.clipped``. Shapes: T packed tokens.

All take ``logp_T, old_logp_T, adv_T, mask_T`` (``reinforce`` no old one) and, as ``**common``, what ``grpo`` explains:
``seq_T`` or ``cu_S1``, ``adv_S``, ``aggregate``, ``constant``, ``is_weight_T``, ``keep_T``, ``ref_logp_T``,
``kl_coef``, ``kl``, ``kl_bias_correction``, ``tokens``, ``seqs``. All return its sums as well, differentiate
``logp_T`` alone, give 0 with a gradient of zeros where nothing is trained, and hold log-ratios to +-20 before
exp (``sapo`` of tokens in its slope alone: its value is bounded as it is). Notation: r = exp(logp - old_logp), A the
advantage, sg(.) what is taken as a constant.
"""

from __future__ import annotations

import math
from typing import Any, Unpack

import torch
from torch import Tensor

from ft.losses.aggregate import Sequences
from ft.losses.clipped import Common, finish, grpo
from ft.losses.elementwise import Mask, greater, less, where_over, where_within
from ft.losses.kl import BOUND
from ft.losses.reduce import check_number, check_option
from ft.losses.terms import Score, Spread, Term, Terms, terms
from ft.types import LossOutput

_LEAST = math.log(1e-8)


def reinforce(logp_T: Tensor, adv_T: Tensor | None, mask_T: Tensor, **common: Unpack[Common]) -> LossOutput:
    """x = -A logp: the score times the advantage, for samples of the policy itself (Williams 1992; GPG, 2504.02546).

    For samples of another policy give ``is_weight_T``. Averaged over tokens unless ``aggregate`` says otherwise.
    """
    t = terms("reinforce", logp_T, None, adv_T, mask_T, **_told_apart(common))
    return finish(Score(t.adv_N), t, **_rest(common))


def rloo(
    logp_T: Tensor,
    old_logp_T: Tensor | None,
    adv_T: Tensor | None,
    mask_T: Tensor,
    *,
    clip: tuple[float, float] | None = (0.2, 0.2),
    **common: Unpack[Common],
) -> LossOutput:
    """The answer as one action: ``grpo`` with the ratio of the whole sequence, each sequence counting once.

    Its advantages come from ``ft.losses.advantage.leave_one_out``. Ahmadian et al., arXiv:2402.14740. Whole-sequence
    ratios leave the clip range early: at 100 tokens a drift of 0.002 a token is outside 0.2.
    """
    fixed = _fixed("rloo", common, aggregate="sequence")
    return grpo(logp_T, old_logp_T, adv_T, mask_T, level="sequence_sum", clip=clip, **fixed)


def luspo(
    logp_T: Tensor,
    old_logp_T: Tensor | None,
    adv_T: Tensor | None,
    mask_T: Tensor,
    *,
    clip: tuple[float, float] | None = (0.2, 0.2),
    **common: Unpack[Common],
) -> LossOutput:
    """GSPO's ratio with each sequence weighted by its length: sum over its tokens, mean over sequences.

    ``grpo(level="sequence", aggregate="constant", constant=1)``. It is a sum over tokens per sequence, so the step
    size grows with length: fit the learning rate to it. Length-Unbiased Sequence Policy Optimization, arXiv:2602.05261.
    """
    fixed = _fixed("luspo", common, aggregate="constant", constant=1.0)
    return grpo(logp_T, old_logp_T, adv_T, mask_T, level="sequence", clip=clip, **fixed)


def cispo(
    logp_T: Tensor,
    old_logp_T: Tensor | None,
    adv_T: Tensor | None,
    mask_T: Tensor,
    *,
    cap: float = 5.0,
    floor: float = 0.0,
    level: str = "token",
    **common: Unpack[Common],
) -> LossOutput:
    """x = -sg(clamp(r, floor, cap)) A logp: a bounded ratio weighs the score; every token keeps a gradient.

    ``cap`` and ``floor`` are bounds of the ratio itself, not distances from 1, so a cap under 1 (which would shrink
    tokens whose ratio is 1) is refused. ``clip_high`` is the share of tokens with r > cap and A > 0; ``clip_low`` with
    r < floor and A < 0. MiniMax-M1, arXiv:2506.13585.
    """
    check_number("cap (of the ratio itself; 1 + the distance that clipping losses take)", cap, 1)
    check_number("floor", floor, 0, 1)
    t = terms("cispo", logp_T, old_logp_T, adv_T, mask_T, level=level, **_told_apart(common))
    ratio_N = t.ratio_N()
    clipped = {
        "clip_low": t.counted(less(ratio_N, floor).mul_(less(t.adv_N, 0))) if floor else ratio_N.new_zeros(()),
        "clip_high": t.counted(where_over(greater(t.adv_N, 0), ratio_N, cap)),
    }
    weight_N = ratio_N.clamp_(floor, cap).mul_(t.adv_N)
    return finish(Score(weight_N, t.by_sequence), t, clipped=clipped, **_rest(common))


def sapo(
    logp_T: Tensor,
    old_logp_T: Tensor | None,
    adv_T: Tensor | None,
    mask_T: Tensor,
    *,
    tau: tuple[float, float] = (1.0, 1.05),
    level: str = "token",
    **common: Unpack[Common],
) -> LossOutput:
    """x = -A (4 / tau) sigmoid(tau (r - 1)): a soft gate in place of a clip. ``tau`` is (where A > 0, elsewhere).

    At r = 1 the gradient is REINFORCE's; the value there is -2A / tau. Averaged as GRPO, each sequence alike, unless
    ``aggregate`` says otherwise (``seq_T`` is then needed). arXiv:2511.20347.
    """
    for value in tau:
        check_number("tau", value, 0, open_low=True)
    t = terms("sapo", logp_T, old_logp_T, adv_T, mask_T, level=level, held=False, **_told_apart(common))
    # tau (1 - r), and with it 1 - gate: each is a step less than tau (r - 1) and the gate, and the slope is the same.
    tau_N, ratio_N = torch.rsub(greater(t.adv_N, 0), tau[1], alpha=tau[1] - tau[0]), t.ratio_N()
    slope_N = t.by_log_ratio_N(ratio_N)
    shut_N = torch.addcmul(tau_N, tau_N, ratio_N, value=-1, out=ratio_N).sigmoid_()
    slope_N = torch.ops.aten.sigmoid_backward.grad_input(slope_N, shut_N, grad_input=slope_N)
    value_N = torch.div(t.adv_N, tau_N, out=tau_N)
    value_N.addcmul_(value_N, shut_N, value=-1)
    term = Term(value_N, slope_N.mul_(t.adv_N), t.spread, t.by_sequence, times=4)
    return finish(term, t, **_rest(common, aggregate="sequence"))


def gmpo(
    logp_T: Tensor,
    old_logp_T: Tensor | None,
    adv_T: Tensor | None,
    mask_T: Tensor,
    *,
    clip: tuple[float, float] = (0.4, 0.4),
    **common: Unpack[Common],
) -> LossOutput:
    """x = -A exp(mean over the sequence of clipped log r): the geometric mean of ratios that were clipped one by one.

    ``clip`` bounds log r: at most clip[1] where A > 0, at least -clip[0] where A <= 0. Each sequence counts once.
    ``keep_T`` takes tokens out of the geometric mean; a sequence of which none is left has no gradient. ``clip_low``
    and ``clip_high`` count tokens. Geometric-Mean Policy Optimization, arXiv:2507.20673.
    """
    for value in clip:
        check_number("clip", value, 0)
    given = _told_apart(common)
    t = terms("gmpo", logp_T, old_logp_T, adv_T, mask_T, **given)
    if t.sequences is None:
        raise ValueError("gmpo: expected seq_T, the sequence of each token, or cu_S1; got None")
    keep_T = common.pop("keep_T", None)
    kept, sequences = t.mask, t.sequences
    if keep_T is not None:
        kept = Mask(mask_T & (keep_T != 0))
        sequences = Sequences(given["seq_T"], kept.mask_T, given["cu_S1"])
    held_T, slope_T, clipped = _held(t, clip, kept)
    ratio_T = sequences.lay((sequences.sums(held_T) / sequences.length_S).exp_())
    del held_T

    def spread(by_mean_T: Tensor) -> Spread:
        return sequences.lay(sequences.sums(by_mean_T) / sequences.length_S).mul_(slope_T), None

    value_T = ratio_T.mul_(t.adv_N)  # its own derivative by the mean of logs
    return finish(Term(value_T, value_T, spread), t, clipped=clipped, **_fixed("gmpo", common, aggregate="sequence"))


def _held(t: Terms, clip: tuple[float, float], kept: Mask) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Log-ratios clipped one by one, their slopes, both 0 where not kept, and how many tokens were clipped."""
    log_T, up_T = t.log_ratio_N, greater(t.adv_N, 0)
    held_T = torch.lerp(log_T.clamp(min=-clip[0]), log_T.clamp(max=clip[1]), up_T)  # exact, as up_T is 0.0 or 1.0
    moved_T = torch.ne(held_T, log_T, out=torch.empty_like(log_T))
    clipped = {"clip_low": torch.dot(moved_T, less(t.adv_N, 0)), "clip_high": torch.dot(moved_T, up_T)}
    slope_T = where_within(moved_T.neg_().add_(1), log_T, BOUND)
    return kept.keep_(held_T), kept.keep_(slope_T), clipped


def vespo(
    logp_T: Tensor,
    old_logp_T: Tensor | None,
    adv_T: Tensor | None,
    mask_T: Tensor,
    *,
    k: tuple[float, float] = (2.0, 3.0),
    lam: tuple[float, float] = (3.0, 2.0),
    **common: Unpack[Common],
) -> LossOutput:
    """x = -sg(phi(W)) A logp, phi(W) = exp(lam) W^k exp(-lam W): 1 at W = 1, small for answers too likely or too rare.

    W is the ratio of the whole sequence times the product of its ``is_weight_T``, which must be weights of TOKENS and
    act here alone. ``k`` and ``lam`` are (where A >= 0, elsewhere). Token log-ratios are held to +-20, and log W to
    [log 1e-8, 20]; so is each token's log-weight. Averaged over tokens by default. arXiv:2602.10693.
    """
    for name, pair in (("k", k), ("lam", lam)):
        check_number(f"{name}[0]", pair[0], 0)
        check_number(f"{name}[1]", pair[1], 0)
    given = _told_apart(common)
    t = terms("vespo", logp_T, old_logp_T, adv_T, mask_T, lay=False, **given)
    if t.sequences is None:
        raise ValueError("vespo: expected seq_T, the sequence of each token, or cu_S1; got None")
    log_w_S = _log_answer_weight(t, t.sequences, common.pop("is_weight_T", None))
    by_sequence, down_N = given["adv_S"] is not None, less(t.adv_N, 0)
    if by_sequence:
        k_S, lam_S = (torch.rsub(down_N, pair[0], alpha=pair[0] - pair[1]) for pair in (k, lam))
        phi_N = _log_phi(log_w_S, k_S, lam_S).exp_()
    else:  # a sequence's advantages may differ in sign
        up_T, down_T = (t.sequences.lay(_log_phi(log_w_S, k[i], lam[i]).exp_()) for i in (0, 1))
        phi_N = up_T.lerp_(down_T, down_N)
    return finish(Score(phi_N.mul_(t.adv_N), by_sequence), t, **_rest(common))


def dppo(
    logp_T: Tensor,
    old_logp_T: Tensor,
    adv_T: Tensor | None,
    mask_T: Tensor,
    *,
    divergence: str = "tv",
    clip: tuple[float, float] = (0.2, 0.2),
    cap: float = 20.0,
    **common: Unpack[Common],
) -> LossOutput:
    """x = -sg(keep min(r, cap)) A logp, where a token is kept while its probability has not moved too far.

    With p = exp(logp), q = exp(old_logp), of the policy that SAMPLED:
    ``"tv"``: dropped if A > 0 and p - q > clip[1], or A <= 0 and q - p > clip[0] (total variation of "this token or
    another"). ``"kl"``: the same with q log(q/p) + (1-q) log((1-q)/(1-p)) in place of the distance. Steps that bring
    p back towards q are always kept. Unlike a clip of the ratio this leaves rare tokens free and reins in common ones.
    ``clip_low`` and ``clip_high`` are the shares dropped. arXiv:2602.04879.
    """
    check_option("divergence", divergence, ("tv", "kl"))
    check_number("cap", cap, 1)
    for value in clip:
        check_number("clip", value, 0)
    t = terms("dppo", logp_T, old_logp_T, adv_T, mask_T, **_told_apart(common))
    p_T, q_T = t.masked_logp_T().exp(), t.mask.keep(old_logp_T).exp()
    far_T = (p_T - q_T).abs() if divergence == "tv" else _binary_kl(p_T, q_T, t.log_ratio_N)
    low_T = (t.adv_N <= 0) & (p_T < q_T) & (far_T > clip[0])
    high_T = (t.adv_N > 0) & (p_T > q_T) & (far_T > clip[1])
    weight_T = torch.where(low_T | high_T, 0.0, t.ratio_N().clamp_(max=cap)).mul_(t.adv_N)
    clipped = {"clip_low": low_T.sum(), "clip_high": high_T.sum()}
    return finish(Score(weight_T), t, clipped=clipped, **_rest(common))


def _log_answer_weight(t: Terms, sequences: Sequences, is_weight_T: Tensor | None) -> Tensor:
    log_T = t.log_ratio_N
    if is_weight_T is not None:
        log_T = log_T + t.mask.keep(is_weight_T.to(log_T.dtype).log().clamp(_LEAST, BOUND))
    return sequences.sums(log_T).clamp_(_LEAST, BOUND)


def _log_phi(log_w_S: Tensor, k: Tensor | float, lam: Tensor | float) -> Tensor:
    return lam * (1 - log_w_S.exp()) + k * log_w_S


def _binary_kl(p_T: Tensor, q_T: Tensor, log_ratio_T: Tensor) -> Tensor:
    """KL(q || p) of "this token or another". Probabilities of 1 are taken a rounding step below, to stay finite."""
    least = torch.finfo(p_T.dtype).eps
    return -q_T * log_ratio_T + (1 - q_T) * ((1 - q_T).clamp(min=least).log() - (1 - p_T).clamp(min=least).log())


def _told_apart(common: Common) -> Any:
    """Takes from ``common`` what ``terms`` asks for: sequences, and advantages of them."""
    return {name: common.pop(name, None) for name in ("seq_T", "cu_S1", "adv_S")}


def _rest(common: Common, **defaults: Any) -> Any:
    return {**defaults, **common}


def _fixed(what: str, common: Common, **fixed: Any) -> Any:
    """Options that make this loss what it is: refused rather than overruled where the caller gives others."""
    for name, value in fixed.items():
        if common.get(name, value) != value:
            raise ValueError(f"{what}: expected {name}={value!r}, which is part of this loss; got {common.get(name)!r}")
    return {**common, **fixed}
