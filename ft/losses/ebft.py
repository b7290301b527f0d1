"""Energy-based fine-tuning: rewards from matching features of a frozen model, their advantages, and the loss.

Shapes: T packed tokens, S sequences, P prompts (or blocks of a prompt; any number of leading dimensions), G samples of
one prompt, D feature width. ``gen_PGD`` are the features of the samples, ``ref_PD`` those of the reference text (after
``whiten`` one row per sample, ``ref_PGD``). ``valid_PG`` is False for a missing sample: it is left out of every mean
and count and gets 0. Made where rewards are made: only ``feature_matching`` and ``ebft_loss`` have a gradient.

With phi the feature map, c a prompt, y its reference and yh ~ p a sample, the objective is

    L = E_c | E_yh phi(yh) - phi(y) |^2,    reward_j = 2 phi_j . phi(y) - 2/(n-1) sum_{k != j} phi_j . phi_k,

and the expected gradient of log p weighted by the reward is -grad L. Source: Jelassi et al., "Matching Features, Not
Tokens" (arXiv 2603.12248); where the authors' code and other ports of it differ, the authors' way is the default.

Usage: ``normalise`` -> ``pool`` -> (``whiten``) -> ``alignment``, ``diversity`` -> ``advantages`` -> ``ebft_loss``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ft.losses.aggregate import check_tokens, count_sequences, mean, needs_seq, per_sequence_sum
from ft.losses.features import normalise, pool, unit, whiten
from ft.losses.kl import estimate
from ft.losses.reduce import Count, check_option, detached, keep, mean_share, share, upcast
from ft.types import LossOutput

__all__ = [
    "advantages",
    "alignment",
    "baseline",
    "diversity",
    "ebft_loss",
    "feature_distance",
    "feature_matching",
    "normalise",
    "pool",
    "reward",
    "unit",
    "whiten",
]


def alignment(
    gen_PGD: Tensor,
    ref_PD: Tensor,
    *,
    similarity: str = "cosine",
    valid_PG: Tensor | None = None,
) -> Tensor:
    """``2 cos(phi_j, phi(y))`` per sample, [P, G]; no gradient.

    ``cosine`` is the authors' choice, also for whitened features. ``dot`` is the objective's own term; on features of
    length 1 the two are one. A zero vector has cosine 0. ``ref`` is [P, D] or, whitened, [P, G, D].
    """
    check_option("alignment(similarity=)", similarity, ("cosine", "dot"))
    gen_PGD, ref_PGD, valid_PG = _groups("alignment", gen_PGD.detach(), ref_PD.detach(), valid_PG)
    if similarity == "cosine":
        gen_PGD, ref_PGD = unit(gen_PGD), unit(ref_PGD)
    return torch.where(valid_PG, 2 * (gen_PGD * ref_PGD).sum(-1), 0.0)


def diversity(gen_PGD: Tensor, *, valid_PG: Tensor | None = None) -> Tensor:
    """``2/(n-1) sum_{k != j} phi_j . phi_k`` over the n samples of the prompt, [P, G]; no gradient.

    A penalty: ``reward`` subtracts it. Dot products, as the authors have it, so features of length sqrt(F) weigh F
    times as much here as in ``alignment``. A prompt with one sample gives 0.
    """
    gen_PGD, _, valid_PG = _groups("diversity", gen_PGD.detach(), None, valid_PG)
    similar_PGG = gen_PGD @ gen_PGD.mT
    same_GG = torch.eye(gen_PGD.shape[-2], dtype=torch.bool, device=gen_PGD.device)
    others_P1 = (valid_PG.sum(-1, keepdim=True) - 1).clamp(min=1)
    return 2 * torch.where(same_GG, 0.0, similar_PGG).sum(-1) / others_P1


def reward(
    alignment_PG: Tensor, diversity_PG: Tensor, *, alignment_coef: float = 1.0, diversity_coef: float = 1.0
) -> Tensor:
    """``alignment_coef * alignment - diversity_coef * diversity``, [P, G]. Both 1 is the objective's gradient."""
    _check_terms("reward", alignment_PG, diversity_PG, None)
    return alignment_coef * upcast(alignment_PG.detach()) - diversity_coef * upcast(diversity_PG.detach())


