"""MiniMax's cache. The family takes no other class than its own, which does not know how rows are chosen.

Shapes: B rows.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.minimax.modeling_minimax import MiniMaxCache


class RowsMiniMaxCache(MiniMaxCache):
    """Its states of linear attention beside layers of the usual cache, and both follow a choice of rows.

    A layer of linear attention stands among ``layers`` too: masks are made for the first layer that is not one.
    """

    def __init__(self, layers: list[Any]) -> None:
        super().__init__()
        self.layers = layers
        self.linear_cache: list[Any] = [None] * len(layers)

    def reorder_cache(self, beam_idx: Tensor) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().reorder_cache(beam_idx)  # pyright: ignore[reportArgumentType]
        self.linear_cache = [state if state is None else state.index_select(0, beam_idx) for state in self.linear_cache]
