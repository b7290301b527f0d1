"""Preference losses as other libraries compute them, reached without a model: stubs stand for trainer and model.

``ROWS`` is the oracle table: each row names a loss, an option and an oracle, and holds our call and theirs, both from
the same leaf of per-token log-probs. ``difference(row)`` is the larger of the value's and the gradient's maximum
difference, relative where the number is above 1. Shapes: B = 2 P rows (chosen, then rejected), L token slots.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from attrs import frozen
from liger_kernel.chunked_loss.cpo_loss import LigerFusedLinearCPOFunction
from liger_kernel.chunked_loss.dpo_loss import LigerFusedLinearDPOFunction
from liger_kernel.chunked_loss.kto_loss import LigerFusedLinearKTOFunction
from liger_kernel.chunked_loss.orpo_loss import LigerFusedLinearORPOFunction
from liger_kernel.chunked_loss.simpo_loss import LigerFusedLinearSimPOFunction
from torch import Tensor

from ft.losses.pairs import dpo, ld_sums, wpo_weights
from ft.losses.preference import bco, cpo, kto, orpo, simpo
from ft.losses.reward import bradley_terry, stepwise
from ft.types import LossOutput

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from trl.experimental.cpo.cpo_trainer import CPOTrainer
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer
    from trl.trainer.dpo_trainer import DPOTrainer
    from trl.trainer.kto_trainer import KTOTrainer
    from trl.trainer.reward_trainer import RewardTrainer

# Their methods are called on stubs, as plain functions.
_dpo: Any = DPOTrainer
_kto: Any = KTOTrainer
_reward: Any = RewardTrainer
_cpo: Any = CPOTrainer
_orpo: Any = ORPOTrainer
torch.set_num_threads(1)  # the tensors are tiny
P, L, PROMPT = 5, 9, 2
LENGTHS_B = torch.tensor([7, 3, 5, 1, 4, 2, 6, 5, 7, 3])  # of the answers: chosen, then rejected
KL = torch.tensor([0.9, 0.1, -0.3, 0.5, 0.4, 0.2, -0.1, 0.6, 0.3, 0.7], dtype=torch.float64)  # mean 0.33
LABELS_B = torch.tensor([True, False, True, True, False, True, False, False, True, True])


def mask_BL() -> Tensor:
    """Where a token is scored: the prompt has 3 tokens, and the first of all is never predicted."""
    slot_L = torch.arange(L)
    return (slot_L >= PROMPT) & (slot_L < PROMPT + LENGTHS_B[:, None])


def leaf(dtype: torch.dtype = torch.float64) -> Tensor:
    """Per-token log-probs of the policy, 0 where nothing is scored, as a model with such a mask returns them."""
    return (_logps(1, dtype) * mask_BL()).requires_grad_()


def ref_B(dtype: torch.dtype = torch.float64) -> Tensor:
    return (_logps(2, dtype) * mask_BL()).sum(1)


def log_sum_sq_BL(dtype: torch.dtype = torch.float64) -> Tensor:
    return _logps(3, dtype)


def _logps(seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return -(torch.rand(2 * P, L, generator=generator, dtype=torch.float64) * 1.5 + 0.05).to(dtype)


# --- theirs ---------------------------------------------------------------------------------------------------------


def accelerator() -> SimpleNamespace:
    return SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x, num_processes=1)


def trl_dpo(logp_BL: Tensor, mixture: Mapping[str, float], **options: Any) -> tuple[Tensor, dict[str, float]]:
    """(loss, metrics) of ``DPOTrainer._compute_loss``."""
    ref = ref_B(logp_BL.dtype).chunk(2)
    if options.get("ld_alpha") is not None:
        ref = _ld(_logps(2, logp_BL.dtype), options["ld_alpha"]).chunk(2)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=accelerator(),
        ld_alpha=options.get("ld_alpha"),
        precompute_ref_logps=True,
        f_divergence_type=options.get("f", "reverse_kl"),
        f_alpha_divergence_coef=options.get("f_alpha", 0.5),
        loss_types=list(mixture),
        loss_weights=list(mixture.values()),
        beta=options.get("beta", 0.1),
        label_smoothing=options.get("label_smoothing", 0.0),
        args=SimpleNamespace(discopop_tau=options.get("tau", 0.05)),
        use_weighting=options.get("use_weighting", False),
        aux_loss_enabled=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = _inputs(logp_BL) | {"ref_chosen_logps": ref[0], "ref_rejected_logps": ref[1]}
    loss = _dpo._compute_loss(trainer, _model(logp_BL), inputs, False)
    return loss, {name: values[-1] for name, values in trainer._metrics["train"].items()}


def trl_kto(logp_BL: Tensor, kind: str = "kto", *, weights: tuple[float, float] = (1.0, 1.0)) -> Tensor:
    kl = KL.to(logp_BL.dtype)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=accelerator(),
        calculate_KL=kind == "kto",
        precompute_ref_logps=True,
        loss_type=kind,
        beta=0.1,
        desirable_weight=weights[0],
        undesirable_weight=weights[1],
        aux_loss_enabled=False,
        _compute_kl_logps=lambda model, batch: kl,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    reference = {"ref_logps": ref_B(logp_BL.dtype), "ref_KL_logps": torch.zeros_like(kl)}
    return _kto._compute_loss(trainer, _model(logp_BL), _inputs(logp_BL) | {"label": LABELS_B} | reference, False)


def trl_reward(logp_BL: Tensor, *, margin: Tensor | None = None, centring: float | None = None) -> Tensor:
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=accelerator(),
        args=SimpleNamespace(center_rewards_coefficient=centring),
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {"attention_mask": torch.ones(2 * P, L)} | ({} if margin is None else {"margin": margin})
    rewards = SimpleNamespace(logits=logp_BL.sum(1, keepdim=True))
    return _reward.compute_loss(trainer, lambda **_: rewards, inputs)


def trl_cpo(chosen_P: Tensor, rejected_P: Tensor, kind: str = "sigmoid", **options: float) -> Tensor:
    trainer = SimpleNamespace(
        beta=options.get("beta", 0.1),
        alpha=options.get("alpha", 0.0),
        loss_type=kind,
        simpo_gamma=options.get("gamma", 0.5),
        label_smoothing=options.get("label_smoothing", 0.0),
        accelerator=accelerator(),
    )
    return _cpo.cpo_loss(trainer, chosen_P, rejected_P)[0].mean()


def trl_orpo(chosen_P: Tensor, rejected_P: Tensor) -> Tensor:
    trainer = SimpleNamespace(beta=0.1, accelerator=accelerator())
    return -_orpo.odds_ratio_loss(trainer, chosen_P, rejected_P)[0].mean()


def _inputs(logp_BL: Tensor) -> dict[str, Tensor]:
    """Unshifted, as a collator gives them: one more slot than there are predictions."""
    completion = torch.nn.functional.pad(mask_BL().long(), (1, 0))
    ids = torch.zeros(2 * P, L + 1, dtype=torch.long)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": completion}


def _model(logp_BL: Tensor) -> Callable[..., SimpleNamespace]:
    outputs = SimpleNamespace(
        log_probs=logp_BL,
        entropy=torch.zeros_like(logp_BL),
        mean_logits=torch.zeros_like(logp_BL),
        is_top1=torch.zeros_like(logp_BL, dtype=torch.bool),
        log_sum_sq_probs=log_sum_sq_BL(logp_BL.dtype),
    )
    return lambda **_: outputs


# --- ours -----------------------------------------------------------------------------------------------------------


def our_dpo(logp_BL: Tensor, **options: Any) -> LossOutput:
    """``dpo`` on the sums of the same tokens."""
    chosen_P, rejected_P = (logp_BL * mask_BL()).sum(1).chunk(2)
    lengths = LENGTHS_B.chunk(2)
    return dpo(chosen_P, rejected_P, *ref_B(logp_BL.dtype).chunk(2), lengths=(lengths[0], lengths[1]), **options)


def our_wpo(logp_BL: Tensor, **options: Any) -> LossOutput:
    flat = logp_BL.flatten(), log_sum_sq_BL(logp_BL.dtype).flatten(), mask_BL().flatten(), flat_seq()
    chosen_P, rejected_P = wpo_weights(*flat, 2 * P).chunk(2)
    return our_dpo(logp_BL, weight_P=chosen_P * rejected_P, **options)


def our_ld(logp_BL: Tensor, alpha: float, **options: Any) -> LossOutput:
    policy, reference = _ld(logp_BL, alpha).chunk(2), _ld(_logps(2, logp_BL.dtype), alpha).chunk(2)
    return dpo(*policy, *reference, sft_P=(logp_BL * mask_BL()).sum(1)[:P], tokens=LENGTHS_B[:P].sum(), **options)


def our_unpaired(
    loss: Callable[..., LossOutput], logp_BL: Tensor, label_S: Tensor = LABELS_B, **options: Any
) -> Tensor:
    return loss((logp_BL * mask_BL()).sum(1), ref_B(logp_BL.dtype), label_S, **options).loss


def flat_seq() -> Tensor:
    """Rows laid out one after the other, as a packed batch is."""
    return torch.arange(2 * P).repeat_interleave(L)


def _ld(logp_BL: Tensor, alpha: float) -> Tensor:
    partner_S = torch.arange(2 * P).roll(P)
    return ld_sums(logp_BL.flatten(), mask_BL().flatten(), flat_seq(), partner_S, alpha=alpha)


def sums(logp_BL: Tensor) -> tuple[Tensor, Tensor]:
    chosen_P, rejected_P = (logp_BL * mask_BL()).sum(1).chunk(2)
    return chosen_P, rejected_P


def means(logp_BL: Tensor) -> tuple[Tensor, Tensor]:
    chosen_P, rejected_P = ((logp_BL * mask_BL()).sum(1) / LENGTHS_B).chunk(2)
    return chosen_P, rejected_P


# --- the table ------------------------------------------------------------------------------------------------------

F64, F32 = torch.float64, torch.float32


@frozen
class Row:
    """``dtype`` is the widest in which the oracle runs."""

    loss: str
    option: str
    oracle: str
    ours: Callable[[Tensor], Tensor]
    theirs: Callable[[Tensor], Tensor]
    dtype: torch.dtype = F64

    @property
    def name(self) -> str:
        return f"{self.loss}: {self.option} / {self.oracle}"


def difference(row: Row) -> float:
    """The larger of the differences of value and gradient; relative to numbers above 1."""
    ours, theirs = (_value_and_gradient(call, row.dtype) for call in (row.ours, row.theirs))
    return max(((a - b).abs() / b.abs().clamp(min=1)).max().item() for a, b in zip(ours, theirs, strict=True))


def _value_and_gradient(call: Callable[[Tensor], Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    logp_BL = leaf(dtype)
    loss = call(logp_BL)
    loss.backward()
    assert logp_BL.grad is not None and logp_BL.grad.abs().sum() > 0
    return loss.detach(), logp_BL.grad * mask_BL()


def _dpo_rows(kind: str, theirs: dict[str, Any] | None = None, dtype: torch.dtype = F64, **ours: Any) -> Row:
    """One kind against TRL; ``theirs`` are TRL's names of options where they differ from ours."""
    options = {"beta": 0.3} | ours
    trl = {"beta": 0.3} | (ours if theirs is None else theirs)
    label = ", ".join([kind, *(f"{k}={v}" for k, v in ours.items())])
    return Row("dpo", label, "TRL 1.16", lambda x: our_dpo(x, kind=kind, **options).loss,
               lambda x: trl_dpo(x, {kind: 1.0}, **trl)[0], dtype)  # fmt: skip


