"""A server that runs already: is it one that this run can sample from? Asked once, before anything is sent."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from attrs import frozen

from ft.errors import ServerError
from ft.rollout.client import Broken, Client, Malformed, Refused, Served

TESTED = "0.32"  # of vLLM; older ones may lack what is asked of them
_START = "start one with: ft serve RECIPE; or leave sampler.url out, and the run starts its own"


@frozen(kw_only=True)
class Wanted:
    """What a recipe needs of a server."""

    model: Path
    context: int  # tokens of a prompt and its answer
    whole: bool = False  # it is sent whole models


def meet(client: Client, wanted: Wanted, say: Callable[[str], None]) -> None:
    """Look at the server; an older version than we know is announced.

    Raises:
        Unreachable: nobody answers.
        ServerError: it wants a key, is no vLLM, serves another model, too short texts, or takes no whole models.
    """
    try:
        served = client.models()
    except Refused as error:
        locked = error.status in (401, 403)
        raise ServerError(
            "the server does not take our key" if locked else "this is not a vLLM server", where=client.url,
            got=str(error),
            fix="set FT_VLLM_TOKEN to the key it was started with: `ft serve` prints it" if locked else _START,
        ) from error  # fmt: skip
    except Malformed as error:
        raise ServerError("this is not a vLLM server", where=client.url, got=str(error), fix=_START) from error
    with suppress(Refused, Malformed):
        version = client.version()
        if _number(version) < _number(TESTED):
            say(f"the server at {client.url} runs vLLM {version}, older than what ft is tested with ({TESTED})")
    for model in served:
        if model.parent is None:  # not an adapter
            _check(model, wanted, client.url)
    if wanted.whole:
        _takes_whole(client, say)


def _takes_whole(client: Client, say: Callable[[str], None]) -> None:
    """Whether it has the calls by which weights are sent; one that has them for everybody is announced."""
    try:
        client.workers()
    except Refused as error:
        raise closed(client, error) if error.status == 404 else error from error
    with suppress(Refused):
        Client(url=client.url, timeout=client.timeout).workers()
        say(f"whoever reaches {client.url} can change its weights without a key (`ft serve` starts one that wants it)")


def _check(served: Served, wanted: Wanted, url: str) -> None:
    if served.root and _differs(Path(served.root), wanted.model):
        raise ServerError(
            "the server has another model than the recipe", where=url, expected=str(wanted.model), got=served.root,
            fix=_START,
        )  # fmt: skip
    if served.max_model_len is not None and served.max_model_len < wanted.context:
        raise ServerError(
            "the server takes shorter texts than the recipe may ask for", where=url,
            expected=f"at least {wanted.context} tokens: data.max_tokens + sampling.max_tokens, or sampler.context",
            got=f"{served.max_model_len}", fix="start it with a larger --max-model-len, or lower those two",
        )  # fmt: skip


def _differs(theirs: Path, ours: Path) -> bool:
    """Whether both are folders here with different configs; what cannot be told is left to the canary."""
    configs = [folder / "config.json" for folder in (theirs, ours)]
    return all(file.is_file() for file in configs) and _read(configs[0]) != _read(configs[1])


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return None


def _number(version: str) -> tuple[int, ...]:
    """(0, 32) of "0.32.0+cpu"."""
    parts = version.split(".")[:2]
    return tuple(int(part) if part.isdigit() else 0 for part in parts)


def no_adapters(client: Client, error: Refused) -> ServerError:
    """For a server that does not know the route by which it is sent adapters."""
    return ServerError(
        "the server takes no adapters while it runs", where=client.url, got=str(error),
        fix="start it with `ft serve RECIPE`; a server of your own needs --enable-lora and "
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment",
    )  # fmt: skip


def unfit(client: Client, error: Broken) -> ServerError:
    """For one that lives, and fails at an adapter."""
    return ServerError(
        "the server cannot apply the adapter", where=client.url, got=str(error),
        fix="where the rank is too large, lower adapter.r or start the server with a larger --max-lora-rank, as "
        "`ft serve RECIPE` does; where vLLM cannot adapt a weight, leave it out of adapter.targets",
    )  # fmt: skip


def closed(client: Client, error: Refused) -> ServerError:
    """For a server without the calls by which whole models are sent."""
    return ServerError(
        "the server takes no whole models while it runs", where=client.url, got=str(error),
        fix="start it with `ft serve RECIPE`; one of your own, on GPUs, needs VLLM_SERVER_DEV_MODE=1 in its "
        "environment, and must listen on 127.0.0.1 only: vLLM's key does not guard these calls",
    )  # fmt: skip


def no_reload(client: Client, error: Broken) -> ServerError:
    """For one that failed at a whole model, and has none any more."""
    return ServerError(
        "the server cannot load the weights, and has none now", where=client.url, got=str(error),
        fix="see that it reads this machine's disk, start it again, and go on with --resume",
    )  # fmt: skip


def no_wire(client: Client, error: Broken) -> ServerError:
    """For one that lives, and fails to connect itself with us."""
    return ServerError(
        "the server does not connect itself with the trainer by NCCL", where=client.url, got=str(error),
        fix="its log says why: it must be started by `ft serve` or with --weight-transfer-config '{\"backend\": "
        "\"nccl\"}', on other GPUs, and with the same version of NCCL as here; or set sampler.transfer=file",
    )  # fmt: skip


def halfway(client: Client, error: Exception) -> ServerError:
    """For one that failed while tensors were sent to it."""
    return ServerError(
        "the server failed while it took the weights", where=client.url, got=str(error),
        fix="its log says why; start it again where it is not the run's own, and go on with --resume",
    )  # fmt: skip
