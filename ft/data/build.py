"""All rows of a mixture, tokenised once: rows -> values -> examples -> flat arrays.

Shapes: R kept rows, N their examples (two for a pair, else one), T their tokens.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
from attrs import evolve, field, frozen

from ft.data.bad import BadRow, BadRows
from ft.data.formats import Tokens, Value, convert
from ft.data.place import fail
from ft.data.render import render, same
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
    """Examples end to end: example i is tokens_T[offsets_N1[i] : offsets_N1[i + 1]].

    Columns that no example has are None. Row r is the examples first_R1[r] : first_R1[r + 1]; where ``first_R1`` is
    None each row is one example.
    """

    tokens_T: np.ndarray  # int32
    mask_T: np.ndarray  # bool
    offsets_N1: np.ndarray  # int64
    file_N: np.ndarray  # int32, index into the places of all sources
    number_N: np.ndarray  # int64, line or row number in that file
    label_T: np.ndarray | None = None  # float32
    first_R1: np.ndarray | None = None  # int64
    label_N: np.ndarray | None = None  # float32
    margin_N: np.ndarray | None = None  # float32

    @property
    def rows(self) -> int:
        """R."""
        return len(self.number_N) if self.first_R1 is None else len(self.first_R1) - 1


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
    sizes: list[int] = field(factory=list)  # examples of each row
    judged: list[np.ndarray | None] = field(factory=list)  # labels of each example's tokens
    labels: list[float | None] = field(factory=list)
    margins: list[float | None] = field(factory=list)


_Examples = tuple[Example, ...]  # of one row
_Render = Callable[[Sequence[tuple[Value, str]]], list[_Examples]]
_Read = tuple[Row, Value]


def build(sources: Sequence[Source], data: Data, tokenizer: Any, announce: Callable[[str], None]) -> Built:
    """Read, render and fit every row of ``sources``.

    Raises:
        DataError: a bad row under on_bad_row="raise"; a row too long under overlong="raise"; a label or a margin that
            only some of the examples have.
    """
    # A file named by two sources keeps its first index; its rows have the same places either way.
    index: dict[str, int] = {}
    for i, name in enumerate(name for source in sources for name in places(source)):
        index.setdefault(name, i)
    bad, counts, parts = BadRows(data), Counter[str](), _Parts()
    kept = []
    for source in sources:
        before = len(parts.sizes)
        _add_source(source, data, tokenizer, parts, index, bad, counts, announce)
        kept.append((source.path, len(parts.sizes) - before))
    report = _report(counts, kept, bad.rows)
    return Built(arrays=_join(parts, {i: name for name, i in index.items()}), report=report, bad=tuple(bad.rows))


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
    def rendered(values: Sequence[tuple[Value, str]]) -> list[_Examples]:
        return _by_row(render(values, tokenizer, data))

    vocabulary, said = len(tokenizer), time.monotonic()
    rows = read(source)
    while chunk := list(islice(rows, CHUNK)):
        read_rows = list(_converted(chunk, source, vocabulary, bad, counts))
        fitted = list(_fitted(_rendered(read_rows, rendered, bad, counts), data, counts))
        _add(fitted, parts, index, counts, tokenizer)
        if time.monotonic() - said > _EVERY:
            said = time.monotonic()
            announce(f"{source.path}: {counts['read']:,} rows read, {counts['tokens']:,} tokens")


def _converted(
    chunk: Iterable[Row], source: Source, vocabulary: int, bad: BadRows, counts: Counter[str]
) -> Iterator[_Read]:
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


def _by_row(examples: Iterable[Example]) -> list[_Examples]:
    """Neighbours of one unit are one row."""
    rows: list[_Examples] = []
    for example in examples:
        if example.unit is not None and rows and rows[-1][0].unit == example.unit:
            rows[-1] += (example,)
        else:
            rows.append((example,))
    return rows


def _rendered(read_rows: Sequence[_Read], render: _Render, bad: BadRows, counts: Counter[str]) -> list[_Examples]:
    """Examples of each row. Where rendering fails, halves are tried, down to the rows that are wrong."""
    if not read_rows:
        return []
    try:
        rows = render([(value, row.source) for row, value in read_rows])
    except DataError as error:
        if len(read_rows) == 1:
            _put_aside(read_rows[0][0], error, bad, counts)
            return []
        if bad.data.on_bad_row == "raise":
            raise
        half = len(read_rows) // 2
        return _rendered(read_rows[:half], render, bad, counts) + _rendered(read_rows[half:], render, bad, counts)
    assert len(rows) == len(read_rows), "none is lost, none is torn"
    return rows


def _fitted(rows: Iterable[_Examples], data: Data, counts: Counter[str]) -> Iterator[_Examples]:
    """Rows no longer than max_tokens with something to train; all others are counted.

    A pair stays or goes as one. What is cut is the end of each answer: both begin with the same prompt, which is
    either kept whole in both, or so long that no answer is left and the pair goes. A pair whose answers differ only
    in what is cut off goes too, as too long.
    """
    for row in rows:
        cut = max(map(len, row)) > data.max_tokens
        if cut and data.overlong == "raise":
            raise _overlong(row, data.max_tokens)
        if cut and data.overlong == "drop":
            counts["overlong"] += 1
            continue
        row = tuple(_cut(example, data.max_tokens) for example in row) if cut else row
        if min(map(len, row)) < 2:
            counts["short"] += 1
        elif not all(example.mask_L[1:].any() for example in row):
            counts["unlabelled"] += 1
        elif cut and len(row) == 2 and same(*row):
            counts["overlong"] += 1
        else:
            counts["truncated"] += cut
            yield row


def _cut(example: Example, tokens: int) -> Example:
    if len(example) <= tokens:
        return example
    label_L = None if example.label_L is None else example.label_L[:tokens]
    return evolve(example, tokens_L=example.tokens_L[:tokens], mask_L=example.mask_L[:tokens], label_L=label_L)


def _overlong(row: _Examples, tokens: int) -> DataError:
    return DataError(
        "a row is longer than data.max_tokens",
        where=row[0].source,
        expected=f"at most {tokens:,} tokens",
        got=" and ".join(f"{len(example):,}" for example in row) + " tokens",
        fix="raise data.max_tokens, or set data.overlong to drop or truncate",
    )


def _add(rows: Sequence[_Examples], parts: _Parts, index: dict[str, int], counts: Counter[str], tokenizer: Any) -> None:
    if not rows:
        return
    examples = [example for row in rows for example in row]
    for example in examples:
        assert example.group is None and example.adv_L is None, "only what Arrays holds may be kept"
        name = example.source.rstrip("0123456789")
        parts.files.append(index[name])
        parts.numbers.append(int(example.source[len(name) :]))
        parts.judged.append(example.label_L)
        parts.labels.append(example.label)
        parts.margins.append(example.margin)
    sizes = [len(row) for row in rows]
    parts.sizes.extend(sizes)
    tokens_T = np.concatenate([example.tokens_L for example in examples]).astype(np.int32, copy=False)
    mask_T = np.concatenate([example.mask_L for example in examples]).astype(bool, copy=False)
    lengths_N = np.fromiter(map(len, examples), np.int64, len(examples))
    starts_N = np.cumsum(lengths_N) - lengths_N
    mask_T[starts_N] = False  # nothing predicts a first token
    parts.tokens.append(tokens_T)
    parts.masks.append(mask_T)
    parts.lengths.append(lengths_N)
    _count(tokens_T, mask_T, starts_N, lengths_N, np.cumsum(sizes) - sizes, tokenizer, counts)


def _count(
    tokens_T: np.ndarray,
    mask_T: np.ndarray,
    starts_N: np.ndarray,
    lengths_N: np.ndarray,
    first_R: np.ndarray,
    tokenizer: Any,
    counts: Counter[str],
) -> None:
    """Counts of a chunk. A row of two examples has BOS, or EOS, if both have it."""

    def rows_with(has_N: np.ndarray) -> int:
        return int(np.logical_and.reduceat(has_N, first_R).sum())

    counts["tokens"] += len(tokens_T)
    counts["trained"] += int(mask_T.sum())
    counts["longest"] = max(counts["longest"], int(lengths_N.max()))
    for k, n in zip(*np.unique(np.ceil(np.log2(lengths_N)).astype(int), return_counts=True), strict=True):
        counts[f"length {k}"] += int(n)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    counts["has bos"], counts["has eos"] = int(bos is not None), int(eos is not None)
    if bos is not None:
        counts["bos"] += rows_with(tokens_T[starts_N] == bos)
    if eos is not None:
        ends_T = tokens_T == eos
        counts["eos"] += rows_with(np.logical_or.reduceat(ends_T, starts_N))
        counts["eos trained"] += rows_with(np.logical_or.reduceat(ends_T & mask_T, starts_N))


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


def _join(parts: _Parts, places: Mapping[int, str]) -> Arrays:
    lengths_N = np.concatenate([np.zeros(0, np.int64), *parts.lengths])
    return Arrays(
        tokens_T=np.concatenate([np.zeros(0, np.int32), *parts.tokens]),
        mask_T=np.concatenate([np.zeros(0, bool), *parts.masks]),
        offsets_N1=np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths_N)]),
        file_N=np.asarray(parts.files, dtype=np.int32),
        number_N=np.asarray(parts.numbers, dtype=np.int64),
        label_T=_judged(parts, places),
        first_R1=np.cumsum([0, *parts.sizes], dtype=np.int64) if max(parts.sizes, default=1) > 1 else None,
        label_N=_column("label", parts.labels, parts, places),
        margin_N=_column("margin", parts.margins, parts, places),
    )


def _column(name: str, values_N: list[float | None], parts: _Parts, places: Mapping[int, str]) -> np.ndarray | None:
    """None where no example has this number. Raises as ``_all`` does."""
    there = _all(name, [value is not None for value in values_N], parts, places)
    return np.array(values_N, np.float32) if there else None


def _judged(parts: _Parts, places: Mapping[int, str]) -> np.ndarray | None:
    """Labels of tokens end to end; None where no example has any. Raises as ``_all`` does."""
    there = _all("labels", [labels is not None for labels in parts.judged], parts, places)
    return np.concatenate([labels for labels in parts.judged if labels is not None]) if there else None


def _all(name: str, there_N: list[bool], parts: _Parts, places: Mapping[int, str]) -> bool:
    """Whether the examples have this column.

    Raises:
        DataError: only some have it: no method can train the others.
    """
    lacking = there_N.count(False)
    if 0 < lacking < len(there_N):
        i = there_N.index(False)
        raise DataError(
            f"a row without a {name.rstrip('s')}, where others have one",
            where=f"{places[parts.files[i]]}{parts.numbers[i]}",
            expected=f"a {name.rstrip('s')} in every row of a run, or in none",
            got=f"none in {lacking:,} of {len(there_N):,} examples",
            fix=f"fill it in, rename the column away (Source.columns={{'{name}': 'unused'}}), or name the format of "
            "these rows in Source.format",
        )
    return any(there_N)
