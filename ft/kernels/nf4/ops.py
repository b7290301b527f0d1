"""NF4 for callers: each function chooses between torch and Triton by its ``impl``.

"auto" is Triton on a GPU and torch elsewhere; "triton" raises RecipeError where it cannot run. In place of torch a CPU
dequantises by a C routine, to the same bits, where ``nf4.on_cpu()`` says so. Shapes: R rows of dimension 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ft.kernels.launch import Impl, check
from ft.kernels.nf4 import native, reference
from ft.kernels.nf4.format import NF4Tensor


def quantise(w: Tensor, *, block: int = 64, double: bool = True, impl: Impl = "auto") -> NF4Tensor:
    """Round each value to the nearest of 16, relative to the largest magnitude in its block of ``block``.

    ``double`` stores the blocks' scales in 8 bits, after taking off their mean. Ties go to the smaller code. A last,
    partial block divides by its scale, where whole blocks multiply by its reciprocal: so does bitsandbytes.

    Raises:
        ModelError: an unknown block size or type, no values, or a value that is not finite.
    """
    if check(impl, w) == "torch":
        return reference.quantise(w, block=block, double=double)
    from ft.kernels.nf4 import triton

    return reference.quantise(w, block=block, double=double, codes=triton.codes)


def dequantise(q: NF4Tensor, dtype: torch.dtype | None = None, *, impl: Impl = "auto") -> Tensor:
    """The dense weight: code times scale in float32, rounded to ``q.dtype``, then converted to ``dtype`` if given."""
    if check(impl, q.packed) == "torch":
        dense = native.dequantise(q)
        return reference.dequantise(q, dtype) if dense is None else dense.to(dtype or q.dtype)
    from ft.kernels.nf4 import triton

    return triton.dequantise(q, dtype)


def dequantise_rows(q: NF4Tensor, index_R: Tensor, dtype: torch.dtype | None = None, *, impl: Impl = "auto") -> Tensor:
    """Dense rows ``index_R`` (int64) of dimension 0, such as the experts that received tokens; (R, *q.shape[1:]).

    An index out of range raises IndexError in torch; Triton does not look, since looking would wait for the device.

    Raises:
        ModelError: a row is not a whole number of blocks.
    """
    if check(impl, q.packed, index_R) == "torch":
        return dequantise(reference.take_rows(q, index_R), dtype, impl=impl)
    from ft.kernels.nf4 import triton

    reference.row_size(q)
    return triton.dequantise_rows(q, index_R, dtype)
