"""DPO's kinds that compare pairs with each other, and WPO's weights, by hand on a tiny model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_methods import ADAPTER, METHODS, PAIRS, SORTED, model, one_step, oracle, pair, together, world
from torch import Tensor
from transformers import AutoModelForCausalLM

from ft import DPO
from ft.data.pack import collate
from ft.dist import World, whole
from ft.errors import DataError, RecipeError
from ft.models.build import Built
from ft.train import optim, step

__all__ = ["world"]  # the fixture
EVEN = [e for i in range(5) for e in pair(i, 4, 6, 6)]


# Pairs compared with each other ---------------------------------------------------------------------------------------


def test_aot_sorts_the_pairs_of_a_step(world: World) -> None:
    built = model(world)
    _, policy_S, base_S = oracle(built, EVEN)
    policy, base = torch.stack(policy_S).detach(), torch.stack(base_S)
    gap, ref_gap, x = policy[::2] - policy[1::2], base[::2] - base[1::2], policy - base
    assert gap.argsort().tolist() != ref_gap.argsort().tolist(), "pairs of the two sorted lists are others"
    assert x[::2].argsort().tolist() != x[1::2].argsort().tolist()
    z = {
        "aot": gap.sort().values - ref_gap.sort().values,
        "aot_unpaired": x[::2].sort().values - x[1::2].sort().values,
    }
    for name, method in SORTED.items():
        out, _, batches = one_step(method, built, world, examples=together(method, examples=EVEN))
        assert batches == 1
        torch.testing.assert_close(out.loss.float(), -F.logsigmoid(0.5 * z[name]).mean(), rtol=1e-5, atol=1e-6)
        assert float(out.sums["rewards/margins"]) == pytest.approx(0.5 * float((gap - ref_gap).mean()), abs=1e-5)
        assert float(out.sums["rewards/accuracies"]) == pytest.approx(float((gap > ref_gap).float().mean()))
        assert float(out.sums["lengths/chosen"]) == pytest.approx(6.0)


def test_aot_beside_likelihood_is_a_mean_over_pairs_and_one_over_tokens(world: World) -> None:
    built, method = model(world), DPO(beta=0.5, kind={"aot": 1.0, "sft": 0.5})
    mixed, _, _ = one_step(method, built, world, examples=together(method))
    alone, _, _ = one_step(SORTED["aot"], built, world, examples=together(SORTED["aot"]))
    nll = -torch.stack(oracle(built)[1][::2]).sum() / 28
    torch.testing.assert_close(mixed.loss.float(), alone.loss.float() + 0.5 * nll.detach(), rtol=1e-5, atol=1e-6)


def test_pairs_to_be_sorted_that_do_not_fit_into_a_micro_batch_are_refused(world: World) -> None:
    positions = sum(len(e) - 1 for e in PAIRS)
    least = positions - sum(n - 1 for n in (4, 7, 3, 2, 5))  # of the second answers' prompts only the last token
    for method in SORTED.values():
        with pytest.raises(
            RecipeError, match=rf"batch\.tokens: .*(?s:.*)5 pairs, which take {least} (?s:.*)eval\.examples"
        ):
            together(method, tokens=least - 1)
        examples = together(method, tokens=least)
        with pytest.raises(DataError, match="unit of 10 examples, which must share a batch"):  # prompts not shared
            step.packs_of(examples, model(world).policy, world, tokens=least)
        assert len(step.packs_of(examples, model(world).policy, world, tokens=positions)) == 1
    assert together(DPO(), tokens=8) == PAIRS, "other kinds do not mind"


def test_an_idle_rank_has_nothing_to_sort(world: World) -> None:
    for method in SORTED.values():
        built = model(world)
        counts = step.plan(together(method), method, built.policy, world, tokens=512).counts
        plan = step.Plan(batches=(method.prepare(collate([]), built.policy),), counts=counts, forwarded=torch.zeros(()))
        out = step.run(plan, method, built.policy, world, backward=True)
        assert float(out.loss) == 0.0 and all(float(value) == 0.0 for value in out.sums.values())
        parameters = optim.trained(built.policy.scorer.model).values()
        assert all(p.grad is not None and not whole(p.grad).any() for p in parameters)


# Weights --------------------------------------------------------------------------------------------------------------


def merged(built: Built) -> tuple[Any, dict[str, Tensor]]:
    """The plain model, and the weights with which it is the policy."""
    plain = AutoModelForCausalLM.from_config(built.policy.config, dtype=torch.float32, attn_implementation="eager")
    state = {n: whole(p).detach().clone() for n, p in built.policy.scorer.model.named_parameters()}
    leaves = {n: state.pop(n) for n in list(state) if "lora_" in n}
    weights = {n.replace(".base_layer", ""): p for n, p in state.items()}
    for name, B in leaves.items():
        if "lora_B" in name:
            A = leaves[name.replace("lora_B", "lora_A")]
            weights[name.replace("lora_B.default.", "")] += ADAPTER.alpha / ADAPTER.r * B @ A
    return plain, weights


def weights_by_hand(built: Built) -> Tensor:
    """weight_P: over a pair's answers, the product of exp(mean of log p(token) - log sum_v p(v)^2)."""
    plain, weights = merged(built)
    terms = []
    for example in PAIRS:
        tokens_L, mask_L = torch.from_numpy(example.tokens_L).long(), torch.from_numpy(example.mask_L[1:])
        found: Any = torch.func.functional_call(plain, weights, (tokens_L[None, :-1],), {"use_cache": False})
        p_LV = found.logits[0].softmax(-1)[mask_L]
        terms.append((p_LV.gather(1, tokens_L[1:][mask_L][:, None])[:, 0] / p_LV.square().sum(-1)).log().mean())
    return torch.stack(terms).exp().reshape(5, 2).prod(1).detach()


def test_wpo_weighs_pairs_by_the_policy_s_own_probability_of_both_answers(world: World) -> None:
    built = model(world)
    weight_P = weights_by_hand(built)
    _, policy, base = oracle(built)
    reward = 0.5 * (torch.stack(policy) - torch.stack(base)).detach()
    loss_P = -F.logsigmoid(reward[::2] - reward[1::2])
    cap = float(weight_P.sort().values[2])
    for method, weight in ((METHODS["wpo"], weight_P), (DPO(beta=0.5, wpo=True, wpo_cap=cap), weight_P.clamp(max=cap))):
        out, _, _ = one_step(method, built, world)
        torch.testing.assert_close(out.loss.float(), (weight * loss_P).mean(), rtol=1e-5, atol=1e-6)
        assert float(out.sums["wpo_weight"]) == pytest.approx(float(weight.mean()), rel=1e-5)
    assert weight_P.std() > 0.01, "weights that do something"
    with_sft, _, _ = one_step(DPO(beta=0.5, wpo=True, kind={"sigmoid": 1.0, "sft": 0.5}), built, world)
    nll = -torch.stack(policy[::2]).sum().detach() / 28
    torch.testing.assert_close(with_sft.loss.float(), (weight_P * loss_P).mean() + 0.5 * nll, rtol=1e-5, atol=1e-6)
