"""Chat templates in the shapes that models have, and which characters of them are trained.

The templates are small look-alikes written for these tests. ``spans`` gives the trained stretches as text.
"""

import warnings

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ft.data.masks import Mask, mark, wanted
from ft.data.messages import Conversation, Message
from ft.data.template import make_template, parse, render_text
from ft.data.tokenizer import byte_tokenizer
from ft.errors import DataError

CHATML = """\
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif -%}
"""
TAGGED = """\
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}
{%- else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif -%}
"""
TAGGED_OUTSIDE = TAGGED.replace(
    "{{ m.content + '<|im_end|>' }}{% endgeneration %}", "{{ m.content }}{% endgeneration %}{{ '<|im_end|>' }}"
)
LLAMA3 = """\
{{- bos_token }}
{%- for m in messages %}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor -%}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif -%}
"""
GEMMA = """\
{{- bos_token }}
{%- if messages[0].role == 'system' %}{% set prefix = messages[0].content + '\n\n' %}{% set rest = messages[1:] %}
{%- else %}{% set prefix = '' %}{% set rest = messages %}{% endif -%}
{%- for m in rest %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + (prefix if loop.first else '') }}
{{- m.content | trim + '<end_of_turn>\n' }}{% endfor -%}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif -%}
"""
MISTRAL = """\
{{- bos_token }}
{%- for m in messages %}
{%- if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}
{%- else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor -%}
"""
MISTRAL_MOVING = """\
{{- bos_token }}
{%- if messages[0].role == 'system' %}{% set system = messages[0].content + '\n\n' %}{% set rest = messages[1:] %}
{%- else %}{% set system = '' %}{% set rest = messages %}{% endif -%}
{%- for m in rest %}
{%- if m.role == 'user' %}
{{- '[INST] ' + (system if loop.index0 >= (rest | length) - 2 else '') + m.content + '[/INST]' }}
{%- else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor -%}
"""
QWEN3 = """\
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{%- set content = m.content.split('</think>')[-1].lstrip('\n') %}
{%- set reasoning = m.reasoning_content or '' %}
{%- if '</think>' in m.content %}
{%- set reasoning = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') %}{% endif %}
{{- '<|im_start|>assistant\n' }}
{%- if loop.index0 > ns.last and (loop.last or reasoning) %}
{{- '<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' }}{% endif %}
{{- content }}
{%- for call in m.tool_calls or [] %}
{{- ('\n' if content or not loop.first else '') + '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson }}{{ '}\n</tool_call>' }}{% endfor %}
{{- '<|im_end|>\n' }}
{%- elif m.role == 'tool' %}{{ '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}
{%- else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif -%}
"""
HARMONY = """\
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + ('<|return|>' if loop.last else '<|end|>') }}
{%- else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor -%}
{%- if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif -%}
"""
PHI = """\
{%- for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor -%}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif -%}
"""
ALWAYS_PROMPTS = """\
{%- for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}{{ '<|assistant|>' }}"""
GLM = """\
{%- for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor -%}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif -%}
"""
NO_PROOF = """\
{%- for m in messages %}{{ '<|im_start|>' + m.role + (messages | length) | string + '\n' }}
{{- m.content | replace('e', loop.revindex | string) + '<|im_end|>\n' }}{% endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant' + (messages | length) | string + '\n' }}{% endif -%}
"""
SPECIALS = (
    "<s> </s> <|eot_id|> <|start_header_id|> <|end_header_id|> <start_of_turn> <end_of_turn> <|start|> <|end|> "
    "<|message|> <|channel|> <|return|> <|user|> <|assistant|> <|system|>"
).split()


def tokenizer_of(source, **tokens):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIALS, **tokens})
    tokenizer.chat_template = source
    return tokenizer


def template_of(source, *, tools=False, thinking=None):
    return make_template(tokenizer_of(source, bos_token="<s>", eos_token="</s>"), tools=tools, thinking=thinking)


def user(text, **more):
    return Message(role="user", content=text, **more)


def said(text, **more):
    return Message(role="assistant", content=text, **more)


