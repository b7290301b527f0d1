"""Learning-rate schedules: pure functions of the optimizer step."""

from __future__ import annotations

import math

from ft.recipe import WSD, Constant, Cosine, Linear


def span(length: float, steps: int) -> int:
    """A length in steps: below 1 it is a share of the run."""
    return round(length * steps) if length < 1 else int(length)


def lr_share(schedule: Constant | Linear | Cosine | WSD, step: int, steps: int) -> float:
    """Share of the peak learning rate for optimizer step ``step`` (from 0) of ``steps``.

    Warm-up gives (step + 1) / warmup, so that the first step already learns. The floor would be reached just after
    the last step, so that no step is wasted at a rate of 0: with x = (step - start) / (steps - start), the share is
    floor + (1 - floor) * (1 - x) for Linear and WSD, and floor + (1 - floor) * (1 + cos(pi x)) / 2 for Cosine.
    """
    warmup = span(schedule.warmup, steps)
    if step < warmup:
        return (step + 1) / warmup
    if isinstance(schedule, Constant):
        return 1.0
    start = warmup if not isinstance(schedule, WSD) else max(warmup, steps - span(schedule.decay, steps))
    x = min(1.0, max(0.0, (step - start) / max(1, steps - start)))
    fall = (1 + math.cos(math.pi * x)) / 2 if isinstance(schedule, Cosine) else 1 - x
    return schedule.floor + (1 - schedule.floor) * fall
