"""Which rows a step sees: a pure function of seed, step and the sizes and weights of the sources.

An epoch of a source with n rows and weight w has floor(w n + 1/2) rows: each row floor(w) times, and for the rest
distinct rows drawn anew each epoch. So all epochs have one size, and step s of b rows is rows s b : (s + 1) b of the
endless run of epochs, over their borders too.

Orders come from sorting raw 64-bit draws, not from numpy's `Generator`, whose streams may change between releases:
a run must resume in the same order after an update.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from attrs import frozen


@frozen
class Mixture:
    """Rows and weight of each source; rows are numbered through, one source after the other."""

    counts: tuple[int, ...]
    weights: tuple[float, ...]
    shuffle: bool

    def per_epoch(self) -> tuple[int, ...]:
        """Rows of each source in an epoch."""
        return tuple(math.floor(w * n + 0.5) for n, w in zip(self.counts, self.weights, strict=True))


def rows_of_step(mixture: Mixture, step: int, n: int, seed: int) -> list[int]:
    """The ``n`` rows of ``step`` (counted from 0), over all ranks."""
    size = sum(mixture.per_epoch())
    assert size > 0 and n >= 0 and step >= 0
    picked: list[int] = []
    epoch, begin = divmod(step * n, size)
    while len(picked) < n:
        picked += order(mixture, seed, epoch)[begin : begin + n - len(picked)].tolist()
        epoch, begin = epoch + 1, 0
    return picked


@lru_cache(maxsize=4)  # training crosses one border at a time; evaluation may draw in between
def order(mixture: Mixture, seed: int, epoch: int) -> np.ndarray:
    """The rows of one epoch, int64, read-only."""
    starts = np.cumsum((0, *mixture.counts[:-1]))
    parts = [
        start + _of_source(n, drawn, (seed, epoch, k))
        for k, (start, n, drawn) in enumerate(zip(starts, mixture.counts, mixture.per_epoch(), strict=True), 1)
    ]
    rows = np.concatenate(parts)
    if mixture.shuffle:
        rows = rows[permutation(len(rows), (seed, epoch))]
    rows.flags.writeable = False
    return rows


def _of_source(n: int, drawn: int, key: tuple[int, ...]) -> np.ndarray:
    """``drawn`` of ``n`` rows in order: whole passes, then a draw without repeats."""
    copies, rest = divmod(drawn, n) if n else (0, 0)
    passes = np.tile(np.arange(n, dtype=np.int64), copies)
    return np.concatenate([passes, np.sort(permutation(n, key)[:rest])]) if rest else passes


def permutation(n: int, key: tuple[int, ...]) -> np.ndarray:
    """A permutation of ``n`` rows keyed by non-negative integers, the same on every machine and numpy release.

    The low bits of each draw are replaced by its index: sorting then carries the indices along, and no two keys
    tie. At 10 million rows 40 random bits are left; they collide for about 45 pairs, which keep their order.
    """
    bits = np.uint64(max(1, n - 1).bit_length())
    draws = np.random.PCG64(np.random.SeedSequence(key)).random_raw(n)
    keys = (draws >> bits << bits) | np.arange(n, dtype=np.uint64)
    keys.sort()
    return (keys & ((np.uint64(1) << bits) - np.uint64(1))).astype(np.int64)
