"""Answers scored by a model: a folder that transformers loads with a head for one class.

Shapes: B answers at a time, W the longest of them in tokens, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch


def scores(
    prompts: Sequence[Any], completions: Sequence[str], folder: str, *, batch: int, max_tokens: int, device: str
) -> list[float]:
    """The model's score of each prompt with its answer; of several classes the last one's log-prob.

    The beginning of what is longer than ``max_tokens`` is cut off.
    """
    model, tokenizer = _loaded(folder, device)
    rows = [_ids(tokenizer, prompt, said)[-max_tokens:] for prompt, said in zip(prompts, completions, strict=True)]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    found = [0.0] * len(rows)
    for start in range(0, len(rows), batch):
        chosen = order[start : start + batch]
        for i, value in zip(chosen, _forward(model, [rows[i] for i in chosen]), strict=True):
            found[i] = value
    return found


@lru_cache(maxsize=2)
def _loaded(folder: str, device: str) -> tuple[Any, Any]:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    options: Any = {"local_files_only": True, "trust_remote_code": False, "use_safetensors": True}
    if (Path(folder) / "adapter_config.json").is_file():
        from ft.models.lora import import_peft

        model: Any = import_peft().AutoPeftModelForSequenceClassification.from_pretrained(
            folder, num_labels=1, **options
        )
    else:
        model = AutoModelForSequenceClassification.from_pretrained(folder, **options)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = 0  # rows are told apart by the mask; transformers looks for its end by the id
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return model.to(device).eval(), tokenizer


def _ids(tokenizer: Any, prompt: Any, said: str) -> list[int]:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if tokenizer.chat_template is None:
        text = "\n".join([*(message["content"] for message in messages), said])
        return tokenizer(text)["input_ids"]
    found = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": said}], tokenize=False)
    return tokenizer(found, add_special_tokens=False)["input_ids"]


@torch.no_grad()
def _forward(model: Any, rows: Sequence[Sequence[int]]) -> list[float]:
    """Padded on the right with the id that the model knows as padding, at whose first place it reads the score."""
    width, pad = max(map(len, rows)), model.config.pad_token_id
    device = next(model.parameters()).device
    ids_BW = torch.full((len(rows), width), pad)
    mask_BW = torch.zeros_like(ids_BW)
    for i, row in enumerate(rows):
        ids_BW[i, : len(row)], mask_BW[i, : len(row)] = torch.tensor(row), 1
    logits_BC = model(input_ids=ids_BW.to(device), attention_mask=mask_BW.to(device)).logits.float()
    return (logits_BC[:, 0] if logits_BC.shape[1] == 1 else logits_BC.log_softmax(-1)[:, -1]).tolist()
