"""Adapters on disk in peft's format: adapter_model.safetensors beside adapter_config.json."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from ft.errors import MissingFileError, ModelError
from ft.io.files import json_text, sync_folder, write_file
from ft.io.stream import Tensors, entries, write_tensors

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def save_adapter(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write an adapter into ``folder``, durably.

    A new folder appears whole or not at all. In a folder that exists, each of the two files is replaced whole; other
    files stay.
    """
    temporary = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        write_tensors(temporary / WEIGHTS, entries(tensors), {"format": "pt"})
        write_file(temporary / CONFIG, [json_text(dict(config))])
        sync_folder(temporary)
        if folder.exists():
            for name in (WEIGHTS, CONFIG):
                os.replace(temporary / name, folder / name)
            sync_folder(folder)
        else:
            os.rename(temporary, folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_adapter(folder: Path) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
    """The tensors of an adapter, each read when asked for, and its config.

    Raises:
        MissingFileError: one of the two files is not there.
        ModelError: a file is damaged, or holds no LoRA that ft can continue.
    """
    for name in (WEIGHTS, CONFIG):
        if not (folder / name).is_file():
            raise MissingFileError(f"no {name} in this folder", where=str(folder), expected=f"{WEIGHTS} and {CONFIG}")
    config = _config(folder / CONFIG)
    try:
        tensors = Tensors(folder / WEIGHTS)
    except SafetensorError as error:
        raise ModelError("not a safetensors file", where=str(folder / WEIGHTS), got=str(error)) from error
    for name in tensors:
        if not name.endswith((".lora_A.weight", ".lora_B.weight", *_HEAD)):
            raise ModelError(
                "the adapter holds more than LoRA factors and a head that scores", where=str(folder / WEIGHTS), got=name
            )
    return tensors, config


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError("not a JSON file", where=str(path), got=str(error)) from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise ModelError("not a LoRA adapter", where=str(path), expected="peft_type LORA", got=str(kind))
    for option, plain in _PLAIN.items():
        if option == "modules_to_save" and set(config.get(option) or ()) <= _SCORES:
            continue
        if config.get(option) not in (None, plain):
            raise ModelError(
                "a kind of LoRA that ft does not train", where=f"{path}: {option}",
                expected=json.dumps(plain), got=json.dumps(config[option]),
            )  # fmt: skip
    return config


# A head that scores is saved whole. peft's own lists of modules name both of the names that families give it.
_HEAD = (".score.weight", ".score.bias")
_SCORES = {"score", "classifier"}

# Options of peft that change what an adapter computes, and their values for plain LoRA.
_PLAIN: dict[str, Any] = {
    "use_dora": False,
    "lora_bias": False,
    "bias": "none",
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": [],
    "layer_replication": [],
}
