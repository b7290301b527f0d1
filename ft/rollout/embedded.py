"""Sampling from the model in training, in its own process: batched, with a KV cache, finished rows leave early.

Shapes: P prompts, n answers of each, B rows, L new tokens, W width of padded prompts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from attrs import evolve, field, frozen
from torch import Tensor

from ft import dist
from ft.dist import World
from ft.models.generating import generating
from ft.models.policy import Policy
from ft.recipe.online import Sampling
from ft.rollout.prefix import ANEW, PADDED, Way, begin
from ft.rollout.sampling import draws, pick
from ft.rollout.shared import Answer, from_all_ranks, number
from ft.types import Example, Expect, Rollout


@frozen(kw_only=True, eq=False)
class EmbeddedSampler:
    """Implements ``ft.types.Sampler``. What it samples depends on seed, step and prompt, not on ranks or batches.

    (But for the last bits of a forward, in which a batch's shape shows.)
    """

    policy: Policy
    world: World
    sampling: Sampling
    stop: frozenset[int] = field(converter=frozenset)
    rows: int  # at a time
    seed: int
    way: Way = PADDED
    expect: Expect | None = None  # of a draw's answers: takes this rank's groups as rows are done

    def sync(self, step: int) -> None:
        """Nothing to do: it is the model in training."""

    def rollout(self, prompts: Sequence[Example], n: int, step: int, *, greedy: bool = False) -> list[list[Rollout]]:
        """``n`` answers to each prompt, the same on every rank; called by all of them."""
        sampling = evolve(self.sampling, greedy=True) if greedy else self.sampling
        found: list[list[Answer]] = [[] for _ in prompts]
        arrived = self.expect(len(prompts) * n) if self.expect else None
        with generating(self.policy):
            for chosen in self._turns([len(prompt.tokens_L) for prompt in prompts], max(1, self.rows // n)):
                names = [(step, number(prompts[p], p), k) for p in chosen for k in range(n)]
                answers = self._answers([prompts[p].tokens_L for p in chosen], n, names, sampling)
                for i, p in enumerate(chosen):
                    found[p] = answers[i * n : (i + 1) * n]
                    if arrived:
                        arrived([_rollout(prompts[p], answer, step) for answer in found[p]])
        found = from_all_ranks(found, n, self.world)
        return [
            [_rollout(prompt, answer, step) for answer in group] for prompt, group in zip(prompts, found, strict=True)
        ]

    def _turns(self, lengths: Sequence[int], most: int) -> list[list[int]]:
        """This rank's prompts, ``most`` at a time; empty ones at the end while other ranks have more turns."""
        size = self.world.size
        each = [_turns([*range(rank, len(lengths), size)], lengths, most, self.way) for rank in range(size)]
        mine = each[self.world.rank]
        return mine + [[]] * (max(map(len, each)) - len(mine))

    def _answers(
        self, prompts: Sequence[np.ndarray], n: int, names: list[tuple[int, ...]], sampling: Sampling
    ) -> list[Answer]:
        """A rank without prompts goes along with one token, so that all forward equally often."""
        idle = not prompts
        prompts, names = (prompts, names) if not idle else ([np.zeros(1, np.int32)], [(0,)] * n)
        u_BL = None if sampling.greedy else draws(self.seed, names, sampling.max_tokens)
        answers = continue_all(
            self.policy.scorer.model, prompts, n, u_BL,
            sampling=sampling, stop=self.stop, world=self.world, idle=idle, anew=self.way == ANEW,
        )  # fmt: skip
        return [] if idle else answers


def _turns(prompts: Sequence[int], lengths: Sequence[int], most: int, way: Way) -> list[list[int]]:
    """Prompts by number, ``most`` at a time; of one length each time, unless they may be padded."""
    groups: dict[int, list[int]] = {}
    for p in prompts:
        groups.setdefault(0 if way == PADDED else lengths[p], []).append(p)
    return [group[start : start + most] for group in groups.values() for start in range(0, len(group), most)]


def _rollout(prompt: Example, answer: Answer, step: int) -> Rollout:
    return Rollout(
        prompt=prompt,
        tokens_L=answer.tokens_L,
        logp_L=answer.logp_L,
        finish="stop" if answer.stopped else "length",
        policy_step=step,
    )


@torch.no_grad()
def continue_all(
    model: Any,
    prompts: Sequence[np.ndarray],
    n: int,
    u_BL: Tensor | None,
    *,
    sampling: Sampling,
    stop: Iterable[int],
    world: World | None = None,
    idle: bool = False,
    anew: bool = False,
) -> list[Answer]:
    """``n`` answers to each of P prompts, in order; row p * n + k is answer k of prompt p.

    Args:
        u_BL: uniform numbers that decide each token; None takes the likeliest.
        world: ranks that forward in step with this one; None: nobody.
        idle: what comes out is of no interest.
        anew: no cache; prompts of one length only.
    """
    B, L, device = len(prompts) * n, sampling.max_tokens, next(model.parameters()).device
    ends, u_BL = torch.tensor(sorted(stop), device=device), None if u_BL is None else u_BL.to(device)
    token_BL, logp_BL = torch.zeros(B, L, dtype=torch.int64, device=device), torch.zeros(B, L, device=device)
    row_B, done_B = torch.arange(B, device=device), torch.zeros(B, dtype=torch.bool, device=device)
    prefix, written = begin(model, prompts, n, room=L, anew=anew), 0
    while True:
        token_B, logp_B = pick(prefix.logits_BV, None if u_BL is None else u_BL[row_B, written], sampling)
        token_BL[row_B, written], logp_BL[row_B, written] = token_B, logp_B
        done_B, written = done_B | torch.isin(token_B, ends), written + 1
        left = int((~done_B).sum())
        if written == L or not _anyone(left > 0 and not idle, world):
            return _cut(token_BL[:, :written], logp_BL, ends)
        if 0 < left < len(done_B):
            going = (~done_B).nonzero()[:, 0]
            prefix.choose(going)
            row_B, done_B, token_B = row_B[going], done_B[going], token_B[going]
        prefix.append(token_B)


def _anyone(going: bool, world: World | None) -> bool:
    return going if world is None else dist.any_rank(going, world)


def _cut(token_BL: Tensor, logp_BL: Tensor, ends: Tensor) -> list[Answer]:
    """Each row up to and with the first token that ends it."""
    is_end_BL = torch.isin(token_BL, ends).cpu().numpy()
    tokens, logps = token_BL.cpu().numpy().astype(np.int32), logp_BL.cpu().numpy()
    stopped: Any = is_end_BL.any(1)
    sizes = np.where(stopped, is_end_BL.argmax(1) + 1, tokens.shape[1])
    return [
        Answer(row[:size], logp[:size], bool(ended))
        for row, logp, size, ended in zip(tokens, logps, sizes, stopped, strict=True)
    ]
