"""Trying early what could fail late: `ft check` prints one line per item, then go or no-go.

Nothing is written into the run folder. Items that need what an earlier one could not give are left out, and said so.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

import torch
from attrs import define, evolve, field, frozen
from rich.text import Text

from ft import dist
from ft.data.dataset import Prepared
from ft.data.pack import pack
from ft.data.share import share_prompts
from ft.errors import CapacityError, CheckpointError, FtError, MissingFileError, RecipeError, RunFolderError
from ft.io import checkpoint
from ft.io.adapter import load_adapter
from ft.io.runfolder import RECIPE, claim, diff, has_checkpoints, is_free
from ft.io.weights import ModelFolder, open_weights, resolve
from ft.models import load, lora, memory, quant
from ft.models.build import structure
from ft.models.reference import Second
from ft.recipe import Recipe, dump, run_folder, total_steps
from ft.train import keep, optim, reference, setup
from ft.train.inspect import oddities, prepared
from ft.train.setup import Rows
from ft.train.trial import longest, try_step
from ft.types import asked

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")
MOMENTS = {32: 8, 8: 2}  # bytes of AdamW's two moments of one weight, by optim.bits
PLACES = {"cuda": "this GPU", "cpu": "this machine"}
STYLES = {"ok": "green", "warning": "bold yellow", "FAIL": "bold red", "left out": "dim"}


@frozen(kw_only=True)
class Found(Generic[T]):
    """What an item found: the line's text, a value that later items use, and what is odd."""

    text: str
    value: T
    warnings: tuple[str, ...] = ()


@define
class Sheet:
    """The lines so far."""

    console: Console
    verdicts: list[str] = field(factory=list)

    def line(self, verdict: str, name: str, text: str) -> None:
        self.verdicts.append(verdict)
        first, *rest = text.splitlines() or [""]
        head = Text.assemble((f"{verdict:<8} ", STYLES[verdict]), (f"{name:<14} ", "bold"), first)
        self.console.print(head, soft_wrap=True)
        for more in rest:
            self.console.print(Text(" " * 24 + more), soft_wrap=True)

    def attempt(self, name: str, act: Callable[[], Found[T]]) -> T | None:
        """One item; an error of the user's is its line, and None its value."""
        try:
            found = act()
        except FtError as error:
            self.line("FAIL", name, error.message)
            return None
        self.line("ok", name, found.text)
        for warning in found.warnings:
            self.line("warning", name, warning)
        return found.value

    @property
    def failed(self) -> int:
        return self.verdicts.count("FAIL")

    def left_out(self, name: str, why: str) -> None:
        self.line("left out", name, why)


def check(recipe: Recipe, console: Console, *, available: int | None = None) -> bool:
    """Try everything that a run of ``recipe`` needs; True is go.

    Args:
        available: bytes of memory that a rank may use; by default what this machine has free now.
    """
    sheet = Sheet(console)
    sheet.attempt("recipe", lambda: _recipe(recipe))
    sheet.attempt("trackers", lambda: _trackers(recipe))
    sheet.attempt("run folder", lambda: _run_folder(recipe))
    folder = sheet.attempt("model folder", lambda: _model_folder(recipe))
    tokenizer = sheet.attempt("tokenizer", lambda: _tokenizer(recipe, folder))
    rows = None
    if tokenizer is None:
        sheet.left_out("rows", "without a tokenizer there are no tokens")
    else:
        rows = _data(recipe, tokenizer, sheet)
    trial = _model(recipe, folder, tokenizer, sheet, available)
    if rows is None or tokenizer is None:
        sheet.left_out("one step", "without rows there is nothing to train on")
    elif trial == "none":
        sheet.left_out("one step", "without the model and its reference there is nothing to train")
    else:
        sheet.attempt("one step", lambda: _step(recipe, trial == "real", folder, tokenizer, rows))
    return _verdict(sheet)


