"""Preference losses beside DPO: unpaired (kto, bco) and without a reference (orpo, cpo, simpo).

Shapes: P pairs of a micro-batch, S sequences. ``logp_S`` and ``chosen_P`` are sums of log-probs over an answer's
trained tokens; ``_mean_P`` are those sums divided by the answer's number of trained tokens. s = logistic sigmoid.

All reduce in float32, divide by ``units`` (by default the call's own number of sequences or pairs; a loop that splits
a step passes the step's global count), differentiate the policy's log-probs only, give 0 with a graph for empty
inputs, and refuse with a ValueError what they cannot honour. ``sums`` hold shares of rewards/chosen,
rewards/rejected, rewards/margins, logps/chosen, logps/rejected, and of rewards/accuracies for pairs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ft.losses.elementwise import greater
from ft.losses.pairs import EXPONENT, check_smoothing, logistic_share
from ft.losses.reduce import (
    Count,
    check_number,
    check_option,
    check_same,
    detached,
    keep,
    mean_share,
    mean_shares,
    share,
    upcast,
)
from ft.types import LossOutput

TOP = -1e-7  # a mean log-prob of 0 would have infinite odds


def kto(
    logp_S: Tensor,
    ref_logp_S: Tensor,
    label_S: Tensor,
    *,
    kl: Tensor | float | None = None,
    kind: str = "kto",
    beta: float = 0.1,
    desirable: float = 1.0,
    undesirable: float = 1.0,
    labels: tuple[Count, Count] | None = None,
    units: Count | None = None,
) -> LossOutput:
    """Kahneman-Tversky optimisation, with x = logp - ref_logp and z = max(0, kl):

        kto                 desirable: 1 - s(beta (x - z))     undesirable: 1 - s(beta (z - x))
        apo_zero_unpaired   the same with z = 0, and needs no kl

    each times its weight; summed over sequences and divided by ``units``.

    Args:
        label_S: bool, True where the answer is desirable.
        kl: the step's mean of policy - reference log-prob sums over mismatched prompts and answers (``kto_kl``), a
            number or a 0-d tensor, the same for every part of a split step. It is stopped, and held at 0 or more.
        desirable, undesirable: weights. The paper asks for desirable * n_desirable / (undesirable * n_undesirable)
            between 1 and 4/3.
        labels: the step's numbers of desirable and undesirable sequences: denominators of the logged numbers.

    ``sums`` also holds kl (each part its share by sequences). A NaN log-prob makes the loss NaN, for the loop to
    see: it is not left out of the mean. Source: KTO 2402.01306 equation 7; APO 2408.06266 equation 7.
    """
    check_option("kto: kind", kind, ("kto", "apo_zero_unpaired"))
    if (kind == "kto") != (kl is not None):
        raise ValueError(f"kto: kl: expected for kind='kto' and only there (kto_kl gives it), got {kl} with {kind!r}")
    check_number("kto: beta", beta, 0.0, open_low=True)
    check_number("kto: desirable", desirable, 0.0)
    check_number("kto: undesirable", undesirable, 0.0)
    logp_S, x_S, label_S = _unpaired("kto", logp_S, ref_logp_S, label_S)
    units = x_S.shape[0] if units is None else units
    z = _scalar("kto: kl", 0.0 if kl is None else kl, x_S).clamp(min=0)
    loss_S = torch.sigmoid(beta * torch.where(label_S, z - x_S, x_S - z))
    loss_S = torch.where(label_S, desirable * loss_S, undesirable * loss_S)
    sums = _label_sums(beta * x_S, logp_S, label_S, labels)
    if kl is not None:
        sums["kl"] = z * mean_share(torch.ones_like(x_S), units)
    return LossOutput(loss=mean_share(loss_S, units), sums=detached(sums))


def kto_kl(logp_S: Tensor, ref_logp_S: Tensor, *, units: Count | None = None) -> Tensor:
    """The reference point of kto: the mean of logp - ref_logp over answers that belong to other prompts. No gradient.

    A share: add up the parts of a split step before giving the sum to ``kto``, which holds it at 0 or more (each
    part's mean held at 0 apart would be larger). Sequences whose own answer slipped in are the caller's to avoid:
    rotating answers by one within a group of one mismatches nothing.
    """
    check_same("kto_kl", logp_S=logp_S, ref_logp_S=ref_logp_S)
    return mean_share((upcast(logp_S) - upcast(ref_logp_S)).detach(), units)


def bco(
    logp_S: Tensor,
    ref_logp_S: Tensor,
    label_S: Tensor,
    *,
    delta: Tensor | float,
    beta: float = 0.1,
    weight_S: Tensor | None = None,
    labels: tuple[Count, Count] | None = None,
    units: Count | None = None,
) -> LossOutput:
    """Binary classifier optimisation: -log s(r - delta) where desirable, -log s(delta - r) where not; r = beta x.

    Args:
        delta: the running mean of the rewards r of everything seen so far (this step included), a number or a 0-d
            tensor; stopped. ``sums["rewards/mean"]`` is the step's mean, from which a caller keeps it. With delta = 0,
            the sum over the two answers of a pair is ``dpo``'s bco_pair.
        weight_S: weights of undesirable sequences (``density_ratio``); desirable ones weigh 1 whatever stands there.
        label_S, labels, units: as in ``kto``.

    Source: BCO 2404.04656.
    """
    check_number("bco: beta", beta, 0.0, open_low=True)
    logp_S, x_S, label_S = _unpaired("bco", logp_S, ref_logp_S, label_S, weight_S)
    units = x_S.shape[0] if units is None else units
    gap_S = beta * x_S - _scalar("bco: delta", delta, x_S)
    loss_S = -F.logsigmoid(torch.where(label_S, gap_S, -gap_S))
    if weight_S is not None:
        loss_S = loss_S * torch.where(label_S, 1.0, upcast(weight_S).detach())
    sums = _label_sums(beta * x_S, logp_S, label_S, labels) | {"rewards/mean": mean_share(beta * x_S, units)}
    return LossOutput(loss=mean_share(loss_S, units), sums=detached(sums))


def density_ratio(p_S: Tensor, *, low: float = 0.5, high: float = 10.0) -> Tensor:
    """BCO's weight of an undesirable sequence: p / (1 - p) within ``low .. high``, no gradient.

    p is a classifier's probability that the sequence's prompt is one of the desirable ones.
    """
    check_number("density_ratio: low", low, 0.0)
    check_number("density_ratio: high", high, low)
    p_S = upcast(p_S).detach()
    return (p_S / (1 - p_S)).clamp(low, high)


def orpo(
    chosen_mean_P: Tensor,
    rejected_mean_P: Tensor,
    *,
    beta: float = 0.1,
    sft_P: Tensor | None = None,
    tokens: Count | None = None,
    units: Count | None = None,
) -> LossOutput:
    """Odds ratio preference optimisation: NLL of the chosen answer - beta * log s(log odds(chosen) / odds(rejected)).

    odds(p) = p / (1 - p) with p = exp(mean log-prob). A mean log-prob above -1e-7 (a certain answer, whose odds are
    infinite) is taken as -1e-7, without gradient.

    Args:
        sft_P: log-prob sums that the likelihood term trains: the chosen answers', or as in the authors' code those of
            prompt and answer together. None leaves the term out, for loops that add ``nll`` themselves.
        tokens: its denominator, the number of tokens behind ``sft_P`` (in the whole step).

    ``sums`` also holds log_odds, and nll where there is one. Source: ORPO 2403.07691 equations 4 to 7.
    """
    check_number("orpo: beta", beta, 0.0)
    chosen, rejected, units = _paired("orpo", chosen_mean_P, rejected_mean_P, units, sft_P)
    w, l = chosen.clamp(max=TOP), rejected.clamp(max=TOP)
    # Beside w itself log(1 - p) loses nothing in this form: where expm1 rounds to -1, it is below w's last bit.
    log_odds = (w - l) - (torch.log(-torch.expm1(w)) - torch.log(-torch.expm1(l)))
    loss, nll = _with_sft("orpo", mean_share(-beta * F.logsigmoid(log_odds), units), 1.0, sft_P, tokens)
    sums = _reference_free_sums(beta, chosen, rejected, units, log_odds=log_odds)
    return LossOutput(loss=loss, sums=sums | detached(nll))


def cpo(
    chosen_P: Tensor,
    rejected_P: Tensor,
    *,
    kind: str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    lengths: tuple[Tensor, Tensor] | None = None,
    sft: float = 1.0,
    sft_P: Tensor | None = None,
    tokens: Count | None = None,
    units: Count | None = None,
) -> LossOutput:
    """Contrastive preference optimisation: DPO with a uniform reference, and a likelihood term.

    With z = beta (chosen - rejected) of log-prob sums: sigmoid -(1-e) log s(z) - e log s(-z), hinge max(0, 1 - z), ipo
    (chosen/n - rejected/n - 1/(2 beta))^2; plus ``sft`` times -sum(sft_P) / tokens.

    Args:
        label_smoothing: e in [0, 0.5), for sigmoid.
        lengths: (chosen, rejected) numbers of trained tokens [P], for ipo.
        sft_P: log-prob sums of the likelihood term, by default ``chosen_P``.
        tokens: its denominator, by default ``lengths[0].sum()``. Needed where ``sft`` is not 0.

    Source: CPO 2401.08417 equation 3.
    """
    check_option("cpo: kind", kind, ("sigmoid", "hinge", "ipo"))
    check_number("cpo: beta", beta, 0.0, open_low=True)
    check_smoothing("cpo", label_smoothing)
    if label_smoothing and kind != "sigmoid":
        raise ValueError(
            f"cpo: label_smoothing: expected only with kind='sigmoid', got {label_smoothing} with {kind!r}"
        )
    n_w, n_l = lengths if lengths is not None else (None, None)
    chosen, rejected, units = _paired("cpo", chosen_P, rejected_P, units, sft_P, n_w, n_l)
    if kind == "ipo":
        if n_w is None or n_l is None:
            raise ValueError("cpo: ipo: expected lengths=(chosen_P, rejected_P), got None")
        n_w, n_l = (upcast(n).detach().clamp(min=1) for n in (n_w, n_l))
        loss = mean_share((chosen / n_w - rejected / n_l - 0.5 / beta) ** 2, units)
    elif kind == "hinge":
        loss = mean_share(torch.relu(1 - beta * (chosen - rejected)), units)
    else:
        loss = logistic_share(beta * (chosen - rejected), label_smoothing, units)
    if sft != 0:
        sft_P = chosen if sft_P is None else sft_P
        tokens = lengths[0].sum() if tokens is None and lengths is not None else tokens
    loss, nll = _with_sft("cpo", loss, sft, sft_P, tokens)
    return LossOutput(loss=loss, sums=_reference_free_sums(beta, chosen, rejected, units) | detached(nll))


def simpo(
    chosen_mean_P: Tensor,
    rejected_mean_P: Tensor,
    *,
    beta: float = 2.0,
    gamma: float = 1.0,
    alpha: float = 0.0,
    label_smoothing: float = 0.0,
    units: Count | None = None,
) -> LossOutput:
    """SimPO: -(1-e) log s(z) - e log s(-z), z = beta (r(chosen) - r(rejected)) - gamma.

    r is the mean log-prob of an answer or, where ``alpha`` is not 0, AlphaPO's reward (1 - p^-alpha) / alpha of
    p = exp(mean log-prob), which tends to log p as alpha -> 0. Its exponent is cut at 40; an answer beyond the cut
    has no gradient.

    Args:
        gamma: the margin itself, not its ratio to beta (published settings often give gamma / beta).

    Source: SimPO 2405.14734 equation 6; AlphaPO 2501.03884.
    """
    check_number("simpo: beta", beta, 0.0, open_low=True)
    check_smoothing("simpo", label_smoothing)
    chosen, rejected, units = _paired("simpo", chosen_mean_P, rejected_mean_P, units)
    r_w, r_l = _alpha_reward(chosen, alpha), _alpha_reward(rejected, alpha)
    loss = logistic_share(beta * (r_w - r_l) - gamma, label_smoothing, units)
    sums = _reference_free_sums(beta, r_w, r_l, units)
    return LossOutput(loss=loss, sums=sums if alpha == 0 else sums | _logps(chosen, rejected, units))


def _alpha_reward(mean_P: Tensor, alpha: float) -> Tensor:
    return mean_P if alpha == 0 else -torch.expm1((-alpha * mean_P).clamp(max=EXPONENT)) / alpha


def _unpaired(
    what: str, logp_S: Tensor, ref_logp_S: Tensor, label_S: Tensor, weight_S: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(logp, logp - reference, label), in float32; a label that is not bool is refused, since -1 would be True."""
    check_same(what, logp_S=logp_S, ref_logp_S=ref_logp_S, label_S=label_S, weight_S=weight_S)
    if label_S.dtype != torch.bool:
        raise ValueError(f"{what}: label_S: expected bool (True where desirable), got {label_S.dtype}")
    logp_S = upcast(logp_S)
    return logp_S, logp_S - upcast(ref_logp_S).detach(), label_S


def _scalar(what: str, value: Tensor | float, like: Tensor) -> Tensor:
    value = torch.as_tensor(value, dtype=like.dtype).detach()
    if value.dim():
        raise ValueError(f"{what}: expected a number or a 0-d tensor, got shape {tuple(value.shape)}")
    return value


def _paired(
    what: str, chosen_P: Tensor, rejected_P: Tensor, units: Count | None, *more: Tensor | None
) -> tuple[Tensor, Tensor, Count]:
    check_same(what, chosen=chosen_P, rejected=rejected_P, **{f"with_{i}": t for i, t in enumerate(more)})
    return upcast(chosen_P), upcast(rejected_P), chosen_P.shape[0] if units is None else units


def _with_sft(
    what: str, loss: Tensor, weight: float, sft_P: Tensor | None, tokens: Count | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss with its likelihood term, and the term for the log; both or neither of its inputs are to be given."""
    if (sft_P is None) != (tokens is None) or (sft_P is not None and weight == 0):
        raise ValueError(
            f"{what}: likelihood term of weight {weight:g}: expected sums of log-probs and tokens= (their number in "
            f"the step), or neither; got sums: {sft_P is not None}, tokens: {tokens is not None}"
        )
    if sft_P is None or tokens is None:
        return loss, {}
    nll = share(-upcast(sft_P).sum(), tokens)
    return loss + weight * nll, {"nll": nll}


def _logps(chosen_P: Tensor, rejected_P: Tensor, units: Count) -> dict[str, Tensor]:
    return mean_shares({"logps/chosen": chosen_P, "logps/rejected": rejected_P}, units)


def _reference_free_sums(
    beta: float, chosen_P: Tensor, rejected_P: Tensor, units: Count, **more: Tensor
) -> dict[str, Tensor]:
    """Where a reward is ``beta`` times a log-prob, and so are their means. On short tensors it is calls that cost."""
    chosen_P, rejected_P = chosen_P.detach(), rejected_P.detach()
    rows = torch.stack((chosen_P, rejected_P, greater(chosen_P, rejected_P), *more.values())).detach()
    logp_w, logp_l, accuracy, *others = share(rows.sum(1), units).unbind()
    reward_w, reward_l = beta * logp_w, beta * logp_l
    rewards = {"rewards/chosen": reward_w, "rewards/rejected": reward_l, "rewards/margins": reward_w - reward_l}
    logps = {"logps/chosen": logp_w, "logps/rejected": logp_l, "rewards/accuracies": accuracy}
    return rewards | logps | dict(zip(more, others, strict=True))


def _label_sums(
    reward_S: Tensor, logp_S: Tensor, label_S: Tensor, labels: tuple[Count, Count] | None
) -> dict[str, Tensor]:
    """Means over desirable and over undesirable sequences, as shares of the step's numbers of either."""
    n_w, n_l = (label_S.sum(), (~label_S).sum()) if labels is None else labels

    def means(x_S: Tensor) -> tuple[Tensor, Tensor]:
        return share(keep(x_S, label_S).sum(), n_w), share(keep(x_S, ~label_S).sum(), n_l)

    reward_w, reward_l = means(reward_S)
    logp_w, logp_l = means(logp_S)
    rewards = {"rewards/chosen": reward_w, "rewards/rejected": reward_l, "rewards/margins": reward_w - reward_l}
    return rewards | {"logps/chosen": logp_w, "logps/rejected": logp_l}
