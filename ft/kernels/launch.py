"""What all Triton kernels share: which implementation runs, and one shipped configuration of one kernel."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from attrs import field, frozen
from torch import Tensor

from ft.errors import RecipeError

Impl = Literal["auto", "torch", "triton"]
IMPLS = ("auto", "torch", "triton")


@frozen(kw_only=True)
class Launch:
    """One configuration of one ``@triton.jit`` kernel that ships, so that it can be compiled without a GPU.

    Args:
        name: "op.kernel variant", unique for a target.
        kernel: the function that ``@triton.jit`` made.
        signature: types of the arguments that are not constants, such as {"x": "*bf16", "n": "i32"}. Pointers are
            taken to be multiples of 16 bytes, as whole tensors are; "i32:16" says so of a number.
        constants: values of the ``tl.constexpr`` arguments, and None for an optional pointer that is not given.
        warps, stages: how many warps a program has, and how deep loads are pipelined.
        fuse: whether a product and a sum may round once. Off, so that results equal the interpreter's.
        targets: names in ``ft.kernels.aot.TARGETS`` that this configuration is for; all, when empty.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any] = field(factory=dict)
    warps: int = 4
    stages: int = 2
    fuse: bool = False
    targets: tuple[str, ...] = ()

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments for ``kernel[grid](...)``: what runs is then what was compiled ahead of time."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": self.fuse}


def installed() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on any device; decided before they are imported."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "y", "yes")


def usable(*tensors: Tensor | None) -> bool:
    """Whether Triton kernels can work on these tensors."""
    return installed() and (interpreted() or all(t.device.type == "cuda" for t in tensors if t is not None))


def device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Makes the tensor's GPU the current one: Triton launches there, whatever it is given."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()


def check(impl: str, *tensors: Tensor | None) -> Literal["torch", "triton"]:
    """The implementation to run on these tensors: "auto" takes Triton on a GPU, and torch anywhere else.

    Raises:
        RecipeError: no such implementation, or Triton where it cannot run.
    """
    if impl not in IMPLS:
        raise RecipeError("no such kernels", where="model.kernels", expected=", ".join(IMPLS), got=str(impl))
    on_gpu = all(t.device.type == "cuda" for t in tensors if t is not None)
    if impl == "auto":
        return "triton" if on_gpu and installed() else "torch"
    if impl == "triton" and not usable(*tensors):
        devices = sorted({t.device.type for t in tensors if t is not None})
        raise RecipeError(
            "Triton kernels cannot run here",
            where="model.kernels",
            expected="tensors on a GPU, and triton installed",
            got=f"tensors on {', '.join(devices)}" if installed() else "no triton",
            fix='set model.kernels to "auto" or "torch"' if installed() else "pip install 'ft[triton]'",
        )
    return "triton" if impl == "triton" else "torch"