def _model(
    recipe: Recipe, folder: ModelFolder | None, tokenizer: Any, sheet: Sheet, available: int | None
) -> Literal["real", "look-alike", "none"]:
    """Everything about the model that takes no memory; returns what one step can be tried with."""
    if tokenizer is None or (folder is None and not recipe.model.tiny):
        sheet.left_out("model", "there is no model folder to look into")
        return "none" if recipe.model.family is None else "look-alike"
    shape = sheet.attempt("model", lambda: _shape(recipe, folder, tokenizer))
    if shape is None:
        return "none"
    before = sheet.failed
    if recipe.model.tiny or folder is None:
        sheet.left_out("weights", "a rehearsal starts from random ones")
    else:
        sheet.attempt("weights", lambda: _names(shape, folder))
    failed = sheet.failed
    second = sheet.attempt("reference", lambda: _reference(recipe, folder, tokenizer))
    if sheet.failed > failed:
        return "none"
    sheet.attempt("memory", lambda: _memory(recipe, shape, available, second))
    trial = "real" if sheet.failed == before else "look-alike"
    sheet.attempt("disk", lambda: _disk(recipe, shape))
    return trial


def _verdict(sheet: Sheet) -> bool:
    failed, odd = sheet.failed, sheet.verdicts.count("warning")
    items = len(sheet.verdicts) - odd
    warned = f" ({odd} warning{'s' * (odd > 1)})" if odd else ""
    if failed:
        sheet.console.print(Text(f"no-go: {failed} of {items} items failed{warned}", STYLES["FAIL"]))
    else:
        sheet.console.print(Text(f"go{warned}", STYLES["ok"]))
    return not failed


# What costs nothing ---------------------------------------------------------------------------------------------------


def _recipe(recipe: Recipe) -> Found[None]:
    json.dumps(dump(recipe))
    kind = "all weights" if recipe.adapter is None else f"LoRA r={recipe.adapter.r}"
    held = " in NF4" if recipe.model.quant else ""
    tiny = ", a rehearsal" if recipe.model.tiny else ""
    text = f"{type(recipe.method).__name__} of {recipe.model.id}{held}, {kind}{tiny}"
    if recipe.optim.bits == 8 and find_spec("torchao") is None:
        raise RecipeError("8-bit moments need torchao, which is not installed", where="optim.bits",
                          fix="pip install 'ft[optim]', or optim.bits=32")  # fmt: skip
    return Found(text=text, value=None)


def _trackers(recipe: Recipe) -> Found[None]:
    missing = [name for name in recipe.log.sinks if find_spec(name) is None]
    if missing:
        raise RecipeError(f"not installed: {', '.join(missing)}", where="log.sinks", fix="pip install 'ft[trackers]'")
    return Found(text=", ".join(("metrics.jsonl", *recipe.log.sinks)), value=None)


def _run_folder(recipe: Recipe) -> Found[None]:
    """Free, or holding a run that this recipe can take up."""
    folder = run_folder(recipe)
    _writable(folder)
    if not has_checkpoints(folder):
        claim(folder, resume=False)
        return Found(text=f"{folder} is free", value=None)
    warnings: list[str] = []
    newest = checkpoint.load_latest(folder, notice=warnings.append)
    old = _recorded(folder / RECIPE)
    new = json.loads(json.dumps(dump(recipe), default=str))
    fixed = [path for path in diff(old, new) if not is_free(path)]
    if fixed:
        raise CheckpointError(
            f"the folder holds another run; {', '.join(fixed[:5])} differ from its recipe",
            where=str(folder),
            fix=f"choose another folder with save.dir=..., or delete {folder}",
        )
    at = newest.step if newest else 0
    warnings.append(f"only `ft run --resume` will use {folder}: it goes on after step {at}")
    return Found(text=f"{folder} holds this run, saved at step {at}", value=None, warnings=tuple(warnings))


