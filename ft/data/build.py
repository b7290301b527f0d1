"""All rows of a mixture, tokenised once: rows -> values -> examples -> flat arrays. N kept rows, T their tokens."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
from attrs import evolve, field, frozen

from ft.data.bad import BadRow, BadRows
from ft.data.formats import Tokens, Value, convert
from ft.data.place import fail
from ft.data.render import render
from ft.data.report import Report
from ft.data.rows import Row, places, read
from ft.errors import DataError
from ft.recipe.parts import Data, Source
from ft.types import Example

CHUNK = 1000
_REASONS = 3
_EVERY = 10.0  # seconds between progress lines


@frozen(kw_only=True, eq=False)
class Arrays:
    """Kept rows end to end: row i is tokens_T[offsets_N1[i] : offsets_N1[i + 1]]."""

    tokens_T: np.ndarray  # int32
    mask_T: np.ndarray  # bool
    offsets_N1: np.ndarray  # int64
    file_N: np.ndarray  # int32, index into the places of all sources
    number_N: np.ndarray  # int64, line or row number in that file


@frozen(kw_only=True, eq=False)
class Built:
    """What a build makes, and a cache entry holds."""

    arrays: Arrays
    report: Report
    bad: tuple[BadRow, ...] = ()


@frozen(kw_only=True, eq=False)
class _Parts:
    """Arrays of chunks, before they are joined."""

    tokens: list[np.ndarray] = field(factory=list)
    masks: list[np.ndarray] = field(factory=list)
    lengths: list[np.ndarray] = field(factory=list)
    files: list[int] = field(factory=list)
    numbers: list[int] = field(factory=list)


_Render = Callable[[Sequence[tuple[Value, str]]], list[Example]]
_Pair = tuple[Row, Value]


def build(sources: Sequence[Source], data: Data, tokenizer: Any, announce: Callable[[str], None]) -> Built:
    """Read, render and fit every row of ``sources``.

    Raises:
        DataError: a bad row under on_bad_row="raise"; a row too long under overlong="raise"; nothing left.
    """
    # A file named by two sources keeps its first index; its rows have the same places either way.
    index: dict[str, int] = {}
    for i, name in enumerate(name for source in sources for name in places(source)):
        index.setdefault(name, i)
    bad, counts, parts = BadRows(data), Counter[str](), _Parts()
    kept = []
    for source in sources:
        before = len(parts.files)
        _add_source(source, data, tokenizer, parts, index, bad, counts, announce)
        kept.append((source.path, len(parts.files) - before))
    report = _report(counts, kept, bad.rows)
    return Built(arrays=_join(parts), report=report, bad=tuple(bad.rows))


def _add_source(
    source: Source,
    data: Data,
    tokenizer: Any,
    parts: _Parts,
    index: dict[str, int],
    bad: BadRows,
    counts: Counter[str],
    announce: Callable[[str], None],
) -> None:
    def rendered(pairs: Sequence[tuple[Value, str]]) -> list[Example]:
        return render(pairs, tokenizer, data)

    vocabulary, said = len(tokenizer), time.monotonic()
    rows = read(source)
    while chunk := list(islice(rows, CHUNK)):
        pairs = list(_converted(chunk, source, vocabulary, bad, counts))
        fitted = list(_fitted(_rendered(pairs, rendered, bad, counts), data, counts))
        _add(fitted, parts, index, counts, tokenizer)
        if time.monotonic() - said > _EVERY:
            said = time.monotonic()
            announce(f"{source.path}: {counts['read']:,} rows read, {counts['tokens']:,} tokens")


def _converted(
    chunk: Iterable[Row], source: Source, vocabulary: int, bad: BadRows, counts: Counter[str]
) -> Iterator[_Pair]:
    for row in chunk:
        counts["read"] += 1
        try:
            if row.error is not None:
                raise row.error
            value = convert(row.value, source=row.source, format=source.format, columns=source.columns)
            if isinstance(value, Tokens):
                _check_vocabulary(value, vocabulary, row.source)
        except DataError as error:
            _put_aside(row, error, bad, counts)
            continue
        yield row, value


def _check_vocabulary(value: Tokens, vocabulary: int, source: str) -> None:
    if (largest := int(value.input_ids.max())) >= vocabulary:
        raise fail(source, "a token that the tokenizer does not have", path="input_ids",
                   expected=f"ids below {vocabulary}", got=str(largest))  # fmt: skip


def _put_aside(row: Row, error: DataError, bad: BadRows, counts: Counter[str]) -> None:
    counts["bad"] += 1
    bad.take(row, error, counts["read"] - counts["bad"])


def _rendered(pairs: Sequence[_Pair], render: _Render, bad: BadRows, counts: Counter[str]) -> list[Example]:
    """Examples of ``pairs``. Where rendering fails, halves are tried, down to the rows that are wrong."""
    if not pairs:
        return []
    try:
        examples = render([(value, row.source) for row, value in pairs])
    except DataError as error:
        if len(pairs) == 1:
            _put_aside(pairs[0][0], error, bad, counts)
            return []
        if bad.data.on_bad_row == "raise":
            raise
        half = len(pairs) // 2
        return _rendered(pairs[:half], render, bad, counts) + _rendered(pairs[half:], render, bad, counts)
    assert len(examples) == len(pairs), "one example for each row"
    return examples


def _fitted(examples: Iterable[Example], data: Data, counts: Counter[str]) -> Iterator[Example]:
    """Examples no longer than max_tokens with something to train; all others are counted."""
    for example in examples:
        cut = len(example) > data.max_tokens
        if cut and data.overlong == "raise":
            raise DataError(
                "a row is longer than data.max_tokens",
                where=example.source,
                expected=f"at most {data.max_tokens:,} tokens",
                got=f"{len(example):,} tokens",
                fix="raise data.max_tokens, or set data.overlong to drop or truncate",
            )
        if cut and data.overlong == "drop":
            counts["overlong"] += 1
            continue
        mask_L = example.mask_L[: data.max_tokens]
        if len(mask_L) < 2 or not mask_L[1:].any():
            counts["short" if len(mask_L) < 2 else "unlabelled"] += 1
            continue
        counts["truncated"] += cut
        yield evolve(example, tokens_L=example.tokens_L[: data.max_tokens], mask_L=mask_L) if cut else example


def _add(
    examples: Sequence[Example], parts: _Parts, index: dict[str, int], counts: Counter[str], tokenizer: Any
) -> None:
    if not examples:
        return
    for example in examples:
        assert example.unit is None and example.group is None, "only what Arrays holds may be kept"
        name = example.source.rstrip("0123456789")
        parts.files.append(index[name])
        parts.numbers.append(int(example.source[len(name) :]))
    tokens_T = np.concatenate([example.tokens_L for example in examples]).astype(np.int32, copy=False)
    mask_T = np.concatenate([example.mask_L for example in examples]).astype(bool, copy=False)
    lengths_N = np.fromiter(map(len, examples), np.int64, len(examples))
    starts_N = np.cumsum(lengths_N) - lengths_N
    mask_T[starts_N] = False  # nothing predicts a first token
    parts.tokens.append(tokens_T)
    parts.masks.append(mask_T)
    parts.lengths.append(lengths_N)
    _count(tokens_T, mask_T, starts_N, lengths_N, tokenizer, counts)


def _count(
    tokens_T: np.ndarray,
    mask_T: np.ndarray,
    starts_N: np.ndarray,
    lengths_N: np.ndarray,
    tokenizer: Any,
    counts: Counter[str],
) -> None:
    counts["tokens"] += len(tokens_T)
    counts["trained"] += int(mask_T.sum())
    counts["longest"] = max(counts["longest"], int(lengths_N.max()))
    for k, n in zip(*np.unique(np.ceil(np.log2(lengths_N)).astype(int), return_counts=True), strict=True):
        counts[f"length {k}"] += int(n)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    counts["has bos"], counts["has eos"] = int(bos is not None), int(eos is not None)
    if bos is not None:
        counts["bos"] += int((tokens_T[starts_N] == bos).sum())
    if eos is not None:
        ends_T = tokens_T == eos
        counts["eos"] += int(np.logical_or.reduceat(ends_T, starts_N).sum())
        counts["eos trained"] += int(np.logical_or.reduceat(ends_T & mask_T, starts_N).sum())


def _report(counts: Counter[str], kept: Sequence[tuple[str, int]], bad: Sequence[BadRow]) -> Report:
    plain = ("read", "bad", "overlong", "truncated", "unlabelled", "short", "tokens", "trained", "longest")
    bins = [int(name.split()[1]) for name in counts if name.startswith("length ")]
    return Report(
        **{name: counts[name] for name in plain},
        kept=sum(n for _, n in kept),
        bos=counts["bos"] if counts["has bos"] else None,
        eos=counts["eos"] if counts["has eos"] else None,
        eos_trained=counts["eos trained"] if counts["has eos"] else None,
        lengths=[counts[f"length {k}"] for k in range(max(bins, default=-1) + 1)],
        sources=kept,
        reasons=[row.reason for row in bad[:_REASONS]],
    )


def _join(parts: _Parts) -> Arrays:
    lengths_N = np.concatenate([np.zeros(0, np.int64), *parts.lengths])
    return Arrays(
        tokens_T=np.concatenate([np.zeros(0, np.int32), *parts.tokens]),
        mask_T=np.concatenate([np.zeros(0, bool), *parts.masks]),
        offsets_N1=np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths_N)]),
        file_N=np.asarray(parts.files, dtype=np.int32),
        number_N=np.asarray(parts.numbers, dtype=np.int64),
    )
