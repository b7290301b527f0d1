"""The command line: exit statuses, messages word for word, and what it imports."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from ft import cli
from ft.commands.recipes import folder_override, resolve
from ft.errors import DataError, RecipeError
from ft.recipe import Recipe, dump, dumps, load

TEXT = """from ft import *
recipe = Recipe(model=Model(id="a/b"), data=Data(train="a.jsonl"), method=SFT(), steps=30)
"""
ROOT = Path(__file__).parents[1]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with one recipe, x.py, as the working directory of an ``ft`` outside torchrun."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "x.py").write_text(TEXT)
    return tmp_path


@pytest.fixture
def ft(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., SimpleNamespace]:
    """Run ``ft words...`` here: status, out and err."""

    def run(*words: str) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["ft", *words])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return SimpleNamespace(status=stop.value.code, out=out, err=err)

    return run


def fake(monkeypatch: pytest.MonkeyPatch, module: str, name: str, function: Any) -> None:
    """Stand in for a room above, so that no test here trains."""
    stub = ModuleType(module)
    setattr(stub, name, function)
    monkeypatch.setitem(sys.modules, module, stub)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Recipe, bool]]:
    """What ``train`` was called with."""
    calls: list[tuple[Recipe, bool]] = []

    def train(recipe: Recipe, *, resume: bool) -> SimpleNamespace:
        calls.append((recipe, resume))
        return SimpleNamespace(ended="done")

    fake(monkeypatch, "ft.train.loop", "train", train)
    return calls


# What is imported -----------------------------------------------------------------------------------------------------

HEAVY = ("torch", "numpy", "transformers", "peft", "tokenizers", "datasets", "pyarrow", "safetensors")


def heavy_after(code: str) -> str:
    """Which heavy packages a fresh interpreter holds after ``code``."""
    end = f"\nimport sys; print([m for m in {HEAVY} if m in sys.modules], file=sys.stderr)"
    return subprocess.run([sys.executable, "-c", code + end], capture_output=True, text=True, cwd=ROOT).stderr


def command(*words: str) -> str:
    return f"import sys; sys.argv = {['ft', *words]}\nfrom ft.cli import main\ntry: main()\nexcept SystemExit: pass"


def test_the_probe_for_heavy_imports_can_find_one():
    assert heavy_after("import numpy") == "['numpy']\n"


@pytest.mark.parametrize(
    "code",
    [
        "import ft, ft.recipe, ft.methods",
        command("--help"),
        command("show", "recipes/smollm2_lora.py"),
        command("run", "recipes/smollm2_lora.py", "--help"),
        command("schema", "recipes/qwen35_moe_qlora.py"),
    ],
    ids=["import", "help", "show", "run-help", "schema"],
)
def test_reading_recipes_imports_nothing_heavy(code: str):
    assert heavy_after(code) == "[]\n"


# Show, schema, help ---------------------------------------------------------------------------------------------------


def test_help_lists_the_commands(ft: Callable[..., SimpleNamespace]):
    found = ft("--help")
    names = [line.split()[0] for line in found.out.partition("Commands:\n")[2].splitlines() if line]
    assert found.status == 0 and names == [*"run show schema inspect check eval reward rollouts serve bench".split()]


def test_show_marks_what_differs_and_documents_all(ft: Callable[..., SimpleNamespace]):
    lines = [" ".join(line.split()) for line in ft("show", "x.py", "optim.lr=2e-5").out.splitlines()]
    assert "optim AdamW with decoupled weight decay, on float32 masters." in lines
    assert "* optim.lr 2e-05 float. Peak learning rate. [default: 0.0002]" in lines
    assert "optim.eps 1e-08 float. Added to the root of the second moment." in lines
    assert "* steps 30 int or none. Optimizer steps; None counts them from `epochs`. [default: none]" in lines
    assert "* set by this recipe (6); the others hold their default" in lines


def test_show_json_is_the_dump(ft: Callable[..., SimpleNamespace]):
    found = ft("show", "x.py", "seed=3", "--json")
    assert found.status == 0 and json.loads(found.out) == dump(resolve(Path("x.py"), ["seed=3"]))


def test_run_help_lists_the_fields_of_the_recipe(ft: Callable[..., SimpleNamespace]):
    found = ft("run", "x.py", "seed=3", "--help")
    assert found.status == 0
    assert found.out.startswith("Usage: ft run [OPTIONS] [RECIPE] [NAME=VALUE]...\n")
    assert "* seed 3 int. Decides the order of rows, fresh weights and dropout. [default: 0]" in " ".join(
        found.out.split()
    )


def test_run_without_a_recipe_prints_usage_and_fails(ft: Callable[..., SimpleNamespace]):
    found = ft("run")
    assert found.status == 2 and found.out.startswith("Usage: ft run")


def test_schema_is_json(ft: Callable[..., SimpleNamespace]):
    assert json.loads(ft("schema").out)["required"] == ["model", "data", "method"]
    assert json.loads(ft("schema", "x.py").out)["properties"]["method"] == {"$ref": "#/$defs/ft.methods.sft:SFT"}


# Run ------------------------------------------------------------------------------------------------------------------


def test_run_trains_the_resolved_recipe(ft: Callable[..., SimpleNamespace], trained: list[tuple[Recipe, bool]]):
    assert ft("run", "x.py", "--optim.lr", "2e-5", "adapter=LoRA", "--resume").status == 0
    assert trained == [(resolve(Path("x.py"), ["optim.lr=2e-5", "adapter=LoRA"]), True)]


def test_tiny_rehearses_and_says_what_it_changed(ft: Callable[..., SimpleNamespace], trained: list[Any]):
    found = ft("run", "x.py", "--tiny", "batch.examples=4")
    assert found.out == (
        "rehearsal of a shrunken model; changed for it:\n"
        "  model.dtype: bfloat16 -> float32\n"
        "  model.tiny: false -> true\n"
        "  data.max_tokens: 2048 -> 512\n"
        "  data.overlong: drop -> truncate\n"
        "  batch.tokens: 8192 -> 2048\n"
        "  save.dir: none -> runs/x-tiny\n"
        "  save.every: 100 -> 10\n"
        "  steps: 30 -> 20\n"
    )
    assert trained[0][0].model.tiny and not trained[0][1]


def test_what_the_command_line_sets_stands_in_a_rehearsal(here: Path):
    recipe = resolve(Path("x.py"), ["steps=25", "model.dtype=bfloat16", "save.dir=runs/a", "name=b"], tiny=True)
    assert (recipe.steps, recipe.model.dtype, recipe.save.dir) == (25, "bfloat16", Path("runs/a-tiny"))
    assert resolve(Path("x.py"), ["name=b"], tiny=True).save.dir == Path("runs/b-tiny")


def test_only_the_first_rank_speaks(ft: Callable[..., SimpleNamespace], trained: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert ft("run", "x.py", "--tiny", "--nproc", "2").out == "" and len(trained) == 1
    assert ft("run", "x.py", "optim.clip=x").err == "error: rank 1: optim.clip=x: expected float or none, got 'x'\n"


def test_nproc_launches_the_same_command(ft: Callable[..., SimpleNamespace], monkeypatch: pytest.MonkeyPatch):
    calls = []
    fake(monkeypatch, "ft.commands.ranks", "launch", lambda words, n: calls.append((words, n)) or 7)
    assert ft("run", "x.py", "--nproc", "3", "--tiny", "--seed", "4").status == 7
    assert calls == [(["run", "x.py", "--seed", "4", "--tiny"], 3)]
    assert ft("run", "x.py", "--nproc", "3", "sed=1").status == 2 and len(calls) == 1, "checked before ranks start"


# Repeating a run ------------------------------------------------------------------------------------------------------


@pytest.fixture
def kept(here: Path) -> Path:
    """runs/x as a run leaves it."""
    (here / "runs" / "x").mkdir(parents=True)
    path = Path("runs/x/recipe.json")
    path.write_text(dumps(load("x.py")))
    return path


def test_a_recipe_json_repeats_its_run_in_a_new_folder(ft: Callable[..., SimpleNamespace], trained: Any, kept: Path):
    assert ft("run", str(kept)).status == 0
    assert trained[0] == (resolve(Path("x.py"), ["save.dir=runs/x-2"]), False)
    Path("runs/x-2").mkdir()
    ft("run", str(kept), "seed=1")
    assert trained[1][0].save.dir == Path("runs/x-3")
    Path("runs/x-tiny").mkdir()
    ft("run", str(kept), "--tiny")
    assert trained[2][0].save.dir == Path("runs/x-2-tiny")
    ft("run", str(kept), "save.dir=runs/y")
    assert trained[3][0].save.dir == Path("runs/y")


def test_a_recipe_json_resumes_where_it_lies(ft: Callable[..., SimpleNamespace], trained: Any, kept: Path):
    ft("run", str(kept), "--resume")
    assert trained.pop() == (load(kept), True), "unchanged where the folder is the recipe's own"
    Path("runs/x").rename("moved")
    ft("run", "moved/recipe.json", "--resume")
    assert trained[0][0].save.dir == Path("moved") and trained[0][1]


def test_ranks_started_by_hand_are_told_the_folder(kept: Path):
    with pytest.raises(RecipeError) as error:
        folder_override(kept, [], tiny=False, resume=False, ranks=2)
    assert str(error.value) == "runs/x/recipe.json: which folder repeats this run?\n  fix: add save.dir=runs/<new name>"
    assert folder_override(Path("x.py"), [], tiny=False, resume=False, ranks=2) == []


# Inspect and check ----------------------------------------------------------------------------------------------------


def test_check_is_go_or_no_go(ft: Callable[..., SimpleNamespace], monkeypatch: pytest.MonkeyPatch):
    fake(monkeypatch, "ft.train.check", "check", lambda recipe, console: recipe.seed == 0)
    assert ft("check", "x.py").status == 0
    assert ft("check", "x.py", "seed=1").status == 2


def test_inspect_gets_the_recipe_and_a_console(ft: Callable[..., SimpleNamespace], monkeypatch: pytest.MonkeyPatch):
    fake(monkeypatch, "ft.train.inspect", "inspect", lambda recipe, console: console.print(recipe.name))
    assert ft("inspect", "x.py").out == "x\n"


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "run x.py optim.lrr=1",
            "error: optim.lrr: AdamW has no field 'lrr'. Did you mean 'lr'? "
            "It has: lr, betas, eps, weight_decay, clip, bits.\n",
        ),
        ("run x.py seed=1.5", "error: seed=1.5: expected int, got '1.5'\n"),
        ("run x.py --seed -1", "error: seed: must be >= 0, got -1\n"),
        ("run x.py --tinny", "error: no option '--tinny'. Did you mean '--tiny'?\n"),
        ("show x.py --jsn", "error: no option '--jsn'. Did you mean '--json'?\n"),
        ("check xx.py", "error: xx.py: no such recipe\n  fix: did you mean x.py?\n"),
        ("check y.py", "error: y.py: no such recipe\n  fix: recipes here: x.py\n"),
        ("inspect x.py [bold]=1", "error: '[bold]=1' is not an override\n"),
    ],
)
def test_what_the_user_can_mend_is_one_message_and_status_2(
    ft: Callable[..., SimpleNamespace], words: str, message: str
):
    found = ft(*words.split())
    assert (found.status, found.out) == (2, "") and found.err.startswith(message)
    assert "Traceback" not in found.err


def test_a_long_error_fits_one_screen(ft: Callable[..., SimpleNamespace], monkeypatch: pytest.MonkeyPatch):
    def many(recipe: Recipe, *, resume: bool) -> None:
        raise DataError("rows are bad", fix="\n".join(f"row {i}" for i in range(100)))

    fake(monkeypatch, "ft.train.loop", "train", many)
    lines = ft("run", "x.py").err.splitlines()
    assert len(lines) == 31 and lines[0] == "error: rows are bad" and lines[-1] == "  ... and 71 more lines"


@pytest.mark.parametrize("folder", [".", "runs/x"])
def test_the_unforeseen_is_one_message_a_file_and_status_1(
    ft: Callable[..., SimpleNamespace], monkeypatch: pytest.MonkeyPatch, folder: str
):
    def fail(recipe: Recipe, *, resume: bool) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        raise ZeroDivisionError("division by zero")

    fake(monkeypatch, "ft.train.loop", "train", fail)
    found = ft("run", "x.py")
    (file,) = Path(folder).glob("ft-error-*.log")
    assert found.status == 1
    assert found.err == f"error: ZeroDivisionError: division by zero\n  traceback: {file}\n"
    assert "in fail\n" in file.read_text()


def test_ctrl_c_is_status_130(ft: Callable[..., SimpleNamespace], monkeypatch: pytest.MonkeyPatch):
    def interrupted(recipe: Recipe, *, resume: bool) -> None:
        raise KeyboardInterrupt

    fake(monkeypatch, "ft.train.loop", "train", interrupted)
    assert ft("run", "x.py").status == 130


def test_a_run_that_was_asked_to_stop_is_status_130(
    ft: Callable[..., SimpleNamespace], monkeypatch: pytest.MonkeyPatch
):
    fake(monkeypatch, "ft.train.loop", "train", lambda recipe, *, resume: SimpleNamespace(ended="stopped"))
    assert ft("run", "x.py").status == 130


def test_an_unknown_command_is_status_2(ft: Callable[..., SimpleNamespace]):
    assert ft("frobnicate").status == 2


def test_python_dash_m_finds_modules_beside_the_recipe(here: Path):
    (here / "mine.py").write_text("SEED = 5\n")
    (here / "x.py").write_text("from mine import SEED\n" + TEXT.replace("steps=30", "seed=SEED"))
    words = [sys.executable, "-m", "ft", "show", "x.py", "--json"]
    assert json.loads(subprocess.run(words, capture_output=True, text=True).stdout)["seed"] == 5


# Ranks ----------------------------------------------------------------------------------------------------------------

LAUNCH = "import sys; from ft.commands.ranks import launch; sys.exit(launch(sys.argv[1:], 2))"


def launched(*words: str) -> SimpleNamespace:
    done = subprocess.run([sys.executable, "-c", LAUNCH, *words], capture_output=True, text=True, timeout=120)
    return SimpleNamespace(status=done.returncode, out=done.stdout, err=done.stderr)


def test_two_ranks_run_the_command(here: Path):
    (here / "x.py").write_text("import os\nprint('rank', os.environ['RANK'], 'of', os.environ['WORLD_SIZE'])\n" + TEXT)
    found = launched("schema", "x.py")
    ranks = sorted(line for line in found.out.splitlines() if line.startswith("rank"))
    assert found.status == 0 and ranks == ["rank 0 of 2", "rank 1 of 2"]


def test_the_status_of_the_ranks_comes_back_without_a_traceback(here: Path):
    found = launched("show", "y.py")
    assert found.status == 2 and "Traceback" not in found.err
    assert any(text in found.err for text in ("error: y.py: no such recipe", "error: rank 1: y.py: no such recipe"))


def test_a_killed_rank_is_named(here: Path):
    (here / "x.py").write_text(
        "import os, time\nos.kill(os.getpid(), 9) if os.environ['RANK'] == '1' else time.sleep(60)\n"
    )
    found = launched("show", "x.py")
    assert found.status == 137
    assert found.err == "error: rank 1 was killed by SIGKILL: the machine may have run out of memory\n"