def _recorded(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise RunFolderError("a file of the run cannot be read", where=str(path), got=str(error),
                             fix="restore it from a copy") from error  # fmt: skip


def _writable(folder: Path) -> None:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise CapacityError("the run folder cannot be written", where=str(folder), fix="name another with save.dir=...")


def _model_folder(recipe: Recipe) -> Found[ModelFolder | None]:
    """The folder; only small files are fetched here where the hub has to be asked."""
    model = recipe.model
    try:
        folder = resolve(model.id, model.revision, weights=False)
    except FtError:
        if not model.tiny:
            raise
        return Found(text=f"{model.id} is not at hand; a rehearsal goes on without", value=None)
    return Found(text=f"{folder.path}" + (f" at {folder.commit}" if folder.commit else ""), value=folder)


def _tokenizer(recipe: Recipe, folder: ModelFolder | None) -> Found[Any]:
    """The model's own; where the folder is missing, bytes stand in, so that the rows can be looked at all the same."""
    template = recipe.model.template
    if template is not None and not template.is_file():
        raise MissingFileError("the chat template does not exist", where=str(template), fix="correct model.template")
    said: list[str] = []
    tiny = recipe if folder is not None else evolve(recipe, model=evolve(recipe.model, tiny=True))
    tokenizer, _ = setup.tokenizer_of(tiny, said.append)
    stand_in = () if recipe.model.tiny or folder is not None else ("bytes stand in for it: lengths are not the run's",)
    return Found(text=said[0] if said else f"{len(tokenizer):,} tokens", value=tokenizer, warnings=stand_in)


# Rows -----------------------------------------------------------------------------------------------------------------


def _data(recipe: Recipe, tokenizer: Any, sheet: Sheet) -> Rows | None:
    """Training and held-out rows, rendered, masked and cut as a run would."""
    train = sheet.attempt("training rows", lambda: _rows(recipe, tokenizer, held_out=False))
    if recipe.data.eval:
        sheet.attempt("held-out rows", lambda: _rows(recipe, tokenizer, held_out=True))
    if isinstance(train, Prepared):
        share = train.report.trained / max(1, train.report.tokens)
        odd = tuple(oddities(train, tokenizer, recipe))
        text = f"proven on all {train.report.kept:,} rows; {share:.1%} of the tokens are trained"
        sheet.attempt("masks", lambda: Found(text=text, value=None, warnings=odd))
    return train


def _rows(recipe: Recipe, tokenizer: Any, *, held_out: bool) -> Found[Rows]:
    data = prepared(recipe, recipe.data.eval if held_out else recipe.data.train, tokenizer, lambda line: None)
    longest_ones = longest(data, tokens=recipe.batch.tokens, examples=recipe.batch.examples)
    pack(share_prompts(longest_ones), tokens=recipe.batch.tokens)  # a model that cannot share fails in the trial
    text = data.report.lines()[0].removeprefix("rows: ") + f"; the longest has {data.report.longest:,} tokens"
    if not held_out:
        text += f"; {total_steps(recipe, data.per_epoch):,} steps of {recipe.batch.examples} rows"
    return Found(text=text, value=data)


# The model, without memory --------------------------------------------------------------------------------------------


@frozen(kw_only=True, eq=False)
class Shape:
    """The model as it will be held, on the meta device."""

    net: Any
    attached: lora.Attached | None
    trained: dict[str, torch.nn.Parameter]


def _shape(recipe: Recipe, folder: ModelFolder | None, tokenizer: Any) -> Found[Shape]:
    """Config, quantised structure and adapters, as ``ft.models.build`` puts them together."""
    config = setup.config_of(recipe, folder, vocab=len(tokenizer))
    made = structure(recipe.model, recipe.adapter, config, asked(recipe.method))
    net, attached = made.net, made.attached
    if recipe.adapter is not None and recipe.adapter.init is not None:
        load_adapter(recipe.adapter.init)
    trained = optim.trained(net)
    text = f"{type(net).__name__}; {sum(p.numel() for p in trained.values()):,} of "
    text += f"{sum(row.elements for row in quant.table(net)):,} parameters trained"
    if attached is not None:
        text += f", on {len(attached.linears)} linear layers and {len(attached.stacks)} stacks of experts"
    text += setup.dequantised(recipe, dist.own_device().type)
    return Found(text=text, value=Shape(net=net, attached=attached, trained=trained))


def _names(shape: Shape, folder: ModelFolder) -> Found[None]:
    """Every tensor that the model needs is stored, in its shape, and nothing is left over. Headers alone are read."""
    weights = open_weights(folder.path)
    plan = load.plan(shape.net, weights, where=str(folder.path))
    text = f"{len(plan.ops):,} tensors, {memory.size(weights.total_bytes())}, nothing missing"
    return Found(text=text + (f"; {len(plan.dropped):,} left out on purpose" if plan.dropped else ""), value=None)


def _disk(recipe: Recipe, shape: Shape) -> Found[None]:
    """Room for the checkpoints that are kept, the best, and the one being written."""
    saved = shape.trained if shape.attached else keep.own_tensors(shape.net)
    moments = sum(p.numel() for p in shape.trained.values()) * MOMENTS[recipe.optim.bits]
    weights = sum(t.numel() * t.element_size() for t in saved.values())
    one = weights + moments + (weights if recipe.reference.every else 0)
    place, room = run_folder(recipe), (recipe.save.keep + 2) * one
    checkpoint.preflight(place, room)
    free = checkpoint.free_bytes(place)
    text = f"{memory.size(one)} a checkpoint, {memory.size(room)} in all; {memory.size(free)} free"
    return Found(text=text, value=None)


def _reference(recipe: Recipe, folder: ModelFolder | None, tokenizer: Any) -> Found[Second | None]:
    """That the method can have the reference it is given; of a second model, structure and stored names too."""
    config = setup.config_of(recipe, folder, vocab=len(tokenizer))
    second = reference.find(recipe, tokenizer, config, folder)
    if second is None:
        return Found(text=_no_second(recipe), value=None)
    net = structure(second.model, None, second.config, trained=second.moves).net
    if second.folder is not None and not second.model.tiny:
        load.plan(net, open_weights(second.folder.path), where=str(second.folder.path))
    whose = second.model.id if recipe.reference.model else "a copy of the starting weights"
    held = memory.size(sum(row.bytes for row in quant.table(net)))
    return Found(text=f"{whose} ({type(net).__name__}), {held} over all ranks", value=second)


def _no_second(recipe: Recipe) -> str:
    if asked(recipe.method).reference == "none":
        return "none, the method compares with nothing"
    moves = f"; moved every {recipe.reference.every} steps" if recipe.reference.every else ""
    return ("the model with its adapters off" if recipe.adapter else "the model before its first step") + moves


def _memory(recipe: Recipe, shape: Shape, available: int | None, second: Second | None) -> Found[None]:
    """Bytes of each rank by class, against what is free."""
    device, (_, world) = dist.own_device(), dist.rank_from_env()
    need = memory.estimate(recipe, shape.net.config, world=world, second=second)
    have = memory.available(device) if available is None else available
    sharing = 1 if device.type == "cuda" else world  # ranks on one machine share its memory, but not a GPU
    memory.fits(need, have=have, ranks=sharing, rehearsal="the same command with --tiny", place=PLACES[device.type])
    classes = [line.split(maxsplit=1) for line in need.lines()]
    said = ", ".join(f"{name} {size}" for name, size in classes if name != "peak" and not size.startswith("0 "))
    text = f"peak of about {memory.size(need.peak)} on each of {world} ranks ({said}); {memory.size(have)} free"
    return Found(text=text.replace("each of 1 ranks", "one rank"), value=None)


# One step -------------------------------------------------------------------------------------------------------------


def _step(recipe: Recipe, real: bool, folder: ModelFolder | None, tokenizer: Any, rows: Rows) -> Found[None]:
    tried = try_step(recipe, real=real, folder=folder, tokenizer=tokenizer, rows=rows)
    which = "the real model" if real and not recipe.model.tiny else "a random look-alike, not the real model"
    text = (
        f"with {which}: {tried.rows} rows, {tried.positions:,} tokens, {tried.seconds:.2f} s, "
        f"peak {tried.peak / 1e9:.2f} GB, loss {tried.loss:.3f}; {tried.tensors:,} trained tensors, "
        f"gradients finite; layout {tried.layout}"
    )
    odd = tuple(line for line in tried.said if "so rows are padded" in line)
    return Found(text=text, value=None, warnings=odd)
