"""THE loop.

    examples -> pack -> shard -> collate -> prepare -> sum counts over ranks
    for each micro-batch: log-probs, loss, backward
    clip -> finite? -> optimizer step -> log -> evaluate and save if due

What it reads is a function of (seed, step), so the weights, the optimizer and a step number are all that resuming
needs. Nothing in a step waits for the device; ``publish`` does, on log lines.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import attrs
import torch
from attrs import define, field, frozen
from torch import Tensor

from ft import dist
from ft.errors import CapacityError
from ft.io import checkpoint
from ft.io.runfolder import RunLock, claim, open_run
from ft.recipe import Recipe, run_folder
from ft.recipe.files import dump
from ft.train import guard, keep, optim, reference, schedule, setup, sinks, state, step
from ft.train.evaluate import evaluate
from ft.train.log import Log
from ft.train.session import Progress, Session
from ft.train.signals import Stop
from ft.types import Counts, LossOutput


@frozen(kw_only=True)
class Outcome:
    """How a run ended: "done", "early" (no better for eval.patience evaluations) or "stopped" (asked to)."""

    ended: str
    folder: Path
    step: int
    best: float | None  # lowest held-out loss


def train(recipe: Recipe, *, resume: bool = False) -> Outcome:
    """Run a recipe from its first step, or with ``resume`` from its newest checkpoint, to its end or a signal.

    Started once per rank. Rows are prepared before the ranks join, so that none waits in a collective for them.

    Raises:
        FtError: whatever a user can mend, before the first step where it can be known by then.
    """
    folder, (rank, size) = run_folder(recipe), dist.rank_from_env()
    with ExitStack() as stack:
        stop = stack.enter_context(Stop())
        if rank == 0:
            claim(folder, resume=resume)
            stack.enter_context(RunLock(folder))
        log = stack.enter_context(Log(folder, main=rank == 0))
        tokenizer, source = setup.tokenizer_of(recipe, log.notice)
        config = setup.config_of(recipe, source, vocab=len(tokenizer))
        second = reference.find(recipe, tokenizer, config, source)
        source = setup.fetch(recipe, config, source, ranks=size, second=second)
        second = reference.fetch(second)
        rows, held_out = setup.rows_of(recipe, tokenizer, log.notice)
        trackers: Sequence[sinks.Sink] = ()
        if rank == 0:
            open_run(
                folder,
                resume=resume,
                recipe=dump(recipe),
                fingerprint=rows.fingerprint,
                claimed=True,
                notice=log.notice,
            )
            trackers = sinks.make(
                recipe.log.sinks, folder=folder, project=recipe.log.project, name=folder.name, notice=log.notice
            )
        parallel = recipe.parallel
        world = stack.enter_context(dist.launched(replicate=parallel.replicate, timeout=parallel.timeout))
        run = setup.session(recipe, world, log, tokenizer, config, source, rows, held_out, second)
        stack.callback(run.close)
        stack.callback(run.record.close)
        saved = keep.find(folder, world, log.notice) if resume else None
        progress = keep.restore(run, saved) if saved else Progress()
        if rank == 0 and not saved:
            checkpoint.preflight(folder, keep.room(run))
        log.start(setup.facts(run, rows), total=run.steps, step=progress.step, sinks=trackers)
        run.record.begin(progress.step)
        ended = fit(run, progress, stop)
        if ended != "stopped" and world.first:
            log.notice(f"final weights: {keep.export(run, progress, tokenizer)}")
        log.finish(ended)
        if ended == "stopped" and world.first:
            log.notice(f"saved at step {progress.step}; go on with: ft run {folder / 'recipe.json'} --resume")
        return Outcome(ended=ended, folder=folder, step=progress.step, best=progress.best)


@frozen(kw_only=True, eq=False)
class Done:
    """One optimizer step, still on the device."""

    step: int
    out: LossOutput  # over all ranks
    norm: Tensor
    bad: Tensor  # 0-d bool: the step was skipped on every rank
    lr: float
    plan: step.Plan
    waited: float  # seconds until the method had its examples


@define(kw_only=True, eq=False)
class Window:
    """Steps since the last log line."""

    began: float = field(factory=time.perf_counter)
    done: list[Done] = field(factory=list)


def fit(run: Session, progress: Progress, stop: Stop) -> str:
    """Train from ``progress`` to the end; returns why it ended: "done", "stopped" or "early"."""
    if progress.step == 0:
        judge(run, progress)
    if run.context.sampler is not None and progress.step < run.steps:
        run.context.sampler.sync(progress.step)  # may start a server, whose minutes are no step's
    window = Window()
    while progress.step < run.steps:
        window.done.append(one_step(run, progress.step))
        progress.step += 1
        reference.follow(run, progress.step)
        ending = progress.step == run.steps
        stopping = False
        asked = run.world.size == 1 and stop.requested  # several ranks agree on it at log lines only
        if ending or asked or due(progress.step, run.recipe.log.every):
            stopping = publish(run, progress, window, stop)
            window = Window()
        better = False
        if not stopping and (ending or due(progress.step, run.recipe.eval.every)):
            better = judge(run, progress)
        early = run.recipe.eval.patience is not None and progress.worse >= run.recipe.eval.patience
        last = ending or stopping or early
        if last or better or due(progress.step, run.recipe.save.every):
            save(run, progress, final=last)
        if not ending and (stopping or early):
            return "stopped" if stopping else "early"
    return "done"


def due(now: int, every: int) -> bool:
    return every > 0 and now % every == 0


def one_step(run: Session, now: int) -> Done:
    """Examples to optimizer step. Everything it returns stays on the device."""
    recipe, world = run.recipe, run.world
    state.seed_step(recipe.seed, now, world.rank)
    began = time.perf_counter()
    examples = recipe.method.examples(now, run.context)
    waited = time.perf_counter() - began
    plan = step.plan(examples, recipe.method, run.policy, world, tokens=recipe.batch.tokens)
    shares = step.run(plan, recipe.method, run.policy, world, backward=True)
    out = step.reduce(shares, world)
    parameters = list(run.parameters.values())
    norm = optim.grad_norm(parameters)
    if not step.without_signal(examples):
        run.gradients.after_backward(world)
    bad = ~(torch.isfinite(out.loss) & torch.isfinite(norm))
    lr = recipe.optim.lr * schedule.lr_share(recipe.schedule, now, run.steps)
    optim.set_lr(run.optimizer, lr)
    optim.clip(parameters, norm, recipe.optim.clip)
    optim.update(run.optimizer, bad | (norm == 0))  # where nothing was learnt, moments move nothing
    return Done(step=now, out=out, norm=norm, bad=bad, lr=lr, plan=plan, waited=waited)


def publish(run: Session, progress: Progress, window: Window, stop: Stop) -> bool:
    """Read the numbers of the steps since the last line, log them, look for bad ones; True if a rank was asked to stop.

    The losses logged are means over the line's steps; a bad step is left out of them and reported by itself.
    """
    stopping = dist.any_rank(stop.requested, run.world)
    suspects = [guard.Suspect(step=d.step, bad=d.bad, batches=d.plan.batches) for d in window.done]
    bad = run.watch.look(suspects)
    for number in bad:
        run.log.event("bad_step", step=number, folder=str(run.watch.folder))
        run.log.notice(
            f"step {number + 1}: loss or gradient not finite; no update made, batch kept in {run.watch.folder}"
        )
    good = [d for d in window.done if d.step not in bad]
    seconds = time.perf_counter() - window.began
    counts = {f.name: sum(float(getattr(d.plan.counts, f.name)) for d in window.done) for f in attrs.fields(Counts)}
    forwarded = sum(float(d.plan.forwarded) for d in window.done)
    progress.tokens += int(counts["inputs"])
    numbers = {
        **means(good),
        **run.notes.take(),
        "lr": window.done[-1].lr,
        "tokens": progress.tokens,
        "tokens_per_s": counts["inputs"] / seconds,
        "trained_share": counts["tokens"] / max(1.0, counts["inputs"]),
        "padding": 1 - counts["inputs"] / max(1.0, forwarded),
        "step_s": seconds / len(window.done),
        "bad_steps": float(len(bad)),
    }
    if "reward" in numbers:  # generating and scoring are told by the method
        numbers["train_s"] = numbers["step_s"] - sum(d.waited for d in window.done) / len(window.done)
    run.log.step(progress.step, numbers)
    if samples := run.record.samples():
        run.log.show(samples)
    for alarm in run.health.look(progress.step, numbers):
        run.log.notice(f"step {progress.step}: {alarm}")
    return stopping


def means(done: Sequence[Done]) -> dict[str, float]:
    """Loss, gradient norm and the method's numbers: means over steps, and the largest of the maxima."""
    if not done:
        return {}
    rows = [{"loss": d.out.loss, "grad_norm": d.norm, **d.out.sums} for d in done]
    numbers = {name: float(torch.stack([row[name].double() for row in rows]).mean()) for name in rows[0]}
    peaks = {name: float(torch.stack([d.out.maxes[name] for d in done]).amax()) for name in done[0].out.maxes}
    return {**numbers, **peaks}


def judge(run: Session, progress: Progress) -> bool:
    """Evaluate on the held-out rows; True if it is the best so far."""
    if run.held_out is None:
        return False
    recipe = run.recipe
    numbers = evaluate(
        run.policy,
        recipe.method,
        run.held_out,
        run.world,
        run.context,
        tokens=recipe.batch.tokens,
        examples=recipe.eval.examples,
    )
    run.log.step(progress.step, numbers)
    score = numbers["eval/loss"] if "eval/loss" in numbers else -numbers["eval/reward"]
    better = progress.best is None or score < progress.best
    if better:
        progress.best, progress.best_step, progress.worse = score, progress.step, 0
    else:
        progress.worse += 1
    return better and progress.step > 0


def save(run: Session, progress: Progress, *, final: bool) -> None:
    """Write a checkpoint. A full disk ends the run only if nothing more would be saved."""
    try:
        keep.save(run, progress)
    except CapacityError as error:
        if final:
            raise
        run.log.notice(f"{error.message}\n  the run goes on and tries again at the next save")
