"""A rank's part of a parameter that FSDP2 shards on dimension 0."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard


def local_rows(tensor: Tensor) -> tuple[Tensor, int, int]:
    """This rank's part of a parameter, and which rows of dimension 0 it is. Plain tensors are all here."""
    if not isinstance(tensor, DTensor):
        return tensor, 0, tensor.shape[0] if tensor.ndim else 1
    start, size = 0, tensor.shape[0]
    for dim, placement in enumerate(tensor.placements):
        if isinstance(placement, Shard):
            assert placement.dim == 0, "only dimension 0 is sharded"
            ranks, rank = tensor.device_mesh.size(dim), tensor.device_mesh.get_local_rank(dim)
            chunk = -(-size // ranks)
            begin = min(rank * chunk, size)
            start, size = start + begin, min(chunk, size - begin)
    return tensor.to_local(), start, start + size


@torch.no_grad()
def copy_rows(tensor: Tensor, whole: Tensor) -> None:
    """Copy this rank's rows of ``whole`` into a plain or sharded ``tensor``, casting to its type."""
    local, start, stop = local_rows(tensor)
    if not local.ndim:
        local.copy_(whole.reshape(()))
    elif stop > start:
        local.copy_(whole[start:stop])
