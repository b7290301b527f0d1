"""Methods against TRL's trainers: the same rows, weights and reference; theirs padded, ours packed and split.

TRL's trainers are made without their constructors, which want data sets and folders; their loss functions run whole,
forwards included. BCO has no trainer in TRL 1.16: ``test_rated.py`` has it by hand. Shapes: B rows, W row width.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from attrs import evolve
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from ft import CPO, DPO, KTO, ORPO, Model, Reward, SimPO, dist
from ft.dist import World, whole
from ft.models.build import Built, build, plan_config
from ft.recipe import Parallel
from ft.train import optim, step
from ft.types import Context, Example, Given, LossOutput, Method, asked

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from trl.experimental.cpo.cpo_trainer import CPOTrainer
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer
    from trl.trainer.dpo_trainer import DPOTrainer
    from trl.trainer.kto_trainer import KTOTrainer
    from trl.trainer.reward_trainer import RewardTrainer
    from trl.trainer.utils import add_fused_lm_head

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
VOCAB, PAD = 96, 0
FUSED = ("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
TINY = Model(id="-", family="llama", dtype="float32", tiny=True)
METRICS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    torch.set_num_threads(1)
    with dist.launched() as made:
        yield made


def model(world: World, method: Method, seed: int = 0) -> Built:
    """A tiny llama, all weights trained, its matrices large enough for likely and unlikely tokens."""
    asks = asked(method)
    config = plan_config(TINY, None, vocab=VOCAB, asks=asks)
    built = build(TINY, None, config, None, world=world, parallel=Parallel(), seed=seed, say=lambda _: None, asks=asks)
    for i, p in enumerate(built.policy.scorer.parameters()):
        if p.ndim > 1:
            dist.copy_into(p, torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * seed + i)) * 0.15)
    return built


def plain(built: Built, kind: Any = AutoModelForCausalLM) -> Any:
    """The same weights in the class of transformers, with TRL's head that gives log-probs."""
    made: Any = kind.from_config(built.policy.config, dtype=torch.float32, attn_implementation="eager")
    made.load_state_dict({n: whole(p).detach() for n, p in built.policy.scorer.model.state_dict().items()})
    if kind is AutoModelForCausalLM:
        add_fused_lm_head(made, outputs=FUSED)
    return made


def pair(i: int, prompt: int, *answers: int) -> list[Example]:
    """Two answers of so many tokens to one prompt; token 0 is padding alone."""
    rng = np.random.default_rng(i)
    start = rng.integers(1, VOCAB, prompt)
    rows = [np.concatenate([start, rng.integers(1, VOCAB, n)]).astype(np.int32) for n in answers]
    return [
        Example(tokens_L=row, mask_L=np.arange(len(row)) >= prompt, unit=i, source=f"rows:{i}", margin=0.25 * i)
        for row in rows
    ]


PAIRS = [*pair(0, 4, 5, 9), *pair(1, 7, 2, 1), *pair(2, 3, 12, 4), *pair(3, 2, 6, 6), *pair(4, 5, 3, 8)]
RATED = [evolve(e, unit=None, margin=None, label=float(i % 3 != 1)) for i, e in enumerate(PAIRS[::2])]


def ours(
    method: Method, built: Built, world: World, examples: Sequence[Example] = PAIRS, *, tokens: int = 40
) -> tuple[LossOutput, dict[str, Tensor]]:
    """Loss, numbers and gradients of a step, packed into several micro-batches."""
    scorer = built.policy.scorer
    scorer.zero_grad(set_to_none=True)
    context = Context(data=Given(examples=examples), examples=5, seed=0, tokens=tokens)
    plan = step.plan(method.examples(0, context), method, built.policy, world, tokens=tokens)
    assert (len(plan.batches) > 1) == (tokens == 40)
    out = step.reduce(step.run(plan, method, built.policy, world, backward=True), world)
    return out, {n: whole(p.grad) for n, p in optim.trained(scorer.model).items() if p.grad is not None}


def agree(
    out: LossOutput,
    grads: dict[str, Tensor],
    loss: Tensor,
    theirs: Any,
    metrics: dict[str, float],
    names: Sequence[str],
) -> None:
    """Loss and every gradient to 1e-5, and the numbers under the names that both use."""
    torch.testing.assert_close(out.loss.float(), loss.detach(), rtol=1e-5, atol=1e-5)
    theirs.zero_grad(set_to_none=True)
    loss.backward()
    expected = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    assert grads.keys() == expected.keys() and max(float(g.abs().max()) for g in grads.values()) > 1e-3
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    for name in names:
        assert float(out.sums[name]) == pytest.approx(metrics[name], rel=1e-4, abs=1e-5), name


# Theirs ---------------------------------------------------------------------------------------------------------------


