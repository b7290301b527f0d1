"""KTO and BCO on a tiny model: by hand, however a step is split; what is mismatched; what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attrs import evolve
from safetensors.torch import load_file, save_file
from test_methods import PAIRS, Rows, model, one_step, oracle, world
from torch import Tensor

from ft import BCO, KTO, Data, Model, Recipe, dist
from ft.dist import World, whole
from ft.errors import DataError, RecipeError
from ft.methods import rated
from ft.recipe import dump, restore
from ft.train import optim
from ft.train.evaluate import evaluate
from ft.types import Context, Example, Method

__all__ = ["world"]  # the fixture
RATED = [evolve(e, unit=None, label=float(i % 2 == 0), source=f"rows:{i}") for i, e in enumerate(PAIRS)]
METHODS: dict[str, Any] = {
    "kto": KTO(beta=0.5, desirable=1.5, undesirable=0.5),
    "apo": KTO(kind="apo_zero_unpaired", beta=0.5),
    "bco": BCO(beta=0.5),
}


def context(examples: list[Example]) -> Context:
    return Context(data=Rows(examples), examples=len(examples), seed=0)


def made(method: Method, examples: list[Example] = RATED) -> list[Example]:
    return list(method.examples(0, context(examples)))


# By hand --------------------------------------------------------------------------------------------------------------


def ratios(built: Any, examples: list[Example]) -> Tensor:
    """log policy - log base of each example's trained tokens, one at a time, by transformers."""
    _, policy, base = oracle(built, examples)
    return torch.stack([p - b for p, b in zip(policy, base, strict=True)]).detach()


def test_kto_is_the_formula_with_the_step_s_own_point_of_reference(world: World) -> None:
    built = model(world)
    x_S = ratios(built, RATED)
    against = [e.against for e in made(METHODS["kto"])]
    assert all(against)
    z = ratios(built, [e for e in against if e is not None]).mean().clamp(min=0)
    good_S = torch.arange(len(RATED)) % 2 == 0
    loss_S = torch.where(good_S, 1.5 * (1 - torch.sigmoid(0.5 * (x_S - z))), 0.5 * (1 - torch.sigmoid(0.5 * (z - x_S))))
    out, _, _ = one_step(METHODS["kto"], built, world, examples=made(METHODS["kto"]))
    torch.testing.assert_close(out.loss.float(), loss_S.mean(), rtol=1e-5, atol=1e-6)
    assert float(out.sums["kl"]) == pytest.approx(float(z), abs=1e-5)
    assert float(out.sums["rewards/chosen"]) == pytest.approx(0.5 * float(x_S[good_S].mean()), abs=1e-5)
    assert float(out.sums["rewards/rejected"]) == pytest.approx(0.5 * float(x_S[~good_S].mean()), abs=1e-5)


def test_a_positive_point_of_reference_counts(world: World) -> None:
    built = model(world)
    shifted = [evolve(e, against=evolve(e.against, label=None)) for e in made(METHODS["kto"])]  # type: ignore[arg-type]
    other = [evolve(e, against=RATED[0] if ratios(built, RATED[:1]) > 0 else RATED[1]) for e in shifted]
    z = float(ratios(built, [e.against for e in other]).mean())  # type: ignore[misc]
    out, _, _ = one_step(METHODS["kto"], built, world, examples=other)
    assert float(out.sums["kl"]) == pytest.approx(max(0.0, z), abs=1e-5)


