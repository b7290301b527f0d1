"""What an error about a row says of the place and of the value that stood there; checks that all formats share."""

from __future__ import annotations

import reprlib
from typing import Any

import msgspec

from ft.errors import DataError

_short = reprlib.Repr()
_short.maxlevel, _short.maxlist, _short.maxdict, _short.maxstring = 3, 4, 6, 60


def shown(value: Any) -> str:
    """``value`` and its kind in at most a line, in the words of JSON."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{_short.repr(value)[:160]} ({_KINDS.get(type(value), type(value).__name__)})"


_KINDS: dict[type, str] = {
    str: "a string",
    int: "a number",
    float: "a number",
    list: "a list",
    tuple: "a list",
    dict: "an object",
}


def fail(source: str, problem: str, *, path: str = "", expected: str = "", got: str = "", fix: str = "") -> DataError:
    """The error for a row: ``source`` is "file.jsonl:17", ``path`` the column, as "messages[2].role"."""
    where = f"{source} {path}".strip()
    return DataError(problem, where=where, expected=expected, got=got, fix=fix)


def text(value: Any, source: str, path: str, *, filled: bool = False) -> str:
    """``value`` if it is a string that can be encoded; ``filled`` refuses an empty one."""
    if not isinstance(value, str):
        raise fail(source, "this must be a string", path=path, expected="a string", got=shown(value))
    if filled and not value:
        fix = "mend the row, or set data.on_bad_row to skip or quarantine"
        raise fail(source, "this is empty", path=path, expected="some text", got="an empty string", fix=fix)
    if not value.isascii():
        _encodable(value, source, path)
    return value


def _encodable(value: str, source: str, path: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise fail(
            source,
            "half of a surrogate pair is no character",
            path=path,
            expected="text that UTF-8 can hold",
            got=f"{value[error.start]!a} at character {error.start}",
        ) from None


def parsed(value: Any, source: str, path: str, *, needed: bool = False) -> Any:
    """A string that is JSON as what it says; other values as they are. ``needed``: a string must be JSON."""
    if not isinstance(value, str):
        return value
    try:
        return msgspec.json.decode(value)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        if not needed:
            return value
        raise fail(source, f"not JSON: {error}", path=path, expected="JSON", got=shown(value)) from None
