"""Rows of files and hub datasets, one after the other, each with its place: "file.jsonl:17", "file.parquet:row 12".

A line that cannot be read is a Row too, with ``error`` set, so that the policy for bad rows sees it. What spoils a
whole file (a damaged archive, an unclosed quote, a broken array) raises at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ft.data import files, hub, jsons, tables
from ft.data.split import Slice, bounds, parse_split
from ft.errors import DataError, RecipeError
from ft.recipe.parts import Source


class Row(NamedTuple):
    """One row: what stands there (the text, if it could not be read), where, and what is wrong with it."""

    value: Any
    source: str
    error: DataError | None = None


# A place, and what is there: a line is still bytes, so that slicing and counting cost no decoding.
_Record = tuple[str, Any]


def read(source: Source) -> Iterator[Row]:
    """The rows of ``source``, lazily, in the order of its files.

    Raises:
        MissingFileError, DataError: a file is missing, empty or damaged.
        RecipeError: the split is malformed, or selects nothing.
    """
    name, part = parse_split(source.split)
    if hub.is_hub(source):
        return (Row(value, place) for place, value in hub.read(source, name, part))
    if name != "train":
        raise RecipeError("files have the one split train", where=f"split of {source.path}", got=source.split,
                          fix="name the file of that split as the path")  # fmt: skip
    return _read_files(source, part, files.find(source.path))


def _read_files(source: Source, part: Slice, paths: list[Path]) -> Iterator[Row]:
    total = sum(map(_count, paths)) if part.relative else None
    start, stop = bounds(part, total, f"split of {source.path}")
    empty = True
    for place, value in itertools.islice(itertools.chain.from_iterable(map(_records, paths)), start, stop):
        empty = False
        yield _row(place, value)
    if empty:
        raise RecipeError("the slice selects no rows", where=f"split of {source.path}", got=source.split)


def places(source: Source) -> list[str]:
    """What the places of its rows begin with, one for each file; a number follows."""
    if hub.is_hub(source):
        return [hub.place(source)]
    paths = files.find(source.path)
    return [f"{path}:row " if _reader(path) in _NUMBERED else f"{path}:" for path in paths]


def digests(source: Source) -> list[str]:
    """What tells the content of ``source``: the hash of each file, or the version of a hub dataset."""
    if hub.is_hub(source):
        return [hub.digest(source)]
    return [files.digest(path) for path in files.find(source.path)]


def _reader(path: Path) -> Callable[[Path], Iterator[_Record]]:
    match files.kind(path):
        case ".parquet":
            return tables.parquet_records
        case ".csv":
            return tables.csv_records
        case ".json" if not jsons.is_lines(path):
            return jsons.array_records
        case _:
            return jsons.line_records


_NUMBERED = (tables.parquet_records, jsons.array_records)


def _records(path: Path) -> Iterator[_Record]:
    """The records of one file, which must have at least one."""
    empty = True
    for record in _reader(path)(path):
        empty = False
        yield record
    if empty:
        raise DataError("the file has no rows", where=str(path), expected="at least one row", got="none")


def _count(path: Path) -> int:
    if files.kind(path) == ".parquet":
        return tables.parquet_count(path)
    return sum(1 for _ in _records(path))


def _row(place: str, value: Any) -> Row:
    if isinstance(value, DataError):
        return Row(None, place, value)
    if not isinstance(value, bytes):
        return Row(value, place)
    try:
        return Row(jsons.decode(value, place), place)
    except DataError as error:
        return Row(value.decode(errors="replace").rstrip("\r\n"), place, error)
