"""Feature matching, distillation and DFT once more, in plain numpy loops, and TRL's functions where TRL has them.

``ROWS`` lists (loss, option, oracle, largest difference in value or gradient). The numpy versions share no step with
``ft.losses``: loops over samples and tokens, a Gram matrix's eigenvalues in place of an SVD, central differences in
place of autograd.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from ft.losses import distill, ebft, features, sft

NUMPY = "plain numpy, float64"
Row = tuple[str, str, str, float]


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def apart(ours: Tensor | np.ndarray, theirs: Tensor | np.ndarray | float) -> float:
    """Largest difference, relative where the numbers are above 1."""
    ours = ours.detach().double().numpy() if isinstance(ours, Tensor) else np.asarray(ours)
    theirs = theirs.detach().double().numpy() if isinstance(theirs, Tensor) else np.asarray(theirs)
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return float(np.max(np.abs(ours - theirs) / np.maximum(1.0, np.abs(theirs)), initial=0.0))


def slope(f: Callable[[np.ndarray], float], x: np.ndarray, step: float = 1e-5) -> np.ndarray:
    """Gradient by central differences."""
    grad = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[i] += step
        down[i] -= step
        grad[i] = (f(up) - f(down)) / (2 * step)
    return grad


# --- features ---------------------------------------------------------------------------------------------------------


def np_normalise(hidden: np.ndarray, by: str) -> np.ndarray:
    rows = []
    for layers in hidden:  # [F, D]
        if by == "layer":
            rows.append(np.concatenate([layer / np.linalg.norm(layer) for layer in layers]))
        else:
            whole = np.concatenate(list(layers))
            rows.append(whole / np.linalg.norm(whole) if by == "joint" else whole)
    return np.stack(rows)


def np_pool(hidden: np.ndarray, seq: list[int], n: int, method: str, completion: list[bool] | None) -> np.ndarray:
    out = []
    for s in range(n):
        mine = [hidden[t] for t in range(len(seq)) if seq[t] == s and (completion is None or completion[t])]
        if not mine:
            out.append(np.zeros(hidden.shape[1] * (3 if method == "quartiles" else 1)))
        elif method == "last":
            out.append(mine[-1])
        elif method == "quartiles":
            out.append(np.concatenate([mine[int(len(mine) * q)] for q in (0.25, 0.5, 0.75)]))
        else:
            out.append(sum(mine) / len(mine))
    return np.stack(out)


def np_whiten(gen: np.ndarray, ref: np.ndarray, side: str) -> tuple[np.ndarray, np.ndarray]:
    """(G, D), (D,): by the eigenvalues of X X^T (samples) or X^T X (features), those above 1e-9 of the largest."""
    gram = gen @ gen.T if side == "sample" else gen.T @ gen
    values, vectors = np.linalg.eigh(gram)
    root = sum(np.outer(v, v) / np.sqrt(e) for e, v in zip(values, vectors.T, strict=True) if e > 1e-9 * values.max())
    again = np.tile(ref, (len(gen), 1))
    return (root @ gen, root @ again) if side == "sample" else (gen @ root, again @ root)


def np_terms(gen: np.ndarray, ref: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(G, D), (D,) -> alignment and diversity of each sample."""
    n = len(gen)
    align = [2 * g @ ref / (np.linalg.norm(g) * np.linalg.norm(ref)) for g in gen]
    pairs = [sum(gen[j] @ gen[k] for k in range(n) if k != j) for j in range(n)]
    return np.array(align), np.array([2 * p / (n - 1) for p in pairs])


def np_baseline(gen: np.ndarray, ref: np.ndarray, kind: str, a: float, d: float) -> np.ndarray:
    """From the features, the sample's own left out where the kind says so."""
    n = len(gen)
    align, div = np_terms(gen, ref)
    out = []
    for j in range(n):
        others = [k for k in range(n) if k != j]
        if kind == "independent":
            products = [gen[k] @ gen[m] for k in others for m in others if k != m]
            out.append(a * np.mean(align[others]) - d * (2 * np.mean(products) if products else 0.0))
        else:
            out.append(np.mean((a * align - d * div)[others if kind == "leave_one_out" else slice(None)]))
    return np.array(out) if kind != "none" else np.zeros(n)


