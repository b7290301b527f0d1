"""Messages of a conversation: OpenAI's spelling (role, content) and ShareGPT's (from, value), and their tools.

Policy on tools: a tool call is held as {"type": "function", "id"?, "function": {"name", "arguments"}} with
`arguments` an object. A JSON string is parsed, because most templates print the object themselves (a string would
be quoted twice) and some walk through its items. A template that wants a string gets it from
``as_dict(message, arguments="string")``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from attrs import field, frozen

from ft.data.place import fail, parsed, shown, text

ROLES = ("system", "developer", "user", "assistant", "tool")
_SHAREGPT = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
_KNOWN = frozenset(
    ("role", "from", "content", "value", "reasoning_content", "tool_calls", "function_call", "name", "tool_call_id",
     "train", "weight")
)  # fmt: skip


@frozen(kw_only=True)
class Message:
    """One turn. ``train``: False is never trained; True is trained where `Data.mask` is "message"; None is unsaid.

    ``content`` is "" where a turn is tool calls only. ``extra`` keeps keys we do not know: templates may use them.
    """

    role: str
    content: str
    reasoning_content: str | None = None
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    name: str | None = None
    tool_call_id: str | None = None
    train: bool | None = None
    extra: Mapping[str, Any] = field(factory=dict)


@frozen(kw_only=True)
class Conversation:
    """Turns for a chat template, with at least one of the assistant; ``tools`` in OpenAI's form."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()


def as_dict(message: Message, *, arguments: Literal["object", "string"] = "object") -> dict[str, Any]:
    """The message as templates see it: unset keys are left out, ``train`` is never shown."""
    optional = {
        "reasoning_content": message.reasoning_content,
        "name": message.name,
        "tool_call_id": message.tool_call_id,
    }
    seen = {**message.extra, "role": message.role, "content": message.content}
    seen |= {key: value for key, value in optional.items() if value is not None}
    if message.tool_calls:
        seen["tool_calls"] = [_call_as_dict(call, arguments) for call in message.tool_calls]
    return seen


def _call_as_dict(call: Mapping[str, Any], arguments: str) -> dict[str, Any]:
    function = dict(call["function"])
    if arguments == "string":
        function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": function}


def read_messages(value: Any, source: str, path: str, *, train: bool | None = None) -> tuple[Message, ...]:
    """The messages of a column. ``train`` False trains none of them; True the assistant's that do not say otherwise."""
    value = parsed(value, source, path)
    if not isinstance(value, (list, tuple)):
        raise fail(source, "this must be a list", path=path, expected="a list of messages", got=shown(value))
    if not value:
        raise fail(source, "no messages", path=path, expected="at least one message", got="an empty list")
    return tuple(_message(item, source, f"{path}[{i}]", train) for i, item in enumerate(value))


def _message(item: Any, source: str, path: str, train: bool | None) -> Message:
    if not isinstance(item, Mapping):
        raise fail(source, "a message must be an object", path=path, expected="{role, content}", got=shown(item))
    share = item.get("role") is None and item.get("from") is not None
    said = item["from"] if share else item.get("role")
    role = _role(said, source, f"{path}.{'from' if share else 'role'}")
    body = "value" if share and "content" not in item else "content"
    calls = _calls(item, said, body, source, path)
    if calls and role != "assistant":
        raise fail(source, "only the assistant calls tools", path=f"{path}.tool_calls",
                   expected="the role assistant", got=role)  # fmt: skip
    content = "" if said == "function_call" else _content(item.get(body), source, f"{path}.{body}", bool(calls))
    return Message(
        role=role,
        content=content,
        reasoning_content=_optional(item, "reasoning_content", source, path),
        tool_calls=calls,
        name=_optional(item, "name", source, path),
        tool_call_id=_optional(item, "tool_call_id", source, path),
        train=_train(item, source, path, None if train and role != "assistant" else train),
        extra={key: kept for key, kept in item.items() if key not in _KNOWN and kept is not None},
    )


def _role(said: Any, source: str, path: str) -> str:
    role = _SHAREGPT.get(said, said) if isinstance(said, str) else None
    if role not in ROLES:
        raise fail(
            source,
            "unknown role" if said is not None else "a message without a role",
            path=path,
            expected=f"one of {', '.join(ROLES)} (or {', '.join(_SHAREGPT)})",
            got=shown(said),
        )
    return role


