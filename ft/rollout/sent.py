"""What a server is sent at each step: adapters, or a whole model, in folders it can read."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from attrs import frozen
from torch import Tensor

from ft.dist import whole
from ft.errors import RecipeError
from ft.io.adapter import save_adapter
from ft.io.stream import entries
from ft.io.weights import write_weights
from ft.models import lora
from ft.models.build import Built
from ft.models.experts import expert_modules
from ft.recipe import VLLM, Recipe


@frozen(kw_only=True, eq=False)
class Weights:
    """``gather``: whole tensors, by all ranks. ``write``: one rank puts them into a folder that appears whole."""

    adapter: bool
    gather: Callable[[], Mapping[str, Tensor]]
    write: Callable[[Path, Mapping[str, Tensor]], None]


def weights(recipe: Recipe, built: Built, source: Path, options: VLLM) -> Weights:
    """What ``recipe`` trains, as vLLM reads it. ``source`` holds the model's config and tokenizer.

    Raises:
        RecipeError: vLLM cannot be given it.
    """
    net, attached = built.policy.scorer.model, built.attached
    if attached is not None and not attached.stacks:
        config = lora.adapter_config(attached, recipe.model.id)
        return Weights(
            adapter=True,
            gather=lambda: lora.adapter_state(net),
            write=lambda folder, tensors: save_adapter(folder, tensors, config),
        )
    if expert_modules(net):
        raise RecipeError(
            "routed experts that are trained cannot be sent to vLLM: it wants them in another layout",
            where="sampler", fix="leave experts out of adapter.targets, or set sampler=embedded",
        )  # fmt: skip
    if options.url is not None:
        raise RecipeError(
            "all weights are trained, and only a server that ft starts can be given them", where="sampler.url",
            fix="leave sampler.url out, train an adapter, or set sampler=embedded",
        )  # fmt: skip
    dtype = getattr(torch, recipe.model.dtype)
    return Weights(
        adapter=False,
        gather=lambda: _model(net, dtype),
        write=lambda folder, tensors: _write_model(folder, tensors, source),
    )


def _model(net: torch.nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Parameters, tied ones once, in the type the server computes in."""
    return {name: whole(p.detach()).to("cpu", dtype) for name, p in net.named_parameters()}


def _write_model(folder: Path, tensors: Mapping[str, Tensor], source: Path) -> None:
    """A model folder: these weights, and everything else of the model's own folder."""
    work = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    try:
        work.mkdir(parents=True)
        documents = [f for f in source.iterdir() if f.is_file() and f.suffix in (".json", ".txt", ".jinja", ".model")]
        for file in documents:
            if not file.name.endswith(".index.json"):  # of the shards that it had
                shutil.copyfile(file, work / file.name)
        write_weights(work, entries(tensors))
        work.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
