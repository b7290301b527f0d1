"""Splits and their slices: train, train[:90%], train[100:200], train[-50:]."""

from __future__ import annotations

import re

from attrs import frozen

from ft.errors import RecipeError

_SPLIT = re.compile(r"([\w.+-]+)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?")


@frozen
class Slice:
    """``start`` and ``stop`` as written; None is open. A share is rounded down, so [:90%] and [90%:] never overlap."""

    start: str | None = None
    stop: str | None = None

    @property
    def relative(self) -> bool:
        """Whether the number of rows must be known."""
        return any(end is not None and ("%" in end or "-" in end) for end in (self.start, self.stop))


def parse_split(split: str) -> tuple[str, Slice]:
    """("train", Slice("100", "200")) for train[100:200]."""
    found = _SPLIT.fullmatch(split.strip())
    ends = (found[2], found[3]) if found else ()
    if not found or any(end and end.endswith("%") and abs(int(end[:-1])) > 100 for end in ends):
        raise RecipeError(
            "not a split",
            where="split",
            expected="a name and perhaps a slice: train, train[:90%], train[100:200], train[90%:]",
            got=split,
        )
    return found[1], Slice(*ends)


def bounds(part: Slice, total: int | None, where: str) -> tuple[int, int | None]:
    """First row and the row after the last; ``total`` may be None where the slice is not relative.

    Raises:
        RecipeError: the slice selects nothing.
    """
    start, stop = _row(part.start, total, 0) or 0, _row(part.stop, total, total)
    last = stop if total is None else min(total, total if stop is None else stop)
    if last is not None and start >= last:
        have = "" if total is None else f" of {total}"
        raise RecipeError("the slice selects no rows", where=where, expected="at least one row",
                          got=f"rows {start} to {stop}{have}")  # fmt: skip
    return start, stop


def _row(end: str | None, total: int | None, default: int | None) -> int | None:
    if end is None:
        return default
    number = int(end.rstrip("%"))
    if "%" in end or number < 0:
        assert total is not None
        number = total * number // 100 if "%" in end else number
        return max(0, number + total if end.startswith("-") else number)
    return number
