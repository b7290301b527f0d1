"""Completions from a model in this process, through transformers' own generation with a KV cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from attrs import frozen
from torch import nn


@frozen(kw_only=True)
class Completion:
    """Token ids that followed a prompt, without the one that ended them. ``finish`` is "stop" or "length"."""

    tokens: tuple[int, ...]
    finish: str


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    stop: Iterable[int],
    max_new_tokens: int,
    batch: int = 16,
    on_batch: Callable[[int], None] | None = None,
) -> list[Completion]:
    """Greedy completions of tokenised prompts, in their order. Dropout is off meanwhile.

    Prompts of like length share a batch, padded on the left; the padding is masked, and positions start at the
    first real token.

    Args:
        model: a transformers causal language model.
        prompts: token ids, ragged.
        stop: token ids that end a completion.
        max_new_tokens: most tokens of a completion.
        batch: prompts at a time.
        on_batch: told how many prompts are done, after each batch.
    """
    ends = sorted(set(stop))
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    results: dict[int, Completion] = {}
    training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            new = _continue(model, [prompts[i] for i in chosen], ends, max_new_tokens)
            results.update(zip(chosen, (_cut(row, ends) for row in new), strict=True))
            if on_batch:
                on_batch(len(results))
    finally:
        model.train(training)
    return [results[i] for i in range(len(prompts))]


def _continue(model: Any, prompts: Sequence[Sequence[int]], ends: list[int], limit: int) -> list[list[int]]:
    width = max(len(p) for p in prompts)
    device = model.get_input_embeddings().weight.device
    ids = torch.full((len(prompts), width), ends[0], dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(list(prompt))
        mask[row, width - len(prompt) :] = 1
    out = model.generate(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        do_sample=False,
        use_cache=True,
        max_new_tokens=limit,
        eos_token_id=ends,
        pad_token_id=ends[0],
        temperature=None,
        top_p=None,
        top_k=None,
    )
    return out[:, width:].tolist()


def _cut(tokens: list[int], ends: list[int]) -> Completion:
    for i, token in enumerate(tokens):
        if token in ends:
            return Completion(tokens=tuple(tokens[:i]), finish="stop")
    return Completion(tokens=tuple(tokens), finish="length")
