"""Other people's policy losses on the same numbers as ours: TRL 1.16 and Liger, called without a trainer.

Their functions take padded [B, T] tensors; ours take the same tokens packed. ``ROWS`` holds, for a table, what was
compared with what and the greatest difference of value or gradient.
Shapes: B rows, W columns (padded), T packed tokens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ft.losses.clipped import grpo
from ft.losses.entropy import bonus, top
from ft.losses.importance import keep_by_kl, weights
from ft.losses.policy_gradient import cispo, gmpo, luspo, rloo, sapo, vespo


class Case(NamedTuple):
    """One batch, padded for them and packed for us. Rows are right-padded; ``mask_BW`` also has a hole inside."""

    logp_BW: Tensor
    old_BW: Tensor
    ref_BW: Tensor
    sampled_BW: Tensor
    entropy_BW: Tensor
    adv_B: Tensor
    mask_BW: Tensor  # bool
    real_BW: Tensor  # bool: not padding

    def pack(self, x_BW: Tensor) -> Tensor:
        return x_BW[self.real_BW]

    @property
    def seq_T(self) -> Tensor:
        return self.pack(torch.arange(len(self.adv_B))[:, None].expand_as(self.mask_BW))

    @property
    def args(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """logp_T, old_logp_T, adv_T, mask_T."""
        adv_BW = self.adv_B[:, None].expand_as(self.mask_BW)
        return tuple(self.pack(x) for x in (self.logp_BW, self.old_BW, adv_BW, self.mask_BW))  # type: ignore[return-value]

    def is_weight_T(self, **options: Any) -> Tensor:
        _, old_T, _, mask_T = self.args
        return weights(old_T, self.pack(self.sampled_BW), mask_T, self.seq_T, **options)


def case(*, masked_row: bool = False, drift: float = 0.3, dtype: torch.dtype = torch.float32, seed: int = 0) -> Case:
    """Four answers of 7, 4, 6 and 1 tokens; ``masked_row`` masks the second altogether."""
    rng = torch.Generator().manual_seed(seed)

    def noise(scale: float) -> Tensor:
        return torch.randn(4, 7, generator=rng, dtype=torch.float64).to(dtype) * scale

    real_BW = torch.arange(7) < torch.tensor([7, 4, 6, 1])[:, None]
    mask_BW = real_BW.clone()
    mask_BW[0, 2] = False
    if masked_row:
        mask_BW[1] = False
    logp_BW = -noise(1.0).abs() - 0.1
    old_BW, ref_BW, sampled_BW = (logp_BW + noise(drift) for _ in range(3))
    adv_B = torch.tensor([1.2, -0.7, 0.4, -0.9], dtype=dtype)
    entropy_BW = noise(1.0).abs().requires_grad_()
    return Case(logp_BW.requires_grad_(), old_BW, ref_BW, sampled_BW, entropy_BW, adv_B, mask_BW, real_BW)


_TRL: dict[str, Any] = {
    "loss_type": "dapo", "importance_sampling_level": "token", "epsilon_low": 0.2, "epsilon_high": 0.2, "beta": 0.0,
    "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None, "use_vllm": False,
    "vllm_importance_sampling_correction": True, "current_gradient_accumulation_steps": 1, "max_completion_length": 10,
    "aux_loss_enabled": False, "_entropy_bonus_enabled": False, "use_adaptive_entropy": False, "entropy_coef": 0.0,
}  # fmt: skip
_TRL_ARGS: dict[str, Any] = {
    "delta": None, "use_bias_correction_kl": False, "sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05,
    "vespo_k_pos": 2.0, "vespo_lambda_pos": 3.0, "vespo_k_neg": 3.0, "vespo_lambda_neg": 2.0, "steps_per_generation": 1,
}  # fmt: skip


def trl_trainer(c: Case, **options: Any) -> Any:
    """What ``GRPOTrainer._compute_loss`` reads of itself, one process and no accumulation."""
    from trl import GRPOTrainer

    args = {name: options.pop(name, value) for name, value in _TRL_ARGS.items()}
    trainer = SimpleNamespace(
        **{**_TRL, **options}, args=SimpleNamespace(**args), _metrics={"train": defaultdict(list)}
    )
    trainer.model = SimpleNamespace(training=True)
    trainer.accelerator = SimpleNamespace(
        gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1, sync_gradients=False,
        pad_across_processes=lambda x, dim, pad_index: x,
    )  # fmt: skip
    trainer._get_per_token_logps_and_entropies = lambda *a, **k: (c.logp_BW, c.entropy_BW, None)
    trainer.get_gamma_weights = GRPOTrainer.get_gamma_weights
    trainer.get_off_policy_mask = GRPOTrainer.get_off_policy_mask
    high_entropy: Any = GRPOTrainer.get_high_entropy_mask
    trainer.get_high_entropy_mask = partial(high_entropy, trainer)
    return trainer


def trl_inputs(c: Case, is_weight_BW: Tensor | None = None) -> dict[str, Any]:
    mask_BW = c.mask_BW.to(c.logp_BW.dtype)
    inputs = {
        "prompt_ids": torch.zeros(4, 1), "prompt_mask": torch.ones(4, 1), "completion_ids": torch.zeros(4, 7),
        "completion_mask": mask_BW, "advantages": c.adv_B, "old_per_token_logps": c.old_BW,
        "ref_per_token_logps": c.ref_BW, "sampling_per_token_logps": c.sampled_BW, "num_items_in_batch": mask_BW.sum(),
    }  # fmt: skip
    return inputs if is_weight_BW is None else {**inputs, "importance_sampling_ratio": is_weight_BW}


def trl(c: Case, *, is_weight_BW: Tensor | None = None, **options: Any) -> Tensor:
    from trl import GRPOTrainer

    trainer = trl_trainer(c, use_vllm=is_weight_BW is not None, **options)
    return GRPOTrainer._compute_loss(trainer, None, trl_inputs(c, is_weight_BW))


def trl_gmpo(c: Case, **options: Any) -> Tensor:
    from trl.experimental.gmpo import GMPOTrainer

    return GMPOTrainer._compute_loss(trl_trainer(c, epsilon_low=0.4, epsilon_high=0.4, **options), None, trl_inputs(c))


def trl_rloo(c: Case) -> Tensor:
    from trl import RLOOTrainer

    inputs = trl_inputs(c) | {"old_logps": (c.old_BW * c.mask_BW).sum(1)}
    return RLOOTrainer._compute_loss(trl_trainer(c), None, inputs)


def liger(c: Case, **options: Any) -> Tensor:
    from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOFunction

    mask_BW = c.mask_BW.to(c.logp_BW.dtype)
    given: dict[str, Any] = {"beta": 0.0, "max_completion_length": 10, "ref_per_token_logps": c.ref_BW}
    loss, _ = LigerFusedLinearGRPOFunction.ppo_loss_fn(
        per_token_logps=c.logp_BW, attention_mask=mask_BW, advantages=c.adv_B, full_attention_mask=mask_BW,
        old_per_token_logps=c.old_BW, **{**given, **options},
    )  # fmt: skip
    return loss


def token_weight_BW(c: Case) -> Tensor:
    """TRL's token_truncate at 3, as its generation step makes it."""
    return ((c.old_BW - c.sampled_BW) * c.mask_BW).exp().clamp(max=3.0)


