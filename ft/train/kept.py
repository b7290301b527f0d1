"""What a method keeps (``Context.kept``), as a checkpoint holds it: JSON, and the arrays in it as named tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ft.io import stream
from ft.io.checkpoint import Checkpoint
from ft.io.stream import Entry

STEM = "kept"
_ARRAY = "array"  # the one name of a JSON object that stands for an array


def entries(kept: Mapping[str, Any]) -> dict[str, list[Entry]]:
    """The file of a checkpoint that holds the arrays, each named by its place; none where there are none."""
    found = stream.entries({name: torch.from_numpy(array) for name, array in _arrays(kept, STEM).items()})
    return {STEM: found} if found else {}


def document(kept: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint's meta holds: the rest, with the names of arrays in their places."""
    return {STEM: _plain(kept, STEM)} if kept else {}


def restored(saved: Checkpoint) -> dict[str, Any]:
    """What was kept; empty where the method keeps nothing."""
    tensors = saved.open(STEM) if STEM in saved else {}
    return _filled(saved.meta.get(STEM, {}), tensors)


def _parts(value: Any, name: str) -> dict[str, Any] | None:
    """What stands in a mapping or a list, by its place; None in neither."""
    if isinstance(value, Mapping):
        return {f"{name}.{key}": item for key, item in value.items()}
    return {f"{name}.{i}": item for i, item in enumerate(value)} if isinstance(value, (list, tuple)) else None


def _arrays(value: Any, name: str) -> dict[str, np.ndarray]:
    if isinstance(value, np.ndarray):
        return {name: value}
    parts = _parts(value, name) or {}
    return {found: array for place, item in parts.items() for found, array in _arrays(item, place).items()}


def _plain(value: Any, name: str) -> Any:
    if isinstance(value, np.ndarray):
        return {_ARRAY: name}
    parts = _parts(value, name)
    if parts is None:
        return value
    items = [_plain(item, place) for place, item in parts.items()]
    return dict(zip(value, items, strict=True)) if isinstance(value, Mapping) else items


def _filled(plain: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(plain, list):
        return [_filled(item, tensors) for item in plain]
    if not isinstance(plain, dict):
        return plain
    if plain.keys() == {_ARRAY}:
        return tensors[plain[_ARRAY]].numpy()
    return {key: _filled(item, tensors) for key, item in plain.items()}
