"""Inside a vLLM server under test: weights arrive over gloo, where NCCL has no GPU to work with.

Everything else is vLLM's own: its calls, its engine of them, and how it loads what arrives.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any
from unittest.mock import patch

import torch
from ft_worker import Repacks
from torch.distributed import ProcessGroupGloo, TCPStore
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine


class Gloo:
    """In the place of vLLM's NCCL communicator: what its engine asks of that."""

    def __init__(self, address: str, port: int, rank: int, world: int):
        store = TCPStore(address, port, is_master=False)
        self.group: Any = ProcessGroupGloo(store, rank, world, timedelta(seconds=60))

    def broadcast(self, tensor: torch.Tensor, src: int, stream: None) -> None:
        self.group.broadcast(tensor, src).wait()

    def destroy(self) -> None:
        pass


class Engine(NCCLWeightTransferEngine):
    def init_transfer_engine(self, init_info: Any) -> None:
        rank = init_info.rank_offset + self.parallel_config.rank
        self.packed = init_info.packed
        self.model_update_group: Any = Gloo(init_info.master_address, init_info.master_port, rank, init_info.world_size)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        with (
            patch("torch.cuda.current_stream", return_value=None),
            patch("torch.accelerator.synchronize", return_value=None),
        ):
            super().update_weights(update_info)


WeightTransferEngineFactory.register_engine("gloo", Engine)


class Wired(Repacks):
    """The server's worker has ft's methods, and the backend above."""