def baseline(
    alignment_PG: Tensor,
    diversity_PG: Tensor,
    *,
    kind: str = "independent",
    alignment_coef: float = 1.0,
    diversity_coef: float = 1.0,
    valid_PG: Tensor | None = None,
) -> Tensor:
    """What ``advantages`` subtracts from each reward, [P, G]. With a, d the two terms and n the samples of a prompt:

    - ``independent`` (the authors): mean of the others' a; and (sum_k d_k - 2 d_j) / (n - 2), which is twice the mean
      dot product among the pairs without j (0 for n < 3). Nothing in it depends on sample j, so the gradient stays
      unbiased. (Features whitened together depend on each other, and no baseline of them is independent.)
    - ``leave_one_out``: mean of the others' reward. Biased, since d_k of another sample contains phi_j.
    - ``mean``: mean of all rewards of the prompt. Biased.
    - ``none``: 0 (REINFORCE).

    A prompt with a single sample has baseline 0 under all kinds but ``mean``, where its advantage is 0.
    """
    check_option("baseline(kind=)", kind, ("independent", "leave_one_out", "mean", "none"))
    valid_PG = _check_terms("baseline", alignment_PG, diversity_PG, valid_PG)
    n_P1 = valid_PG.sum(-1, keepdim=True)
    a_PG, d_PG = keep(alignment_PG.detach(), valid_PG), keep(diversity_PG.detach(), valid_PG)
    r_PG = reward(a_PG, d_PG, alignment_coef=alignment_coef, diversity_coef=diversity_coef)
    if kind == "none":
        return torch.zeros_like(r_PG)
    if kind == "mean":
        return torch.where(valid_PG, r_PG.sum(-1, keepdim=True) / n_P1.clamp(min=1), 0.0)
    if kind == "leave_one_out":
        return torch.where(valid_PG, _others(r_PG, n_P1), 0.0)
    pairs_PG = (d_PG.sum(-1, keepdim=True) - 2 * d_PG) / (n_P1 - 2).clamp(min=1)
    independent_PG = alignment_coef * _others(a_PG, n_P1) - diversity_coef * torch.where(n_P1 > 2, pairs_PG, 0.0)
    return torch.where(valid_PG, independent_PG, 0.0)


def advantages(
    alignment_PG: Tensor,
    diversity_PG: Tensor,
    *,
    kind: str = "independent",
    scale: str = "none",
    alignment_coef: float = 1.0,
    diversity_coef: float = 1.0,
    eps: float = 1e-4,
    valid_PG: Tensor | None = None,
) -> Tensor:
    """``reward - baseline``, optionally over the reward's spread, [P, G]; see ``reward`` and ``baseline``.

    ``scale``: ``samples`` divides by (standard deviation over the samples of the prompt + eps), n - 1 in the variance;
    ``blocks`` by that over the blocks of one sample (the authors' group norm), and then the terms are [.., blocks, G].
    A spread of fewer than two values is not defined: such an advantage is left unscaled. ``eps`` stands above the
    rounding of equal rewards, so that equal samples get 0 and not noise; ports have 1e-8 and 1e-9.
    """
    check_option("advantages(scale=)", scale, ("none", "samples", "blocks"))
    valid_PG = _check_terms("advantages", alignment_PG, diversity_PG, valid_PG)
    coefs = {"alignment_coef": alignment_coef, "diversity_coef": diversity_coef}
    r_PG = reward(keep(alignment_PG, valid_PG), keep(diversity_PG, valid_PG), **coefs)
    centred_PG = r_PG - baseline(alignment_PG, diversity_PG, kind=kind, valid_PG=valid_PG, **coefs)
    if scale == "none":
        return centred_PG
    if scale == "blocks" and (r_PG.ndim < 2 or r_PG.shape[-2] < 2):
        raise ValueError(
            f"advantages(scale='blocks'): expected terms [.., blocks, samples] of 2 blocks or more, got "
            f"{tuple(r_PG.shape)}"
        )
    return centred_PG / _spread(r_PG, valid_PG, -1 if scale == "samples" else -2, eps)


