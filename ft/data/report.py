"""What became of the rows: counts that add up, and the lines that say them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
from attrs import field, frozen


def _pairs(value: Any) -> tuple[tuple[str, int], ...]:
    return tuple((str(name), int(n)) for name, n in value)


@frozen(kw_only=True)
class Report:
    """Rows read are kept + bad + overlong + unlabelled + short. Counts of tokens are of kept rows."""

    read: int = 0
    kept: int = 0
    bad: int = 0
    """Malformed, and skipped or put aside."""
    overlong: int = 0
    """Dropped for being longer than max_tokens."""
    truncated: int = 0
    """Cut to max_tokens, and kept."""
    unlabelled: int = 0
    """Dropped because no token of theirs is trained (after the cut, say)."""
    short: int = 0
    """Dropped for having fewer than two tokens: nothing to predict."""
    tokens: int = 0
    trained: int = 0
    bos: int | None = None
    """Rows that begin with the beginning-of-sequence token; None where the tokenizer has none."""
    eos: int | None = None
    """Rows that hold the end-of-sequence token; None where the tokenizer has none."""
    eos_trained: int | None = None
    """Rows where at least one of them is trained."""
    longest: int = 0
    lengths: tuple[int, ...] = field(default=(), converter=tuple)
    """lengths[k] kept rows have more than 2^(k-1) and at most 2^k tokens."""
    sources: tuple[tuple[str, int], ...] = field(default=(), converter=_pairs)
    """Kept rows of each source."""
    reasons: tuple[str, ...] = field(default=(), converter=tuple)
    """What was wrong with the first bad rows."""

    def lines(self) -> list[str]:
        """The report for a terminal."""
        rows = [f"rows: {self.read:,} read, {self.kept:,} kept" + _listed(self._losses())]
        # of prompts no token is to be trained, and rows of answers without one are dropped
        trained = f", {self.trained:,} of them trained ({self.trained / self.tokens:.1%})" if self.trained else ""
        tokens = [f"tokens: {self.tokens:,}{trained}"]
        return rows + self._by_source() + tokens + self._ends() + self._histogram() + self._first_reasons()

    def _losses(self) -> list[str]:
        said = {
            "malformed": self.bad,
            "too long, dropped": self.overlong,
            "too long, cut": self.truncated,
            "without a trained token, dropped": self.unlabelled,
            "shorter than two tokens, dropped": self.short,
        }
        return [f"{n:,} {what}" for what, n in said.items() if n]

    def _by_source(self) -> list[str]:
        return [f"  {name}: {n:,} rows" for name, n in self.sources] if len(self.sources) > 1 else []

    def _ends(self) -> list[str]:
        lines = []
        if self.bos is not None:
            lines.append(f"rows beginning with BOS: {self.bos:,}")
        if self.eos is not None:
            lines.append(f"rows with EOS: {self.eos:,}, trained in {self.eos_trained:,}")
        return lines

    def _histogram(self) -> list[str]:
        most = max(self.lengths, default=0)
        bars = [
            f"  <= {2**k:>7,} tokens  {n:>9,}  {'#' * round(30 * n / most)}" for k, n in enumerate(self.lengths) if n
        ]
        return [f"lengths (longest {self.longest:,}):", *bars] if bars else []

    def _first_reasons(self) -> list[str]:
        return [f"malformed: {line}" for reason in self.reasons for line in reason.splitlines()[:1]]


def _listed(parts: list[str]) -> str:
    return "; " + "; ".join(parts) if parts else ""


def to_json(report: Report) -> dict[str, Any]:
    """Plain values for a manifest."""
    return attrs.asdict(report)


def from_json(value: Mapping[str, Any]) -> Report:
    """The inverse of ``to_json``; a field that is missing or unknown raises TypeError."""
    return Report(**value)