def call(name, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def marked(source, *messages, mask: Mask = "assistant", end_of_turn=True, thinking=None, tools=()):
    template = template_of(source, thinking=thinking, tools=bool(tools))
    conversation = Conversation(messages=messages, tools=tools)
    return mark(template, conversation, mask=mask, end_of_turn=end_of_turn, source="f.jsonl:3")


def spans(source, *messages, **options):
    result = marked(source, *messages, **options)
    return [result.text[a:b] for a, b in result.spans]


TWO = (user("hi"), said("hello"), user("bye"), said("ciao"))


@pytest.mark.parametrize(
    ("source", "first", "last", "ending"),
    [
        (CHATML, "hello", "ciao", "<|im_end|>"),
        (TAGGED, "hello", "ciao", "<|im_end|>"),
        (TAGGED_OUTSIDE, "hello", "ciao", "<|im_end|>"),
        (LLAMA3, "hello", "ciao", "<|eot_id|>"),
        (GEMMA, "hello", "ciao", "<end_of_turn>"),
        (MISTRAL, " hello", " ciao", "</s>"),
        (MISTRAL_MOVING, " hello", " ciao", "</s>"),
        (PHI, "hello", "ciao", "<|end|>"),
        (ALWAYS_PROMPTS, "hello", "ciao", "<|end|>"),
    ],
    ids=["chatml", "tagged", "tagged-outside", "llama3", "gemma", "mistral", "mistral-moving", "phi", "always"],
)
def test_shapes(source, first, last, ending):
    assert spans(source, *TWO) == [first + ending, last + ending]
    assert spans(source, *TWO, mask="last") == [last + ending]
    assert spans(source, *TWO, end_of_turn=False) == [first, last]
    assert spans(source, *TWO[:3]) == [first + ending]  # ends with the user


def test_the_text_is_the_templates():
    result = marked(CHATML, *TWO[:2])
    assert result.text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>\n"
    assert result.spans == ((len("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"), len(result.text) - 1),)


@pytest.mark.parametrize("source", [CHATML, TAGGED])
def test_all_is_all(source):
    result = marked(source, *TWO, mask="all")
    assert result.spans == ((0, len(result.text)),)


@pytest.mark.parametrize("source", [CHATML, TAGGED, LLAMA3, MISTRAL])
def test_message_flags(source):
    messages = (user("hi"), said("hello", train=False), user("bye"), said("ciao", train=True), user("x"), said("y"))
    everything = spans(source, user("hi"), said("hello"), user("bye"), said("ciao"), user("x"), said("y"))
    assert spans(source, *messages) == everything[1:]  # False is never trained
    assert spans(source, *messages, mask="message") == everything[1:2]  # only what says True


def test_a_user_message_can_be_trained():
    for source in (CHATML, TAGGED):
        assert spans(source, user("hi", train=True), said("hello"), mask="message") == ["hi"]
        assert spans(source, user("hi", train=True), said("oh", train=True), mask="message") == ["hi", "oh<|im_end|>"]


def test_wanted():
    messages = (user("a"), said("b"), user("c", train=True), said("d", train=False))
    assert (
        wanted(messages, "assistant") == [1] and wanted(messages, "last") == [] and wanted(messages, "message") == [2]
    )


def test_a_conversation_that_the_assistant_begins():
    """Its prefix is no conversation: gemma's refuses it, llama's is empty."""
    assert spans(LLAMA3, said("hello"), user("hi")) == ["hello<|eot_id|>"]
    with pytest.raises(
        DataError, match=r"f\.jsonl:3: the chat template refuses this conversation\n.*roles must alternate"
    ):
        spans(GEMMA, said("hello"), user("hi"))


def test_a_system_prompt_that_moves_is_proven_by_substitution():
    messages = (Message(role="system", content="be kind"), *TWO)
    result = marked(MISTRAL_MOVING, *messages)
    assert result.text == "<s>[INST] hi[/INST] hello</s>[INST] be kind\n\nbye[/INST] ciao</s>"
    # The space before an earlier answer is the template's; that of the last is what sampling would start with.
    assert [result.text[a:b] for a, b in result.spans] == ["hello</s>", " ciao</s>"]


# ------------------------------------------------------------------------------------------------------- thinking


def test_qwen_drops_the_thinking_of_earlier_turns():
    messages = (user("1+1"), said("2", reasoning_content="easy"), user("2+2"), said("4", reasoning_content="hm"))
    result = marked(QWEN3, *messages)
    assert "easy" not in result.text
    assert [result.text[a:b] for a, b in result.spans] == ["2<|im_end|>", "<think>\nhm\n</think>\n\n4<|im_end|>"]
    assert result.lost == (1,)
    last = marked(QWEN3, *messages, mask="last")
    assert [last.text[a:b] for a, b in last.spans] == ["<think>\nhm\n</think>\n\n4<|im_end|>"] and last.lost == ()


def test_qwen_without_thinking():
    assert spans(QWEN3, *TWO) == ["hello<|im_end|>", "<think>\n\n</think>\n\nciao<|im_end|>"]
    # Told not to think, sampling starts after the empty block, and so does the mask.
    assert spans(QWEN3, *TWO, thinking=False) == ["hello<|im_end|>", "ciao<|im_end|>"]


def test_qwen_thinking_in_the_content():
    inline = said("<think>\nhm\n</think>\n\n4")
    assert spans(QWEN3, user("a"), inline, user("b"), inline) == [
        "4<|im_end|>",
        "<think>\nhm\n</think>\n\n4<|im_end|>",
    ]


def test_qwen_calls():
    calls = (call("add", a=1, b=2), call("stop"))
    messages = (user("go"), said("", tool_calls=calls), Message(role="tool", content="3"), said("done"))
    first = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>\n'
    first += '<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call><|im_end|>'
    # messages[:2] alone ends with an empty thinking block that the whole has not: substitution proves it.
    assert spans(QWEN3, *messages) == [first, "<think>\n\n</think>\n\ndone<|im_end|>"]
    thought = (user("go"), said("", tool_calls=calls, reasoning_content="so"), *messages[2:])
    assert spans(QWEN3, *thought)[0] == "<think>\nso\n</think>\n\n" + first


def test_content_that_looks_like_the_template_changes_nothing():
    trap = "x<|im_end|>\n<|im_start|>assistant\ny"
    for source in (CHATML, QWEN3, TAGGED):
        first, last = spans(source, user(trap), said(trap), user(trap), said(trap))
        assert first == trap + "<|im_end|>" and last.removeprefix("<think>\n\n</think>\n\n") == trap + "<|im_end|>"


words = st.lists(
    st.sampled_from(["a", " ", "\n", "<|im_end|>", "\n<|im_start|>assistant\n", "é", "\ue000"]), max_size=4
)
texts = words.map("".join)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=3), st.booleans(), st.sampled_from(["assistant", "last"]))
def test_proofs_agree_with_tags_on_any_content(turns, end_of_turn, mask):
    messages = [m for question, answer in turns for m in (user(question), said(answer))]
    options = {"end_of_turn": end_of_turn, "mask": mask}
    proven, tagged = marked(CHATML, *messages, **options), marked(TAGGED, *messages, **options)
    assert proven.text == tagged.text
    assert proven.spans == tagged.spans


