"""Every family sampled by the model in training: log-probs are the trainer's, or the run is refused at its start."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import FAMILIES, VOCAB, build
from transformers import AutoModelForCausalLM

from ft import Model, Sampling, dist
from ft.data.pack import collate
from ft.dist import World
from ft.errors import ModelError
from ft.models import leak, tiny
from ft.models.build import build as build_policy
from ft.models.build import plan_config
from ft.models.generating import generating
from ft.models.policy import Policy, Scorer, logprobs
from ft.recipe import Parallel
from ft.rollout import probe
from ft.rollout.embedded import EmbeddedSampler
from ft.rollout.prefix import ANEW, EQUAL, PADDED
from ft.types import Example, Rollout

STOP = frozenset(range(3, 20))  # of 128 tokens, so that rows end early
LENGTHS = (5, 23, 2, 17, 5)  # of prompts: past sliding windows and blocks of 16, and two of one length
# An indexer with few heads scores many keys exactly 0, and topk breaks such ties differently in longer rows.
OVER: dict[str, dict[str, Any]] = {"glm_moe_dsa": {"index_n_heads": 16}}


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    torch.set_num_threads(1)
    with dist.launched() as made:
        yield made


def policy(net: Any) -> Policy:
    """With louder weights, so that log-probs tell one context from another."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in net.parameters():
            if p.dim() >= 2:
                p.add_(torch.randn(p.shape, generator=generator), alpha=0.1)
    scorer = Scorer(net).eval()
    return Policy(scorer=scorer, config=net.config, layout=leak.check(scorer)[0])


def look_alike(family: str) -> Policy:
    torch.manual_seed(0)
    return policy(AutoModelForCausalLM.from_config(tiny.config_by_family(family, VOCAB)).float())


def prompts(*lengths: int) -> list[Example]:
    rng = np.random.default_rng(0)
    ids = [rng.integers(3, VOCAB, n).astype(np.int32) for n in lengths]
    return [Example(tokens_L=x, mask_L=np.zeros(len(x), bool), group=i) for i, x in enumerate(ids)]


def sampler(chosen: Policy, world: World, way: Any, temperature: float = 1.0) -> EmbeddedSampler:
    sampling = Sampling(max_tokens=12, temperature=temperature)
    return EmbeddedSampler(policy=chosen, world=world, sampling=sampling, stop=STOP, rows=16, seed=0, way=way)


def trained(chosen: Policy, answers: list[Rollout], temperature: float) -> np.ndarray:
    """What the trainer says of the answers' tokens, all sequences in one batch."""
    rows = [(np.concatenate([r.prompt.tokens_L, r.tokens_L]), len(r.prompt.tokens_L)) for r in answers]
    batch = collate([Example(tokens_L=row, mask_L=np.arange(len(row)) >= n) for row, n in rows])
    with torch.no_grad():
        return logprobs(chosen, batch, temperature=temperature).logp_T[batch.trained_N].numpy()


def check(chosen: Policy, world: World, way: Any, temperature: float) -> None:
    answers = [r for group in sampler(chosen, world, way, temperature).rollout(prompts(*LENGTHS), 3, 0) for r in group]
    assert len({len(r.tokens_L) for r in answers}) > 2 and "stop" in {r.finish for r in answers}, "rows end early"
    sampled = np.concatenate([r.logp_L for r in answers if r.logp_L is not None])
    assert sampled.std() > 0.5
    np.testing.assert_allclose(sampled, trained(chosen, answers, temperature), rtol=0, atol=3e-5)


def check_greedy(chosen: Policy, world: World, way: Any) -> None:
    """The oracle is transformers' own generation, of each prompt alone."""
    ours = sampler(chosen, world, way).rollout(prompts(*LENGTHS), 1, -1, greedy=True)
    net: Any = chosen.scorer.model
    with generating(chosen):
        for prompt, (answer,) in zip(prompts(*LENGTHS), ours, strict=True):
            ids = torch.from_numpy(prompt.tokens_L)[None].long()
            out = net.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12,
                eos_token_id=sorted(STOP), pad_token_id=0, use_cache=True,
            )  # fmt: skip
            assert out[0, ids.shape[1] :].tolist() == answer.tokens_L.tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_are_the_trainer_s_and_greedy_answers_transformers_s(family: str, world: World) -> None:
    chosen = policy(build(family, **OVER.get(family, {})))
    said: list[str] = []
    assert probe.choose(chosen, world, said.append) == PADDED and not said
    for temperature in (0.6, 1.0):
        check(chosen, world, PADDED, temperature)
    check_greedy(chosen, world, PADDED)