def test_bco_is_the_formula_with_the_step_s_mean_reward(world: World) -> None:
    built = model(world)
    reward_S = 0.5 * ratios(built, RATED)
    gap_S = reward_S - reward_S.mean()
    sign_S = torch.tensor([1.0, -1.0]).repeat(len(RATED) // 2)
    out, _, _ = one_step(METHODS["bco"], built, world, examples=made(METHODS["bco"]))
    torch.testing.assert_close(out.loss.float(), -torch.nn.functional.logsigmoid(sign_S * gap_S).mean())
    assert float(out.sums["rewards/mean"]) == pytest.approx(float(reward_S.mean()), abs=1e-5)
    assert "reward" not in out.sums, "a name that the log takes for sampled answers"
    assert (float(out.sums["lengths/chosen"]), float(out.sums["lengths/rejected"])) == pytest.approx((28 / 5, 28 / 5))


# Good and bad answers of unlike prompts -------------------------------------------------------------------------------


class Words:
    """A tokenizer that says a token's number."""

    def decode(self, tokens_L: np.ndarray, *, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return " ".join(map(str, tokens_L))


def by_first_token(prompts: list[str]) -> list[float]:
    """Some probability for each prompt, a function of its words alone."""
    return [int(prompt.split()[0]) / 128 for prompt in prompts]


def test_bad_answers_weigh_by_the_density_ratio_of_their_prompts(world: World) -> None:
    built, method = model(world), BCO(beta=0.5, density=by_first_token, low=0.6, high=1.5)
    p_S = torch.tensor([float(e.tokens_L[0]) / 128 for e in RATED])
    weight_S = (p_S / (1 - p_S)).clamp(0.6, 1.5)
    assert len(weight_S.unique()) == 3, "held below, held above, and between"
    weight_S[::2] = 1.0  # good answers
    reward_S = 0.5 * ratios(built, RATED)
    sign_S = torch.tensor([1.0, -1.0]).repeat(len(RATED) // 2)
    loss = -(weight_S * torch.nn.functional.logsigmoid(sign_S * (reward_S - reward_S.mean()))).mean()
    examples = list(method.examples(0, evolve(context(RATED), tokenizer=Words())))
    for tokens in (512, 40):
        out, _, batches = one_step(method, built, world, examples=examples, tokens=tokens)
        torch.testing.assert_close(out.loss.float(), loss, rtol=1e-5, atol=1e-6)
        assert (batches > 1) == (tokens == 40)
    alike, _, _ = one_step(METHODS["bco"], built, world, examples=made(METHODS["bco"]))
    assert abs(float(out.loss - alike.loss)) > 1e-3


def test_the_function_of_weights_is_kept_by_name() -> None:
    recipe = Recipe(model=Model(id="a/b"), data=Data(train="a.jsonl"), method=BCO(density=by_first_token, high=5.0))
    assert restore(dump(recipe)) == recipe
    assert dump(recipe)["method"]["density"].endswith(":by_first_token")


@pytest.mark.parametrize("given", [[0.5], [0.5] * 9 + [1.5], [0.5] * 9 + [float("nan")]], ids=["few", "large", "nan"])
def test_what_is_no_probability_for_each_prompt_is_refused(given: list[float]) -> None:
    method = BCO(density=lambda prompts: given)
    with pytest.raises(RecipeError, match=r"method\.density: .*one probability for each prompt(?s:.*)10 numbers"):
        method.examples(0, evolve(context(RATED), tokenizer=Words()))


@pytest.mark.parametrize("options", [{"low": 0.1}, {"high": 2.0}, {"density": by_first_token, "low": 3.0, "high": 2.0}])
def test_limits_of_weights_belong_to_weights(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"'(low|high)' must"):
        BCO(**options)


# However a step is split ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_loss_gradient_and_numbers_do_not_depend_on_the_micro_batches(world: World, name: str) -> None:
    built, method = model(world), METHODS[name]
    whole_step, grads, batches = one_step(method, built, world, examples=made(method))
    split_step, split_grads, more = one_step(method, built, world, examples=made(method), tokens=40)
    assert batches == 1 < more
    torch.testing.assert_close(split_step.loss, whole_step.loss, rtol=1e-5, atol=1e-6)
    assert any(grad.abs().max() > 1e-3 for grad in grads.values())
    for key, grad in grads.items():
        torch.testing.assert_close(split_grads[key], grad, rtol=1e-4, atol=1e-6)
    for key, value in whole_step.sums.items():
        torch.testing.assert_close(split_step.sums[key], value, rtol=1e-5, atol=1e-5)


def on_three_ranks(folder: Path) -> None:
    torch.set_num_threads(1)
    with dist.launched() as world:
        built = model(world)
        for name, method in METHODS.items():
            for tokens in (512, 40):
                out, grads, _ = one_step(method, built, world, tokens=tokens, examples=made(method))
                if world.first:
                    save_file({"loss": out.loss.float(), **grads}, folder / f"{name}-{tokens}")


def test_loss_and_gradient_do_not_depend_on_the_ranks(world: World, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3", __file__]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-4000:]
    built = model(world)
    for name, method in METHODS.items():
        out, grads, _ = one_step(method, built, world, examples=made(method))
        for tokens in (512, 40):
            found = load_file(tmp_path / f"{name}-{tokens}")
            for key, value in {"loss": out.loss.float(), **grads}.items():
                torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_training_tells_good_answers_from_bad_ones(world: World, name: str) -> None:
    built, method = model(world, moved=False), METHODS[name]
    optimizer = torch.optim.AdamW(optim.trained(built.policy.scorer.model).values(), lr=1e-2)
    outs = []
    for _ in range(12):
        outs.append(one_step(method, built, world, examples=made(method))[0])
        optimizer.step()
    assert float(outs[0].sums["rewards/margins"]) == 0.0
    assert float(outs[-1].sums["rewards/chosen"]) > float(outs[-1].sums["rewards/rejected"]) + 0.5
    assert float(outs[-1].loss) < 0.8 * float(outs[0].loss)
    assert all(p.grad is not None and whole(p.grad).isfinite().all() for p in built.policy.scorer.parameters()
               if p.requires_grad)  # fmt: skip


# What becomes of rows -------------------------------------------------------------------------------------------------


def row(prompt: list[int], answer: list[int], **fields: Any) -> Example:
    tokens = np.array(prompt + answer, np.int32)
    return Example(tokens_L=tokens, mask_L=np.arange(len(tokens)) >= len(prompt), **fields)


def test_each_prompt_gets_the_next_answer_that_belongs_to_another_prompt() -> None:
    rows = [row([1, 2], [7]), row([1, 2], [8, 8]), row([3], [9, 9, 9])]
    against = [e.against for e in rated.mismatch(rows)]
    assert [e and e.tokens_L.tolist() for e in against] == [[1, 2, 9, 9, 9], [1, 2, 9, 9, 9], [3, 7]]
    assert [e and e.mask_L.tolist() for e in against][2] == [False, True]
    assert [e.against for e in rated.mismatch(rows[:2])] == [None, None], "nothing to mismatch"


def test_a_step_of_one_prompt_has_a_reference_point_of_zero(world: World) -> None:
    rows = [evolve(e, label=1.0) for e in (row([1, 2], [7, 3]), row([1, 2], [8, 8]))]
    out, _, _ = one_step(METHODS["kto"], model(world), world, examples=made(METHODS["kto"], rows))
    assert float(out.sums["kl"]) == 0.0
    assert torch.isfinite(out.loss)


def test_a_pair_is_a_good_and_a_bad_answer() -> None:
    drawn = made(METHODS["bco"], PAIRS)
    assert [e.label for e in drawn] == [1.0, 0.0] * 5
    assert {e.unit for e in drawn} == {None}


def test_an_answer_that_nobody_rated_is_refused() -> None:
    rows = [evolve(e, label=None) for e in RATED]
    with pytest.raises(DataError, match=r"rows:0: this method learns from rated answers.*(?s:.*)choose another method"):
        made(METHODS["kto"], rows)


def test_held_out_rows_are_made_into_examples_by_the_method(world: World) -> None:
    built, method = model(world), METHODS["kto"]
    found = evaluate(built.policy, method, Rows(RATED), world, context([]), tokens=512)
    out, _, _ = one_step(method, built, world, examples=made(method))
    assert found["eval/loss"] == pytest.approx(float(out.loss), rel=1e-5)
    assert found["eval/kl"] == pytest.approx(float(out.sums["kl"]), abs=1e-5)
    with pytest.raises(DataError, match="rated answers"):
        evaluate(built.policy, method, Rows([evolve(e, label=None) for e in RATED]), world, context([]), tokens=512)


if __name__ == "__main__":
    on_three_ranks(Path(sys.argv[1]))