def feature_rows() -> list[Row]:
    hidden, gen, ref = numbers(7, 3, 4), numbers(4, 6, seed=1), numbers(6, seed=2)
    rows = []
    for by in ("joint", "layer", "none"):
        got = features.normalise(torch.tensor(hidden), by=by)
        rows.append(("normalise", f"by={by}", NUMPY, apart(got, np_normalise(hidden, by))))
    flat, seq, some = hidden[:, 0], [0, 0, 0, 0, 0, 2, 3], [True, False, True, True, False, True, True]
    for method, mask in (("last", None), ("last", some), ("mean", None), ("completion_mean", some),
                         ("quartiles", None), ("quartiles", some)):  # fmt: skip
        completion = None if mask is None else torch.tensor(mask)
        got = features.pool(torch.tensor(flat), torch.tensor(seq), 3, method=method, completion_T=completion)
        option = f"method={method}" + (", completion only" if mask else "")
        rows.append(("pool", option, NUMPY, apart(got, np_pool(flat, seq, 3, method, mask))))
    for side in ("sample", "feature"):
        got = features.whiten(torch.tensor(gen), torch.tensor(ref), side=side)
        want = np_whiten(gen, ref, side)
        rows.append(("whiten", f"side={side}", NUMPY, max(apart(g, w) for g, w in zip(got, want, strict=True))))
    return rows


def reward_rows() -> list[Row]:
    gen, ref = numbers(4, 6, seed=3), numbers(6, seed=4)
    gen_t, ref_t = torch.tensor(gen), torch.tensor(ref)
    terms = ebft.alignment(gen_t, ref_t), ebft.diversity(gen_t)
    want = np_terms(gen, ref)
    rows = [
        ("alignment", "cosine", NUMPY, apart(terms[0], want[0])),
        ("diversity", "", NUMPY, apart(terms[1], want[1])),
    ]
    for kind in ("independent", "leave_one_out", "mean", "none"):
        got = ebft.advantages(*terms, kind=kind, alignment_coef=0.7, diversity_coef=1.3)
        theirs = 0.7 * want[0] - 1.3 * want[1] - np_baseline(gen, ref, kind, 0.7, 1.3)
        rows.append(("advantages", f"kind={kind}", NUMPY, apart(got, theirs)))
    both = torch.stack([terms[0], terms[1]]), torch.zeros(2, 4, dtype=torch.float64)  # two blocks of four samples
    for scale, axis in (("samples", 1), ("blocks", 0)):
        got = ebft.advantages(*both, kind="mean", scale=scale, eps=0.0)
        r = np.stack(want)
        theirs = (r - r.mean(1, keepdims=True)) / r.std(axis, ddof=1, keepdims=True)
        rows.append(("advantages", f"scale={scale}", NUMPY, apart(got, theirs)))
    distance = float(((gen.mean(0) - ref) ** 2).sum())
    rows.append(("feature_matching", "plain", NUMPY, apart(ebft.feature_matching(gen_t, ref_t).loss, distance)))
    pairs = np.mean([gen[j] @ gen[k] for j in range(4) for k in range(4) if j != k])
    unbiased = float(pairs - 2 * gen.mean(0) @ ref + ref @ ref)
    got = ebft.feature_matching(gen_t, ref_t, unbiased=True).loss
    return [*rows, ("feature_matching", "unbiased", NUMPY, apart(got, unbiased))]


# --- the combined loss ------------------------------------------------------------------------------------------------


