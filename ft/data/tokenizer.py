"""Tokenizers: a model's own from its folder, and a byte-level one for rehearsals without any.

transformers is imported when a tokenizer is made, not before.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ft.errors import DataError, MissingFileError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(folder: Path, template: Path | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer in ``folder``, with its own chat template or the jinja file ``template``.

    Nothing is downloaded, and no code from the folder runs.

    Raises:
        MissingFileError: ``template`` does not exist.
        DataError: ``template`` is no jinja, or not UTF-8.
        ModelError: the folder holds no tokenizer, or one that cannot tell where in the text a token stands.
    """
    from transformers import AutoTokenizer

    folder = Path(folder)
    source = None if template is None else _read_template(Path(template))
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            "no tokenizer can be loaded from this folder",
            where=str(folder),
            expected="tokenizer.json and tokenizer_config.json",
            got=f"{_listing(folder)} ({_first_line(error)})",
            fix="copy the tokenizer files of the model into the folder",
        ) from error
    if not tokenizer.is_fast:
        raise ModelError(
            f"{type(tokenizer).__name__} cannot say which characters a token stands for, so no mask can be made",
            where=str(folder),
            expected="a fast tokenizer (tokenizer.json)",
            fix="convert it once: AutoTokenizer.from_pretrained(...).save_pretrained(...) with sentencepiece installed",
        )
    if source is not None:
        tokenizer.chat_template = source
    return tokenizer


def _listing(folder: Path) -> str:
    if not folder.is_dir():
        return "no such folder"
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "an empty folder"


def padding(tokenizer: Any) -> int | None:
    """The id of the token that pads rows: the tokenizer's, else the end-of-sequence token."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _read_template(path: Path) -> str:
    from jinja2 import TemplateSyntaxError

    from ft.data.template import parse

    if not path.is_file():
        raise MissingFileError(
            "the chat template does not exist", where=str(path), fix="correct model.template, or leave it out"
        )
    try:
        source = path.read_text("utf-8")
        parse(source)
    except UnicodeDecodeError as error:
        raise DataError("the chat template is not UTF-8", where=str(path), got=str(error)) from error
    except TemplateSyntaxError as error:
        raise DataError(
            f"the chat template is not jinja: {error.message}", where=f"{path}:{error.lineno}", fix="mend the template"
        ) from error
    return source


def stop_ids(tokenizer: PreTrainedTokenizerBase, folder: Path | None) -> frozenset[int]:
    """Tokens that end an answer: the tokenizer's end of sequence, and those of the model's generation_config.json."""
    own: Any = tokenizer.eos_token_id
    found = {own}
    config = folder / "generation_config.json" if folder else None
    if config is not None and config.is_file():
        ends = json.loads(config.read_text(encoding="utf-8")).get("eos_token_id")
        found |= set(ends) if isinstance(ends, list) else {ends}
    return frozenset(int(token) for token in found if token is not None)


END, START, STOP, THINK, UNTHINK = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"

# Reasoning stays in the history, so that what is trained is what will be seen. Tags hold what the model itself has
# to write: reasoning, content, calls and the end of the turn.
CHATML = """\
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages and messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}
    {{- 'Tools, one call per <tool_call> block as {"name": ..., "arguments": {...}}:\n' }}
    {%- for tool in tools %}{{- (tool | tojson) + '\n' }}{%- endfor %}
    {{- '<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\n' }}
        {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
        {%- generation %}
            {%- if message.reasoning_content and not (enable_thinking is defined and enable_thinking is false) %}
                {{- '<think>\n' + message.reasoning_content + '\n</think>\n\n' }}
            {%- endif %}
            {{- message.content or '' }}
            {%- for call in message.tool_calls or [] %}
                {{- '\n' if message.content or not loop.first else '' }}
                {{- '<tool_call>\n' + ({'name': call.function.name, 'arguments': call.function.arguments} | tojson) }}
                {{- '\n</tool_call>' }}
            {%- endfor %}
            {{- '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>tool\n' + (message.name + ': ' if message.name else '') + message.content + '<|im_end|>\n' }}
    {%- elif not (tools and loop.first and message.role == 'system') %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}
"""


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer of 261 tokens that needs no file: id b is byte b, then the five tokens of ChatML with thinking.

    Any text survives encoding and decoding.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(vocab={char: byte for byte, char in enumerate(_alphabet())}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (END, START, STOP)])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in (THINK, UNTHINK)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=STOP,
        pad_token=END,
        clean_up_tokenization_spaces=False,
        model_max_length=1 << 20,
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def _alphabet() -> list[str]:
    """The printable character that stands for each byte in byte-level tokenizers.

    Printable Latin-1 stands for itself; the other bytes, in order, are the characters from 256 on.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