Loss = Callable[[Case], Tensor]


class Comparison(NamedTuple):
    loss: str
    option: str
    oracle: str
    ours: Loss
    theirs: Loss
    masked_row: bool = True  # False: they count a row with nothing trained as an answer of ratio 1, and we do not


def _rows(loss: Callable[..., Any], **options: Any) -> dict[str, Any]:
    """The options, and ``seqs=4`` unless tokens are averaged: TRL and Liger divide by rows, masked ones included."""
    by_token = options.get("aggregate", "token") == "token" and loss in (grpo, cispo, vespo)
    return options if by_token else {"seqs": 4, **options}


def _ours(loss: Callable[..., Any], **options: Any) -> Loss:
    return lambda c: loss(*c.args, seq_T=c.seq_T, **_rows(loss, **options)).loss


def _with_kl(loss: Callable[..., Any], **options: Any) -> Loss:
    kl: dict[str, Any] = {"kl_coef": 0.5, **_rows(loss, **options)}
    return lambda c: loss(*c.args, seq_T=c.seq_T, ref_logp_T=c.pack(c.ref_BW), **kl).loss


def _with_is(loss: Callable[..., Any], **options: Any) -> Loss:
    def ours(c: Case) -> Tensor:
        w_T = c.is_weight_T(level="token", cap=3.0)
        return loss(*c.args, seq_T=c.seq_T, is_weight_T=w_T, **_rows(loss, **options)).loss

    return ours


