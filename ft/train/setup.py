"""From a recipe to a session: tokenizer, rows, folder, policy, optimizer. What can fail cheaply comes first."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from attrs import evolve

from ft import dist
from ft.data import prompts
from ft.data.dataset import Prepared, prepare
from ft.data.prompts import Prompts
from ft.data.tokenizer import byte_tokenizer, load_tokenizer
from ft.dist import World
from ft.errors import FtError
from ft.io.weights import ModelFolder, resolve
from ft.kernels.nf4 import on_cpu
from ft.models import memory, quant
from ft.models.build import Built, build, plan_config
from ft.models.reference import Second
from ft.recipe import Recipe, run_folder, total_steps
from ft.rollout.health import Health
from ft.rollout.record import Record
from ft.train import known, online, optim, reference
from ft.train.guard import GradientCheck, Watch
from ft.train.log import Log
from ft.train.notes import Notes
from ft.train.scoring import score
from ft.train.session import Session
from ft.types import Context, asked

Say = Callable[[str], None]
Rows = Prepared | Prompts


def tokenizer_of(recipe: Recipe, say: Say) -> tuple[Any, ModelFolder | None]:
    """The model's tokenizer and folder, of which no weights are fetched yet.

    A rehearsal goes on with bytes where there is nothing.
    """
    model = recipe.model
    try:
        folder = resolve(model.id, model.revision, weights=False)
    except FtError:
        if not model.tiny:
            raise
        say(f"rehearsal: {model.id} is not at hand, so a byte-level tokenizer with a ChatML template stands in")
        if model.template:
            say(f"rehearsal: {model.template} is not used, since it was written for the model's own tokenizer")
        return byte_tokenizer(), None
    return load_tokenizer(folder.path, model.template), folder


def reader(recipe: Recipe) -> Callable[..., Rows]:
    """What reads the method's rows: answers to learn from, or prompts for a method that samples its own."""
    return prompts.prepare if asked(recipe.method).rows == "prompts" else prepare


def rows_of(recipe: Recipe, tokenizer: Any, say: Say) -> tuple[Rows, Rows | None]:
    """Training rows and held-out rows, tokenised."""
    data = recipe.data
    if recipe.model.tiny and data.rehearsal and data.train == data.rehearsal:
        say(f"rehearsal: training on {', '.join(s.path for s in data.rehearsal)}, not on the recipe's own rows")
    folder = run_folder(recipe)
    read = reader(recipe)
    train = read(data.train, data, tokenizer, quarantine=folder / "bad_rows.jsonl", announce=say)
    held_out = None
    if data.eval:
        held_out = read(data.eval, data, tokenizer, quarantine=folder / "bad_eval_rows.jsonl", announce=say)
    for line in train.report.lines():
        say(line)
    return train, held_out


def config_of(recipe: Recipe, folder: ModelFolder | None, *, vocab: int) -> Any:
    """The config to build."""
    return plan_config(recipe.model, folder, vocab=vocab, asks=asked(recipe.method))


def fetch(
    recipe: Recipe, config: Any, folder: ModelFolder | None, *, ranks: int, second: Second | None = None
) -> ModelFolder | None:
    """The folder with its weights, once it is known that this machine can hold the run.

    Raises:
        CapacityError: it cannot; tells what is needed, what is there, and how to rehearse.
    """
    if recipe.model.tiny or folder is None:
        return folder
    device = dist.own_device()
    memory.fits(
        memory.estimate(recipe, config, world=ranks, second=second),
        have=memory.available(device),
        ranks=1 if device.type == "cuda" else ranks,
        rehearsal="the same command with --tiny",
    )
    return resolve(recipe.model.id, recipe.model.revision)


def facts(run: Session, rows: Rows) -> dict[str, object]:
    """What a run says of itself before its first step: sizes, bytes by kind and type, what is trained."""
    recipe, net = run.recipe, run.policy.scorer.model
    source = run.built.folder
    table = {f"{row.kind} {row.dtype}{' (trained)' if row.trained else ''}": _size(row) for row in quant.table(net)}
    return {
        "model": f"{recipe.model.id} ({type(net).__name__})",
        "weights": "random" if recipe.model.tiny or source is None else f"{source.path} {source.commit or ''}".strip(),
        **table,
        "adapted": adapted(run.built),
        "trained": f"{sum(p.numel() for p in run.parameters.values()):,} elements in {len(run.parameters):,} tensors",
        "rows": f"{rows.per_epoch:,} per epoch",
        "steps": f"{run.steps:,} of {recipe.batch.examples} rows, micro-batches of {recipe.batch.tokens:,} tokens",
        "ranks": f"{run.world.size} on {run.world.device.type}",
        "precision": precision(recipe) + dequantised(recipe, run.world.device.type),
        "layout": str(run.policy.layout),
        "reference": reference.described(recipe, run.policy),
        "folder": str(run.folder),
    }


