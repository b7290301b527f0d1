"""Functions that stand in the recipe file itself: stored by the file's path, found again by other processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ft.errors import RecipeError
from ft.recipe import dumps, load
from ft.rollout.process import Worker

RECIPE = """
from ft import GRPO, Data, Model, Recipe

def long(completions, **columns):
    return [float(len(text)) for text in completions]

recipe = Recipe(model=Model(id="a/b"), data=Data(train="a.jsonl"), method=GRPO(rewards=long, group=2), steps=3)
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "x.py").write_text(RECIPE)
    return tmp_path


def stored(path: str) -> str:
    return json.loads(dumps(load(path)))["method"]["rewards"][0]["function"]


def test_it_is_named_by_the_path_from_here(here):
    assert stored("sub/x.py") == stored(str(here / "sub" / "x.py")) == "sub/x.py:long"


def test_elsewhere_by_its_whole_path(here, monkeypatch):
    (here / "other").mkdir()
    monkeypatch.chdir(here / "other")
    assert stored("../sub/x.py") == f"{here.resolve()}/sub/x.py:long"


def test_a_recipe_read_twice_is_equal_and_comes_back_from_json(here):
    first = load("sub/x.py")
    Path("recipe.json").write_text(dumps(first))
    assert load("sub/x.py") == first
    assert load("recipe.json").method == first.method


def test_two_recipes_of_one_name_keep_their_own_functions(here):
    (here / "x.py").write_text(RECIPE.replace("float(len(text))", "0.0"))
    load("sub/x.py")
    load("x.py")
    Path("recipe.json").write_text(dumps(load("sub/x.py")))
    function = load("recipe.json").method.rewards[0].function  # type: ignore[attr-defined]
    assert function(["four"]) == [4.0] and stored("x.py") == "x.py:long"


def test_a_changed_file_is_read_anew(here):
    load("sub/x.py")
    (here / "sub" / "x.py").write_text(RECIPE.replace("float(len(text))", "7.0"))
    function = load("sub/x.py").method.rewards[0].function  # type: ignore[attr-defined]
    assert function(["four"]) == [7.0]


def test_a_worker_finds_it(here):
    worker = Worker(timeout=20.0)
    reply = worker.call("sub/x.py:long", {"completions": ["four", "a"]})
    worker.end()
    assert (reply.scores, reply.why) == ([4.0, 1.0], "")


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("gone.py:long", "cannot find gone.py:long: there is no such file"),
        ("sub/x.py:wrong", "sub/x.py defines no function 'wrong'"),
        ("sub/x.py:GRPO", "sub/x.py defines no function 'GRPO'"),
        ("sub/x.py:os.system", "expected a name as"),
    ],
)
def test_what_is_not_there_is_said(here, name, problem):
    text = dumps(load("sub/x.py")).replace("sub/x.py:long", name)
    Path("recipe.json").write_text(text)
    with pytest.raises(RecipeError) as error:
        load("recipe.json")
    assert error.value.where == "recipe.json: method.rewards.0.function" and problem in error.value.problem


@pytest.mark.parametrize("value", ["lambda completions, **columns: []", "make()"])
def test_what_no_process_could_find_is_refused(here, value):
    text = RECIPE.replace("recipe =", "def make():\n    def inner(completions): ...\n    return inner\nrecipe =")
    (here / "y.py").write_text(text.replace("rewards=long", f"rewards={value}"))
    with pytest.raises(RecipeError, match="is defined where no other process can import it"):
        load("y.py")