def np_ebft(lp: np.ndarray, fixed: np.ndarray, adv: np.ndarray, mask: np.ndarray, ce: np.ndarray, ref: np.ndarray,
            seq: np.ndarray | None, coefs: tuple[float, float, float], surrogate: str) -> float:  # fmt: skip
    """``fixed``: the log-probs where they are stopped."""
    per_token = -np.exp(lp - fixed) * adv if surrogate == "ratio" else -lp * adv
    total = 0.0
    for coef, value, weight in (
        (coefs[0], per_token, mask.astype(float)),
        (coefs[1], -lp, ce),
        (coefs[2], (lp - ref) ** 2 / 2, mask.astype(float)),
    ):
        groups = [np.ones(len(lp), bool)] if seq is None else [seq == s for s in sorted(set(seq))]
        means = [(value * weight)[g].sum() / weight[g].sum() for g in groups if weight[g].sum() > 0]
        total += coef * sum(means) / len(means)
    return total


def loss_rows() -> list[Row]:
    lp, adv, ref = -np.abs(numbers(12, seed=5)), numbers(12, seed=6), -np.abs(numbers(12, seed=7))
    mask = np.array([0, 0, 1, 1, 1, 0, 0, 0, 1, 1, 0, 0], bool)
    ce = np.array([1, 1, 0, 0, 0, 0, 0.5, 1, 0, 0, 0.25, 1])
    seq = np.array([0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2])
    coefs, rows = (0.9, 0.3, 0.05), []
    for aggregate, segments in (("token", None), ("sequence", seq)):
        for surrogate in ("ratio", "logp"):

            def oracle(x: np.ndarray, segments: np.ndarray | None = segments, surrogate: str = surrogate) -> float:
                return np_ebft(x, lp, adv, mask, ce, ref, segments, coefs, surrogate)

            x = torch.tensor(lp, requires_grad=True)
            out = ebft.ebft_loss(
                x, torch.tensor(adv), torch.tensor(mask), ce_T=torch.tensor(ce), ref_logp_T=torch.tensor(ref),
                seq_T=None if segments is None else torch.tensor(segments), aggregate=aggregate, surrogate=surrogate,
                rl_coef=coefs[0], ce_coef=coefs[1], kl_coef=coefs[2],
            )  # fmt: skip
            out.loss.backward()
            assert x.grad is not None
            difference = max(apart(out.loss, oracle(lp)), apart(x.grad, slope(oracle, lp)))
            rows.append(("ebft_loss", f"aggregate={aggregate}, surrogate={surrogate}", NUMPY, difference))
    return rows


# --- distillation and DFT ---------------------------------------------------------------------------------------------


def np_jsd(student: np.ndarray, teacher: np.ndarray, mask: np.ndarray, beta: float, temperature: float) -> float:
    total = 0.0
    for s, t, keep in zip(student, teacher, mask, strict=True):
        if not keep:
            continue
        s, t = (np.exp(x / temperature) / np.exp(x / temperature).sum() for x in (s, t))
        m = (1 - beta) * s + beta * t
        if beta == 0:
            total += (t * np.log(t / s)).sum()
        elif beta == 1:
            total += (s * np.log(s / t)).sum()
        else:
            total += beta * (t * np.log(t / m)).sum() + (1 - beta) * (s * np.log(s / m)).sum()
    return total / mask.sum()


def distill_rows() -> list[Row]:
    student, teacher, mask = numbers(5, 9, seed=8), numbers(5, 9, seed=9), np.array([1, 1, 0, 1, 1], bool)
    rows = []
    for beta in (0.0, 0.3, 0.5, 1.0):

        def oracle(x: np.ndarray, beta: float = beta) -> float:
            return np_jsd(x, teacher, mask, beta, 0.7)

        x = torch.tensor(student, requires_grad=True)
        out = distill.generalized_jsd(x, torch.tensor(teacher), torch.tensor(mask), beta=beta, temperature=0.7, tile=18)
        out.loss.backward()
        assert x.grad is not None
        difference = max(apart(out.loss, oracle(student)), apart(x.grad, slope(oracle, student)))
        rows.append(("generalized_jsd", f"beta={beta:g}, temperature=0.7", NUMPY, difference))
    logs = [torch.tensor(x).log_softmax(-1) for x in (student, teacher)]
    for tail in (True, False):
        s, t = (np.exp(x[:, :4].numpy()) for x in logs)
        s, t = ((np.c_[p, 1 - p.sum(1)] if tail else p / p.sum(1, keepdims=True)) for p in (s, t))
        got = distill.topk_jsd(logs[0][:, :4], logs[1][:, :4], torch.tensor(mask), beta=0.0, tail=tail).loss
        want = float((t * np.log(t / s)).sum(1)[mask].mean())
        rows.append(("topk_jsd", f"tail={tail}", NUMPY, apart(got, want)))
    return rows


