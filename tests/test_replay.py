"""Groups trained once more: which are held and taken, by hand; what they are corrected against; kept in checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attrs import evolve
from test_grpo import FakeData, FakeJudge, FakeSampler, context, grpo, world  # noqa: F401
from test_methods import model, one_step

from ft import Correction, Data, Model, Recipe, Replay, RewardFunction, Sampling, dist
from ft.dist import World
from ft.io import checkpoint
from ft.methods import credit
from ft.methods.replay import Mixed, holding, mixed, numbers, plain, rollouts_of
from ft.recipe import dump, restore
from ft.rollout.embedded import EmbeddedSampler
from ft.rollout.rewards import matches
from ft.train import kept
from ft.train.scoring import score
from ft.types import Example, Rollout


def group(name: int, *rewards: float | None, step: int = 0) -> list[Rollout]:
    asked = Example(tokens_L=np.array([name, 9], np.int32), mask_L=np.zeros(2, bool), source=f"p:{name}", row=name)
    return [
        Rollout(prompt=asked, tokens_L=np.full(k + 1, name, np.int32), logp_L=np.full(k + 1, -1 / 3, np.float32),
                finish="stop", policy_step=step, reward=reward, parts={} if reward is None else {"r": reward})
        for k, reward in enumerate(rewards)
    ]  # fmt: skip


def names(groups: Any) -> list[int]:
    return [int(one[0].prompt.tokens_L[0]) for one in groups]


def held(found: Any) -> list[tuple[int, int, int]]:
    return [(one["batch"], one["used"], one["group"]["row"]) for one in found]


# By hand --------------------------------------------------------------------------------------------------------------


def test_the_newest_held_groups_take_the_places_of_those_scored_alike() -> None:
    replay = Replay(batches=3)
    past = holding([], [group(1, 0.0, 1.0), group(2, 1.0, 0.0)], 0, replay)
    past = holding(past, [group(3, 0.0, 1.0)], 1, replay)
    fresh = [group(4, 1.0, 1.0), group(5, 0.0, 1.0), group(6, 0.0, None), group(7, 0.0, 0.0)]
    found = mixed(fresh, past, 2, 4, replay)
    assert names(found.groups) == [5, 3, 1, 2] and found.taken == 3
    assert held(found.left) == [(0, 1, 1), (0, 1, 2), (1, 1, 3)]
    assert held(holding(found.left, fresh[1:2], 2, replay)) == [(2, 0, 5)], "each was trained once more"
    half = mixed(fresh, past, 2, 4, evolve(replay, fill=0.5))
    assert names(half.groups) == [4, 5, 6, 3], "two of four have spread then"
    none = mixed(fresh, past, 2, 4, evolve(replay, fill=0.25))
    assert names(none.groups) == [4, 5, 6, 7] and none.taken == 0


def test_groups_are_no_older_than_allowed_and_used_so_many_times() -> None:
    replay = Replay(batches=2, times=2)
    past = holding([], [group(1, 0.0, 1.0)], 0, replay)
    flat = [group(5, 0.0, 0.0)]
    ages = [mixed(flat, past, batch, 1, replay).taken for batch in range(5)]
    assert ages == [0, 1, 1, 0, 0], "not of its own batch, and two batches long"
    once = mixed(flat, past, 1, 1, replay)
    assert held(holding(once.left, [], 1, replay)) == [(0, 1, 1)]
    twice = mixed(flat, once.left, 2, 1, replay)
    assert twice.taken == 1 and holding(twice.left, [], 2, replay) == []
    assert holding(past, [], 2, replay) == [], "no later batch may take it"


def test_places_of_groups_that_were_left_out_are_filled_first() -> None:
    """Of four places two are empty; one scored alike stays where nothing more is held."""
    past = holding([], [group(1, 0.0, 1.0), group(2, 0.0, 1.0)], 0, Replay())
    found = mixed([group(5, 0.0, 1.0), group(6, 1.0, 1.0)], past, 1, 4, Replay())
    assert names(found.groups) == [5, 6, 1, 2]


def test_numbers_by_hand() -> None:
    groups = [group(5, 0.0, 1.0, step=9), group(1, 0.0, 1.0, step=4), group(2, 0.0, 1.0, step=7)]
    told = numbers(Mixed(groups=groups, taken=2, left=[]), [{}] * 3, 9)
    assert told == {"groups_replayed": 2, "groups_held": 3, "replay_age": 3.5}
    assert "replay_age" not in numbers(Mixed(groups=groups, taken=0, left=[]), [], 9)


def test_a_group_is_kept_as_it_was() -> None:
    """Also through a checkpoint's file: the same examples, bit by bit."""
    before = group(3, 1.0, 0.0, None, step=2)
    before[1] = evolve(before[1], mask_L=np.array([True, False]), finish="length")
    before[2] = evolve(before[2], logp_L=None)
    after = rollouts_of(plain(before))
    for a, b in zip(credit.to_examples([before]), credit.to_examples([after]), strict=True):
        for name in ("tokens_L", "mask_L", "sampled_logp_L", "adv_L"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
        assert a.source == b.source == "p:3"
    assert [(r.finish, r.policy_step, r.parts) for r in after] == [
        ("stop", 2, {"r": 1.0}), ("length", 2, {"r": 0.0}), ("stop", 2, {})
    ]  # fmt: skip


def test_what_a_method_keeps_survives_a_checkpoint(tmp_path: Path) -> None:
    value = {
        "grpo": {"rates": {"3": 1 / 3}, "again": [[5, 1, 1]], "held": holding([], [group(1, 0.1, 1 / 3)], 0, Replay())}
    }
    checkpoint.save(tmp_path, 1, kept.entries(value), {"progress": {}, **kept.document(value)})
    found = kept.restored(checkpoint.load(tmp_path / "step-000001"))
    assert found["grpo"]["rates"] == {"3": 1 / 3} and found["grpo"]["again"] == [[5, 1, 1]]
    (mine,), (theirs,) = value["grpo"]["held"], found["grpo"]["held"]
    for name in ("prompt", "tokens", "logp", "mask"):
        np.testing.assert_array_equal(theirs["group"][name], mine["group"][name])
        assert theirs["group"][name].dtype == mine["group"][name].dtype
    assert theirs["group"]["answers"] == mine["group"]["answers"]
    checkpoint.save(tmp_path, 2, kept.entries({}), kept.document({}))
    assert kept.restored(checkpoint.load(tmp_path / "step-000002")) == {}
    assert not (tmp_path / "step-000002" / "kept.safetensors").exists()


# In the method --------------------------------------------------------------------------------------------------------


def test_a_batch_without_spread_is_filled_with_what_was_held() -> None:
    told: list[Any] = []
    ctx = context(judge=FakeJudge(), note=told.append)
    method = grpo(group=2, replay=Replay(batches=1), correction=Correction())
    first = method.examples(0, ctx)
    flat = evolve(ctx, judge=FakeJudge({0, 1, 2, 3}))
    again = method.examples(1, flat)
    assert [e.adv_L.tolist() for e in again] == [e.adv_L.tolist() for e in first]  # type: ignore[union-attr]
    assert [e.tokens_L.tolist() for e in again] == [e.tokens_L.tolist() for e in first]
    assert all(not e.adv_L.any() for e in method.examples(2, flat)), "used up"  # type: ignore[union-attr]
    lines = [line for line in told if "groups_held" in line]
    assert [(line["groups_replayed"], line["groups_held"]) for line in lines] == [(0, 4), (4, 0), (0, 0)]
    assert lines[1]["replay_age"] == 1


def test_spare_groups_of_a_resampled_batch_are_held() -> None:
    """Two draws of four, three of each with spread: four are trained, two are left over."""
    ctx = context(judge=FakeJudge({0}))
    method = grpo(group=2, resample=1, replay=Replay(), correction=Correction())
    assert len(method.examples(0, ctx)) == 8
    assert len(ctx.kept["grpo"]["held"]) == 6


def test_without_these_options_nothing_is_kept() -> None:
    ctx = context()
    grpo(group=2).examples(0, ctx)
    assert ctx.kept == {}


@pytest.fixture(scope="module")
def alone() -> Any:
    with dist.launched() as made:
        yield made


def test_held_answers_are_corrected_against_the_policy_that_drew_them(alone: World) -> None:
    """Weight exp(now - then), with the trainer's log-probs of now, once they are scored and once they are not."""
    built = model(alone)
    sampling = Sampling(max_tokens=6)
    sampler = EmbeddedSampler(policy=built.policy, world=alone, sampling=sampling, stop=frozenset({3}), rows=8, seed=0)
    asked = [evolve(p, group=i) for i, p in enumerate(FakeData().draw(0, 2, 0))]
    drawn = [
        [evolve(r, reward=float(i % 2), parts={}) for i, r in enumerate(rs)] for rs in sampler.rollout(asked, 4, 0)
    ]
    replay, n = Replay(), len(drawn)
    past = holding([], drawn, 0, replay)
    for name, p in built.policy.scorer.model.named_parameters():
        if "lora_B" in name:
            p.data.add_(0.05)  # a step
    flat = [[evolve(r, reward=0.0) for r in rs] for rs in drawn]
    again = credit.to_examples(mixed(flat, past, 1, n, replay).groups, tokens=512)
    now = score(again, built.policy, alone, tokens=512, temperature=1.0)
    method = grpo(sampling=sampling, correction=Correction(cap=100.0), replay=replay)
    trained = [e.mask_L for e in again]
    weights = [np.exp(s.logp_L - e.sampled_logp_L)[m] for s, e, m in zip(now, again, trained, strict=True)]
    expected = float(np.concatenate(weights).mean())
    assert abs(expected - 1) > 1e-3, "the policy has moved"
    out, _, _ = one_step(method, built, alone, examples=again)
    assert float(out.sums["is_weight"]) == pytest.approx(expected, rel=1e-4)
    assert float(out.maxes["ratio_max"]) == 1.0, "ratios are to the policy as it is"
    fixed = [evolve(e, old_logp_L=s.logp_L) for e, s in zip(again, now, strict=True)]
    later, _, _ = one_step(method, built, alone, examples=fixed)
    assert float(later.sums["is_weight"]) == pytest.approx(expected, rel=1e-4)


def test_replay_without_a_correction_is_refused() -> None:
    with pytest.raises(ValueError, match="'replay' needs a correction, or old='sampler'"):
        grpo(replay=Replay())
    assert grpo(replay=Replay(), old="sampler") and grpo(replay=Replay(), correction=Correction())
    for wrong in (lambda: Replay(batches=0), lambda: Replay(fill=0.0), lambda: Replay(times=0)):
        with pytest.raises(ValueError):
            wrong()


def test_the_options_survive_json() -> None:
    from ft import Curriculum, Reroll

    method: Any = grpo(
        rewards=RewardFunction(function=matches, options={"pattern": "x"}), correction=Correction(),
        replay=Replay(fill=0.5), reroll=Reroll(after=2), curriculum=Curriculum(among=3),
    )  # fmt: skip
    recipe = Recipe(model=Model(id="-", family="llama", dtype="float32", tiny=True), data=Data(train="x.jsonl"),
                    method=method)  # fmt: skip
    assert restore(dump(recipe)) == recipe
