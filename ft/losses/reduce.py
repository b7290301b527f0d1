"""What every loss shares: sums in float32, and shares of a mean whose denominator the caller knows.

A step is split over micro-batches and ranks. Each part returns ``its own sum / the step's count``, so that adding the
parts gives the step's mean, however it was split. Shapes: N any one dimension (T tokens, S sequences, P pairs).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Count = Tensor | float | int
"""A denominator: a number, or a 0-d tensor that stays on its device."""


def upcast(x_N: Tensor) -> Tensor:
    """float32, whatever the type; float64 stays float64, so that gradients can be checked numerically."""
    return x_N if x_N.dtype in (torch.float32, torch.float64) else x_N.float()


def keep(x_N: Tensor, mask_N: Tensor) -> Tensor:
    """``x_N`` upcast, and 0 with a gradient of 0 where ``mask_N`` is False, whatever stands there (NaN included).

    Mask before any exp or division: afterwards the gradient of a masked NaN would still be NaN.
    """
    return torch.where(mask_N, upcast(x_N), 0.0)


def masked_sum(x_N: Tensor, mask_N: Tensor) -> Tensor:
    """The sum where ``mask_N`` is True, a 0-d tensor; 0 with a graph where nothing is."""
    return keep(x_N, mask_N).sum()


def share(total: Tensor, count: Count) -> Tensor:
    """``total / max(count, 1)`` in the type of ``total``: this part's share of a mean over ``count`` items.

    ``count`` counts items; an empty step gives 0 / 1 and never 0 / 0. It carries no gradient. A Python number is used
    as it is, which copies nothing to the device.
    """
    return total / at_least_one(count, total.dtype)


def at_least_one(count: Count, dtype: torch.dtype) -> Count:
    """What ``share`` divides by, for those who divide by it more than once."""
    return count.detach().clamp(min=1).to(dtype) if isinstance(count, Tensor) else max(count, 1)


def mean_share(x_N: Tensor, count: Count | None = None) -> Tensor:
    """``share`` of the sum of ``x_N``, over its own length by default."""
    return share(upcast(x_N).sum(), x_N.numel() if count is None else count)


def segment_sum(x_T: Tensor, seq_T: Tensor, sequences: int) -> Tensor:
    """Sums per sequence, [S]. ``seq_T`` holds 0 .. S-1; S itself marks filler that belongs to no sequence."""
    x_T = upcast(x_T)
    return x_T.new_zeros(sequences + 1).index_add(0, seq_T, x_T)[:sequences]


def detached(sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Numbers to log: no graph, still on the device."""
    return {name: value.detach() if value.requires_grad else value for name, value in sums.items()}


def mean_shares(rows: Mapping[str, Tensor], count: Count) -> dict[str, Tensor]:
    """``mean_share`` of each, [P] and to be logged, in one go: on short tensors a call costs more than its sum."""
    means = share(torch.stack([upcast(x_P) for x_P in rows.values()]).detach().sum(1), count)
    return dict(zip(rows, means.unbind(), strict=True))


def pair_sums(chosen_P: Tensor, rejected_P: Tensor, count: Count, **more: Tensor) -> dict[str, Tensor]:
    """Shares of the rewards of pairs: their means, the margin, and how often the chosen one is strictly the higher.

    ``more``: other numbers of pairs to average, by name.
    """
    rows = {"rewards/chosen": chosen_P, "rewards/rejected": rejected_P}
    sums = mean_shares(rows | {"rewards/accuracies": chosen_P > rejected_P} | more, count)
    return sums | {"rewards/margins": sums["rewards/chosen"] - sums["rewards/rejected"]}


def check_same(what: str, /, **tensors: Tensor | None) -> None:
    """Refuse tensors that are not of one 1-D shape: broadcasting would give a number, and a wrong one."""
    shapes = {t.shape for t in tensors.values() if t is not None}
    if len(shapes) > 1 or any(len(shape) != 1 for shape in shapes):
        got = {name: tuple(t.shape) for name, t in tensors.items() if t is not None}
        raise ValueError(f"{what}: expected 1-D tensors of one length, got {got}")


def check_option(what: str, value: object, allowed: tuple[str, ...]) -> None:
    """Refuse a name that is none of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{what}: expected one of {', '.join(allowed)}; got {value!r}")


def check_number(what: str, value: float, low: float, high: float = float("inf"), *, open_low: bool = False) -> None:
    """Refuse a number outside ``low .. high`` (ends included, but not ``low`` where ``open_low``), and NaN."""
    if not low <= value <= high or (open_low and value == low):
        raise ValueError(f"{what}: expected a number in {'(' if open_low else '['}{low:g}, {high:g}], got {value}")
