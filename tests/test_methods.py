"""Methods on a tiny model: values and gradients by hand, however a step is split; what is refused."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from attrs import evolve
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from ft import CPO, DPO, ORPO, SFT, Data, LoRA, Model, Recipe, SimPO, dist, losses
from ft.data.pack import collate
from ft.dist import World, whole
from ft.errors import DataError, RecipeError
from ft.methods.dpo import Divergence, Kind
from ft.models.build import Built, build, plan_config
from ft.models.reference import reference_logps
from ft.recipe import Parallel, dump, override, restore
from ft.train import optim, step
from ft.types import Batch, Context, Counts, Example, LogProbs, LossOutput, Method

VOCAB = 96
TINY = Model(id="-", family="llama", dtype="float32", tiny=True)
ADAPTER = LoRA(r=4, alpha=8.0)
RPO = DPO(kind={"sigmoid": 1.0, "sft": 0.5})
SORTED = {kind: DPO(beta=0.5, kind=kind) for kind in ("aot", "aot_unpaired")}  # they want their own examples
METHODS: dict[str, Any] = {
    "dpo": DPO(beta=0.5),
    "rpo": RPO,
    "ipo": DPO(kind="ipo"),
    "ld-dpo": DPO(shared_length=0.5),
    "wpo": DPO(beta=0.5, wpo=True),
    "orpo": ORPO(),
    "simpo": SimPO(),
    "cpo": CPO(),
}


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    torch.set_num_threads(1)
    with dist.launched() as made:
        yield made


def model(world: World, adapter: LoRA | None = ADAPTER, *, moved: bool = True) -> Built:
    """A tiny llama; ``moved``: with adapters that change it, as if it had been trained for a while."""
    config = plan_config(TINY, None, vocab=VOCAB)
    built = build(TINY, adapter, config, None, world=world, parallel=Parallel(), seed=0, say=lambda _: None)
    for i, (name, p) in enumerate(optim.trained(built.policy.scorer.model).items()):
        if moved and "lora_B" in name:
            dist.copy_into(p, torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 0.2)
    return built


def pair(unit: int, prompt: int, *answers: int) -> list[Example]:
    """Two random answers of so many tokens to one random prompt, of which nothing is trained."""
    rng = np.random.default_rng(unit)
    start = rng.integers(0, VOCAB, prompt)
    ends = [rng.integers(0, VOCAB, n) for n in answers]
    return [
        Example(
            tokens_L=np.concatenate([start, end]).astype(np.int32),
            mask_L=np.arange(prompt + len(end)) >= prompt,
            unit=unit,
            source=f"rows:{unit}",
        )
        for end in ends
    ]


PAIRS = [*pair(0, 4, 5, 9), *pair(1, 7, 2, 1), *pair(2, 3, 12, 4), *pair(3, 2, 6, 6), *pair(4, 5, 3, 8)]


def one_step(
    method: Method, built: Built, world: World, *, tokens: int = 512, examples: list[Example] | None = None
) -> tuple[LossOutput, dict[str, Tensor], int]:
    """Loss and sums of a step, every gradient, and the number of its micro-batches."""
    scorer = built.policy.scorer
    scorer.zero_grad(set_to_none=True)
    plan = step.plan(examples or PAIRS, method, built.policy, world, tokens=tokens)
    out = step.reduce(step.run(plan, method, built.policy, world, backward=True), world)
    grads = {n: whole(p.grad).clone() for n, p in optim.trained(scorer.model).items() if p.grad is not None}
    return out, grads, len(plan.batches)


# By transformers, one sequence at a time ------------------------------------------------------------------------------


def oracle(built: Built, examples: list[Example] = PAIRS) -> tuple[dict[str, Tensor], list[Tensor], list[Tensor]]:
    """Adapter leaves, and log-prob sums of the examples' answers under policy and base by transformers' own logits.

    The policy is the plain model with W + scaling B A put in the place of each adapted W.
    """
    plain = AutoModelForCausalLM.from_config(built.policy.config, dtype=torch.float32, attn_implementation="eager")
    state = {n: whole(p).detach().clone() for n, p in built.policy.scorer.model.named_parameters()}
    leaves = {n: state.pop(n).requires_grad_() for n in list(state) if "lora_" in n}
    base = {n.replace(".base_layer", ""): p for n, p in state.items()}
    policy = dict(base)
    for name, B in leaves.items():
        if "lora_B" in name:
            A = leaves[name.replace("lora_B", "lora_A")]
            weight = name.replace("lora_B.default.", "")
            policy[weight] = base[weight] + ADAPTER.alpha / ADAPTER.r * B @ A

    def total(weights: dict[str, Tensor], example: Example) -> Tensor:
        tokens_L = torch.from_numpy(example.tokens_L).long()
        found: Any = torch.func.functional_call(plain, weights, (tokens_L[None, :-1],), {"use_cache": False})
        logp_LV = found.logits[0].log_softmax(-1)
        return logp_LV.gather(1, tokens_L[1:, None])[:, 0][torch.from_numpy(example.mask_L[1:])].sum()

    return leaves, [total(policy, e) for e in examples], [total(base, e).detach() for e in examples]


def test_dpo_is_the_formula_on_the_logits_of_transformers(world: World) -> None:
    built = model(world)
    leaves, policy, base = oracle(built)
    rewards = [0.5 * (p - b) for p, b in zip(policy, base, strict=True)]
    margins = torch.stack([w - l for w, l in zip(rewards[::2], rewards[1::2], strict=True)])
    loss = -F.logsigmoid(margins).mean()
    expected = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    assert margins.abs().min() > 0.01, "policy and reference differ"

    out, grads, _ = one_step(DPO(beta=0.5), built, world)
    torch.testing.assert_close(out.loss.float(), loss.detach(), rtol=1e-5, atol=1e-6)
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-6)
    sums = {name: float(value) for name, value in out.sums.items()}
    assert sums["rewards/chosen"] == pytest.approx(float(torch.stack(rewards[::2]).detach().mean()), abs=1e-5)
    assert sums["rewards/rejected"] == pytest.approx(float(torch.stack(rewards[1::2]).detach().mean()), abs=1e-5)
    assert sums["rewards/margins"] == pytest.approx(float(margins.detach().mean()), abs=1e-5)
    assert sums["rewards/accuracies"] == pytest.approx(float((margins > 0).float().mean()))
    assert sums["logps/chosen"] == pytest.approx(float(torch.stack(policy[::2]).detach().mean()), rel=1e-5)
    assert (sums["lengths/chosen"], sums["lengths/rejected"]) == pytest.approx((28 / 5, 28 / 5))


def test_methods_without_a_reference_are_their_formulas_on_the_logits_of_transformers(world: World) -> None:
    built = model(world)
    _, policy, _ = oracle(built)
    n = torch.tensor([float(e.mask_L.sum()) for e in PAIRS])
    sums = torch.stack(policy).detach()
    (w, l), (mean_w, mean_l) = (sums[::2], sums[1::2]), ((sums / n)[::2], (sums / n)[1::2])
    nll = -w.sum() / n[::2].sum()
    odds = mean_w - mean_l - torch.log1p(-mean_w.exp()) + torch.log1p(-mean_l.exp())
    expected = {
        ORPO(beta=0.3): nll - 0.3 * F.logsigmoid(odds).mean(),
        SimPO(beta=3.0, gamma=0.5): -F.logsigmoid(3 * (mean_w - mean_l) - 0.5).mean(),
        CPO(beta=0.2): nll - F.logsigmoid(0.2 * (w - l)).mean(),
        CPO(beta=0.2, sft=0.0): -F.logsigmoid(0.2 * (w - l)).mean(),
    }
    for method, value in expected.items():
        out, _, _ = one_step(method, built, world)
        torch.testing.assert_close(out.loss.float(), value, rtol=1e-5, atol=1e-6)


def test_a_margin_of_the_row_moves_the_zero_of_the_loss(world: World) -> None:
    built = model(world)
    _, policy, base = oracle(built)
    rewards = torch.stack([0.5 * (p - b) for p, b in zip(policy, base, strict=True)]).detach()
    margins = [evolve(e, margin=1.0 + e.unit) for e in PAIRS]  # type: ignore[operator]
    expected = -F.logsigmoid(rewards[::2] - rewards[1::2] - torch.arange(1.0, 6.0)).mean()
    method = DPO(beta=0.5, margin=True)
    out, _, _ = one_step(method, built, world, examples=margins)
    torch.testing.assert_close(out.loss.float(), expected, rtol=1e-5, atol=1e-6)
    assert list(method.examples(0, Context(data=Rows(margins), examples=5, seed=0))) == margins
    with pytest.raises(DataError, match=r"rows:0: this method asks for a margin"):
        method.examples(0, Context(data=Rows(PAIRS), examples=5, seed=0))
    assert not accepted(DPO, kind="ipo", margin=True)


def test_the_likelihood_term_is_a_mean_over_chosen_tokens(world: World) -> None:
    built = model(world)
    _, policy, _ = oracle(built)
    nll = -torch.stack(policy[::2]).sum() / 28
    with_term, _, _ = one_step(RPO, built, world)
    without, _, _ = one_step(DPO(), built, world)
    assert float(with_term.loss - without.loss) == pytest.approx(0.5 * float(nll.detach()), rel=1e-5)
    assert float(with_term.sums["loss/sft"]) == pytest.approx(float(nll.detach()), rel=1e-5)


# However a step is split ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_loss_gradient_and_numbers_do_not_depend_on_the_micro_batches(world: World, name: str) -> None:
    built = model(world)
    whole_step, grads, batches = one_step(METHODS[name], built, world)
    split_step, split_grads, more = one_step(METHODS[name], built, world, tokens=30)
    assert (batches, more) == (1, 3)
    torch.testing.assert_close(split_step.loss, whole_step.loss, rtol=1e-5, atol=1e-6)
    assert any(grad.abs().max() > 1e-3 for grad in grads.values())
    for key, grad in grads.items():
        torch.testing.assert_close(split_grads[key], grad, rtol=1e-4, atol=1e-6)
    assert split_step.sums.keys() == whole_step.sums.keys()
    for key, value in whole_step.sums.items():
        torch.testing.assert_close(split_step.sums[key], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_an_idle_rank_has_a_zero_with_a_graph(world: World, name: str) -> None:
    built, method = model(world), METHODS[name]
    built.policy.scorer.zero_grad(set_to_none=True)
    filler = method.prepare(collate([]), built.policy)
    counts = step.plan(PAIRS, method, built.policy, world, tokens=512).counts
    plan = step.Plan(batches=(filler,), counts=counts, forwarded=torch.zeros(()))
    out = step.run(plan, method, built.policy, world, backward=True)
    assert float(out.loss) == 0.0
    assert all(float(value) == 0.0 for value in out.sums.values())
    parameters = optim.trained(built.policy.scorer.model)
    assert all(p.grad is not None and not whole(p.grad).any() for p in parameters.values())


def together(method: DPO, tokens: int | None = None, examples: list[Example] = PAIRS) -> list[Example]:
    """The pairs of a step as a method wants them that compares them with each other."""
    return list(method.examples(0, Context(data=Rows(examples), examples=5, seed=0, tokens=tokens)))


def on_three_ranks(folder: Path) -> None:
    """What each rank runs: a step of every method, in one micro-batch (two ranks are idle) and in three."""
    torch.set_num_threads(1)
    with dist.launched() as world:
        built = model(world)
        for (name, method), tokens in itertools.product(METHODS.items(), (512, 40)):
            out, grads, batches = one_step(method, built, world, tokens=tokens)
            assert (world.size, batches) == (3, 1)
            kept(folder / f"{name}-{tokens}", out, grads, world)
        for name, method in SORTED.items():
            out, grads, _ = one_step(method, built, world, examples=together(method))
            kept(folder / f"{name}-512", out, grads, world)


def kept(path: Path, out: LossOutput, grads: dict[str, Tensor], world: World) -> None:
    if world.first:
        found = {"loss": out.loss, **{f"sums/{k}": v for k, v in out.sums.items()}, **grads}
        save_file({k: v.float().contiguous() for k, v in found.items()}, path)


def test_loss_gradient_and_numbers_do_not_depend_on_the_ranks(world: World, tmp_path: Path) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    command = [sys.executable, *launcher, __file__, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-4000:]
    built = model(world)
    cases = [(name, method, PAIRS, tokens) for (name, method) in METHODS.items() for tokens in (512, 40)]
    cases += [(name, method, together(method), 512) for name, method in SORTED.items()]
    for name, method, examples, tokens in cases:
        out, grads, _ = one_step(method, built, world, examples=examples)
        expected = {"loss": out.loss, **{f"sums/{k}": v for k, v in out.sums.items()}, **grads}
        found = load_file(tmp_path / f"{name}-{tokens}")
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(
                found[key], value.float(), rtol=1e-4, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}"
            )


# Training -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sigmoid", "robust", "sigmoid_norm"])
def test_the_first_loss_of_dpo_is_log_2(world: World, kind: Kind) -> None:
    out, _, _ = one_step(DPO(kind=kind), model(world, moved=False), world)
    assert float(out.loss) == pytest.approx(np.log(2), abs=1e-7)
    assert float(out.sums["rewards/margins"]) == 0.0


@pytest.mark.parametrize("name", METHODS)
def test_training_raises_the_accuracy_to_1(world: World, name: str) -> None:
    built = model(world, moved=False)
    optimizer = torch.optim.AdamW(optim.trained(built.policy.scorer.model).values(), lr=1e-2)
    pairs = [e for i in range(5) for e in pair(i, 4, 6, 6)]
    outs = []
    for _ in range(15):
        outs.append(one_step(METHODS[name], built, world, examples=pairs)[0])
        optimizer.step()
    assert float(outs[0].sums["rewards/accuracies"]) < 1
    assert float(outs[-1].sums["rewards/accuracies"]) == 1
    assert float(outs[-1].loss) < 0.8 * float(outs[0].loss)


# The reference --------------------------------------------------------------------------------------------------------


def test_the_reference_is_the_base_without_dropout_and_leaves_the_policy_as_it_was(world: World) -> None:
    built, fresh = model(world), model(world, moved=False)
    policy, batch = built.policy, collate(PAIRS)
    policy.scorer.train()
    before = step.logprobs(policy, batch).logp_T
    ref_T = reference_logps(policy, batch)
    assert policy.scorer.training and not ref_T.requires_grad
    torch.testing.assert_close(ref_T, step.logprobs(fresh.policy, batch).logp_T.detach())
    torch.testing.assert_close(step.logprobs(policy, batch).logp_T, before)
    assert (before - ref_T).abs().max() > 0.01

    with_dropout = model(world, evolve(ADAPTER, dropout=0.5)).policy
    with_dropout.scorer.train()
    torch.testing.assert_close(reference_logps(with_dropout, batch), ref_T)


def test_full_fine_tuning_has_no_reference_and_says_what_to_do(world: World) -> None:
    built = model(world, None)
    with pytest.raises(RecipeError, match=r"(?s)adapter: .*keeps none.*adapter=LoRA.*SimPO, ORPO or CPO"):
        one_step(DPO(), built, world)
    one_step(SimPO(), built, world)


# Rows that are not pairs ----------------------------------------------------------------------------------------------


class Rows:
    """A dataset of examples as they are."""

    fingerprint = ""

    def __init__(self, examples: list[Example]):
        self.examples = examples

    @property
    def rows(self) -> int:
        return len(self.examples)

    def row(self, index: int) -> list[Example]:
        return [self.examples[index]]

    def draw(self, step: int, n: int, seed: int) -> list[Example]:
        return self.examples


def drawn(examples: list[Example]) -> list[Example]:
    return list(DPO().examples(0, Context(data=Rows(examples), examples=2, seed=0)))


def test_rows_without_their_other_answer_are_refused_where_they_are_drawn() -> None:
    assert drawn(PAIRS) == PAIRS
    alone = [evolve(e, unit=None) for e in PAIRS]
    for examples in (alone, PAIRS[:5], [*PAIRS[:4], evolve(PAIRS[4], unit=1)]):
        with pytest.raises(DataError, match=r"rows:\d: this method learns from pairs"):
            drawn(examples)


@pytest.mark.parametrize("name", METHODS)
def test_held_out_rows_that_are_not_pairs_are_refused_too(world: World, name: str) -> None:
    policy = model(world).policy
    apart = [evolve(e, unit=None, source=f"rows:{i}") for i, e in enumerate(PAIRS[:4])]
    for examples in (PAIRS[:3], apart):
        with pytest.raises(DataError, match=r"rows:\d: this method learns from pairs"):
            METHODS[name].prepare(collate(examples), policy)


# Options --------------------------------------------------------------------------------------------------------------

OPTIONS: list[dict[str, Any]] = [
    {},
    {"label_smoothing": 0.1},
    {"label_smoothing": 0.5},
    *({"divergence": name} for name in get_args(Divergence)),
    {"divergence": "alpha", "alpha": 0.5},
    {"alpha": 0.5},
    {"tau": 0.5},
    {"tau": 2.0},
    {"beta": 0.0},
]


def accepted(function: Any, **options: Any) -> bool:
    try:
        function(**options)
    except ValueError:
        return False
    return True


def test_dpo_accepts_in_a_recipe_what_its_loss_accepts() -> None:
    x_P = torch.zeros(2)

    def loss(**options: Any) -> LossOutput:
        return losses.dpo(x_P, x_P, x_P, x_P, lengths=(x_P + 1, x_P + 1), **options)

    kinds = [*get_args(Kind), {"sigmoid": 1.0, "hinge": 1.0}, {"exo_pair": 1.0, "sft": 1.0}, {"sft": 1.0, "ipo": 2.0}]
    verdicts = {True: 0, False: 0}
    for kind, options in itertools.product(kinds, OPTIONS):
        fits = accepted(loss, kind=kind, **options)
        assert accepted(DPO, kind=kind, **options) == fits, (kind, options)
        verdicts[fits] += 1
    assert min(verdicts.values()) > 40
    for name in ("sft", {"sft": 1.0}, {"sigmoid": -1.0}, {}, "sigmiod"):
        assert not accepted(DPO, kind=name), name


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (SFT, {"kind": "dtf"}),
        (ORPO, {"beta": -1.0}),
        (SimPO, {"beta": 0.0}),
        (SimPO, {"label_smoothing": 0.5}),
        (CPO, {"kind": "ipo", "label_smoothing": 0.1}),
        (CPO, {"kind": "robust"}),
        (CPO, {"sft": -1.0}),
        (DPO, {"shared_length": 1.5}),
        (DPO, {"kind": "aot", "wpo": True}),
        (DPO, {"kind": {"sigmoid": 1.0, "aot_unpaired": 1.0}, "wpo": True}),
        (DPO, {"wpo_cap": 1.0}),
        (DPO, {"wpo": True, "wpo_cap": 0.0}),
    ],
)
def test_other_options_are_refused(cls: type, options: dict[str, Any]) -> None:
    assert not accepted(cls, **options)


def test_methods_survive_json_and_say_which_option_is_wrong() -> None:
    for method in (*METHODS.values(), SFT(kind="dft")):
        recipe = Recipe(model=Model(id="a/b"), data=Data(train="a.jsonl"), method=method)
        assert restore(dump(recipe)) == recipe
    recipe = Recipe(model=Model(id="a/b"), data=Data(train="a.jsonl"), method=DPO())
    assert override(recipe, ["method.kind=ipo", "method.beta=0.2"]).method == DPO(kind="ipo", beta=0.2)
    with pytest.raises(RecipeError, match=r"method\.tau: must be left alone without discopop"):
        override(recipe, ["method.tau=0.1"])


# Supervised fine-tuning -----------------------------------------------------------------------------------------------


def test_dynamic_fine_tuning_weighs_each_token_by_its_probability() -> None:
    p_T = torch.tensor([0.5, 0.25, 0.9])
    batch: Batch = collate([Example(tokens_L=np.arange(4, dtype=np.int32), mask_L=np.array([0, 1, 1, 0], bool))])
    scored = LogProbs(logp_T=p_T.log())
    out = SFT(kind="dft").loss(scored, batch, Counts(tokens=4))
    assert float(out.loss) == pytest.approx(-(0.5 * np.log(0.5) + 0.25 * np.log(0.25)) / 4)
    assert float(SFT().loss(scored, batch, Counts(tokens=4)).loss) == pytest.approx(-np.log(0.125) / 4)


def test_supervised_fine_tuning_refuses_answers_that_may_be_bad() -> None:
    rated = [evolve(e, unit=None, label=1.0) for e in PAIRS]
    good = [evolve(e, unit=None) for e in PAIRS]
    assert SFT().examples(0, Context(data=Rows(good), examples=2, seed=0)) == good
    for examples, what in ((PAIRS, "a pair of answers"), (rated, "a rated answer")):
        with pytest.raises(DataError, match=f"rows:0: this row holds answers that are not .*(?s:.*){what}"):
            SFT().examples(0, Context(data=Rows(examples), examples=2, seed=0))


if __name__ == "__main__":
    on_three_ranks(Path(sys.argv[1]))
