"""JSON lines and JSON arrays as records, and what to say of broken JSON."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from ft.data import files
from ft.errors import DataError

_BOM = b"\xef\xbb\xbf"
_AROUND = 30


def lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines of an unpacked file, without its byte order mark."""
    number = 0
    with files.open_bytes(path) as file:
        while line := _next(file, path, number):
            number += 1
            yield number, line.removeprefix(_BOM) if number == 1 else line


def _next(file: Any, path: Path, number: int) -> bytes:
    try:
        return file.readline()
    except (OSError, EOFError, zlib.error) as error:
        raise files.unreadable(path, error, f"line {number}") from None


def line_records(path: Path) -> Iterator[tuple[str, bytes]]:
    """("file.jsonl:17", the undecoded line); blank lines are skipped."""
    for number, line in lines(path):
        if not line.isspace():
            yield f"{path}:{number}", line


def is_lines(path: Path) -> bool:
    """Whether a .json file holds JSON lines rather than one array."""
    first = next((line for _, line in lines(path) if not line.isspace()), b"")
    return not first.lstrip().startswith(b"[")


def array_records(path: Path) -> Iterator[tuple[str, Any]]:
    """("file.json:row 3", the item); the file is held in memory."""
    content = b"".join(line for _, line in lines(path))
    try:
        values = msgspec.json.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _broken_array(path, content, error) from None
    for number, value in enumerate(values, 1):
        yield f"{path}:row {number}", value


def decode(line: bytes, place: str) -> Any:
    """What a line says.

    Raises:
        DataError: broken JSON or no UTF-8, with the column (counted from 1) and the text around it.
    """
    try:
        return msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        line = line.rstrip()
        reason, at = _diagnose(line, error)
        # An object over many lines breaks at the end of its first one.
        whole = at is not None and at >= len(line) and line.endswith((b"{", b"[", b","))
        fix = "write one object per line; an array of objects belongs in a .json file" if whole else ""
        raise _broken(place, line, reason, at, "one JSON object on this line", fix) from None


def _broken_array(path: Path, content: bytes, error: Exception) -> DataError:
    reason, at = _diagnose(content, error)
    if at is None:
        return _broken(str(path), content, reason, None, "an array of objects")
    begin, end = content.rfind(b"\n", 0, at) + 1, content.find(b"\n", at)
    line = content[begin:end] if end >= 0 else content[begin:]
    number = content.count(b"\n", 0, at) + 1
    return _broken(f"{path}:{number}", line, reason, at - begin, "an array of objects")


def _diagnose(content: bytes, error: Exception) -> tuple[str, int | None]:
    """Why, and at which byte: the standard reader is slow, but says where."""
    try:
        json.loads(content.decode())
    except UnicodeDecodeError as wrong:
        return f"not UTF-8 (byte 0x{content[wrong.start]:02x})", wrong.start
    except json.JSONDecodeError as precise:
        return precise.msg, len(precise.doc[: precise.pos].encode())
    except RecursionError:
        return "nested too deeply", None
    # What only the strict reader refuses: NaN, numbers out of range, halves of surrogate pairs.
    half = "truncated" in str(error)
    return ("half of a surrogate pair is no character" if half else str(error)), None


def _broken(place: str, line: bytes, reason: str, at: int | None, expected: str, fix: str = "") -> DataError:
    begin = max(0, (at or 0) - _AROUND)
    around = line[begin : (at or 0) + _AROUND].decode(errors="replace")
    column = "" if at is None else f" at column {len(line[:at].decode(errors='replace')) + 1}"
    return DataError(f"broken JSON{column}: {reason}", where=place, expected=expected, got=around or "nothing", fix=fix)