def _off_policy(c: Case) -> Tensor:
    logp_T, _, adv_T, mask_T = c.args
    keep_T = keep_by_kl(logp_T, c.pack(c.sampled_BW), adv_T, mask_T, c.seq_T, threshold=0.0)
    return grpo(*c.args, keep_T=keep_T).loss


def _top(loss: Callable[..., Any], **options: Any) -> Loss:
    def ours(c: Case) -> Tensor:
        keep_T = top(c.pack(c.entropy_BW), c.args[3], fraction=0.4)
        return loss(*c.args, keep_T=keep_T, seq_T=c.seq_T, **_rows(loss, **options)).loss

    return ours


def _bonus(c: Case) -> Tensor:
    return grpo(*c.args).loss + bonus(c.pack(c.entropy_BW), c.args[3], coef=0.3).loss


def _trl(**options: Any) -> Loss:
    return lambda c: trl(c, **options)


def _trl_is(**options: Any) -> Loss:
    return lambda c: trl(c, is_weight_BW=token_weight_BW(c), **options)


def _liger(**options: Any) -> Loss:
    return lambda c: liger(c, **options)


_SEQUENCE: dict[str, Any] = {"level": "sequence", "aggregate": "sequence"}
_CONSTANT: dict[str, Any] = {"aggregate": "constant", "constant": 10.0}
_GSPO: dict[str, Any] = {"loss_type": "grpo", "importance_sampling_level": "sequence"}

