"""Entropy of the policy: a bonus for it, and the choice of the tokens where the policy is undecided.

Shapes: T packed tokens. ``entropy_T`` is the entropy of the whole next-token distribution, in nats.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ft.losses.aggregate import check_tokens
from ft.losses.reduce import Count, check_number, masked_sum, share, upcast
from ft.types import LossOutput


def bonus(entropy_T: Tensor, mask_T: Tensor, *, coef: float, tokens: Count | None = None) -> LossOutput:
    """-coef * sum of entropy_T over trained tokens / tokens: to be added to a policy loss, whichever its own average.

    Differentiated: ``entropy_T``. An entropy without a graph would do nothing and is refused (unless gradients are off
    altogether). ``mask_T`` may be the result of ``top``. ``tokens`` defaults to the number it marks. With nothing
    marked the loss is 0 with a gradient of zeros. ``sums``: ``entropy``, the mean.
    """
    check_tokens("entropy bonus", mask_T, None, entropy_T=entropy_T)
    if coef and torch.is_grad_enabled() and not entropy_T.requires_grad:
        raise ValueError(
            "entropy bonus: expected entropy_T with a gradient; got one without, which would train nothing"
        )
    entropy = share(masked_sum(entropy_T, mask_T), mask_T.sum() if tokens is None else tokens)
    return LossOutput(loss=-coef * entropy, sums={"entropy": entropy.detach()})


@torch.no_grad()
def threshold(entropy_T: Tensor, mask_T: Tensor, *, fraction: float) -> Tensor:
    """The entropy that ``fraction`` of the trained tokens reach, 0-d: their (1 - fraction) quantile, interpolated.

    +inf where nothing is trained. No host sync: the values are sorted, and read at places that stay on the device.
    """
    check_number("fraction", fraction, 0, 1)
    check_tokens("entropy threshold", mask_T, None, entropy_T=entropy_T)
    value_T = torch.where(mask_T, upcast(entropy_T), torch.inf).sort().values  # trained ones first
    value_T = torch.cat([value_T, value_T.new_full((1,), torch.inf)])
    last = mask_T.sum() - 1
    place = (last.double() * (1 - fraction)).clamp(min=0)
    below = place.floor().long()
    above = torch.minimum(below + 1, last.clamp(min=0))
    low, high = value_T.index_select(
        0, torch.stack([below, above])
    ).unbind()  # value_T[below] would wait for the device
    return torch.where(low.isinf(), low, torch.lerp(low, high, (place - below).to(low.dtype)))


@torch.no_grad()
def top(entropy_T: Tensor, mask_T: Tensor, *, fraction: float | None = None, at_least: Tensor | None = None) -> Tensor:
    """True at trained tokens of high entropy, [T] bool: the ``keep_T`` of a policy loss.

    Give one of: ``fraction``, to keep that share of this call's tokens (and ties); or ``at_least``, the ``threshold``
    found over a whole step, so that splitting the step changes nothing. With nothing trained all is False. The
    80/20 rule, arXiv:2506.01939 (fraction 0.2).
    """
    check_tokens("top entropy", mask_T, None, entropy_T=entropy_T)
    if (fraction is None) == (at_least is None):
        raise ValueError(f"top entropy: expected one of fraction and at_least; got {fraction} and {at_least}")
    if fraction is not None:
        at_least = threshold(entropy_T, mask_T, fraction=fraction)
    assert at_least is not None
    return (upcast(entropy_T) >= at_least) & mask_T
