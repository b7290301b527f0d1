"""From one row (a dict, as a file holds it) to one frozen value. Pure; every malformation is a DataError.

| format          | columns                                         | value                                          |
|-----------------|-------------------------------------------------|------------------------------------------------|
| `messages`      | messages [{role, content, ...}], tools?, system? | Conversation                                   |
| `conversations` | conversations [{from, value}], tools?, system?   | Conversation                                   |
| `alpaca`        | instruction, output, input?, system?, history?   | Conversation                                   |
| `prompt`        | prompt, completion: two strings                  | Segments: prompt untrained, completion trained |
| `prompt`        | prompt, completion: two lists of messages        | Conversation; only the completion is trained   |
| `preference`    | prompt, chosen, rejected: three strings          | Pair of Segments; only the answers are trained |
| `preference`    | chosen, rejected: lists of messages; prompt?     | Pair of Conversations; the same                |
| `label`         | label, and prompt + completion or messages       | Labelled; only the answer is trained           |
| `stepwise`      | prompt, completions [text], labels [bool or 0..1] | Steps, each judged at its last token          |
| `segments`      | segments [{text, train}]                         | Segments, taken literally                      |
| `tokens`        | input_ids, labels? or mask?, attention_mask?     | Tokens, taken literally                        |
| `text`          | text                                             | Text                                           |

`preference` rows may carry a `margin`, or `score_chosen` and `score_rejected`, whose difference it is. Messages may
have `tools` and a `system` prompt beside them; ``ft.data.answers`` says where a prompt ends and an answer begins.

`auto` takes the first format of `_SIGNS` whose columns are there; a column that is null counts as absent. It takes
`label` only for prompt + completion and a label that is true or false: other files use the name for other things.
Columns that no format names are ignored, so that files may carry ids and notes. A list may be written as a JSON
string, as csv must.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ft.data.answers import completion, labelled, pair, stepwise
from ft.data.columns import column, conversation, string, with_system
from ft.data.messages import Conversation, Message, read_messages
from ft.data.place import fail, parsed, shown, text
from ft.data.values import Labelled, Pair, Segments, Steps, Text, Tokens, Value
from ft.recipe.parts import Format

__all__ = [
    "Conversation",
    "Labelled",
    "Message",
    "Pair",
    "Segments",
    "Steps",
    "Text",
    "Tokens",
    "Value",
    "convert",
    "detect",
    "rename",
]


_SIGNS: tuple[tuple[Format, tuple[str, ...]], ...] = (
    ("messages", ("messages",)),
    ("conversations", ("conversations",)),
    ("segments", ("segments",)),
    ("tokens", ("input_ids",)),
    ("prompt", ("prompt", "completion")),
    ("alpaca", ("instruction", "output")),
    ("text", ("text",)),
    ("stepwise", ("prompt", "completions", "labels")),
    ("preference", ("chosen", "rejected")),  # last: such files often hold the same rows for fine-tuning, too
)
_MASKS = ("mask", "loss_mask", "completion_mask", "assistant_masks")
_IGNORED = -100
_INT32 = np.iinfo(np.int32)


def detect(row: Mapping[str, Any]) -> Format | None:
    """The format whose columns ``row`` has, or None."""
    for name, columns in _SIGNS:
        if all(row.get(column) is not None for column in columns):
            return "label" if name == "prompt" and isinstance(row.get("label"), bool) else name
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


def _chat(name: str) -> Callable[[Mapping[str, Any], str], Conversation]:
    """Reads a column of messages, in either spelling (role/content, from/value)."""

    def read(row: Mapping[str, Any], source: str) -> Conversation:
        messages = read_messages(column(row, name, source, "a list of messages"), source, name)
        messages = with_system(messages, row, source, name)
        return conversation(messages, row, source, name)

    return read


def _alpaca(row: Mapping[str, Any], source: str) -> Conversation:
    """`input` follows `instruction` after an empty line; `history` is a list of [question, answer]."""
    system = string(row, "system", source, default="")
    turns = [Message(role="system", content=system)] if system else []
    for question, answer in _history(row.get("history"), source):
        turns += [Message(role="user", content=question), Message(role="assistant", content=answer)]
    instruction, more = string(row, "instruction", source), string(row, "input", source, default="")
    user = "\n\n".join(part for part in (instruction, more) if part)
    if not user:
        raise fail(source, "this is empty", path="instruction", expected="some text", got="an empty string")
    turns.append(Message(role="user", content=user))
    turns.append(Message(role="assistant", content=string(row, "output", source, filled=True)))
    return conversation(tuple(turns), row, source, "output")


def _history(value: Any, source: str) -> list[tuple[str, str]]:
    if value is None or value == "":
        return []
    value = parsed(value, source, "history")
    if not isinstance(value, (list, tuple)):
        raise fail(source, "this must be a list", path="history", expected="a list of pairs", got=shown(value))
    pairs = []
    for i, turn in enumerate(value):
        path = f"history[{i}]"
        if not isinstance(turn, (list, tuple)) or len(turn) != 2:
            raise fail(source, "not a pair", path=path, expected="[question, answer]", got=shown(turn))
        pairs.append((text(turn[0], source, f"{path}[0]"), text(turn[1], source, f"{path}[1]")))
    return pairs


def _segments(row: Mapping[str, Any], source: str) -> Segments:
    """[{text | content, train | label}]; the mask of each stretch must be said."""
    value = parsed(column(row, "segments", source, "a list of {text, train}"), source, "segments")
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
    return Text(text=string(row, "text", source, filled=True))


def _tokens(row: Mapping[str, Any], source: str) -> Tokens:
    """`labels` is transformers' convention: not shifted, -100 where a token is not trained."""
    ids = _integers(column(row, "input_ids", source, "a list of token ids"), source, "input_ids")
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
    "prompt": completion,
    "preference": pair,
    "label": labelled,
    "stepwise": stepwise,
    "segments": _segments,
    "tokens": _tokens,
    "text": _text,
}
