"""Prepared rows: tokenised once, kept as flat arrays, drawn by step.

A row is one example, or the two of a pair, which share a unit and are drawn together.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from attrs import evolve, frozen

from ft.data import bad, cache, hub
from ft.data.build import Arrays, Built, build
from ft.data.mixture import Mixture, rows_of_step
from ft.data.report import Report
from ft.data.rows import places
from ft.errors import DataError, RecipeError
from ft.recipe.parts import Data, Source
from ft.types import Example


@frozen(kw_only=True, eq=False)
class Prepared:
    """Examples by index, and the examples of a step; implements ``ft.types.Dataset``."""

    arrays: Arrays
    places: tuple[str, ...]
    mixture: Mixture
    report: Report
    fingerprint: str

    def __len__(self) -> int:
        """Examples; ``rows`` counts distinct rows, ``per_epoch`` says how many an epoch has."""
        return len(self.arrays.number_N)

    @property
    def rows(self) -> int:
        """Distinct rows: as many as there are examples, but for pairs."""
        return self.arrays.rows

    @property
    def per_epoch(self) -> int:
        """Rows of an epoch, after weights."""
        return sum(self.mixture.per_epoch())

    def __getitem__(self, index: int) -> Example:
        """Example ``index``; its unit, if it is one of a pair, is the number of its row."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        i, first_R1 = index % len(self), self.arrays.first_R1
        if first_R1 is None:
            return self._example(i)
        row = int(np.searchsorted(first_R1, i, side="right")) - 1
        return self._example(i, row if first_R1[row + 1] - first_R1[row] > 1 else None)

    def __iter__(self) -> Iterator[Example]:
        return map(self.__getitem__, range(len(self)))

    def row(self, index: int, *, unit: int | None = None) -> list[Example]:
        """The examples of row ``index``; those of a pair get the unit ``unit``, by default the row's number."""
        if not -self.rows <= index < self.rows:
            raise IndexError(f"row {index} of {self.rows}")
        r, first_R1 = index % self.rows, self.arrays.first_R1
        if first_R1 is None:
            return [self._example(r)]
        span = range(int(first_R1[r]), int(first_R1[r + 1]))
        shared = None if len(span) == 1 else r if unit is None else unit
        return [self._example(i, shared) for i in span]

    def draw(self, step: int, n: int, seed: int) -> list[Example]:
        """The examples of the ``n`` rows of ``step`` (from 0) over all ranks: a function of its arguments alone.

        n pairs are 2 n examples, the two of a pair side by side; each pair has its own unit, also where a row is
        drawn twice.
        """
        rows = rows_of_step(self.mixture, step, n, seed)
        if self.arrays.first_R1 is None:
            return [self._example(i) for i in rows]
        return [example for unit, row in enumerate(rows) for example in self.row(row, unit=unit)]

    def _example(self, i: int, unit: int | None = None) -> Example:
        a = self.arrays
        span = slice(int(a.offsets_N1[i]), int(a.offsets_N1[i + 1]))
        return Example(
            tokens_L=a.tokens_T[span],
            mask_L=a.mask_T[span],
            source=f"{self.places[a.file_N[i]]}{a.number_N[i]}",
            unit=unit,
            label_L=None if a.label_T is None else a.label_T[span],
            label=None if a.label_N is None else float(a.label_N[i]),
            margin=None if a.margin_N is None else float(a.margin_N[i]),
        )


def prepare(
    sources: Sequence[Source],
    data: Data,
    tokenizer: Any,
    *,
    quarantine: Path | None = None,
    announce: Callable[[str], None] = print,
) -> Prepared:
    """Tokenise ``sources``, or find them tokenised in `Data.cache`.

    Args:
        quarantine: a .jsonl file for malformed rows, where on_bad_row is "quarantine"; each line has its place,
            the reason and the row.
        announce: told of waiting, rebuilding and what is put aside.

    Raises:
        DataError: a malformed row, too many of them, or no row left to train on.
        MissingFileError: a file is missing.
        RecipeError: a split or a weight selects nothing; quarantine without a place for it.
    """
    if not sources:
        raise RecipeError("no source of rows", where="data", expected="at least one path", got="none")
    if data.on_bad_row == "quarantine" and quarantine is None:
        raise RecipeError("nowhere to put malformed rows", where="data.on_bad_row", expected="raise or skip here",
                          got="quarantine")  # fmt: skip
    sources = [hub.pinned(source, announce) for source in sources]
    key = cache.key(sources, data, tokenizer)
    built = cache.get(data.cache, key, lambda: _built(sources, data, tokenizer, announce), announce)
    _check(built, data)
    mixture = _mixture(sources, built.report, data)
    _say_bad(built, quarantine if data.on_bad_row == "quarantine" else None, announce)
    order = json.dumps([key, mixture.weights, mixture.shuffle])
    return Prepared(
        arrays=built.arrays,
        places=tuple(place for source in sources for place in places(source)),
        mixture=mixture,
        report=evolve(built.report, sources=_counts(sources, built.report)),
        fingerprint=hashlib.sha256(order.encode()).hexdigest(),
    )


def _built(sources: Sequence[Source], data: Data, tokenizer: Any, announce: Callable[[str], None]) -> Built:
    built = build(sources, data, tokenizer, announce)
    _check(built, data)  # before anything is kept: rows that may not be used need no place on disk
    return built


def _check(built: Built, data: Data) -> None:
    report = built.report
    bad.check_share(report.bad, report.read, data.bad_rows, report.reasons)
    empty = [name for name, n in report.sources if n == 0]
    if empty:
        raise DataError(
            "no row is left to train on",
            where=", ".join(empty),
            expected="at least one row",
            got="; ".join(report.lines()[:1]),
            fix=f"see the counts: data.max_tokens ({data.max_tokens}) may be too small, or data.mask wrong",
        )


def _counts(sources: Sequence[Source], report: Report) -> tuple[tuple[str, int], ...]:
    """Kept rows by source, under the names of today: an entry may be older than the files' names."""
    return tuple((source.path, n) for source, (_, n) in zip(sources, report.sources, strict=True))


def _mixture(sources: Sequence[Source], report: Report, data: Data) -> Mixture:
    counts = tuple(n for _, n in report.sources)
    mixture = Mixture(counts, tuple(source.weight for source in sources), data.shuffle)
    for source, rows in zip(sources, mixture.per_epoch(), strict=True):
        if rows == 0:
            raise RecipeError("the weight leaves no row of this source", where=f"weight of {source.path}",
                              expected="at least one row an epoch", got=str(source.weight))  # fmt: skip
    return mixture


def _say_bad(built: Built, quarantine: Path | None, announce: Callable[[str], None]) -> None:
    if not built.bad:
        return
    put = f"put aside in {quarantine}" if quarantine is not None else "skipped"
    announce(f"{len(built.bad):,} of {built.report.read:,} rows are malformed and were {put}; the first: "
             f"{built.bad[0].reason}")  # fmt: skip
    if quarantine is not None:
        bad.write(quarantine, bad.to_json(built.bad))