def dft_rows() -> list[Row]:
    lp, mask = -np.abs(numbers(6, seed=10)), np.array([1, 0, 1, 1, 0, 1], bool)
    x = torch.tensor(lp, requires_grad=True)
    out = sft.dft(x, torch.tensor(mask))
    out.loss.backward()
    assert x.grad is not None
    value = float((-np.exp(lp) * lp)[mask].sum() / 4)
    return [("dft", "", NUMPY, max(apart(out.loss, value), apart(x.grad, np.where(mask, -np.exp(lp) / 4, 0.0))))]


def trl_rows() -> list[Row]:
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    try:
        from trl import SFTTrainer
        from trl.experimental.gkd import GKDTrainer
    except ImportError:
        return []
    rows = []
    for beta in (0.0, 0.1, 0.5, 1.0):
        ours, theirs = (torch.tensor(numbers(2, 3, 11, seed=11), dtype=torch.float32).requires_grad_() for _ in "ab")
        teacher = torch.tensor(numbers(2, 3, 11, seed=12), dtype=torch.float32)
        labels = torch.tensor([[-100, 1, 2], [3, -100, 5]])
        want = GKDTrainer.generalized_jsd_loss(theirs, teacher, labels, beta=beta, temperature=1.5)
        mask = (labels != -100).flatten()
        got = distill.generalized_jsd(ours.flatten(0, 1), teacher.flatten(0, 1), mask, beta=beta, temperature=1.5).loss
        got.backward()
        want.backward()
        assert ours.grad is not None and theirs.grad is not None
        difference = max(apart(got, want), apart(ours.grad, theirs.grad))
        rows.append(("generalized_jsd", f"beta={beta:g}, temperature=1.5", "TRL GKDTrainer, float32", difference))
    for loss_type, function in (("dft", sft.dft), ("nll", sft.nll)):
        ours, theirs = ((-torch.tensor(numbers(6, seed=13)).abs()).float().requires_grad_() for _ in "ab")
        mask = torch.tensor([True, False, True, True, False, True])
        got, want = function(ours, mask).loss, trl_sft(SFTTrainer, theirs, mask, loss_type)
        got.backward()
        want.backward()
        assert ours.grad is not None and theirs.grad is not None
        difference = max(apart(got, want), apart(ours.grad, theirs.grad))
        rows.append((loss_type, "", "TRL SFTTrainer.compute_loss, float32", difference))
    return rows


def trl_sft(trainer: type, logp: Tensor, mask: Tensor, loss_type: str) -> Tensor:
    """``SFTTrainer.compute_loss`` on given log-probs: everything else it reads is a stand-in."""
    outputs = SimpleNamespace(log_probs=torch.where(mask, logp, 0.0), label_mask=mask, entropy=torch.zeros(6),
                              is_top1=torch.zeros(6))  # fmt: skip
    stub = SimpleNamespace(
        model=SimpleNamespace(training=True), aux_loss_enabled=False, compute_loss_func=None, label_smoother=None,
        accelerator=SimpleNamespace(parallelism_config=None, num_processes=1, gather_for_metrics=lambda x: x),
        args=SimpleNamespace(loss_type=loss_type, average_tokens_across_devices=False),
        _metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    inputs = {"attention_mask": torch.ones(1, 6)}
    return trainer.compute_loss(stub, lambda **_: outputs, inputs)  # type: ignore[attr-defined]


ROWS: tuple[Row, ...] = (
    *feature_rows(), *reward_rows(), *loss_rows(), *distill_rows(), *dft_rows(), *trl_rows()
)  # fmt: skip
