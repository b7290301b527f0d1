"""Recomputed layers keep the routing of their first run: what topk chose is saved, all else is computed again.

Every family's router chooses by topk. A replay that rounds differently (other kernels, other ranks' sums) would
otherwise send tokens to other experts in backward than in forward, and gradients would be of another function. Values
are taken at the saved places from the replay's own scores, so gradients reach the router as ever.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_TOPK = (torch.topk, Tensor.topk)


def kept() -> tuple[TorchFunctionMode, TorchFunctionMode]:
    """``context_fn`` of torch's checkpoint: the contexts of a layer's first run and of its replay."""
    chosen: list[Tensor] = []
    return _Choices(chosen, replay=False), _Choices(chosen, replay=True)


class _Choices(TorchFunctionMode):
    """Writes down the indices that each topk finds, or answers with them; the graph is the same both times."""

    def __init__(self, chosen: list[Tensor], *, replay: bool):
        super().__init__()
        self.chosen, self.replay, self.place = chosen, replay, 0

    def __enter__(self) -> Any:
        self.place = 0  # a graph that is kept may be replayed again
        return super().__enter__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _TOPK:
            return func(*args, **kwargs)
        if not self.replay:
            with torch.no_grad():
                self.chosen.append(func(*args, **kwargs).indices)
        indices, self.place = self.chosen[self.place], self.place + 1
        return torch.return_types.topk((_take(indices, *args, **kwargs), indices.clone()))


def _take(indices: Tensor, input: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Tensor:
    return input.gather(dim, indices)
