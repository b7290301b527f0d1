"""Routing: which experts a token goes to and with what weights, as one description for all families.

    x = softcap * tanh(logits / softcap)                        where there is a softcap
    p = softmax(x) or sigmoid(x)                                over all experts
    c = p + bias                                                the bias chooses, it never weighs
    c = -inf outside the best groups                            a group's worth: its best c, or its two best summed
    index = the k largest c;  w = p[index]
    w = w / max(sum(w) + eps, floor)                            where normalised
    w = w * scale * expert_scale[index]

With score "logits" the k largest logits are chosen and w is their softmax. Where experts are given, as a sampler chose
them, index is theirs and w follows from the logits at hand by the same formula. Shapes: T tokens, E experts, K = k
experts per token, D model width.
"""

from __future__ import annotations

from typing import Literal

import torch
from attrs import frozen
from torch import Tensor

from ft.errors import ModelError
from ft.kernels.launch import Impl, check

Score = Literal["softmax", "sigmoid", "logits"]
Type = Literal["float32", "logits"]


@frozen(kw_only=True)
class Strategy:
    """How a family routes. The comments name families that differ from the default in a field.

    ``scores_in`` is the type p and w are computed in, and ``weights_in`` that of the weights returned: float32, or
    the logits' own.
    """

    k: int
    score: Score = "softmax"
    groups: int = 1  # DeepSeek, Mistral 4
    kept: int = 1  # groups whose experts may be chosen
    worth: Literal["max", "two"] = "two"  # "max": DeepSeek V2
    normalise: bool = False
    eps: float = 0.0  # 1e-20: DeepSeek V3 and its kin
    floor: float = 0.0  # Ernie
    scale: float = 1.0
    softcap: float | None = None  # Laguna
    scores_in: Type = "float32"  # "logits": Mistral 4, GPT-OSS
    weights_in: Type = "float32"  # "logits": Qwen, OLMoE


def route(
    logits_TE: Tensor,
    strategy: Strategy,
    bias_E: Tensor | None = None,
    expert_scale_E: Tensor | None = None,
    *,
    routes_TK: Tensor | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """(index_TK, weight_TK), best expert first; int64 indices of a token are all different.

    Gradients reach ``logits_TE`` and ``expert_scale_E`` through the weights. Among equal scores the Triton form
    chooses the lower index; the torch form leaves it to torch.topk, as the models' own routers do.

    Args:
        routes_TK: experts that take the place of the choice, in the order given; what chose them (biases, groups) has
            no say then. A token of -1 is routed as ever.

    Raises:
        ModelError: a strategy that contradicts itself, or does not fit the number of experts; float64 for Triton;
            ``routes_TK`` as ``check_routes`` refuses them.
        RecipeError: an ``impl`` that cannot run here.
    """
    _check(logits_TE, strategy, bias_E, expert_scale_E)
    if routes_TK is not None:
        check_routes(routes_TK, logits_TE.shape[1], (len(logits_TE), strategy.k))
        routes_TK = routes_TK.to(logits_TE.device, torch.int64)
    wide = impl == "auto" and logits_TE.dtype.itemsize > 4  # float64 is for checks of gradients
    if check("torch" if wide else impl, logits_TE) == "triton":
        from ft.kernels.routing import triton

        return triton.route(logits_TE, strategy, bias_E, expert_scale_E, routes_TK)
    from ft.kernels.routing import reference

    return reference.route(logits_TE, strategy, bias_E, expert_scale_E, routes_TK)


def check_routes(routes_TK: Tensor, E: int, shape: tuple[int, ...], *, where: str = "routes") -> None:
    """Given experts: integers of this shape, a token's all different and in 0 .. E-1, or all -1 for "as ever".

    Values are looked at on a CPU alone; elsewhere looking would wait for the device.

    Raises:
        ModelError: other shapes, types or values.
    """
    dtype, found = routes_TK.dtype, tuple(routes_TK.shape)
    if found != shape or dtype.is_floating_point or dtype == torch.bool:
        raise ModelError(
            "the given routes have the wrong shape or type", where=where, expected=f"integers, {shape}",
            got=f"{dtype}, {found}",
        )  # fmt: skip
    if routes_TK.device.type != "cpu" or not routes_TK.numel():
        return
    ids_TK = routes_TK.long()
    ordered_TK = ids_TK.sort(-1).values
    different_T = (ordered_TK[:, 1:] != ordered_TK[:, :-1]).all(-1)
    right_T = (ordered_TK[:, 0] >= 0) & (ordered_TK[:, -1] < E) & different_T | (ids_TK == -1).all(-1)
    if not right_T.all():
        t = int((~right_T).nonzero()[0, 0])
        raise ModelError(
            "a token is given experts that it cannot have", where=f"{where}, token {t}",
            expected=f"{shape[-1]} different ones of 0 to {E - 1}, or -1 throughout", got=str(ids_TK[t].tolist()),
        )  # fmt: skip


def _check(logits_TE: Tensor, s: Strategy, bias_E: Tensor | None, expert_scale_E: Tensor | None) -> None:
    if logits_TE.ndim != 2 or not logits_TE.is_floating_point():
        raise ModelError("router logits are a matrix of floats", got=f"{logits_TE.dtype} {tuple(logits_TE.shape)}")
    E = logits_TE.shape[1]
    for name, tensor in (("correction bias", bias_E), ("scale per expert", expert_scale_E)):
        if tensor is not None and tuple(tensor.shape) != (E,):
            raise ModelError(
                f"the router's {name} has the wrong shape", expected=f"({E},)", got=f"{tuple(tensor.shape)}"
            )
    if s.score == "logits" and (bias_E is not None or s.groups > 1 or s.normalise):
        raise ModelError("softmax over the chosen logits knows no bias, groups or second normalisation", got=str(s))
    if s.groups < 1 or E % s.groups or not 1 <= s.kept <= s.groups:
        raise ModelError(
            "these groups do not divide the experts", expected="1 <= kept <= groups", got=f"{s}, {E} experts"
        )
    if s.groups > 1 and s.worth == "two" and E // s.groups < 2:
        raise ModelError("a group's two best experts need two experts", got=f"{E // s.groups} experts a group")
    if not 1 <= s.k <= E // s.groups * s.kept:
        raise ModelError(
            "more experts per token than may be chosen", expected=f"1 to {E // s.groups * s.kept}", got=f"k = {s.k}"
        )


__all__ = ["Impl", "Strategy", "check_routes", "route"]