def adapted(built: Built) -> str:
    """How many weights each target of the recipe means: routed and shared experts are told apart."""
    if built.attached is None:
        return "no adapters: all weights are trained"
    return ", ".join(f"{target}: {len(names)}" for target, names in built.attached.matched.items())


def precision(recipe: Recipe) -> str:
    """Which types hold and compute what."""
    dtype, reduce = recipe.model.dtype, recipe.parallel.reduce_dtype
    if recipe.adapter is None:
        return f"masters float32, computed in {dtype}, gradients summed in {reduce}"
    base = f"{dtype}, held in nf4" if recipe.model.quant else dtype
    return f"base {base}; adapters held and computed in float32, gradients summed in {reduce}"


def dequantised(recipe: Recipe, device: str) -> str:
    """What makes weights of 4 bits dense on a CPU: C routines where there is a compiler."""
    return f"; dequantised by {on_cpu()}" if recipe.model.quant and device == "cpu" else ""


def _size(row: quant.Row) -> str:
    return f"{row.bytes / 1e6:,.1f} MB, {row.elements:,} elements in {row.tensors:,} tensors"


def session(
    recipe: Recipe,
    world: World,
    log: Log,
    tokenizer: Any,
    config: Any,
    folder: ModelFolder | None,
    train: Rows,
    held_out: Rows | None,
    second: Second | None = None,
) -> Session:
    """Build the policy, its reference and what trains it. Every rank calls it.

    A second model whose log-probs are kept is built, asked and let go of before the policy takes its memory.
    """
    batch = recipe.batch
    context = Context(data=train, examples=batch.examples, tokens=batch.tokens, seed=recipe.seed, tokenizer=tokenizer)
    steps = total_steps(recipe, train.per_epoch * asked(recipe.method).repeats)
    kept: known.Rows | None = None
    if recipe.reference.cached:
        source = second or Second(model=recipe.model, config=config, folder=folder, seed=recipe.seed)
        kept = known.rows_of(recipe, source, context, held_out, steps, world, log.notice)
    if kept is not None and second is not None:
        kept = known.by_second(kept, second, recipe, world, log.notice)
    built = build(
        recipe.model,
        recipe.adapter,
        config,
        folder,
        world=world,
        parallel=recipe.parallel,
        seed=recipe.seed,
        say=log.notice,
        asks=asked(recipe.method),
    )
    if kept is not None and second is None:
        kept = known.by_policy(kept, built.policy, recipe, world, log.notice)
    built = evolve(built, policy=reference.attach(built.policy, recipe, second, world, log.notice))
    record = Record(
        folder=run_folder(recipe), most=recipe.log.rollouts, first=world.first, notice=log.notice,
        hook=recipe.judging.hook,
    )  # fmt: skip
    notes, started = Notes(), online.start(recipe, built, world, tokenizer, folder, log.notice)
    context = evolve(
        context, sampler=started.sampler, judge=started.judge, note=notes.add, say=log.notice,
        show=record.add,
        score=partial(score, policy=built.policy, world=world, tokens=batch.tokens),
    )  # fmt: skip
    parameters = optim.trained(built.policy.scorer.model)
    place = run_folder(recipe)
    return Session(
        recipe=recipe if kept is None else evolve(recipe, method=known.Known(method=recipe.method, values=kept.values)),
        folder=place,
        world=world,
        built=built,
        parameters=parameters,
        optimizer=optim.make(parameters, recipe.optim),
        context=context,
        held_out=held_out,
        steps=steps,
        log=log,
        watch=Watch(folder=place / "bad_batches", patience=recipe.log.patience, world=world),
        gradients=GradientCheck(parameters),
        notes=notes,
        record=record,
        health=Health(),
        close=started.close,
    )
