"""Values into examples: the one path from text to tokens, for training, evaluation and prompts.

Texts go through the tokenizer in blocks, on all cores, while the next block is rendered. Shapes: L tokens of a row.

- Conversation: through the chat template; which writes all special tokens itself, so none are added.
- Text, and Segments that are ``whole`` (prompt and completion): what the tokenizer puts before a text (BOS) is put
  before it, and EOS after it where `Data.append_eos` says so; neither if it is there already.
- other Segments: literal; nothing is added.
- Tokens: as they are.
- Pair: two examples of one unit, the chosen one first. Labelled: one example.
- Steps: the prompt, then each step with `Data.separator` behind it. Marked is the last token of each, where the step is
  judged; no EOS follows.

Segments are tokenised each by itself, so that a token never spans a border and a prompt's tokens are those of
sampling. Tokenizers that begin every text with a space of their own cannot do that without adding spaces: there
the joined text is tokenised at once.

Masks are made from positions in the text, never from token ids. A token is trained only if all of its characters
lie in a trained span.
"""

from __future__ import annotations

import warnings
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from attrs import frozen

from ft.data.masks import mark
from ft.data.messages import Conversation
from ft.data.template import REFUSALS, Span, Template, chat_of, make_template, refused, render_text
from ft.data.values import Labelled, Pair, Segments, Single, Steps, Text, Tokens, Value
from ft.errors import DataError, RecipeError
from ft.recipe.parts import Data
from ft.types import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LOST = (
    "the chat template leaves the reasoning_content of trained messages out of what is trained (templates often drop "
    'it from earlier turns): such turns teach to answer without it; data.mask="last" trains the last turn only'
)


@frozen(kw_only=True)
class _Frame:
    """Ids put before and after a document."""

    head: tuple[int, ...] = ()
    tail: tuple[int, ...] = ()


_BARE = _Frame()
_BLOCK = 100  # rows tokenised at a time


@frozen(kw_only=True)
class _Plan:
    """A row before it is tokenised: texts, each with its trained spans."""

    texts: tuple[tuple[str, tuple[Span, ...]], ...]
    frame: _Frame = _BARE
    train_head: bool = False
    ends: bool = False  # of each trained span only the last token is marked


def render(rows: Sequence[tuple[Value, str]], tokenizer: PreTrainedTokenizerBase, data: Data) -> list[Example]:
    """An example for each (value, source), in order; for a Pair two, whose unit is its place in ``rows``. Lengths
    are not looked at.

    Raises:
        DataError: the chat template refuses a row, or does not prove its mask; a row begins with two BOS tokens; both
            answers of a pair give the same tokens; `Data.append_eos` where there is no end-of-sequence token.
        RecipeError: `Data.mask` is "all", and there are answers to be rated or compared.
    """
    singles = list(_singles(rows, data))
    plans = _plans([(value, source) for value, source, _ in singles], tokenizer, data)
    stamps = ((source, stamp) for _, source, stamp in singles)
    with ThreadPoolExecutor(1) as pool:  # the tokenizer works without the interpreter, which renders on meanwhile
        blocks = []
        while block := list(islice(plans, _BLOCK)):
            texts = [text for plan in block if isinstance(plan, _Plan) for text, _ in plan.texts]
            blocks.append((block, pool.submit(_encode, tokenizer, texts)))
        examples = [
            _example(tokens_L, mask_L, source, stamp)
            for block, encoded in blocks
            for (tokens_L, mask_L), (source, stamp) in zip(_assemble(block, encoded.result()), stamps, strict=False)
        ]
    _check_bos(examples, tokenizer)
    _check_pairs(examples)
    return examples


_PLAIN: Mapping[str, Any] = {}


def _example(tokens_L: np.ndarray, mask_L: np.ndarray, source: str, stamp: Mapping[str, Any]) -> Example:
    if "labels" not in stamp:
        return Example(tokens_L=tokens_L, mask_L=mask_L, source=source, **stamp)
    if int(mask_L.sum()) != len(stamp["labels"]):
        raise DataError(
            "two steps end in one token, or one has none",
            where=source,
            expected=f"{len(stamp['labels'])} last tokens of steps",
            got=str(int(mask_L.sum())),
            fix="set data.separator to text that is a token by itself, or mend the row",
        )
    label_L = np.zeros(len(tokens_L), np.float32)
    label_L[mask_L] = stamp["labels"]
    return Example(tokens_L=tokens_L, mask_L=mask_L, source=source, label_L=label_L)


