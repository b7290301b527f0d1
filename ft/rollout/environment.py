"""Answers of several turns: the model says something, an environment replies, and so on. Tokens in, tokens out.

What the model has sampled stays the tokens that it sampled; only replies are tokenised. ``mask_L`` of a rollout is
True where the model spoke, so that replies are read and never trained.

Shapes: L tokens of one answer, all turns and replies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from attrs import define, evolve, field, frozen

from ft.rollout.shared import number
from ft.types import Environment, Example, Rollout, Sampler

COLUMN = "environment"  # of the row, where the rewards of an environment are put for ft.rollout.rewards.environment
_TURN = 1_000_000_007  # apart in the steps by which a sampler seeds turns


@define(eq=False)
class _Talk:
    """An answer in the making."""

    prompt: Example
    number: int  # no other answer's of the step: by which its later turns are seeded
    policy_step: int
    last: Rollout  # the turn that was sampled last
    state: Any
    tokens: list[int]
    logps: list[float]
    mask: list[bool]
    finish: str = "stop"
    routes: list[np.ndarray] = field(factory=list)

    def hear(self, turn: Rollout) -> None:
        self.last = turn
        if turn.routes_LMK is not None:  # of all that was said so far; what had its experts before keeps them
            self.routes.append(turn.routes_LMK[sum(map(len, self.routes)) :])
        self.tokens += turn.tokens_L.tolist()
        self.logps += [np.nan] * len(turn.tokens_L) if turn.logp_L is None else turn.logp_L.tolist()
        self.mask += [True] * len(turn.tokens_L)

    def reply(self, ids: Sequence[int]) -> None:
        self.tokens += ids
        self.logps += [0.0] * len(ids)
        self.mask += [False] * len(ids)

    @property
    def so_far(self) -> np.ndarray:
        return np.concatenate([self.prompt.tokens_L, np.array(self.tokens, np.int32)]).astype(np.int32)


@frozen(kw_only=True, eq=False)
class EnvironmentSampler:
    """Implements ``ft.types.Sampler`` with another one, and with an environment that replies.

    The environment is a function of what was said, and runs in this process, on every rank alike.
    """

    sampler: Sampler
    environment: Environment
    decode: Callable[[Sequence[int]], str]
    reply_ids: Callable[[str], list[int]]  # from the end of the model's turn to the beginning of its next one
    turns: int  # most of the model's
    longest: int  # most tokens of a prompt and its whole answer before the model speaks again

    def sync(self, step: int) -> None:
        self.sampler.sync(step)

    def rollout(self, prompts: Sequence[Example], n: int, step: int, *, greedy: bool = False) -> list[list[Rollout]]:
        """``n`` answers to each prompt. One that reaches ``turns`` or ``longest`` in want of a turn is cut off."""
        first = self.sampler.rollout(prompts, n, step, greedy=greedy)
        talks = [
            self._begun(turn, number(prompts[p], p) * n + k)
            for p, group in enumerate(first) for k, turn in enumerate(group)
        ]  # fmt: skip
        going = [talk for talk in talks if self._goes_on(talk, 1)]
        turn = 1
        while going:
            asked = [
                evolve(talk.prompt, tokens_L=(ids := talk.so_far), mask_L=np.zeros(len(ids), bool), group=talk.number)
                for talk in going
            ]
            said = self.sampler.rollout(asked, 1, step + turn * _TURN, greedy=greedy)
            for talk, (one,) in zip(going, said, strict=True):
                talk.hear(one)
            turn += 1
            going = [talk for talk in going if self._goes_on(talk, turn)]
        flat = [self._ended(talk) for talk in talks]
        return [flat[i : i + n] for i in range(0, len(flat), n)]

    def _begun(self, turn: Rollout, number: int) -> _Talk:
        state = self.environment.reset(turn.prompt.columns or {})
        talk = _Talk(turn.prompt, number, turn.policy_step, turn, state, [], [], [])
        talk.hear(turn)
        return talk

    def _goes_on(self, talk: _Talk, turns: int) -> bool:
        """Have the environment answer the last turn; False where nothing is to be said any more, or may be."""
        if talk.last.finish != "stop":
            talk.finish = talk.last.finish
            return False
        talk.state, reply = self.environment.step(talk.state, self.decode(talk.last.tokens_L.tolist()))
        if reply is None:
            return False
        ids = self.reply_ids(reply)
        if ids[:1] == talk.tokens[-1:]:  # the token that ended the turn, which the model has said itself
            ids = ids[1:]
        if turns == self.turns or len(talk.prompt) + len(talk.tokens) + len(ids) >= self.longest:
            talk.finish = "length"
            return False
        talk.reply(ids)
        return True

    def _ended(self, talk: _Talk) -> Rollout:
        reward = self.environment.reward(talk.state)
        return Rollout(
            prompt=evolve(talk.prompt, columns={**(talk.prompt.columns or {}), COLUMN: reward}),
            tokens_L=np.array(talk.tokens, np.int32),
            logp_L=np.array(talk.logps, np.float32),
            mask_L=np.array(talk.mask, bool),
            finish=talk.finish,
            policy_step=talk.policy_step,
            routes_LMK=np.concatenate(talk.routes) if talk.routes else None,
        )


def reply_ids(tokenizer: Any, text: str, role: str = "user") -> list[int]:
    """What stands in the model's chat template between its turn and its next one, with ``text`` said by ``role``."""
    mark = "\x1a"  # stands for the model's own turn, and in no template
    talk = [{"role": "user", "content": "?"}, {"role": "assistant", "content": mark}, {"role": role, "content": text}]
    rendered = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(rendered.partition(mark)[2], add_special_tokens=False)
