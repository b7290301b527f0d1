"""Ranks: who am I, what do I own, and the few collectives a step needs. One process is a world of size 1.

A run is started either alone or by torchrun, which sets RANK, WORLD_SIZE and LOCAL_RANK.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as c10d
from attrs import frozen
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from ft.errors import RecipeError


@frozen(kw_only=True, eq=False)
class World:
    """This process among all. ``mesh`` has the dimensions replicate x shard."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh

    @property
    def first(self) -> bool:
        return self.rank == 0


def rank_from_env() -> tuple[int, int]:
    """(rank, size) before any process group exists, so that data can be prepared while nobody waits."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def own_device() -> torch.device:
    """The accelerator of this rank, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


@contextmanager
def launched(*, replicate: int = 1, timeout: float = 600.0) -> Iterator[World]:
    """A process group over all ranks (gloo on CPU, nccl on GPU), taken down at the end.

    Raises:
        RecipeError: the ranks cannot be divided into ``replicate`` groups.
    """
    rank, size = rank_from_env()
    if size % replicate:
        raise RecipeError(
            f"{size} ranks cannot be divided into {replicate} groups",
            where="parallel.replicate",
            expected=f"a divisor of {size}",
            got=str(replicate),
        )
    device = own_device()
    store = c10d.HashStore() if size == 1 else None
    c10d.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=rank if store else -1,
        world_size=size if store else -1,
        timeout=timedelta(seconds=timeout),
        device_id=device if device.type == "cuda" else None,
    )
    try:
        mesh = init_device_mesh(device.type, (replicate, size // replicate), mesh_dim_names=("replicate", "shard"))
        yield World(rank=rank, size=size, device=device, mesh=mesh)
    finally:
        c10d.destroy_process_group()


def reduce_tree(
    tree: Mapping[str, Tensor | float], world: World, op: Literal["sum", "max"] = "sum"
) -> dict[str, Tensor]:
    """The same names with every 0-d value summed (or maximised) over ranks, in float64, in one collective."""
    if not tree:
        return {}
    names = sorted(tree)
    flat = torch.stack([torch.as_tensor(tree[n], dtype=torch.float64, device=world.device) for n in names])
    if world.size > 1:
        c10d.all_reduce(flat, c10d.ReduceOp.SUM if op == "sum" else c10d.ReduceOp.MAX)
    return dict(zip(names, flat.unbind(), strict=True))


def sum_over_ranks(t: Tensor, world: World) -> Tensor:
    """The sum of a tensor that has one shape on all ranks; ``t`` is overwritten."""
    if world.size > 1:
        c10d.all_reduce(t)
    return t


def any_rank(flag: bool, world: World) -> bool:
    """True on every rank where it is True on one. Waits for the others."""
    if world.size == 1:
        return flag
    return bool(reduce_tree({"flag": float(flag)}, world, "max")["flag"].item())


def barrier(world: World) -> None:
    """Wait for every rank."""
    if world.size > 1:
        c10d.barrier()


def whole(t: Tensor) -> Tensor:
    """The full tensor of a sharded one, gathered by all ranks together; any other tensor as it is."""
    return t.full_tensor() if isinstance(t, DTensor) else t


def local_rows(t: Tensor) -> tuple[Tensor, int, int]:
    """This rank's part of a tensor that FSDP2 shards on dimension 0, and which rows it is: start, stop.

    A plain tensor is all here. Replicated dimensions of the mesh do not matter.
    """
    if not isinstance(t, DTensor):
        return t, 0, t.shape[0] if t.ndim else 1
    start, size = 0, t.shape[0]
    for dim, placement in enumerate(t.placements):
        if isinstance(placement, Shard):
            assert placement.dim == 0, "only dimension 0 is sharded"
            chunk = -(-size // t.device_mesh.size(dim))
            begin = min(t.device_mesh.get_local_rank(dim) * chunk, size)
            start, size = start + begin, min(chunk, size - begin)
    return t.to_local(), start, start + size


@torch.no_grad()
def copy_into(target: Tensor, source: Tensor) -> None:
    """Overwrite ``target`` by ``source``, which is whole; of a sharded target each rank fills its own rows."""
    assert target.shape == source.shape, f"{tuple(target.shape)} is not {tuple(source.shape)}"
    local, start, stop = local_rows(target)
    local.copy_(source[start:stop] if local.ndim else source)
