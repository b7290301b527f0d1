"""What becomes of malformed rows: raised, skipped or put aside, and never more of them than the recipe allows."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ft.data.files import free_name
from ft.data.rows import Row
from ft.errors import DataError
from ft.recipe.parts import Data

_HOPELESS = 100  # this many bad rows and not one good one: the whole is wrong, not some rows


class BadRow(NamedTuple):
    """One row put aside."""

    source: str
    reason: str
    row: Any


class BadRows:
    """The bad rows of one build; ``take`` raises where the recipe says so."""

    def __init__(self, data: Data):
        self.data = data
        self.rows: list[BadRow] = []

    def take(self, row: Row, error: DataError, good: int) -> None:
        """Put ``row`` aside, or raise ``error``; ``good`` rows have been read so far."""
        if self.data.on_bad_row == "raise":
            raise error
        keep = row.value if self.data.on_bad_row == "quarantine" else None
        self.rows.append(BadRow(row.source, error.message, keep))
        if good == 0 and len(self.rows) >= _HOPELESS:
            check_share(len(self.rows), len(self.rows), self.data.bad_rows, (self.rows[0].reason,))


def check_share(bad: int, read: int, limit: float, reasons: Iterable[str]) -> None:
    """Stop where more than ``limit`` of the rows are bad.

    Raises:
        DataError: names the counts and the first reasons.
    """
    if bad <= limit * read:
        return
    first = "\n  ".join(line for reason in reasons for line in reason.splitlines())
    raise DataError(
        "too many malformed rows",
        where="data.bad_rows",
        expected=f"at most {limit:.2%} of the rows",
        got=f"{bad:,} of {read:,} rows ({bad / read:.2%}); the first:\n  {first}",
        fix="mend the rows, or raise data.bad_rows",
    )


def to_json(rows: Iterable[BadRow]) -> bytes:
    """One line for each row: {"source", "reason", "row"}; values that JSON lacks are written as text."""
    return "".join(json.dumps(row._asdict(), default=str) + "\n" for row in rows).encode()


def write(path: Path, content: bytes) -> None:
    """The quarantine file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = free_name(path)
    temporary.write_bytes(content)
    temporary.replace(path)
