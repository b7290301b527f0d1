"""Each loss, forward and backward, against TRL's and Liger's function for it on the same tensors.

    python bench/losses.py [--rows 32] [--columns 2048] [--fill 1.0] [--rounds 21] [--only grpo] [--dry]

They take padded [B, W] tensors; ft takes the same tokens packed, or for preference losses the rows' sums, made the
same way on both sides. Sequences are told by offsets, and advantages given one a row where the ratio is the row's, as
theirs are. TRL's functions are called without a trainer, as the tests call them, so their metrics are counted, as
ours are, though they are not the same. Losses that clip count clipped tokens on both sides; TRL's policy losses also
average the entropy (two passes over the tokens), Liger's do not. ft's orpo, cpo and simpo also average rewards,
log-probs and accuracies, which TRL's trainers do outside of the functions timed here. How far the policy has moved
from the old one is no part of ft's losses: the rows ``drift`` time the function that tells, alone, without a backward
and against nothing, and ft's GRPO method pays it in addition, once for each micro-batch. TRL's RLOO is given the old
log-probs summed beforehand. Its DPO and KTO functions also average what its model would give besides log-probs
(entropy, top-1 hits). ``--fill`` below 1 makes rows of random length: ft then has fewer tokens to go through, which
is the point of packing, but not of this comparison; at 1 the rows are of one length, and ft sums them as rows.
Contenders take turns in one process; figures are medians. ``MB`` is the peak of what one step allocates beyond its
inputs, as PyTorch's profiler counts it, so freed temporaries count while they stand. ``ratio`` is ft's time over
theirs, below 1 where ft is the faster; ``best`` is the ratio of the least times, which says more where other
processes take the processor away for longer than a step lasts.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from attrs import frozen
from common import record
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
warnings.simplefilter("ignore")

import oracles_dpo as pairs  # noqa: E402  their functions, without a trainer
import oracles_grpo as policy  # noqa: E402

from ft.losses import cispo, cpo, dpo, drift, gmpo, grpo, kto, luspo, orpo, rloo, sapo, simpo, vespo  # noqa: E402

Step = Callable[[], Tensor]


@frozen
class Pair:
    """One loss, as ft and as another library has it. ``leaf`` is what is differentiated on each side."""

    loss: str
    oracle: str
    ours: Step
    theirs: Step
    our_leaf: Tensor
    their_leaf: Tensor

    def calls(self) -> dict[str, Callable[[], Tensor]]:
        return {"ft": lambda: step(self.ours, self.our_leaf), "theirs": lambda: step(self.theirs, self.their_leaf)}


def step(loss: Step, leaf: Tensor) -> Tensor:
    return torch.autograd.grad(loss(), leaf)[0]


# --- policy gradients -------------------------------------------------------------------------------------------------


def case(rows: int, columns: int, fill: float) -> policy.Case:
    rng = torch.Generator().manual_seed(0)

    def noise(scale: float) -> Tensor:
        return torch.randn(rows, columns, generator=rng) * scale

    least = int(columns * (2 * fill - 1)) if fill < 1 else columns
    length_B = torch.randint(max(least, 1), columns + 1, (rows, 1), generator=rng)
    real_BW = torch.arange(columns) < length_B
    logp_BW = -noise(1.0).abs() - 0.1
    old_BW, ref_BW, sampled_BW = (logp_BW + noise(0.1) for _ in range(3))
    adv_B = torch.randn(rows, generator=rng)
    entropy_BW = noise(1.0).abs()
    return policy.Case(
        logp_BW.requires_grad_(), old_BW, ref_BW, sampled_BW, entropy_BW, adv_B, real_BW.clone(), real_BW
    )


def policy_pairs(c: policy.Case) -> list[Pair]:
    """Everything given is packed beforehand: a training loop that packs never had it otherwise."""
    logp_T, old_T, adv_T, mask_T = (x.detach().contiguous() for x in c.args)
    logp_T.requires_grad_()
    ref_T, rows = c.pack(c.ref_BW), len(c.adv_B)
    cu_S1 = torch.nn.functional.pad(c.real_BW.sum(1).cumsum(0), (1, 0))
    mask_BW, width = c.mask_BW.float(), float(c.mask_BW.shape[1])
    inputs = policy.trl_inputs(c) | {"completion_mask": mask_BW, "num_items_in_batch": mask_BW.sum()}
    inputs |= {"prompt_ids": torch.zeros(rows, 1), "prompt_mask": torch.ones(rows, 1), "completion_ids": mask_BW}
    kl: dict[str, Any] = {"ref_logp_T": ref_T, "kl_coef": 0.05}

    def seqs(loss: Callable[..., Any], options: dict[str, Any]) -> dict[str, Any]:
        by_token = "aggregate" not in options and loss in (grpo, cispo, vespo)
        return {} if by_token else {"seqs": rows}

    def ours(loss: Callable[..., Any], **options: Any) -> Step:
        options |= seqs(loss, options)
        return lambda: loss(logp_T, old_T, adv_T, mask_T, cu_S1=cu_S1, **options).loss

    def by_row(loss: Callable[..., Any], **options: Any) -> Step:
        options |= seqs(loss, options)
        return lambda: loss(logp_T, old_T, None, mask_T, cu_S1=cu_S1, adv_S=c.adv_B, **options).loss

    def trl(trainer: str = "GRPOTrainer", **options: Any) -> Step:
        import trl
        from trl.experimental.gmpo import GMPOTrainer

        given = inputs | {"old_logps": (c.old_BW * mask_BW).sum(1)} if trainer == "RLOOTrainer" else inputs
        kind: Any = GMPOTrainer if trainer == "GMPOTrainer" else getattr(trl, trainer)
        stub = policy.trl_trainer(c, max_completion_length=width, **options)
        return lambda: kind._compute_loss(stub, None, given)

    def liger(**options: Any) -> Step:
        from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOFunction

        given: dict[str, Any] = {"beta": 0.0, "max_completion_length": width, "ref_per_token_logps": c.ref_BW} | options
        return lambda: LigerFusedLinearGRPOFunction.ppo_loss_fn(
            per_token_logps=c.logp_BW, attention_mask=mask_BW, advantages=c.adv_B, full_attention_mask=mask_BW,
            old_per_token_logps=c.old_BW, **given,
        )[0]  # fmt: skip

    sequence: dict[str, Any] = {"level": "sequence", "aggregate": "sequence"}
    gspo: dict[str, Any] = {"loss_type": "grpo", "importance_sampling_level": "sequence"}
    luspo_trl: dict[str, Any] = {"loss_type": "luspo", "importance_sampling_level": "sequence"}
    constant: dict[str, Any] = {"aggregate": "constant", "constant": width}
    found = [
        ("grpo, token (DAPO)", ours(grpo), {"TRL": trl(), "Liger": liger(loss_type="dapo")}),
        ("grpo, token, kl", ours(grpo, **kl), {"TRL": trl(beta=0.05), "Liger": liger(loss_type="dapo", beta=0.05)}),
        ("grpo, sequence (GRPO)", ours(grpo, aggregate="sequence"),
         {"TRL": trl(loss_type="grpo"), "Liger": liger(loss_type="grpo")}),
        ("grpo, constant (Dr. GRPO)", ours(grpo, **constant),
         {"TRL": trl(loss_type="dr_grpo"), "Liger": liger(loss_type="dr_grpo")}),
        ("grpo, level=sequence (GSPO)", by_row(grpo, **sequence), {"TRL": trl(**gspo), "Liger": liger(**gspo)}),
        ("cispo", ours(cispo, cap=1.2), {"TRL": trl(loss_type="cispo", epsilon_high=1.2),
                                         "Liger": liger(loss_type="cispo", epsilon_high=1.2)}),
        ("sapo", ours(sapo), {"TRL": trl(loss_type="sapo"), "Liger": liger(loss_type="sapo")}),
        ("vespo", by_row(vespo), {"TRL": trl(loss_type="vespo"), "Liger": liger(loss_type="vespo")}),
        ("luspo", by_row(luspo), {"TRL": trl(**luspo_trl)}),
        ("gmpo", ours(gmpo), {"TRL": trl("GMPOTrainer", epsilon_low=0.4, epsilon_high=0.4)}),
        ("rloo", by_row(rloo), {"TRL": trl("RLOOTrainer")}),
    ]  # fmt: skip
    return [
        Pair(loss, oracle, mine, theirs, logp_T, c.logp_BW)
        for loss, mine, others in found
        for oracle, theirs in others.items()
    ]


def drifts(c: policy.Case) -> dict[str, Callable[[], Any]]:
    """What ft's GRPO method pays beside its loss, at the level of tokens and of answers."""
    logp_T, old_T, _, mask_T = (x.detach().contiguous() for x in c.args)
    cu_S1 = torch.nn.functional.pad(c.real_BW.sum(1).cumsum(0), (1, 0))
    return {
        f"drift, level={level}": lambda level=level: drift(logp_T, old_T, mask_T, cu_S1=cu_S1, level=level)
        for level in ("token", "sequence")
    }