def _content(value: Any, source: str, path: str, calls: bool) -> str:
    """Text, or the texts of a list of parts joined; nothing is content where there are tool calls."""
    if value is None and calls:
        return ""
    if isinstance(value, (list, tuple)):
        return "".join(_part(part, source, f"{path}[{i}]") for i, part in enumerate(value))
    if isinstance(value, str):
        return text(value, source, path)
    raise fail(
        source,
        "a message without content" if value is None else "content must be text",
        path=path,
        expected="a string, or a list of text parts",
        got=shown(value),
        fix='write "" where the turn is meant to be empty' if value is None else "write it as a (JSON) string",
    )


def _part(part: Any, source: str, path: str) -> str:
    said = part if isinstance(part, str) else part.get("text") if isinstance(part, Mapping) else None
    other = isinstance(part, Mapping) and part.get("type", "text") != "text"
    if other or not isinstance(said, str):
        raise fail(source, "only text parts can be trained", path=path,
                   expected='{"type": "text", "text": "..."}', got=shown(part))  # fmt: skip
    return text(said, source, path)


def _optional(item: Mapping[str, Any], key: str, source: str, path: str) -> str | None:
    value = item.get(key)
    return value if value is None else text(value, source, f"{path}.{key}")


def _train(item: Mapping[str, Any], source: str, path: str, default: bool | None) -> bool | None:
    """`train`, or OpenAI's `weight` of 0 or 1."""
    key = "train" if item.get("train") is not None else "weight"
    value = item.get(key)
    if value is None:
        return default
    if not isinstance(value, (bool, int)) or value not in (0, 1):
        raise fail(source, "this must say yes or no", path=f"{path}.{key}", expected="true or false",
                   got=shown(value))  # fmt: skip
    return bool(value) and default is not False


def _calls(item: Mapping[str, Any], said: Any, body: str, source: str, path: str) -> tuple[dict[str, Any], ...]:
    """`tool_calls`, or the one call of `function_call`, or a ShareGPT turn that is a call."""
    if said == "function_call":
        key, value = body, parsed(item.get(body), source, f"{path}.{body}", needed=True)
    elif item.get("tool_calls") is not None:
        key, value = "tool_calls", parsed(item["tool_calls"], source, f"{path}.tool_calls")
    elif item.get("function_call") is not None:
        key, value = "function_call", [item["function_call"]]
    else:
        return ()
    value = [value] if isinstance(value, Mapping) else value
    if not isinstance(value, (list, tuple)):
        raise fail(source, "this must be a list", path=f"{path}.{key}", expected="a list of tool calls",
                   got=shown(value))  # fmt: skip
    return tuple(_call(call, source, f"{path}.{key}[{i}]") for i, call in enumerate(value))


def _call(call: Any, source: str, path: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise fail(
            source,
            "a tool call must name its function",
            path=path,
            expected='{"function": {"name": "...", "arguments": {...}}}',
            got=shown(call),
        )
    held = function.get("arguments")
    arguments = {} if held in (None, "") else parsed(held, source, f"{path}.arguments", needed=True)
    if not isinstance(arguments, Mapping):
        raise fail(source, "arguments must be an object", path=f"{path}.arguments",
                   expected="an object, or an object as a JSON string", got=shown(held))  # fmt: skip
    outer = {key: kept for key, kept in call.items() if kept is not None and key != "function"}
    if function is call:  # flat: name and arguments stand beside the id
        outer = {key: outer[key] for key in ("id",) if key in outer}
        function = {key: kept for key, kept in call.items() if key not in ("id", "type")}
    return {**outer, "type": "function", "function": {**function, "arguments": dict(arguments)}}


def read_tools(value: Any, source: str, path: str) -> tuple[dict[str, Any], ...]:
    """Tools in OpenAI's form; a JSON string is parsed, a bare {"name", ...} is wrapped, nothing is no tools."""
    if value in (None, ""):
        return ()
    value = parsed(value, source, path, needed=True)
    if not isinstance(value, (list, tuple)):
        raise fail(source, "this must be a list", path=path, expected="a list of tools", got=shown(value))
    return tuple(_tool(tool, source, f"{path}[{i}]") for i, tool in enumerate(value))


def _tool(tool: Any, source: str, path: str) -> dict[str, Any]:
    tool = parsed(tool, source, path)
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise fail(
            source,
            "a tool must name its function",
            path=path,
            expected='{"type": "function", "function": {"name": "...", "parameters": {...}}}',
            got=shown(tool),
        )
    return dict(tool) if "function" in tool else {"type": "function", "function": dict(function)}
