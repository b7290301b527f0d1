"""From a file and the words after it on the command line to the recipe to run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

import attrs

from ft.errors import RecipeError
from ft.recipe.files import load
from ft.recipe.override import override, pairs
from ft.recipe.parts import Recipe, rehearse, run_folder


def resolve(path: Path, words: Sequence[str], *, tiny: bool = False, options: Sequence[str] = ()) -> Recipe:
    """The recipe in ``path`` with overrides, as a rehearsal where ``tiny``. ``options`` are the command's own.

    A rehearsal leaves standing what the command line sets, save.dir apart, which gets "-tiny" like any other; and
    data.train.0.x spoke of the rows that the rehearsal may have replaced.
    """
    _mistyped_option(words, options)
    recipe = override(load(path), words)
    if not tiny or recipe.model.tiny:
        return recipe
    given = [f"{p}={text}" for p, text in pairs(words) if p != "save.dir" and not re.match(r"data\.\w+\.\d", p)]
    return override(rehearse(recipe), given)


def _mistyped_option(words: Sequence[str], options: Sequence[str]) -> None:
    """Unknown --words are overrides; one that looks like an option of the command is a slip."""
    for word in words:
        name = word.removeprefix("--").partition("=")[0]
        is_field = name.partition(".")[0].replace("-", "_") in attrs.fields_dict(Recipe)
        if (
            word.startswith("--")
            and not is_field
            and (near := get_close_matches("--" + name, options, n=1, cutoff=0.7))
        ):
            raise RecipeError(f"no option {'--' + name!r}. Did you mean {near[0]!r}?")


def folder_override(path: Path, words: Sequence[str], *, tiny: bool, resume: bool, ranks: int) -> list[str]:
    """The override that repeats a run from its recipe.json into a folder of its own, or resumes it where it lies.

    Python recipes keep the folder they name. Ranks started by hand cannot agree on a free folder, so they are told.
    """
    if path.suffix != ".json" or "save.dir" in dict(pairs(words)):
        return []
    if resume:
        moved = (
            path.name == "recipe.json" and run_folder(override(load(path), words)).resolve() != path.parent.resolve()
        )
        return [f"save.dir={path.parent}"] if moved else []
    if ranks > 1:
        raise RecipeError("which folder repeats this run?", where=str(path), fix="add save.dir=runs/<new name>")
    recipe = resolve(path, words)
    return [f"save.dir={_free(run_folder(recipe), tiny=tiny and not recipe.model.tiny)}"]


def _free(base: Path, *, tiny: bool) -> Path:
    """``base``, or base-2, base-3, ...: the first of which there is nothing yet."""
    candidate, n = base, 1
    while (candidate.with_name(candidate.name + "-tiny") if tiny else candidate).exists():
        n += 1
        candidate = base.with_name(f"{base.name}-{n}")
    return candidate
