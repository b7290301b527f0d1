"""Columns that several formats read, each with the error of a row that lacks it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ft.data.messages import Conversation, Message, read_tools
from ft.data.place import fail, shown, text
from ft.errors import DataError


def column(row: Mapping[str, Any], name: str, source: str, expected: str) -> Any:
    """What stands in the column ``name``, which must not be null."""
    value = row.get(name)
    if value is None:
        got = "null" if name in row else f"columns {', '.join(map(str, row)) or '(none)'}"
        raise fail(source, f"column '{name}' is missing", path=name, expected=expected, got=got)
    return value


def string(row: Mapping[str, Any], name: str, source: str, *, filled: bool = False, default: str | None = None) -> str:
    """A text column; ``default`` stands for a missing one, and None for no default. ``filled`` refuses ""."""
    if default is not None and row.get(name) is None:
        return default
    value = column(row, name, source, "a string")
    return text(value, source, name, filled=filled)


def with_system(messages: tuple[Message, ...], row: Mapping[str, Any], source: str, path: str) -> tuple[Message, ...]:
    """``messages`` of the column ``path``, after the prompt of a `system` column where there is one."""
    system = string(row, "system", source, default="")
    if system and messages[0].role in ("system", "developer"):
        raise fail(
            source,
            "two system prompts",
            path="system",
            expected=f"a `system` column or a system message in `{path}`, not both",
            got=shown(system),
            fix="drop one of them, or rename the column with Source.columns",
        )
    return (Message(role="system", content=system), *messages) if system else messages


def conversation(messages: tuple[Message, ...], row: Mapping[str, Any], source: str, path: str) -> Conversation:
    """``messages`` and the row's `tools`; the assistant must say something."""
    if not any(message.role == "assistant" for message in messages):
        raise unanswered(messages, source, path)
    return Conversation(messages=messages, tools=read_tools(row.get("tools"), source, "tools"))


def unanswered(messages: Sequence[Message], source: str, path: str) -> DataError:
    return fail(
        source,
        "no assistant message, so there is nothing to train",
        path=path,
        expected="at least one message with the role assistant",
        got="roles " + ", ".join(message.role for message in messages),
    )
