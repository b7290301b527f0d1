"""``ft eval``: rewards of the answers of the base model, an adapter or a run's final weights."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attrs import evolve

from ft import dist
from ft.data import prompts
from ft.errors import MissingFileError, RecipeError
from ft.io.weights import resolve
from ft.models.build import build
from ft.recipe import Embedded, LoRA, Recipe, Source
from ft.rollout.facts import facts
from ft.train import online, setup
from ft.types import Rollout, asked

_SHARES = ("unscored", "cut_off")


def evaluate(
    recipe: Recipe, files: Sequence[str], *, adapter: Path | None, sampled: int, as_json: bool
) -> dict[str, Any]:
    """Answer the prompts of ``files``, else of data.eval, score the answers, and print means with standard errors.

    Args:
        adapter: a folder of weights, see ``with_weights``; None is the base model.
        sampled: answers drawn to each prompt; 0 takes the likeliest.
    """
    if asked(recipe.method).rows != "prompts":
        raise RecipeError("this method samples no answers", where="method", got=type(recipe.method).__name__)
    sources = tuple(Source(path=file) for file in files) or recipe.data.eval
    if not sources:
        raise RecipeError(
            "there are no prompts to answer", where="data.eval", fix="name a file: ft eval x.py task.jsonl"
        )
    recipe = with_weights(evolve(recipe, sampler=Embedded()), adapter)
    found = _groups(recipe, sources, sampled)
    numbers = summary(found)
    head = {"weights": str(adapter or recipe.model.id), "answers": f"{sampled} drawn" if sampled else "likeliest"}
    if as_json:
        print(json.dumps({**head, **numbers}))
    else:
        print(lines(head, numbers))
    return numbers


def with_weights(recipe: Recipe, folder: Path | None) -> Recipe:
    """The recipe that begins with an adapter, or with a whole model; of a run folder with what lies in final/.

    Raises:
        MissingFileError: there are none.
    """
    if folder is None:
        return evolve(recipe, adapter=None)
    place = folder / "final" if (folder / "final").is_dir() else folder
    if (config := place / "adapter_config.json").is_file():
        kept = json.loads(config.read_text(encoding="utf-8"))
        own = recipe.adapter or LoRA()
        fitting = {"r": kept["r"], "alpha": float(kept["lora_alpha"]), "rslora": bool(kept.get("use_rslora"))}
        return evolve(recipe, adapter=evolve(own, init=place, **fitting))
    if (place / "config.json").is_file():
        return evolve(recipe, adapter=None, model=evolve(recipe.model, id=str(place), revision=None))
    raise MissingFileError(
        "there are no weights here", where=str(place),
        expected="adapter_config.json or config.json, as in a run's final/",
    )  # fmt: skip


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _groups(recipe: Recipe, sources: Sequence[Source], sampled: int) -> list[list[Rollout]]:
    tokenizer, folder = setup.tokenizer_of(recipe, _say)
    config = setup.config_of(recipe, folder, vocab=len(tokenizer))
    if folder is not None and not recipe.model.tiny:
        folder = resolve(recipe.model.id, recipe.model.revision)
    rows = prompts.prepare(sources, recipe.data, tokenizer, announce=_say)
    with dist.launched() as world:
        built = build(
            recipe.model, recipe.adapter, config, folder, world=world, parallel=recipe.parallel, seed=recipe.seed,
            say=_say, asks=asked(recipe.method), trained=recipe.adapter is not None,
        )  # fmt: skip
        started = online.start(recipe, built, world, tokenizer, folder, _say)
        assert started.sampler is not None and started.judge is not None
        try:
            groups = started.sampler.rollout(rows.examples, sampled or 1, -1, greedy=not sampled)
            flat = started.judge.score([rollout for group in groups for rollout in group])
        finally:
            started.close()
    n = sampled or 1
    return [flat[i : i + n] for i in range(0, len(flat), n)]


def summary(groups: Sequence[Sequence[Rollout]]) -> dict[str, Any]:
    """Means over prompts of each one's mean, their standard errors, and the answers' lengths.

    A prompt without a score is left out, and counted in ``unscored``. The error is that of drawing other prompts:
    s / sqrt(P), s with P - 1; null for one prompt.
    """
    names = sorted({name for group in groups for rollout in group for name in rollout.parts})
    values = {"reward": [[r.reward for r in group] for group in groups]} | {
        name: [[r.parts.get(name) for r in group] for group in groups] for name in names
    }
    told = facts(groups)
    return {
        "prompts": len(groups),
        **{name: mean for name, found in values.items() if (mean := _mean(found)) is not None},
        **{name: told[name] for name in ("unscored", "length", "cut_off")},
    }


def _mean(values: Sequence[Sequence[float | None]]) -> dict[str, float | None] | None:
    known = [[v for v in group if v is not None] for group in values]
    means = [sum(group) / len(group) for group in known if group]
    if not means:
        return None
    mean = sum(means) / len(means)
    if len(means) == 1:
        return {"mean": mean, "error": None}
    variance = sum((m - mean) ** 2 for m in means) / (len(means) - 1)
    return {"mean": mean, "error": (variance / len(means)) ** 0.5}


def lines(head: dict[str, str], numbers: dict[str, Any]) -> str:
    """A name and a value on each line; shares of the answers as percentages."""
    forms = {name: f"{numbers[name]:.1%}" for name in _SHARES if name in numbers}
    rows = {**head, **{name: _form(value) for name, value in numbers.items()}, **forms}
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


def _form(value: Any) -> str:
    if isinstance(value, dict):
        error = "" if value["error"] is None else f" +- {value['error']:.4f}"
        return f"{value['mean']:.4f}{error}"
    return f"{value:.4g}"