def test_text_of_another_message_is_never_taken_for_a_turn():
    """Echoes the question inside the answer: what varies with the answer is more than the answer."""
    echo = """\
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' and not loop.last and m.content != 'x' %}{{ messages[loop.index0 - 1].content }}{% endif %}
{{- m.content + '<|im_end|>\n' }}{% endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif -%}
"""
    assert spans(echo, *TWO) == ["hello<|im_end|>", "ciao<|im_end|>"]  # the echo does not depend on the answer
    moves = echo.replace("m.content != 'x'", "'turn' not in m.content")
    with pytest.raises(DataError, match="nothing proves"):
        spans(moves, *TWO)


# --------------------------------------------------------------------------------------------------------- errors


def test_no_proof_is_an_error():
    with pytest.raises(DataError) as error:
        spans(NO_PROOF, *TWO)
    for part in ("f.jsonl:3", "messages[1]", "{% generation %}", 'data.mask to "last" or "all"'):
        assert part in str(error.value)
    assert len(spans(NO_PROOF, *TWO, mask="all")) == 1


def test_what_stands_around_a_turn_must_not_depend_on_it():
    counted = CHATML.replace("m.role + '\n'", "m.role + (m.content | length) | string + '\n'", 1)
    assert "hello" in marked(counted, *TWO, mask="all").text
    with pytest.raises(DataError, match="nothing proves"):
        spans(counted, *TWO)


def test_harmony_ends_earlier_turns_otherwise():
    with pytest.raises(DataError, match="nothing proves"):
        spans(HARMONY, *TWO)
    assert spans(HARMONY, *TWO, mask="last") == ["<|channel|>final<|message|>ciao<|return|>"]
    assert spans(HARMONY, *TWO, end_of_turn=False) == [f"<|channel|>final<|message|>{x}" for x in ("hello", "ciao")]


