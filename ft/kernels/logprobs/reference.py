"""What token_logps does with one tile of logits, in plain torch: the reference of the Triton form.

Shapes: N positions, V vocabulary, D model width, r LoRA rank; R positions of a block and C tokens of a tile.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ft.kernels.logprobs import passes
from ft.kernels.logprobs.autograd import Passes
from ft.kernels.logprobs.passes import Block, Forward, Grads, Scores, Tile
from ft.kernels.logprobs.tiles import FORBIDDEN, Head, Options, as_product, flatten_, logits, place


def forward(hidden_ND: Tensor, head: Head, target_N: Tensor, options: Options, *, jacobian: bool) -> Forward:
    """One pass; with ``jacobian`` it also forms d logp / d hidden."""
    tiles = 1 + options.entropy + bool(options.softcap and jacobian)
    return passes.forward(hidden_ND, head, target_N, options, jacobian=jacobian, add=_add, tiles=tiles)


def _add(block: Block, tile: Tile) -> None:
    options, work = tile.options, tile.work
    jacobian = block.head_RD is not None
    z_RC, tanh_RC = logits(tile.hidden_RD, tile.low_Rr, tile.part, options, work, tanh=jacobian)
    column_R1, inside_R1 = place(tile.target_R[:, None], tile.first, tile.first + z_RC.shape[1])
    there_R1 = z_RC.gather(1, column_R1)
    block.target_R1 = torch.where(inside_R1, there_R1, block.target_R1)
    z_RC.scatter_(1, column_R1, there_R1.masked_fill_(inside_R1, FORBIDDEN))
    _rebase(block, z_RC.amax(1, keepdim=True))
    z_RC.sub_(block.most_R1)
    exp_RC = torch.exp(z_RC, out=work.view(work.tiles[-1], *z_RC.shape) if options.entropy else z_RC)
    block.sum_R1 += exp_RC.sum(1, keepdim=True)
    if options.entropy:
        block.first_R1 += z_RC.mul_(exp_RC).sum(1, keepdim=True)
    if jacobian:
        block.gather(as_product(flatten_(exp_RC, tanh_RC), work), tile.part, work)


def _rebase(block: Block, tile_most_R1: Tensor) -> None:
    most_R1 = torch.maximum(block.most_R1, tile_most_R1)
    change_R1 = block.most_R1 - most_R1
    shrink_R1 = change_R1.exp()
    block.first_R1 = shrink_R1 * (block.first_R1 + block.sum_R1 * change_R1)
    block.sum_R1 *= shrink_R1
    block.shrink(shrink_R1)
    block.most_R1 = most_R1


def backward(
    scores: Scores, hidden_ND: Tensor, head: Head, target_N: Tensor, options: Options, needs: passes.Needs
) -> Grads:
    """Gradients of sum(grad_N * logp_N), by computing each tile of logits again."""
    return passes.backward(
        scores, hidden_ND, head, target_N, options, needs,
        gradient_tile=_gradient_tile, tiles=2 if options.softcap else 1,
    )  # fmt: skip


def _gradient_tile(tile: Tile, scores: Scores, bias_C: Tensor | None) -> Tensor:
    """grad * (onehot - p), times the softcap's slope."""
    z_RC, tanh_RC = logits(tile.hidden_RD, tile.low_Rr, tile.part, tile.options, tile.work, tanh=True)
    column_R1, inside_R1 = place(tile.target_R[:, None], tile.first, tile.first + z_RC.shape[1])
    grad_R1 = scores.grad_N[:, None]
    z_RC.sub_(scores.lse_N[:, None]).exp_().mul_(-grad_R1)
    target_R1 = grad_R1 * -torch.expm1(scores.logp_N)[:, None]
    z_RC.scatter_(1, column_R1, torch.where(inside_R1, target_R1, z_RC.gather(1, column_R1)))
    flatten_(z_RC, tanh_RC)
    if bias_C is not None:
        bias_C += z_RC.sum(0)
    return as_product(z_RC, tile.work)


PASSES = Passes(forward, backward)
