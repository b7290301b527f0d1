"""Chat templates: a conversation as text. Rendering is transformers' sandboxed renderer and nothing else.

Which characters of the text are trained is the matter of ``ft.data.masks``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import jinja2
import jinja2.ext
from attrs import field, frozen
from jinja2 import nodes

from ft.data.messages import Conversation, as_dict
from ft.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
Chat = list[dict[str, Any]]

# What a template's own code can raise: its refusals, and everything that goes wrong with the values it is given.
REFUSALS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
MARKER = "\ue000turn\ue001"  # private use characters: they stand in no text by chance


@frozen(kw_only=True)
class Template:
    """A chat template, with what it is given besides messages and what was learnt of it."""

    source: str
    values: Mapping[str, Any] = field(factory=dict)  # special tokens, enable_thinking
    tagged: bool = False
    endings: tuple[str, ...] = ()  # texts that can end a turn, longest first
    ending: str = ""  # what it writes after an assistant's content; "" for nothing
    trailer: str = ""  # what it adds once, after the last turn's end
    header: str = ""  # what it writes for a generation prompt
    arguments: Literal["object", "string"] = "object"  # how it wants a tool call's arguments


def make_template(tokenizer: PreTrainedTokenizerBase, *, tools: bool = False, thinking: bool | None = None) -> Template:
    """The chat template of a tokenizer, learnt by rendering a few small conversations.

    Args:
        tools: whether the rows have tools: some models have another template for them.
        thinking: passed as ``enable_thinking``; None leaves it to the template.
    """
    try:
        source = tokenizer.get_chat_template(None, [{}] if tools else None)
        parse(source)
    except jinja2.TemplateSyntaxError as error:
        raise DataError(
            f"the chat template is not jinja: {error.message}",
            where=f"{tokenizer.name_or_path}, line {error.lineno} of the template",
            fix="give another template (model.template)",
        ) from error
    except ValueError as error:
        raise DataError(
            "the tokenizer has no chat template, which rows of messages need",
            where=str(tokenizer.name_or_path),
            got=str(error).splitlines()[0],
            fix="name a jinja file in model.template, or use rows of `segments`, `text` or `tokens`",
        ) from error
    values = {name: value for name, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    extra = {} if thinking is None else {"enable_thinking": thinking}
    specials = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    specials |= {token for token in tokenizer.all_special_tokens if token}
    return _learn(source, tuple((values | extra).items()), tuple(sorted(specials)))


@lru_cache(maxsize=16)
def _learn(source: str, values: tuple[tuple[str, Any], ...], specials: tuple[str, ...]) -> Template:
    plain = Template(source=source, values=dict(values), tagged=_tagged(source))
    ending, trailer = _ending(plain, specials)
    endings = tuple(sorted({*specials, ending} - {""}, key=lambda s: (-len(s), s)))
    return Template(
        source=source,
        values=plain.values,
        tagged=plain.tagged,
        endings=endings,
        ending=ending,
        trailer=trailer,
        header=_header(plain),
        arguments=_arguments(plain),
    )


class _Generation(jinja2.ext.Extension):
    """Reads {% generation %} as a scope, so that the tree shows where the tags stand."""

    tags = {"generation"}  # noqa: RUF012 (the name and type are jinja's)

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


def parse(source: str) -> nodes.Template:
    """The tree of a chat template. Runs nothing; raises jinja2.TemplateSyntaxError."""
    return jinja2.Environment(extensions=[_Generation, jinja2.ext.loopcontrols]).parse(source)


def _tagged(source: str) -> bool:
    """Whether the template has generation tags, all of them where the renderer can place them.

    The renderer takes the length of what was written so far. Inside a buffered block that is the block's start.
    """
    tree = parse(source)
    buffers = (nodes.Macro, nodes.CallBlock, nodes.FilterBlock, nodes.AssignBlock)
    hidden = any(buffer.find(nodes.Scope) for buffer in tree.find_all(buffers))
    return not hidden and tree.find(nodes.Scope) is not None


def _ending(template: Template, specials: Sequence[str]) -> tuple[str, str]:
    """What the template writes after an assistant's content, and what it adds after that to the last turn only.

    Both are told apart by the same turn followed by another one: what differs there was added at the end. A header
    that is added though none was asked for is no end of turn.
    """
    chat: Chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": MARKER}]
    alone, followed = try_text(template, chat), try_text(template, [*chat, chat[0]])
    if alone is None or alone.count(MARKER) != 1:
        return "", ""
    after = alone.partition(MARKER)[2].rstrip()
    later = after if followed is None else followed.partition(MARKER)[2]
    if later.startswith(after):
        return after, ""
    ends = [at + len(s) for s in specials if (at := after.find(s)) >= 0]
    unasked = try_text(template, chat[:1]) == try_text(template, chat[:1], prompt=True)
    cut = max((end for end in ends if later.startswith(after[:end])), default=0 if unasked else len(after))
    return after[:cut], after[cut:]


def _header(template: Template) -> str:
    """What a generation prompt adds to a conversation; "" where that is nothing, or not only something at its end."""
    chat: Chat = [{"role": "user", "content": "a"}]
    without, asked = try_text(template, chat), try_text(template, chat, prompt=True)
    return asked[len(without) :] if without is not None and asked is not None and asked.startswith(without) else ""


def _arguments(template: Template) -> Literal["object", "string"]:
    """A string where the template cannot take an object, or prints one as Python would."""
    function = {"name": "f", "arguments": {"ft": 1}}
    message = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "0" * 9, "type": "function", "function": function}],
    }
    text = try_text(template, [{"role": "user", "content": "a"}, message])
    return "string" if text is None or "{'ft': 1}" in text else "object"


def render(
    template: Template, chat: Chat, tools: Sequence[Mapping[str, Any]], prompt: bool = False, tags: bool = False
) -> tuple[str, list[Span]]:
    """The text of a chat, and with ``tags`` the spans its generation tags mark. Raises what the template raises."""
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, spans = render_jinja_template(
        [chat],  # pyright: ignore[reportArgumentType]
        tools=[dict(tool) for tool in tools] or None,
        chat_template=template.source,
        add_generation_prompt=prompt,
        return_assistant_tokens_mask=tags,
        **template.values,
    )
    return str(texts[0]), list(spans[0]) if tags else []  # pyright: ignore[reportReturnType]


def render_text(
    template: Template, chat: Chat, *, tools: Sequence[Mapping[str, Any]] = (), prompt: bool = False
) -> str:
    """The text of a chat; ``prompt`` ends it with the header of an assistant's turn."""
    return render(template, chat, tools, prompt)[0]


def try_text(
    template: Template, chat: Chat, *, tools: Sequence[Mapping[str, Any]] = (), prompt: bool = False
) -> str | None:
    """None where the template refuses: not every part of a conversation is one."""
    try:
        return render_text(template, chat, tools=tools, prompt=prompt)
    except REFUSALS:
        return None


def chat_of(template: Template, conversation: Conversation) -> Chat:
    """Messages as the template wants them."""
    return [as_dict(message, arguments=template.arguments) for message in conversation.messages]


def refused(error: Exception, source: str) -> DataError:
    return DataError(
        "the chat template refuses this conversation",
        where=source,
        got=str(error) or type(error).__name__,
        fix="mend the row, give another template (model.template), or set data.on_bad_row to skip or quarantine",
    )
