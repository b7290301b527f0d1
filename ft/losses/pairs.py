"""Direct preference optimisation and its relatives, on log-prob sums of pairs.

Shapes: P pairs of a micro-batch, T packed tokens, S sequences. ``chosen_P[p]`` is the sum of the policy's log-probs
over the trained tokens of pair p's chosen answer; ``ref_chosen_P[p]`` is the reference model's. In the formulas

    c = chosen - ref_chosen      l = rejected - ref_rejected      s = logistic sigmoid      b = beta
    e = label_smoothing          D = score(c) - score(l)          n = tokens of an answer (at least 1)

Divergences (``score`` is f' of the f-divergence kept small, as a function of the log-ratio; Wang et al. 2309.16240):
reverse_kl x; forward_kl 1 - exp(-x); js log 2 + log s(x); alpha (exp((alpha - 1) x) - 1) / (alpha - 1), which tends to
reverse_kl as alpha -> 1. An exponent is cut at 40 before exp, so that scores stay finite in float32; beyond the cut a
pair has no gradient through that score.

Kinds, per pair:
    sigmoid       -(1-e) log s(bD) - e log s(-bD)                     DPO 2305.18290; e > 0: cDPO, Mitchell 2023
    sigmoid_norm  the same of score(c)/n - score(l)/n                 length-normalised DPO
    hinge         max(0, 1 - bD)                                      SLiC 2305.10425
    ipo           (score(c)/n - score(l)/n - 1/(2b))^2                IPO 2310.12036, per token as its authors advise
    robust        [-(1-e) log s(bD) + e log s(-bD)] / (1-2e)          rDPO 2403.00409
    exo_pair      KL of (s(bD), s(-bD)) from (1-e, e); needs e > 0    EXO 2402.00856
    nca_pair      -log s(bc) - log s(-bc)/2 - log s(-bl)/2            NCA 2402.05369
    bco_pair      -log s(bc) - log s(-bl)                             BCO 2404.04656, its delta left at 0
    sppo_hard     (c - 1/(2b))^2 + (l + 1/(2b))^2                     SPPO 2405.00675
    aot           sigmoid's form of sort(chosen - rejected) - sort(ref_chosen - ref_rejected)       AOT 2406.05882
    aot_unpaired  sigmoid's form of sort(c) - sort(l)                 the same
    apo_zero      s(-bc) + s(bl)                                      APO 2408.06266
    apo_down      s(bc) + s(-b(c - l))                                the same
    discopop      (1-g) (-log s(bD)) + g exp(-bD),  g = s(bD / tau)   DiscoPOP 2406.08414
    sft           -sum of sft_P / tokens, the answer's own NLL        as in RPO 2404.19733 and MPO 2411.10442
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ft.losses.reduce import (
    Count,
    at_least_one,
    check_number,
    check_option,
    check_same,
    detached,
    keep,
    mean_share,
    pair_sums,
    segment_sum,
    share,
    upcast,
)
from ft.types import LossOutput

DIVERGENCES = ("reverse_kl", "forward_kl", "js", "alpha")
EXPONENT = 40.0  # exp(40)^2 is still finite in float32


def dpo(
    chosen_P: Tensor,
    rejected_P: Tensor,
    ref_chosen_P: Tensor,
    ref_rejected_P: Tensor,
    *,
    kind: str | Mapping[str, float] = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    divergence: str = "reverse_kl",
    alpha: float | None = None,
    tau: float | None = None,
    lengths: tuple[Tensor, Tensor] | None = None,
    margin: Tensor | None = None,
    weight_P: Tensor | None = None,
    sft_P: Tensor | None = None,
    tokens: Count | None = None,
    units: Count | None = None,
) -> LossOutput:
    """Preference loss of pairs: the sum over pairs of the kind's loss, divided by ``units``; formulas above.

    Args:
        kind: one name, or names with weights: ``{"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}`` is MPO,
            ``{"sigmoid": 1.0, "sft": 1.0}`` is RPO. The loss is the weighted sum.
        label_smoothing: in [0, 0.5), for sigmoid, sigmoid_norm, robust, exo_pair, aot and aot_unpaired.
        divergence: for sigmoid, sigmoid_norm, hinge, ipo, exo_pair, robust and discopop; ``alpha`` goes with "alpha".
        tau: discopop's temperature in (0, 1], 0.05 by default.
        lengths: (chosen, rejected) numbers of trained tokens [P], for ipo and sigmoid_norm; also logged.
        margin: how much better each chosen answer is [P], in units of reward, for sigmoid, sigmoid_norm, robust and
            hinge: bD is taken less it, so that the rewards are to differ by that much (ODPO 2402.10571). It carries
            no gradient and is not in what is logged.
        weight_P: a weight per pair, such as WPO's; it carries no gradient and leaves the sft term alone.
        sft_P: the log-prob sums that the sft term trains, by default ``chosen_P``. Give it where ``chosen_P`` is not
            a plain sum over the tokens to be trained (LD-DPO).
        tokens: the sft term's denominator, by default this call's own ``lengths[0].sum()``.
        units: the denominator, by default P. A loop that splits a step passes the step's global counts of both.

    Differentiated: ``chosen_P``, ``rejected_P``, ``sft_P``. Stopped: the reference, lengths and weights. Inputs are
    raised to float32. P = 0 gives 0 with a graph. aot and aot_unpaired sort within the call, so that they alone depend
    on how a step is split. An option that no kind, or not every preference kind of a mixture, takes is refused with a
    ValueError, as are tensors of unlike lengths.

    ``sums``: rewards/chosen, rewards/rejected (b c and b l, whatever the divergence), rewards/margins,
    rewards/accuracies (chosen strictly higher), logps/chosen, logps/rejected; lengths/chosen, lengths/rejected where
    lengths are given; loss/<kind>, unweighted, of each kind in a mixture.
    """
    mixture = {kind: 1.0} if isinstance(kind, str) else dict(kind)
    _check(mixture, beta, label_smoothing, divergence, alpha, tau, lengths, margin, weight_P)
    if "sft" not in mixture and (sft_P is not None or tokens is not None):
        raise ValueError(f"dpo: sft_P and tokens: expected only with kind sft, got them with {', '.join(mixture)}")
    n_w, n_l = lengths if lengths is not None else (None, None)
    given = {"chosen_P": chosen_P, "rejected_P": rejected_P, "ref_chosen_P": ref_chosen_P}
    check_same(
        "dpo", **given, ref_rejected_P=ref_rejected_P, margin=margin, weight_P=weight_P, sft_P=sft_P, n_w=n_w, n_l=n_l
    )
    units = chosen_P.shape[0] if units is None else units
    chosen_P, rejected_P = upcast(chosen_P), upcast(rejected_P)
    ref_chosen_P, ref_rejected_P = upcast(ref_chosen_P).detach(), upcast(ref_rejected_P).detach()
    c, l = chosen_P - ref_chosen_P, rejected_P - ref_rejected_P
    terms = _Terms(
        c=c,
        l=l,
        score_c=_score(c, divergence, alpha),
        score_l=_score(l, divergence, alpha),
        gap=chosen_P - rejected_P,
        ref_gap=ref_chosen_P - ref_rejected_P,
        b=beta,
        e=label_smoothing,
        tau=0.05 if tau is None else tau,
        lengths=lengths,
        margin=None if margin is None else upcast(margin).detach(),
    )
    parts = {
        name: _sft(chosen_P if sft_P is None else sft_P, tokens, lengths)
        if name == "sft"
        else mean_share(_weighted(_KINDS[name](terms), weight_P), units)
        for name in mixture
    }
    with torch.no_grad():
        logps = {"logps/chosen": chosen_P, "logps/rejected": rejected_P}
        sums = pair_sums(beta * c, beta * l, units, **logps)
    if lengths is not None:
        sums |= {f"lengths/{who}": mean_share(n, units) for who, n in zip(("chosen", "rejected"), lengths, strict=True)}
    if len(mixture) > 1:
        sums |= {f"loss/{name}": part for name, part in parts.items()}
    loss = torch.stack([weight * parts[name] for name, weight in mixture.items()]).sum()
    return LossOutput(loss=loss, sums=detached(sums))


def wpo_weights(logp_T: Tensor, log_sum_sq_T: Tensor, mask_T: Tensor, seq_T: Tensor, sequences: int) -> Tensor:
    """WPO's weight of each answer [S]: exp of the mean over its trained tokens of logp - log sum_v p(v)^2. No gradient.

    How likely the policy itself would be to write the answer, against what it writes on average. A pair weighs the
    product of its answers' weights (``weight_P``); to hold the product at 1 or less, as some do, is for the caller:
    ``.clamp(max=1)``. An answer without trained tokens weighs 1. Source: WPO 2406.11827, equation 2.

    Args:
        log_sum_sq_T: log of the sum of squared probabilities over the vocabulary, at each position.
        seq_T: the sequence of each token, 0 .. S-1; S marks filler.
    """
    with torch.no_grad():
        total_S = segment_sum(keep(logp_T, mask_T) - keep(log_sum_sq_T, mask_T), seq_T, sequences)
        return torch.exp((total_S / segment_sum(mask_T, seq_T, sequences).clamp(min=1)).clamp(max=EXPONENT))


def ld_sums(logp_T: Tensor, mask_T: Tensor, seq_T: Tensor, partner_S: Tensor, *, alpha: float) -> Tensor:
    """LD-DPO's log-prob sums [S]: tokens beyond the length of the pair's shorter answer weigh ``alpha``.

    x_S = sum over the first m trained tokens of logp + alpha * sum over the rest, m = the smaller number of trained
    tokens of the two answers. Apply it to policy and reference alike, and give its parts to ``dpo`` as the sums.
    alpha = 1 is the plain sum, alpha = 0 cuts the longer answer to the shorter. Differentiable in ``logp_T``.
    Source: LD-DPO 2409.06411.

    Args:
        seq_T: the sequence of each token, ascending from 0 to S-1 (as packing lays them out); S marks filler.
        partner_S: the sequence that is the other answer of each one's pair.
    """
    check_number("ld_sums: alpha", alpha, 0.0, 1.0)
    S = partner_S.shape[0]
    n_S = segment_sum(mask_T, seq_T, S)
    before_S = n_S.cumsum(0) - n_S
    rank_T = mask_T.cumsum(0) - F.pad(before_S, (0, 1))[seq_T]  # 1 at the first trained token of a sequence
    shared_T = rank_T <= F.pad(torch.minimum(n_S, n_S[partner_S]), (0, 1))[seq_T]
    logp_T = keep(logp_T, mask_T)
    return segment_sum(torch.where(shared_T, logp_T, alpha * logp_T), seq_T, S)


class _Terms(NamedTuple):
    """What the kinds are made of; names as in the formulas of this file."""

    c: Tensor
    l: Tensor
    score_c: Tensor
    score_l: Tensor
    gap: Tensor  # chosen - rejected
    ref_gap: Tensor  # ref_chosen - ref_rejected
    b: float
    e: float
    tau: float
    lengths: tuple[Tensor, Tensor] | None
    margin: Tensor | None

    @property
    def z(self) -> Tensor:
        return self.less_margin(self.b * (self.score_c - self.score_l))

    def less_margin(self, z: Tensor) -> Tensor:
        return z if self.margin is None else z - self.margin

    @property
    def per_token(self) -> Tensor:
        """The difference of the scores, each divided by its answer's tokens."""
        assert self.lengths is not None
        n_w, n_l = (upcast(n).detach().clamp(min=1) for n in self.lengths)
        return self.score_c / n_w - self.score_l / n_l


def _score(x: Tensor, divergence: str, alpha: float | None) -> Tensor:
    if divergence == "forward_kl":
        return -torch.expm1((-x).clamp(max=EXPONENT))
    if divergence == "js":
        return math.log(2) + F.logsigmoid(x)
    if divergence == "alpha" and alpha is not None and alpha != 1:
        return torch.expm1(((alpha - 1) * x).clamp(max=EXPONENT)) / (alpha - 1)
    return x


def logistic(z_P: Tensor, smoothing: float) -> Tensor:
    """-log s(z), or -(1-e) log s(z) - e log s(-z) where a share e of the preferences is taken to be flipped."""
    if smoothing == 0:
        return -F.logsigmoid(z_P)
    return -(1 - smoothing) * F.logsigmoid(z_P) - smoothing * F.logsigmoid(-z_P)


def logistic_share(z_P: Tensor, smoothing: float, units: Count) -> Tensor:
    """``mean_share`` of the same. The sign is the denominator's, which saves a step and its gradient's."""
    if smoothing == 0:
        return F.logsigmoid(z_P).sum() / -at_least_one(units, z_P.dtype)
    return mean_share(logistic(z_P, smoothing), units)


def check_smoothing(what: str, smoothing: float) -> None:
    """Refuse a share of flipped preferences outside [0, 0.5): from a half on they say nothing, or the reverse."""
    check_number(f"{what}: label_smoothing", smoothing, 0.0)
    if smoothing >= 0.5:
        raise ValueError(f"{what}: label_smoothing: expected a number in [0, 0.5), got {smoothing}")


def _robust(t: _Terms) -> Tensor:
    return (-(1 - t.e) * F.logsigmoid(t.z) + t.e * F.logsigmoid(-t.z)) / (1 - 2 * t.e)


def _exo(t: _Terms) -> Tensor:
    z = t.z
    won = torch.sigmoid(z) * (F.logsigmoid(z) - math.log1p(-t.e))
    return won + torch.sigmoid(-z) * (F.logsigmoid(-z) - math.log(t.e))


def _nca(t: _Terms) -> Tensor:
    return -F.logsigmoid(t.b * t.c) - 0.5 * F.logsigmoid(-t.b * t.c) - 0.5 * F.logsigmoid(-t.b * t.l)


def _aot(t: _Terms) -> Tensor:
    return logistic(t.b * (t.gap.sort().values - t.ref_gap.sort().values), t.e)


def _discopop(t: _Terms) -> Tensor:
    # g exp(-z) as one exponential: it is at most 1 for tau <= 1, where exp(-z) alone overflows and then meets g = 0.
    z = t.z
    gate = z / t.tau
    return -F.logsigmoid(z) * torch.sigmoid(-gate) + torch.exp(F.logsigmoid(gate) - z)


_KINDS: dict[str, Callable[[_Terms], Tensor]] = {
    "sigmoid": lambda t: logistic(t.z, t.e),
    "sigmoid_norm": lambda t: logistic(t.less_margin(t.b * t.per_token), t.e),
    "hinge": lambda t: torch.relu(1 - t.z),
    "ipo": lambda t: (t.per_token - 0.5 / t.b) ** 2,
    "robust": _robust,
    "exo_pair": _exo,
    "nca_pair": _nca,
    "bco_pair": lambda t: -F.logsigmoid(t.b * t.c) - F.logsigmoid(-t.b * t.l),
    "sppo_hard": lambda t: (t.c - 0.5 / t.b) ** 2 + (t.l + 0.5 / t.b) ** 2,
    "aot": _aot,
    "aot_unpaired": lambda t: logistic(t.b * (t.c.sort().values - t.l.sort().values), t.e),
    "apo_zero": lambda t: torch.sigmoid(-t.b * t.c) + torch.sigmoid(t.b * t.l),
    "apo_down": lambda t: torch.sigmoid(t.b * t.c) + torch.sigmoid(-t.b * (t.c - t.l)),
    "discopop": _discopop,
}
KINDS = (*_KINDS, "sft")
_SMOOTHED = {"sigmoid", "sigmoid_norm", "robust", "exo_pair", "aot", "aot_unpaired"}
_DIVERGENT = {"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop"}
_MARGIN = {"sigmoid", "sigmoid_norm", "robust", "hinge"}
_PER_TOKEN = {"ipo", "sigmoid_norm"}
_SORTED = {"aot", "aot_unpaired"}


def _weighted(loss_P: Tensor, weight_P: Tensor | None) -> Tensor:
    return loss_P if weight_P is None else loss_P * upcast(weight_P).detach()


def _sft(sft_P: Tensor, tokens: Count | None, lengths: tuple[Tensor, Tensor] | None) -> Tensor:
    if tokens is None:
        if lengths is None:
            raise ValueError("dpo: kind sft: expected tokens= (the step's trained tokens) or lengths=, got neither")
        tokens = lengths[0].sum()
    return share(-upcast(sft_P).sum(), tokens)


def _check(
    mixture: Mapping[str, float],
    beta: float,
    smoothing: float,
    divergence: str,
    alpha: float | None,
    tau: float | None,
    lengths: object,
    margin: object,
    weight_P: object,
) -> None:
    for name in mixture:
        check_option("dpo: kind", name, KINDS)
    kinds = set(mixture) - {"sft"}
    if not mixture:
        raise ValueError("dpo: kind: expected at least one kind, got an empty mixture")
    check_number("dpo: beta", beta, 0.0, open_low=True)
    check_smoothing("dpo", smoothing)
    check_option("dpo: divergence", divergence, DIVERGENCES)
    if (divergence == "alpha") != (alpha is not None):
        raise ValueError(f"dpo: alpha goes with divergence='alpha' and only there; got {divergence!r} and {alpha}")
    if tau is not None:
        check_number("dpo: tau", tau, 0.0, 1.0, open_low=True)
    if "exo_pair" in kinds and smoothing == 0:
        raise ValueError(
            "dpo: exo_pair: expected label_smoothing > 0 (its authors use 1e-3), got 0: the loss is infinite"
        )
    _only("label_smoothing", smoothing != 0, kinds, _SMOOTHED)
    _only(f"divergence {divergence!r}", divergence != "reverse_kl", kinds, _DIVERGENT)
    _only("margin", margin is not None, kinds, _MARGIN)
    _only("weight_P", weight_P is not None, kinds, set(_KINDS) - _SORTED)
    if tau is not None and "discopop" not in kinds:
        raise ValueError(f"dpo: tau: expected only with discopop, got it with {', '.join(sorted(mixture))}")
    if lengths is None and kinds & _PER_TOKEN:
        raise ValueError(
            f"dpo: {', '.join(sorted(kinds & _PER_TOKEN))}: expected lengths=(chosen_P, rejected_P), got None"
        )


def _only(option: str, given: bool, kinds: set[str], takers: set[str]) -> None:
    if given and (not kinds or kinds - takers):
        refused = ", ".join(sorted(kinds - takers)) or "sft"
        raise ValueError(f"dpo: {option}: expected only kinds of {', '.join(sorted(takers))}; got {refused}")
