"""Log-probs of given tokens under a language-model head, without ever holding all their logits."""

from __future__ import annotations

import torch
from torch import Tensor

from ft.errors import ModelError
from ft.kernels.launch import check
from ft.kernels.logprobs import autograd, reference
from ft.kernels.logprobs.tiles import Options


def token_logps(
    hidden_ND: Tensor,
    head_VD: Tensor,
    target_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    entropy: bool = False,
    lora: tuple[Tensor, Tensor, float] | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """``(logp_N, entropy_N)``: log-prob of each target, in nats, and the entropy of its distribution if asked for.

        x = scale * (hidden @ head.T + bias + s * (hidden @ A.T) @ B.T),    lora = (A_rD, B_Vr, s)
        z = softcap * tanh(x / softcap) / temperature,    or x / temperature without a softcap
        logp_n = z[n, target_n] - logsumexp(z[n])

    Both results are float32 (float64 for float64 inputs). Entropy carries no gradient. Only trained positions should
    be given: every row costs two products with the head. N = 0 gives empty results that still have a graph.

    No more than a tile of logits exists at a time. Where only ``hidden`` needs a gradient, forward also forms the
    Jacobian d logp_n / d hidden_n, one row of width D a position, and backward only scales it; a head, bias or LoRA
    that is trained makes backward compute the tiles again. Products take the wider of the two types of ``hidden_ND``
    and ``head_VD``; all sums are float32. With ``impl="triton"`` logits are float32 too, but where forward forms the
    Jacobian; float64 is for torch alone.

    Raises:
        ModelError: tensors that do not fit each other, or an option out of range.
        RecipeError: an ``impl`` that cannot run.
    """
    options = Options(temperature=temperature, softcap=softcap, scale=scale, entropy=entropy)
    A_rD, B_Vr, s = lora or (None, None, 1.0)
    _check(hidden_ND, head_VD, target_N, bias_V, A_rD, B_Vr)
    passes = _passes(impl, hidden_ND, head_VD, target_N, bias_V, A_rD, B_Vr)
    return autograd.token_logps(hidden_ND, head_VD, target_N, bias_V, A_rD, B_Vr, s, options, passes)


def _passes(impl: str, *tensors: Tensor | None) -> autograd.Passes:
    exact = any(t is not None and t.dtype == torch.float64 for t in tensors)
    chosen = check("torch" if exact and impl == "auto" else impl, *tensors)
    if chosen == "torch":
        return reference.PASSES
    if exact:
        raise ModelError("Triton's log-probs have no float64", fix="use impl='torch', or float32")
    from ft.kernels.logprobs import triton

    return triton.PASSES


def _check(
    hidden_ND: Tensor,
    head_VD: Tensor,
    target_N: Tensor,
    bias_V: Tensor | None,
    A_rD: Tensor | None,
    B_Vr: Tensor | None,
) -> None:
    N, D, V = len(target_N), head_VD.shape[-1], head_VD.shape[0]
    wanted = [("hidden", hidden_ND, (N, D)), ("head", head_VD, (V, D)), ("targets", target_N, (N,))]
    wanted += [("bias", bias_V, (V,))] if bias_V is not None else []
    if A_rD is not None and B_Vr is not None:
        wanted += [("LoRA's A", A_rD, (len(A_rD), D)), ("LoRA's B", B_Vr, (V, len(A_rD)))]
    for name, tensor, shape in wanted:
        if tuple(tensor.shape) != shape:
            raise ModelError(f"{name} of token_logps has the wrong shape", expected=str(shape), got=str(tensor.shape))
    # On another device the check would wait for it.
    if N and target_N.device.type == "cpu" and not 0 <= int(target_N.min()) <= int(target_N.max()) < V:
        raise ModelError(
            "a target is no token of the vocabulary",
            expected=f"0 to {V - 1}",
            got=f"{int(target_N.min())} to {int(target_N.max())}",
            fix="pass the trained positions only",
        )
