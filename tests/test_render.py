"""Rows to tokens and masks, against transformers' own chat tokenisation and against hand-worked ids."""

import numpy as np
import pytest
from test_template import CHATML, GEMMA, LLAMA3, MISTRAL, QWEN3, TAGGED, call, said, tokenizer_of, user
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from ft.data.formats import Segments, Text, Tokens
from ft.data.messages import Conversation, as_dict
from ft.data.render import prompt, render
from ft.data.tokenizer import byte_tokenizer
from ft.errors import DataError
from ft.recipe.parts import Data

BYTES = byte_tokenizer()
WORDS = "hello there héllo wörld the answer is 42 and ünïcode 世界 is fine hello there the the answer"
TURNS = (user("the answer?"), said("it is 42"), user("世界 and?"), said("ünïcode\nis fine"))


def bpe_tokenizer(*, bos=False):
    """Byte-level BPE, some merges, that puts <s> before a text if ``bos``."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>"]
    backend.train_from_iterator(
        [WORDS, "assistant\nuser\n"],
        trainers.BpeTrainer(vocab_size=330, special_tokens=specials, initial_alphabet=alphabet, show_progress=False),
    )
    if bos:
        backend.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=True),  # a token's offsets leave its leading space out
                processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)]),
            ]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def data(**options):
    return Data(train="x.jsonl", **options)


def one(value, tokenizer=BYTES, **options):
    return render([(value, "f.jsonl:1")], tokenizer, data(**options))[0]


def trained(example, tokenizer=BYTES):
    """Trained tokens as text, a | between stretches."""
    parts, inside = [], False
    for token, train in zip(example.tokens_L.tolist(), example.mask_L.tolist(), strict=True):
        if train:
            parts = [*parts, []] if not inside else parts
            parts[-1].append(token)
        inside = train
    return "|".join(str(tokenizer.decode(part)) for part in parts)


@pytest.mark.parametrize("source", [CHATML, TAGGED, LLAMA3, GEMMA, MISTRAL, QWEN3])
@pytest.mark.parametrize("make", [tokenizer_of, None], ids=["bytes", "bpe"])
def test_oracle_ids(source, make):
    tokenizer = bpe_tokenizer(bos=True) if make is None else tokenizer_of(source, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = source
    value = Conversation(messages=TURNS)
    # The end of turn of some of these is no special token of the BPE tokenizer, but the template's ending all the same.
    example = one(value, tokenizer)
    chat = [as_dict(message) for message in TURNS]
    assert example.tokens_L.tolist() == tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
    assert example.tokens_L.dtype == np.int32 and example.mask_L.dtype == bool and example.source == "f.jsonl:1"
    asked = prompt(Conversation(messages=TURNS[:3]), tokenizer).tolist()
    theirs = tokenizer.apply_chat_template(chat[:3], tokenize=True, return_dict=False, add_generation_prompt=True)
    assert asked == theirs


@pytest.mark.parametrize("source", [TAGGED, BYTES.chat_template])
@pytest.mark.parametrize("tokenizer", [byte_tokenizer(), bpe_tokenizer()], ids=["bytes", "bpe"])
def test_oracle_masks(source, tokenizer):
    tokenizer.chat_template = source
    messages = (user("a"), said("hello", reasoning_content="hm"), user("b"), said("", tool_calls=(call("f", a=1),)))
    messages = (*TURNS, *messages) if source != TAGGED else TURNS
    example = one(Conversation(messages=messages), tokenizer)
    theirs = tokenizer.apply_chat_template(
        [as_dict(message) for message in messages], return_dict=True, return_assistant_tokens_mask=True
    )
    assert example.tokens_L.tolist() == theirs["input_ids"]
    assert example.mask_L.astype(int).tolist() == theirs["assistant_masks"]


def test_with_and_without_tags_agree():
    for tokenizer in (byte_tokenizer(), bpe_tokenizer(bos=True)):
        for options in ({}, {"mask": "last"}, {"end_of_turn": False}, {"mask": "all"}):
            masks = []
            for source in (CHATML, TAGGED):
                tokenizer.chat_template = source
                masks.append(one(Conversation(messages=TURNS), tokenizer, **options).mask_L.tolist())
            assert masks[0] == masks[1], options


def test_masks_by_hand():
    value = Conversation(messages=TURNS)
    assert trained(one(value)) == "it is 42<|im_end|>|ünïcode\nis fine<|im_end|>"
    assert trained(one(value, end_of_turn=False)) == "it is 42|ünïcode\nis fine"
    assert trained(one(value, mask="last")) == "ünïcode\nis fine<|im_end|>"
    assert one(value, mask="all").mask_L.all()


def test_many_rows_keep_their_places():
    """One call of the tokenizer serves rows of all kinds."""
    rows = [
        (Text(text="abc"), "f:1"),
        (Conversation(messages=TURNS), "f:2"),
        (Segments(parts=(("a", False), ("b", True))), "f:3"),
        (Tokens(input_ids=np.array([7, 8, 9], np.int32)), "f:4"),
        (Segments(parts=(("p", False), ("c", True)), whole=True), "f:5"),
    ]
    together = render(rows, BYTES, data())
    assert [e.source for e in together] == ["f:1", "f:2", "f:3", "f:4", "f:5"]
    for row, example in zip(rows, together, strict=True):
        alone = render([row], BYTES, data())[0]
        assert alone.tokens_L.tolist() == example.tokens_L.tolist()
        assert alone.mask_L.tolist() == example.mask_L.tolist()
    assert render([], BYTES, data()) == []


def test_text():
    a, b, c = b"abc"
    example = one(Text(text="abc"))
    assert example.tokens_L.tolist() == [a, b, c, 258] and example.mask_L.all()
    assert one(Text(text="abc"), append_eos=False).tokens_L.tolist() == [a, b, c]
    assert one(Text(text="abc<|im_end|>")).tokens_L.tolist() == [a, b, c, 258]  # there already
    tokenizer = bpe_tokenizer(bos=True)
    theirs = tokenizer.encode("hello")
    assert theirs[0] == 0 and one(Text(text="hello"), tokenizer).tokens_L.tolist() == [*theirs, 1]
    assert one(Text(text="<s>hello"), tokenizer).tokens_L.tolist() == [*theirs, 1]
    assert one(Text(text="")).tokens_L.tolist() == [258]


def test_segments_are_literal():
    example = one(Segments(parts=(("<|im_start|>q", False), ("a", True), ("", True), ("<|im_end|>", True))))
    assert example.tokens_L.tolist() == [257, ord("q"), ord("a"), 258]
    assert example.mask_L.tolist() == [False, False, True, True]
    literal = one(Segments(parts=(("hello", False), (" there", True))), bpe_tokenizer(bos=True))
    assert 0 not in literal.tokens_L and 1 not in literal.tokens_L


def test_prompt_and_completion():
    value = Segments(parts=(("q", False), ("a", True)), whole=True)
    assert one(value).tokens_L.tolist() == [ord("q"), ord("a"), 258]
    assert one(value).mask_L.tolist() == [False, True, True]
    assert one(value, mask="all").mask_L.all()
    assert one(value, append_eos=False).tokens_L.tolist() == [ord("q"), ord("a")]
    begun = one(value, bpe_tokenizer(bos=True))
    assert begun.tokens_L[0] == 0 and begun.mask_L.tolist() == [False, False, True, True]


def test_segments_are_tokenised_apart():
    tokenizer = bpe_tokenizer()
    assert len(tokenizer.encode("hello")) < len(tokenizer.encode("hel")) + len(tokenizer.encode("lo"))
    example = one(Segments(parts=(("hel", False), ("lo", True))), tokenizer)
    assert trained(example, tokenizer) == "lo"
    assert example.tokens_L.tolist() == tokenizer.encode("hel") + tokenizer.encode("lo")


def test_segments_where_every_text_begins_with_a_space():
    """Apart, such tokenizers would put a space at every border."""
    vocabulary = {token: i for i, token in enumerate(["<unk>", "</s>", *"▁abc"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    example = one(Segments(parts=(("ab", False), ("c a", True)), whole=True), tokenizer)
    assert tokenizer.convert_ids_to_tokens(example.tokens_L.tolist()) == ["▁", "a", "b", "c", "▁", "a", "</s>"]
    assert example.mask_L.tolist() == [False, False, False, True, True, True, True]


def test_a_token_across_a_border_is_not_trained():
    """ "hello" is one token; a template whose header ends within it shares the token with the turn."""
    tokenizer = bpe_tokenizer(bos=True)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ ('hel' if m.role == 'assistant' else '') + m.content + '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'hel' }}{% endif %}"
    )
    assert len(tokenizer.encode("hello", add_special_tokens=False)) == 1
    example = one(Conversation(messages=(user("x"), said("lo the answer"))), tokenizer)
    assert trained(example, tokenizer) == " the answer</s>"


def test_a_leading_space_counts_as_its_tokens_own():
    """The header ends in a space, which the tokenizer joins to the first word and leaves out of its offsets."""
    tokenizer = bpe_tokenizer(bos=True)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    example = one(Conversation(messages=(user("x"), said("the answer"))), tokenizer)
    assert trained(example, tokenizer) == " answer</s>"


def test_masks_go_by_place_not_by_id():
    """pad is eos here, and eos stands in the question."""
    tokenizer = bpe_tokenizer()
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "</s>")
    example = one(Conversation(messages=(user("the</s>"), said("the</s>the"))), tokenizer)
    assert trained(example, tokenizer) == "the</s>the</s>"


def test_padding_and_truncation_of_the_tokenizer_do_not_leak_in():
    tokenizer = bpe_tokenizer()
    tokenizer.backend_tokenizer.enable_padding(length=50)
    tokenizer.backend_tokenizer.enable_truncation(2)
    example = one(Text(text="hello 42 there"), tokenizer)
    assert tokenizer.decode(example.tokens_L.tolist()) == "hello 42 there</s>"


def test_two_bos():
    tokenizer = bpe_tokenizer(bos=True)
    tokenizer.chat_template = "{{ bos_token }}" + LLAMA3
    with pytest.raises(DataError, match=r"f\.jsonl:1: this row begins with two '<s>'"):
        one(Conversation(messages=TURNS), tokenizer)
    tokenizer.chat_template = LLAMA3
    assert one(Conversation(messages=TURNS), tokenizer).tokens_L.tolist().count(0) == 1


def test_no_eos_to_append():
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match=r"data\.append_eos: .*no end-of-sequence"):
        one(Text(text="a"), tokenizer)
    assert one(Text(text="a"), tokenizer, append_eos=False).tokens_L.tolist() == [97]


def test_lost_reasoning_is_said():
    tokenizer = tokenizer_of(QWEN3)
    messages = (user("a"), said("b", reasoning_content="hm"), user("c"), said("d"))
    with pytest.warns(UserWarning, match="leaves the reasoning_content of trained messages out"):
        one(Conversation(messages=messages), tokenizer)


def test_tokens():
    ids = np.array([5, 6, 7], np.int32)
    assert one(Tokens(input_ids=ids)).mask_L.tolist() == [True, True, True]
    example = one(Tokens(input_ids=ids, mask=np.array([False, True, False])))
    assert example.tokens_L.tolist() == [5, 6, 7] and example.mask_L.tolist() == [False, True, False]


def test_tools_and_thinking_reach_the_template():
    tools = ({"type": "function", "function": {"name": "f"}},)
    asked = Conversation(messages=TURNS, tools=tools)
    assert '"name": "f"' in BYTES.decode(one(asked).tokens_L.tolist())
    silent = one(Conversation(messages=TURNS[:2]), thinking=False)
    assert str(BYTES.decode(silent.tokens_L.tolist())).endswith(
        "assistant\n<think>\n\n</think>\n\nit is 42<|im_end|>\n"
    )
    assert trained(silent) == "it is 42<|im_end|>"
