"""The reference of a run: which model it is, that it fits the method and the vocabulary, and how it moves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from attrs import evolve

from ft.data.tokenizer import load_tokenizer
from ft.dist import World, copy_into
from ft.errors import CheckpointError, FtError, ModelError, RecipeError
from ft.io.checkpoint import Checkpoint
from ft.io.stream import Entry
from ft.io.weights import ModelFolder, resolve
from ft.models import memory, quant
from ft.models.build import plan_config
from ft.models.policy import Policy
from ft.models.reference import Second, base_factors, build_second, move, moving
from ft.recipe import Model, Recipe, Reference
from ft.train import state
from ft.train.session import Session
from ft.types import asked

Say = Callable[[str], None]
STEM = "reference"


# Which one ------------------------------------------------------------------------------------------------------------


def check(recipe: Recipe) -> None:
    """Refuse what the method or the adapters cannot honour.

    Raises:
        RecipeError: a reference that nothing asks for; kept log-probs where distributions are asked for; adapters
            that are to be averaged.
    """
    wants, reference = asked(recipe.method).reference, recipe.reference
    name = type(recipe.method).__name__
    if wants == "none" and reference != Reference():
        raise RecipeError(f"{name} has no reference", where="reference", fix="leave reference out, or choose a method "
                          "that has one: DPO, KTO, BCO or Distill")  # fmt: skip
    if wants == "states" and reference.cached:
        raise RecipeError(f"{name} learns from whole distributions, and only log-probs are kept",
                          where="reference.cached", fix="reference.cached=false")  # fmt: skip
    if asked(recipe.method).rows == "prompts" and reference.cached:
        raise RecipeError(f"{name} samples its answers, which nobody knows beforehand", where="reference.cached",
                          fix="reference.cached=false")  # fmt: skip
    if reference.every and recipe.adapter is not None and wants == "states":
        raise RecipeError(f"{name} cannot learn from adapters that move", where="reference.every", expected="0",
                          fix="train all weights: adapter=none")  # fmt: skip
    if recipe.adapter is not None and reference.mix != 1:
        raise RecipeError(
            "adapters cannot be mixed: the mean of two factors is not the factor of the mean",
            where="reference.mix",
            expected="1: the reference becomes a copy of the adapters",
            got=str(reference.mix),
            fix="reference.mix=1, or train all weights: adapter=none",
        )


def find(recipe: Recipe, tokenizer: Any, config: Any, folder: ModelFolder | None) -> Second | None:
    """The model to be built beside the policy, of which no weights are fetched yet. None: there is none to build.

    Args:
        config, folder: the policy's.

    Raises:
        RecipeError: see ``check``.
        ModelError: the second model is not at hand, or has another vocabulary.
    """
    check(recipe)
    reference, model = recipe.reference, recipe.reference.model
    if asked(recipe.method).reference == "none":
        return None
    if model is None:
        if recipe.adapter is not None or reference.cached:  # kept from the policy itself, before its first step
            return None
        return Second(model=recipe.model, config=config, folder=folder, seed=recipe.seed, moves=reference.every > 0)
    with _in_its_place():
        own = _folder(model)
        if own is not None and folder is not None:
            same_vocabulary(tokenizer, load_tokenizer(own.path), str(own.path))
        second = plan_config(model, own, vocab=len(tokenizer))
    return Second(model=model, config=second, folder=own, seed=recipe.seed + 1)


def _folder(model: Model) -> ModelFolder | None:
    """A rehearsal goes on without one."""
    try:
        return resolve(model.id, model.revision, weights=False)
    except FtError:
        if not model.tiny:
            raise
        return None


@contextmanager
def _in_its_place() -> Iterator[None]:
    """What is wrong with a second model's `model.id` is so at `reference.model.id`."""
    try:
        yield
    except FtError as error:
        if not error.where.startswith("model"):
            raise
        where = f"reference.{error.where}"
        raise type(error)(error.problem, where=where, expected=error.expected, got=error.got, fix=error.fix) from error


