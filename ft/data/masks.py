"""Which characters of a rendered conversation are trained, proven.

Message k of a conversation with text F is found in one of these ways, or not at all:

1. Tags. A template with {% generation %} tags says it itself.
2. Prefix. P is the text of messages[:k] and a generation prompt, Q the text of messages[:k + 1]. If P is a prefix of
   Q, and Q up to its end of turn is a prefix of F, the turn is F[len(P) : end of turn]: what the model has to write,
   from where sampling would set it on.
3. Substitution, for templates that rewrite history (those that drop the reasoning of earlier turns, or move the
   system prompt about). G is F with message k replaced by a marker, G = A marker B. If F = A M B, then M is what
   message k contributes; it is accepted if all of it is text of that message, or if it is a turn with calls or
   reasoning and every other message still stands in A or B. What the template writes whatever the turn says (an
   empty thinking block) is in A or B, and is not trained.
4. All at once, tried first where there are several plain turns, since it takes one rendering for all of them and
   not two for each: G is F with all of them replaced by markers, B0 marker B1 marker B2 ... If F is B0 c1 B1 c2 B2
   ..., where each c is the turn's content letter by letter (or stripped), each stands between the
   header of a generation prompt and an end of turn, then the spans are those that 2. would find.

Else DataError: no mask is guessed.

The end of a turn is the special token, or other text, that a template writes after an assistant's content. With
``end_of_turn`` it belongs to the span, on whichever side of a closing tag it stands; without, it does not. White
space after it is trained only if the template's own tags enclose it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

from attrs import frozen

from ft.data.messages import Conversation, Message
from ft.data.template import MARKER, REFUSALS, Chat, Span, Template, chat_of, refused, render, try_text
from ft.errors import DataError

Mask = Literal["assistant", "last", "message", "all"]
_FIX = 'give a template with {% generation %} tags (model.template), or set data.mask to "last" or "all"'


@frozen(kw_only=True)
class Marked:
    """A conversation as text, its trained spans in order, and the messages whose reasoning is in none of them."""

    text: str
    spans: tuple[Span, ...]
    lost: tuple[int, ...] = ()


@frozen(kw_only=True)
class _Case:
    """One conversation under proof."""

    template: Template
    chat: Chat
    tools: tuple[Mapping[str, Any], ...]
    text: str
    end_of_turn: bool
    source: str

    def cut(self, stop: int, prompt: bool = False) -> str | None:
        """The text of the first messages alone; None where the template refuses."""
        if stop == len(self.chat) and not prompt:
            return self.text
        return try_text(self.template, self.chat[:stop], tools=self.tools, prompt=prompt)


def wanted(messages: Sequence[Message], mask: Mask) -> list[int]:
    """Which messages are trained. One with ``train`` False never is."""
    if mask == "message":
        return [k for k, message in enumerate(messages) if message.train is True]
    turns = [k for k, message in enumerate(messages) if message.role == "assistant"]
    return [k for k in (turns[-1:] if mask == "last" else turns) if messages[k].train is not False]


def mark(template: Template, conversation: Conversation, *, mask: Mask, end_of_turn: bool, source: str) -> Marked:
    """Render a conversation and find what of it is trained.

    Args:
        source: the row, for messages: "file.jsonl:17".

    Raises:
        DataError: the template refuses the conversation, or nothing proves the mask.
    """
    chat = chat_of(template, conversation)
    turns = [] if mask == "all" else wanted(conversation.messages, mask)
    tags = template.tagged and bool(turns)
    try:
        text, tagged = render(template, chat, conversation.tools, tags=tags)
    except REFUSALS as error:
        raise refused(error, source) from error
    if mask == "all":
        return Marked(text=text, spans=((0, len(text)),))
    case = _Case(
        template=template, chat=chat, tools=conversation.tools, text=text, end_of_turn=end_of_turn, source=source
    )
    spans = _tagged(case, tagged, turns) if tags else _untold(case, turns)
    return Marked(text=text, spans=tuple(spans), lost=_lost(case, spans, turns))


def _lost(case: _Case, spans: Sequence[Span], turns: Sequence[int]) -> tuple[int, ...]:
    """Trained messages whose reasoning the template dropped, or put where it is not trained."""
    thoughts = {k: (case.chat[k].get("reasoning_content") or "").strip() for k in turns}
    return tuple(k for k, said in thoughts.items() if said and not any(said in case.text[a:b] for a, b in spans))


# ---------------------------------------------------------------------------------------------- prefix, substitution


def _untold(case: _Case, turns: Sequence[int]) -> list[Span]:
    plain = [k for k in turns if case.chat[k]["role"] == "assistant" and case.chat[k].keys() == {"role", "content"}]
    found = _at_once(case, plain) if len(plain) > 1 and case.template.header else {}
    return [found[k] if k in found else _prove(case, k) for k in turns]


def _at_once(case: _Case, plain: Sequence[int]) -> dict[int, Span]:
    """The spans of these turns, or none of them."""
    template, text = case.template, case.text
    chat = [m | {"content": MARKER} if k in plain else m for k, m in enumerate(case.chat)]
    marked = try_text(template, chat, tools=case.tools)
    if marked is None or MARKER[0] in text or (case.end_of_turn and not template.ending):
        return {}
    between = marked.split(MARKER)
    if len(between) != len(plain) + 1 or not text.startswith(between[0]):
        return {}
    spans, at = {}, len(between[0])
    for k, (before, after) in zip(plain, pairwise(between), strict=True):
        content: str = case.chat[k]["content"]
        said = next((c for c in (content, content.strip()) if text.startswith(c + after, at)), None)
        if said is None or not before.endswith(template.header) or not after.startswith(template.ending):
            return {}
        spans[k] = (at, at + len(said) + (len(template.ending) if case.end_of_turn else 0))
        at += len(said) + len(after)
    return spans if at == len(text) else {}


def _prove(case: _Case, k: int) -> Span:
    assistant = case.chat[k]["role"] == "assistant"
    span = (_by_prefix(case, k) if assistant else None) or _by_substitution(case, k, assistant)
    if span is None:
        raise DataError(
            f"the chat template rewrites this conversation: nothing proves which text is messages[{k}]",
            where=case.source,
            expected="a template that writes each turn the same, whatever follows it",
            got=f"one where the text of messages[:{k + 1}] is not the beginning of the whole",
            fix=_FIX,
        )
    return span


def _by_prefix(case: _Case, k: int) -> Span | None:
    before, turn = case.cut(k, prompt=True), case.cut(k + 1)
    if before is None or turn is None or not turn.startswith(before):
        return None
    end = _end(case, turn, k)
    if end < len(before) or not case.text.startswith(turn[:end]):
        return None
    return len(before), end


def _end(case: _Case, turn: str, k: int) -> int:
    """Where the last turn of ``turn`` stops being trained: after its end of turn, or before it."""
    body, ending = _ending(case.template, turn)
    if case.end_of_turn and not ending:
        raise _endless(case, k)
    return len(body) + (len(ending) if case.end_of_turn else 0)


def _ending(template: Template, text: str) -> tuple[str, str]:
    """``text`` up to its end of turn, and the end of turn; "" where it has none. What follows is left out."""
    body = text.rstrip()
    if template.trailer.strip():
        body = body.removesuffix(template.trailer.rstrip()).rstrip()
    ending = next((e for e in template.endings if body.endswith(e)), "") if body.endswith(template.endings) else ""
    return body[: len(body) - len(ending)], ending


def _endless(case: _Case, k: int) -> DataError:
    return DataError(
        f"the chat template writes no token that ends messages[{k}], so a model cannot learn to stop",
        where=case.source,
        expected="a special token after an assistant's turn, since data.end_of_turn is True",
        got=f"the turn ends in {case.text.rstrip()[-20:]!r}" if k == len(case.chat) - 1 else "none",
        fix="give a template that writes one (model.template), or set data.end_of_turn=False",
    )


def _by_substitution(case: _Case, k: int, assistant: bool) -> Span | None:
    message = case.chat[k]
    kept = {key: message[key] for key in ("role", "name", "tool_call_id") if key in message}
    chat = [*case.chat[:k], kept | {"content": MARKER}, *case.chat[k + 1 :]]
    marked = try_text(case.template, chat, tools=case.tools)
    if marked is None or marked.count(MARKER) != 1 or MARKER[0] in case.text:
        return None
    before, after = marked.split(MARKER)
    start, end = len(before), len(case.text) - len(after)
    if end < start or not (case.text.startswith(before) and case.text.endswith(after)):
        return None
    if not _owns(case, k, case.text[start:end], before, after):
        return None
    return _with_ending(case, k, start, end) if assistant else (start, end)


def _owns(case: _Case, k: int, image: str, before: str, after: str) -> bool:
    """Whether ``image`` is text of message k and of no other."""
    if image.strip() in case.chat[k]["content"]:
        return True
    if "tool_calls" not in case.chat[k] and "reasoning_content" not in case.chat[k]:
        return False
    others = [m["content"].strip() for i, m in enumerate(case.chat) if i != k]
    return all(other in before or other in after or other not in case.text for other in others)


def _with_ending(case: _Case, k: int, start: int, end: int) -> Span | None:
    """The span with the end of turn that messages[:k + 1] shows, if that is what follows here."""
    if not case.end_of_turn:
        return start, end
    turn = case.cut(k + 1)
    ending = case.template.ending if turn is None else _ending(case.template, turn)[1]
    if not ending:
        raise _endless(case, k)
    return (start, end + len(ending)) if case.text.startswith(ending, end) else None


# ------------------------------------------------------------------------------------------------------------- tags


def _tagged(case: _Case, tags: list[Span], turns: Sequence[int]) -> list[Span]:
    """The tags' spans of these messages; a message that is not an assistant's is found by substitution."""
    assistants = [k for k, message in enumerate(case.chat) if message["role"] == "assistant"]
    others = [_prove(case, k) for k in turns if k not in assistants]
    turns = [k for k in turns if k in assistants]
    if not turns:
        return others
    if not tags or any(end > start for (_, end), (start, _) in pairwise(tags)):
        raise _untagged(case, f"{len(tags)} tagged stretches" + (" that overlap" if tags else ""))
    ends = [_tag_end(case, span) for span in tags]
    if case.end_of_turn and not ends[-1][1]:
        raise _endless(case, assistants[-1])
    owners = None if turns == assistants else _owners(case, len(tags), assistants)
    return sorted([*others, *(span for i, (span, _) in enumerate(ends) if owners is None or owners[i] in turns)])


def _tag_end(case: _Case, span: Span) -> tuple[Span, bool]:
    """The span with or without its end of turn, and whether it has one."""
    start, end = span
    body, ending = _ending(case.template, case.text[start:end])
    if ending:
        return (start, end if case.end_of_turn else start + len(body)), True
    if case.template.ending and case.text.startswith(case.template.ending, end):
        return (start, end + (len(case.template.ending) if case.end_of_turn else 0)), True
    return span, False


def _owners(case: _Case, n: int, assistants: Sequence[int]) -> list[int]:
    """Which message each tagged stretch belongs to: seen by adding to every turn a marker of its own."""
    markers = {k: f"{MARKER}{k}{MARKER}" for k in assistants}
    chat = [m | {"content": m["content"] + markers[k]} if k in markers else m for k, m in enumerate(case.chat)]
    try:
        text, tags = render(case.template, chat, case.tools, tags=True)
    except REFUSALS as error:
        raise _untagged(case, f"a template that refuses other content ({error})") from error
    found = [[k for k, marker in markers.items() if marker in text[a:b]] for a, b in tags]
    if len(tags) != n or any(len(ks) != 1 for ks in found):
        raise _untagged(case, f"{n} tagged stretches for {len(assistants)} turns")
    return [ks[0] for ks in found]


def _untagged(case: _Case, got: str) -> DataError:
    return DataError(
        "the generation tags of the chat template do not tell which message is which",
        where=case.source,
        expected="one tagged stretch for each assistant turn",
        got=got,
        fix='mend the tags (model.template), or set data.mask to "assistant" or "all"',
    )
