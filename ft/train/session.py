"""Everything a run holds while it trains, and how it is put together from a recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from attrs import define, frozen
from torch import nn
from torch.optim import Optimizer

from ft.dist import World
from ft.models.build import Built
from ft.models.policy import Policy
from ft.recipe import Recipe
from ft.rollout.health import Health
from ft.rollout.record import Record
from ft.train.guard import GradientCheck, Watch
from ft.train.log import Log
from ft.train.notes import Notes
from ft.types import Context, Dataset


@frozen(kw_only=True, eq=False)
class Session:
    """The parts of a run. Only the policy's and the optimizer's tensors change."""

    recipe: Recipe
    folder: Path
    world: World
    built: Built
    parameters: Mapping[str, nn.Parameter]  # the trained ones
    optimizer: Optimizer
    context: Context
    held_out: Dataset | None
    steps: int
    log: Log
    watch: Watch
    gradients: GradientCheck
    notes: Notes
    record: Record  # of answers, for methods that sample them
    health: Health
    close: Callable[[], None]  # ends what the run started: workers, servers

    @property
    def policy(self) -> Policy:
        return self.built.policy


@define(kw_only=True)
class Progress:
    """Where a run stands; kept in each checkpoint."""

    step: int = 0  # optimizer steps done
    tokens: int = 0  # positions forwarded so far, padding not counted
    best: float | None = None  # lowest held-out loss, or the highest held-out reward with its sign changed
    best_step: int | None = None
    worse: int = 0  # evaluations since then
