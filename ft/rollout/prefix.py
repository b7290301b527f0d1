"""What rows have said so far, as the model needs it to say more: in a cache, or as tokens to forward anew.

Shapes: P prompts, n answers of each, B rows, W positions so far, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from attrs import define
from torch import Tensor

from ft.rollout.cache import cache_for

# Prompts of any length side by side, padded on the left; of one length, which needs no mask; and no cache besides.
Way = Literal["padded", "equal", "anew"]
PADDED, EQUAL, ANEW = "padded", "equal", "anew"


def begin(model: Any, prompts: Sequence[np.ndarray], n: int, *, room: int, anew: bool) -> Cached | Anew:
    """``n`` rows of each prompt, with ``room`` for so many more tokens."""
    device = next(model.parameters()).device
    ids_PW, mask_PW = padded(prompts, device)
    if anew:
        assert bool(mask_PW.all()), "of one length"
        ids_BW = ids_PW.repeat_interleave(n, 0)
        return Anew(model=model, ids_BW=ids_BW, logits_BV=_logits(model, ids_PW).repeat_interleave(n, 0))
    return _cached(model, ids_PW, None if len({*map(len, prompts)}) == 1 else mask_PW, n, room)


@define(kw_only=True, eq=False)
class Cached:
    """Rows whose past stands in a cache. Without padding there is no mask, and attention need not read one."""

    model: Any
    cache: Any
    logits_BV: Tensor  # for the next token
    position_B1: Tensor  # of the token that stands last
    mask_BW: Tensor | None

    def choose(self, going: Tensor) -> None:
        """These rows stay. Reordering is the one choice of rows that the caches of every kind of layer know."""
        self.cache.reorder_cache(going)
        self.position_B1 = self.position_B1[going]
        self.mask_BW = None if self.mask_BW is None else self.mask_BW[going]

    def append(self, token_B: Tensor) -> None:
        self.position_B1 = self.position_B1 + 1
        if self.mask_BW is not None:
            self.mask_BW = torch.cat([self.mask_BW, self.mask_BW.new_ones(len(token_B), 1)], 1)
        out = self.model(
            input_ids=token_B[:, None], attention_mask=self.mask_BW, position_ids=self.position_B1,
            past_key_values=self.cache, use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        self.cache, self.logits_BV = out.past_key_values, out.logits[:, -1]


def _cached(model: Any, ids_PW: Tensor, mask_PW: Tensor | None, n: int, room: int) -> Cached:
    """Each prompt forwarded once, and its cache once for each answer."""
    P, W = ids_PW.shape
    positions_PW = torch.arange(W, device=ids_PW.device).expand(P, W)
    if mask_PW is not None:
        positions_PW = (mask_PW.cumsum(-1) - 1).clamp(min=0)
    out = model(
        input_ids=ids_PW, attention_mask=mask_PW, position_ids=positions_PW,
        past_key_values=cache_for(model.config, room), use_cache=True, logits_to_keep=1,
    )  # fmt: skip
    prefix = Cached(
        model=model, cache=out.past_key_values, logits_BV=out.logits[:, -1].repeat_interleave(n, 0),
        position_B1=positions_PW[:, -1:], mask_BW=mask_PW,
    )  # fmt: skip
    prefix.choose(torch.arange(P, device=ids_PW.device).repeat_interleave(n))
    return prefix


@define(kw_only=True, eq=False)
class Anew:
    """Rows that are forwarded whole for each token."""

    model: Any
    ids_BW: Tensor
    logits_BV: Tensor

    def choose(self, going: Tensor) -> None:
        self.ids_BW = self.ids_BW[going]

    def append(self, token_B: Tensor) -> None:
        self.ids_BW = torch.cat([self.ids_BW, token_B[:, None]], 1)
        self.logits_BV = _logits(self.model, self.ids_BW)


def _logits(model: Any, ids_BW: Tensor) -> Tensor:
    return model(input_ids=ids_BW, use_cache=False, logits_to_keep=1).logits[:, -1]


def padded(prompts: Sequence[np.ndarray], device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts flush right, and which positions are theirs."""
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        mask[row, width - len(prompt) :] = 1
    return ids.to(device), mask.to(device)