def feature_distance(
    gen_PGD: Tensor, ref_PD: Tensor, *, unbiased: bool = False, valid_PG: Tensor | None = None
) -> Tensor:
    """``| mean_j phi_j - phi(y) |^2`` per prompt, [P], summed over D, with a gradient to ``gen`` (``ref`` is stopped).

    The plain estimate is too large by (variance of phi) / n. ``unbiased`` takes only products of different samples,
    ``mean_{j != k} phi_j . phi_k - 2 mean_j phi_j . phi(y) + |phi(y)|^2``, and may be negative; it needs two samples
    (a prompt with fewer gives 0). ``ref`` is [P, D] or [P, G, D] (rows of a prompt are averaged); no sample gives 0.
    """
    gen_PGD, ref_PGD, valid_PG = _groups("feature_distance", gen_PGD, ref_PD.detach(), valid_PG)
    n_P = valid_PG.sum(-1)
    n_P1 = n_P.clamp(min=1)[..., None]
    total_PD, ref_PD = gen_PGD.sum(-2), ref_PGD.sum(-2) / n_P1
    if not unbiased:
        return (total_PD / n_P1 - ref_PD).square().sum(-1)
    pairs_P = (total_PD.square().sum(-1) - gen_PGD.square().sum((-2, -1))) / (n_P * (n_P - 1)).clamp(min=1)
    distance_P = pairs_P - 2 * (total_PD / n_P1 * ref_PD).sum(-1) + ref_PD.square().sum(-1)
    return torch.where(n_P > 1, distance_P, 0.0)


def feature_matching(
    gen_PGD: Tensor,
    ref_PD: Tensor,
    *,
    unbiased: bool = False,
    valid_PG: Tensor | None = None,
    prompts: Count | None = None,
) -> LossOutput:
    """Mean over prompts of ``feature_distance``: the objective itself, for features that have a gradient, and for logs.

    ``prompts``: the denominator, by default those of this call with enough samples to be counted (one, or two when
    ``unbiased``). Without any the loss is a 0 with a graph.
    """
    distance_P = feature_distance(gen_PGD, ref_PD, unbiased=unbiased, valid_PG=valid_PG)
    if prompts is None:
        n_P = gen_PGD.new_full(distance_P.shape, gen_PGD.shape[-2]) if valid_PG is None else valid_PG.sum(-1)
        prompts = (n_P > int(unbiased)).sum()
    loss = mean_share(distance_P, prompts)
    return LossOutput(loss=loss, sums=detached({"feature_distance": loss}))


