"""Which prompts come up: weights, success rates and times of asking again, all by hand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from attrs import define, evolve, field, frozen
from test_grpo import FakeSampler, grpo

from ft import Ahead, Curriculum, Overlong, Reroll, Sampling, dist
from ft.methods.curriculum import chosen, due, learnt, numbers, prompts_of, rated, scheduled, weight
from ft.rollout.ahead import AheadSampler
from ft.types import Context, Example, Rollout


def prompt(row: int | None) -> Example:
    return Example(tokens_L=np.array([7], np.int32), mask_L=np.zeros(1, bool), row=row)


def group(row: int | None, *rewards: float | None) -> list[Rollout]:
    tokens_L = np.array([8], np.int32)
    return [Rollout(prompt=prompt(row), tokens_L=tokens_L, logp_L=None, finish="stop", policy_step=0, reward=r)
            for r in rewards]  # fmt: skip


@frozen
class InOrder:
    """Rows 0, 1, 2, ... of an endless run of epochs."""

    rows: int

    def draw(self, step: int, n: int, seed: int) -> list[Example]:
        return [prompt((step * n + i) % self.rows) for i in range(n)]

    def row(self, index: int) -> list[Example]:
        return [prompt(index)]


def context(**options: Any) -> Context:
    given: dict[str, Any] = {"data": InOrder(100), "examples": 4, "seed": 0, **options}
    return Context(**given)


def rows(prompts: Sequence[Example]) -> list[int | None]:
    return [one.row for one in prompts]


# Curriculum -----------------------------------------------------------------------------------------------------------


def test_a_prompt_half_solved_weighs_most() -> None:
    assert [weight(p, 0.05) for p in (0.0, 0.5, 1.0)] == pytest.approx([0.05, 0.30, 0.05])
    assert weight(0.25, 0.0) == weight(0.75, 0.0) == pytest.approx(3 / 16)


def test_success_rates_by_hand() -> None:
    halves = Curriculum(above=0.5, pace=0.5)
    first = rated({}, {3: [1.0, 0.0, 0.0, 0.0], 5: [0.5, 0.6]}, halves)
    assert first == {"3": 0.25, "5": 0.5}, "0.5 itself is no success"
    assert rated(first, {3: [1.0, 1.0]}, halves) == {"3": 0.625, "5": 0.5}
    assert rated(first, {3: [1.0, 1.0]}, evolve(halves, pace=1.0))["3"] == 1.0
    assert first == {"3": 0.25, "5": 0.5}, "the past is not written to"


def test_the_first_of_one_is_drawn_in_proportion_to_its_weight() -> None:
    """Weights 0.05, 0.30 and 0.05 (one solved by none, half solved, by all): 1/8, 6/8, 1/8 of the draws."""
    candidates, rates, n = [prompt(row) for row in range(3)], {"0": 0.0, "1": 0.5, "2": 1.0}, 4000
    found = Counter(chosen(candidates, 1, rates, Curriculum(), (0, batch))[0].row for batch in range(n))
    for row, share in enumerate((1 / 8, 6 / 8, 1 / 8)):
        assert found[row] / n == pytest.approx(share, abs=5 * (share * (1 - share) / n) ** 0.5)
    unknown = Counter(chosen(candidates, 1, {}, Curriculum(), (0, batch))[0].row for batch in range(n))
    assert all(abs(unknown[row] / n - 1 / 3) < 0.04 for row in range(3))


def test_choices_are_distinct_in_order_and_the_same_for_the_same_key() -> None:
    candidates = [prompt(row) for row in (4, 1, 4, 2, 9)]
    picks = [rows(chosen(candidates, 3, {}, Curriculum(), (7, batch))) for batch in range(30)]
    assert picks == [rows(chosen(candidates, 3, {}, Curriculum(), (7, batch))) for batch in range(30)]
    assert all(len(set(pick)) == 3 for pick in picks), "a row that is a candidate twice is chosen once"
    assert all(pick == [row for row in (4, 1, 2, 9) if row in pick] for pick in picks)
    assert len({tuple(pick) for pick in picks}) == 4, "each of the four is left out at times"
    assert sorted(rows(chosen(candidates, 5, {}, Curriculum(), (7, 0)))) == [1, 2, 4, 4, 9]  # type: ignore[type-var]


def test_candidates_of_a_batch_are_the_data_s_own() -> None:
    some = Curriculum(among=3)
    found = prompts_of(2, 0, context(), {}, some, None)
    assert len(found) == 4 and set(rows(found)) <= set(range(24, 36)), "batches of 12 candidates"
    assert [one.group for one in found] == [0, 1, 2, 3]
    assert [one.group for one in prompts_of(2, 1, context(), {}, some, None)] == [4, 5, 6, 7]


# Asked again ----------------------------------------------------------------------------------------------------------


def test_a_failed_prompt_comes_up_again_after_so_many_batches() -> None:
    later, ctx = Reroll(after=3), context()
    answered = [group(0, 0.0, 0.0), group(1, 0.0, 1.0), group(2, None, None), group(3, -1.0, 0.0)]
    past = learnt({}, answered, 5, ctx, None, later)
    assert past == {"again": [[8, 0, 1], [9, 3, 1]]}, "one of four a batch: the second waits for the next"
    assert [due(past, batch) for batch in (7, 8, 9)] == [[], [0], [3]]
    assert rows(prompts_of(7, 0, ctx, past, None, later)) == [28, 29, 30, 31]
    asked = prompts_of(8, 0, ctx, past, None, later)
    assert rows(asked) == [0, 32, 33, 34] and [one.group for one in asked] == [0, 1, 2, 3]
    assert rows(prompts_of(8, 1, ctx, past, None, later)) == [32, 33, 34, 35], "only the first draw asks it again"
    assert numbers(past, answered, 8, None, later) == {"prompts_again": 1}


def test_a_prompt_that_goes_on_failing_is_let_go() -> None:
    later = Reroll(after=1, times=2)
    first = scheduled([], {9: [0.0]}, 0, later, 4)
    second = scheduled(first, {9: [0.0]}, 1, later, 4)
    third = scheduled(second, {9: [0.0]}, 2, later, 4)
    assert (first, second) == ([[1, 9, 1]], [[1, 9, 1], [2, 9, 2]])
    assert third == [[2, 9, 2]], "what was due stays until the next batch; nothing is added"
    assert scheduled(third, {}, 3, later, 4) == []
    assert scheduled(first, {9: [1.0]}, 1, later, 4) == [[1, 9, 1]], "solved"


def test_a_prompt_waits_once_and_not_if_it_was_solved_meanwhile() -> None:
    later = Reroll(after=4)
    waiting = scheduled([], {9: [0.0]}, 0, later, 4)
    assert scheduled(waiting, {9: [0.0]}, 2, later, 4) == waiting == [[4, 9, 1]]
    assert scheduled(waiting, {9: [0.0, 1.0]}, 2, later, 4) == []


def test_batches_that_are_drawn_already_get_no_more() -> None:
    assert scheduled([], {9: [0.0]}, 3, Reroll(after=1), 4, ahead=2) == [[6, 9, 1]]


def test_a_batch_that_is_drawn_once_more_asks_the_same() -> None:
    later = Reroll(after=2)
    past = {"again": [[5, 7, 1]]}
    again = learnt(past, [group(7, 0.0)], 5, context(), None, later)
    assert due(again, 5) == [7] and learnt(again, [group(7, 0.0)], 5, context(), None, later) == again


def test_prompts_that_are_no_rows_tell_nothing() -> None:
    past = learnt({}, [group(None, 0.0, 0.0)], 0, context(), Curriculum(), Reroll())
    assert past == {"rates": {}, "again": []}


def test_what_is_told_of_rates_is_what_was_known_before() -> None:
    answered = [group(1, 1.0), group(2, 0.0), group(3, 0.0)]
    assert numbers({"rates": {"1": 0.25, "2": 0.75}}, answered, 0, Curriculum(), None) == {"solved_before": 0.5}


# In the method --------------------------------------------------------------------------------------------------------


@define
class Asked(FakeSampler):
    """Keeps the rows that it was asked, by batch."""

    rows: dict[int, list[Any]] = field(factory=dict)

    def ask(self, prompts: Sequence[Example], n: int, step: int) -> Any:
        self.rows[step] = rows(prompts)
        return super().ask(prompts, n, step)


@frozen
class Failing:
    """No answer to rows 0 and 1 is worth anything; all others differ."""

    def score(self, found: Sequence[Rollout]) -> list[Rollout]:
        bad = [r.prompt.row in (0, 1) for r in found]
        return [evolve(r, reward=0.0 if b else float(len(r.tokens_L))) for r, b in zip(found, bad, strict=True)]


def test_prompts_drawn_ahead_are_asked_again_when_there_is_room() -> None:
    """Batches 1 and 2 are drawn when batch 0 is scored: what failed in it comes up in 3 and 4, then in 6 and 7."""
    sampler = Asked()
    with dist.launched() as world:
        ctx = context(sampler=AheadSampler(sampler=sampler, world=world), judge=Failing())
        method = Ahead(grpo(group=2, reroll=Reroll(after=1, times=2)), by=2)
        for batch in range(9):
            method.examples(batch, ctx)
        ctx.sampler.sync(9)  # type: ignore[union-attr]  # waits for what is still being drawn
    plain = {batch: [4 * batch + i for i in range(4)] for batch in range(11)}
    again = {3: 0, 4: 1, 6: 0, 7: 1}
    assert sampler.rows == {b: [again[b], *own[:3]] if b in again else own for b, own in plain.items()}
    assert ctx.kept["grpo"]["again"] == []


def test_punishment_for_length_is_no_failure() -> None:
    """Answers of 1 and 2 tokens, both right; the second loses more than its reward, and both succeed."""
    ctx = context(sampler=FakeSampler(), judge=Right())
    method = grpo(group=2, sampling=Sampling(max_tokens=2), overlong=Overlong(buffer=1, penalty=3.0),
                  curriculum=Curriculum(among=2), reroll=Reroll())  # fmt: skip
    told = method.examples(0, ctx)
    assert told[1].adv_L is not None and told[1].adv_L[-1] < 0
    assert ctx.kept["grpo"] == {"rates": {"7": 1.0}, "again": []}


@frozen
class Right:
    """Every answer is right, and to row 7."""

    def score(self, found: Sequence[Rollout]) -> list[Rollout]:
        return [evolve(r, reward=1.0, prompt=evolve(r.prompt, row=7)) for r in found]


def test_ranges() -> None:
    for wrong in (
        lambda: Curriculum(among=1), lambda: Curriculum(floor=0.0), lambda: Curriculum(pace=0.0),
        lambda: Reroll(after=0), lambda: Reroll(times=0), lambda: Reroll(share=0.0),
    ):  # fmt: skip
        with pytest.raises(ValueError):
            wrong()
