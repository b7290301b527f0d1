"""A run's state as named tensors: whole, whatever the number of ranks, so that any number can take it up again.

Trained weights, the optimizer's moments and what a few methods keep (``kept``) are all there is. The order of rows and
the dropout are functions of (seed, step), so no generator and no loader has a state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ft.dist import copy_into, whole
from ft.errors import CheckpointError
from ft.io.stream import Entry
from ft.train.optim import set_lr


def entries(tensors: Mapping[str, Tensor]) -> list[Entry]:
    """One entry per tensor; a sharded one is gathered, by all ranks together, when its turn comes."""

    def get(t: Tensor) -> Callable[[], Tensor]:
        return lambda: whole(t.detach())

    return [Entry(name=n, shape=tuple(t.shape), dtype=t.dtype, get=get(t)) for n, t in tensors.items()]


def optimizer_tensors(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The optimizer's state by name: "<parameter>/<moment>", quantised moments as the tensors they are made of."""
    found: dict[str, Tensor] = {}
    for name, p in parameters.items():
        for key, value in optimizer.state.get(p, {}).items():
            found.update(_leaves(f"{name}/{key}", value))
    return found


def _leaves(name: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, DTensor) and type(value.to_local()) is not Tensor:
        value = value.to_local()  # quantised moments, which ``optim.make`` allows on a single rank only
    if isinstance(value, DTensor) or not hasattr(value, "__tensor_flatten__"):
        yield name, value
        return
    for part in value.__tensor_flatten__()[0]:  # pyright: ignore[reportAttributeAccessIssue]
        yield from _leaves(f"{name}.{part}", getattr(value, part))


@torch.no_grad()
def restore_optimizer(
    optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], saved: Mapping[str, Tensor]
) -> None:
    """Fill the optimizer with what ``optimizer_tensors`` named. Each rank takes its shard.

    The state is first made by a step with a zero gradient at a rate of zero, which moves no weight; then every
    tensor of it is overwritten.

    Raises:
        CheckpointError: names or shapes differ.
    """
    if not saved:
        return
    rate = float(optimizer.param_groups[0]["lr"])
    for p in parameters.values():
        p.grad = torch.zeros_like(p)
    set_lr(optimizer, 0.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    set_lr(optimizer, rate)
    own = optimizer_tensors(optimizer, parameters)
    if own.keys() != saved.keys():
        missing, extra = sorted(own.keys() - saved.keys()), sorted(saved.keys() - own.keys())
        raise CheckpointError(
            "the saved optimizer does not fit this run",
            expected=f"{len(own)} tensors" + (f", among them {missing[0]}" if missing else ""),
            got=f"{len(saved)} tensors" + (f", among them {extra[0]}" if extra else ""),
            fix="resume with the recipe that the run began with",
        )
    for name, target in own.items():
        copy_into(target, saved[name])


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make every random draw of this step (dropout) a function of (seed, step, rank) alone."""
    torch.manual_seed(((seed * 1_000_003 + step) * 4099 + rank) % 2**63)
