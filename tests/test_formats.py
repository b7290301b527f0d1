"""Every format of rows, the policy on tools, and the message of each malformation."""

from __future__ import annotations

from typing import Any, get_args

import attrs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ft.data.formats import Conversation, Labelled, Message, Pair, Segments, Text, Tokens, convert, detect
from ft.data.messages import as_dict
from ft.errors import DataError
from ft.recipe.parts import Format

HI = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def read(row: Any, **options: Any) -> Any:
    return convert(row, source="train.jsonl:17", **options)


def error(row: Any, **options: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        read(row, **options)
    return caught.value


def turns(value: Conversation) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in value.messages]


def test_messages_keep_every_key_that_a_template_may_use():
    value = read(
        {
            "messages": [
                {"role": "system", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
                {"role": "user", "content": "1+1?", "name": "Ada"},
                {"role": "assistant", "content": None, "reasoning_content": "I add.", "tool_calls": [CALL]},
                {"role": "tool", "content": "2", "tool_call_id": "c1"},
                {"role": "assistant", "content": "2", "train": False, "thinking": "done"},
            ]
        }
    )
    assert turns(value) == [("system", "Be brief."), ("user", "1+1?"), ("assistant", ""), ("tool", "2"),
                            ("assistant", "2")]  # fmt: skip
    assert value.messages[1].name == "Ada"
    assert value.messages[2].reasoning_content == "I add."
    assert value.messages[3].tool_call_id == "c1"
    assert [m.train for m in value.messages] == [None, None, None, None, False]
    assert value.messages[4].extra == {"thinking": "done"}
    assert as_dict(value.messages[4]) == {"role": "assistant", "content": "2", "thinking": "done"}
    assert as_dict(value.messages[2])["tool_calls"] == [CALL]


@pytest.mark.parametrize(
    "call",
    [
        CALL,
        {"id": "c1", "function": {"name": "add", "arguments": '{"a": 1}'}},
        {"id": "c1", "name": "add", "arguments": {"a": 1}},
    ],
)
def test_tool_calls_are_held_in_one_form_with_arguments_as_an_object(call: dict[str, Any]):
    value = read({"messages": [HI[0], {"role": "assistant", "tool_calls": [call]}]})
    assert value.messages[1].tool_calls == (CALL,)
    string = as_dict(value.messages[1], arguments="string")["tool_calls"][0]["function"]["arguments"]
    assert string == '{"a": 1}'
    assert value.messages[1].tool_calls == (CALL,), "the string form is a copy"


def test_openai_old_function_call_is_a_tool_call():
    value = read({"messages": [HI[0], {"role": "assistant", "content": None, "function_call": {"name": "add"}}]})
    assert value.messages[1].tool_calls == ({"type": "function", "function": {"name": "add", "arguments": {}}},)


@pytest.mark.parametrize("tools", [[{"name": "add"}], '[{"name": "add"}]',
                                   [{"type": "function", "function": {"name": "add"}}]])  # fmt: skip
def test_tools_may_be_bare_wrapped_or_a_json_string(tools: Any):
    assert read({"messages": HI, "tools": tools}).tools == ({"type": "function", "function": {"name": "add"}},)


def test_sharegpt_names_become_roles_and_calls():
    value = read(
        {
            "system": "Be brief.",
            "conversations": [
                {"from": "human", "value": "1+1?"},
                {"from": "function_call", "value": '{"name": "add", "arguments": "{\\"a\\": 1}"}'},
                {"from": "observation", "value": "2"},
                {"from": "gpt", "value": "It is 2.", "weight": 0},
            ],
        }
    )
    assert turns(value) == [("system", "Be brief."), ("user", "1+1?"), ("assistant", ""), ("tool", "2"),
                            ("assistant", "It is 2.")]  # fmt: skip
    assert value.messages[2].tool_calls[0]["function"] == {"name": "add", "arguments": {"a": 1}}
    assert value.messages[4].train is False


def test_alpaca_with_input_system_and_history():
    row = {"instruction": "Add.", "input": "1 2", "output": "3", "system": "S", "history": [["a", "b"]]}
    assert turns(read(row)) == [("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "Add.\n\n1 2"),
                                ("assistant", "3")]  # fmt: skip
    assert turns(read({"instruction": "Add.", "input": "", "output": "3"}))[0] == ("user", "Add.")


def test_prompt_and_completion_as_strings_and_as_messages():
    assert read({"prompt": "Q", "completion": "A"}) == Segments(parts=(("Q", False), ("A", True)), whole=True)
    value = read({"prompt": HI, "completion": [{"role": "tool", "content": "x"}, HI[1]]})
    assert [m.train for m in value.messages] == [False, False, None, True]


def test_segments_text_and_tokens():
    row = {"segments": [{"text": "a", "train": False}, {"content": "b", "label": True}]}
    assert read(row) == Segments(parts=(("a", False), ("b", True)))
    assert read({"text": "T"}) == Text(text="T")
    tokens = read({"input_ids": [5, 6, 7, 0], "labels": [-100, 6, 7, -100], "attention_mask": [1, 1, 1, 0]})
    np.testing.assert_array_equal(tokens.input_ids, [5, 6, 7])
    np.testing.assert_array_equal(tokens.mask, [False, True, True])
    assert tokens.input_ids.dtype == np.int32
    assert read({"input_ids": [1, 2]}).mask is None
    np.testing.assert_array_equal(read({"input_ids": [1, 2], "loss_mask": [0, 1]}).mask, [False, True])


def test_lists_may_be_json_strings_as_in_csv():
    assert read({"messages": '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]'}) == read(
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    )
    assert read({"segments": '[{"text": "a", "train": true}]'}) == Segments(parts=(("a", True),))
    assert read({"input_ids": "[1, 2]"}).input_ids.tolist() == [1, 2]


def test_renamed_columns_and_null_columns():
    assert read({"body": "T", "id": 3}, columns={"body": "text"}) == Text(text="T")
    assert read({"text": "old", "body": "new"}, columns={"body": "text"}) == Text(text="new")
    assert detect({"messages": None, "text": "T"}) == "text"
    assert detect({"messages": HI, "prompt": "p", "completion": "c"}) == "messages"


def test_values_are_frozen():
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        read({"text": "T"}).text = "U"
    assert Message(role="user", content="a") == Message(role="user", content="a")


MALFORMED: list[tuple[Any, str, str]] = [
    (3, "train.jsonl:17: a row must be an object", "3 (a number)"),
    ({"a": 1, "messages": None}, "train.jsonl:17: no known format fits", "columns a, messages (null: messages)"),
    ({"messages": "Hi"}, "train.jsonl:17 messages: this must be a list", "'Hi' (a string)"),
    ({"messages": []}, "train.jsonl:17 messages: no messages", "an empty list"),
    ({"messages": [3]}, "train.jsonl:17 messages[0]: a message must be an object", "3 (a number)"),
    ({"messages": [*HI, {"role": "bot", "content": "x"}]}, "messages[2].role: unknown role", "'bot' (a string)"),
    ({"messages": [{"content": "x"}]}, "messages[0].role: a message without a role", "null"),
    ({"messages": [{"role": "user"}]}, "messages[0].content: a message without content", "null"),
    ({"messages": [{"role": "user", "content": {"x": 1}}]}, "messages[0].content: content must be text",
     "{'x': 1} (an object)"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content[0]: only text parts",
     "{'type': 'image'} (an object)"),
    ({"messages": [HI[0]]}, "messages: no assistant message", "roles user"),
    ({"messages": [{**HI[0], "train": "yes"}, HI[1]]}, "messages[0].train: this must say yes or no",
     "'yes' (a string)"),
    ({"messages": [{**HI[0], "tool_calls": [CALL]}, HI[1]]}, "messages[0].tool_calls: only the assistant calls",
     "user"),
    ({"messages": [HI[0], {**HI[1], "tool_calls": [{"function": {}}]}]}, "messages[1].tool_calls[0]: a tool call must",
     "{'function': {}} (an object)"),
    ({"messages": [HI[0], {**HI[1], "tool_calls": [{"name": "f", "arguments": "{x"}]}]},
     "messages[1].tool_calls[0].arguments: not JSON", "'{x' (a string)"),
    ({"messages": [HI[0], {**HI[1], "tool_calls": [{"name": "f", "arguments": [1]}]}]},
     "messages[1].tool_calls[0].arguments: arguments must be an object", "[1] (a list)"),
    ({"messages": HI, "tools": "none"}, "tools: not JSON", "'none' (a string)"),
    ({"messages": HI, "tools": [{"type": "function"}]}, "tools[0]: a tool must name", "{'type': 'function'}"),
    ({"messages": [{"role": "system", "content": "a"}, *HI], "system": "b"}, "system: two system prompts", "'b'"),
    ({"conversations": [{"from": "alien", "value": "x"}]}, "conversations[0].from: unknown role", "'alien'"),
    ({"conversations": [{"from": "human", "value": 3}]}, "conversations[0].value: content must be text", "3"),
    ({"instruction": "a", "output": 3}, "output: this must be a string", "3 (a number)"),
    ({"instruction": "a", "output": ""}, "output: this is empty", "an empty string"),
    ({"instruction": "a", "output": "b", "history": [["x"]]}, "history[0]: not a pair", "['x'] (a list)"),
    ({"prompt": "a", "completion": HI}, "completion: prompt and completion differ", "prompt 'a' (a string)"),
    ({"prompt": HI, "completion": [HI[0]]}, "completion: no assistant message", "roles user"),
    ({"prompt": "a", "completion": ""}, "completion: this is empty", "an empty string"),
    ({"segments": [{"text": "a", "train": 1}]}, "segments[0].train: a segment must say", "1 (a number)"),
    ({"segments": [{"train": True}]}, "segments[0].text: this must be a string", "null"),
    ({"segments": [{"text": "a", "train": False}]}, "segments: no segment is trained", "[{"),
    ({"text": ["a"]}, "text: this must be a string", "['a'] (a list)"),
    ({"text": "a\ud800"}, "text: half of a surrogate pair", "'\\ud800' at character 1"),
    ({"input_ids": []}, "input_ids: token ids must be there", "[] (a list)"),
    ({"input_ids": [1, -1]}, "input_ids: token ids must be there", "[1, -1] (a list)"),
    ({"input_ids": [1, True]}, "input_ids: this must be a list of integers", "[1, True]"),
    ({"input_ids": [1, 2**40]}, "input_ids: too large", str(2**40)),
    ({"input_ids": [1, 2], "labels": [1]}, "labels: not as long", "1"),
    ({"input_ids": [1, 2], "labels": [2, -100]}, "labels[0]: a label is neither", "2"),
    ({"input_ids": [1, 2], "labels": [1, 2], "mask": [0, 1]}, "mask: two masks", "labels, mask"),
    ({"input_ids": [1, 2], "mask": [0, 2]}, "mask: this must be a list of 0 and 1", "[0, 2]"),
    ({"input_ids": [1, 2], "attention_mask": [0, 0]}, "attention_mask: no token is left", "zeros only"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "problem", "got"), MALFORMED)
def test_malformed_rows_say_where_what_and_what_stood_there(row: Any, problem: str, got: str):
    caught = error(row)
    assert problem in str(caught)
    assert str(caught).startswith("train.jsonl:17")
    assert got in caught.got
    assert caught.expected
    assert len(str(caught)) < 700


def test_a_named_format_says_which_column_is_missing():
    caught = error({"a": 1, "b": 2}, format="alpaca")
    assert caught.where == "train.jsonl:17 instruction"
    assert caught.got == "columns a, b"
    assert "a column to rename is not in the row" in str(error({"a": 1}, columns={"b": "text"}))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
NAMES = "messages conversations segments input_ids labels mask attention_mask prompt completion".split()
NAMES += "instruction input output system history tools text chosen rejected margin score_chosen".split()
KEYS = "role from content value text type train weight label tool_calls function_call name arguments function".split()
WORDS = st.sampled_from(["user", "assistant", "human", "gpt", "function_call", "text", "{}", "[]", '{"name": "f"}'])
NEARLY = st.recursive(
    WORDS | JSON,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=400, deadline=None)
@given(JSON | st.dictionaries(st.sampled_from(NAMES), NEARLY, max_size=5), st.sampled_from(get_args(Format)))
def test_any_json_value_is_a_value_or_a_data_error(row: Any, format: Format):
    try:
        value = read(row, format=format)
    except DataError as problem:
        assert problem.where.startswith("train.jsonl:17")
    else:
        assert isinstance(value, (Conversation, Segments, Text, Tokens, Pair, Labelled))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["user", "assistant"]), st.text(max_size=5)), max_size=4))
def test_good_messages_survive_unchanged(said: list[tuple[str, str]]):
    said = [*said, ("assistant", "end")]
    assert turns(read({"messages": [{"role": role, "content": text} for role, text in said]})) == said