# --- preferences ------------------------------------------------------------------------------------------------------


def preference_pairs(rows: int, columns: int) -> list[Pair]:
    """The oracles' own tensors, made larger: half the rows are chosen, half rejected."""
    rng = torch.Generator().manual_seed(0)
    pairs.P, pairs.L, pairs.PROMPT = rows // 2, columns, columns // 8
    pairs.LENGTHS_B = torch.randint(columns // 2, columns - columns // 8, (rows,), generator=rng)
    pairs.LABELS_B = torch.arange(rows) % 3 > 0
    pairs.KL = torch.rand(rows, generator=rng)
    f32, mask_BW = torch.float32, pairs.mask_BL()
    leaf, reference_B = pairs.leaf(f32), pairs.ref_B(f32)
    kl = pairs.KL.mean()
    reference, lengths = reference_B.chunk(2), pairs.LENGTHS_B.chunk(2)
    pairs.mask_BL = lambda: mask_BW  # made once: neither side is timed for it
    pairs.ref_B = lambda dtype: reference_B

    def our_dpo(**options: Any) -> Step:
        sums = {"lengths": lengths, **options}
        return lambda: dpo(*pairs.sums(leaf), *reference, **sums).loss

    def trl_dpo(*kinds: str, **options: Any) -> Step:
        return lambda: pairs.trl_dpo(leaf, dict.fromkeys(kinds, 1.0), **options)[0]

    def unpaired() -> Tensor:
        return kto((leaf * mask_BW).sum(1), reference_B, pairs.LABELS_B, kl=kl).loss

    kinds = ("sigmoid", "ipo", "robust", "nca_pair", "bco_pair", "sppo_hard", "aot", "apo_zero", "discopop")
    found: list[tuple[str, Step, Step]] = [(f"dpo, {k}", our_dpo(kind=k), trl_dpo(k)) for k in kinds]
    mixture = {"sigmoid": 1.0, "bco_pair": 1.0}
    found += [
        ("dpo, sigmoid + bco_pair", our_dpo(kind=mixture), trl_dpo(*mixture)),
        ("dpo, wpo_weights", lambda: pairs.our_wpo(leaf).loss, trl_dpo("sigmoid", use_weighting=True)),
        ("kto", unpaired, lambda: pairs.trl_kto(leaf)),
        ("orpo", lambda: orpo(*pairs.means(leaf)).loss, lambda: pairs.trl_orpo(*pairs.means(leaf))),
        ("cpo", lambda: cpo(*pairs.sums(leaf), sft=0.0).loss, lambda: pairs.trl_cpo(*pairs.sums(leaf))),
        ("simpo", lambda: simpo(*pairs.means(leaf), gamma=0.5).loss,
         lambda: pairs.trl_cpo(*pairs.means(leaf), "simpo", beta=2.0)),
    ]  # fmt: skip
    return [Pair(loss, "TRL", mine, theirs, leaf, leaf) for loss, mine, theirs in found]


# --- measuring --------------------------------------------------------------------------------------------------------


def interleave(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each round, two warm-up rounds aside."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 2):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: seconds[2:] for name, seconds in times.items()}


def extra_memory(call: Callable[[], Any]) -> float:
    """MB that stand at most, beyond what stood before the call: the running sum of what is allocated and freed."""
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    results: Any = profile.profiler and profile.profiler.kineto_results
    changes = sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]")
    stands = most = 0
    for _, change in changes:
        stands += change
        most = max(most, stands)
    return most / 2**20


def check(pair: Pair) -> None:
    """Stop if the two sides compute different things: what is timed must be the same loss."""
    ours, theirs = pair.ours().item(), pair.theirs().item()
    if abs(ours - theirs) > 1e-3 * max(1.0, abs(theirs)):
        raise SystemExit(f"{pair.loss}: ft {ours:.7g}, {pair.oracle} {theirs:.7g}")


def measure(pair: Pair, rounds: int) -> dict[str, Any]:
    check(pair)
    times = interleave(pair.calls(), rounds)
    seconds = {name: median(found) for name, found in times.items()}
    memory = {name: extra_memory(call) for name, call in pair.calls().items()}
    return {
        "loss": pair.loss,
        "against": pair.oracle,
        "seconds": seconds["ft"],
        "their_seconds": seconds["theirs"],
        "ratio": seconds["ft"] / seconds["theirs"],
        "best_ratio": min(times["ft"]) / min(times["theirs"]),
        "extra_mb": memory["ft"],
        "their_extra_mb": memory["theirs"],
    }


def measure_alone(call: Callable[[], Any], rounds: int) -> dict[str, Any]:
    seconds = interleave({"ft": call}, rounds)["ft"]
    return {"seconds": median(seconds), "extra_mb": extra_memory(call)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--columns", type=int, default=2048)
    parser.add_argument("--fill", type=float, default=1.0, help="share of columns that hold tokens, above 0.5")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="losses whose name holds this")
    parser.add_argument("--dry", action="store_true", help="print, and record nothing")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    setting = {"rows": args.rows, "columns": args.columns, "fill": args.fill, "threads": args.threads}
    given = case(args.rows, args.columns, args.fill)
    found = policy_pairs(given) + preference_pairs(args.rows, args.columns)
    print(f"{'':30s} {'against':8s} {'ft us':>8s} {'us':>8s} {'ratio':>6s} {'best':>6s} {'ft MB':>7s} {'MB':>7s}")
    for pair in found:
        if args.only not in pair.loss:
            continue
        n = measure(pair, args.rounds)
        print(
            f"{pair.loss:30s} {pair.oracle:8s} {n['seconds'] * 1e6:8.0f} {n['their_seconds'] * 1e6:8.0f} "
            f"{n['ratio']:6.2f} {n['best_ratio']:6.2f} {n['extra_mb']:7.2f} {n['their_extra_mb']:7.2f}"
        )
        if not args.dry:
            record("losses", setting | n)
    for name, call in drifts(given).items():
        if args.only not in name:
            continue
        n = measure_alone(call, args.rounds)
        print(f"{name:30s} {'-':8s} {n['seconds'] * 1e6:8.0f} {'':8s} {'':6s} {'':6s} {n['extra_mb']:7.2f}")
        if not args.dry:
            record("losses", setting | {"loss": name, "against": None} | n)


if __name__ == "__main__":
    main()
