"""Talking to a vLLM server over HTTP: token ids in, token ids and their log-probs out, every reply checked.

Three ways in which a call fails: nobody answered (``Unreachable``), the server said no (``Refused``), or what came is
not what was asked for (``Malformed``).
"""

from __future__ import annotations

import http.client
import json
import math
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar
from urllib.parse import urlsplit

import msgspec
from attrs import frozen

from ft.errors import RecipeError

T = TypeVar("T")
R = TypeVar("R")
S = TypeVar("S", bound=msgspec.Struct)
ATTEMPTS = 3  # calls of one request before a malformed answer is final
_LOWEST = -9000.0  # vLLM writes -9999 for the log-prob of what cannot be drawn


class Unreachable(Exception):
    """No connection, a broken one, no answer in time, or a server whose engine is gone (5xx; 501 is a refusal)."""


class Broken(Unreachable):
    """An answer of status 5xx: its engine is gone, or what was asked for made it fail."""


class Refused(Exception):
    """The server understood and said no."""

    def __init__(self, status: int, message: str):
        super().__init__(f"status {status}: {message}")
        self.status = status


class Malformed(Exception):
    """A reply that is not what the request asked for."""


class _Logprobs(msgspec.Struct):
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] = []


class _Prompted(msgspec.Struct):
    logprob: float


class _Choice(msgspec.Struct):
    index: int
    token_ids: list[int]
    finish_reason: str
    logprobs: _Logprobs | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[dict[str, _Prompted] | None] | None = None
    routed_experts: str | None = None


class _Completion(msgspec.Struct):
    model: str
    choices: list[_Choice]


class Served(msgspec.Struct):
    """A model, or an adapter on the one called ``parent``. ``root`` is its folder."""

    id: str
    root: str | None = None
    parent: str | None = None
    max_model_len: int | None = None


class _Models(msgspec.Struct):
    data: list[Served]


class _Version(msgspec.Struct):
    version: str


class _Workers(msgspec.Struct):
    world_size: int


class _Weights(msgspec.Struct):
    weight_version: str


class _Done(msgspec.Struct):
    success: bool


@frozen(kw_only=True)
class Drawn:
    """One answer. ``top`` are the likeliest log-probs at each token, where they were asked for; ``routes`` the experts
    of all tokens but the last, where the server tells them, as it tells them (``ft.rollout.routed``)."""

    tokens: tuple[int, ...]
    logps: tuple[float, ...]
    finish: str  # "stop" | "length"
    top: tuple[tuple[float, ...], ...] = ()
    routes: str | None = None


@frozen(kw_only=True)
class Client:
    """Where the server is. Each call has a connection of its own, so that threads share nothing."""

    url: str
    token: str = ""
    timeout: float = 600.0

    def complete(self, model: str, prompt: Sequence[int], n: int, options: Mapping[str, Any]) -> list[Drawn]:
        """``n`` answers to a prompt of token ids. ``options`` are vLLM's own names of sampling parameters.

        Raises:
            Unreachable, Refused, Malformed
        """
        return again(lambda: self._complete(model, prompt, n, options))

    def _complete(self, model: str, prompt: Sequence[int], n: int, options: Mapping[str, Any]) -> list[Drawn]:
        asked = {"logprobs": 0, **options, "n": n, "model": model, "prompt": list(prompt), "return_token_ids": True}
        reply = self._completion(asked)
        if sorted(choice.index for choice in reply.choices) != list(range(n)):
            raise Malformed(f"{len(reply.choices)} choices for n={n}")
        choices = sorted(reply.choices, key=lambda choice: choice.index)
        return [_drawn(choice, prompt, asked["max_tokens"]) for choice in choices]

    def score(self, model: str, tokens: Sequence[int]) -> list[float]:
        """Log-prob of each token but the first given those before it, at temperature 1, by the server's own forward."""
        return again(lambda: self._score(model, tokens))

    def _score(self, model: str, tokens: Sequence[int]) -> list[float]:
        asked = {
            "model": model, "prompt": list(tokens), "max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 0,
            "return_token_ids": True,
        }  # fmt: skip
        found = [choice.prompt_logprobs for choice in self._completion(asked).choices]
        if len(found) != 1 or found[0] is None or len(found[0]) != len(tokens):
            raise Malformed(f"no log-prob for each of the prompt's {len(tokens)} tokens")
        values = [(given or {}).get(str(token)) for token, given in zip(tokens[1:], found[0][1:], strict=True)]
        if any(value is None or not math.isfinite(value.logprob) for value in values):
            raise Malformed("log-probs of a prompt that are not those of its tokens")
        return [value.logprob for value in values if value is not None]

    def _completion(self, asked: dict[str, Any]) -> _Completion:
        reply = _decoded(self.post("/v1/completions", asked), _Completion)
        if reply.model != asked["model"]:
            raise Malformed(f"an answer of the model {reply.model!r}, not of {asked['model']!r}")
        return reply

    def load_adapter(self, name: str, folder: str) -> None:
        """Put an adapter of this machine's disk in the place of the one called ``name``."""
        self.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": folder, "load_inplace": True})

    def models(self) -> list[Served]:
        """What the server answers to."""
        return self._get("/v1/models", _Models).data

    def healthy(self) -> bool:
        """Whether its engine lives, by its own account."""
        try:
            self._request("GET", "/health", None)
        except (Unreachable, Refused):
            return False
        return True

    def version(self) -> str:
        """Of vLLM."""
        return self._get("/version", _Version).version

    # Only where the server takes whole models while it runs: see ``ft.rollout.transfer``.

    def call(self, method: str, **arguments: str) -> None:
        """A method of its workers, on each of them."""
        self.post("/collective_rpc", {"method": method, "kwargs": arguments})

    def workers(self) -> int:
        """How many it has."""
        return self._get("/get_world_size", _Workers).world_size

    def weight_version(self) -> str:
        """What its weights were called when they were sent."""
        return self._get("/weight_info", _Weights).weight_version

    def reset_cache(self) -> None:
        """Forget what was computed of prompts."""
        if not _decoded(self.post("/reset_prefix_cache", {}), _Done).success:
            raise Broken("it does not forget what the older weights made of prompts")

    def _get(self, path: str, kind: type[S]) -> S:
        return _decoded(self._request("GET", path, None), kind)

    def post(self, path: str, body: Mapping[str, Any]) -> bytes:
        return self._request("POST", path, msgspec.json.encode(body))

    def _request(self, verb: str, path: str, body: bytes | None) -> bytes:
        headers = {"Content-Type": "application/json"}
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        connection, prefix = self._connection()
        try:
            connection.request(verb, prefix + path, body, headers)
            response = connection.getresponse()
            raw = response.read()
        except TimeoutError as error:
            raise Unreachable(f"no answer within {self.timeout:g} s") from error
        except (OSError, http.client.HTTPException) as error:
            raise Unreachable(f"{type(error).__name__}: {error}".rstrip(": ")) from error
        finally:
            connection.close()
        if response.status == 200:
            return raw
        said = _message(raw)
        raise (
            Broken(f"status {response.status}: {said}")
            if response.status >= 500 and response.status != 501
            else Refused(response.status, said)
        )

    def _connection(self) -> tuple[http.client.HTTPConnection, str]:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise RecipeError(
                "not the address of a server", where="sampler.url", got=self.url, expected="http://host:port"
            )
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        return kind(parts.hostname, parts.port, timeout=self.timeout), parts.path.rstrip("/").removesuffix("/v1")


