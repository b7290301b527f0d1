"""What policy-gradient losses are made of: ratios and advantages, masked, at the places where they are worked out.

Shapes: T packed tokens, S sequences, N places, which are the one or the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ft.losses.aggregate import Sequences, check_tokens, sequences_of
from ft.losses.elementwise import Lay, Mask, where_over, where_within
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
    log_ratio_N: Tensor  # held to +-20, unless asked otherwise
    adv_N: Tensor

    def trained(self) -> Tensor:
        """How many tokens, 0-d. A function, as who is given ``tokens`` has no use for it."""
        return (self.mask.trained_T if self.level == "token" else known(self).trained_S).sum()

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
        if not self.by_sequence:
            return hit_N.sum()
        return torch.dot(hit_N, known(self).trained_S.to(hit_N.dtype))

    def by_log_ratio_N(self, x_N: Tensor) -> Tensor:
        """d x / d log-ratio of a multiple x of the ratio: x itself, and 0 where the bound holds the ratio."""
        return where_within(x_N, self.log_ratio_N, BOUND)

    def spread(self, slope_N: Tensor) -> Spread:
        """From a slope by the log-ratio, the slope by ``logp_T``: a sequence's goes to all of its trained tokens."""
        if self.level in ("token", "sequence_token"):
            return slope_N, None
        slope_S = slope_N if self.by_sequence else known(self).sums(slope_N)
        if LEVELS[self.level] == "geometric":
            slope_S = slope_S / known(self).length_S
        return slope_S, known(self).lay_trained


Spread = tuple[Tensor, Lay | None]
"""Slopes by ``logp_T``; or those of sequences, and what lays them at their tokens (see ``with_slope``)."""


class Term(NamedTuple):
    """What a loss raises, as each makes it, of tokens, or of sequences where ``by_sequence``: the loss is minus it.

    Both tensors are the loss's own, 0 where nothing is trained, and may be changed in place.
    """

    value_N: Tensor
    slope_N: Tensor
    spread: Callable[[Tensor], Spread]  # from slopes as given to slopes by logp_T
    by_sequence: bool = False
    times: float = 1.0  # value and slope: a factor of all costs nothing where sums are scaled anyway


class Score(NamedTuple):
    """The term weight logp, whose weight is a constant and its slope. As in ``Term``, it may be changed in place."""

    weight_N: Tensor
    by_sequence: bool = False
    times: float = 1.0


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
    lay: bool = True,
    held: bool = True,
) -> Terms:
    """Check and mask the inputs of a policy loss, and raise the log-ratio to ``level`` (see ``grpo``).

    Each input is cut off its graph here: nothing that is made of them has one, until ``with_slope``. ``lay`` False
    leaves ``adv_S`` one a sequence also where the ratio is of tokens; ``held`` False leaves log-ratios of tokens out of
    their bound, for a loss that is itself bounded where the ratio is infinite.
    """
    _check_advantage(what, adv_T, adv_S, cu_S1, mask_T)
    by_sequence = level in ("sequence", "sequence_sum") and adv_S is not None
    mask, sequences, log_T, raised_S = log_ratios(what, logp_T, old_logp_T, mask_T, seq_T, cu_S1, level)
    log_N = (hold(log_T) if held else log_T) if raised_S is None else raised_S
    if raised_S is not None and sequences is not None and not by_sequence:
        log_N = sequences.lay(raised_S)
    adv_N = _advantage(adv_T, adv_S, mask, sequences, by_sequence=by_sequence or not lay).to(log_T.dtype)
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
    """The log-ratio of each token, as it is, and that of each sequence, at levels that have one, held to +-20.

    Both are 0 where nothing is trained, and without gradient. ``old_logp_T`` None is the policy itself.
    """
    check_option("level", level, tuple(LEVELS))
    check_tokens(what, mask_T, seq_T, logp_T=logp_T, old_logp_T=old_logp_T)
    sequences = sequences_of(what, mask_T, seq_T, cu_S1)
    if sequences is None and level != "token":
        raise ValueError(f"level={level!r}: expected seq_T, the sequence of each token, or cu_S1; got None")
    mask = Mask(mask_T) if sequences is None else sequences.mask
    new_T = upcast(logp_T.detach())
    log_T = mask.keep_(new_T - (new_T if old_logp_T is None else upcast(old_logp_T.detach())))
    return mask, sequences, log_T, None if sequences is None or level == "token" else _raised(log_T, sequences, level)


def hold(log_N: Tensor) -> Tensor:
    """Within the bound, in its place."""
    return log_N.clamp_(-BOUND, BOUND)


def _advantage(
    adv_T: Tensor | None, adv_S: Tensor | None, mask: Mask, sequences: Sequences | None, *, by_sequence: bool
) -> Tensor:
    """At each place, 0 where nothing is trained."""
    if adv_S is None:
        assert adv_T is not None
        return mask.keep(adv_T)
    assert sequences is not None
    adv_S = upcast(adv_S.detach())
    return where_over(adv_S, sequences.trained_S, 0.5) if by_sequence else sequences.lay_trained(adv_S)


def _raised(drift_T: Tensor, sequences: Sequences, level: str) -> Tensor:
    """The log-ratio of each sequence, [S]."""
    total_S = sequences.sums(drift_T)
    if LEVELS[level] == "geometric":
        total_S = total_S / sequences.length_S
    return hold(total_S)


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
        if adv_S.shape != (cu_S1.shape[0] - 1,):
            check_same(f"{what}: adv_S and the sequences of cu_S1", adv_S=adv_S, cu_S1=cu_S1[1:])
