"""The sampler on the model in training: what it draws depends on nothing but seed, step, prompt and policy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from test_methods import VOCAB, model

from ft import LoRA, Model, Sampling, dist
from ft.dist import World
from ft.models.build import Built, build, plan_config
from ft.models.generating import generating
from ft.recipe import Parallel
from ft.rollout import sampling as drawing
from ft.rollout.cache import cache_for
from ft.rollout.embedded import EmbeddedSampler
from ft.types import Example, Rollout

STOP = frozenset({3, 11, 40, 41, 42, 43, 44, 45})


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    torch.set_num_threads(1)
    with dist.launched() as made:
        yield made


@pytest.fixture(scope="module")
def llama(world: World) -> Built:
    return model(world)


@pytest.fixture(scope="module")
def hybrid(world: World) -> Built:
    chosen = Model(id="-", family="qwen3_5_moe_text", dtype="float32", tiny=True)
    config = plan_config(chosen, None, vocab=VOCAB)
    adapter = LoRA(r=4, targets=("attention", "experts"))
    return build(chosen, adapter, config, None, world=world, parallel=Parallel(), seed=0, say=lambda _: None)


def prompts(*lengths: int) -> list[Example]:
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, VOCAB, n).astype(np.int32) for n in lengths]
    return [Example(tokens_L=x, mask_L=np.zeros(len(x), bool), group=i) for i, x in enumerate(ids)]


PROMPTS = prompts(5, 9, 2, 7)


def sampler(built: Built, world: World, *, rows: int = 64, seed: int = 0, stop: Any = STOP, **options: Any) -> Any:
    chosen = Sampling(**{"max_tokens": 12, **options})
    return EmbeddedSampler(policy=built.policy, world=world, sampling=chosen, stop=stop, rows=rows, seed=seed)


def drawn(groups: list[list[Rollout]]) -> list[list[list[int]]]:
    return [[r.tokens_L.tolist() for r in group] for group in groups]


def flat(groups: list[list[Rollout]]) -> list[Rollout]:
    return [r for group in groups for r in group]


@pytest.mark.parametrize("which", ["llama", "hybrid"])
def test_answers_do_not_depend_on_how_many_are_drawn_at_a_time(
    which: str, world: World, request: pytest.FixtureRequest
) -> None:
    built = request.getfixturevalue(which)
    every = [sampler(built, world, rows=rows).rollout(PROMPTS, 3, 4) for rows in (1, 6, 64)]
    assert drawn(every[0]) == drawn(every[1]) == drawn(every[2])
    for a, b in zip(flat(every[0]), flat(every[2]), strict=True):
        assert a.logp_L is not None and b.logp_L is not None
        np.testing.assert_allclose(a.logp_L, b.logp_L, atol=1e-5)


def test_seed_step_and_prompt_decide_what_is_drawn(llama: Built, world: World) -> None:
    first = drawn(sampler(llama, world).rollout(PROMPTS, 2, 0))
    assert drawn(sampler(llama, world).rollout(PROMPTS, 2, 0)) == first
    assert drawn(sampler(llama, world).rollout(PROMPTS, 2, 1)) != first
    assert drawn(sampler(llama, world, seed=1).rollout(PROMPTS, 2, 0)) != first
    assert drawn(sampler(llama, world).rollout(PROMPTS[2:], 2, 0)) == first[2:], "not its neighbours"
    assert first[0][0] != first[0][1], "answers of one prompt differ"


def test_an_answer_ends_with_the_first_token_that_ends_it_or_at_the_limit(llama: Built, world: World) -> None:
    answers = flat(sampler(llama, world).rollout(PROMPTS, 8, 0))
    assert {r.finish for r in answers} == {"stop", "length"}
    for r in answers:
        ends = [token in STOP for token in r.tokens_L.tolist()]
        assert not any(ends[:-1]) and ends[-1] == (r.finish == "stop")
        assert r.finish == "stop" or len(r.tokens_L) == 12
        assert r.logp_L is not None and len(r.logp_L) == len(r.tokens_L) and (r.logp_L < 0).all()


@pytest.mark.parametrize("which", ["llama", "hybrid"])
def test_finished_rows_leave_the_batch(which: str, world: World, request: pytest.FixtureRequest) -> None:
    built: Built = request.getfixturevalue(which)
    sizes: list[int] = []
    net: Any = built.policy.scorer.model
    handle = net.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    try:
        answers = flat(sampler(built, world).rollout(PROMPTS, 6, 0))
    finally:
        handle.remove()
    assert sizes[0] == len(PROMPTS), "a prompt is forwarded once"
    left = [sum(len(r.tokens_L) > i for r in answers) for i in range(1, max(len(r.tokens_L) for r in answers))]
    assert sizes[1:] == left and left[-1] < left[0]


@pytest.mark.parametrize(
    "options", [{"top_k": 3}, {"top_p": 0.3}, {"min_p": 0.5}, {"top_k": 20, "top_p": 0.5}], ids=str
)
def test_log_probs_of_truncated_draws_are_normalised_over_what_is_left(options: dict[str, Any]) -> None:
    logits_BV = torch.randn(64, 50, generator=torch.Generator().manual_seed(0)) * 2
    chosen = Sampling(temperature=0.7, **options)
    left_BV = torch.full_like(logits_BV, -torch.inf)
    for row, logits_V in enumerate((logits_BV / 0.7).tolist()):
        p = np.exp(np.array(logits_V) - max(logits_V))
        p /= p.sum()
        order = np.argsort(-p)
        keep = order[: options.get("top_k", 50)]
        keep = [v for v in keep if p[v] >= options.get("min_p", 0.0) * p.max()]
        total = p[keep].sum()
        before = np.concatenate([[0], np.cumsum(p[keep])[:-1]]) / total
        keep = [v for v, b in zip(keep, before, strict=True) if b < options.get("top_p", 1.0)]
        left_BV[row, keep] = torch.from_numpy(np.log(p[keep] / p[keep].sum())).float()
    u_B = torch.rand(64, generator=torch.Generator().manual_seed(1))
    token_B, logp_B = drawing.pick(logits_BV, u_B, chosen)
    torch.testing.assert_close(logp_B, left_BV.gather(1, token_B[:, None])[:, 0], rtol=1e-4, atol=1e-5)
    assert logp_B.isfinite().all() and len({int(t) for t in token_B}) > 5


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    logits_V = torch.tensor([0.0, 1.0, -1.0, 2.0])
    u_B = (torch.arange(20_000) + 0.5) / 20_000  # each of 20,000 equal parts once
    token_B, logp_B = drawing.pick(logits_V.expand(20_000, 4), u_B, Sampling(temperature=0.5))
    expected = (logits_V / 0.5).softmax(0)
    torch.testing.assert_close(token_B.bincount(minlength=4) / 20_000, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(logp_B, expected.log()[token_B])


@pytest.mark.parametrize("options", [{}, {"top_k": 2}], ids=str)
def test_the_likeliest_token_has_the_log_prob_of_the_same_distribution(options: dict[str, Any]) -> None:
    """Logits 0, ln 2, ln 4 at temperature 0.5: weights 1, 4, 16, of 21; of 20 where two tokens are left."""
    logits_BV = torch.tensor([[1.0, 4.0, 2.0]]).log()
    token_B, logp_B = drawing.pick(logits_BV, None, Sampling(temperature=0.5, **options))
    assert token_B.tolist() == [1]
    assert logp_B.item() == pytest.approx(np.log(16 / (20 if options else 21)), abs=1e-6)


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"min_p": 0.2}], ids=str)
def test_a_draw_is_where_the_running_sum_of_probabilities_passes_u(options: dict[str, Any]) -> None:
    """Over several blocks of the vocabulary and part of one; tokens that truncation leaves out are never drawn."""
    logits_V = 3 * torch.randn(1000, generator=torch.Generator().manual_seed(0))
    u_B = torch.cat([torch.arange(500) / 500, torch.tensor([1 - 2.0**-24])])
    chosen = Sampling(**options)
    token_B, logp_B = drawing.pick(logits_V.expand(len(u_B), -1), u_B, chosen)
    running = np.cumsum(drawing.truncate(logits_V.log_softmax(-1)[None], chosen)[0].double().exp().numpy())
    expected = np.searchsorted(running, u_B.double().numpy() * running[-1], side="right")
    assert logp_B.isfinite().all()
    assert (token_B.numpy() == expected).mean() > 0.99  # sums in float32 may differ at a border


@pytest.mark.parametrize("which", ["llama", "hybrid"])
def test_greedy_answers_are_those_of_transformers(which: str, world: World, request: pytest.FixtureRequest) -> None:
    built: Built = request.getfixturevalue(which)
    ours = drawn(sampler(built, world).rollout(PROMPTS, 1, -1, greedy=True))
    net: Any = built.policy.scorer.model
    with generating(built.policy):
        for prompt, (answer,) in zip(PROMPTS, ours, strict=True):
            ids = torch.from_numpy(prompt.tokens_L)[None].long()
            out = net.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12,
                eos_token_id=sorted(STOP), pad_token_id=0, use_cache=True,
            )  # fmt: skip
            assert out[0, ids.shape[1] :].tolist() == answer


@pytest.mark.parametrize("room", [0, 2, 8])
def test_a_cache_with_room_holds_what_one_without_holds(room: int) -> None:
    from transformers import DynamicCache, LlamaConfig

    config = LlamaConfig(num_hidden_layers=2)
    theirs: Any = DynamicCache(config=config)
    ours: Any = cache_for(config, room)
    rng, rows = torch.Generator().manual_seed(0), 3
    for place, width in enumerate((4, 1, 1, 1, 2, 1)):
        if place in (1, 3):  # prompts become answers; a row leaves
            chosen = torch.tensor([0, 0, 1, 2] if place == 1 else [0, 2, 3])
            for cache in (theirs, ours):
                cache.reorder_cache(chosen)
            rows = len(chosen)
        for layer in range(2):
            new = [torch.randn(rows, 2, width, 8, generator=rng) for _ in range(2)]
            expected, found = theirs.update(*new, layer), ours.update(*new, layer)
            assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
        assert theirs.get_seq_length() == ours.get_seq_length()


def test_sampling_leaves_the_model_as_it_was(llama: Built, world: World) -> None:
    scorer = llama.policy.scorer
    scorer.train()
    sampler(llama, world).rollout(PROMPTS[:1], 1, 0)
    assert scorer.training and all(p.grad is None or not p.grad.any() for p in scorer.parameters())