def same_vocabulary(own: Any, other: Any, where: str) -> None:
    """Raise ModelError unless both tokenizers give the same tokens the same ids."""
    mine, theirs = own.get_vocab(), other.get_vocab()
    if mine == theirs:
        return
    odd = sorted(t for t in mine.keys() | theirs.keys() if mine.get(t) != theirs.get(t))
    shown = ", ".join(f"{t!r} is {mine.get(t, 'absent')} here and {theirs.get(t, 'absent')} there" for t in odd[:3])
    raise ModelError(
        f"the reference has another vocabulary: {len(odd):,} tokens differ",
        where=where,
        expected=f"the trained model's {len(mine):,} tokens with the same ids",
        got=f"{len(theirs):,} tokens; {shown}",
        fix="choose a reference.model of the same family",
    )


def fetch(second: Second | None) -> Second | None:
    """The same with its weights on this machine."""
    if second is None or second.folder is None or second.model.tiny:
        return second
    with _in_its_place():
        return evolve(second, folder=resolve(second.model.id, second.model.revision))


def built(second: Second, recipe: Recipe, world: World, say: Say) -> Policy:
    """The second model with its weights. Every rank calls it."""
    with _in_its_place():
        return build_second(second, world=world, parallel=recipe.parallel, say=lambda line: say(f"reference: {line}"))


def attach(policy: Policy, recipe: Recipe, second: Second | None, world: World, say: Say) -> Policy:
    """The policy with its reference, which is built here where it is a model of its own. Every rank calls it."""
    if asked(recipe.method).reference == "none":
        return policy
    if recipe.reference.cached:
        return evolve(policy, reference="kept")
    if second is not None:
        return evolve(policy, reference=built(second, recipe, world, say))
    return evolve(policy, reference=base_factors(policy)) if recipe.reference.every else policy


def described(recipe: Recipe, policy: Policy) -> str:
    """What a run says of its reference, with the bytes of it over all ranks."""
    if asked(recipe.method).reference == "none":
        return "none"
    reference, settings = policy.reference, recipe.reference
    moves = f"; moved every {settings.every} steps, mix {settings.mix:g}" if settings.every else ""
    itself = "the model with its adapters off" if recipe.adapter else "the model before its first step"
    if reference is None:
        return itself
    if reference == "kept":
        whose = _name(settings.model) if settings.model else itself
        return f"{whose}, whose log-probs were computed beforehand"
    if isinstance(reference, Policy):
        held = memory.size(sum(row.bytes for row in quant.table(reference.scorer.model)))
        what = f"{_name(settings.model)}, frozen" if settings.model else "a copy of the starting weights"
        return f"{what}, {held}{moves}"
    held = memory.size(sum(t.numel() * t.element_size() for t in reference.values()))
    return f"earlier adapters, at first none, {held}{moves}"


def _name(model: Model) -> str:
    return f"a random look-alike of {model.id}" if model.tiny else model.id


# How it moves ---------------------------------------------------------------------------------------------------------


def follow(run: Session, done: int) -> None:
    """After ``done`` steps, move the reference where that is due."""
    settings = run.recipe.reference
    if settings.every and done % settings.every == 0:
        move(run.policy, settings.mix)


def entries(run: Session) -> dict[str, list[Entry]]:
    """What a checkpoint keeps of the reference: all of one that moves, nothing of any other."""
    return {STEM: state.entries(moving(run.policy))} if run.recipe.reference.every else {}


def restore(run: Session, saved: Checkpoint) -> None:
    """Put a moving reference back where it was."""
    if not run.recipe.reference.every:
        return
    own, kept = moving(run.policy), saved.open(STEM)
    if own.keys() != kept.keys():
        raise CheckpointError("the saved reference does not fit this run", where=str(saved.path),
                              expected=f"{len(own)} tensors", got=f"{len(kept)} tensors")  # fmt: skip
    for name, tensor in own.items():
        copy_into(tensor, kept[name])
