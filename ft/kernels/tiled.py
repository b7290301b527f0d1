"""A block that treats tokens one by one (an MLP, a layer's experts) in tiles of tokens, so that a long sequence needs
the memory of one tile between its layers.

    out_T = concat over tiles of fn(x_t, ...)

Each tile is computed again in backward. Gradients are those of the untiled block: to inputs they are the same sums,
and a parameter's is the sum over tiles, which autograd adds up before it reaches the parameter once. Only the order
of that sum differs (in 16 bits, each tile's share is rounded).

What mixes tokens (attention, a router with a capacity or a balance loss) stands outside: hand its results, such as
``index_TK`` and ``weight_TK``, in as further per-token tensors.

Shapes: T tokens, t tokens of a tile, D model width; any further dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ft.errors import ModelError

Out = TypeVar("Out", bound=Tensor | tuple[Tensor, ...])


def tiled(fn: Callable[..., Out], hidden_TD: Tensor, *per_token: Tensor, tile: int) -> Out:
    """``fn(hidden_TD, *per_token)`` over ``tile`` tokens at a time.

    Args:
        fn: token by token: takes t tokens of each tensor, returns a tensor or a tuple of tensors with t rows. It may
            use parameters, which get their gradients as ever, and random numbers, which backward draws again.
        hidden_TD, per_token: tensors whose first dimension is the tokens.
        tile: tokens of a tile. With no more tokens than that, ``fn`` is called as it is and keeps its activations.

    Raises:
        ModelError: tensors of unlike length, a tile below 1, or results that have not one row per token.
    """
    tensors = (hidden_TD, *per_token)
    _check(tensors, tile)
    if len(hidden_TD) <= tile:
        return fn(*tensors)
    # One split, not slices: the gradients of all tiles are then joined once, and not each padded to T and added.
    tiles = zip(*(x.split(tile) for x in tensors), strict=True)
    outs = [_recomputed(fn, parts) for parts in tiles]
    return _joined(outs, [len(part) for part in hidden_TD.split(tile)])


def tiled_module(module: Callable[[Tensor], Tensor], hidden: Tensor, *, tile: int) -> Tensor:
    """``module(hidden)`` of a model's MLP, tokens of all sequences in one row; hidden is (..., D), as the result is.

    The module is called with (1, t, D), since some of them unpack three dimensions. Hooks of its parts (LoRA, 4-bit
    weights) run as ever, once a tile; those on the module itself see each tile.
    """

    def fn(hidden_tD: Tensor) -> Tensor:
        return module(hidden_tD[None])[0]

    flat_TD = hidden.reshape(-1, hidden.shape[-1])
    return tiled(fn, flat_TD, tile=tile).unflatten(0, hidden.shape[:-1])


def _recomputed(fn: Callable[..., Any], parts: tuple[Tensor, ...]) -> Any:
    return checkpoint(fn, *parts, use_reentrant=False) if torch.is_grad_enabled() else fn(*parts)


def _check(tensors: tuple[Tensor, ...], tile: int) -> None:
    if tile < 1:
        raise ModelError("a tile needs at least one token", where="tiled", got=str(tile))
    shapes = [tuple(x.shape) for x in tensors]
    if any(not shape or shape[0] != shapes[0][0] for shape in shapes):
        raise ModelError("tensors to be tiled differ in their tokens", expected="one first dimension", got=str(shapes))


def _joined(outs: list[Any], sizes: list[int]) -> Any:
    if isinstance(outs[0], tuple):
        return tuple(_joined(list(column), sizes) for column in zip(*outs, strict=True))
    shapes = [tuple(out.shape) if isinstance(out, Tensor) else (type(out).__name__,) for out in outs]
    if any(shape[:1] != (size,) for shape, size in zip(shapes, sizes, strict=True)):
        raise ModelError(
            "a tiled block's results must have one row per token",
            expected=f"{sizes[0]} rows from a tile of {sizes[0]} tokens",
            got=str(shapes[0]),
            fix="compute what sums over tokens outside the tiles",
        )
    return torch.cat(outs)