def _mixture_row(name: str, mixture: dict[str, float]) -> Row:
    return Row("dpo", f"{name} {mixture}", "TRL 1.16", lambda x: our_dpo(x, kind=mixture).loss,
               lambda x: trl_dpo(x, mixture)[0])  # fmt: skip


def _liger_row(kind: str, **options: Any) -> Row:
    def theirs(x: Tensor) -> Tensor:
        ref = ref_B(x.dtype).chunk(2)
        given: dict[str, Any] = {
            "ref_chosen_logps": ref[0],
            "ref_rejected_logps": ref[1],
            "beta": 0.3,
            "loss_type": kind,
        } | options
        return LigerFusedLinearDPOFunction.preference_loss_fn(*sums(x), torch.zeros(2 * P, L), **given)[0]

    return Row("dpo", ", ".join([kind, *(f"{k}={v}" for k, v in options.items())]), "Liger 0.8",
               lambda x: our_dpo(x, kind=kind, beta=0.3, **options).loss, theirs)  # fmt: skip


_SMOOTH: dict[str, Any] = {"label_smoothing": 0.1}
_DIVERGENT = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "discopop")
_DPO = [
    *(_dpo_rows(kind) for kind in ("sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "nca_pair", "bco_pair",
                                   "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft")),
    *(_dpo_rows(kind, **_SMOOTH) for kind in ("robust", "exo_pair", "aot", "aot_unpaired")),
    _dpo_rows("discopop", tau=0.5),
    *(_dpo_rows(kind, {"f": "forward_kl"}, divergence="forward_kl") for kind in _DIVERGENT),
    *(_dpo_rows(kind, {"f": "js_divergence"}, divergence="js") for kind in _DIVERGENT),
    *(_dpo_rows(kind, {"f": "alpha_divergence", "f_alpha": 0.5}, F32, divergence="alpha", alpha=0.5)
      for kind in ("sigmoid", "sigmoid_norm", "hinge", "robust", "discopop")),
    _dpo_rows("sigmoid", {"f": "alpha_divergence", "f_alpha": 2.0}, F32, divergence="alpha", alpha=2.0),
    _dpo_rows("exo_pair", {"f": "js_divergence"} | _SMOOTH, divergence="js", **_SMOOTH),
    _mixture_row("RPO", {"sigmoid": 1.0, "sft": 1.0}),
    _mixture_row("MPO", {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}),
    *(Row("dpo", f"{kind} with wpo_weights", "TRL 1.16", lambda x, k=kind: our_wpo(x, kind=k).loss,
          lambda x, k=kind: trl_dpo(x, {k: 1.0}, use_weighting=True)[0]) for kind in ("sigmoid", "ipo", "apo_zero")),
    *(Row("dpo", f"ld_sums, alpha={a}", "TRL 1.16", lambda x, a=a: our_ld(x, a, kind={"sigmoid": 1.0, "sft": 0.5}).loss,
          lambda x, a=a: trl_dpo(x, {"sigmoid": 1.0, "sft": 0.5}, ld_alpha=a)[0]) for a in (0.0, 0.3, 1.0)),
    *(_liger_row(kind) for kind in ("sigmoid", "hinge", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down",
                                    "discopop")),
    *(_liger_row(kind, **_SMOOTH) for kind in ("robust", "exo_pair")),
    Row("dpo", "sigmoid, label_smoothing=0.1 (cDPO)", "TRL 1.16 CPO on log-ratios",
        lambda x: our_dpo(x, **_SMOOTH).loss,
        lambda x: trl_cpo(sums(x)[0] - ref_B(x.dtype)[:P], sums(x)[1] - ref_B(x.dtype)[P:], **_SMOOTH)),
]  # fmt: skip