def test_a_template_without_an_end_of_turn():
    with pytest.raises(DataError) as error:
        spans(GLM, *TWO)
    assert "cannot learn to stop" in str(error.value) and "data.end_of_turn=False" in str(error.value)
    assert spans(GLM, *TWO, end_of_turn=False) == ["hello", "ciao"]
    with pytest.raises(DataError, match="cannot learn to stop"):  # the header at its end is no end of turn
        spans(ALWAYS_PROMPTS.replace("<|end|>", ""), *TWO)


def test_an_end_of_turn_that_is_plain_text():
    plain = CHATML.replace("<|im_end|>", "<END>")
    assert spans(plain, *TWO) == ["hello<END>", "ciao<END>"]
    assert spans(plain, *TWO, end_of_turn=False) == ["hello", "ciao"]


def test_tags_that_mark_nothing():
    with pytest.raises(DataError, match="0 tagged stretches"):
        spans(TAGGED.replace("m.role == 'assistant'", "m.role == 'robot'"), *TWO)


def test_tags_within_tags():
    inner = "{% generation %}{{ m.content }}{% endgeneration %}{{ '<|im_end|>' }}"
    nested = TAGGED.replace("{{ m.content + '<|im_end|>' }}{% endgeneration %}", inner + "{% endgeneration %}")
    with pytest.raises(DataError, match="4 tagged stretches that overlap"):
        spans(nested, *TWO)


def test_tags_that_cannot_be_told_apart():
    twice = TAGGED.replace("{% endgeneration %}", "{% endgeneration %}{% generation %}{{ '' }}!{% endgeneration %}")
    with pytest.raises(DataError, match="4 tagged stretches for 2 turns"):
        spans(twice, *TWO, mask="last", end_of_turn=False)


def test_tags_inside_a_macro_are_not_believed():
    """The renderer would place them all where the macro's output begins."""
    source = """\
{%- macro turn(m) %}{{ '<|im_start|>' + m.role + '\n' }}
{%- generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}
{{- '\n' }}{% endmacro -%}
{%- for m in messages %}{{ turn(m) }}{% endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif -%}
"""
    assert not template_of(source).tagged and template_of(TAGGED).tagged
    assert spans(source, *TWO) == ["hello<|im_end|>", "ciao<|im_end|>"]


def test_arguments_as_the_template_wants_them():
    printed = CHATML.replace(
        "m.content + ", "m.content + (m.tool_calls[0].function.arguments if m.tool_calls else '') + "
    )
    python = CHATML.replace("+ m.content", "~ (m.tool_calls[0].function.arguments if m.tool_calls else m.content)")
    message = said("", tool_calls=(call("f", a=1),))
    assert spans(printed, user("x"), message) == ['{"a": 1}<|im_end|>']  # an object cannot be added to a string
    assert spans(python, user("x"), message) == ['{"a": 1}<|im_end|>']  # an object would read {'a': 1}
    assert template_of(QWEN3).arguments == "object"


def test_templates_run_in_a_sandbox():
    with pytest.raises(DataError, match="refuses"):
        spans("{{ messages.__class__.__mro__[1].__subclasses__() }}", *TWO)


def test_tokenizer_without_a_template():
    tokenizer = tokenizer_of(None)
    with pytest.raises(DataError, match="no chat template"):
        make_template(tokenizer)


def test_a_template_that_is_no_jinja():
    with pytest.raises(DataError, match="line 2 of the template"):
        make_template(tokenizer_of("{{ 1 }}\n{% for %}"))
    with pytest.raises(jinja2.TemplateSyntaxError):
        parse("{% for %}")


@pytest.mark.parametrize("source", [CHATML, TAGGED, LLAMA3, GEMMA, MISTRAL, MISTRAL_MOVING, QWEN3, PHI])
def test_oracle_text(source):
    """transformers' own rendering of the same messages."""
    tokenizer = tokenizer_of(source, bos_token="<s>", eos_token="</s>")
    template = make_template(tokenizer)
    chat = [{"role": "user", "content": " hi "}, {"role": "assistant", "content": "hello "}]
    for prompt in (False, True):
        theirs = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
        assert render_text(template, chat, prompt=prompt) == theirs


def test_nothing_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        marked(TAGGED, *TWO)
