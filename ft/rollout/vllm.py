"""Sampling from a vLLM server, which is sent the weights of each step. Only the first rank talks to it."""

from __future__ import annotations

import hashlib
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from attrs import define, field
from torch import Tensor

from ft.dist import World
from ft.errors import ServerError
from ft.models.policy import Policy
from ft.recipe.online import VLLM, Sampling
from ft.rollout import canary, foreign, routed
from ft.rollout.client import Client, Drawn, Malformed, Refused, Unreachable, in_parallel
from ft.rollout.sent import Weights, packed, prune
from ft.rollout.server import Server, generates, last_words, retried
from ft.rollout.shared import Answer, from_all_ranks, number, on_first
from ft.rollout.transfer import Parcel, Way
from ft.types import Arrived, Example, Expect, Rollout

T = TypeVar("T")
_PROBE = 30.0  # seconds in which a healthy server gives one token


@define(kw_only=True, eq=False)
class VLLMSampler:
    """Implements ``ft.types.Sampler``. ``close`` ends the server, if it is ours."""

    options: VLLM
    sampling: Sampling
    stop: frozenset[int]
    seed: int
    world: World
    policy: Policy
    weights: Weights
    rows: Sequence[Sequence[int]]  # the canary's
    folder: Path  # the run's
    server: Server | None  # ours
    client: Client | None  # to one that is not ours
    notice: Callable[[str], None]
    routed: routed.Routed | None = None  # where the policy has experts, if the server tells which it chose
    expect: Expect | None = None  # of a draw's answers: takes each group while others are drawn
    name: str = field(factory=lambda: f"ft-{secrets.token_hex(4)}")  # of the adapter; no other run's
    step: int = -1  # of the weights that the server has
    digest: str = ""  # of these weights
    sent: int = 0
    loaded: Parcel | None = None  # what was sent last
    mended: tuple[int, int] = (-1, 0)  # step, and how often the server was mended in it
    past: dict[str, np.ndarray] = field(factory=dict)  # the canary's log-probs of older weights
    mismatch: canary.Verdict | None = None
    closed: threading.Event = field(factory=threading.Event)
    way: Way = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.way = self.weights.way(self.name)

    # --- weights -----------------------------------------------------------------------------------------------------

    def sync(self, step: int) -> None:
        """Send the weights, unless the server has them, and compare its log-probs with the policy's own.

        Raises:
            ServerError: no server, none that takes them, or one that does not sample from them; on every rank.
        """
        tensors = self.weights.gather()
        digest = _digest(tensors)
        if digest != self.digest:
            ours_N = canary.expected(self.policy, self.rows, self.world)
            on_first(lambda: self._send(step, tensors, ours_N), self.world, None)
            self.digest = digest
        self.step = step

    def _send(self, step: int, tensors: Mapping[str, Tensor], ours_N: np.ndarray) -> None:
        if self.server is None and not self.sent:
            self._insist(self._meet, step)
        self.loaded = packed(self.weights, tensors, self.folder, step, f"{self._tag}-{self.sent}")
        self._insist(self._load, step)
        if not self.sent:
            self._insist(self._check_temperature, step)
        self._insist(lambda: self._compare(step, ours_N), step)
        self.sent += 1
        prune(self.folder, self._tag)

    def _load(self) -> None:
        """Have the server take the last weights; it is started if it is ours and does not run."""
        assert self.loaded is not None
        if self.server is not None and not self.server.alive:
            if self.server.process is not None:
                self.notice("the vLLM server has ended; it is started again")
            self.server.start(self.loaded.folder if self.way.starts else None)
            if self.way.starts:
                return
        self.way.send(self._client(), self.loaded)

    def _check_kept(self) -> None:
        if self.loaded is not None:
            self.way.check(self._client(), self.loaded)

    def _meet(self) -> None:
        if self.weights.wanted is not None:
            foreign.meet(self._client(), self.weights.wanted, self.notice)

    def _compare(self, step: int, ours_N: np.ndarray) -> None:
        client = self._client()
        theirs_N = np.concatenate([client.score(self.way.model, row) for row in self.rows])
        self.mismatch = verdict = canary.compare(theirs_N, ours_N, self.past)
        if not self.sent or verdict.divergence > (self.options.canary or 0.05) / 10:
            self.notice(
                f"canary: the server's log-probs are {verdict.divergence:.2g} per token from the policy's, "
                f"{verdict.largest:.2g} at most"
            )
        canary.check(verdict, self.options.canary, client.url)
        self.past.setdefault("the weights that it was sent first", ours_N)
        self.past["the weights before these"] = ours_N

    def _check_temperature(self) -> None:
        """Are log-probs those of the distribution that is drawn from? They must grow sharper as it cools."""
        if self.sampling.temperature == 1 and not self.sampling.truncates:
            return
        asked, client = {"max_tokens": 1, "logprobs": 1}, self._client()
        warm, cold = (
            client.complete(self.way.model, self.rows[0][:4], 1, {**asked, "temperature": t})[0].top[0][0]
            for t in (1.0, 0.5)
        )
        if abs(warm - cold) < 1e-3:
            raise ServerError(
                "the server's log-probs leave out the temperature", where=client.url,
                expected=f"log-probs of what it draws from (temperature {self.sampling.temperature:g})",
                got=f"{warm:.4f} at temperature 1 and {cold:.4f} at 0.5 for the likeliest token",
                fix="start it with --logprobs-mode processed_logprobs, as `ft serve` does",
            )  # fmt: skip

    # --- answers -----------------------------------------------------------------------------------------------------

    def rollout(self, prompts: Sequence[Example], n: int, step: int, *, greedy: bool = False) -> list[list[Rollout]]:
        """``n`` answers to each prompt, the same on every rank. Seeds depend on the run's seed, step and group."""
        nothing: list[list[Answer]] = [[] for _ in prompts]
        found = on_first(lambda: self.ask(prompts, n, step, greedy=greedy), self.world, nothing)
        found = from_all_ranks(found, n, self.world)
        return [
            [_rollout(prompt, answer, self.step) for answer in group]
            for prompt, group in zip(prompts, found, strict=True)
        ]

    def ask(self, prompts: Sequence[Example], n: int, step: int, *, greedy: bool = False) -> list[list[Answer]]:
        """The same on the first rank alone, in any thread: while the policy trains, too."""
        found: list[list[Answer]] = [[] for _ in prompts]
        arrived = self.expect(len(prompts) * n) if self.expect else None
        if self.server is None:
            self._insist(self._check_kept, step)
        while left := [p for p, answers in enumerate(found) if not answers]:
            replies = self._ask(prompts, left, n, step, greedy, arrived)
            failed = None
            for p, reply in zip(left, replies, strict=True):
                if isinstance(reply, list):
                    found[p] = reply
                elif isinstance(reply, Exception):
                    failed = failed or (reply, prompts[p].source)
            if failed:
                self._after(*failed, step)
        return found

    def _ask(
        self, prompts: Sequence[Example], left: Sequence[int], n: int, step: int, greedy: bool, arrived: Arrived | None
    ) -> list[list[Answer] | Exception | None]:
        client, options = self._client(), sampling_options(self.sampling, self.stop, greedy)

        def ask(p: int) -> list[Answer]:
            asked = {**options, "seed": seed_of(self.seed, step, number(prompts[p], p))}
            drawn = client.complete(self.way.model, prompts[p].tokens_L.tolist(), n, asked)
            group = [_answer(one, greedy, self._routes(one, prompts[p])) for one in drawn]
            if arrived:
                arrived([_rollout(prompts[p], answer, self.step) for answer in group])
            return group

        return in_parallel(ask, left, self.options.concurrency, self.closed)

    def _routes(self, drawn: Drawn, prompt: Example) -> np.ndarray | None:
        if self.routed is None:
            return None
        return routed.read(drawn.routes, self.routed, len(prompt) + len(drawn.tokens) - 1, self._client().url)

    # --- what goes wrong ---------------------------------------------------------------------------------------------

    def _insist(self, act: Callable[[], T], step: int) -> T:
        """``act``, again after each time the server could be mended."""
        while True:
            try:
                return act()
            except (Unreachable, Refused, Malformed) as error:
                self._after(error, "", step)

    def _after(self, error: Exception, source: str, step: int) -> None:
        """Mend the server after ``error``, so that what failed can be tried again.

        Raises:
            ServerError: it cannot be mended, or was often enough in this step; or the run is ending.
        """
        if not isinstance(error, (Unreachable, Refused, Malformed)):
            raise error
        if self.closed.is_set():  # what failed was in flight, in another thread
            raise ServerError("the run is ending", got=str(error)) from error
        count = self.mended[1] if self.mended[0] == step else 0
        lost = isinstance(error, Refused) and error.status == 404  # the adapter: another server stands there now
        most = 1 if self.server is not None else 3
        if count >= most or not (lost or isinstance(error, Unreachable)):
            raise self._failure(error, source)
        self.mended = (step, count + 1)
        if self.server is not None:
            self.notice(f"the vLLM server failed ({error}); it is started again, with the weights of step {self.step}")
            self.server.close()
        else:
            self.notice(f"the server at {self._client().url} failed ({error}); trying again")
        try:
            retried(self._mend, 0 if self.server else self.options.patience, wait=self.closed.wait)
        except (Unreachable, Refused, Malformed) as again:
            raise self._failure(again, source) from again

    def _mend(self) -> None:
        """Up, with the last weights, and generating."""
        if self.closed.is_set():
            raise ServerError("the run is ending")
        if self.loaded is None:  # nothing was sent yet
            self._meet()
            return
        self._load()
        client = self._client()
        generates(Client(url=client.url, token=client.token, timeout=min(client.timeout, _PROBE)), self.way.model)

    def _failure(self, error: Exception, source: str) -> ServerError:
        url = self._client().url if self.server is None or self.server.client else "the vLLM server"
        log = last_words(self.server.launch.log) if self.server else ""
        kinds = {
            Refused: "the vLLM server refuses a request", Malformed: "the vLLM server sends what was not asked for",
        }  # fmt: skip
        problem = kinds.get(type(error), "the vLLM server cannot be reached")
        return ServerError(
            problem + (f" (for {source})" if source else "") + log, where=url, got=str(error),
            fix="mend the server, then go on from the newest checkpoint with --resume"
            + ("" if self.server else ", and with sampler.url=... where it has another address now"),
        )  # fmt: skip

    def _client(self) -> Client:
        client = self.client if self.server is None else self.server.client
        if client is None:
            raise Unreachable("it does not run")
        return client

    @property
    def _tag(self) -> str:
        """Ours in names of folders, and of what is sent."""
        return self.name.removeprefix("ft-")

    def close(self) -> None:
        """End our server, have another one forget us, and remove the folders of weights."""
        self.closed.set()
        if self.server is not None:
            self.server.end()
        elif self.sent and self.world.first and self.client is not None:
            with suppress(Unreachable, Refused):
                self.way.leave(Client(url=self.client.url, token=self.client.token, timeout=5.0))
        if self.sent and self.world.first:
            prune(self.folder, self._tag, 0)


