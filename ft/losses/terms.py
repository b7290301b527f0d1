"""What policy-gradient losses are made of: ratios and advantages, masked, at the places where they are worked out.

Shapes: T packed tokens, S sequences, N places, which are the one or the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ft.losses.aggregate import Sequences, check_tokens, sequences_of
from ft.losses.elementwise import Mask, where_over, where_within
from ft.losses.kl import BOUND
from ft.losses.reduce import check_option, check_same, upcast

LEVELS = {"token": "token", "sequence": "geometric", "sequence_token": "geometric", "sequence_sum": "sequence"}


class Terms(NamedTuple):
    """What a policy term is made of. All but ``logp_T`` is without gradient, and 0 wherever the mask is False.

    N are the places of ratio and advantage: the sequences (S) where the ratio is theirs and ``adv_S`` was given, so
    that there is nothing to work out token by token; the tokens (T) elsewhere.
    """

    logp_T: Tensor  # as given, whatever stands at untrained places
    mask: Mask
    sequences: Sequences | None
    level: str
    by_sequence: bool  # N is S
    log_ratio_N: Tensor  # held to +-20
    adv_N: Tensor

    def trained(self) -> Tensor:
        """How many tokens, 0-d. A function, as who gives ``tokens`` may have no use for it."""
        return trained(self.mask, self.sequences)

    def masked_logp_T(self) -> Tensor:
        return self.mask.keep(self.logp_T)

    def ratio_N(self) -> Tensor:
        """A function, as what follows differs in whether it holds it for long."""
        return self.log_ratio_N.exp()

    def at_T(self, x_N: Tensor) -> Tensor:
        """At each token the number of its place."""
        return known(self).lay(x_N) if self.by_sequence else x_N

    def counted(self, hit_N: Tensor) -> Tensor:
        """How many trained tokens lie where ``hit_N`` is 1.0, which it is nowhere that the advantage is 0."""
        return torch.dot(hit_N, known(self).trained_S.to(hit_N.dtype)) if self.by_sequence else hit_N.sum()

    def ratio_slope_N(self, ratio_N: Tensor) -> Tensor:
        """d ratio / d log-ratio: the ratio itself, and 0 where the bound holds it."""
        return where_within(ratio_N, self.log_ratio_N, BOUND)

    def spread(self, slope_N: Tensor) -> Tensor:
        """From a slope by the log-ratio, the slope by ``logp_T``: a sequence's goes to all of its trained tokens."""
        if self.level in ("token", "sequence_token"):
            return slope_N
        slope_S = slope_N if self.by_sequence else known(self).sums(slope_N)
        if LEVELS[self.level] == "geometric":
            slope_S = slope_S / known(self).length_S
        return self.mask.keep_(known(self).lay(slope_S))


class Term(NamedTuple):
    """A policy term x as each loss makes it, of tokens, or of sequences where ``by_sequence``."""

    value_N: Tensor
    slope_N: Tensor
    spread: Callable[[Tensor], Tensor]  # from slopes as given to slopes by logp_T
    by_sequence: bool = False


@torch.no_grad()
def terms(
    what: str,
    logp_T: Tensor,
    old_logp_T: Tensor | None,
    adv_T: Tensor | None,
    mask_T: Tensor,
    *,
    seq_T: Tensor | None = None,
    cu_S1: Tensor | None = None,
    adv_S: Tensor | None = None,
    level: str = "token",
) -> Terms:
    """Check and mask the inputs of a policy loss, and raise the log-ratio to ``level`` (see ``grpo``)."""
    _check_advantage(what, adv_T, adv_S, cu_S1, mask_T)
    mask, sequences, log_T, raised_S = log_ratios(what, logp_T, old_logp_T, mask_T, seq_T, cu_S1, level)
    by_sequence = level in ("sequence", "sequence_sum") and adv_S is not None
    log_N = log_T
    if raised_S is not None and sequences is not None:
        log_N = raised_S if by_sequence else sequences.lay(raised_S)
    adv_N = _advantage(adv_T, adv_S, mask, sequences, by_sequence=by_sequence).to(log_T.dtype)
    return Terms(logp_T, mask, sequences, level, by_sequence, log_N, adv_N)


def log_ratios(
    what: str,
    logp_T: Tensor,
    old_logp_T: Tensor | None,
    mask_T: Tensor,
    seq_T: Tensor | None,
    cu_S1: Tensor | None,
    level: str,
) -> tuple[Mask, Sequences | None, Tensor, Tensor | None]:
    """The log-ratio of each token and, at levels of sequences, of each of those: 0 where untrained, held to +-20.

    ``old_logp_T`` None is the policy itself. Without gradient, if called so.
    """
    check_option("level", level, tuple(LEVELS))
    check_tokens(what, mask_T, seq_T, logp_T=logp_T, old_logp_T=old_logp_T)
    sequences = sequences_of(what, mask_T, seq_T, cu_S1)
    if sequences is None and level != "token":
        raise ValueError(f"level={level!r}: expected seq_T, the sequence of each token, or cu_S1; got None")
    mask = Mask(mask_T) if sequences is None else sequences.mask
    log_T = mask.keep_(upcast(logp_T) - upcast(logp_T if old_logp_T is None else old_logp_T))
    raised_S = None if sequences is None or level == "token" else _raised(log_T, sequences, level)
    return mask, sequences, log_T.clamp_(-BOUND, BOUND), raised_S


def trained(mask: Mask, sequences: Sequences | None) -> Tensor:
    """How many tokens are trained, 0-d: the sum over sequences, whose numbers are mostly needed anyway."""
    return mask.trained_T.sum() if sequences is None else sequences.trained_S.sum()


def _advantage(
    adv_T: Tensor | None, adv_S: Tensor | None, mask: Mask, sequences: Sequences | None, *, by_sequence: bool
) -> Tensor:
    """At each place, 0 where nothing is trained."""
    if adv_S is None:
        assert adv_T is not None
        return mask.keep(adv_T)
    assert sequences is not None
    adv_S = upcast(adv_S.detach())
    return where_over(adv_S, sequences.trained_S, 0.5) if by_sequence else mask.keep_(sequences.lay(adv_S))


def _raised(drift_T: Tensor, sequences: Sequences, level: str) -> Tensor:
    """The log-ratio of each sequence, [S]."""
    total_S = sequences.sums(drift_T)
    if LEVELS[level] == "geometric":
        total_S = total_S / sequences.length_S
    return total_S.clamp_(-BOUND, BOUND)


def known(t: Terms) -> Sequences:
    assert t.sequences is not None
    return t.sequences


def _check_advantage(
    what: str, adv_T: Tensor | None, adv_S: Tensor | None, cu_S1: Tensor | None, mask_T: Tensor
) -> None:
    if (adv_T is None) == (adv_S is None):
        raise ValueError(f"{what}: expected one of adv_T and adv_S; got {'neither' if adv_T is None else 'both'}")
    check_same(what, mask_T=mask_T, adv_T=adv_T)
    if adv_S is not None:
        if cu_S1 is None:
            raise ValueError(f"{what}: adv_S: expected with cu_S1, whose order it is in; got no cu_S1")
        check_same(f"{what}: adv_S and the sequences of cu_S1", adv_S=adv_S, cu_S1=cu_S1[1:])