def _liger_kto(x: Tensor) -> Tensor:
    given: dict[str, Any] = {"ref_log_prob_chunk": ref_B(x.dtype), "kl": KL.to(x.dtype).mean()}
    return LigerFusedLinearKTOFunction.preference_loss_fn(
        (x * mask_BL()).sum(1), LABELS_B, torch.zeros(2 * P, L), **given
    )[0]


def _liger_pairs(function: Any, pairs: tuple[Tensor, Tensor], **options: float) -> Tensor:
    return function.preference_loss_fn(*pairs, torch.zeros(2 * P, L), **options)[0]


def _our_ipo(x: Tensor) -> Tensor:
    lengths = LENGTHS_B.chunk(2)
    return cpo(*sums(x), kind="ipo", lengths=(lengths[0], lengths[1]), sft=0.0).loss


def _nll(x: Tensor) -> Tensor:
    """The chosen answers' token mean, as torch's own cross-entropy would have it."""
    return -(x[:P])[mask_BL()[:P]].mean()


_PREFERENCE = [
    Row("kto", "kl", "TRL 1.16", lambda x: our_unpaired(kto, x, kl=KL.mean()), trl_kto),
    Row("kto", "desirable=1.5, undesirable=0.7", "TRL 1.16",
        lambda x: our_unpaired(kto, x, kl=KL.mean(), desirable=1.5, undesirable=0.7),
        lambda x: trl_kto(x, weights=(1.5, 0.7))),
    Row("kto", "apo_zero_unpaired", "TRL 1.16", lambda x: our_unpaired(kto, x, kind="apo_zero_unpaired"),
        lambda x: trl_kto(x, "apo_zero_unpaired")),
    Row("kto", "kl", "Liger 0.8", lambda x: our_unpaired(kto, x, kl=KL.mean()), _liger_kto),
    Row("bco", "delta=0, twice", "TRL 1.16 DPO bco_pair",
        lambda x: 2 * our_unpaired(bco, x, torch.arange(2 * P) < P, delta=0.0),
        lambda x: trl_dpo(x, {"bco_pair": 1.0})[0]),
    Row("orpo", "odds ratio", "TRL 1.16", lambda x: orpo(*means(x)).loss, lambda x: trl_orpo(*means(x)), F32),
    Row("orpo", "odds ratio", "Liger 0.8", lambda x: orpo(*means(x)).loss,
        lambda x: _liger_pairs(LigerFusedLinearORPOFunction, means(x))),
    Row("orpo", "with likelihood", "TRL 1.16 and torch",
        lambda x: orpo(*means(x), sft_P=sums(x)[0], tokens=LENGTHS_B[:P].sum()).loss,
        lambda x: _nll(x) + trl_orpo(*means(x)), F32),
    Row("cpo", "sigmoid", "TRL 1.16", lambda x: cpo(*sums(x), sft=0.0).loss, lambda x: trl_cpo(*sums(x))),
    Row("cpo", "sigmoid, label_smoothing=0.1", "TRL 1.16", lambda x: cpo(*sums(x), sft=0.0, **_SMOOTH).loss,
        lambda x: trl_cpo(*sums(x), **_SMOOTH)),
    Row("cpo", "hinge", "TRL 1.16", lambda x: cpo(*sums(x), kind="hinge", sft=0.0).loss,
        lambda x: trl_cpo(*sums(x), "hinge")),
    Row("cpo", "ipo", "TRL 1.16", _our_ipo, lambda x: trl_cpo(*means(x), "ipo")),
    Row("cpo", "sigmoid with likelihood", "TRL 1.16 and torch",
        lambda x: cpo(*sums(x), sft=0.5, tokens=LENGTHS_B[:P].sum()).loss,
        lambda x: trl_cpo(*sums(x)) + 0.5 * _nll(x)),
    Row("cpo", "sigmoid, label_smoothing=0.1", "Liger 0.8", lambda x: cpo(*sums(x), sft=0.0, **_SMOOTH).loss,
        lambda x: _liger_pairs(LigerFusedLinearCPOFunction, sums(x), **_SMOOTH)),
    Row("simpo", "gamma=0.5", "TRL 1.16", lambda x: simpo(*means(x), gamma=0.5).loss,
        lambda x: trl_cpo(*means(x), "simpo", beta=2.0)),
    Row("simpo", "label_smoothing=0.1", "TRL 1.16", lambda x: simpo(*means(x), gamma=0.5, **_SMOOTH).loss,
        lambda x: trl_cpo(*means(x), "simpo", beta=2.0, **_SMOOTH)),
    Row("simpo", "alpha=0.25 (AlphaPO)", "TRL 1.16", lambda x: simpo(*means(x), gamma=0.5, alpha=0.25).loss,
        lambda x: trl_cpo(*means(x), "simpo", beta=2.0, alpha=0.25)),
    Row("simpo", "gamma=0.5", "Liger 0.8", lambda x: simpo(*means(x), gamma=0.5).loss,
        lambda x: _liger_pairs(LigerFusedLinearSimPOFunction, means(x), beta=2.0, gamma=0.5)),
]  # fmt: skip