def _singles(rows: Sequence[tuple[Value, str]], data: Data) -> Iterator[tuple[Single | Steps, str, Mapping[str, Any]]]:
    """Values of one example each, with its source and its other fields."""
    for unit, (value, source) in enumerate(rows):
        if isinstance(value, Steps):
            _check_mask(data)
            yield value, source, {"labels": value.labels}
            continue
        if not isinstance(value, (Pair, Labelled)):
            yield value, source, _PLAIN
            continue
        _check_mask(data)
        if isinstance(value, Labelled):
            yield value.answer, source, {"label": float(value.good)}
        else:
            stamp = {"unit": unit, "margin": value.margin}
            yield from ((value.chosen, source, stamp), (value.rejected, source, stamp))


def _check_mask(data: Data) -> None:
    if data.mask == "all":
        raise RecipeError(
            "answers are rated or compared by themselves, without their prompt",
            where="data.mask",
            expected='"assistant", "last" or "message"',
            got="all",
            fix='set data.mask="assistant", or Source.format to read these rows as something else',
        )


def _check_pairs(examples: Sequence[Example]) -> None:
    for chosen, rejected in pairwise(examples):
        if chosen.unit is not None and chosen.unit == rejected.unit and same(chosen, rejected):
            raise DataError(
                "the two answers become the same tokens",
                where=chosen.source,
                expected="answers that differ by more than what the chat template leaves out",
                fix="mend or remove the row, or set data.on_bad_row to skip or quarantine",
            )


def same(a: Example, b: Example) -> bool:
    """Whether two examples have the same tokens."""
    return np.array_equal(a.tokens_L, b.tokens_L)


def prompt(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, *, thinking: bool | None = None, source: str = ""
) -> np.ndarray:
    """tokens_L of a conversation and the header of the assistant's next turn: what sampling goes on from."""
    template = make_template(tokenizer, tools=bool(conversation.tools), thinking=thinking)
    return np.array(_encode(tokenizer, [_prompt_text(conversation, template, source)])[0].ids, np.int32)


def _prompt_text(conversation: Conversation, template: Template, source: str) -> str:
    try:
        return render_text(template, chat_of(template, conversation), tools=conversation.tools, prompt=True)
    except REFUSALS as error:
        raise refused(error, source) from error


def _encode(tokenizer: Any, texts: Sequence[str]) -> list[Any]:
    backend = tokenizer.backend_tokenizer
    if backend.padding is not None:
        backend.no_padding()
    if backend.truncation is not None:
        backend.no_truncation()
    return backend.encode_batch(texts, add_special_tokens=False)


def _plans(rows: Sequence[tuple[Single | Steps, str]], tokenizer: Any, data: Data) -> Iterator[_Plan | Tokens]:
    templates: dict[bool, Template] = {}
    frame = _frame(tokenizer, data) if any(_is_document(value) for value, _ in rows) else _BARE
    apart = _begins_clean(tokenizer) if any(isinstance(value, (Segments, Steps)) for value, _ in rows) else True

    def template_of(conversation: Conversation) -> Template:
        tools = bool(conversation.tools)
        if tools not in templates:
            templates[tools] = make_template(tokenizer, tools=tools, thinking=data.thinking)
        return templates[tools]

    for value, source in rows:
        if isinstance(value, Conversation):
            yield _chat(value, source, template_of(value), data)
        elif isinstance(value, Steps):
            asked, begin = value.prompt, _Frame(head=frame.head)
            if isinstance(asked, Conversation):
                asked, begin = _prompt_text(asked, template_of(asked), source), _BARE
            parts = [(asked, False), *((step + data.separator, True) for step in value.steps)]
            yield _Plan(texts=_stretches(parts, apart), frame=begin, ends=True)
        elif isinstance(value, Text):
            yield _Plan(texts=((value.text, ((0, len(value.text)),)),), frame=frame, train_head=True)
        elif isinstance(value, Segments):
            parts = value.parts if not (value.whole and data.mask == "all") else [(s, True) for s, _ in value.parts]
            yield _Plan(texts=_stretches(parts, apart), frame=frame if value.whole else _BARE)
        else:
            yield value


def _is_document(value: Single | Steps) -> bool:
    if isinstance(value, Steps):
        return isinstance(value.prompt, str)
    return isinstance(value, Text) or (isinstance(value, Segments) and value.whole)


def _chat(conversation: Conversation, source: str, template: Template, data: Data) -> _Plan:
    marked = mark(template, conversation, mask=data.mask, end_of_turn=data.end_of_turn, source=source)
    if marked.lost:
        warnings.warn(_LOST, stacklevel=2)
    return _Plan(texts=((marked.text, marked.spans),))


