"""Routed experts as a loop over experts, in plain differentiable torch: the oracle. Shapes as in the package."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from ft.kernels.experts import Factors, LoRA, Params, Stack
from ft.kernels.nf4 import NF4Tensor, dequantise


def experts(hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor, params: Params, lora: LoRA | None = None) -> Tensor:
    """out_TD, one expert at a time; see ``ft.kernels.experts.experts``."""
    lora = lora or LoRA()
    sum_dtype = torch.promote_types(torch.float32, hidden_TD.dtype)
    out_TD = torch.zeros_like(hidden_TD, dtype=sum_dtype)
    for e in index_TK.unique().tolist():
        token, slot = torch.where(index_TK == e)
        a = params.act(_project(hidden_TD[token], params.up, lora.up, e))
        y = _project(a, params.down, lora.down, e)
        out_TD = out_TD.index_add(0, token, y.to(sum_dtype) * weight_TK[token, slot, None].to(sum_dtype))
    return out_TD.to(hidden_TD.dtype)


def _project(x: Tensor, stack: Stack, lora: Factors | None, e: int) -> Tensor:
    w = dequantise(stack.weight, x.dtype) if isinstance(stack.weight, NF4Tensor) else stack.weight
    y = linear(x, w[e].t() if stack.transposed else w[e], None if stack.bias_EM is None else stack.bias_EM[e])
    if lora is None:
        return y
    return y + lora.scaling * linear(linear(x, lora.A_ErN[e].to(x.dtype)), lora.B_EMr[e].to(x.dtype))
