"""The byte-level tokenizer, and loading a tokenizer from a folder."""

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ft.data.tokenizer import byte_tokenizer, load_tokenizer
from ft.errors import DataError, MissingFileError, ModelError

TOKENIZER = byte_tokenizer()
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


def text(chat, **options):
    return str(TOKENIZER.apply_chat_template(chat, tokenize=False, **options))


def test_ids_are_bytes():
    assert TOKENIZER.encode("Aé\n", add_special_tokens=False) == [65, 0xC3, 0xA9, 10]
    assert TOKENIZER.encode("<|im_start|>a<|im_end|>", add_special_tokens=False) == [257, 97, 258]
    assert TOKENIZER.encode("<think></think>") == [259, 260] and len(TOKENIZER) == 261
    assert (TOKENIZER.eos_token, TOKENIZER.pad_token, TOKENIZER.bos_token) == ("<|im_end|>", "<|endoftext|>", None)


@settings(max_examples=200, deadline=None)
@given(st.text())
@example("<think>é<|im_end|>")
def test_any_text_survives(words):
    ids = TOKENIZER.encode(words, add_special_tokens=False)
    assert TOKENIZER.decode(ids) == words
    if "<" not in words:
        assert ids == list(words.encode())


def test_template_by_hand():
    assert text(CHAT) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n"
    assert text(CHAT[:1], add_generation_prompt=True) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )  # fmt: skip
    silent = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert text(CHAT[:1], add_generation_prompt=True, enable_thinking=False) == silent
    assert text(CHAT, enable_thinking=False) == silent + "yo<|im_end|>\n"


def test_template_thinks_and_calls():
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    chat = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [call, call]},
        {"role": "tool", "name": "add", "content": "3"},
    ]
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    one = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    assert text(chat, tools=tools) == (
        "<|im_start|>system\nbe kind\n\n"
        'Tools, one call per <tool_call> block as {"name": ..., "arguments": {...}}:\n'
        '{"type": "function", "function": {"name": "add", "parameters": {}}}\n<|im_end|>\n'
        "<|im_start|>user\nhi<|im_end|>\n"
        f"<|im_start|>assistant\n<think>\nhm\n</think>\n\n{one}\n{one}<|im_end|>\n"
        "<|im_start|>tool\nadd: 3<|im_end|>\n"
    )
    assert text(chat[:2]).startswith("<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user")


def test_load_what_was_saved(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    words = "Grüße, 世界 <|im_end|>"
    assert loaded.encode(words) == TOKENIZER.encode(words)
    assert loaded.chat_template == TOKENIZER.chat_template and loaded.eos_token_id == 258


def test_a_template_file_overrides(tmp_path):
    TOKENIZER.save_pretrained(tmp_path / "model")
    (tmp_path / "t.jinja").write_text("{{ messages[0].content }}!", "utf-8")
    loaded = load_tokenizer(tmp_path / "model", tmp_path / "t.jinja")
    assert loaded.apply_chat_template(CHAT, tokenize=False) == "hi!"


def test_errors_name_the_place(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ModelError, match=r"no tokenizer can be loaded(.|\n)*config\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(ModelError, match="no such folder"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(MissingFileError, match=r"t\.jinja: the chat template does not exist"):
        load_tokenizer(tmp_path, tmp_path / "t.jinja")
    (tmp_path / "t.jinja").write_text("a\n{% for %}")
    with pytest.raises(DataError, match=r"t\.jinja:2: the chat template is not jinja"):
        load_tokenizer(tmp_path, tmp_path / "t.jinja")
    (tmp_path / "t.jinja").write_bytes(b"\xff")
    with pytest.raises(DataError, match="not UTF-8"):
        load_tokenizer(tmp_path, tmp_path / "t.jinja")


def test_code_of_the_folder_does_not_run(tmp_path):
    code = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": [None, "evil.Evil"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(code))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ModelError):
        load_tokenizer(tmp_path)
    assert not (tmp_path / "ran").exists()