COMPARISONS = [
    Comparison("grpo", "aggregate=token (DAPO)", "TRL", _ours(grpo), _trl()),
    Comparison("grpo", "aggregate=token (BNPO)", "TRL", _ours(grpo), _trl(loss_type="bnpo")),
    Comparison("grpo", "aggregate=sequence (GRPO)", "TRL", _ours(grpo, aggregate="sequence"), _trl(loss_type="grpo")),
    Comparison("grpo", "aggregate=constant (Dr. GRPO)", "TRL", _ours(grpo, **_CONSTANT), _trl(loss_type="dr_grpo")),
    Comparison("grpo", "level=sequence (GSPO)", "TRL", _ours(grpo, **_SEQUENCE), _trl(**_GSPO)),
    Comparison("grpo", "level=sequence, aggregate=token", "TRL", _ours(grpo, level="sequence"),
               _trl(importance_sampling_level="sequence")),
    Comparison("grpo", "dual_clip=1.3", "TRL", _ours(grpo, dual_clip=1.3), _trl(delta=1.3)),
    Comparison("grpo", "clip=(0.1, 0.28)", "TRL", _ours(grpo, clip=(0.1, 0.28)),
               _trl(epsilon_low=0.1, epsilon_high=0.28)),
    Comparison("grpo", "kl=k3", "TRL", _with_kl(grpo), _trl(beta=0.5)),
    Comparison("grpo", "kl=k3, kl_bias_correction", "TRL", _with_kl(grpo, kl_bias_correction=True),
               _trl(beta=0.5, use_bias_correction_kl=True)),
    Comparison("grpo", "level=sequence, kl_bias_correction", "TRL",
               _with_kl(grpo, kl_bias_correction=True, **_SEQUENCE),
               _trl(beta=0.5, use_bias_correction_kl=True, **_GSPO)),
    Comparison("grpo", "is_weight_T", "TRL", _with_is(grpo), _trl_is()),
    Comparison("grpo", "keep_T=importance.keep_by_kl", "TRL", _off_policy, _trl(off_policy_mask_threshold=0.0)),
    Comparison("grpo", "keep_T=entropy.top", "TRL", _top(grpo), _trl(top_entropy_quantile=0.4)),
    Comparison("entropy.bonus", "coef", "TRL", _bonus, _trl(_entropy_bonus_enabled=True, entropy_coef=0.3)),
    Comparison("cispo", "cap=1.2", "TRL", _ours(cispo, cap=1.2), _trl(loss_type="cispo", epsilon_high=1.2)),
    Comparison("sapo", "", "TRL", _ours(sapo), _trl(loss_type="sapo")),
    Comparison("vespo", "", "TRL", _ours(vespo), _trl(loss_type="vespo")),
    Comparison("vespo", "is_weight_T", "TRL", _with_is(vespo), _trl_is(loss_type="vespo")),
    Comparison("luspo", "", "TRL", _ours(luspo), _trl(loss_type="luspo", importance_sampling_level="sequence")),
    Comparison("luspo", "kl=k3", "TRL", _with_kl(luspo),
               _trl(loss_type="luspo", importance_sampling_level="sequence", beta=0.5)),
    Comparison("gmpo", "", "TRL", _ours(gmpo), trl_gmpo, False),
    Comparison("gmpo", "kl=k3", "TRL", _with_kl(gmpo), partial(trl_gmpo, beta=0.5), False),
    Comparison("gmpo", "keep_T=entropy.top", "TRL", _top(gmpo), partial(trl_gmpo, top_entropy_quantile=0.4),
               False),
    Comparison("rloo", "", "TRL", _ours(rloo), trl_rloo, False),
    Comparison("grpo", "aggregate=token (DAPO)", "Liger", _ours(grpo), _liger(loss_type="dapo")),
    Comparison("grpo", "aggregate=sequence (GRPO)", "Liger", _ours(grpo, aggregate="sequence"),
               _liger(loss_type="grpo")),
    Comparison("grpo", "aggregate=constant (Dr. GRPO)", "Liger", _ours(grpo, **_CONSTANT), _liger(loss_type="dr_grpo")),
    Comparison("grpo", "level=sequence (GSPO)", "Liger", _ours(grpo, **_SEQUENCE), _liger(**_GSPO)),
    Comparison("grpo", "kl=k3", "Liger", _with_kl(grpo), _liger(loss_type="dapo", beta=0.5)),
    Comparison("grpo", "is_weight_T", "Liger", _with_is(grpo),
               lambda c: liger(c, loss_type="dapo", vllm_is_ratio=token_weight_BW(c))),
    Comparison("cispo", "cap=1.2", "Liger", _ours(cispo, cap=1.2), _liger(loss_type="cispo", epsilon_high=1.2)),
    Comparison("sapo", "", "Liger", _ours(sapo), _liger(loss_type="sapo")),
    Comparison("vespo", "", "Liger", _ours(vespo), _liger(loss_type="vespo")),
]  # fmt: skip


def difference(row: Comparison, c: Case) -> float:
    """The greatest difference of value, and of gradient by log-prob and by entropy."""
    inputs = (c.logp_BW, c.entropy_BW)
    ours, theirs = row.ours(c), row.theirs(c)
    grads = [torch.autograd.grad(loss, inputs, allow_unused=True) for loss in (ours, theirs)]
    worst = (ours - theirs).abs().item()
    for a, b in zip(*grads, strict=True):
        a, b = (torch.zeros(4, 7) if g is None else g for g in (a, b))
        worst = max(worst, (a - b).abs().max().item())
    return worst


def worst(row: Comparison) -> float:
    """The greatest difference over batches near and far from the old policy, and one with a row wholly masked."""
    cases = [case(), case(drift=1.0, seed=1)] + [case(masked_row=True)] * row.masked_row
    return max(difference(row, c) for c in cases)


def rows() -> list[tuple[str, str, str, float]]:
    """(loss, option, oracle, greatest difference in float32)."""
    return [(row.loss, row.option, row.oracle, worst(row)) for row in COMPARISONS]


def __getattr__(name: str) -> Any:
    """``ROWS`` is computed when asked for: it needs TRL and Liger, and importing this file should not."""
    if name == "ROWS":
        return rows()
    raise AttributeError(name)
