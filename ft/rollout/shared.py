"""What one rank knows, told to the others by collectives on numbers: answers, and failures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
from attrs import frozen

from ft import dist
from ft.dist import World
from ft.errors import FtError
from ft.types import Example

T = TypeVar("T")


@frozen(eq=False)
class Answer:
    """Tokens drawn, their log-probs as drawn (NaN where unknown), and whether the last one ends the answer."""

    tokens_L: np.ndarray
    logp_L: np.ndarray
    stopped: bool
    routes_LMK: np.ndarray | None = None  # see ``ft.types.Rollout``


def number(prompt: Example, place: int) -> int:
    """By which a prompt's answers are seeded, wherever it stands: its group, which no other prompt of the step has.

    Held-out prompts have none, and are told apart by their place.
    """
    return place if prompt.group is None else prompt.group


def on_first(act: Callable[[], T], world: World, otherwise: T) -> T:
    """``act`` on the first rank while the others wait; what it returns there, ``otherwise`` elsewhere.

    Raises:
        FtError: what it raised; on every rank, so that all of them stop together.
    """
    found, failure = otherwise, None
    if world.first:
        try:
            found = act()
        except FtError as error:
            failure = error
    if dist.any_rank(failure is not None, world):
        raise failure or FtError("the first rank could not go on; its own message says why")
    return found


def from_all_ranks(found: Sequence[Sequence[Answer]], n: int, world: World) -> list[list[Answer]]:
    """The answers of every rank on every rank: each fills in its own rows of one table, which is summed.

    A rank has ``n`` answers to a prompt or none, and no two ranks have answers to the same one.
    """
    if world.size == 1:
        return [list(group) for group in found]
    flat = [answer for group in found for answer in (group or [None] * n)]
    longest = int(dist.reduce_tree({"L": max((len(a.tokens_L) for a in flat if a), default=0)}, world, "max")["L"])
    table = torch.zeros(len(flat), 2 * longest + 5, dtype=torch.float64, device=world.device)
    for row, answer in zip(table, flat, strict=True):
        if answer is not None:
            size = len(answer.tokens_L)
            row[0], row[1] = size, answer.stopped
            row[2:5] = torch.tensor((0, 0, 0) if answer.routes_LMK is None else answer.routes_LMK.shape)
            row[5 : 5 + size] = torch.from_numpy(answer.tokens_L.astype(np.float64))
            row[5 + longest : 5 + longest + size] = torch.from_numpy(answer.logp_L.astype(np.float64))
    summed = dist.sum_over_ranks(table, world).cpu().numpy()
    every = [_read(row, longest, answer, world) for row, answer in zip(summed, flat, strict=True)]
    return [every[p * n : (p + 1) * n] for p in range(len(found))]


def _read(row: np.ndarray, longest: int, mine: Answer | None, world: World) -> Answer:
    """``mine``: the answer, on the rank that has it."""
    size, shape = int(row[0]), tuple(row[2:5].astype(int).tolist())
    tokens_L, logp_L = row[5 : 5 + size].astype(np.int32), row[5 + longest : 5 + longest + size].astype(np.float32)
    return Answer(tokens_L, logp_L, bool(row[1]), _routes(mine, shape, world) if all(shape) else None)


def _routes(mine: Answer | None, shape: tuple[int, ...], world: World) -> np.ndarray:
    """Summed like the table, answer by answer: they are hundreds of numbers a token."""
    whole = torch.zeros(shape, dtype=torch.int32, device=world.device)
    if mine is not None and mine.routes_LMK is not None:
        whole.copy_(torch.from_numpy(mine.routes_LMK))
    return dist.sum_over_ranks(whole, world).cpu().numpy().astype(np.int16)
