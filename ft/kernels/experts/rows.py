"""What is done to rows between the products: they are activated, differentiated and added up.

Each is one pass of rows.c over float32 or bfloat16 where this machine has a C compiler, and a few passes of torch
elsewhere; values agree up to rounding. Shapes: C experts of a chunk, P their rows, R = C * P, I width of the experts,
M of the up projection's output (2 I with a gate), D of the result, U its rows.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from attrs import frozen
from torch import Tensor

from ft.kernels import native

SOURCE = Path(__file__).with_name("rows.c")
_FLAGS = {torch.float32: (), torch.bfloat16: ("-DBFLOAT16",)}

Act = Callable[[Tensor], Tensor]
New = Callable[[Sequence[int]], Tensor]  # memory for a tensor of this shape
Back = tuple[Tensor, Tensor, Tensor]  # a_CPI, <a, u> of each row, dh_CPM


def routines(rows: Tensor) -> Any | None:
    """rows.c, which reads memory of a CPU; None where torch must do: other devices, other types, no compiler."""
    return _loaded(rows.dtype).library if rows.device.type == "cpu" and rows.dtype in _FLAGS else None


def on_cpu() -> str:
    """What works on rows on a CPU, in a line: C routines, or torch and why."""
    return _loaded(torch.float32).text


@cache
def _loaded(dtype: torch.dtype) -> native.Native:
    found = native.load(SOURCE, ("-ffp-contract=fast", "-fopenmp-simd", *_FLAGS[dtype]))
    if (library := found.library) is not None:
        pointer, number, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        library.scatter.argtypes = [*[pointer] * 4, number, number, integer]
        library.forward.argtypes = [*[pointer] * 2, number, number, integer, integer]
        library.backward.argtypes = [*[pointer] * 6, number, number, integer, integer]
        for one in (library.scatter, library.forward, library.backward):
            one.restype = None
    return found


def add_rows(out_UD: Tensor, target_R: Tensor, y_RD: Tensor, w_R: Tensor | None) -> None:
    """out[target_r] += w_r y_r (w = 1 where None), in the order of rows, in the type of ``out`` and ``w``."""
    C = routines(y_RD)
    if C is None:
        y_RD = y_RD.to(out_UD.dtype)
        out_UD.index_add_(0, target_R, y_RD if w_R is None else y_RD * w_R[:, None])
        return
    w = None if w_R is None else w_R.data_ptr()
    pointers = (y_RD.data_ptr(), target_R.data_ptr(), w, out_UD.data_ptr())
    C.scatter(*pointers, *y_RD.shape, torch.get_num_threads())


class Gate(Protocol):
    """The function between the projections; ``backward`` takes u_CPI, da / w, which it may overwrite."""

    def forward(self, h_CPM: Tensor, new: New) -> Tensor: ...
    def backward(self, h_CPM: Tensor, u_CPI: Tensor, w_CP: Tensor, new_a: New, new_dh: New) -> Back: ...


def gate(act: Act) -> Gate:
    """``act``, by its derivative where that is written out here; else by autograd."""
    return act if isinstance(act, Gated) else _Traced(act)


@frozen
class Gated:
    """f(gate) * up over halves [gate; up], with f SiLU or GELU's tanh form."""

    kind: Literal["silu", "gelu_tanh"]

    def __call__(self, h_RM: Tensor) -> Tensor:
        gate_RI, up_RI = h_RM.chunk(2, dim=-1)
        return self._f(gate_RI) * up_RI

    def forward(self, h_CPM: Tensor, new: New) -> Tensor:
        C = routines(h_CPM)
        gate_CPI, up_CPI = h_CPM.chunk(2, dim=-1)
        a_CPI = new(gate_CPI.shape)
        if C is None:
            return torch.mul(self._f(gate_CPI), up_CPI, out=a_CPI)
        C.forward(h_CPM.data_ptr(), a_CPI.data_ptr(), *self._numbers(a_CPI))
        return a_CPI

    def backward(self, h_CPM: Tensor, u_CPI: Tensor, w_CP: Tensor, new_a: New, new_dh: New) -> Back:
        C = routines(h_CPM)
        a_CPI, dh_CPM = new_a(u_CPI.shape), new_dh(h_CPM.shape)
        if C is None:
            return a_CPI, self._backward(h_CPM, u_CPI, w_CP, a_CPI, dh_CPM), dh_CPM
        d_CP = torch.empty_like(w_CP)
        C.backward(*(t.data_ptr() for t in (h_CPM, u_CPI, w_CP, a_CPI, dh_CPM, d_CP)), *self._numbers(a_CPI))
        return a_CPI, d_CP, dh_CPM

    def _numbers(self, a_CPI: Tensor) -> tuple[int, ...]:
        width = a_CPI.shape[-1]
        return a_CPI.numel() // max(1, width), width, self.kind == "gelu_tanh", torch.get_num_threads()

    def _backward(self, h_CPM: Tensor, u_CPI: Tensor, w_CP: Tensor, a_CPI: Tensor, dh_CPM: Tensor) -> Tensor:
        """d up = da f(gate), d gate = da up f'(gate): each written where it belongs, which autograd would add up."""
        (gate_CPI, up_CPI), (dgate_CPI, dup_CPI) = h_CPM.chunk(2, dim=-1), dh_CPM.chunk(2, dim=-1)
        f_CPI, aten = self._f(gate_CPI), torch.ops.aten
        torch.mul(f_CPI, up_CPI, out=a_CPI)
        d_CP = _dot(a_CPI, u_CPI, w_CP.dtype)
        torch.mul(u_CPI.mul_(w_CP[..., None].to(u_CPI.dtype)), f_CPI, out=dup_CPI)
        if self.kind == "silu":
            aten.silu_backward.grad_input(u_CPI.mul_(up_CPI), gate_CPI, grad_input=dgate_CPI)
        else:
            aten.gelu_backward.grad_input(u_CPI.mul_(up_CPI), gate_CPI, approximate="tanh", grad_input=dgate_CPI)
        return d_CP

    def _f(self, gate_RI: Tensor) -> Tensor:
        return F.silu(gate_RI) if self.kind == "silu" else F.gelu(gate_RI, approximate="tanh")


@frozen
class _Traced:
    """Any function of rows; autograd differentiates it."""

    act: Act

    def forward(self, h_CPM: Tensor, new: New) -> Tensor:
        return self.act(h_CPM.flatten(0, -2)).unflatten(0, h_CPM.shape[:-1])

    def backward(self, h_CPM: Tensor, u_CPI: Tensor, w_CP: Tensor, new_a: New, new_dh: New) -> Back:
        with torch.enable_grad():
            h_CPM = h_CPM.detach().requires_grad_()
            a_CPI = self.forward(h_CPM, new_a)
        d_CP = _dot(a_CPI.detach(), u_CPI, w_CP.dtype)
        (dh_CPM,) = torch.autograd.grad(a_CPI, h_CPM, u_CPI * w_CP[..., None].to(u_CPI.dtype))
        return a_CPI.detach(), d_CP, dh_CPM


def _dot(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.linalg.vecdot(a.to(dtype), b.to(dtype))