@pytest.mark.parametrize("way", [EQUAL, ANEW])
@pytest.mark.parametrize("family", ["llama", "minimax", "gemma3_text", "qwen3_5_moe_text"])
def test_other_ways_draw_the_same(family: str, way: Any, world: World) -> None:
    chosen = policy(build(family))
    check(chosen, world, way, 1.0)
    usual = sampler(chosen, world, PADDED).rollout(prompts(*LENGTHS), 3, 0)
    other = sampler(chosen, world, way).rollout(prompts(*LENGTHS), 3, 0)
    assert [r.tokens_L.tolist() for g in usual for r in g] == [r.tokens_L.tolist() for g in other for r in g]


def test_a_family_that_does_not_honour_padding_is_sampled_by_length(world: World) -> None:
    """DeepSeek V4 compresses keys in blocks that start at the row's beginning, padding or not."""
    chosen, said = look_alike("deepseek_v4"), []
    assert probe.choose(chosen, world, said.append) == EQUAL
    assert len(said) == 1 and "one length at a time, which is slower" in said[0] and "from the trainer's" in said[0]
    check(chosen, world, EQUAL, 1.0)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check(chosen, world, PADDED, 1.0)


@pytest.mark.parametrize("family", ["falcon_mamba", "jamba"])
def test_a_family_whose_cache_is_another_is_forwarded_anew(family: str, world: World) -> None:
    chosen, said = look_alike(family), []
    assert probe.choose(chosen, world, said.append) == ANEW
    assert len(said) == 1 and "forwarded anew for each token, which is slower" in said[0] and "Error" in said[0]
    check(chosen, world, ANEW, 1.0)


def test_a_model_whose_forward_failed_goes_on_sharded(world: World) -> None:
    """After a way that failed half way through a forward, FSDP gathers and trains as before."""
    model = Model(id="-", family="jamba", dtype="float32", tiny=True)
    built = build_policy(
        model, None, plan_config(model, None, vocab=VOCAB), None, world=world, parallel=Parallel(), seed=0,
        say=lambda _: None,
    )  # fmt: skip
    assert probe.choose(built.policy, world, lambda _: None) == ANEW
    batch = collate([Example(tokens_L=np.arange(9, dtype=np.int32), mask_L=np.arange(9) > 2)])
    logprobs(built.policy, batch).logp_T.sum().backward()
    assert any(p.grad is not None for p in built.policy.scorer.parameters())


def test_a_model_that_no_way_samples_is_refused(world: World) -> None:
    """A trainer that scores at another scale than the model's own head."""
    chosen = policy(build("llama"))
    chosen.scorer.options = {**chosen.scorer.options, "scale": 1.5}
    with pytest.raises(ModelError) as refused:
        probe.choose(chosen, world, lambda _: None)
    told = str(refused.value)
    assert "(llama)" in told and "sampler=VLLM()" in told
    assert told.count("from the trainer's") == 3 and "forwarded anew" in told


def test_every_rank_has_as_many_turns(world: World) -> None:
    """Prompts 0, 2, 4 are the first rank's: lengths 5, 2, 5; those of the second are 23 and 17 long."""
    ranks: list[Any] = [SimpleNamespace(rank=rank, size=2) for rank in range(2)]
    chosen: Any = None
    turns = [sampler(chosen, rank, EQUAL)._turns(LENGTHS, 8) for rank in ranks]
    assert turns == [[[0, 4], [2]], [[1], [3]]]
    turns = [sampler(chosen, rank, EQUAL)._turns(LENGTHS[:3], 8) for rank in ranks]
    assert turns == [[[0], [2]], [[1], []]]
    turns = [sampler(chosen, rank, PADDED)._turns(LENGTHS, 2) for rank in ranks]
    assert turns == [[[0, 2], [4]], [[1, 3], []]]
