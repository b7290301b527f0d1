"""What a server is sent at each step: adapters, or a whole model, in folders it can read."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from attrs import frozen
from torch import Tensor

from ft.dist import whole
from ft.errors import RecipeError
from ft.io import served
from ft.io.adapter import save_adapter
from ft.io.stream import Entry
from ft.io.weights import open_weights, write_weights
from ft.models import load, lora
from ft.models.build import Built
from ft.models.experts import expert_modules
from ft.recipe import VLLM, Recipe
from ft.rollout.foreign import Wanted
from ft.rollout.server import context


@frozen(kw_only=True, eq=False)
class Weights:
    """``gather``: whole tensors, by all ranks. ``write``: one rank puts them into a folder that appears whole."""

    adapter: bool
    gather: Callable[[], Mapping[str, Tensor]]
    write: Callable[[Path, Mapping[str, Tensor]], None]
    wanted: Wanted | None = None  # of a server that is not ours


def weights(recipe: Recipe, built: Built, source: Path, options: VLLM) -> Weights:
    """What ``recipe`` trains, as vLLM reads it. ``source`` is the folder of the model that it serves.

    Raises:
        RecipeError: vLLM cannot be given it.
    """
    net, attached = built.policy.scorer.model, built.attached
    stored = open_weights(source)
    plan = load.plan(net, stored, where=str(source))
    if attached is not None:
        if expert_modules(net) and options.url is None and not torch.cuda.is_available():
            raise RecipeError(
                "vLLM on a CPU takes no adapters where a model has routed experts", where="sampler",
                fix="set sampler=embedded, or sample on a GPU",
            )  # fmt: skip
        config = lora.adapter_config(attached, recipe.model.id)
        return Weights(
            adapter=True,
            gather=lambda: served.adapter(lora.adapter_state(net), plan.ops),
            write=lambda folder, tensors: save_adapter(folder, tensors, served.adapter_config(config, tensors)),
            wanted=Wanted(model=source, context=context(recipe, options)),
        )
    if options.url is not None:
        raise RecipeError(
            "all weights are trained, and only a server that ft starts can be given them", where="sampler.url",
            fix="leave sampler.url out, train an adapter, or set sampler=embedded",
        )  # fmt: skip
    dtype = getattr(torch, recipe.model.dtype)
    return Weights(
        adapter=False,
        gather=lambda: _model(net, dtype),
        write=lambda folder, tensors: _write_model(folder, served.model(tensors, plan, stored), source),
    )


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
