"""One step on the longest batch, in a folder of its own: what a run would only find out after a while."""

from __future__ import annotations

import time
from contextlib import closing
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import attrs
import numpy as np
import torch
from attrs import evolve, frozen

from ft import dist
from ft.data.prompts import Prompts
from ft.errors import CapacityError, NumericsError
from ft.io.weights import ModelFolder
from ft.recipe import Recipe, Reference
from ft.recipe.parts import tiny_reference
from ft.train import optim, reference, schedule, setup, state, step
from ft.train.console import peak_bytes
from ft.train.log import Log
from ft.train.session import Session
from ft.train.setup import Rows
from ft.types import Example, Given


def longest(data: Rows, *, tokens: int, examples: int) -> list[Example]:
    """The longest row and the longest that still fit beside it: the fullest micro-batch that a run can meet.

    Of prompts, the longest of a step's number: their answers are to be sampled.
    """
    if isinstance(data, Prompts):
        return [attrs.evolve(e, group=g) for g, e in enumerate(sorted(data.examples, key=len)[-examples:])]
    room, chosen, rows = tokens, [], 0
    positions_N = np.diff(data.arrays.offsets_N1) - 1
    first_R1 = data.arrays.first_R1
    positions_R = positions_N if first_R1 is None else np.add.reduceat(positions_N, first_R1[:-1])
    for i in np.argsort(-positions_R, kind="stable").tolist():
        if not chosen or positions_R[i] <= room:
            chosen += data.row(i)
            rows += 1
            room -= int(positions_R[i])
        if rows == examples or room <= 0:
            break
    return chosen


def trial(recipe: Recipe, *, real: bool, place: Path) -> Recipe:
    """The recipe of one step in a folder of its own: with the real model, or with its look-alike and fresh adapters."""
    model, adapter, other = recipe.model, recipe.adapter, recipe.reference
    if other.cached:  # two steps write nothing; their arithmetic is the same with the model itself as reference
        other = Reference()
    if not real:
        model = evolve(model, tiny=True, dtype="float32")
        adapter = evolve(adapter, init=None) if adapter else None
        other = tiny_reference(other)
    return evolve(
        recipe,
        model=model,
        adapter=adapter,
        reference=other,
        save=evolve(recipe.save, dir=place / "run"),
        parallel=evolve(recipe.parallel, replicate=1),
        log=evolve(recipe.log, sinks=()),
        judging=evolve(recipe.judging, hook=None),
    )


@frozen(kw_only=True)
class Tried:
    """What two steps on the longest batch showed; seconds are the second one's."""

    rows: int
    positions: int
    seconds: float
    loss: float
    peak: float  # bytes; on a CPU the process's, all that it has done included
    tensors: int  # trained, each with a finite gradient that is not zero
    layout: str
    said: tuple[str, ...]  # what was announced while the model was built


def try_step(recipe: Recipe, *, real: bool, folder: ModelFolder | None, tokenizer: Any, rows: Rows) -> Tried:
    """Two steps on the longest batch: adapters start at zero, so that half of them get no gradient in the first.

    Raises:
        CapacityError: it does not fit into memory.
        NumericsError: a loss or a gradient is not finite, or a tensor had no gradient in either step.
    """
    said, examples = StringIO(), longest(rows, tokens=recipe.batch.tokens, examples=recipe.batch.examples)
    with TemporaryDirectory(prefix="ft-check-") as name, dist.launched(timeout=recipe.parallel.timeout) as world:
        tried = trial(recipe, real=real, place=Path(name))
        config = setup.config_of(tried, folder, vocab=len(tokenizer))
        with Log(Path(name), stream=said) as log:
            try:
                second = reference.find(tried, tokenizer, config, folder)
                run = setup.session(tried, world, log, tokenizer, config, folder, rows, None, second)
                with closing(run):
                    _one(run, examples, 0)
                    seconds, loss = _one(run, examples, 1)
            except (torch.OutOfMemoryError, MemoryError) as error:
                raise _too_big(error) from error
    return Tried(
        rows=len(examples),
        positions=sum(len(example) - 1 for example in examples),
        seconds=seconds,
        loss=loss,
        peak=peak_bytes(),
        tensors=len(run.parameters),
        layout=str(run.policy.layout),
        said=tuple(said.getvalue().splitlines()),
    )


def _too_big(error: Exception) -> CapacityError:
    return CapacityError(
        "the longest batch does not fit into memory",
        where="batch.tokens",
        got=(str(error).splitlines() or [type(error).__name__])[0],
        fix="lower batch.tokens, or set model.checkpointing=true",
    )


def _one(run: Session, examples: list[Example], now: int) -> tuple[float, float]:
    """A step as the loop takes it; seconds and loss."""
    recipe, world, began = run.recipe, run.world, time.perf_counter()
    state.seed_step(recipe.seed, now, world.rank)
    context = evolve(run.context, data=Given(examples=examples), kept={})
    made = recipe.method.examples(now, context)
    plan = step.plan(made, recipe.method, run.policy, world, tokens=recipe.batch.tokens)
    out = step.reduce(step.run(plan, recipe.method, run.policy, world, backward=True), world)
    parameters = list(run.parameters.values())
    norm = optim.grad_norm(parameters)
    if not step.without_signal(made):
        run.gradients.after_backward(world)
    _finite(run, out.loss)
    optim.set_lr(run.optimizer, recipe.optim.lr * schedule.lr_share(recipe.schedule, now, run.steps))
    optim.clip(parameters, norm, recipe.optim.clip)
    optim.update(run.optimizer, ~torch.isfinite(norm))
    loss = float(out.loss)  # waits for the device
    return time.perf_counter() - began, loss


def _finite(run: Session, loss: torch.Tensor) -> None:
    wild = [name for name, p in run.parameters.items() if p.grad is not None and not bool(p.grad.isfinite().all())]
    if wild or not bool(torch.isfinite(loss)):
        raise NumericsError(
            f"{len(wild)} of {len(run.parameters)} gradients are not finite: {', '.join(wild[:5])}",
            where="the longest batch",
            expected="finite numbers",
            got=f"loss {float(loss)}",
            fix="look for odd rows with `ft inspect`; try model.dtype=float32",
        )