def trainer(cls: Any, **state: Any) -> Any:
    """A trainer of this class that was not constructed."""
    made = cls.__new__(cls)
    accelerator = SimpleNamespace(
        device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x, unwrap_model=lambda x: x, num_processes=1
    )
    fixed = {"accelerator": accelerator, "_metrics": {"train": defaultdict(list)}, "_total_train_tokens": 0}
    made.__dict__.update(fixed | {"_tp_size": 1, "aux_loss_enabled": False, "is_encoder_decoder": False} | state)
    return made


def padded(examples: Sequence[Example], prefix: str = "") -> dict[str, Tensor]:
    """Rows as TRL's collators lay them out, padded on the right: [B, W]."""
    width = max(len(e) for e in examples)

    def rows(part: Any, fill: int) -> Tensor:
        return torch.tensor([[*part(e), *[fill] * (width - len(e))] for e in examples])

    return {
        f"{prefix}input_ids": rows(lambda e: e.tokens_L.tolist(), PAD),
        f"{prefix}attention_mask": rows(lambda e: [1] * len(e), 0),
        f"{prefix}completion_mask": rows(lambda e: e.mask_L.astype(int).tolist(), 0),
    }


def chosen_first(examples: Sequence[Example] = PAIRS) -> list[Example]:
    return [*examples[::2], *examples[1::2]]


def dpo_trainer(policy: Any, reference: Any, **options: Any) -> Any:
    usual = {
        "beta": 0.3,
        "label_smoothing": 0.0,
        "ld_alpha": None,
        "use_weighting": False,
        "f_divergence_type": "reverse_kl",
        "loss_types": ["sigmoid"],
        "loss_weights": [1.0],
    }
    args = SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=0.05)
    fixed = {"model": policy, "ref_model": reference, "precompute_ref_logps": False, "args": args}
    return trainer(DPOTrainer, **fixed, **(usual | options))