def _stretches(parts: Sequence[tuple[str, bool]], apart: bool) -> tuple[tuple[str, tuple[Span, ...]], ...]:
    if apart:
        return tuple((text, ((0, len(text)),) if train else ()) for text, train in parts if text)
    spans, at = [], 0
    for text, train in parts:
        spans += [(at, at + len(text))] if train else []
        at += len(text)
    return (("".join(text for text, _ in parts), tuple(spans)),)


def _frame(tokenizer: Any, data: Data) -> _Frame:
    """What the tokenizer puts before a text; and EOS, where wanted, whether it would add one or not."""
    encoding = tokenizer.backend_tokenizer.encode("a", add_special_tokens=True)
    added = encoding.special_tokens_mask
    head = encoding.ids[: added.index(0)] if 0 in added else []
    if not data.append_eos:
        return _Frame(head=tuple(head))
    if tokenizer.eos_token_id is None:
        raise DataError(
            "the tokenizer has no end-of-sequence token to end documents with",
            where="data.append_eos",
            expected="an eos_token in tokenizer_config.json",
            fix="name one there, or set data.append_eos=False",
        )
    return _Frame(head=tuple(head), tail=(int(tokenizer.eos_token_id),))


def _begins_clean(tokenizer: Any) -> bool:
    """Whether a text's tokens begin with that text, and with no space of the tokenizer's own."""
    a, b = _encode(tokenizer, ["a", "b"])
    return tokenizer.backend_tokenizer.decode(a.ids + b.ids, skip_special_tokens=False) == "ab"


def _assemble(plans: Sequence[_Plan | Tokens], encodings: Sequence[Any]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """tokens_L, mask_L of each row: its stretches end to end, in their frame."""
    left = iter(encodings)
    for plan in plans:
        if isinstance(plan, Tokens):
            yield plan.input_ids, np.ones(len(plan.input_ids), bool) if plan.mask is None else plan.mask
            continue
        parts = [_stretch(next(left), len(text), spans, plan.ends) for text, spans in plan.texts]
        tokens_L = np.concatenate([np.zeros(0, np.int32), *(tokens for tokens, _ in parts)])
        mask_L = np.concatenate([np.zeros(0, bool), *(mask for _, mask in parts)])
        yield (tokens_L, mask_L) if plan.frame == _BARE else _framed(plan, tokens_L, mask_L)


def _framed(plan: _Plan, tokens_L: np.ndarray, mask_L: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    head, tail = plan.frame.head, plan.frame.tail
    head = () if tuple(tokens_L[: len(head)]) == head else head
    tail = () if tail and tuple(tokens_L[-len(tail) :]) == tail else tail
    tokens_L = np.concatenate([np.array(head, np.int32), tokens_L, np.array(tail, np.int32)])
    mask_L = np.concatenate([np.full(len(head), plan.train_head), mask_L, np.ones(len(tail), bool)])
    return tokens_L, mask_L


def _stretch(encoding: Any, characters: int, spans: Sequence[Span], ends: bool) -> tuple[np.ndarray, np.ndarray]:
    tokens_L = np.array(encoding.ids, np.int32)
    mask_L = np.zeros(len(tokens_L), bool)
    for start, end in spans:
        if ends:
            mask_L[_past(encoding, len(tokens_L), end) - 1 :][:1] = len(tokens_L) > 0
        elif (start, end) == (0, characters):
            mask_L[:] = True
        else:
            mask_L[_first(encoding, len(tokens_L), start) : _past(encoding, len(tokens_L), end)] = True
    return tokens_L, mask_L


def _first(encoding: Any, n: int, start: int) -> int:
    """The first of n tokens with no character before ``start``.

    Some tokenizers leave a token's leading space out of its offsets: characters that no token claims count as the
    next one's. Places are asked for one by one, in a bisection: making a list of all of them takes a fifth of the
    time of tokenising.
    """
    token = bisect_left(range(n), start, key=lambda t: encoding.token_to_chars(t)[0])
    claimed = encoding.token_to_chars(token - 1)[1] if token else 0
    return token + 1 if claimed < start else token


def _past(encoding: Any, n: int, end: int) -> int:
    """How many of n tokens have no character from ``end`` on."""
    return bisect_right(range(n), end, key=lambda t: encoding.token_to_chars(t)[1])


def _check_bos(examples: Sequence[Example], tokenizer: Any) -> None:
    bos = tokenizer.bos_token_id
    for example in examples:
        if bos is not None and len(example) > 1 and example.tokens_L[0] == example.tokens_L[1] == bos:
            raise DataError(
                f"this row begins with two {tokenizer.bos_token!r}",
                where=example.source,
                expected="at most one beginning-of-sequence token",
                fix="take it out of the row's text, or out of the chat template",
            )
