"""A prompt that several answers share is forwarded once: what is cut, that all else stays, and where it is off."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from attrs import evolve
from tiny_models import build as family
from torch import Tensor

from ft import DPO, ORPO, LoRA, Model, SimPO, dist
from ft.data.pack import collate, pack, positions
from ft.data.share import share_prompts
from ft.dist import World, whole
from ft.models import documents, leak
from ft.models.build import Built, build, plan_config
from ft.models.documents import Documents, attention
from ft.models.layout import Layout
from ft.models.policy import Policy, Scorer
from ft.recipe import Parallel
from ft.train import optim, step
from ft.types import Batch, Example, Method

VOCAB = 96
ADAPTER = LoRA(r=4, alpha=8.0)
METHODS: dict[str, Method] = {"dpo": DPO(beta=0.5), "ld-dpo": DPO(shared_length=0.5), "orpo": ORPO(), "simpo": SimPO()}


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    torch.set_num_threads(1)
    with dist.launched() as made:
        yield made


def unit(number: int, prompt: int, *answers: int, vocab: int = VOCAB) -> list[Example]:
    """Answers of so many random tokens to one random prompt, of which nothing is trained."""
    rng = np.random.default_rng(number)
    start = rng.integers(3, vocab, prompt)
    rows = [np.concatenate([start, [k], rng.integers(3, vocab, n - 1)]).astype(np.int32) for k, n in enumerate(answers)]
    return [Example(tokens_L=t, mask_L=np.arange(len(t)) >= prompt, unit=number, source=f"f:{number}") for t in rows]


PAIRS = [*unit(0, 20, 5, 9), *unit(1, 7, 2, 1), *unit(2, 30, 12, 4), *unit(3, 1, 6, 6), *unit(4, 5, 3, 8)]


# What is cut ----------------------------------------------------------------------------------------------------------


def row(tokens: list[int], trained: int, number: int | None = 0, **streams: Any) -> Example:
    """The last ``trained`` tokens are."""
    mask_L = np.arange(len(tokens)) >= len(tokens) - trained
    return Example(tokens_L=np.array(tokens, np.int32), mask_L=mask_L, unit=number, **streams)


def test_sharing_by_hand() -> None:
    first = row([5, 6, 7, 1, 2], 2, adv_L=np.arange(5))
    second = row([5, 6, 7, 3], 1, adv_L=np.arange(10, 14))
    batch = collate(share_prompts([first, second]))
    # the second answer begins with the prompt's last token, which predicts its first
    assert batch.input_T.tolist() == [5, 6, 7, 1, 7]
    assert batch.target_T.tolist() == [6, 7, 1, 2, 3]
    assert batch.pos_T.tolist() == [0, 1, 2, 3, 2]
    assert batch.mask_T.tolist() == [False, False, True, True, True]
    assert batch.lengths == (4, 1) and batch.shared == (0, 2)
    assert batch.adv_T is not None and batch.adv_T.tolist() == [1, 2, 3, 4, 13]
    assert collate([first, second]).shared == ()


@pytest.mark.parametrize(
    ("first", "second", "shared"),
    [
        (row([5, 6, 7, 1], 1), row([9, 6, 7, 2], 1), 0),  # not the same beginning
        (row([5, 6, 7, 1], 1, None), row([5, 6, 7, 2], 1, None), 0),  # not of a unit
        (row([5, 6, 7, 1], 1, 0), row([5, 6, 7, 2], 1, 1), 0),  # of two units
        (row([5, 1], 1), row([5, 2], 1), 0),  # one token of prompt, which each answer needs
        (row([5, 6, 7, 1], 1), row([5, 6, 7, 2], 2), 1),  # 7 is trained in the second, and 6 predicts it
        (row([5, 6, 7, 1], 3), row([5, 6, 7, 2], 1), 2),  # but it may be trained in the first
        (row([5, 6, 7, 1, 2], 1), row([5, 6, 7, 1], 1), 2),  # a beginning of the first
        (row([5, 6], 1), row([5, 6, 7], 1), 0),  # the first forwards 5 alone, and nothing precedes 6
        (row([5, 6, 7], 3), row([5, 6, 7], 3), 0),  # all trained: mask_L[0] is not used
    ],
)
def test_what_is_shared(first: Example, second: Example, shared: int) -> None:
    found = share_prompts([first, second])
    assert [e.shared for e in found] == [0, shared]
    assert positions(found) == positions([first, second]) - shared
    assert found[0] is first and found[1].tokens_L.tolist() == second.tokens_L.tolist()[shared:]


def test_an_answer_that_shares_nothing_is_the_one_that_later_ones_share_with() -> None:
    rows = [row([5, 6, 7, 1], 1), row([8, 9, 7, 2], 1), row([8, 9, 7, 3], 1), row([5, 6, 7, 4], 1)]
    assert [e.shared for e in share_prompts(rows)] == [0, 0, 2, 0]


def test_pairs_of_one_unit_whose_prompts_begin_alike_share_each_their_own_prompt() -> None:
    """Prompts of 6 and 7 tokens, the first 3 alike (a system prompt), so that 2, 5 and 6 positions can be shared."""
    first, second = [1, 2, 3, 4, 5, 6], [1, 2, 3, 7, 8, 9, 10]
    rows = [row([*first, 11], 1), row([*first, 12], 1), row([*second, 13], 1), row([*second, 14], 1)]
    assert [e.shared for e in share_prompts(rows)] == [0, 5, 0, 6]  # 2 for the third would be 2 for the fourth
    mixed = [rows[0], row([*second, 13], 1, 1), rows[1], row([*second, 14], 1, 1)]
    assert [e.shared for e in share_prompts(mixed)] == [0, 0, 5, 6], "units that take turns are told apart"
    short = [row([1, 2, 3, n, n, 20 + k], 1) for n in (4, 5) for k in (0, 1)]
    assert [e.shared for e in share_prompts(short)] == [0, 4, 2, 2], "as much is saved, and the last whole one stays"


def test_more_pairs_fit_into_a_micro_batch() -> None:
    rows = [e for number in range(4) for e in unit(number, 41, 10, 10)]
    assert (positions(rows), positions(share_prompts(rows))) == (400, 240)
    assert (len(pack(rows, tokens=120)), len(pack(share_prompts(rows), tokens=120))) == (4, 2)


def test_attention_looks_back_at_the_shared_prompt() -> None:
    """All scores equal: each position gets the mean of the values that it sees."""

    def attend(**options: Any) -> list[float]:
        value = torch.tensor([2.0, 4.0, 6.0, 10.0, 30.0, 60.0])[None, None, :, None].expand(1, 1, 6, 2)
        zeros, docs = torch.zeros(1, 1, 6, 2), Documents(lengths=(1, 2, 2, 1), shared=(0, 0, 1, 2))
        return attention(torch.nn.Module(), zeros, zeros, value, None, documents=docs, **options)[0][
            0, :, 0, 0
        ].tolist()

    # positions 3 and 4 also see the first position of the second document; position 5 sees both of its positions
    assert attend() == pytest.approx([2, 4, 5, 7, 44 / 3, 70 / 3])
    assert attend(sliding_window=2) == pytest.approx([2, 4, 5, 7, 20, 33])
    assert attend(s_aux=torch.zeros(1)) == pytest.approx([1, 2, 10 / 3, 14 / 3, 11, 17.5])


# That nothing else changes --------------------------------------------------------------------------------------------


def model(world: World, method: str) -> Built:
    """A tiny llama, with adapters that change it where the method needs a reference."""
    adapter, recipe = (ADAPTER if "dpo" in method else None), Model(id="-", family="llama", dtype="float32", tiny=True)
    config = plan_config(recipe, None, vocab=VOCAB)
    built = build(recipe, adapter, config, None, world=world, parallel=Parallel(), seed=0, say=lambda _: None)
    for i, (name, p) in enumerate(optim.trained(built.policy.scorer.model).items()):
        if "lora_B" in name:
            dist.copy_into(p, torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 0.2)
    return built


def one_step(
    method: Method, policy: Policy, world: World, tokens: int
) -> tuple[dict[str, Tensor], dict[str, Tensor], Any]:
    """Loss and numbers of a step, every gradient, and the step's plan."""
    policy.scorer.zero_grad(set_to_none=True)
    plan = step.plan(PAIRS, method, policy, world, tokens=tokens)
    out = step.reduce(step.run(plan, method, policy, world, backward=True), world)
    grads = {n: whole(p.grad).clone() for n, p in optim.trained(policy.scorer.model).items() if p.grad is not None}
    return {"loss": out.loss, **out.sums}, grads, plan


