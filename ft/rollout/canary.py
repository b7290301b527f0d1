"""A fixed text, scored by the trainer and by the server after each sync: do they hold the same weights?

Shapes: T tokens of all rows, N scored ones: every token but the first of each row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from attrs import frozen

from ft.data.pack import collate
from ft.dist import World
from ft.errors import ServerError
from ft.models.policy import Policy, logprobs
from ft.types import Example

TEXTS = (
    "The three children counted their marbles twice: 17 red ones, 25 blue ones and 8 green ones, 50 in all.",
    "def area(width, height):\n    return width * height  # square metres",
)


def rows_of(tokenizer: Any, longest: int) -> list[list[int]]:
    """The texts as token ids, cut to what the server takes."""
    return [list(tokenizer.encode(text, add_special_tokens=False))[: longest - 1] for text in TEXTS]


@torch.no_grad()
def expected(policy: Policy, rows: Sequence[Sequence[int]], world: World) -> np.ndarray:
    """logp_N under the policy at temperature 1, without dropout. Every rank calls it, since all forward together."""
    examples = [
        Example(tokens_L=np.array(row, np.int32), mask_L=np.arange(len(row)) > 0, source="canary") for row in rows
    ]
    batch, scorer = collate(examples).to(world.device), policy.scorer
    training = scorer.training
    scorer.eval()
    try:
        logp_T = logprobs(policy, batch).logp_T
    finally:
        scorer.train(training)
    return logp_T[batch.trained_N].double().cpu().numpy()


def divergence(theirs_N: np.ndarray, ours_N: np.ndarray) -> float:
    """Mean of exp(d) - 1 - d, d = ours - theirs, held within +-20: 0 where both are equal, about d^2 / 2 where near."""
    gap_N = np.clip(ours_N - theirs_N, -20, 20)
    return float(np.mean(np.expm1(gap_N) - gap_N))


@frozen(kw_only=True, eq=False)
class Verdict:
    """How far the server is from the trainer, and the older weights to which it is much nearer, if there are any."""

    divergence: float
    largest: float  # |difference| of a token's log-probs
    resembles: str = ""


def compare(theirs_N: np.ndarray, ours_N: np.ndarray, older: dict[str, np.ndarray]) -> Verdict:
    """``older``: what the trainer said with earlier weights, by name.

    Whose distance is less than a third of the present weights' distance is what the server really has: noise between
    two implementations moves both distances alike, so this holds for steps too small for any fixed threshold.
    """
    distance = float(np.abs(theirs_N - ours_N).mean())
    nearer = [name for name, past_N in older.items() if np.abs(theirs_N - past_N).mean() < distance / 3]
    return Verdict(
        divergence=divergence(theirs_N, ours_N),
        largest=float(np.abs(theirs_N - ours_N).max()),
        resembles=nearer[0] if nearer else "",
    )


def check(verdict: Verdict, most: float | None, where: str) -> None:
    """Raises:
    ServerError: the server does not sample from the policy. ``most`` None lets everything pass.
    """
    if most is None or (verdict.divergence <= most and not verdict.resembles):
        return
    told = f"divergence {verdict.divergence:.3g} per token, largest difference {verdict.largest:.3g}"
    if verdict.resembles:
        problem = f"the server still answers with {verdict.resembles}: what was sent is stale there, or not applied"
    else:
        problem = (
            "the server's log-probs are not the policy's: another model, a stale adapter, or one whose layout "
            "the server does not apply"
        )
    raise ServerError(
        problem, where=where, expected=f"at most {most:g}, and nearest to the present weights", got=told,
        fix="restart the server on the recipe's model; sampler=embedded needs none. Where types differ (a 4-bit base "
        "here, 16 bits there) a larger sampler.canary may be right",
    )  # fmt: skip
