"""What a server is sent at each step: adapters, or a whole model, as it reads them. ``transfer.py`` says how."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from attrs import frozen
from torch import Tensor

from ft.dist import own_device, whole
from ft.errors import CapacityError, FtError, RecipeError
from ft.io import served
from ft.io.adapter import save_adapter
from ft.io.convert import Plan
from ft.io.stream import Entry
from ft.io.weights import TensorSource, open_weights, write_weights
from ft.models import load, lora
from ft.models.build import Built
from ft.models.experts import expert_modules
from ft.recipe import VLLM, Recipe
from ft.rollout.foreign import Wanted
from ft.rollout.server import context
from ft.rollout.transfer import Adapter, Broadcast, Parcel, Reload, Way
from ft.rollout.wire import Nccl, chosen

KEPT = 2  # folders of weights: the server may still read the last one


@frozen(kw_only=True, eq=False)
class Weights:
    """``gather``: whole tensors, by all ranks. ``write``: one rank puts them into a folder that appears whole.

    ``way``: how a server gets them, given the name that an adapter has there. Where ``entries`` are given it gets
    these, made of what was gathered, and no folder is written.
    """

    gather: Callable[[], Mapping[str, Tensor]]
    write: Callable[[Path, Mapping[str, Tensor]], None]
    way: Callable[[str], Way] = Adapter
    entries: Callable[[Mapping[str, Tensor]], Sequence[Entry]] | None = None
    wanted: Wanted | None = None  # of a server that is not ours


def weights(recipe: Recipe, built: Built, source: Path, options: VLLM) -> Weights:
    """What ``recipe`` trains, as vLLM reads it. ``source`` is the folder of the model that it serves.

    Raises:
        RecipeError: vLLM cannot be given it.
    """
    net, attached = built.policy.scorer.model, built.attached
    stored = open_weights(source)
    plan = load.plan(net, stored, where=str(source))
    wanted = Wanted(model=source, context=context(recipe, options), whole=attached is None)
    if attached is None:
        return _whole(net, recipe, stored, plan, source, options, wanted)
    if expert_modules(net) and options.url is None and not torch.cuda.is_available():
        raise RecipeError(
            "vLLM on a CPU takes no adapters where a model has routed experts", where="sampler",
            fix="set sampler=embedded, or sample on a GPU",
        )  # fmt: skip
    if options.transfer == "nccl":
        raise RecipeError(
            "adapters are sent in folders", where="sampler.transfer", got=options.transfer,
            fix="leave it out: nccl is for runs that train all weights",
        )  # fmt: skip
    config = lora.adapter_config(attached, recipe.model.id)
    return Weights(
        gather=lambda: served.adapter(lora.adapter_state(net), plan.ops),
        write=lambda folder, tensors: save_adapter(folder, tensors, served.adapter_config(config, tensors)),
        wanted=wanted,
    )


def _whole(
    net: torch.nn.Module, recipe: Recipe, stored: TensorSource, plan: Plan, source: Path, options: VLLM, wanted: Wanted
) -> Weights:
    """All weights, where no adapter is trained."""
    dtype, by_nccl = getattr(torch, recipe.model.dtype), chosen(options) == "nccl"

    def entries(tensors: Mapping[str, Tensor]) -> Sequence[Entry]:
        return served.model(tensors, plan, stored)

    return Weights(
        gather=lambda: _model(net, dtype),
        write=lambda folder, tensors: _write_model(folder, entries(tensors), source),
        way=lambda _: Broadcast(Nccl(device=own_device())) if by_nccl else Reload(ours=options.url is None),
        entries=entries if by_nccl else None,
        wanted=wanted,
    )


def packed(weights: Weights, tensors: Mapping[str, Tensor], run: Path, step: int, version: str) -> Parcel:
    """What is sent; a folder has a new name each time: vLLM keeps what it computed of prompts by the adapter's path.

    Raises:
        CapacityError: the disk does not take it.
    """
    if weights.entries is not None:
        return Parcel(version=version, entries=weights.entries(tensors))
    folder = run / "sync" / f"step-{max(step, 0):06d}.{version}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        weights.write(folder, tensors)
    except OSError as error:
        if isinstance(error, FtError):
            raise
        raise CapacityError(
            "the weights for the server cannot be written", where=str(folder), got=str(error),
            fix="make room, then go on with --resume",
        ) from error  # fmt: skip
    return Parcel(version=version, folder=folder.resolve())


def prune(run: Path, name: str, kept: int = KEPT) -> None:
    """Remove the folders of a sampler's versions, ``name`` and a number each, but the last ones."""
    folders = sorted((run / "sync").glob(f"step-*.{name}-*"), key=lambda folder: int(folder.name.rpartition("-")[2]))
    for old in folders[: len(folders) - kept]:
        shutil.rmtree(old, ignore_errors=True)


def _model(net: torch.nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Parameters, tied ones by each name, in the type the server computes in; and the buffers that a folder stores."""
    found: dict[str, Tensor] = {}
    for name, slot in load.slots(net).items():
        tensor = getattr(slot.owner, slot.leaf)
        kept = dtype if isinstance(tensor, torch.nn.Parameter) else tensor.dtype
        found |= dict.fromkeys((name, *slot.tied), whole(tensor.detach()).to("cpu", kept))
    return found


def _write_model(folder: Path, items: Sequence[Entry], source: Path) -> None:
    """A model folder: these weights, and everything else of the model's own folder."""
    work = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    try:
        work.mkdir(parents=True)
        documents = [f for f in source.iterdir() if f.is_file() and f.suffix in (".json", ".txt", ".jinja", ".model")]
        for file in documents:
            if not file.name.endswith(".index.json"):  # of the shards that it had
                shutil.copyfile(file, work / file.name)
        write_weights(work, items)
        work.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
