"""Small reductions of RL and EBFT losses, against the same in plain torch with autograd.

Shapes: T packed tokens, S sequences, P prompts, G samples of one prompt, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ft.commands.kernels.contest import FT, TOLERANCE, Contest, Cost, Results, Spec, differentiate
from ft.kernels import reductions
from ft.kernels.reductions.cases import Features, Policy, Segments

SEGMENTS = (
    Segments(name="segment_sum of numbers", lengths=(512,) * 128),
    Segments(name="segment_sum of vectors", lengths=(128,) * 32, D=1024),
)
POLICY = Policy(name="policy_gradient_sums", T=65_536, trained=1.0)
FEATURES = Features(name="similarity", lead=(64,), G=8, D=4096)

Method = Callable[..., dict[str, Tensor]]


def contest(
    tensors: tuple[Tensor, ...], ours: Method, plain: Method, dtype: torch.dtype, device: torch.device
) -> Contest:
    """Both methods on these tensors; the first one gets a gradient."""
    x, *rest = (t.to(device) for t in tensors)

    def run(method: Method, dtype: torch.dtype) -> Results:
        leaf = x.to(dtype).detach().requires_grad_()
        others = [t.to(dtype) if t.is_floating_point() else t for t in rest]
        outs = method(leaf, *others)
        found: Results = {}
        for name, out in outs.items():
            found |= {f"{name} {k}": v for k, v in differentiate(out, {"x": leaf}).items()}
        return found

    return Contest(
        runs={FT: partial(run, ours, dtype), "torch autograd": partial(run, plain, dtype)},
        truth=partial(run, plain, torch.float64), oracle="plain torch in float64",
        tolerance=TOLERANCE[dtype], plain=partial(run, plain, dtype),
    )  # fmt: skip


# ---- sums over sequences --------------------------------------------------------------------------------------------


def segment_contest(case: Segments, dtype: torch.dtype, device: torch.device) -> Contest:
    x_T, seq_T, S = case.make(dtype)

    def ours(x_T: Tensor, seq_T: Tensor) -> dict[str, Tensor]:
        return {"sums": reductions.segment_sum(x_T, seq_T, S)}

    def plain(x_T: Tensor, seq_T: Tensor) -> dict[str, Tensor]:
        wide = torch.promote_types(torch.float32, x_T.dtype)
        return {"sums": torch.zeros(S, *x_T.shape[1:], dtype=wide, device=x_T.device).index_add(0, seq_T, x_T.to(wide))}

    return contest((x_T, seq_T), ours, plain, dtype, device)


def segment_cost(case: Segments, dtype: torch.dtype) -> Cost:
    T, D = sum(case.lengths), max(case.D, 1)
    return Cost(bytes=2 * T * D * dtype.itemsize + 16 * T + 8 * len(case.lengths) * D)


# ---- the clipped surrogate ------------------------------------------------------------------------------------------


def policy_contest(case: Policy, dtype: torch.dtype, device: torch.device) -> Contest:
    def ours(logp_T: Tensor, old_T: Tensor, adv_T: Tensor, mask_T: Tensor) -> dict[str, Tensor]:
        return {"loss": reductions.policy_gradient_sums(logp_T, old_T, adv_T, mask_T).loss}

    def plain(logp_T: Tensor, old_T: Tensor, adv_T: Tensor, mask_T: Tensor) -> dict[str, Tensor]:
        wide = torch.promote_types(torch.float32, logp_T.dtype)
        ratio_T = (logp_T.to(wide) - old_T.to(wide)).exp()
        gain_T = torch.minimum(ratio_T * adv_T.to(wide), ratio_T.clamp(0.8, 1.2) * adv_T.to(wide))
        return {"loss": -torch.where(mask_T, gain_T, 0).sum()}

    return contest(case.make(dtype)[0], ours, plain, dtype, device)


def policy_cost(case: Policy, dtype: torch.dtype) -> Cost:
    """Three streams and the mask read, the gradient written."""
    return Cost(bytes=case.T * (4 * dtype.itemsize + 1))


# ---- features of samples --------------------------------------------------------------------------------------------


def similarity_contest(case: Features, dtype: torch.dtype, device: torch.device) -> Contest:
    def ours(gen_PGD: Tensor, ref_PD: Tensor) -> dict[str, Tensor]:
        alignment_PG, diversity_PG = reductions.similarity(gen_PGD, ref_PD)
        return {"both": torch.stack([alignment_PG, diversity_PG])}

    def plain(gen_PGD: Tensor, ref_PD: Tensor) -> dict[str, Tensor]:
        wide = torch.promote_types(torch.float32, gen_PGD.dtype)
        x_PGD, y_P1D = gen_PGD.to(wide), ref_PD.to(wide)[..., None, :]
        gram_PGG = x_PGD @ x_PGD.mT
        others_PG = gram_PGG.sum(-1) - gram_PGG.diagonal(dim1=-2, dim2=-1)
        alignment_PG = 2 * torch.cosine_similarity(x_PGD, y_P1D, dim=-1)
        return {"both": torch.stack([alignment_PG, 2 / (case.G - 1) * others_PG])}

    gen_PGD, ref_PD, _ = case.make(dtype)
    return contest((gen_PGD, ref_PD), ours, plain, dtype, device)


def similarity_cost(case: Features, dtype: torch.dtype) -> Cost:
    """Features read once a pass and their gradient written; every pair multiplied, and once more in backward."""
    P = case.lead[0]
    rows = P * (3 * case.G + 2)
    return Cost(bytes=rows * case.D * dtype.itemsize, flops=2 * 2 * P * case.G * (case.G + 1) * case.D)


SPECS = (
    *(
        Spec(
            op="reductions",
            name=f"{c.name}, T{sum(c.lengths)} S{len(c.lengths)}" + (f" D{c.D}" if c.D else ""),
            make=partial(segment_contest, c),
            cost=partial(segment_cost, c),
        )
        for c in SEGMENTS
    ),
    Spec(
        op="reductions",
        name=f"{POLICY.name}, T{POLICY.T}",
        make=partial(policy_contest, POLICY),
        cost=partial(policy_cost, POLICY),
    ),
    Spec(
        op="reductions",
        name=f"{FEATURES.name}, P{FEATURES.lead[0]} G{FEATURES.G} D{FEATURES.D}",
        make=partial(similarity_contest, FEATURES),
        cost=partial(similarity_cost, FEATURES),
    ),
)