def ebft_loss(
    logp_T: Tensor,
    adv_T: Tensor,
    mask_T: Tensor,
    *,
    ce_T: Tensor | None = None,
    ref_logp_T: Tensor | None = None,
    rl_coef: float = 1.0,
    ce_coef: float = 0.0,
    kl_coef: float = 0.0,
    surrogate: str = "ratio",
    aggregate: str = "token",
    seq_T: Tensor | None = None,
    tokens: Count | None = None,
    ce_tokens: Count | None = None,
    seqs: Count | None = None,
    ce_seqs: Count | None = None,
) -> LossOutput:
    """Policy gradient, cross-entropy and KL, each a mean over its own tokens:

        rl_coef * mean_{mask} x_t  +  ce_coef * sum(-ce_t logp_t) / sum(ce_t)  +  kl_coef * mean_{mask} d_t^2 / 2

    with x_t = -exp(logp_t - sg(logp_t)) A_t (``ratio``, the authors': its value is -A_t) or -logp_t A_t (``logp``); the
    gradient, -A_t grad logp_t, is the same; and d_t = logp_t - ref_t. A, ce and ref are stopped. The KL term (k2) has,
    on the policy's own samples, the gradient of the reverse KL. There is no ratio to an older policy: give advantages
    of samples of an older one to ``grpo``.

    Args:
        logp_T: log-prob of each token, 1-D, any float type.
        adv_T: advantage of each token, the same for all tokens of a sample (or block).
        mask_T: bool, True where a generated token has an advantage.
        ce_T: weight of each token's cross-entropy, 0 where it has none; any overlap with ``mask_T`` is allowed.
        tokens, ce_tokens: the denominators, by default this call's own sum of ``mask_T`` and of ``ce_T``.
        aggregate: ``sequence`` takes each mean within each sequence of ``seq_T`` first, and then over the sequences
            that have such a token (the authors' order; the same number where all have equally many). Their numbers
            ``seqs`` and ``ce_seqs`` are then the denominators, by default this call's own.

    A sequence or call without a token of a kind adds 0 to that term, with a graph (the authors' code falls back to the
    mean over the *unmasked* tokens there). Masked tokens may hold anything, NaN included.
    """
    _check_loss(logp_T, adv_T, mask_T, seq_T, ce_T, ref_logp_T, ce_coef, kl_coef, surrogate)
    _check_denominators(aggregate, tokens=tokens, ce_tokens=ce_tokens, seqs=seqs, ce_seqs=ce_seqs)
    lp_T = keep(logp_T, mask_T)
    ratio_T = (lp_T - lp_T.detach()).exp() if surrogate == "ratio" else lp_T
    policy = mean(-ratio_T * keep(adv_T.detach(), mask_T), mask_T, seq_T, how=aggregate, tokens=tokens, seqs=seqs)
    loss, sums = rl_coef * policy, {"ebft/policy": policy}
    if ce_T is not None:
        sums["ebft/ce"] = _cross_entropy(logp_T, ce_T, seq_T, aggregate, ce_tokens, ce_seqs)
        loss = loss + ce_coef * sums["ebft/ce"]
    if ref_logp_T is not None:
        kl_T = estimate(lp_T, keep(ref_logp_T, mask_T), kind="k2")
        sums["ebft/kl"] = mean(kl_T, mask_T, seq_T, how=aggregate, tokens=tokens, seqs=seqs)
        loss = loss + kl_coef * sums["ebft/kl"]
    return LossOutput(loss=loss, sums=detached(sums))


def _cross_entropy(
    logp_T: Tensor, ce_T: Tensor, seq_T: Tensor | None, aggregate: str, tokens: Count | None, seqs: Count | None
) -> Tensor:
    """Weighted mean of -logp. Weights are no counts: a sum of them below 1 is divided by as it is."""
    ce_T = upcast(ce_T.detach())
    x_T = -keep(logp_T, ce_T != 0) * ce_T
    if aggregate == "token":
        return _over(x_T.sum(), ce_T.sum() if tokens is None else tokens)
    seq_T = needs_seq("ebft_loss(aggregate='sequence')", seq_T)
    seqs = count_sequences(ce_T != 0, seq_T) if seqs is None else seqs
    return share(_over(x_T, per_sequence_sum(ce_T, seq_T)).sum(), seqs)


def _over(x: Tensor, weight: Count) -> Tensor:
    """``x / weight``, and ``x`` where there is no weight."""
    if not isinstance(weight, Tensor):
        return x / (weight if weight > 0 else 1.0)
    weight = weight.detach().to(x.dtype)
    return x / torch.where(weight > 0, weight, 1.0)


def _others(x_PG: Tensor, n_P1: Tensor) -> Tensor:
    """Mean over the other samples of the prompt; 0 where there is none."""
    return torch.where(n_P1 > 1, (x_PG.sum(-1, keepdim=True) - x_PG) / (n_P1 - 1).clamp(min=1), 0.0)


