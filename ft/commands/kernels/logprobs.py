"""Log-probs of given tokens under a head, against all logits at once and against Liger.

Shapes: N positions, V vocabulary, D model width.
"""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec

import torch
from attrs import frozen
from torch import Tensor

from ft.commands.kernels.contest import FT, TOLERANCE, Contest, Cost, Results, Run, Spec, carried, differentiate
from ft.kernels.logprobs import token_logps
from ft.kernels.logprobs.cases import Case, Inputs, make


@frozen(kw_only=True)
class Timed:
    case: Case
    trained: bool = False  # the head is trained too

    @property
    def name(self) -> str:
        c = self.case
        return f"{c.name}, {'trained' if self.trained else 'frozen'} head, N{c.N} V{c.V} D{c.D}"


TIMED = (
    Timed(case=Case(name="Llama 2's vocabulary", N=256, V=32_000, D=256)),
    Timed(case=Case(name="Llama 2's vocabulary", N=256, V=32_000, D=256), trained=True),
    Timed(case=Case(name="softcap, entropy", N=256, V=32_000, D=256, options={"softcap": 30.0, "entropy": True})),
    Timed(case=Case(name="Qwen 3's vocabulary", N=64, V=151_936, D=256)),
)


def contest(timed: Timed, dtype: torch.dtype, device: torch.device) -> Contest:
    x = carried(make(timed.case, dtype), device)
    x.hidden_ND.requires_grad_()
    x.head_VD.requires_grad_(timed.trained)
    exact = carried(x, device, torch.float64)
    runs: dict[str, Run] = {FT: partial(ours, x), "torch autograd": partial(plain, x)}
    missing = {}
    if timed.case.options:
        missing["Liger"] = "its chunked log-probs have no softcap and no entropy without a reward loss"
    elif find_spec("liger_kernel") is None:
        missing["Liger"] = "liger_kernel is not installed"
    else:
        runs["Liger"] = partial(liger, x)
    return Contest(
        runs=runs, truth=partial(plain, exact), oracle="log_softmax of all logits in float64",
        tolerance=TOLERANCE[dtype], limit=partial(limit, x), plain=partial(plain, x), missing=missing,
    )  # fmt: skip


def ours(x: Inputs) -> Results:
    logp_N, entropy_N = token_logps(*x.args(), **x.kwargs())
    return _results(x, logp_N, entropy_N)


def plain(x: Inputs) -> Results:
    """What a model does: all logits, then log_softmax in float32."""
    z_NV = x.hidden_ND @ x.head_VD.T
    z_NV = z_NV if z_NV.dtype == torch.float64 else z_NV.float()
    if cap := x.options.get("softcap"):
        z_NV = cap * torch.tanh(z_NV / cap)
    logp_NV = z_NV.log_softmax(-1)
    entropy_N = -(logp_NV.detach().exp() * logp_NV.detach()).sum(1) if x.options.get("entropy") else None
    return _results(x, logp_NV.gather(1, x.target_N[:, None])[:, 0], entropy_N)


def liger(x: Inputs) -> Results:
    from liger_kernel.chunked_loss.fused_linear_ppo import _ChunkedSelectiveLogProbFunction as Function

    return _results(x, Function.apply(*x.args(), None, 1.0, 4096), None)  # type: ignore[arg-type]


def _results(x: Inputs, logp_N: Tensor, entropy_N: Tensor | None) -> Results:
    leaves = {"hidden": x.hidden_ND, "head": x.head_VD}
    found = differentiate(logp_N, {name: t for name, t in leaves.items() if t.requires_grad})
    return found if entropy_N is None else {**found, "entropy": entropy_N.detach()}


@torch.no_grad()
def limit(x: Inputs) -> None:
    z_NV = x.hidden_ND @ x.head_VD.T
    _ = z_NV @ x.head_VD
    if x.head_VD.requires_grad:
        _ = z_NV.T @ x.hidden_ND


def cost(timed: Timed, dtype: torch.dtype) -> Cost:
    """One product forward and one for each gradient; the head is read once, as in a single pass with its Jacobian."""
    c = timed.case
    head = c.V * c.D * dtype.itemsize * (3 if timed.trained else 1)  # again in backward, and its gradient
    return Cost(bytes=head + 2 * c.N * c.D * dtype.itemsize + 12 * c.N, flops=2 * (2 + timed.trained) * c.N * c.V * c.D)


SPECS = tuple(Spec(op="logprobs", name=t.name, make=partial(contest, t), cost=partial(cost, t)) for t in TIMED)
