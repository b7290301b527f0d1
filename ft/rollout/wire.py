"""Straight from the trainer's memory into the server's: whose GPUs can do that, and how tensors travel."""

from __future__ import annotations

import base64
import os
from typing import Any, Literal, Protocol

import torch
from attrs import define, field
from torch import Tensor

from ft.errors import RecipeError
from ft.recipe.online import VLLM


class Wire(Protocol):
    """Between us, member 0, and each of the server's workers. ``join`` and ``send`` wait for them."""

    def open(self, world: int) -> dict[str, Any]:
        """Begin a new connection of ``world`` members; what the others must know to join."""
        ...

    def join(self) -> None:
        """Until all members are there."""
        ...

    def send(self, tensor: Tensor) -> None:
        """To all others, who expect this shape and type next."""
        ...

    def flush(self) -> None:
        """Until all that was sent has left."""
        ...


@define(kw_only=True, eq=False)
class Nccl:
    """NCCL as PyTorch has it, without a process group: the server's workers are no part of ours.

    A stream of its own, so that a transfer that never ends leaves the others' work alone.
    """

    device: torch.device
    world: int = 0
    id: bytes = b""
    comm: Any = None
    stream: torch.cuda.Stream | None = field(default=None, init=False)

    def open(self, world: int) -> dict[str, Any]:
        import torch.cuda.nccl as nccl

        self.world, self.id = world, nccl.unique_id()
        return {"nccl_unique_id_b64": base64.b64encode(self.id).decode()}

    def join(self) -> None:
        import torch.cuda.nccl as nccl

        with torch.cuda.device(self.device):
            self.stream, self.comm = torch.cuda.Stream(), nccl.init_rank(self.world, self.id, 0)
            with torch.cuda.stream(self.stream):
                one = torch.zeros(1, device=self.device)
                # vLLM's end of a connection made from an id begins with the sum of one number.
                nccl.all_reduce([one], streams=[self.stream], comms=[self.comm])
            self.stream.synchronize()

    def send(self, tensor: Tensor) -> None:
        import torch.cuda.nccl as nccl

        # Its copy on the GPU is the stream's, too: its memory is used again only after it has left.
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            nccl.broadcast([tensor.to(self.device).contiguous()], streams=[self.stream], comms=[self.comm])

    def flush(self) -> None:
        assert self.stream is not None
        self.stream.synchronize()


def chosen(options: VLLM) -> Literal["file", "nccl"]:
    """The way that ``options`` ask for: "auto" is NCCL where the server has GPUs of its own.

    Raises:
        RecipeError: NCCL is asked for and cannot be.
    """
    if options.transfer == "file" or (options.transfer == "auto" and _obstacle(options)):
        return "file"
    if obstacle := _obstacle(options):
        raise RecipeError(
            "weights cannot be sent to the server by NCCL", where="sampler.transfer", got=obstacle,
            fix='set sampler.devices to GPUs that the trainer does not use, or sampler.transfer="file"',
        )  # fmt: skip
    return "nccl"


def _obstacle(options: VLLM) -> str:
    """Why NCCL cannot connect us with the server; "" where it can."""
    if not torch.cuda.is_available():
        return "no CUDA here"
    if options.devices is None:
        return "" if options.url is not None and options.transfer == "nccl" else "no sampler.devices"
    shared = set(_ours()) & {name.strip() for name in options.devices.split(",")}
    return f"the trainer's own GPU {', '.join(sorted(shared))} among sampler.devices" if shared else ""


def _ours() -> list[str]:
    """The GPUs of this machine's trainers, as CUDA_VISIBLE_DEVICES numbers them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(i) for i in range(torch.cuda.device_count())] if visible is None else visible.split(",")
    return [name.strip() for name in names][: int(os.environ.get("LOCAL_WORLD_SIZE", "1"))]
