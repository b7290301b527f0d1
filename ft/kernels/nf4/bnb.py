"""NF4 tensors under the names that bitsandbytes gives them in a state dict, so that files can be exchanged."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ft.errors import ModelError
from ft.kernels.nf4.format import BLOCKS, DTYPES, NESTED_BLOCK, NF4Tensor, dynamic_map, nf4_code

_STATE = "quant_state.bitsandbytes__nf4"
_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}


def to_bnb(name: str, q: NF4Tensor) -> dict[str, Tensor]:
    """State-dict entries of ``q`` as the weight ``name``; they hold all that is needed to rebuild it."""
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": q.block,
        "dtype": str(q.dtype).removeprefix("torch."),
        "shape": list(q.shape),
    }
    device = q.packed.device
    entries = {name: q.packed[:, None], f"{name}.absmax": q.absmax, f"{name}.quant_map": nf4_code(device)}
    if q.absmax2 is not None and q.offset is not None:
        entries |= {f"{name}.nested_absmax": q.absmax2, f"{name}.nested_quant_map": dynamic_map(device)}
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": q.offset.item()}
    text = bytearray(json.dumps(state), "utf-8")
    return entries | {f"{name}.{_STATE}": torch.frombuffer(text, dtype=torch.uint8).to(device)}


def from_bnb(name: str, tensors: Mapping[str, Tensor]) -> NF4Tensor:
    """Rebuild the weight ``name`` from its state-dict entries.

    Raises:
        ModelError: an entry is missing, is not NF4 with the usual tables, or does not fit the weight's shape.
    """
    state = _state(name, tensors)
    shape, block = tuple(state["shape"]), state["blocksize"]
    nested = "nested_absmax" in _own(name, tensors)
    packed, absmax = _entry(name, tensors, ""), _entry(name, tensors, ".absmax")
    _same(name, _entry(name, tensors, ".quant_map"), nf4_code(packed.device), "the 16 NF4 values")
    absmax2 = offset = None
    if nested:
        _same(
            name,
            _entry(name, tensors, ".nested_quant_map"),
            dynamic_map(packed.device),
            "the 8-bit dynamic map's values",
        )
        absmax2 = _entry(name, tensors, ".nested_absmax").float()
        offset = torch.tensor(state["nested_offset"], dtype=torch.float32, device=packed.device)
    q = NF4Tensor(
        packed=packed.contiguous().view(torch.uint8).reshape(-1),
        absmax=absmax if nested else absmax.float(),
        absmax2=absmax2,
        offset=offset,
        shape=shape,
        dtype=_NAMES[state["dtype"]],
        block=block,
    )
    _sizes(name, q)
    return q


def _own(name: str, tensors: Mapping[str, Tensor]) -> set[str]:
    return {key.removeprefix(f"{name}.") for key in tensors if key.startswith(f"{name}.")}


def _entry(name: str, tensors: Mapping[str, Tensor], suffix: str) -> Tensor:
    if name + suffix not in tensors:
        raise ModelError("a part of a 4-bit weight is missing", where=name, expected=name + suffix)
    return tensors[name + suffix]


def _state(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The JSON part, checked against what this format can hold."""
    raw = _entry(name, tensors, f".{_STATE}")
    try:
        state = json.loads(bytes(raw.cpu().tolist()))
    except ValueError as error:
        raise ModelError("the description of a 4-bit weight is not JSON", where=name, got=str(error)) from error
    wanted = {"quant_type": ("nf4",), "blocksize": BLOCKS, "dtype": tuple(_NAMES)}
    if "nested_absmax" in _own(name, tensors):
        wanted |= {"nested_blocksize": (NESTED_BLOCK,), "nested_dtype": ("float32",)}
    for key, known in wanted.items():
        if state.get(key) not in known:
            raise ModelError(
                "a 4-bit weight is stored in a way that is not known here",
                where=name,
                expected=f"{key}: one of {', '.join(map(str, known))}",
                got=repr(state.get(key)),
            )
    return state


def _same(name: str, got: Tensor, expected: Tensor, what: str) -> None:
    # Other builds may compute the dynamic map with another rounding of its last bit.
    if got.shape != expected.shape or not torch.allclose(got.float(), expected, rtol=0.0, atol=1e-6):
        raise ModelError("a 4-bit weight uses another table of values", where=name, expected=what)


def _sizes(name: str, q: NF4Tensor) -> None:
    n = math.prod(q.shape)
    blocks = -(-n // q.block)
    parts = [("bytes", q.packed, -(-n // 2)), ("absmax", q.absmax, blocks)]
    if q.absmax2 is not None:
        parts.append(("nested_absmax", q.absmax2, -(-blocks // NESTED_BLOCK)))
    for what, tensor, size in parts:
        if tensor.numel() != size:
            raise ModelError(
                "a 4-bit weight does not fit its shape",
                where=name,
                expected=f"{size} {what} for shape {q.shape}",
                got=str(tensor.numel()),
            )
