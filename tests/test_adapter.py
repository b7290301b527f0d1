"""Adapter files: peft's format, whole or absent, and errors that say which file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ft.errors import MissingFileError, ModelError
from ft.io.adapter import CONFIG, WEIGHTS, load_adapter, save_adapter

STATE = {
    "base_model.model.q.lora_A.weight": torch.arange(6.0).view(2, 3),
    "base_model.model.q.lora_B.weight": torch.ones(4, 2, dtype=torch.bfloat16),
}
PLAIN: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", "rank_pattern": {}}


def test_what_is_saved_is_read_back_and_is_ordinary_safetensors(tmp_path: Path):
    save_adapter(tmp_path / "deep" / "a", STATE, PLAIN)
    tensors, config = load_adapter(tmp_path / "deep" / "a")
    assert config == PLAIN and dict(tensors).keys() == STATE.keys()
    for name, tensor in load_file(tmp_path / "deep" / "a" / WEIGHTS).items():
        assert torch.equal(tensor, STATE[name]) and torch.equal(tensors[name], tensor)
    assert sorted(os.listdir(tmp_path / "deep")) == ["a"]


def test_saving_again_replaces_the_two_files_and_leaves_the_others(tmp_path: Path):
    save_adapter(tmp_path / "a", STATE, PLAIN)
    (tmp_path / "a" / "README.md").write_text("mine")
    save_adapter(tmp_path / "a", {n: t + 1 for n, t in STATE.items()}, PLAIN | {"r": 3})
    tensors, config = load_adapter(tmp_path / "a")
    assert config["r"] == 3 and tensors["base_model.model.q.lora_A.weight"][0, 0] == 1.0
    assert (tmp_path / "a" / "README.md").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["a"]


def test_a_failed_save_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ft.io.adapter.write_file", full)
    with pytest.raises(OSError, match="No space"):
        save_adapter(tmp_path / "a", STATE, PLAIN)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("missing", [WEIGHTS, CONFIG])
def test_a_missing_file_is_named(tmp_path: Path, missing: str):
    save_adapter(tmp_path / "a", STATE, PLAIN)
    (tmp_path / "a" / missing).unlink()
    with pytest.raises(MissingFileError, match=f"no {missing}"):
        load_adapter(tmp_path / "a")


def test_damaged_files_are_named(tmp_path: Path):
    save_adapter(tmp_path / "a", STATE, PLAIN)
    (tmp_path / "a" / WEIGHTS).write_bytes(b"\x00" * 20)
    with pytest.raises(ModelError, match=WEIGHTS):
        load_adapter(tmp_path / "a")
    (tmp_path / "a" / CONFIG).write_text("{")
    with pytest.raises(ModelError, match=CONFIG):
        load_adapter(tmp_path / "a")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"use_dora": True}, "use_dora"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ],
)
def test_adapters_that_are_not_plain_lora_are_refused(tmp_path: Path, change: dict[str, Any], said: str):
    save_adapter(tmp_path / "a", STATE, PLAIN | change)
    with pytest.raises(ModelError, match=said):
        load_adapter(tmp_path / "a")


def test_tensors_that_are_no_factors_are_refused(tmp_path: Path):
    save_adapter(tmp_path / "a", STATE, PLAIN)
    save_file(STATE | {"base_model.model.lm_head.weight": torch.ones(2)}, tmp_path / "a" / WEIGHTS)
    with pytest.raises(ModelError, match=r"lm_head\.weight"):
        load_adapter(tmp_path / "a")


def test_options_at_their_plain_values_pass(tmp_path: Path):
    plain = {"use_dora": False, "lora_bias": False, "bias": "none", "modules_to_save": None, "alpha_pattern": {}}
    save_adapter(tmp_path / "a", STATE, PLAIN | plain)
    assert json.loads((tmp_path / "a" / CONFIG).read_text())["modules_to_save"] is None
    load_adapter(tmp_path / "a")
