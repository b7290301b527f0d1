"""Dequantise on a CPU by nf4.c, in one pass; where it cannot run, the caller takes the torch path."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ft.kernels import native
from ft.kernels.nf4.format import BLOCKS, DTYPES, NESTED_BLOCK, NF4Tensor, dynamic_map, nf4_code, numel

SOURCE = Path(__file__).with_name("nf4.c")
_KINDS = {dtype: i for i, dtype in enumerate(DTYPES)}  # the numbers of nf4.c

Routine = Callable[..., None]


def on_cpu() -> str:
    """What dequantises on a CPU, in a line: C routines, or torch and why."""
    return _native()[1]


@cache
def _native() -> tuple[Routine | None, str]:
    return made(native.load(SOURCE))


def made(found: native.Native) -> tuple[Routine | None, str]:
    """The routine of a library, and the library's text."""
    if found.library is None:
        return None, found.text
    routine, pointer = found.library.dequantise, ctypes.c_void_p
    routine.argtypes = [*[pointer] * 6, ctypes.c_int64, ctypes.c_int64, ctypes.c_int, ctypes.c_int, pointer]
    routine.restype = None
    return routine, found.text


@cache
def _tables() -> tuple[ctypes.Array[ctypes.c_float], ctypes.Array[ctypes.c_float]]:
    """The dynamic map and the 16 values, as C reads them."""
    return (ctypes.c_float * 256)(*dynamic_map().tolist()), (ctypes.c_float * 16)(*nf4_code().tolist())


def dequantise(q: NF4Tensor, routine: Routine | None = None) -> Tensor | None:
    """The dense weight in ``q.dtype``, or None where C cannot make it. ``routine``: another build of it."""
    if q.packed.device.type != "cpu" or torch.compiler.is_compiling() or not _plain(q):
        return None
    routine = routine or _native()[0]
    out = torch.empty(q.shape, dtype=q.dtype, device="cpu")
    if routine is None or type(out) is not Tensor:  # a mode stands in for real memory
        return None
    nested = (None, None) if q.absmax2 is None or q.offset is None else (q.absmax2.data_ptr(), q.offset.data_ptr())
    parts, threads = (q.packed.data_ptr(), q.absmax.data_ptr(), *nested, *_tables()), torch.get_num_threads()
    routine(*parts, out.numel(), q.block, _KINDS[q.dtype], threads, out.data_ptr())
    return out


def _plain(q: NF4Tensor) -> bool:
    """Whether the memory of all parts is real, of the types and sizes that C takes them to be."""
    blocks = -(-numel(q) // q.block)
    if q.dtype not in _KINDS or q.block not in BLOCKS or not _holds(q.packed, torch.uint8, -(-numel(q) // 2)):
        return False
    if q.absmax2 is None or q.offset is None:
        return _holds(q.absmax, torch.float32, blocks)
    nested = _holds(q.absmax2, torch.float32, -(-blocks // NESTED_BLOCK)) and _holds(q.offset, torch.float32, 1)
    return nested and _holds(q.absmax, torch.uint8, blocks)


def _holds(t: Tensor, dtype: torch.dtype, n: int) -> bool:
    return type(t) in _TYPES and t.dtype == dtype and t.numel() == n and t.is_contiguous() and t.device.type == "cpu"


_TYPES = (Tensor, torch.nn.Parameter)
