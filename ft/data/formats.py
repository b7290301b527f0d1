"""From one row (a dict, as a file holds it) to one frozen value. Pure; every malformation is a DataError.

| format          | columns                                         | value                                          |
|-----------------|-------------------------------------------------|------------------------------------------------|
| `messages`      | messages [{role, content, ...}], tools?, system? | Conversation                                   |
| `conversations` | conversations [{from, value}], tools?, system?   | Conversation                                   |
| `alpaca`        | instruction, output, input?, system?, history?   | Conversation                                   |
| `prompt`        | prompt, completion: two strings                  | Segments: prompt untrained, completion trained |
| `prompt`        | prompt, completion: two lists of messages        | Conversation; only the completion is trained   |
| `segments`      | segments [{text, train}]                         | Segments, taken literally                      |
| `tokens`        | input_ids, labels? or mask?, attention_mask?     | Tokens, taken literally                        |
| `text`          | text                                             | Text                                           |

`auto` takes the first format of `_SIGNS` whose columns are there; a column that is null counts as absent. Columns
that no format names are ignored, so that files may carry ids and notes. A list may be written as a JSON string, as
csv must.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from attrs import frozen

from ft.data.messages import Conversation, Message, read_messages, read_tools
from ft.data.place import fail, parsed, shown, text
from ft.recipe.parts import Format

__all__ = ["Conversation", "Message", "Segments", "Text", "Tokens", "Value", "convert", "detect", "rename"]


@frozen(kw_only=True)
class Segments:
    """Stretches of text, each with its own mask; no template touches them.

    ``whole`` rows (prompt and completion) are a document, which the end-of-sequence token closes where
    `Data.append_eos` says so; `segments` rows hold the special tokens they want.
    """

    parts: tuple[tuple[str, bool], ...]
    whole: bool = False


@frozen(kw_only=True)
class Text:
    """A plain document: every token is trained."""

    text: str


@frozen(kw_only=True, eq=False)
class Tokens:
    """A row that is tokens already, padding removed; no mask trains all of them."""

    input_ids: np.ndarray  # int32, L
    mask: np.ndarray | None = None  # bool, L


Value = Conversation | Segments | Text | Tokens

_SIGNS: tuple[tuple[Format, tuple[str, ...]], ...] = (
    ("messages", ("messages",)),
    ("conversations", ("conversations",)),
    ("segments", ("segments",)),
    ("tokens", ("input_ids",)),
    ("prompt", ("prompt", "completion")),
    ("alpaca", ("instruction", "output")),
    ("text", ("text",)),
)
_MASKS = ("mask", "loss_mask", "completion_mask", "assistant_masks")
_IGNORED = -100
_INT32 = np.iinfo(np.int32)


def detect(row: Mapping[str, Any]) -> Format | None:
    """The format whose columns ``row`` has, or None."""
    for name, columns in _SIGNS:
        if all(row.get(column) is not None for column in columns):
            return name
    return None


def rename(row: Mapping[str, Any], columns: Mapping[str, str], source: str) -> dict[str, Any]:
    """``row`` with ``columns`` {"theirs": "ours"} renamed; a renamed column takes the place of one of that name."""
    missing = [name for name in columns if name not in row]
    if missing:
        raise fail(
            source,
            "a column to rename is not in the row",
            expected=", ".join(missing),
            got=f"columns {', '.join(map(str, row)) or '(none)'}",
            fix="correct Source.columns, which reads {'theirs': 'ours'}",
        )
    ours = set(columns.values())
    kept = {name: value for name, value in row.items() if name not in columns and name not in ours}
    return kept | {columns[name]: row[name] for name in columns}


def convert(row: Any, *, source: str, format: Format = "auto", columns: Mapping[str, str] | None = None) -> Value:
    """The frozen value of ``row``.

    Raises:
        DataError: names ``source`` ("file.jsonl:17"), the column path, what was expected and what stood there.
    """
    if not isinstance(row, Mapping):
        raise fail(source, "a row must be an object", expected="an object with named columns", got=shown(row))
    if columns:
        row = rename(row, columns, source)
    name = detect(row) if format == "auto" else format
    if name is None:
        raise fail(
            source,
            "no known format fits the columns of this row",
            expected="one of: " + "; ".join(" + ".join(signs) for _, signs in _SIGNS),
            got=f"columns {', '.join(map(str, row)) or '(none)'}" + _nulls(row),
            fix="rename columns with Source.columns={'theirs': 'ours'}, or set Source.format",
        )
    return _READERS[name](row, source)


def _nulls(row: Mapping[str, Any]) -> str:
    empty = [str(name) for name, value in row.items() if value is None]
    return f" (null: {', '.join(empty)})" if empty else ""


def _column(row: Mapping[str, Any], name: str, source: str, expected: str) -> Any:
    value = row.get(name)
    if value is None:
        got = "null" if name in row else f"columns {', '.join(map(str, row)) or '(none)'}"
        raise fail(source, f"column '{name}' is missing", path=name, expected=expected, got=got)
    return value


def _string(row: Mapping[str, Any], name: str, source: str, *, filled: bool = False, default: str | None = None) -> str:
    """A text column; ``default`` stands for a missing one, and None for no default. ``filled`` refuses ""."""
    if default is not None and row.get(name) is None:
        return default
    value = _column(row, name, source, "a string")
    return text(value, source, name, filled=filled)


def _chat(column: str) -> Callable[[Mapping[str, Any], str], Conversation]:
    """Reads a column of messages, in either spelling (role/content, from/value)."""

    def read(row: Mapping[str, Any], source: str) -> Conversation:
        messages = read_messages(_column(row, column, source, "a list of messages"), source, column)
        system = _string(row, "system", source, default="")
        if system and messages[0].role in ("system", "developer"):
            raise fail(
                source,
                "two system prompts",
                path="system",
                expected=f"a `system` column or a system message in `{column}`, not both",
                got=shown(system),
                fix="drop one of them, or rename the column with Source.columns",
            )
        if system:
            messages = (Message(role="system", content=system), *messages)
        return _conversation(messages, row, source, column)

    return read


def _conversation(messages: tuple[Message, ...], row: Mapping[str, Any], source: str, path: str) -> Conversation:
    if not any(message.role == "assistant" for message in messages):
        raise fail(
            source,
            "no assistant message, so there is nothing to train",
            path=path,
            expected="at least one message with the role assistant",
            got="roles " + ", ".join(message.role for message in messages),
        )
    return Conversation(messages=messages, tools=read_tools(row.get("tools"), source, "tools"))


def _alpaca(row: Mapping[str, Any], source: str) -> Conversation:
    """`input` follows `instruction` after an empty line; `history` is a list of [question, answer]."""
    system = _string(row, "system", source, default="")
    turns = [Message(role="system", content=system)] if system else []
    for question, answer in _history(row.get("history"), source):
        turns += [Message(role="user", content=question), Message(role="assistant", content=answer)]
    instruction, more = _string(row, "instruction", source), _string(row, "input", source, default="")
    user = "\n\n".join(part for part in (instruction, more) if part)
    if not user:
        raise fail(source, "this is empty", path="instruction", expected="some text", got="an empty string")
    turns.append(Message(role="user", content=user))
    turns.append(Message(role="assistant", content=_string(row, "output", source, filled=True)))
    return _conversation(tuple(turns), row, source, "output")


def _history(value: Any, source: str) -> list[tuple[str, str]]:
    if value is None or value == "":
        return []
    value = parsed(value, source, "history")
    if not isinstance(value, (list, tuple)):
        raise fail(source, "this must be a list", path="history", expected="a list of pairs", got=shown(value))
    pairs = []
    for i, pair in enumerate(value):
        path = f"history[{i}]"
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise fail(source, "not a pair", path=path, expected="[question, answer]", got=shown(pair))
        pairs.append((text(pair[0], source, f"{path}[0]"), text(pair[1], source, f"{path}[1]")))
    return pairs


def _prompt(row: Mapping[str, Any], source: str) -> Segments | Conversation:
    prompt = _column(row, "prompt", source, "a string, or a list of messages")
    completion = _column(row, "completion", source, "a string, or a list of messages")
    if isinstance(prompt, str) and isinstance(completion, str):
        parts = ((text(prompt, source, "prompt"), False), (text(completion, source, "completion", filled=True), True))
        return Segments(parts=parts, whole=True)
    if isinstance(prompt, str) or isinstance(completion, str):
        raise fail(
            source,
            "prompt and completion differ in kind",
            path="completion",
            expected="two strings, or two lists of messages",
            got=f"prompt {shown(prompt)}, completion {shown(completion)}",
        )
    asked = read_messages(prompt, source, "prompt", train=False)
    answered = read_messages(completion, source, "completion", train=True)
    if not any(message.role == "assistant" for message in answered):
        raise fail(
            source,
            "no assistant message, so there is nothing to train",
            path="completion",
            expected="at least one message with the role assistant",
            got="roles " + ", ".join(message.role for message in answered),
        )
    return _conversation(asked + answered, row, source, "completion")


def _segments(row: Mapping[str, Any], source: str) -> Segments:
    """[{text | content, train | label}]; the mask of each stretch must be said."""
    value = parsed(_column(row, "segments", source, "a list of {text, train}"), source, "segments")
    if not isinstance(value, (list, tuple)) or not value:
        raise fail(
            source,
            "segments must be a list that is not empty",
            path="segments",
            expected="a list of {text, train}",
            got=shown(value),
        )
    parts = tuple(_segment(part, source, f"segments[{i}]") for i, part in enumerate(value))
    if not any(words and train for words, train in parts):
        raise fail(
            source,
            "no segment is trained",
            path="segments",
            expected="train: true on at least one segment with text",
            got=shown(value),
        )
    return Segments(parts=parts)


def _segment(part: Any, source: str, path: str) -> tuple[str, bool]:
    if not isinstance(part, Mapping):
        raise fail(source, "a segment must be an object", path=path, expected="{text, train}", got=shown(part))
    key = "text" if part.get("text") is not None else "content"
    words = text(part.get(key), source, f"{path}.{'text' if key not in part else key}")
    train = part.get("train") if part.get("train") is not None else part.get("label")
    if not isinstance(train, bool):
        raise fail(source, "a segment must say whether it is trained", path=f"{path}.train",
                   expected="true or false", got=shown(train))  # fmt: skip
    return words, train


def _text(row: Mapping[str, Any], source: str) -> Text:
    return Text(text=_string(row, "text", source, filled=True))


def _tokens(row: Mapping[str, Any], source: str) -> Tokens:
    """`labels` is transformers' convention: not shifted, -100 where a token is not trained."""
    ids = _integers(_column(row, "input_ids", source, "a list of token ids"), source, "input_ids")
    if ids.size == 0 or ids.min() < 0:
        raise fail(
            source,
            "token ids must be there and must not be negative",
            path="input_ids",
            expected="at least one token id >= 0",
            got=shown(row["input_ids"]),
        )
    mask = _token_mask(row, ids, source)
    if row.get("attention_mask") is not None:
        kept = _flags(row["attention_mask"], len(ids), source, "attention_mask")
        ids, mask = ids[kept], mask if mask is None else mask[kept]
    if ids.size == 0:
        raise fail(source, "no token is left", path="attention_mask", expected="a 1 somewhere", got="zeros only")
    return Tokens(input_ids=ids, mask=mask)


