"""Losses: tensors in, ``LossOutput`` out. Nothing here knows of a model, a process group or a file.

Names are imported when first used, so that a recipe can be read, shown and checked without importing torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ft.losses.sft import nll

_HOME = {"nll": "ft.losses.sft"}
__all__ = ["nll"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ft.losses' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
