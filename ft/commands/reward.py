"""``ft reward``: the recipe's reward functions by themselves, on answers from a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from attrs import evolve

from ft import dist
from ft.data.formats import rename
from ft.data.place import fail, shown
from ft.data.prompts import conversation
from ft.data.rows import read
from ft.errors import DataError, RecipeError
from ft.recipe import Recipe, Source
from ft.rollout.judge import Judge, scorers_of
from ft.rollout.record import middle
from ft.train import setup
from ft.types import Example, Rollout, asked

if TYPE_CHECKING:
    from rich.console import Console


def reward(recipe: Recipe, file: Path, console: Console) -> bool:
    """Score the rows of ``file``, print a table; False if a function failed on one of them.

    Raises:
        RecipeError: the method has no rewards.
        DataError: a row has no answer.
    """
    method: Any = recipe.method
    if asked(method).rows != "prompts":
        raise RecipeError("this method has no reward functions", where="method", got=type(method).__name__)
    tokenizer, _ = setup.tokenizer_of(evolve(recipe, model=evolve(recipe.model, tiny=True)), _say(console))
    columns = recipe.data.train[0].columns
    answers = [_answer(row, columns, tokenizer) for row in read(Source(path=str(file)))]
    if not answers:
        raise DataError("the file has no rows", where=str(file))
    failures: list[str] = []
    scorers = scorers_of(method.rewards)
    with dist.launched() as world:
        judge = Judge(
            scorers=scorers, decode=lambda ids: "", timeout=recipe.judging.timeout, workers=recipe.judging.workers,
            most_failures=1.0, notice=failures.append, world=world,
        )  # fmt: skip
        try:
            found = judge.score(answers)
        finally:
            judge.close()
    _print(found, [scorer.label for scorer in scorers], console)
    for text in failures:
        console.print(f"error: {text}", markup=False, highlight=False, soft_wrap=True)
    return not failures


def _say(console: Console) -> Any:
    return lambda text: console.print(text, markup=False, highlight=False, soft_wrap=True)


def _answer(row: Any, columns: Mapping[str, str], tokenizer: Any) -> Rollout:
    if row.error is not None:
        raise row.error
    if not isinstance(row.value, Mapping) or "completion" not in row.value:
        raise fail(row.source, "the row has no answer", path="completion", expected="a text", got=shown(row.value))
    value = rename(row.value, columns, row.source) if columns else dict(row.value)
    said = value.pop("completion")
    text = said if isinstance(said, str) else said[-1]["content"]
    if value.get("prompt") is not None or value.get("messages") is not None:
        messages = conversation(value, row.source).messages
        value["prompt"] = [{"role": message.role, "content": message.content} for message in messages]
        value.pop("messages", None)
    tokens_L = np.array(tokenizer.encode(text, add_special_tokens=False), np.int32)
    prompt = Example(tokens_L=tokens_L[:0], mask_L=np.zeros(0, bool), source=row.source, columns=value)
    return Rollout(prompt=prompt, tokens_L=tokens_L, logp_L=None, finish="stop", policy_step=0, text=text)


def _print(found: Sequence[Rollout], labels: Sequence[str], console: Console) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("row", "reward", *labels, "completion"):
        table.add_column(name, justify="left" if name in ("row", "completion") else "right")
    for r in found:
        scores = [_form(r.reward), *(_form(r.parts.get(label)) for label in labels)]
        table.add_row(escape(r.prompt.source), *scores, escape(middle(" ".join(r.text.split()), 50)))
    means = [_mean([r.reward for r in found]), *(_mean([r.parts.get(label) for r in found]) for label in labels)]
    table.add_row("mean", *means, "", style="bold")
    console.print(table)


def _form(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return _form(sum(known) / len(known) if known else None)