@pytest.mark.parametrize("name", METHODS)
def test_loss_numbers_and_gradients_are_those_of_whole_pairs(world: World, name: str) -> None:
    policy = model(world, name).policy
    assert policy.layout.shared
    padded = evolve(policy, layout=Layout(kind="padded", attention=policy.layout.attention))
    apart = evolve(policy, layout=evolve(policy.layout, shared=False))
    expected, expected_grads, whole_plan = one_step(METHODS[name], apart, world, 512)
    assert max(float(g.abs().max()) for g in expected_grads.values()) > 1e-3
    for tried, tokens in ((policy, 512), (policy, 60), (padded, 512)):
        numbers, grads, plan = one_step(METHODS[name], tried, world, tokens)
        torch.testing.assert_close(numbers, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(grads, expected_grads, atol=1e-6, rtol=1e-5)
        assert plan.counts.tokens == whole_plan.counts.tokens
        # 19 + 6 + 29 + 0 + 4 positions of prompts are not forwarded again
        assert plan.counts.inputs == whole_plan.counts.inputs - (58 if tried is policy else 0)
        assert (len(plan.batches) > 1) == (tokens == 60)


def test_a_reference_that_cannot_share_keeps_whole_pairs(world: World) -> None:
    policy = model(world, "dpo").policy
    other = evolve(policy, layout=Layout(kind="padded", attention=policy.layout.attention))
    plan = step.plan(PAIRS, METHODS["dpo"], evolve(policy, reference=other), world, tokens=512)
    assert all(batch.shared == () for batch in plan.batches)


def logps(scorer: Scorer, examples: list[Example], layout: Layout) -> tuple[list[Tensor], list[Tensor]]:
    """Trained log-probs of each example, and the gradient of every parameter of a weighted sum of them."""
    batch: Batch = collate(share_prompts(examples) if layout.shared else examples)
    logp_N = scorer(batch, layout)["logp_T"][batch.trained_N]
    weight_N = torch.randn(logp_N.shape, generator=torch.Generator().manual_seed(0))
    mine = [p for p in scorer.parameters() if p.requires_grad]
    grads = torch.autograd.grad((logp_N * weight_N).sum(), mine, allow_unused=True)
    return [logp_N.detach()], [g for g in grads if g is not None]


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gemma3_text", "gpt_oss", "deepseek_v3"])
def test_families_and_groups_of_answers(name: str) -> None:
    """Dense, experts, windows of 16 that prompts are longer than, sinks, latent attention; units of one to six, of
    which the last two have another prompt that begins alike.
    """
    scorer = Scorer(family(name))
    layout, report = leak.check(scorer)
    assert layout.shared and report.sharing is not None and report.sharing.ok
    four, other = unit(0, 40, 5, 9, 3, 12), unit(4, 20, 5, 9)
    two = [evolve(e, unit=0, tokens_L=np.concatenate([four[0].tokens_L[:6], e.tokens_L[6:]])) for e in other]
    rows = [*four, *two, *unit(1, 3, 4), *unit(2, 9, 30, 2), *unit(3, 1, 2, 3)]
    assert [e.shared for e in share_prompts(rows)] == [0, 39, 39, 39, 0, 19, 0, 0, 8, 0, 0]
    expected, expected_grads = logps(scorer, rows, evolve(layout, shared=False))
    found, grads = logps(scorer, rows, layout)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, wanted, atol=1e-5 * float(1 + wanted.abs().max()), rtol=0)


