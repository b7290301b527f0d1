"""Rows to packs: render, tokenise, mask and pack, against the bare tokenizer on the same text.

    python bench/data.py [--rows 2000] [--model models/HuggingFaceTB/SmolLM2-135M-Instruct] [--rounds 5]

The yardstick is ``tokenizers.encode_batch`` on texts that are rendered already: no path can be faster. All paths take
turns in one process, so that a slow moment of the machine strikes each; a figure is the median over rounds, and a
ratio the median of the rounds' ratios. Rows are synthetic chats, seeded. Without --model a small BPE tokenizer is
trained on them. ``row by row`` is apply_chat_template on each row; ``TRL`` is SFTTrainer's own preparation, packing
and all, where it is installed.
"""

from __future__ import annotations

import argparse
import os
import random
from collections.abc import Callable
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

from common import measure, record

Rows = list[list[dict[str, str]]]

PLAIN = """\
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif -%}
"""
TAGGED = """\
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}
{%- else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif -%}
"""
PACK, LONGEST = 8192, 2048


def make_rows(count: int, seed: int) -> Rows:
    """Chats of one to three turns; word frequencies fall like 1/rank, lengths are log-normal."""
    rng = random.Random(seed)
    syllables = [a + b for a in "bcdfglmnprstvw" for b in ("a", "e", "i", "o", "u", "ai", "er", "in", "on")]
    words = ["".join(rng.choices(syllables, k=rng.choice((1, 2, 2, 3, 4)))) for _ in range(20_000)]
    weights = list(accumulate(1 / rank for rank in range(1, len(words) + 1)))

    def text(middle: float) -> str:
        length = min(400, int(rng.lognormvariate(middle, 0.8)) + 1)
        return " ".join(rng.choices(words, cum_weights=weights, k=length)) + "."

    def row() -> list[dict[str, str]]:
        messages = [{"role": "system", "content": text(2.0)}] if rng.random() < 0.5 else []
        for _ in range(rng.choice((1, 1, 2, 3))):
            messages += [{"role": "user", "content": text(3.5)}, {"role": "assistant", "content": text(4.5)}]
        return messages

    return [row() for _ in range(count)]


def make_tokenizer(model: Path | None, rows: Rows) -> Any:
    from ft.data.tokenizer import load_tokenizer

    if model is not None:
        return load_tokenizer(model)
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=16_000,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((message["content"] for row in rows for message in row), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|im_end|>")


def ours(rows: Rows, tokenizer: Any, template: str, *, parse: bool = False) -> Callable[[], Any]:
    """Render, tokenise, mask, pack and collate in chunks of a thousand rows, as the dataset does."""
    from ft.data.formats import convert
    from ft.data.pack import collate, pack
    from ft.data.render import render
    from ft.recipe.parts import Data

    data = Data(train="bench.jsonl")
    dicts = [({"messages": row}, f"bench.jsonl:{i}") for i, row in enumerate(rows, 1)]
    values = [(convert(row, source=source), source) for row, source in dicts]

    def run() -> Any:
        tokenizer.chat_template = template
        pairs = [(convert(row, source=source), source) for row, source in dicts] if parse else values
        examples = [e for at in range(0, len(pairs), 1000) for e in render(pairs[at : at + 1000], tokenizer, data)]
        short = [e for e in examples if len(e) <= LONGEST]
        return [collate(p) for p in pack(short, tokens=PACK)]

    return run


def row_by_row(rows: Rows, tokenizer: Any, template: str, tagged: bool) -> Callable[[], Any]:
    def run() -> Any:
        tokenizer.chat_template = template
        return [
            tokenizer.apply_chat_template(row, tokenize=True, return_dict=True, return_assistant_tokens_mask=tagged)
            for row in rows
        ]

    return run


def trl(rows: Rows, tokenizer: Any, template: str, tagged: bool) -> Callable[[], Any]:
    """SFTTrainer's preparation of a dataset, without the trainer around it: it needs three of its attributes."""
    import datasets
    from trl import SFTConfig, SFTTrainer

    datasets.disable_caching()
    datasets.disable_progress_bars()
    held = datasets.Dataset.from_list([{"messages": row} for row in rows])
    config = SFTConfig(
        output_dir="unused", packing=True, max_length=LONGEST, assistant_only_loss=tagged, use_cpu=True, report_to=[]
    )
    trainer: Any = SimpleNamespace(_tokenizer=tokenizer, chat_template=None, completion_only_loss=False)

    def run() -> Any:
        tokenizer.chat_template = template
        return SFTTrainer._prepare_dataset(trainer, held, tokenizer, config, True, None, "bench")

    return run


def paths(rows: Rows, tokenizer: Any) -> dict[str, Callable[[], Any]]:
    tokenizer.chat_template = PLAIN
    texts = [tokenizer.apply_chat_template(row, tokenize=False) for row in rows]
    backend = tokenizer.backend_tokenizer
    found = {
        RAW: lambda: backend.encode_batch(texts, add_special_tokens=False),
        "ft": ours(rows, tokenizer, PLAIN),
        "ft, tags": ours(rows, tokenizer, TAGGED),
        "ft, from dicts": ours(rows, tokenizer, PLAIN, parse=True),
        "row by row": row_by_row(rows, tokenizer, PLAIN, False),
        "row by row, tags": row_by_row(rows, tokenizer, TAGGED, True),
    }
    if find_spec("trl") and find_spec("datasets"):
        found |= {"TRL": trl(rows, tokenizer, PLAIN, False), "TRL, tags": trl(rows, tokenizer, TAGGED, True)}
    return found


RAW = "encode_batch"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--model", type=Path, help="folder of a tokenizer with ChatML's tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rows = make_rows(args.rows, args.seed)
    tokenizer = make_tokenizer(args.model, rows)
    found = paths(rows, tokenizer)
    tokens = sum(len(encoding.ids) for encoding in found[RAW]())
    times = measure(found, args.rounds)
    speed = {name: median(raw / own for raw, own in zip(times[RAW], times[name], strict=True)) for name in found}
    print(f"{args.rows:,} rows, {tokens:,} tokens, {os.cpu_count()} cores, {args.model or 'own BPE tokenizer'}")
    for name in found:
        seconds = median(times[name])
        print(f"{name:>18}  {seconds:7.3f} s  {tokens / seconds:12,.0f} tokens/s  {speed[name]:5.2f}x")
    numbers = {"seconds": {name: median(times[name]) for name in found}, "of_encode_batch": speed}
    record(
        "data",
        {"rows": args.rows, "tokens": tokens, "model": str(args.model or ""), "cores": os.cpu_count(), **numbers},
    )


if __name__ == "__main__":
    main()
