"""The optimizer: groups, the gradient's norm, and a step that a non-finite gradient cannot spoil."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ft.errors import RecipeError
from ft.recipe import AdamW


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that are trained, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def make(parameters: Mapping[str, nn.Parameter], optim: AdamW) -> Optimizer:
    """AdamW with weight decay on matrices only (a parameter of two or more dimensions).

    Raises:
        RecipeError: 8-bit moments without torchao, or on several ranks.
    """
    matrices = [p for p in parameters.values() if p.dim() >= 2]
    vectors = [p for p in parameters.values() if p.dim() < 2]
    groups = [
        {"params": params, "weight_decay": decay}
        for params, decay in ((matrices, optim.weight_decay), (vectors, 0.0))
        if params
    ]
    if optim.bits == 8:
        if any(isinstance(p, DTensor) and p.device_mesh.size() > 1 for p in parameters.values()):
            raise RecipeError(
                "8-bit moments cannot be sharded yet", where="optim.bits", fix="optim.bits=32, or one rank"
            )
        try:
            from torchao.optim import AdamW8bit  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise RecipeError(
                "8-bit moments need torchao, which is not installed",
                where="optim.bits",
                fix="pip install 'ft[optim]', or optim.bits=32",
            ) from error
        return AdamW8bit(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps)
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Set the rate of every group; optimizers that compile their step hold it as a tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def grad_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Euclidean norm of the whole gradient over all ranks, float32, 0-d. Waits for no device."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    return (cast(DTensor, norm).full_tensor() if isinstance(norm, DTensor) else norm).float()


def clip(parameters: Sequence[nn.Parameter], norm: Tensor, limit: float | None) -> None:
    """Scale the gradient by min(1, limit / norm)."""
    if limit is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)


def update(optimizer: Optimizer, bad: Tensor) -> None:
    """One optimizer step, unless ``bad`` (a 0-d bool tensor, the same on all ranks) is True.

    Fused AdamW takes the flag on the device, so that nothing waits: with it set, weights, moments and step counts
    stay as they are. Optimizers without that door are asked on the host.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.grad_scale, optimizer.found_inf = None, bad.float()  # pyright: ignore[reportAttributeAccessIssue]
        optimizer.step()
    elif not bool(bad):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
