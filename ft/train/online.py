"""What an online run needs besides a policy: a sampler, and workers that score."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from attrs import frozen

from ft.data.tokenizer import stop_ids
from ft.dist import World
from ft.io.weights import ModelFolder
from ft.models.build import Built
from ft.recipe import Recipe
from ft.rollout.embedded import EmbeddedSampler
from ft.rollout.judge import Judge, scorer
from ft.types import Sampler, asked

Say = Callable[[str], None]


@frozen(kw_only=True, eq=False)
class Online:
    """Both, or neither where the method reads its answers."""

    sampler: Sampler | None = None
    judge: Judge | None = None

    def close(self) -> None:
        if self.judge is not None:
            self.judge.close()


def start(recipe: Recipe, built: Built, world: World, tokenizer: Any, folder: ModelFolder | None, say: Say) -> Online:
    """The sampler and the workers of a recipe. Processes are started when they are first needed."""
    method: Any = recipe.method
    if asked(method).rows != "prompts":
        return Online()
    sampler = EmbeddedSampler(
        policy=built.policy,
        world=world,
        sampling=method.sampling,
        stop=stop_ids(tokenizer, folder.path if folder else None),
        rows=recipe.sampler.rows,
        seed=recipe.seed,
    )
    judge = Judge(
        scorers=[scorer(r.function, r.weight, r.options) for r in method.rewards],
        decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
        timeout=recipe.judging.timeout,
        workers=recipe.judging.workers,
        most_failures=recipe.judging.failures,
        notice=say,
        world=world,
    )
    return Online(sampler=sampler, judge=judge)
