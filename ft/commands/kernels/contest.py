"""One case of one op: what ft computes, what is true, who else computes it, and what the least work would be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import attrs
import torch
from attrs import field, frozen
from torch import Tensor

Results = dict[str, Tensor]
Run = Callable[[], Results]
Value = TypeVar("Value")

DTYPES = ("float32", "bfloat16", "float16")
# The relative error, in norm, that the ops' tests allow in each type.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
FT = "ft"


@frozen(kw_only=True)
class Cost:
    """The least that any implementation moves and multiplies: each input read once a pass, each result written once."""

    bytes: int
    flops: int = 0


@frozen(kw_only=True, eq=False)
class Contest:
    """Contenders on the same tensors. Each run gives values and gradients by name, and is what is timed.

    Args:
        runs: by contender, "ft" among them. Peers may give fewer results than ft.
        truth: every result of ft, by other means; ``oracle`` says which.
        limit: dense products of the same FLOPs, where that is a bound.
        plain: the op as plain differentiable torch, which torch.compile may be given.
        missing: contenders that cannot take part, and why.
    """

    runs: Mapping[str, Run]
    truth: Run
    oracle: str
    tolerance: float
    limit: Callable[[], Any] | None = None
    plain: Run | None = None
    missing: Mapping[str, str] = field(factory=dict)


@frozen(kw_only=True)
class Spec:
    """A case by name; ``make`` builds its tensors, ``cost`` needs none of them."""

    op: str
    name: str
    make: Callable[[torch.dtype, torch.device], Contest]
    cost: Callable[[torch.dtype], Cost]


def faults(got: Results, want: Results, tolerance: float) -> list[str]:
    """What is wrong with ``got``, each fault as "grad hidden by 0.3"; NaN is wrong."""
    found = [f"no {name}" for name in want if name not in got]
    for name, value in want.items():
        if name in got and not (error := relative(got[name], value)) <= tolerance:
            found.append(f"{name} by {error:.2g}")
    return found


def relative(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want|, in float64; 0 where both are empty or equal."""
    if got.shape != want.shape:
        return float("inf")
    difference = (got.double() - want.double()).norm().item()
    return difference / max(want.double().norm().item(), 1e-30) if difference else difference


def carried(value: Value, device: torch.device, dtype: torch.dtype | None = None) -> Value:
    """The same attrs value with its tensors as fresh leaves on ``device``, float ones of ``dtype`` if given."""
    if isinstance(value, Tensor):
        kept = dtype if value.is_floating_point() else None
        return value.detach().to(device, kept, copy=True).requires_grad_(value.requires_grad)  # type: ignore[return-value]
    if not attrs.has(type(value)):
        return value
    names = [f.name for f in attrs.fields(type(value))]
    return attrs.evolve(value, **{n: carried(getattr(value, n), device, dtype) for n in names})  # type: ignore[misc]


def differentiate(out: Tensor, leaves: Mapping[str, Tensor]) -> Results:
    """``{"out": out, "grad x": ...}`` for a fixed cotangent."""
    cotangent = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=torch.float32).view_as(out).to(out.dtype)
    grads = torch.autograd.grad(out, list(leaves.values()), cotangent)
    return {"out": out.detach(), **{f"grad {n}": g for n, g in zip(leaves, grads, strict=True)}}
