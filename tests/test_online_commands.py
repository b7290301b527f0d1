"""The commands around an online run, for a person: a run with its functions in the recipe, reward, eval, rollouts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

from ft import cli
from ft.commands.evaluate import lines, summary, with_weights
from ft.commands.rollouts import choose
from ft.errors import MissingFileError, RecipeError
from ft.recipe import load
from ft.types import Example, Rollout

RECIPE = """
from pathlib import Path
from ft import GRPO, AdamW, Batching, Data, Eval, Judging, LoRA, Model, Recipe, RewardFunction, Sampling, Save

def even(completions, **columns):
    return [sum(ids) % 2 for ids in columns["completion_ids"]]

def words(completions, prompts, answer):
    assert "bad" not in completions, "no such answer"
    assert all(asked[-1]["role"] == "user" for asked in prompts)
    return [None if text == "" else float(right in text) for text, right in zip(completions, answer)]

def hook(step, rollouts):
    with Path("hooked").open("a") as file:
        file.write(f"{step}:{len(rollouts)} ")

recipe = Recipe(
    model=Model(id="nowhere/llama", family="llama", tiny=True, dtype="float32"),
    adapter=LoRA(r=2, targets=("attention",)),
    data=Data(train="rows.jsonl", eval="rows.jsonl", cache=None),
    method=GRPO(rewards=(even, RewardFunction(function=words, weight=2.0)), group=4, sampling=Sampling(max_tokens=6)),
    judging=Judging(workers=1, hook=hook),
    optim=AdamW(lr=1e-2),
    batch=Batching(examples=2, tokens=512),
    save=Save(every=2),
    steps=4,
)
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of four steps, another that was made of the first two and then resumed."""
    folder = tmp_path_factory.mktemp("online")
    (folder / "x.py").write_text(RECIPE)
    rows = [{"prompt": f"{i} + 1?", "answer": str(i + 1)} for i in range(5)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def ft(here: Path, *words: str) -> SimpleNamespace:
    """``ft words...`` in this process, which has imported torch."""
    out, err, before = StringIO(), StringIO(), (sys.argv, sys.path, os.getcwd())
    sys.argv, sys.path = ["ft", *words], [*sys.path]
    os.chdir(here)
    try:
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
            cli.main()
    finally:
        sys.argv, sys.path = before[:2]
        os.chdir(before[2])
    return SimpleNamespace(status=ended.value.code or 0, out=out.getvalue(), err=err.getvalue())


def elsewhere(here: Path, *words: str) -> SimpleNamespace:
    """``ft words...`` in a process of its own, which has read no recipe yet."""
    command, environment = [sys.executable, "-m", "ft", *words], {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, timeout=120)
    return SimpleNamespace(status=done.returncode, out=done.stdout, err=done.stderr)


def numbers(folder: Path) -> list[dict]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if "loss" in line]


@pytest.fixture(scope="module")
def ran(here: Path) -> SimpleNamespace:
    straight = ft(here, "run", "x.py", "save.dir=straight")
    assert straight.status == 0, straight.err[-3000:]
    return straight


# The run --------------------------------------------------------------------------------------------------------------


def test_a_run_keeps_answers_shows_two_calls_the_hook_and_tells_where_time_goes(here, ran):
    kept = [json.loads(line) for line in (here / "straight" / "rollouts.jsonl").read_text().splitlines()]
    assert [line["step"] for line in kept] == [1] * 8 + [2] * 8 + [3] * 8 + [4] * 8
    assert {"even", "words"} >= set(kept[0]["parts"]) and kept[0]["source"].startswith("rows.jsonl:")
    assert (here / "hooked").read_text().startswith("1:8 2:8 3:8 4:8 ")
    assert sum('?" -> "' in line for line in ran.err.splitlines()) == 2 * 4
    for line in numbers(here / "straight"):
        assert line["generate_s"] > 0 and line["score_s"] > 0 and line["train_s"] > 0
        assert line["generate_s"] + line["score_s"] + line["train_s"] <= line["step_s"] * 1.001


def test_it_resumes_from_recipe_json_with_the_functions_of_the_recipe_file(here, ran):
    assert ft(here, "run", "x.py", "save.dir=two", "steps=2").status == 0
    stored = json.loads((here / "two" / "recipe.json").read_text())
    assert stored["method"]["rewards"][1]["function"] == "x.py:words" and stored["judging"]["hook"] == "x.py:hook"
    resumed = elsewhere(here, "run", "two/recipe.json", "--resume", "steps=4", "schedule.warmup=0.03")
    assert resumed.status == 0, resumed.err[-3000:]
    kept = [json.loads(line)["step"] for line in (here / "two" / "rollouts.jsonl").read_text().splitlines()]
    assert kept == [1] * 8 + [2] * 8 + [3] * 8 + [4] * 8
    left, right = (load_file(here / name / "final" / "adapter_model.safetensors") for name in ("straight", "two"))
    assert left.keys() == right.keys()


# ft rollouts ----------------------------------------------------------------------------------------------------------


def test_rollouts_shows_the_last_step_or_the_best(here, ran):
    last = ft(here, "rollouts", "straight", "-n", "3")
    assert last.status == 0 and last.out.count("step 4  rows.jsonl:") == 3
    best = ft(here, "rollouts", "straight", "--best", "-n", "1")
    assert best.out.startswith("step ") and "+ 1?\n---\n" in best.out
    assert "no answers of step 9 are kept" in ft(here, "rollouts", "straight", "--step", "9").err
    assert ft(here, "rollouts", "nowhere").status == 2


def test_answers_are_chosen_by_reward_and_step():
    kept = [{"step": s, "reward": r} for s, r in ((1, 0.5), (1, None), (2, 0.0), (2, 1.0))]

    def rewards(**options):
        return [
            line["reward"]
            for line in choose(kept, **{"step": None, "best": False, "worst": False, "most": 9} | options)
        ]

    assert rewards() == [0.0, 1.0] and rewards(step=1) == [0.5, None]
    assert rewards(best=True) == [1.0, 0.5, 0.0] and rewards(worst=True, most=1) == [0.0]
    assert rewards(best=True, step=1) == [0.5]
    with pytest.raises(RecipeError, match="exclude each other"):
        rewards(best=True, worst=True)


# ft reward ------------------------------------------------------------------------------------------------------------


def answers(here: Path, *texts: str) -> str:
    rows = [{"prompt": "4 + 1?", "completion": text, "answer": "5"} for text in texts]
    (here / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "answers.jsonl"


def test_reward_prints_a_table_of_scores(here):
    found = ft(here, "reward", "x.py", "--on", answers(here, "it is 5", "6", ""))
    rows = [line.split() for line in found.out.splitlines() if line.startswith(("answers", "mean"))]
    assert found.status == 0, found.err
    assert [row[3] for row in rows] == ["1", "0", "none", "0.5"]
    assert [float(row[1]) for row in rows[:2]] == [float(row[2]) + 2 * float(row[3]) for row in rows[:2]]


def test_reward_ends_with_status_2_where_a_function_fails(here):
    found = ft(here, "reward", "x.py", "--on", answers(here, "5", "bad"))
    assert found.status == 2
    assert "error: words failed on an answer to answers.jsonl:2: AssertionError: no such answer (x.py:" in found.out


def test_reward_says_which_row_has_no_answer(here):
    (here / "none.jsonl").write_text('{"prompt": "a"}\n')
    found = ft(here, "reward", "x.py", "--on", "none.jsonl")
    assert found.status == 2 and "none.jsonl:1 completion: the row has no answer" in found.err


# ft eval --------------------------------------------------------------------------------------------------------------


def test_eval_of_base_and_of_a_runs_final_weights(here, ran):
    base = ft(here, "eval", "x.py", "--json")
    assert base.status == 0, base.err[-2000:]
    found = json.loads(base.out)
    assert found["prompts"] == 5 and found["answers"] == "likeliest" and 0 <= found["reward"]["mean"] <= 3
    drawn = ft(here, "eval", "straight/recipe.json", "rows.jsonl", "--adapter", "straight", "--sampled", "2")
    assert drawn.status == 0 and drawn.out.startswith("weights   straight\nanswers   2 drawn\nprompts   5\nreward")


def test_weights_are_an_adapter_a_model_or_nothing(here, ran, monkeypatch):
    monkeypatch.chdir(here)
    recipe = load("x.py")
    tuned = with_weights(recipe, Path("straight")).adapter
    assert with_weights(recipe, None).adapter is None
    assert tuned is not None and (tuned.init, tuned.r) == (Path("straight/final"), 2)
    Path("whole").mkdir()
    Path("whole/config.json").write_text("{}")
    whole = with_weights(recipe, Path("whole"))
    assert whole.adapter is None and whole.model.id == "whole"
    with pytest.raises(MissingFileError, match="there are no weights here"):
        with_weights(recipe, Path("nowhere"))


def scored(*rewards: float | None) -> list[Rollout]:
    import numpy as np

    prompt = Example(tokens_L=np.zeros(1, np.int32), mask_L=np.zeros(1, bool))
    return [
        Rollout(
            prompt=prompt, tokens_L=np.zeros(4, np.int32), logp_L=None, finish="stop", policy_step=0, reward=r,
            parts={} if r is None else {"exact": r},
        )
        for r in rewards
    ]  # fmt: skip


def test_means_are_over_prompts_with_their_standard_error():
    found = summary([scored(1.0, 0.0), scored(1.0, None), scored(None, None), scored(0.0, 0.0)])
    # prompts' means 0.5, 1, 0: mean 0.5, s = 0.5, error 0.5 / sqrt(3)
    assert found["reward"] == {"mean": 0.5, "error": pytest.approx(0.5 / 3**0.5)} == found["exact"]
    assert found["prompts"] == 4 and found["unscored"] == pytest.approx(3 / 8) and found["length"] == 4
    assert summary([scored(1.0)])["reward"] == {"mean": 1.0, "error": None}
    assert lines({"weights": "w"}, {"prompts": 3, "reward": {"mean": 0.5, "error": 0.25}}) == (
        "weights  w\nprompts  3\nreward   0.5000 +- 0.2500"
    )
    shares = {"unscored": 0.0, "length": 11.08, "cut_off": 1 / 3}
    assert lines({}, shares) == "unscored  0.0%\nlength    11.08\ncut_off   33.3%"
