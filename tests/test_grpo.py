"""GRPO: losses as TRL has them, advantages by hand, the same however a step is split; drawing, ahead and again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from attrs import define, evolve, field
from oracles_grpo import Case, case, token_weight_BW, trl, trl_gmpo, trl_rloo
from test_methods import ADAPTER, TINY, VOCAB, model, one_step

from ft import (
    CISPO,
    DPPO,
    GMPO,
    GRPO,
    LUSPO,
    RLOO,
    SAPO,
    VESPO,
    Ahead,
    Clipped,
    Correction,
    Data,
    Model,
    Overlong,
    Recipe,
    Reinforce,
    RewardFunction,
    Sampling,
    dist,
    losses,
)  # fmt: skip
from ft.dist import World
from ft.errors import FtError, RecipeError
from ft.methods import credit, rollouts
from ft.models.build import build, plan_config
from ft.recipe import Parallel, dump, restore
from ft.rollout.ahead import AheadSampler
from ft.rollout.embedded import EmbeddedSampler
from ft.rollout.shared import Answer
from ft.train import step
from ft.train.scoring import score
from ft.types import Batch, Context, Counts, Example, LogProbs, Rollout, Said


def length(completions: Sequence[str], completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
    return [float(len(ids)) for ids in completion_ids]


def shout(completions: Sequence[str], **columns: Any) -> list[float]:
    return [float(text.isupper()) for text in completions]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    torch.set_num_threads(1)
    with dist.launched() as made:
        yield made


def grpo(**options: Any) -> GRPO:
    given: dict[str, Any] = {"rewards": length, "sampling": Sampling(max_tokens=10), "correction": None, **options}
    return GRPO(**given)


# Against TRL ----------------------------------------------------------------------------------------------------------


def as_batch(c: Case, **streams: Any) -> Batch:
    """The case as a micro-batch; ``streams`` replaces fields."""
    logp_T, old_T, adv_T, mask_T = c.args
    T = len(logp_T)
    lengths = tuple(c.real_BW.sum(1).tolist())
    given: dict[str, Any] = {
        "input_T": torch.zeros(T, dtype=torch.int64), "target_T": torch.zeros(T, dtype=torch.int64),
        "pos_T": torch.zeros(T, dtype=torch.int64), "seq_T": c.seq_T, "mask_T": mask_T,
        "cu_S1": torch.tensor([0, *np.cumsum(lengths)]), "trained_N": mask_T.nonzero()[:, 0], "lengths": lengths,
        "unit_S": torch.arange(4), "group_S": torch.zeros(4), "old_logp_T": old_T, "adv_T": adv_T.contiguous(),
        "sampled_logp_T": c.pack(c.sampled_BW), "ref_logp_T": None, **streams,
    }  # fmt: skip
    return Batch(**given)


def by_method(method: GRPO, c: Case, **streams: Any) -> torch.Tensor:
    entropy_T = c.pack(c.entropy_BW).detach()
    said = LogProbs(logp_T=c.args[0], entropy_T=torch.where(c.args[3], entropy_T, 0.0))
    counts = Counts(tokens=int(c.mask_BW.sum()), seqs=4)
    return method.loss(said, as_batch(c, **streams), counts).loss


def weighted(**options: Any) -> Any:
    return lambda c: trl(c, is_weight_BW=token_weight_BW(c), **options)


SEQUENCE: dict[str, Any] = {"importance_sampling_level": "sequence"}
CORRECTION = Correction(cap=3.0)
TRL: dict[str, tuple[dict[str, Any], Any]] = {
    "dapo": ({}, trl),
    "bnpo": ({}, lambda c: trl(c, loss_type="bnpo")),
    "grpo": ({"aggregate": "sequence"}, lambda c: trl(c, loss_type="grpo")),
    "dr_grpo": ({"aggregate": "constant"}, lambda c: trl(c, loss_type="dr_grpo")),
    "gspo": (
        {"objective": Clipped(level="sequence"), "aggregate": "sequence"},
        lambda c: trl(c, loss_type="grpo", **SEQUENCE),
    ),
    "clip": ({"objective": Clipped(clip=(0.1, 0.28))}, lambda c: trl(c, epsilon_low=0.1, epsilon_high=0.28)),
    "dual clip": ({"objective": Clipped(dual_clip=1.3)}, lambda c: trl(c, delta=1.3)),
    "kl": ({"kl": 0.5}, lambda c: trl(c, beta=0.5)),
    "kl corrected": ({"kl": 0.5, "kl_corrected": True}, lambda c: trl(c, beta=0.5, use_bias_correction_kl=True)),
    "correction": ({"correction": CORRECTION}, weighted()),
    "cispo": ({"objective": CISPO(cap=1.2)}, lambda c: trl(c, loss_type="cispo", epsilon_high=1.2)),
    "sapo": ({"objective": SAPO()}, lambda c: trl(c, loss_type="sapo")),
    "vespo": ({"objective": VESPO()}, lambda c: trl(c, loss_type="vespo")),
    "vespo, correction": ({"objective": VESPO(), "correction": CORRECTION}, weighted(loss_type="vespo")),
    "luspo": ({"objective": LUSPO()}, lambda c: trl(c, loss_type="luspo", **SEQUENCE)),
    "gmpo": ({"objective": GMPO()}, trl_gmpo),
    "rloo": ({"objective": RLOO()}, trl_rloo),
}  # fmt: skip


@pytest.mark.parametrize("name", TRL)
@pytest.mark.parametrize("drift", [0.3, 1.0])
def test_value_and_gradient_are_trl_s(name: str, drift: float) -> None:
    options, theirs = TRL[name]
    c = case(drift=drift)
    ref_T = c.pack(c.ref_BW) if "kl" in options else None
    found = [by_method(grpo(**options), c, ref_logp_T=ref_T), theirs(c)]
    grads = [torch.autograd.grad(loss, c.logp_BW)[0] for loss in found]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-6)
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=1e-6)
    assert grads[0].abs().max() > 1e-3


def test_answers_left_behind_are_trl_s() -> None:
    """keep_by_kl at a threshold of nearly 0, with weights that are all 1: TRL has no weights without vLLM."""
    c = case()
    method = grpo(correction=Correction(cap=1.0, floor=1.0, sequence_kl=1e-9))
    torch.testing.assert_close(by_method(method, c), trl(c, off_policy_mask_threshold=1e-9), rtol=0, atol=1e-6)


def test_undecided_tokens_are_chosen_as_trl_chooses_them() -> None:
    c = case()
    rows = [Example(tokens_L=np.zeros(1 + n, np.int32), mask_L=np.concatenate([[True], m.numpy()[:n]]))
            for n, m in zip(c.real_BW.sum(1).tolist(), c.mask_BW, strict=True)]  # fmt: skip
    entropies = [np.concatenate([[9.0], e[r].detach()]).astype(np.float32)
                 for e, r in zip(c.entropy_BW, c.real_BW, strict=True)]  # fmt: skip
    ctx = context(score=lambda examples, temperature: [Said(np.zeros_like(e), e) for e in entropies])
    kept = rollouts.with_old(rows, ctx, 1.0, top=0.4)
    keep_T = torch.cat([torch.from_numpy(e.keep_L[1:]) for e in kept if e.keep_L is not None])
    assert 0 < keep_T.sum() < c.mask_BW.sum()
    ours, theirs = by_method(grpo(), c, keep_T=keep_T), trl(c, top_entropy_quantile=0.4)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    for a, b in zip(*(torch.autograd.grad(loss, c.logp_BW) for loss in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_reinforce_and_dppo_by_hand() -> None:
    c = case()
    logp_T, _, adv_T, mask_T = c.args
    n = int(mask_T.sum())
    expected = -(adv_T * logp_T)[mask_T].sum() / n
    torch.testing.assert_close(by_method(grpo(objective=Reinforce()), c), expected)
    method = grpo(objective=DPPO(clip=(0.05, 0.05)), old="sampler")
    said_T = c.pack(c.sampled_BW)
    gap_T = logp_T.exp() - said_T.exp()
    dropped_T = ((adv_T > 0) & (gap_T > 0.05)) | ((adv_T <= 0) & (gap_T < -0.05))
    weight_T = ((logp_T - said_T).exp() * ~dropped_T).detach()
    assert dropped_T[mask_T].any() and not dropped_T[mask_T].all()
    torch.testing.assert_close(by_method(method, c), -(weight_T * adv_T * logp_T)[mask_T].sum() / n)


@pytest.mark.parametrize(
    ("objective", "level"),
    [(Clipped(), "token"), (Clipped(level="sequence"), "sequence"), (LUSPO(), "sequence"), (RLOO(), "sequence_sum"),
     (CISPO(level="sequence"), "sequence"), (SAPO(), "token"), (GMPO(), "token"), (VESPO(), "token")],
)  # fmt: skip
def test_what_is_logged_is_how_far_the_policy_has_moved_at_the_level_of_the_loss(objective: Any, level: str) -> None:
    c = case()
    logp_T, old_T, _, mask_T = c.args
    said = LogProbs(logp_T=logp_T, entropy_T=torch.zeros_like(old_T))
    out = grpo(objective=objective).loss(said, as_batch(c), Counts(tokens=40, seqs=4))
    moved = losses.drift(logp_T, old_T, mask_T, seq_T=c.seq_T, level=level, tokens=40)
    assert {name: out.sums[name] for name in moved.sums} == moved.sums and out.maxes == moved.maxes
    assert out.sums["approx_kl"] > 0 and out.maxes["ratio_inverse_max"] > 1


def test_ratios_to_the_sampler_are_1_where_it_said_nothing() -> None:
    c = case()
    said_T = c.pack(c.sampled_BW).clone()
    said_T[0] = torch.nan
    method = grpo(old="sampler")
    plain = by_method(grpo(), c, old_logp_T=torch.where(said_T.isnan(), c.args[0].detach(), said_T))
    torch.testing.assert_close(by_method(method, c, sampled_logp_T=said_T), plain)


def test_the_entropy_bonus_is_on_average_the_gradient_of_the_entropy() -> None:
    """Every token of a small vocabulary, weighted by how often it is drawn."""
    logit_V = torch.tensor([0.3, -1.0, 1.2, 0.1], dtype=torch.float64, requires_grad=True)
    logp_V = logit_V.log_softmax(0)
    entropy = -(logp_V.exp() * logp_V).sum()
    exact = torch.autograd.grad(entropy, logit_V, retain_graph=True)[0]
    found = torch.zeros(4, dtype=torch.float64)
    for v in range(4):
        share = rollouts.undecided(logp_V[v : v + 1], entropy.detach()[None], torch.ones(1, dtype=torch.bool), 1)
        assert share.item() == pytest.approx(entropy.item())
        found += logp_V[v].exp().item() * torch.autograd.grad(share, logit_V, retain_graph=True)[0]
    torch.testing.assert_close(found, exact)


# Rewards and advantages -----------------------------------------------------------------------------------------------


def rollout(prompt: int, reward: float | None, tokens: int = 3, finish: str = "stop", **parts: float) -> Rollout:
    rng = np.random.default_rng([prompt, tokens, int(1e3 * (reward or 0))])
    ids = np.random.default_rng(prompt).integers(0, VOCAB, 4 + prompt).astype(np.int32)
    asked = Example(tokens_L=ids, mask_L=np.zeros(len(ids), bool), group=prompt, source=f"p:{prompt}")
    return Rollout(
        prompt=asked, tokens_L=rng.integers(0, VOCAB, tokens).astype(np.int32), finish=finish, policy_step=0,
        logp_L=np.full(tokens, -np.log(VOCAB), np.float32), reward=reward, parts=parts,
    )  # fmt: skip


GROUPS = [
    [rollout(0, 1.0, 5), rollout(0, 0.0, 2), rollout(0, 0.5, 7), rollout(0, None, 3)],
    [rollout(1, 2.0, 4), rollout(1, 1.0, 9), rollout(1, 1.0, 1), rollout(1, 0.0, 6)],
    [rollout(2, 1.0, 4), rollout(2, 1.0, 3)],
]


def advantages(groups: Any, name: Any, **options: Any) -> list[float]:
    return [float(e.adv_L[-1]) for e in credit.to_examples(groups, name, **options) if e.adv_L is not None]


def test_advantages_by_hand() -> None:
    assert advantages(GROUPS, "group_mean") == [0.5, -0.5, 0.0, 0.0, 1.0, 0.0, 0.0, -1.0, 0.0, 0.0]
    assert advantages(GROUPS, "leave_one_out")[:4] == [0.75, -0.75, 0.0, 0.0]
    assert advantages(GROUPS, "group_zscore")[0] == pytest.approx(0.5 / (0.5 + 1e-4))
    opo = advantages(GROUPS, "opo")  # baseline (5 x 1 + 7 x 0.5) / 14
    assert opo[:3] == pytest.approx([1 - 8.5 / 14, -8.5 / 14, 0.5 - 8.5 / 14])
    assert advantages(GROUPS, "maxrl")[:3] == pytest.approx([1.0, -1.0, 0.0])
    rewards = [r.reward for group in GROUPS for r in group if r.reward is not None]
    whole = advantages(GROUPS, "group_zscore", scale="batch")
    assert whole[0] == pytest.approx(0.5 / (np.std(rewards, ddof=1) + 1e-4), rel=1e-5)
    tokens = np.repeat([r.reward for g in GROUPS for r in g if r.reward is not None], [5, 2, 7, 4, 9, 1, 6, 4, 3])
    plus = advantages(GROUPS, "reinforce_pp")
    assert plus[4] == pytest.approx((2 - tokens.mean()) / tokens.std(ddof=1), rel=1e-5)
    assert plus[3] == 0.0


def test_rewards_are_normalised_before_they_are_added_by_gdpo() -> None:
    """Two rewards that disagree, one with a hundred times the spread: their sum hears one, gdpo both."""
    group = [
        rollout(0, a + b, tokens, a=a, b=b) for tokens, (a, b) in enumerate([(0, 100), (1, 0), (1, 100), (0, 0)], 2)
    ]
    found = advantages([group], "gdpo", weights={"a": 1.0, "b": 1.0})
    assert found[:2] == pytest.approx([0, 0], abs=1e-3)
    assert found[2] == pytest.approx(-found[3]) and found[2] > 0.5
    summed = advantages([group], "group_zscore")
    assert summed[0] > 0.8 and summed[1] < -0.8
    assert advantages([group], "gdpo", weights={"a": 1.0, "b": 0.0})[0] < -0.5


def test_permuting_a_group_permutes_advantages() -> None:
    for name in (
        "group_zscore",
        "group_mean",
        "leave_one_out",
        "opo",
        "maxrl",
        "reinforce_pp",
        "reinforce_pp_baseline",
    ):
        plain = advantages([GROUPS[1]], name)
        order = [2, 0, 3, 1]
        assert advantages([[GROUPS[1][i] for i in order]], name) == pytest.approx([plain[i] for i in order], abs=1e-6)


def test_long_answers_lose_reward_in_a_line() -> None:
    rule = Overlong(buffer=4, penalty=2.0)
    assert [rule.reward(n, 10) for n in (1, 6, 7, 9, 10)] == [0, 0, -0.5, -1.5, -2.0]
    (group,) = credit.shaped([[rollout(0, 1.0, 10), rollout(0, None, 10)]], rule, 10)
    assert (group[0].reward, group[0].parts, group[1].reward) == (-1.0, {"overlong": -2.0}, None)


def test_cut_off_answers_count_in_the_mean_and_are_not_trained() -> None:
    group = [rollout(0, 1.0), rollout(0, 0.0, finish="length")]
    assert advantages([group], "group_mean", truncated=False) == [0.5]
    assert advantages([group], "group_mean") == [0.5, -0.5]


# A step, however it is split ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [
    {}, {"aggregate": "sequence"}, {"aggregate": "constant"}, {"objective": GMPO()}, {"objective": LUSPO()},
    {"objective": Clipped(level="sequence")}, {"kl": 0.3}, {"entropy_bonus": 0.1}, {"objective": VESPO()},
], ids=str)  # fmt: skip
def test_a_step_is_the_same_however_it_is_split(world: World, options: dict[str, Any]) -> None:
    method, built = grpo(correction=Correction(), **options), model(world)
    whole = one_step(method, built, world, examples=credit.to_examples(GROUPS, tokens=512))
    parts = one_step(method, built, world, examples=credit.to_examples(GROUPS, tokens=30), tokens=30)
    alone = one_step(method, built, world, examples=credit.to_examples(GROUPS))
    assert whole[2] == 1 < parts[2] and built.policy.layout.shared
    for out, grads, _ in (parts, alone):
        torch.testing.assert_close(out.loss, whole[0].loss, rtol=1e-5, atol=1e-6)
        for name, grad in grads.items():
            torch.testing.assert_close(grad, whole[1][name], rtol=1e-4, atol=1e-6)
    assert max(float(g.abs().max()) for g in whole[1].values()) > 1e-4


def test_scores_are_what_a_step_finds(world: World) -> None:
    """Bitwise: the ratio at the first of several steps is 1."""
    built = model(world)
    examples = credit.to_examples(GROUPS, tokens=512)
    said = score(examples, built.policy, world, tokens=30, temperature=0.7)
    held = [evolve(e, old_logp_L=s.logp_L) for e, s in zip(examples, said, strict=True)]
    method = grpo(sampling=Sampling(max_tokens=10, temperature=0.7))
    out, _, n = one_step(method, built, world, examples=held, tokens=30)
    assert n > 1
    assert float(out.maxes["ratio_max"]) == float(out.maxes["ratio_inverse_max"]) == 1.0
    for e, s in zip(examples, said, strict=True):
        assert (s.logp_L[~e.mask_L] == 0).all() and (s.logp_L[e.mask_L] < 0).all()


@pytest.mark.parametrize("temperature", [0.6, 1.0])
@pytest.mark.parametrize("family", ["llama", "qwen3_5_moe_text"])
def test_the_sampler_s_log_probs_are_the_trainer_s(world: World, family: str, temperature: float) -> None:
    chosen = Model(id="-", family=family, dtype="float32", tiny=True)
    config = plan_config(chosen, None, vocab=VOCAB)
    adapter = ADAPTER if family == "llama" else evolve(ADAPTER, targets=("attention", "experts"))
    built = build(chosen, adapter, config, None, world=world, parallel=Parallel(), seed=0, say=lambda _: None)
    sampling = Sampling(max_tokens=8, temperature=temperature)
    sampler = EmbeddedSampler(
        policy=built.policy, world=world, sampling=sampling, stop=frozenset({3}), rows=8, seed=0
    )  # fmt: skip
    groups = sampler.rollout([group[0].prompt for group in GROUPS], 4, 0)
    scored = [[evolve(r, reward=float(i)) for i, r in enumerate(group)] for group in groups]
    method = grpo(sampling=sampling, correction=Correction())
    out, _, _ = one_step(method, built, world, examples=credit.to_examples(scored, tokens=512))
    assert float(out.sums["mismatch_kl"]) < 1e-6
    assert float(out.sums["is_weight"]) == pytest.approx(1, abs=1e-3)
    wrong, _, _ = one_step(evolve(method, sampling=evolve(sampling, temperature=0.8)), built, world,
                           examples=credit.to_examples(scored, tokens=512))  # fmt: skip
    assert float(wrong.sums["mismatch_kl"]) > 1e-6, "the test can fail"


# Drawing --------------------------------------------------------------------------------------------------------------


@define
class FakeSampler:
    """Answers of random lengths; keeps what it was asked. ``gate`` holds ``ask`` back until it is set."""

    calls: list[Any] = field(factory=list)
    gate: Event | None = None
    fails: bool = False
    version: int = -1

    def sync(self, step: int) -> None:
        self.calls.append(("sync", step))
        self.version = step

    def ask(self, prompts: Sequence[Example], n: int, step: int) -> list[list[Answer]]:
        if self.gate is not None:
            assert self.gate.wait(20)
        if self.fails:
            raise FtError("the server is gone")
        self.calls.append(("ask", step, self.version))
        return [
            [Answer(np.full(k + 1, 7, np.int32), np.zeros(k + 1, np.float32), True) for k in range(n)] for _ in prompts
        ]

    def rollout(self, prompts: Sequence[Example], n: int, step: int, *, greedy: bool = False) -> Any:
        self.calls.append(("rollout", step, [p.group for p in prompts]))
        return [[rollout(i, None, k + 1) for k in range(n)] for i, _ in enumerate(prompts)]


@define
class FakeJudge:
    """Groups ``easy`` of each draw are scored alike, the others by length."""

    easy: set[int] = field(factory=set)

    def score(self, found: Sequence[Rollout]) -> list[Rollout]:
        n = len(found) // 4
        return [evolve(r, reward=1.0 if i // n in self.easy else float(len(r.tokens_L))) for i, r in enumerate(found)]


class FakeData:
    def draw(self, step: int, n: int, seed: int) -> list[Example]:
        return [evolve(rollout(i, None).prompt, source=f"{seed}:{step}:{i}") for i in range(n)]


def context(**options: Any) -> Context:
    given: dict[str, Any] = {
        "data": FakeData(),
        "examples": 4,
        "seed": 5,
        "sampler": FakeSampler(),
        "judge": FakeJudge(),
        **options,
    }
    return Context(**given)


def test_groups_scored_alike_are_replaced_up_to_a_limit() -> None:
    told: list[Any] = []
    sampler = FakeSampler()
    ctx = context(judge=FakeJudge({0, 1, 3}), sampler=sampler, note=told.append)
    method = grpo(group=2, resample=2)
    examples = method.examples(0, ctx)
    assert len({e.group for e in examples}) == 3, "one of four in each of three draws"
    numbers = {name: value for line in told for name, value in line.items()}
    assert (numbers["groups_drawn"], numbers["groups_kept"], numbers["groups_alike"]) == (12, 3, 0.75)
    asked = [call for call in sampler.calls if call[0] == "rollout"]
    assert [groups for _, _, groups in asked] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert len({e.group for e in method.examples(1, context())}) == 4, "nothing is replaced where all differ"


def test_a_batch_without_any_signal_is_given_as_it_is() -> None:
    ctx = context(judge=FakeJudge({0, 1, 2, 3}))
    examples = grpo(group=2, resample=1).examples(0, ctx)
    assert len(examples) == 8 and step.without_signal(examples)


def test_several_steps_train_on_the_same_answers() -> None:
    said: list[str] = []
    scores = lambda examples, temperature: [Said(np.full(len(e), -2.0, np.float32), e.mask_L) for e in examples]  # noqa: E731
    ctx = context(score=scores, say=said.append)
    method = grpo(group=2, iterations=3)
    found = [method.examples(i, ctx) for i in range(4)]
    assert found[0] is found[1] is found[2] is not found[3] and not said
    assert all(e.old_logp_L is not None and (e.old_logp_L == -2).all() for e in found[0])
    assert method.asks.repeats == 3
    again = context(score=scores, say=said.append)
    method.examples(4, again)
    assert said == ["the answers of step 4 are no longer there; the policy as it is draws others"]


# Ahead ----------------------------------------------------------------------------------------------------------------


def ahead_context(world: World, sampler: FakeSampler, told: list[Any], **options: Any) -> Context:
    return context(sampler=AheadSampler(sampler=sampler, world=world), note=told.append, **options)


@pytest.mark.parametrize("by", [1, 2])
def test_answers_are_drawn_ahead_and_no_older_than_allowed(world: World, by: int) -> None:
    sampler, told = FakeSampler(), []
    ctx = ahead_context(world, sampler, told)
    method = Ahead(grpo(group=2), by=by)
    for now in range(5):
        assert len(method.examples(now, ctx)) == 8
    assert [line["staleness"] for line in told] == [min(now, by) for now in range(5)]
    ctx.sampler.sync(5)  # type: ignore[union-attr]  # waits for what is still being drawn
    asked = {call[1]: call[2] for call in sampler.calls if call[0] == "ask"}
    assert asked == {batch: max(0, batch - by) for batch in range(5 + by)}, "batch: the weights that drew it"


def test_the_next_batch_is_drawn_while_this_one_trains(world: World) -> None:
    sampler, told = FakeSampler(), []
    ctx = ahead_context(world, sampler, told)
    method = Ahead(grpo(group=2))
    method.examples(0, ctx)
    ctx.sampler.sync(0)  # type: ignore[union-attr]
    sampler.gate = Event()
    ctx.sampler.begin(9, FakeData().draw(9, 4, 5), 2, 0)  # type: ignore[union-attr]
    assert ("ask", 9, 0) not in sampler.calls, "the caller goes on while it is held back"
    sampler.gate.set()
    ctx.sampler.take(9)  # type: ignore[union-attr]
    assert ("ask", 9, 0) in sampler.calls


def test_what_fails_ahead_ends_the_step_that_needs_it(world: World) -> None:
    sampler = FakeSampler(fails=True)
    with pytest.raises(FtError, match="the server is gone"):
        Ahead(grpo(group=2)).examples(0, ahead_context(world, sampler, []))


def test_a_resumed_run_says_that_it_draws_again(world: World) -> None:
    said: list[str] = []
    Ahead(grpo(group=2)).examples(3, ahead_context(world, FakeSampler(), [], say=said.append))
    assert said == ["rollouts that were drawn ahead of step 4 are drawn again, by the policy as it is now"]


def test_the_model_in_training_draws_nothing_ahead(world: World) -> None:
    from ft.train import online

    method: Any = Ahead(grpo())
    recipe = Recipe(model=evolve(TINY, tiny=False), data=Data(train="x.jsonl"), method=method)
    sampler: Any = object()
    with pytest.raises(RecipeError, match=r"sampler=VLLM"):
        online.ahead(sampler, recipe, world, lambda _: None)
    said: list[str] = []
    assert online.ahead(sampler, evolve(recipe, model=TINY), world, said.append) is sampler and said


# Recipes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options, why", [
    ({"objective": GMPO(), "aggregate": "token"}, "'aggregate' must be 'sequence' with GMPO"),
    ({"objective": LUSPO(), "aggregate": "sequence"}, "'aggregate' must be 'constant'"),
    ({"objective": Reinforce(), "iterations": 2}, "'iterations' must be 1"),
    ({"objective": Reinforce(), "old": "sampler"}, "'old' must be 'trainer'"),
    ({"objective": DPPO()}, "'old' must be 'sampler' with DPPO"),
    ({"objective": VESPO(), "correction": Correction(level="sequence")}, "level='token' with VESPO"),
    ({"old": "sampler", "correction": Correction()}, "'old' must be 'trainer' with a correction"),
    ({"old": "sampler", "sampling": Sampling(top_p=0.9)}, "'old' must be 'trainer' with top_p"),
    ({"correction": Correction(), "sampling": Sampling(top_k=5)}, "set correction=None"),
    ({"advantage": "opo", "scale": "batch"}, "'scale' must be None"),
    ({"advantage": "leave_one_out", "scale": "group"}, "'scale' must be 'none' or 'batch'"),
    ({"advantage": "gdpo", "rewards": (length, length)}, "different names"),
    ({"group": 1}, "'group' must be at least 2"),
    ({"kl_corrected": True}, "'kl_corrected' must be False"),
    ({"overlong": Overlong(buffer=11)}, "at most sampling.max_tokens"),
    ({"top_entropy": 0.0}, "top_entropy"),
], ids=lambda value: "+".join(value) if isinstance(value, dict) else "")  # fmt: skip
def test_what_cannot_be_honoured_is_refused(options: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        grpo(**options)


def test_options_of_objectives_are_checked() -> None:
    for wrong in (
        lambda: Clipped(clip=(1.0, 0.2)), lambda: Clipped(dual_clip=1.1), lambda: CISPO(cap=0.2),
        lambda: SAPO(tau=(0.0, 1.0)), lambda: Correction(cap=2.0, floor=3.0), lambda: Ahead(grpo(iterations=2), by=2),
    ):  # fmt: skip
        with pytest.raises(ValueError):
            wrong()


@pytest.mark.parametrize("objective", [Clipped(dual_clip=3.0), CISPO(), SAPO(), GMPO(), VESPO(), LUSPO(), RLOO(),
                                       Reinforce()], ids=lambda o: type(o).__name__)  # fmt: skip
def test_methods_survive_json(objective: Any) -> None:
    method: Any = Ahead(grpo(objective=objective, overlong=Overlong(buffer=2), rewards=RewardFunction(function=shout)))
    recipe = Recipe(model=TINY, data=Data(train="x.jsonl"), method=method)
    assert restore(dump(recipe)) == recipe
