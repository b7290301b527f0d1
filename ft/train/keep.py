"""Saving a run, taking it up again, and the folder that is left for use when it ends."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from ft import dist
from ft.data.tokenizer import padding
from ft.dist import World, copy_into
from ft.errors import CapacityError, CheckpointError
from ft.io import checkpoint
from ft.io.checkpoint import Checkpoint
from ft.io.stream import Entry, Tensors
from ft.io.weights import write_weights
from ft.models import lora
from ft.models.build import Built
from ft.train import kept, reference, state
from ft.train.session import Progress, Session

Say = Callable[[str], None]
OPTIMIZER = "optimizer"
ADAPTER, MODEL = "adapter_model", "model"  # file stems by which peft and transformers know the weights


def weights(built: Built) -> tuple[str, list[Entry]]:
    """File stem and tensors of what is trained: the adapters as peft names them, or the whole model in float32."""
    net = built.policy.scorer.model
    if built.attached is not None:
        return ADAPTER, lora.adapter_entries(net)
    return MODEL, state.entries(own_tensors(net))


def own_tensors(net: torch.nn.Module) -> dict[str, Tensor]:
    """Parameters (tied ones once) and the buffers that belong to a saved model."""
    saved = net.state_dict(keep_vars=True)
    names = dict(net.named_parameters()).keys() | dict(net.named_buffers()).keys()
    return {name: t for name, t in saved.items() if name in names}


def documents(built: Built, base: str, tokenizer: Any = None) -> dict[str, Any]:
    """What must lie beside the weights for peft or transformers to load them."""
    if built.attached is not None:
        return {"adapter_config": lora.adapter_config(built.attached, base)}
    return {"config": {**saved_config(built, tokenizer).to_diff_dict(), "dtype": "float32"}}


def saved_config(built: Built, tokenizer: Any) -> Any:
    """The config of a whole model, to be saved with it.

    A model that scores is told which token pads, for transformers reads a sequence's score before its padding.
    """
    config = deepcopy(built.policy.config)
    config.architectures = [type(built.policy.scorer.model).__name__]
    if built.policy.scorer.scores and tokenizer is not None:
        config.pad_token_id = padding(tokenizer)
    return config


def save(run: Session, progress: Progress) -> None:
    """A checkpoint of everything that resuming needs. All ranks call it; the first one writes.

    Raises:
        CapacityError: the disk is full or failing; on every rank, so that all of them go on or stop together.
    """
    stem, entries = weights(run.built)
    moments = state.entries(state.optimizer_tensors(run.optimizer, run.parameters))
    failure: CapacityError | None = None
    try:
        checkpoint.save(
            run.folder,
            progress.step,
            {stem: entries, OPTIMIZER: moments, **reference.entries(run), **kept.entries(run.context.kept)},
            {"progress": attrs.asdict(progress), **kept.document(run.context.kept)},
            documents=documents(run.built, run.recipe.model.id, run.context.tokenizer),
            keep=run.recipe.save.keep,
            best=progress.best_step or None,
            writer=run.world.first,
            notice=run.log.notice,
        )
    except CapacityError as error:
        failure = error
    if dist.any_rank(failure is not None, run.world):
        raise failure or CapacityError("the first rank could not save the checkpoint", where=str(run.folder))


def room(run: Session) -> int:
    """Bytes that the run's checkpoints may take: those it keeps, the best, and the one being written."""
    _, entries = weights(run.built)
    moments = 2 * sum(p.numel() * p.dtype.itemsize for p in run.parameters.values())
    own = [*entries, *(entry for items in reference.entries(run).values() for entry in items)]
    return (run.recipe.save.keep + 2) * (sum(entry.bytes for entry in own) + moments)


def find(folder: Path, world: World, say: Say) -> Checkpoint | None:
    """The newest whole checkpoint. The first rank looks and checks it; the others are told its step."""
    step = -1
    if world.first:
        checkpoint.sweep(folder, notice=say)
        newest = checkpoint.load_latest(folder, notice=say)
        step = newest.step if newest else -1
    step = int(dist.reduce_tree({"step": float(step)}, world, "max")["step"].item())
    return checkpoint.load(folder / f"step-{step:06d}", checksums=False) if step >= 0 else None


def restore(run: Session, saved: Checkpoint) -> Progress:
    """Overwrite weights, optimizer and what the method keeps by a checkpoint's; every rank takes its share."""
    net = run.policy.scorer.model
    if run.built.attached is not None:
        lora.load_state(net, saved.open(ADAPTER))
    else:
        _fill(own_tensors(net), saved.open(MODEL), saved.path)
    reference.restore(run, saved)
    run.context.kept.update(kept.restored(saved))
    state.restore_optimizer(run.optimizer, run.parameters, saved.open(OPTIMIZER))
    return Progress(**saved.meta["progress"])


def _fill(own: Mapping[str, Tensor], tensors: Tensors, path: Path) -> None:
    if own.keys() != tensors.keys():
        raise CheckpointError(
            "the saved model does not fit this run",
            where=str(path),
            expected=f"{len(own)} tensors",
            got=f"{len(tensors)} tensors",
        )
    for name, tensor in own.items():
        copy_into(tensor, tensors[name])


def export(run: Session, progress: Progress, tokenizer: Any) -> Path:
    """Lay the best weights (the last ones without evaluation) in <run>/final, for peft or transformers to load.

    An adapter is copied; a whole model is cast to model.dtype. The tokenizer comes along. One rank calls it.
    """
    best = progress.best_step
    step = best if best and (run.folder / f"step-{best:06d}").is_dir() else progress.step
    source, target = run.folder / f"step-{step:06d}", run.folder / "final"
    work = run.folder / "final.tmp"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    if run.built.attached is not None:
        for name in (f"{ADAPTER}.safetensors", "adapter_config.json"):
            shutil.copy2(source / name, work / name)
    else:
        dtype = getattr(torch, run.recipe.model.dtype)
        tensors = Tensors(source / f"{MODEL}.safetensors")
        write_weights(work, [_cast(tensors, name, dtype) for name in tensors])
        config = saved_config(run.built, tokenizer)
        config.dtype = run.recipe.model.dtype
        config.save_pretrained(work)
    tokenizer.save_pretrained(work)
    shutil.rmtree(target, ignore_errors=True)
    work.rename(target)
    return target


def _cast(tensors: Tensors, name: str, dtype: torch.dtype) -> Entry:
    shape = tuple(tensors[name].shape)
    return Entry(name=name, shape=shape, dtype=dtype, get=lambda: tensors[name].to(dtype))