def _spread(x: Tensor, valid: Tensor, dim: int, eps: float) -> Tensor:
    """Standard deviation of the valid values over ``dim`` (n - 1) plus eps; 1 where there are fewer than two."""
    n = valid.sum(dim, keepdim=True)
    mean = torch.where(valid, x, 0.0).sum(dim, keepdim=True) / n.clamp(min=1)
    square = torch.where(valid, x - mean, 0.0).square().sum(dim, keepdim=True)
    return torch.where(n > 1, (square / (n - 1).clamp(min=1)).sqrt() + eps, 1.0)


def _groups(
    what: str, gen_PGD: Tensor, ref_PD: Tensor | None, valid_PG: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Upcast features with zeros for missing samples, the reference one row per sample, and the mask."""
    if gen_PGD.ndim < 2 or (valid_PG is not None and valid_PG.shape != gen_PGD.shape[:-1]):
        shape = None if valid_PG is None else tuple(valid_PG.shape)
        raise ValueError(
            f"{what}: expected gen [.., samples, width], valid [.., samples]; got {tuple(gen_PGD.shape)} and {shape}"
        )
    valid_PG = torch.ones_like(gen_PGD[..., 0], dtype=torch.bool) if valid_PG is None else valid_PG
    gen_PGD = keep(gen_PGD, valid_PG[..., None])
    if ref_PD is None:
        return gen_PGD, gen_PGD, valid_PG
    if ref_PD.shape not in (gen_PGD.shape, (*gen_PGD.shape[:-2], gen_PGD.shape[-1])):
        raise ValueError(
            f"{what}: expected ref [..., width] or [..., samples, width] to fit gen {tuple(gen_PGD.shape)}, got "
            f"{tuple(ref_PD.shape)}"
        )
    ref_PGD = ref_PD if ref_PD.shape == gen_PGD.shape else ref_PD[..., None, :].expand_as(gen_PGD)
    return gen_PGD, keep(ref_PGD, valid_PG[..., None]), valid_PG


def _check_terms(what: str, alignment_PG: Tensor, diversity_PG: Tensor, valid_PG: Tensor | None) -> Tensor:
    valid_PG = torch.ones_like(alignment_PG, dtype=torch.bool) if valid_PG is None else valid_PG
    shapes = [tuple(x.shape) for x in (alignment_PG, diversity_PG, valid_PG)]
    if len(set(shapes)) > 1 or not shapes[0]:
        raise ValueError(f"{what}: expected alignment, diversity and valid of one shape [..., samples], got {shapes}")
    return valid_PG


def _check_loss(
    logp_T: Tensor,
    adv_T: Tensor,
    mask_T: Tensor,
    seq_T: Tensor | None,
    ce_T: Tensor | None,
    ref_logp_T: Tensor | None,
    ce_coef: float,
    kl_coef: float,
    surrogate: str,
) -> None:
    check_tokens("ebft_loss", mask_T, seq_T, logp_T=logp_T, adv_T=adv_T, ce_T=ce_T, ref_logp_T=ref_logp_T)
    check_option("ebft_loss(surrogate=)", surrogate, ("ratio", "logp"))
    if ce_coef and ce_T is None:
        raise ValueError(f"ebft_loss: ce_coef={ce_coef} expects ce_T, the cross-entropy weight of each token; got None")
    if kl_coef and ref_logp_T is None:
        raise ValueError(f"ebft_loss: kl_coef={kl_coef} expects ref_logp_T; got None")


def _check_denominators(aggregate: str, **counts: Count | None) -> None:
    """Refuse a denominator that would divide nothing."""
    check_option("ebft_loss(aggregate=)", aggregate, ("token", "sequence"))
    used = ("tokens", "ce_tokens") if aggregate == "token" else ("seqs", "ce_seqs")
    given = [name for name, count in counts.items() if count is not None and name not in used]
    if given:
        raise ValueError(f"ebft_loss(aggregate={aggregate!r}): expected denominators {used}, got {', '.join(given)}")
