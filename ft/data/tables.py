"""Tables as records: csv, and parquet through pyarrow."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ft.data import files, jsons
from ft.errors import DataError

_LONGEST_CELL = 1 << 30  # the csv module refuses cells over 131,072 characters unless told
_BATCH = 1000


def csv_records(path: Path) -> Iterator[tuple[str, Any]]:
    """("file.csv:17", the row or the DataError that it is); 17 is the line on which the row begins."""
    csv.field_size_limit(_LONGEST_CELL)
    reader = csv.reader((_text(path, number, line) for number, line in jsons.lines(path)), strict=True)
    begin = 1
    try:
        header = next(reader, [])
        _check_header(path, header)
        while True:
            begin = reader.line_num + 1
            cells = next(reader, None)
            if cells is None:
                return
            if cells:
                yield f"{path}:{begin}", _csv_row(header, cells, f"{path}:{begin}")
    except csv.Error as error:
        raise DataError(
            f"broken csv: {error}", where=f"{path}:{begin}", expected="cells with balanced quotes"
        ) from None


def _text(path: Path, number: int, line: bytes) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        around = repr(line[max(0, error.start - 20) : error.start + 20])
        problem = f"not UTF-8 at byte {error.start + 1} of the line"
        raise DataError(problem, where=f"{path}:{number}", expected="UTF-8", got=around) from None


def _check_header(path: Path, header: list[str]) -> None:
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise DataError("two columns have one name", where=f"{path}:1", expected="distinct names", got=", ".join(twice))


def _csv_row(header: list[str], cells: list[str], place: str) -> dict[str, str] | DataError:
    if len(cells) == len(header):
        return dict(zip(header, cells, strict=True))
    return DataError("a row with more or fewer cells than the header", where=place, expected=f"{len(header)} cells",
                     got=f"{len(cells)} cells")  # fmt: skip


def parquet_records(path: Path) -> Iterator[tuple[str, Any]]:
    """("file.parquet:row 12", the row); memory holds one batch of rows."""
    number = 0
    table = _parquet(path)
    try:
        for batch in table.iter_batches(batch_size=_BATCH):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}:row {number}", without_nulls(row)
    except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
        raise files.unreadable(path, error, f"row {number}") from None
    finally:
        table.close()


def parquet_count(path: Path) -> int:
    """Rows, as the file's footer says."""
    table = _parquet(path)
    try:
        return table.metadata.num_rows
    finally:
        table.close()


def _parquet(path: Path) -> Any:
    parquet: Any = files.need("pyarrow.parquet", "data", f"reading {path.name}")
    try:
        return parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise files.unreadable(path, error) from None


def without_nulls(value: Any) -> Any:
    """``value`` without keys that are null.

    Arrow gives every object of a column the keys of all of them, filled with null; in a tool's schema those would
    reach the prompt. So in tables a null key cannot be told from an absent one, and counts as absent.
    """
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value] if value and isinstance(value[0], (dict, list)) else value
    return value
