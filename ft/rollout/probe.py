"""How the model in training can be sampled: tried on random tokens before the first step.

The log-probs with which a token is drawn must be those that the trainer computes for it, or every importance ratio is
wrong. Families break this each in its own way: a mask that does not reach some layer, a cache of another kind.

Shapes: P prompts, n answers of each, L tokens of an answer, B rows, T positions of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from attrs import frozen
from torch import Tensor

from ft import dist
from ft.data.pack import collate
from ft.dist import World
from ft.errors import ModelError
from ft.models.generating import generating
from ft.models.policy import Policy, logprobs
from ft.recipe.online import Sampling
from ft.rollout.embedded import continue_all
from ft.rollout.prefix import ANEW, EQUAL, PADDED, Way
from ft.rollout.sampling import draws
from ft.rollout.shared import Answer
from ft.types import Example

LENGTHS, ANSWERS, NEW = (3, 9, 4), 2, 4  # tokens of the prompts, answers of each, tokens of an answer
_FAILURES = (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError, ModelError)
_TOLD: dict[Way, str] = {
    PADDED: "prompts of any length side by side",
    EQUAL: "prompts of one length at a time",
    ANEW: "prompts of one length at a time, forwarded anew for each token",
}


@frozen(kw_only=True)
class Finding:
    """What one way showed: the distance from the trainer's log-probs, in nats, or why it did not run."""

    way: Way
    gap: float = float("nan")
    """Median over a prompt's tokens, of the worst prompt: a flip of a router's top-k is no mistake of the sampler."""
    tolerance: float = 0.0
    error: str = ""

    @property
    def ok(self) -> bool:
        return not self.error and self.gap <= self.tolerance

    def __str__(self) -> str:
        told = self.error or f"log-probs are {self.gap:.1e} from the trainer's, of at most {self.tolerance:.0e}"
        return f"{_TOLD[self.way]}: {told}"


def choose(policy: Policy, world: World, say: Callable[[str], None]) -> Way:
    """The first way that gives the trainer's log-probs; said where it is not the usual one. Every rank calls it.

    Raises:
        ModelError: none does.
    """
    findings: list[Finding] = []
    for way in (PADDED, EQUAL, ANEW):
        findings.append(_on_all_ranks(_tried(policy, world, way), world))
        if findings[-1].ok:
            if way != PADDED:
                say(f"sampling: {_TOLD[way]}, which is slower, for of {findings[0]}")
            return way
    raise ModelError(
        f"the model in training ({policy.config.model_type}) cannot be sampled in its own process",
        where="sampler", expected="log-probs that are the trainer's",
        got="".join(f"\n    {finding}" for finding in findings), fix="sample from a vLLM server: sampler=VLLM()",
    )  # fmt: skip


def _tried(policy: Policy, world: World, way: Way) -> Finding:
    rng, vocab = np.random.default_rng(0), policy.scorer.text_config.vocab_size
    prompts = [rng.integers(0, vocab, length).astype(np.int32) for length in LENGTHS]
    try:
        with generating(policy):
            answers = _drawn(policy, prompts, way)
        theirs_BL, dtype = _trained(policy, np.repeat(np.arange(len(prompts)), ANSWERS), prompts, answers, world)
    except _FAILURES as error:
        return Finding(way=way, error=f"{type(error).__name__}: {error}".splitlines()[0][:200])
    ours_BL = torch.from_numpy(np.stack([answer.logp_L for answer in answers]))
    gap_P = (theirs_BL - ours_BL).abs().view(len(prompts), -1).median(1).values
    coarse = {torch.bfloat16, torch.float16} & {dtype, *(p.dtype for p in policy.scorer.parameters())}
    tolerance = max(1e-5, (0.1 if coarse else 1e-3) * float(theirs_BL.std()))
    return Finding(way=way, gap=float(gap_P.nan_to_num(torch.inf).max()), tolerance=tolerance)


def _drawn(policy: Policy, prompts: Sequence[np.ndarray], way: Way) -> list[Answer]:
    """The same on every rank, none of which ends early: all forward equally often."""
    answers: list[Answer] = []
    for chosen in [[*range(len(prompts))]] if way == PADDED else [[p] for p in range(len(prompts))]:
        u_BL = draws(0, [(p, k) for p in chosen for k in range(ANSWERS)], NEW)
        answers += continue_all(
            policy.scorer.model, [prompts[p] for p in chosen], ANSWERS, u_BL,
            sampling=Sampling(max_tokens=NEW), stop=(), anew=way == ANEW,
        )  # fmt: skip
    return answers


@torch.no_grad()
def _trained(
    policy: Policy, prompt_B: np.ndarray, prompts: Sequence[np.ndarray], answers: Sequence[Answer], world: World
) -> tuple[Tensor, torch.dtype]:
    """Log-probs [B, L] by the trainer, without dropout, and the type it computes in."""
    rows = [np.concatenate([prompts[p], answer.tokens_L]) for p, answer in zip(prompt_B, answers, strict=True)]
    examples = [Example(tokens_L=row, mask_L=np.arange(len(row)) >= len(row) - NEW) for row in rows]
    batch, scorer = collate(examples).to(world.device), policy.scorer
    training = scorer.training
    scorer.eval()
    try:
        found = logprobs(policy, batch, hidden=True)
    finally:
        scorer.train(training)
    assert found.hidden_TD is not None
    return found.logp_T[batch.trained_N].view(len(rows), NEW).cpu(), found.hidden_TD.dtype


def _on_all_ranks(finding: Finding, world: World) -> Finding:
    """The worst of all ranks', so that they agree."""
    if dist.any_rank(bool(finding.error), world):
        return Finding(way=finding.way, error=finding.error or "it failed on another rank")
    worst = {name: float(x) for name, x in dist.reduce_tree({"gap": finding.gap}, world, "max").items()}
    return Finding(way=finding.way, gap=worst["gap"], tolerance=finding.tolerance)
