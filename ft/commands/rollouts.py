"""``ft rollouts``: scored answers of a run, as rollouts.jsonl keeps them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ft.errors import MissingFileError, RecipeError
from ft.rollout.record import FILE, read

if TYPE_CHECKING:
    from rich.console import Console

Kept = dict[str, Any]


def show(folder: Path, console: Console, *, step: int | None, best: bool, worst: bool, most: int) -> None:
    """Print them, each with its prompt, rewards and whole text.

    Raises:
        MissingFileError: the run keeps none.
        RecipeError: none is of ``step``.
    """
    if not (folder / FILE).is_file():
        raise MissingFileError(
            "no answers are kept here", where=str(folder / FILE),
            fix="name the folder of a run that samples answers, with log.rollouts above 0",
        )  # fmt: skip
    chosen = choose(list(read(folder)), step=step, best=best, worst=worst, most=most)
    for kept in chosen:
        console.print(heading(kept), style="bold", markup=False, highlight=False, soft_wrap=True)
        console.print(f"{kept['prompt']}\n---\n{kept['text']}\n", markup=False, highlight=False, soft_wrap=True)


def choose(kept: Sequence[Kept], *, step: int | None, best: bool, worst: bool, most: int) -> list[Kept]:
    """Those of ``step``, the last one by default; with ``best`` or ``worst`` of all steps, in the order of rewards."""
    if best and worst:
        raise RecipeError("--best and --worst exclude each other")
    steps = sorted({line["step"] for line in kept})
    if step is not None and step not in steps:
        where = f"steps {steps[0]} to {steps[-1]}" if steps else "none at all"
        raise RecipeError(f"no answers of step {step} are kept", expected=where, got=str(step))
    if step is None and not (best or worst):
        step = steps[-1] if steps else None
    found = [line for line in kept if step is None or line["step"] == step]
    if best or worst:
        scored = [line for line in found if line["reward"] is not None]
        found = sorted(scored, key=lambda line: float(line["reward"]), reverse=best)
    return found[:most]


def heading(kept: Kept) -> str:
    """Where it is from, and what it got."""
    reward = "no reward" if kept["reward"] is None else f"reward {float(kept['reward']):.4g}"
    parts = ", ".join(f"{name} {float(value):.4g}" for name, value in kept["parts"].items())
    cut = ", cut off" if kept["finish"] == "length" else ""
    return f"step {kept['step']}  {kept['source']}  {reward} ({parts})  {kept['length']} tokens{cut}"
