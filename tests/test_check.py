"""`ft check`: what is well is said, each thing that is wrong has its line with a remedy, and the rest goes on."""

from __future__ import annotations

import json
import re
import shutil
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as c10d
from attrs import evolve
from rich.console import Console
from safetensors.torch import load_file, save_file
from tiny_models import build

from ft.data.dataset import prepare
from ft.data.tokenizer import byte_tokenizer
from ft.errors import NumericsError
from ft.methods import SFT
from ft.recipe import Batching, Data, Log, LoRA, Model, Recipe, Save, dump
from ft.train.check import check
from ft.train.trial import _finite, longest

UNPROVABLE = "{% for m in messages %}<|im_start|>{{ m.role }}{{ messages|length }} {{ m.content|upper }}\n{% endfor %}"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 2 layers and 64 wide, with a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("model")
    build("llama", vocab_size=261).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def rehearsal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """A recipe whose model is not at hand, so that a random look-alike is all there is."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    rows = [chat("hi" * n, "yes") for n in range(1, 6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Recipe(
        model=Model(id="nobody/nothing", family="llama", tiny=True, dtype="float32"),
        adapter=LoRA(r=2),
        data=Data(train=str(tmp_path / "rows.jsonl"), eval=str(tmp_path / "rows.jsonl"), cache=None),
        method=SFT(),
        batch=Batching(examples=4, tokens=100),
        save=Save(dir=tmp_path / "run"),
        steps=3,
    )


@pytest.fixture
def real(rehearsal: Recipe, model_folder: Path) -> Recipe:
    """The same on a model that is there."""
    return evolve(rehearsal, model=Model(id=str(model_folder), dtype="float32"))


def chat(user: str, assistant: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]}


def tried(recipe: Recipe, **options: Any) -> SimpleNamespace:
    """go, the whole text, and the first line of each item as {name: (verdict, text)}; a warning gets "name!"."""
    out = StringIO()
    go = check(recipe, Console(file=out, width=300), **options)
    lines = {}
    for line in out.getvalue().splitlines():
        verdict, name, text = line[:8].strip(), line[9:23].strip(), line[24:]
        if verdict in ("ok", "warning", "FAIL", "left out"):
            lines[name + "!" * (verdict == "warning")] = (verdict, text)
    assert not c10d.is_initialized(), "the ranks of the trial must be gone"
    return SimpleNamespace(go=go, text=out.getvalue(), lines=lines)


def failed(found: SimpleNamespace) -> list[str]:
    return [name for name, (verdict, _) in found.lines.items() if verdict == "FAIL"]


# All is well ----------------------------------------------------------------------------------------------------------


def test_a_rehearsal_is_go_and_leaves_no_trace(rehearsal: Recipe, tmp_path: Path):
    before = sorted(p.name for p in tmp_path.iterdir())
    found = tried(rehearsal)
    assert found.go and failed(found) == [] and found.text.endswith("go\n")
    assert list(found.lines) == [
        *("recipe", "trackers", "run folder", "model folder", "tokenizer", "training rows", "held-out rows", "masks"),
        *("model", "weights", "reference", "memory", "disk", "one step"),
    ]
    assert found.lines["training rows"][1].startswith("5 read, 5 kept; the longest has 34 tokens; 3 steps of 4 rows")
    assert found.lines["weights"] == ("left out", "a rehearsal starts from random ones")
    # 34, 32, 30 and 28 tokens are 33, 31, 29 and 27 positions; three of them are 93 of 100
    assert "a random look-alike, not the real model: 3 rows, 93 tokens" in found.lines["one step"][1]
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_model_that_is_there_is_tried_itself(real: Recipe):
    found = tried(evolve(real, adapter=None))
    assert found.go
    weights = re.match(
        r"21 tensors, (\d+\.\d) KB, nothing missing", found.lines["weights"][1]
    )  # 2 layers of 9, 3 outside
    assert "with the real model: 3 rows" in found.lines["one step"][1]
    disk = re.match(r"(\d+\.\d) MB a checkpoint, (\d+\.\d) MB in all; .* free", found.lines["disk"][1])
    assert weights is not None and disk is not None
    one = 3 * float(weights[1]) / 1024  # weights and two moments; the last two are kept, the best, and one is written
    assert (float(disk[1]), float(disk[2])) == (pytest.approx(one, abs=0.06), pytest.approx(4 * one, abs=0.06))


# What is wrong --------------------------------------------------------------------------------------------------------


def test_a_missing_data_file(rehearsal: Recipe):
    found = tried(evolve(rehearsal, data=evolve(rehearsal.data, train="gone.jsonl")))
    assert not found.go and failed(found) == ["training rows"]
    assert found.lines["training rows"][1] == "gone.jsonl: no such file or folder"
    assert found.lines["held-out rows"][0] == found.lines["model"][0] == found.lines["disk"][0] == "ok"
    assert found.lines["one step"][0] == "left out"
    assert found.text.endswith("no-go: 1 of 13 items failed\n")


def test_a_template_that_proves_nothing(real: Recipe, tmp_path: Path):
    template = tmp_path / "odd.jinja"
    template.write_text(UNPROVABLE)
    found = tried(evolve(real, model=evolve(real.model, template=template)))
    assert failed(found) == ["training rows", "held-out rows"]
    assert "nothing proves" in found.lines["training rows"][1] and "rows.jsonl:1" in found.lines["training rows"][1]


def test_a_missing_template_is_named(rehearsal: Recipe):
    found = tried(evolve(rehearsal, model=evolve(rehearsal.model, template=Path("gone.jinja"))))
    assert failed(found) == ["tokenizer"] and "gone.jinja: the chat template does not exist" in found.text
    assert found.lines["one step"][0] == "left out"


def test_a_row_longer_than_a_micro_batch(rehearsal: Recipe):
    found = tried(evolve(rehearsal, batch=Batching(examples=4, tokens=20)))
    assert failed(found) == ["training rows", "held-out rows"]
    assert "\n" + " " * 26 + "fix: set batch.tokens=33 or more" in found.text, "below the line, indented"


def test_an_occupied_folder(rehearsal: Recipe, tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("")
    found = tried(rehearsal)
    assert failed(found) == ["run folder"] and "thesis.tex" in found.lines["run folder"][1]
    assert "save.dir=" in found.text and found.lines["one step"][0] == "ok"
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def save_something(folder: Path, recipe: Recipe) -> None:
    """A run folder as after its first checkpoint."""
    from ft.io import checkpoint

    folder.mkdir()
    (folder / "recipe.json").write_text(json.dumps(dump(recipe), default=str))
    checkpoint.save(folder, 7, {}, {}, keep=1)


def test_a_folder_with_checkpoints_can_only_be_resumed(rehearsal: Recipe, tmp_path: Path):
    save_something(tmp_path / "run", rehearsal)
    found = tried(evolve(rehearsal, steps=9))  # how long it runs is no part of what is learnt
    assert found.go and "saved at step 7" in found.lines["run folder"][1]
    assert "--resume" in found.lines["run folder!"][1] and found.text.endswith("go (1 warning)\n")


def test_a_folder_of_another_run(rehearsal: Recipe, tmp_path: Path):
    save_something(tmp_path / "run", evolve(rehearsal, seed=1))
    found = tried(rehearsal)
    assert failed(found) == ["run folder"] and "seed" in found.lines["run folder"][1]


def test_a_folder_whose_recipe_cannot_be_read(rehearsal: Recipe, tmp_path: Path):
    save_something(tmp_path / "run", rehearsal)
    (tmp_path / "run" / "recipe.json").write_text("{")
    found = tried(evolve(rehearsal, adapter=LoRA(targets=("no",))))
    assert failed(found) == ["run folder", "model"] and "cannot be read" in found.lines["run folder"][1]


def test_too_little_memory_tries_the_look_alike(real: Recipe):
    found = tried(real, available=1000)
    assert not found.go and failed(found) == ["memory"]
    assert "1000 B" in found.text and "--tiny" in found.text
    assert found.lines["one step"][0] == "ok" and "not the real model" in found.lines["one step"][1]


def test_a_target_that_matches_nothing(rehearsal: Recipe):
    found = tried(evolve(rehearsal, adapter=LoRA(targets=("q_prj",))))
    assert failed(found) == ["model"] and "fix: did you mean 'q_proj'?" in found.text
    assert found.lines["one step"][0] == "left out"


def test_a_tensor_that_is_missing(real: Recipe, model_folder: Path, tmp_path: Path):
    broken = Path(shutil.copytree(model_folder, tmp_path / "broken"))
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    found = tried(evolve(real, model=evolve(real.model, id=str(broken))))
    assert failed(found) == ["weights"] and "model.layers.1.mlp.up_proj.weight" in found.text
    assert "not the real model" in found.lines["one step"][1]


def test_a_model_that_is_nowhere(rehearsal: Recipe):
    found = tried(evolve(rehearsal, model=evolve(rehearsal.model, tiny=False)))
    assert failed(found) == ["model folder"] and found.lines["model"][0] == "left out"
    assert "lengths are not the run's" in found.lines["tokenizer!"][1]
    assert "not the real model" in found.lines["one step"][1]


def test_a_tracker_that_is_not_installed(rehearsal: Recipe):
    missing: list[Any] = [name for name in ("trackio", "wandb", "tensorboard") if find_spec(name) is None]
    if not missing:
        pytest.skip("all trackers are installed here")
    found = tried(evolve(rehearsal, log=Log(sinks=tuple(missing))))
    assert failed(found) == ["trackers"] and "pip install 'ft[trackers]'" in found.text
    assert found.lines["one step"][0] == "ok"


def test_a_disk_too_small(rehearsal: Recipe):
    found = tried(evolve(rehearsal, save=evolve(rehearsal.save, keep=10**9)))
    assert failed(found) == ["disk"] and "lower save.keep" in found.text


def test_odd_data_is_a_warning_and_still_go(rehearsal: Recipe):
    found = tried(evolve(rehearsal, data=evolve(rehearsal.data, end_of_turn=False)))
    assert found.go and "does not learn to stop" in found.lines["masks!"][1]


# The step -------------------------------------------------------------------------------------------------------------


def test_the_longest_batch_is_full_and_holds_the_longest_row(tmp_path: Path):
    """Positions 9, 5, 4, 3, 1 of rows in disorder."""
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"input_ids": [1] * n, "labels": [1] * n}) + "\n" for n in (4, 10, 2, 6, 5)))
    data = Data(train=str(path), cache=None)
    rows = prepare(data.train, data, byte_tokenizer(), announce=lambda line: None)
    assert [len(e) - 1 for e in longest(rows, tokens=13, examples=8)] == [9, 4]
    assert [len(e) - 1 for e in longest(rows, tokens=16, examples=8)] == [9, 5, 1]
    assert [len(e) - 1 for e in longest(rows, tokens=16, examples=1)] == [9]
    assert [len(e) - 1 for e in longest(rows, tokens=4, examples=8)] == [9], "too long by itself: for `pack` to refuse"


def test_a_gradient_that_is_not_finite_is_named():
    good, bad = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    good.grad, bad.grad = torch.ones(2), torch.tensor([1.0, torch.nan])
    run: Any = SimpleNamespace(parameters={"good": good, "bad": bad})
    with pytest.raises(NumericsError, match="1 of 2 gradients are not finite: bad"):
        _finite(run, torch.tensor(1.0))
    bad.grad = torch.ones(2)
    _finite(run, torch.tensor(1.0))
    with pytest.raises(NumericsError, match="loss inf"):
        _finite(run, torch.tensor(torch.inf))
