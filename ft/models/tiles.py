"""MLPs and experts in tiles of tokens: the memory of long sequences between a block's two layers.

Shapes: T tokens, D model width, K experts per token.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from ft.errors import ModelError
from ft.kernels.tiled import tiled_module
from ft.models.experts import expert_modules

LAST = ("down_proj", "w2", "fc2")  # what an MLP's last layer is called


def apply(model: nn.Module, tile: int) -> None:
    """Let every MLP and every layer's routed experts take ``tile`` tokens at a time, with the same gradients.

    Routers and balance losses stand outside. An MLP's ``forward`` is exchanged on the module itself, so that names,
    saved tensors, adapters and FSDP see the model that they know.

    Raises:
        ModelError: the model has neither.
    """
    routed, dense = expert_modules(model), mlps(model)
    if not routed and not dense:
        raise ModelError(
            "no MLP was found to be tiled", where="model.tile", got=type(model).__name__, fix="leave it out"
        )
    for module in routed.values():
        module.ft_tile = tile
    for module in dense.values():
        module.forward = partial(tiled_module, module.forward, tile=tile)


def mlps(model: nn.Module) -> dict[str, Any]:
    """Modules that are one MLP: linear layers, of which the last goes by a known name."""
    stacked = tuple(expert_modules(model))
    return {
        name: module
        for name, module in model.named_modules()
        if name and name not in stacked and any(isinstance(getattr(module, leaf, None), nn.Module) for leaf in LAST)
    }
