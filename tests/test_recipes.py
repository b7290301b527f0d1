"""Every recipe in recipes/ loads, survives JSON, and rehearses end to end."""

from pathlib import Path

import attrs
import pytest
import torch

from ft import BCO, CPO, DPO
from ft.recipe import dump, load, override, rehearse, restore
from ft.train.loop import train

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.py"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_shipped_recipe_rehearses_from_start_to_end(path, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("FT_MODELS", str(tmp_path))  # nothing at hand: a byte-level tokenizer and random weights
    torch.set_num_threads(1)
    recipe = load(path)
    assert restore(dump(recipe)) == recipe
    small = override(rehearse(recipe), ["steps=2", "batch.examples=2", "data.max_tokens=160", "data.cache=none"])
    small = attrs.evolve(small, save=attrs.evolve(small.save, dir=tmp_path / "run"))
    outcome = train(small)
    assert (outcome.ended, outcome.step) == ("done", 2)
    assert any((tmp_path / "run" / "final").glob("*.safetensors"))


@pytest.mark.parametrize("method", [BCO(), CPO(), DPO(kind="ipo"), DPO(kind={"sigmoid": 1.0, "sft": 1.0})], ids=repr)
def test_the_flagship_rehearses_with_methods_that_have_no_recipe_of_their_own(method, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("FT_MODELS", str(tmp_path))
    torch.set_num_threads(1)
    recipe = rehearse(attrs.evolve(load(ROOT / "recipes/qwen35_moe_dpo.py"), method=method))
    small = override(recipe, ["steps=1", "batch.examples=2", "data.max_tokens=160", "data.cache=none"])
    small = attrs.evolve(small, save=attrs.evolve(small.save, dir=tmp_path / "run"))
    assert train(small).ended == "done"