# Where it is off ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "why"),
    [
        ("qwen3_5_moe_text", {}, "recurrent layers cannot look back"),
        ("llama", {"attention": "sdpa"}, "not ft's own"),
        ("llama", {"requested": "padded"}, "rows are padded"),
    ],
)
def test_layouts_that_cannot_share_say_so(name: str, options: Any, why: str) -> None:
    layout, report = leak.check(Scorer(family(name)), **options)
    assert not layout.shared and report.sharing is None
    assert why in report.lines()[-1]
    with pytest.raises(AssertionError, match="forwards each prompt"):
        Scorer(family(name))(collate(share_prompts(PAIRS)), layout)


@pytest.mark.parametrize("fault", ["forgets the prompt", "forgets its gradient", "sees the other answer"])
def test_the_check_refuses_what_is_not_the_same(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """Sharing is tried by itself: a fault of its own turns it off, and packing stays."""
    right = documents._seen

    def wrong(parts: list[Tensor], shared: list[int]) -> list[Tensor]:
        seen = right(parts, shared)
        for i, n in enumerate(shared):
            if n and fault == "forgets the prompt":
                seen[i] = torch.cat([torch.zeros_like(seen[i][:, :, :n]), parts[i]], 2)
            if n and fault == "forgets its gradient":
                seen[i] = torch.cat([seen[i][:, :, :n].detach(), parts[i]], 2)
            if n and fault == "sees the other answer":
                seen[i] = torch.cat([seen[i][:, :, : n - 1], parts[1][:, :, -1:], parts[i]], 2)
        return seen

    monkeypatch.setattr(documents, "_seen", wrong)
    layout, report = leak.check(Scorer(family("llama")))
    assert layout.kind == "packed" and not layout.shared
    assert report.sharing is not None and not report.sharing.ok
    assert "sharing it does not give the same" in report.lines()[-1]
    assert (report.sharing.leak > 0) == (fault == "sees the other answer")
    assert (report.sharing.gap > report.sharing.tolerance) == (fault != "forgets its gradient")