def sampling_options(sampling: Sampling, stop: frozenset[int], greedy: bool) -> dict[str, Any]:
    """The recipe's sampling in vLLM's names. Every one is given, so that no server's own default counts."""
    drawn = {
        "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k, "min_p": sampling.min_p
    }  # fmt: skip
    chosen = {"temperature": 0.0} if greedy or sampling.greedy else drawn
    return {
        **chosen, "max_tokens": sampling.max_tokens, "stop_token_ids": sorted(stop), "ignore_eos": True,
        "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
    }  # fmt: skip


def seed_of(seed: int, step: int, prompt: int) -> int:
    """Of one prompt's answers: below 2^62, since vLLM counts up from it for each of them."""
    digest = hashlib.blake2b(repr((seed, step, prompt)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2


def _rollout(prompt: Example, answer: Answer, step: int) -> Rollout:
    return Rollout(
        prompt=prompt,
        tokens_L=answer.tokens_L,
        logp_L=answer.logp_L,
        finish="stop" if answer.stopped else "length",
        policy_step=step,
        routes_LMK=answer.routes_LMK,
    )


def _answer(drawn: Drawn, greedy: bool, routes_LMK: np.ndarray | None) -> Answer:
    """Log-probs of the likeliest token are not those of a draw: NaN, unknown."""
    logp_L = np.full(len(drawn.logps), np.nan) if greedy else np.array(drawn.logps)
    return Answer(np.array(drawn.tokens, np.int32), logp_L.astype(np.float32), drawn.finish == "stop", routes_LMK)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    total = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        total.update(name.encode())
        total.update(tensors[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
