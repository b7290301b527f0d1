"""A cache of keys and values with room for what will be generated, so that a new token copies only itself.

Shapes: B rows, H heads, W positions so far, R positions that there is room for, D head width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


def cache_for(config: Any, room: int) -> DynamicCache:
    """transformers' cache for this model, its layers of full attention with room for ``room`` more tokens."""
    cache = DynamicCache(config=config)
    cache.layers = [Roomy(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    if config.model_type == "minimax":
        from ft.rollout.minimax import RowsMiniMaxCache

        return RowsMiniMaxCache(cache.layers)
    return cache


class Roomy(DynamicLayer):
    """Full attention's layer. ``DynamicLayer`` copies all keys and values for every token that it appends."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self.held: tuple[Tensor, Tensor] | None = None  # keys and values, [B, H, R, D]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            return self._now(key_states, value_states)  # of prompts: their rows are chosen before more is written
        begin, end = self.get_seq_length(), self.get_seq_length() + key_states.shape[-2]
        if self.held is None or end > self.held[0].shape[-2]:
            keys, values = self._now()
            self.held = self._widened(keys, end), self._widened(values, end)
        for held, new in zip(self.held, (key_states, value_states), strict=True):
            held[..., begin:end, :] = new
        return self._now(*(held[..., :end, :] for held in self.held))

    def reorder_cache(self, beam_idx: Any) -> None:
        if self.held is None:
            super().reorder_cache(beam_idx)
        else:
            end = self.get_seq_length()
            self.held = self.held[0].index_select(0, beam_idx), self.held[1].index_select(0, beam_idx)
            self._now(*(held[..., :end, :] for held in self.held))

    def _now(self, *given: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values as they are, or as they are from now on."""
        if given:
            self.keys, self.values = given
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    def _widened(self, x_BHWD: Tensor, end: int) -> Tensor:
        B, H, W, D = x_BHWD.shape
        wide = x_BHWD.new_empty(B, H, max(end, W + self.room), D)
        wide[..., :W, :] = x_BHWD
        return wide
