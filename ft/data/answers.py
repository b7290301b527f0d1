"""Rows of a prompt and what answers it: a completion, a rated completion, or two that are compared.

A prompt and its answers are strings, which no template touches, or lists of messages. Where they are messages the
prompt may be left out: `chosen` and `rejected` are then two whole conversations, and what they have in common from
the first message on is the prompt. `messages` with a `label` end with the answer: what follows the last message that
is not the assistant's or a tool's. Of an answer, what the assistant says is trained, and nothing else of the row. An
answer may also be given in steps, each with a judgement of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from attrs import evolve

from ft.data.columns import column, conversation, string, unanswered, with_system
from ft.data.messages import Conversation, Message, read_messages, read_tools
from ft.data.place import fail, parsed, shown, text
from ft.data.values import Labelled, Pair, Segments, Steps
from ft.errors import DataError

_SIDES = ("chosen", "rejected")
_ANSWERS = ("assistant", "tool")  # roles that an answer can begin with
_LARGE = 1e38  # differences of two such numbers are float32, still
_SKIP = "mend or remove the row, or set data.on_bad_row to skip or quarantine"

Row = Mapping[str, Any]
Messages = tuple[Message, ...]


def completion(row: Row, source: str) -> Segments | Conversation:
    """`prompt` and `completion`; only the completion is trained."""
    prompt = column(row, "prompt", source, "a string, or a list of messages")
    answer = column(row, "completion", source, "a string, or a list of messages")
    if isinstance(prompt, str) and isinstance(answer, str):
        return _segments(prompt, answer, source, "completion")
    if isinstance(prompt, str) or isinstance(answer, str):
        raise fail(
            source,
            "prompt and completion differ in kind",
            path="completion",
            expected="two strings, or two lists of messages",
            got=f"prompt {shown(prompt)}, completion {shown(answer)}",
        )
    asked = read_messages(prompt, source, "prompt", train=False)
    answered = read_messages(answer, source, "completion", train=True)
    if not any(message.role == "assistant" for message in answered):
        raise unanswered(answered, source, "completion")
    return conversation(asked + answered, row, source, "completion")


def _segments(prompt: str, answer: str, source: str, path: str) -> Segments:
    asked, answered = text(prompt, source, "prompt"), text(answer, source, path, filled=True)
    return Segments(parts=((asked, False), (answered, True)), whole=True)


# Rated answers --------------------------------------------------------------------------------------------------------


def labelled(row: Row, source: str) -> Labelled:
    """`label` (true or false) beside `prompt` and `completion`, or beside `messages`."""
    good = _label(column(row, "label", source, "true or false"), source)
    if row.get("messages") is not None:
        return Labelled(answer=_last_answer(row, source), good=good)
    answer = completion(row, source)
    if isinstance(answer, Conversation):
        trained = [message for message in answer.messages if message.train]
        _check_said(trained or answer.messages, source, "completion")
    else:
        _check_text(answer.parts[1][0], source, "completion")
        _no_system(row, source)
    return Labelled(answer=answer, good=good)


def _label(value: Any, source: str) -> bool:
    said = parsed(value.strip().lower() if isinstance(value, str) else value, source, "label")
    if not isinstance(said, (bool, int)) or said not in (0, 1):
        raise fail(source, "a label is yes or no", path="label", expected="true or false (or 1 or 0)",
                   got=shown(value))  # fmt: skip
    return bool(said)


def _last_answer(row: Row, source: str) -> Conversation:
    messages = with_system(read_messages(row["messages"], source, "messages"), row, source, "messages")
    asks = [k for k, message in enumerate(messages) if message.role not in _ANSWERS]
    start = asks[-1] + 1 if asks else 0
    if not asks or start == len(messages):
        raise fail(
            source,
            "no message to answer" if not asks else "no answer to rate",
            path="messages",
            expected="a message of the user, and the assistant's answer after it",
            got="roles " + ", ".join(message.role for message in messages),
        )
    _check_said(messages[start:], source, "messages")
    return _joined(messages[:start], messages[start:], row, source, "messages")


# Judged steps ---------------------------------------------------------------------------------------------------------


def stepwise(row: Row, source: str) -> Steps:
    """`prompt` (text or messages), `completions` (the steps of one answer) and `labels` (one for each step)."""
    prompt = column(row, "prompt", source, "a string, or a list of messages")
    steps = _list(row, "completions", "a list of texts, the steps of one answer", source)
    labels = _list(row, "labels", "a list of true and false, or of numbers from 0 to 1", source)
    if len(labels) != len(steps):
        raise fail(source, "not a label for each step", path="labels", expected=f"{len(steps)} labels",
                   got=str(len(labels)), fix=_SKIP)  # fmt: skip
    for i, step in enumerate(steps):
        _check_text(text(step, source, f"completions[{i}]"), source, f"completions[{i}]")
    return Steps(
        prompt=_step_prompt(prompt, row, source),
        steps=tuple(steps),
        labels=tuple(_share(label, source, f"labels[{i}]") for i, label in enumerate(labels)),
    )


def _step_prompt(prompt: Any, row: Row, source: str) -> Conversation | str:
    if _is_text(prompt, source, "prompt"):
        _no_system(row, source)
        return text(prompt, source, "prompt", filled=True)
    asked = with_system(read_messages(prompt, source, "prompt", train=False), row, source, "prompt")
    return Conversation(messages=asked, tools=read_tools(row.get("tools"), source, "tools"))


def _list(row: Row, name: str, expected: str, source: str) -> Sequence[Any]:
    value = parsed(column(row, name, source, expected), source, name)
    if not isinstance(value, (list, tuple)) or not value:
        raise fail(source, "this must be a list that is not empty", path=name, expected=expected,
                   got=shown(value), fix=_SKIP)  # fmt: skip
    return value


def _share(value: Any, source: str, path: str) -> float:
    if not isinstance(value, (bool, int, float)) or not 0 <= value <= 1:
        raise fail(source, "a step is judged by yes or no, or in between", path=path,
                   expected="true or false, or a number from 0 to 1", got=shown(value))  # fmt: skip
    return float(value)


# Pairs ----------------------------------------------------------------------------------------------------------------


def pair(row: Row, source: str) -> Pair:
    """`chosen` and `rejected`, with or without a `prompt`; a margin from `margin`, or from two scores."""
    prompt = row.get("prompt")
    chosen, rejected = (column(row, side, source, "a string, or a list of messages") for side in _SIDES)
    if prompt is None and _is_text(chosen, source, "chosen"):
        raise fail(
            source,
            "two answers without their prompt",
            path="prompt",
            expected="a `prompt` beside answers that are strings, or two whole conversations as lists of messages",
            got=f"chosen {shown(chosen)}",
        )
    texts = [isinstance(side, str) for side in (chosen, rejected)]
    if isinstance(prompt, str) and all(texts):
        answers: Sequence[Segments | Conversation] = _text_pair(prompt, chosen, rejected, row, source)
    elif prompt is not None and any(texts):
        raise fail(
            source,
            "prompt, chosen and rejected differ in kind",
            path="rejected" if texts == [False, True] else "chosen",
            expected="three strings, or answers that are lists of messages",
            got=f"prompt {shown(prompt)}, chosen {shown(chosen)}, rejected {shown(rejected)}",
        )
    else:
        answers = _message_pair(prompt, chosen, rejected, row, source)
    return Pair(chosen=answers[0], rejected=answers[1], margin=_margin(row, source))


def _text_pair(prompt: str, chosen: str, rejected: str, row: Row, source: str) -> list[Segments]:
    _no_system(row, source)
    sides = [_segments(prompt, answer, source, side) for answer, side in zip((chosen, rejected), _SIDES, strict=True)]
    for answer, side in zip((chosen, rejected), _SIDES, strict=True):
        _check_text(answer, source, side)
    if chosen == rejected:
        raise _equal(source, chosen)
    return sides


def _message_pair(prompt: Any, chosen: Any, rejected: Any, row: Row, source: str) -> list[Conversation]:
    sides = [_side(value, source, name) for value, name in zip((chosen, rejected), _SIDES, strict=True)]
    whole = [side[0].role not in _ANSWERS for side in sides]
    if prompt is not None and not any(whole):
        asked, answers = _asked(prompt, source), sides
    elif all(whole):
        asked, answers = _common(sides[0], sides[1], source)
        if prompt is not None:
            _check_prompt(_asked(prompt, source), asked, isinstance(prompt, str), source)
    else:
        raise _no_prompt(source, sides[0][0], sides[1][0])
    if _unsaid(answers[0]) == _unsaid(answers[1]):
        raise _equal(source, answers[0][-1].content)
    asked = with_system(asked, row, source, "prompt" if prompt is not None else "chosen")
    for answer, name in zip(answers, _SIDES, strict=True):
        _check_said(answer, source, name)
    return [_joined(asked, answer, row, source, name) for answer, name in zip(answers, _SIDES, strict=True)]


def _side(value: Any, source: str, name: str) -> Messages:
    """The messages of one side; a single message stands for a list of one."""
    return read_messages([value] if isinstance(value, Mapping) else value, source, name)


def _is_text(value: Any, source: str, name: str) -> bool:
    """Whether ``value`` is a string, and not a list of messages written as JSON."""
    return isinstance(value, str) and not isinstance(parsed(value, source, name), list)


def _asked(prompt: Any, source: str) -> Messages:
    if _is_text(prompt, source, "prompt"):
        return (Message(role="user", content=text(prompt, source, "prompt", filled=True)),)
    return read_messages(prompt, source, "prompt")


def _common(chosen: Messages, rejected: Messages, source: str) -> tuple[Messages, list[Messages]]:
    """What two conversations have in common from the first message on, and what follows it in each."""
    a, b = _unsaid(chosen), _unsaid(rejected)
    if a == b:
        raise _equal(source, chosen[-1].content)
    n = next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    part = next((side[n] for side in (chosen, rejected) if n < len(side) and side[n].role not in _ANSWERS), None)
    if n == 0 or (part is not None and n < min(len(a), len(b))):
        raise _no_prompt(source, *(side[n] for side in (chosen, rejected)), at=n)
    return chosen[:n], [chosen[n:], rejected[n:]]


def _unsaid(messages: Messages) -> list[Message]:
    """Messages without what they say of training: that does not tell them apart."""
    return [evolve(message, train=None) for message in messages]


def _no_prompt(source: str, chosen: Message, rejected: Message, *, at: int = 0) -> DataError:
    return fail(
        source,
        "the two answers have no common prompt",
        path=f"rejected[{at}]",
        expected="conversations that are the same up to a message of the assistant, or a `prompt` and two answers",
        got=f"{chosen.role}: {shown(chosen.content)} in chosen, {rejected.role}: {shown(rejected.content)} in rejected",
        fix=_SKIP,
    )


def _check_prompt(said: Messages, found: Messages, as_text: bool, source: str) -> None:
    """A `prompt` beside whole conversations must be how both begin; as a string, what one user message says."""
    if as_text and len(said) == 1:
        fits = any(m.role == "user" and m.content.strip() == said[0].content.strip() for m in found)
    else:
        fits = _unsaid(found[: len(said)]) == _unsaid(said)
    if not fits:
        raise fail(
            source,
            "the prompt is not the one of the conversations beside it",
            path="prompt",
            expected=f"{shown(found[-1].content)}, which chosen and rejected have in common",
            got=shown(said[-1].content),
            fix="give answers without their prompt, or rename the column away: Source.columns={'prompt': 'unused'}",
        )


def _joined(asked: Messages, answer: Messages, row: Row, source: str, path: str) -> Conversation:
    """One conversation of which only what the assistant says in ``answer`` is trained."""
    mute = [evolve(message, train=False) for message in asked]
    said = [_trained(message) for message in answer]
    return conversation((*mute, *said), row, source, path)


def _trained(message: Message) -> Message:
    return evolve(message, train=message.train is not False) if message.role == "assistant" else message


# Checks ---------------------------------------------------------------------------------------------------------------


def _check_said(answer: Sequence[Message], source: str, path: str) -> None:
    """The assistant says something, or calls something, in ``answer``."""
    if not answer:
        raise _empty(source, path, "no message after the prompt")
    turns = [message for message in answer if message.role == "assistant"]
    if not turns:
        raise unanswered(answer, source, path)
    if not any(m.content.strip() or m.tool_calls or (m.reasoning_content or "").strip() for m in turns):
        raise _empty(source, path, shown(turns[-1].content))
    if all(message.train is False for message in turns):
        raise fail(source, "no message of the answer is trained", path=path, fix=_SKIP,
                   expected="train: true, or nothing said of it", got="train: false")  # fmt: skip


def _check_text(answer: str, source: str, path: str) -> None:
    if not answer.strip():
        raise _empty(source, path, shown(answer))


def _empty(source: str, path: str, got: str) -> DataError:
    return fail(source, "this answer is empty", path=path, expected="an answer that says something", got=got, fix=_SKIP)


def _equal(source: str, said: str) -> DataError:
    return fail(source, "the two answers are the same", path="rejected", expected="an answer other than the chosen one",
                got=shown(said), fix=_SKIP)  # fmt: skip


def _no_system(row: Row, source: str) -> None:
    if system := string(row, "system", source, default=""):
        raise fail(
            source,
            "a system prompt beside plain strings, where no chat template would place it",
            path="system",
            expected="messages, or no `system` column",
            got=shown(system),
            fix="write the prompt and its answers as messages, or rename the column away: "
            "Source.columns={'system': 'unused'}",
        )


def _margin(row: Row, source: str) -> float | None:
    """`margin`, else score_chosen - score_rejected where both are there, else None."""
    if (margin := _number(row, "margin", source)) is not None:
        return margin
    chosen, rejected = (_number(row, f"score_{side}", source) for side in _SIDES)
    if chosen is None and rejected is None:
        return None
    if chosen is None or rejected is None:
        lacking = "score_chosen" if chosen is None else "score_rejected"
        raise fail(source, "one score without the other", path=lacking, expected="both scores, or none",
                   got=shown(row.get(lacking)))  # fmt: skip
    return chosen - rejected


def _number(row: Row, name: str, source: str) -> float | None:
    value = row.get(name)
    if value is None or value == "":
        return None
    number = parsed(value, source, name)
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not abs(number) < _LARGE:
        raise fail(source, "this must be a number", path=name, expected=f"a number between -{_LARGE} and {_LARGE}",
                   got=shown(value))  # fmt: skip
    return float(number)