def _token_mask(row: Mapping[str, Any], ids: np.ndarray, source: str) -> np.ndarray | None:
    named = [name for name in ("labels", *_MASKS) if row.get(name) is not None]
    if len(named) > 1:
        raise fail(source, "two masks", path=named[1], expected="one of them", got=", ".join(named))
    if not named:
        return None
    if named != ["labels"]:
        return _flags(row[named[0]], len(ids), source, named[0])
    labels = _integers(row["labels"], source, "labels", length=len(ids))
    odd = np.flatnonzero((labels != _IGNORED) & (labels != ids))
    if odd.size:
        i = int(odd[0])
        raise fail(
            source,
            "a label is neither -100 nor the token at its place",
            path=f"labels[{i}]",
            expected=f"-100 or {ids[i]} (labels are not shifted)",
            got=str(labels[i]),
        )
    return labels != _IGNORED


def _integers(value: Any, source: str, path: str, length: int | None = None) -> np.ndarray:
    value = parsed(value, source, path)
    if not isinstance(value, (list, tuple)) or not {type(item) for item in value} <= {int}:
        raise fail(source, "this must be a list of integers", path=path, expected="a list of integers",
                   got=shown(value))  # fmt: skip
    if length is not None and len(value) != length:
        raise fail(source, "not as long as input_ids", path=path, expected=f"{length} items", got=str(len(value)))
    if value and not (_INT32.min <= min(value) and max(value) <= _INT32.max):
        raise fail(source, "too large for a token id", path=path, expected="32-bit integers", got=str(max(value)))
    return np.asarray(value, dtype=np.int32)


def _flags(value: Any, length: int, source: str, path: str) -> np.ndarray:
    """A list of 0 and 1, or of false and true."""
    value = parsed(value, source, path)
    if not isinstance(value, (list, tuple)) or any(
        type(item) not in (bool, int) or item not in (0, 1) for item in value
    ):
        raise fail(source, "this must be a list of 0 and 1", path=path, expected="a list of 0 and 1", got=shown(value))
    if len(value) != length:
        raise fail(source, "not as long as input_ids", path=path, expected=f"{length} items", got=str(len(value)))
    return np.asarray(value, dtype=bool)


_READERS: Mapping[str, Callable[[Mapping[str, Any], str], Value]] = {
    "messages": _chat("messages"),
    "conversations": _chat("conversations"),
    "alpaca": _alpaca,
    "prompt": _prompt,
    "segments": _segments,
    "tokens": _tokens,
    "text": _text,
}
