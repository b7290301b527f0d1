"""NF4 quantise, dequantise and linear layer, against bitsandbytes and against the format's definition."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from typing import Any, Literal

import torch
from attrs import evolve, frozen
from torch import Tensor
from torch.nn.functional import linear

from ft.commands.kernels.contest import FT, TOLERANCE, Contest, Cost, Results, Run, Spec, carried, differentiate
from ft.kernels import nf4
from ft.kernels.nf4 import NF4Tensor, dynamic_map, nf4_code, reference
from ft.kernels.nf4.cases import Case, make

Op = Literal["quantise", "dequantise", "linear"]
BNB = "bitsandbytes"


@frozen(kw_only=True)
class Timed:
    op: Op
    case: Case
    rows: int = 0  # of a linear layer's input

    @property
    def name(self) -> str:
        shape = "x".join(map(str, self.case.shape))
        return f"{self.op} {shape}" + (f", {self.rows} rows" if self.rows else "")


MATRIX, STACK = Case(name="matrix", shape=(2048, 2048)), Case(name="stack", shape=(16, 512, 512))
TIMED = (
    Timed(op="quantise", case=MATRIX),
    Timed(op="dequantise", case=MATRIX),
    Timed(op="dequantise", case=STACK),
    Timed(op="linear", case=MATRIX, rows=8),
    Timed(op="linear", case=MATRIX, rows=512),
)


def contest(timed: Timed, dtype: torch.dtype, device: torch.device) -> Contest:
    w = make(evolve(timed.case, dtype=dtype)).to(device)
    q = nf4.quantise(w)
    x = torch.randn(timed.rows, w.shape[-1], generator=torch.Generator().manual_seed(1)).to(device, dtype)
    x.requires_grad_()
    theirs, missing = _bitsandbytes(timed, w, x)
    made = {
        "quantise": lambda: _quantised(nf4.quantise(w)),
        "dequantise": lambda: {"out": nf4.dequantise(q)},
        "linear": lambda: differentiate(nf4.linear(x, q), {"x": x}),
    }
    runs: dict[str, Run] = {FT: made[timed.op]} | ({} if theirs is None else {BNB: theirs})
    parts: dict[str, Any] = {"runs": runs, "missing": missing}
    if timed.op == "quantise":
        if theirs is not None:
            return Contest(truth=theirs, oracle=f"{BNB}, bit for bit", tolerance=0.0, **parts)
        slow = partial(reference.quantise, w)
        return Contest(truth=lambda: _quantised(slow()), oracle="the torch path, bit for bit", tolerance=0.0, **parts)
    if timed.op == "dequantise":
        truth = partial(lambda: {"out": by_definition(q)})
        return Contest(truth=truth, oracle="the format's definition, bit for bit", tolerance=0.0, plain=truth, **parts)
    return Contest(
        truth=lambda: _dense(carried(x, device, torch.float64), by_definition(q).double()),
        oracle="a dense layer of the dequantised weight in float64",
        tolerance=TOLERANCE[dtype], limit=lambda: (linear(x.detach(), w), x.detach() @ w.T @ w), **parts,
    )  # fmt: skip


def by_definition(q: NF4Tensor) -> Tensor:
    """Each code's value times its block's scale, as ``ft.kernels.nf4.format`` writes it; whole blocks only."""
    assert q.absmax2 is not None and q.offset is not None
    device = q.packed.device
    codes = torch.stack([q.packed >> 4, q.packed & 15], dim=1).flatten().long()
    nested = q.absmax2.repeat_interleave(256)[: len(q.absmax)]
    scale_B = dynamic_map(device)[q.absmax.long()] * nested + q.offset
    values = nf4_code(device)[codes].view(-1, q.block) * scale_B[:, None]
    return values.view(q.shape).to(q.dtype)


def _quantised(q: NF4Tensor) -> Results:
    return {"codes": q.packed.view(-1), "scales": q.absmax}


def _dense(x: Tensor, w: Tensor) -> Results:
    return differentiate(linear(x, w), {"x": x})


def _bitsandbytes(timed: Timed, w: Tensor, x: Tensor) -> tuple[Run | None, dict[str, str]]:
    """Its run of this op, or why there is none."""
    if find_spec("bitsandbytes") is None:
        return None, {BNB: "bitsandbytes is not installed"}
    import bitsandbytes as bnb
    import bitsandbytes.functional as F

    def quantise() -> tuple[Tensor, Any]:
        return F.quantize_4bit(w, quant_type="nf4", compress_statistics=True)

    packed, state = quantise()
    runs: dict[Op, Run] = {
        "quantise": lambda: _theirs(*quantise()),
        "dequantise": lambda: {"out": F.dequantize_4bit(packed, state)},
        "linear": lambda: differentiate(bnb.matmul_4bit(x, packed.t(), quant_state=state), {"x": x}),
    }
    return runs[timed.op], {}


def _theirs(packed: Tensor, state: Any) -> Results:
    return {"codes": packed.view(-1), "scales": state.absmax}


def cost(timed: Timed, dtype: torch.dtype) -> Cost:
    """The quantised weight (33/64 of a byte a value, and little else) and the dense one; a linear layer reads the
    quantised one in both passes and never writes it."""
    n = 1
    for size in timed.case.shape:
        n *= size
    packed = n // 2 + n // 64
    if timed.op != "linear":
        return Cost(bytes=n * dtype.itemsize + packed)
    M, N = timed.case.shape
    return Cost(bytes=2 * packed + 2 * timed.rows * (M + N) * dtype.itemsize, flops=4 * timed.rows * n)


SPECS = tuple(Spec(op="nf4", name=t.name, make=partial(contest, t), cost=partial(cost, t)) for t in TIMED)