_MARGIN_P = torch.tensor([0.0, 0.5, 1.0, 2.0, 0.1], dtype=torch.float64)
_CLASS_B = LABELS_B.long()
_SOFT_B = 0.8 * LABELS_B.double() + 0.1
_REWARD = [
    Row("bradley_terry", "plain", "TRL 1.16", lambda x: bradley_terry(*sums(x)).loss, trl_reward),
    Row("bradley_terry", "margin", "TRL 1.16", lambda x: bradley_terry(*sums(x), margin=_MARGIN_P).loss,
        lambda x: trl_reward(x, margin=_MARGIN_P)),
    Row("bradley_terry", "centring=0.01", "TRL 1.16", lambda x: bradley_terry(*sums(x), centring=0.01).loss,
        lambda x: trl_reward(x, centring=0.01)),
    Row("stepwise", "two classes", "torch cross_entropy", lambda x: stepwise(x[:, 3:5], _CLASS_B).loss,
        lambda x: torch.nn.functional.cross_entropy(x[:, 3:5], _CLASS_B)),
    Row("stepwise", "soft labels", "torch, two logits z and 0", lambda x: stepwise(x[:, 3], _SOFT_B).loss,
        lambda x: torch.nn.functional.cross_entropy(
            torch.stack([x[:, 3], torch.zeros(2 * P, dtype=x.dtype)], 1),
            torch.stack([_SOFT_B, 1 - _SOFT_B], 1).to(x.dtype))),
]  # fmt: skip

ROWS = [*_DPO, *_PREFERENCE, *_REWARD]


def table() -> list[tuple[str, str, str, float]]:
    """(loss, option, oracle, max difference), measured."""
    return [(row.loss, row.option, row.oracle, difference(row)) for row in ROWS]
