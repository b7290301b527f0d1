"""What an online run needs besides a policy: a sampler, and workers that score."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

from attrs import frozen

from ft.data.tokenizer import stop_ids
from ft.dist import World
from ft.errors import RecipeError
from ft.io.weights import ModelFolder
from ft.models.build import Built
from ft.recipe import VLLM, Embedded, Recipe, run_folder
from ft.rollout import canary, probe, routed, sent
from ft.rollout.ahead import AheadSampler
from ft.rollout.client import Client
from ft.rollout.embedded import EmbeddedSampler
from ft.rollout.environment import EnvironmentSampler, reply_ids
from ft.rollout.judge import Judge, scorers_of
from ft.rollout.server import TOKEN, Server, context, launch
from ft.rollout.vllm import VLLMSampler
from ft.types import Expect, Sampler, asked

Say = Callable[[str], None]


@frozen(kw_only=True, eq=False)
class Online:
    """Both, or neither where the method reads its answers."""

    sampler: Sampler | None = None
    judge: Judge | None = None

    def close(self) -> None:
        sampler = self.sampler
        if isinstance(sampler, EnvironmentSampler):
            sampler = sampler.sampler
        if isinstance(sampler, AheadSampler):
            sampler.close()
            sampler = sampler.sampler
        if isinstance(sampler, VLLMSampler):
            sampler.close()
        if self.judge is not None:
            self.judge.close()


def start(recipe: Recipe, built: Built, world: World, tokenizer: Any, folder: ModelFolder | None, say: Say) -> Online:
    """The sampler and the workers of a recipe. Processes are started when they are first needed."""
    method: Any = recipe.method
    if asked(method).rows != "prompts":
        return Online()
    judge = Judge(
        scorers=scorers_of(method.rewards),
        decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
        timeout=recipe.judging.timeout,
        workers=recipe.judging.workers,
        most_failures=recipe.judging.failures,
        notice=say,
        world=world,
    )
    expect = judge.expect if recipe.environment is None else None  # answers of several turns are scored at their end
    sampler = ahead(sampler_of(recipe, built, world, tokenizer, folder, say, expect), recipe, world, say)
    return Online(sampler=with_environment(sampler, recipe, tokenizer), judge=judge)


def with_environment(sampler: Sampler, recipe: Recipe, tokenizer: Any) -> Sampler:
    """One whose answers have several turns, where the recipe names what replies.

    Raises:
        RecipeError: answers are to be drawn ahead.
    """
    if recipe.environment is None:
        return sampler
    if isinstance(sampler, AheadSampler):
        raise RecipeError("answers of several turns are not drawn ahead", where="environment", fix="leave out Ahead")
    return EnvironmentSampler(
        sampler=sampler,
        environment=recipe.environment,
        decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
        reply_ids=partial(reply_ids, tokenizer),
        turns=recipe.turns,
        longest=recipe.data.max_tokens,
    )


def ahead(sampler: Sampler, recipe: Recipe, world: World, say: Say) -> Sampler:
    """One that draws batches ahead, where the method wants that.

    Raises:
        RecipeError: the sampler is the model in training, which cannot do both at a time.
    """
    if not asked(recipe.method).ahead:
        return sampler
    if isinstance(sampler, VLLMSampler):
        return AheadSampler(sampler=sampler, world=world)
    if not recipe.model.tiny:
        raise RecipeError(
            "answers cannot be drawn ahead by the model in training", where="method",
            expected="a sampler beside the trainer: sampler=VLLM(...)", got=type(recipe.sampler).__name__,
            fix="take the method out of Ahead(...), or sample from a server",
        )  # fmt: skip
    say("rehearsal: a look-alike is sampled in its own process, so that no answers are drawn ahead")
    return sampler


def sampler_of(
    recipe: Recipe, built: Built, world: World, tokenizer: Any, folder: ModelFolder | None, say: Say,
    expect: Expect | None = None,
) -> Sampler:  # fmt: skip
    """What the recipe samples with. A look-alike has no server, and samples in its own process."""
    method: Any = recipe.method
    chosen = recipe.sampler
    stop = stop_ids(tokenizer, folder.path if folder else None)
    if isinstance(chosen, VLLM) and folder is not None and not recipe.model.tiny:
        return _server(recipe, chosen, built, world, tokenizer, folder, stop, say, expect)
    if isinstance(chosen, VLLM):
        say("a look-alike is sampled in its own process, not by vLLM")
    rows = chosen.rows if isinstance(chosen, Embedded) else Embedded().rows
    return EmbeddedSampler(
        policy=built.policy, world=world, sampling=method.sampling, stop=stop, rows=rows, seed=recipe.seed,
        expect=expect, way=probe.choose(built.policy, world, say),
    )  # fmt: skip


def _server(
    recipe: Recipe, chosen: VLLM, built: Built, world: World, tokenizer: Any, folder: ModelFolder,
    stop: frozenset[int], say: Say, expect: Expect | None,
) -> VLLMSampler:  # fmt: skip
    """A sampler on vLLM. A server of ours is started by the first sync, on the first rank."""
    if world.size > 1 and chosen.url is None and chosen.startup >= recipe.parallel.timeout:
        raise RecipeError(
            "the other ranks would give up while the server starts", where="sampler.startup",
            expected=f"less than parallel.timeout ({recipe.parallel.timeout:g})", got=f"{chosen.startup:g}",
        )  # fmt: skip
    method: Any = recipe.method
    place, ours = run_folder(recipe), chosen.url is None and world.first
    return VLLMSampler(
        options=chosen,
        sampling=method.sampling,
        stop=stop,
        seed=recipe.seed,
        world=world,
        policy=built.policy,
        weights=sent.weights(recipe, built, folder.path, chosen),
        rows=canary.rows_of(tokenizer, context(recipe, chosen)),
        folder=place,
        server=Server(launch=launch(recipe, chosen, folder.path, place)) if ours else None,
        client=_client(chosen),
        routed=routed.routed(built.policy) if chosen.routes else None,
        notice=say,
        expect=expect,
    )


def _client(chosen: VLLM) -> Client | None:
    if chosen.url is None:
        return None
    return Client(url=chosen.url, token=os.environ.get(TOKEN, ""), timeout=chosen.timeout)