DPO_OPTIONS: dict[str, tuple[DPO, dict[str, Any]]] = {
    "sigmoid": (DPO(beta=0.3), {}),
    "ipo": (DPO(beta=0.3, kind="ipo"), {"loss_types": ["ipo"]}),
    "aot": (DPO(beta=0.3, kind="aot"), {"loss_types": ["aot"]}),
    "aot_unpaired": (
        DPO(beta=0.3, kind="aot_unpaired", label_smoothing=0.1),
        {"loss_types": ["aot_unpaired"], "label_smoothing": 0.1},
    ),
    "wpo": (DPO(beta=0.3, wpo=True), {"use_weighting": True}),
    # not hinge, of which TRL's weights write over what its backward needs
    "wpo-ipo": (DPO(beta=0.3, wpo=True, kind="ipo"), {"use_weighting": True, "loss_types": ["ipo"]}),
    "ld-dpo": (DPO(beta=0.3, shared_length=0.4), {"ld_alpha": 0.4}),
    "mpo": (
        DPO(beta=0.3, kind={"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}),
        {"loss_types": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    ),
}


@pytest.mark.parametrize("name", DPO_OPTIONS)
def test_dpo(world: World, name: str) -> None:
    method, options = DPO_OPTIONS[name]
    built, other = model(world, method), model(world, method, seed=1)
    policy, reference = plain(built), plain(other).requires_grad_(False)
    theirs = dpo_trainer(policy, reference, **options)
    loss = theirs._compute_loss(policy, padded(chosen_first()), False)
    metrics = {key: values[-1] for key, values in theirs._metrics["train"].items()}
    built = evolve(built, policy=evolve(built.policy, reference=other.policy))
    out, grads = ours(method, built, world, tokens=512 if name.startswith("aot") else 40)
    agree(out, grads, loss, policy, metrics, METRICS)
    assert not method.wpo or abs(float(out.sums["wpo_weight"]) - 1) > 0.05, "weights that do something"


@pytest.mark.parametrize("kind", ["kto", "apo_zero_unpaired"])
def test_kto(world: World, kind: Any) -> None:
    method = KTO(beta=0.3, kind=kind, desirable=1.5, undesirable=0.7)
    built, other = model(world, method), model(world, method, seed=1)
    policy, reference = plain(built), plain(other).requires_grad_(False)
    theirs = trainer(
        KTOTrainer,
        model=policy,
        ref_model=reference,
        calculate_KL=kind == "kto",
        precompute_ref_logps=False,
        loss_type=kind,
        beta=0.3,
        desirable_weight=1.5,
        undesirable_weight=0.7,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
    )
    rotated = [with_answer_of(e, RATED[(i + 1) % len(RATED)]) for i, e in enumerate(RATED)]
    label = {"label": torch.tensor([e.label == 1 for e in RATED])}
    loss = theirs._compute_loss(policy, padded(RATED) | padded(rotated, "KL_") | label, False)
    metrics = {key: values[-1] for key, values in theirs._metrics["train"].items()}
    built = evolve(built, policy=evolve(built.policy, reference=other.policy))
    names = [name for name in METRICS if name != "rewards/accuracies"]
    agree(*ours(method, built, world, RATED), loss, policy, metrics, [*names, *(["kl"] if kind == "kto" else [])])


def with_answer_of(asked: Example, said: Example) -> Example:
    (asked_L, _), (said_L, answer_L) = ((e.tokens_L, e.mask_L) for e in (asked, said))
    tokens_L = np.concatenate([asked_L[~asked.mask_L], said_L[answer_L]])
    return Example(tokens_L=tokens_L, mask_L=np.arange(len(tokens_L)) >= (~asked.mask_L).sum())


def labelled() -> dict[str, Tensor]:
    """Pairs as the collator of CPO and ORPO gives them: -100 where a token is not trained."""
    found: dict[str, Tensor] = {}
    for side, examples in (("chosen", PAIRS[::2]), ("rejected", PAIRS[1::2])):
        rows = padded(examples, f"{side}_")
        mask_BW = rows.pop(f"{side}_completion_mask").bool()
        found |= rows | {f"{side}_labels": torch.where(mask_BW, rows[f"{side}_input_ids"], -100)}
    return found


CPO_OPTIONS: dict[str, tuple[Method, dict[str, Any]]] = {
    "cpo": (CPO(beta=0.2, sft=0.5), {"loss_type": "sigmoid", "beta": 0.2, "cpo_alpha": 0.5}),
    "cpo-hinge": (CPO(beta=0.2, kind="hinge", sft=0.0), {"loss_type": "hinge", "beta": 0.2, "cpo_alpha": 0.0}),
    # its gamma is divided by beta, and multiplied by it again
    "simpo": (SimPO(beta=2.0, gamma=0.6), {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.6, "cpo_alpha": 0.0}),
}


@pytest.mark.parametrize("name", CPO_OPTIONS)
def test_cpo_and_simpo(world: World, name: str) -> None:
    method, options = CPO_OPTIONS[name]
    built = model(world, method)
    policy = plain(built)
    usual = {"simpo_gamma": 0.0, "alpha": 0.0, "label_smoothing": 0.0, "pad_token_id": PAD}
    loss, metrics = trainer(CPOTrainer, **(usual | options)).get_batch_loss_metrics(policy, labelled())
    metrics["nll"] = metrics["nll_loss"]
    names = [*METRICS, *(["nll"] if options["cpo_alpha"] else [])]
    agree(*ours(method, built, world), loss, policy, metrics, names)


def test_orpo(world: World) -> None:
    """TRL's likelihood term is over prompt and answer; ours, as in every other method, over what the mask trains."""
    method = ORPO(beta=0.3)
    built = model(world, method)
    policy, batch = plain(built), labelled()
    theirs = trainer(ORPOTrainer, beta=0.3, padding_value=PAD)
    loss, metrics = theirs.get_batch_loss_metrics(policy, batch)
    logits_BWV = policy(batch["chosen_input_ids"], attention_mask=batch["chosen_attention_mask"]).logits[:, :-1]
    nll = {
        name: torch.nn.functional.cross_entropy(logits_BWV.flatten(0, 1), target_BW[:, 1:].flatten())
        for name, target_BW in {
            "answer": batch["chosen_labels"],
            "all": batch["chosen_input_ids"].where(batch["chosen_attention_mask"] == 1, -100),
        }.items()
    }
    assert metrics["nll_loss"] == pytest.approx(float(nll["all"].detach()), rel=1e-5)
    assert abs(float((nll["all"] - nll["answer"]).detach())) > 1e-3
    out, grads = ours(method, built, world)
    assert float(out.sums["nll"]) == pytest.approx(float(nll["answer"].detach()), rel=1e-5)
    metrics["log_odds"] = metrics["log_odds_chosen"]
    agree(out, grads, loss - nll["all"] + nll["answer"], policy, metrics, [*METRICS, "log_odds"])


@pytest.mark.parametrize("method", [Reward(), Reward(centring=0.01, margin=True)], ids=["plain", "margin"])
def test_reward(world: World, method: Reward) -> None:
    built = model(world, method)
    policy = plain(built, AutoModelForSequenceClassification)
    policy.config.pad_token_id = PAD
    theirs = trainer(RewardTrainer, model=policy, args=SimpleNamespace(center_rewards_coefficient=method.centring))
    batch = padded(chosen_first())
    del batch["completion_mask"]
    margin = {"margin": torch.tensor([e.margin for e in PAIRS[::2]])} if method.margin else {}
    loss = theirs.compute_loss(policy, batch | margin)
    metrics = {key: values[-1] for key, values in theirs._metrics["train"].items()}
    metrics |= {"rewards/accuracies": metrics["accuracy"], "rewards/margins": metrics["margin"]}
    agree(*ours(method, built, world), loss, policy, metrics, ["rewards/accuracies", "rewards/margins"])