def _decoded(raw: bytes, kind: type[S]) -> S:
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise Malformed(f"{error}; it begins {raw[:200]!r}") from error


def again(call: Callable[[], T]) -> T:
    """The call's value; a malformed reply is asked for anew, a few times."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return call()
        except Malformed:
            if attempt == ATTEMPTS:
                raise
    raise AssertionError


def _drawn(choice: _Choice, prompt: Sequence[int], most: int) -> Drawn:
    logps = choice.logprobs.token_logprobs if choice.logprobs else []
    if not choice.token_ids or len(choice.token_ids) > most:
        raise Malformed(f"{len(choice.token_ids)} tokens, asked for 1 to {most}")
    if len(logps) != len(choice.token_ids):
        raise Malformed(f"{len(logps)} log-probs for {len(choice.token_ids)} tokens")
    for value in logps:
        if value is None or not _LOWEST < value <= 1e-3:  # false for NaN too
            raise Malformed(f"a log-prob of {value}")
    if choice.finish_reason not in ("stop", "length"):
        raise Malformed(f"an answer that ended by {choice.finish_reason!r}")
    if choice.prompt_token_ids is not None and choice.prompt_token_ids != list(prompt):
        raise Malformed("an answer to another prompt")
    top = choice.logprobs.top_logprobs if choice.logprobs else []
    return Drawn(
        tokens=tuple(choice.token_ids),
        logps=tuple(value for value in logps if value is not None),
        finish=choice.finish_reason,
        top=tuple(tuple(sorted((given or {}).values(), reverse=True)) for given in top),
        routes=choice.routed_experts,
    )


def _message(raw: bytes) -> str:
    try:
        return str(json.loads(raw)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return raw[:300].decode(errors="replace").strip()


def in_parallel(
    call: Callable[[T], R], items: Sequence[T], threads: int, ended: threading.Event | None = None
) -> list[R | Exception | None]:
    """``call`` of each item: its value, its exception, or None where it was not tried since another one failed.

    The threads are daemons: an interrupt leaves them behind, and none keeps the process from ending.

    Raises:
        Unreachable: ``ended`` was set meanwhile, and nobody waits for the answers any more.
    """
    found: list[R | Exception | None] = [None] * len(items)
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for index in range(len(items)):
        waiting.put(index)
    failed = threading.Event()

    def work() -> None:
        while not failed.is_set():
            try:
                index = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                found[index] = call(items[index])
            except Exception as error:  # it is the caller's to judge
                found[index] = error
                failed.set()

    crew = [threading.Thread(target=work, daemon=True) for _ in range(min(threads, len(items)))]
    for thread in crew:
        thread.start()
    for thread in crew:
        while thread.is_alive():
            thread.join(0.2)
            if ended is not None and ended.is_set():
                raise Unreachable("the run is ending")
    return found
