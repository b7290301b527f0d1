"""A vLLM server of our own: started, waited for, restarted, and never left behind."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from signal import SIGKILL
from typing import Any

from attrs import define, field, frozen

from ft.errors import CapacityError, RecipeError, ServerError
from ft.recipe.online import VLLM
from ft.recipe.parts import Recipe
from ft.rollout import wire
from ft.rollout.client import Client, Malformed, Refused, Unreachable

BASE = "base"  # what the model without adapter is called
TOKEN = "FT_VLLM_TOKEN"
PYTHON = "FT_VLLM_PYTHON"
_STARTED = re.compile(r"^--- \d{4}-.*$", re.MULTILINE)
_ERROR = re.compile(r"\b[A-Z]\w*(?:Error|Exception): .+")
_BATCHED = 2048  # tokens that a server takes at a time, which is also vLLM's own choice for small machines
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM has buffers for
# What torchrun and this environment set for us, and would lead the server astray.
_OURS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PYTHONPATH")
_INSIDE = Path(__file__).with_name("inside")  # what runs in the server's processes: all that they find of ft


@frozen(kw_only=True)
class Launch:
    """How a server is started; the port and the model are filled in each time."""

    python: str
    model: Path
    arguments: tuple[str, ...]
    port: int  # 0: a free one
    startup: float  # seconds
    timeout: float
    log: Path | None  # None: what it prints comes through
    devices: str | None = None
    whole: bool = False  # it takes whole models while it runs, by calls that only our guard keeps from others

    def command(self, model: Path, port: int) -> list[str]:
        head = [self.python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
        return [*head, "--host", "127.0.0.1", "--port", str(port), *self.arguments]


def launch(recipe: Recipe, options: VLLM, model: Path, folder: Path) -> Launch:
    """The server that ``recipe`` asks for."""
    whole = recipe.adapter is None
    taking = _taking(wire.chosen(options)) if whole else ()
    return Launch(
        python=interpreter(options),
        model=model.resolve(),
        arguments=(*arguments(recipe, context(recipe, options)), *taking, *_telling(options), *options.arguments),
        port=options.port,
        startup=options.startup,
        timeout=options.timeout,
        log=folder / "vllm.log",
        devices=options.devices,
        whole=whole,
    )


def _taking(way: str) -> tuple[str, ...]:
    """Arguments of a server that takes whole models while it runs."""
    ours = ("--middleware", "ft_guard.Guard", "--worker-extension-cls", "ft_worker.Repacks")
    return ours if way == "file" else (*ours, "--weight-transfer-config", '{"backend": "nccl"}')


def _telling(options: VLLM) -> tuple[str, ...]:
    return ("--enable-return-routed-experts",) if options.routes else ()


def context(recipe: Recipe, options: VLLM) -> int:
    """Most tokens of a prompt and its answer."""
    method: Any = recipe.method
    return options.context or recipe.data.max_tokens + method.sampling.max_tokens


def arguments(recipe: Recipe, context: int) -> tuple[str, ...]:
    """What decides its answers: type, lengths, adapters, and log-probs of the distribution that is drawn from."""
    import torch

    common = (
        "--served-model-name", BASE, "--dtype", recipe.model.dtype, "--max-model-len", str(context),
        "--logprobs-mode", "processed_logprobs", "--generation-config", "vllm", "--seed", str(recipe.seed),
    )  # fmt: skip
    if not torch.cuda.is_available():
        # vLLM on a CPU dies of an answer that has a seed and whose prompt is read in two parts ("CPU Generator does not
        # use offset"), as happens wherever the prompts of a step are more tokens than it takes at a time.
        whole = ("--no-enable-chunked-prefill", "--max-num-batched-tokens", str(max(_BATCHED, context)))
        # Answers to a prompt share its whole blocks, and the rest is read for each: 32 is the smallest that it takes.
        common = (*common, "--enforce-eager", *whole, "--block-size", "32")
    if recipe.adapter is None:
        return common
    rank = next((size for size in _RANKS if size >= recipe.adapter.r), recipe.adapter.r)
    return (*common, "--enable-lora", "--max-loras", "1", "--max-lora-rank", str(rank))


def interpreter(options: VLLM) -> str:
    """The Python that has vLLM: the recipe's, the environment's, or this one.

    Raises:
        RecipeError: there is none.
    """
    named = options.python or os.environ.get(PYTHON, "")
    if named:
        found = shutil.which(named)
        if found:
            return found
    elif find_spec("vllm"):
        return sys.executable
    raise RecipeError(
        "no Python with vLLM to start the server with", where="sampler.python",
        expected=f"a path here or in ${PYTHON}, or vllm in this environment", got=named or "nothing",
        fix="install vllm in an environment of its own and name its Python; or sample in this process: "
        "sampler=embedded",
    )  # fmt: skip


def environment(token: str, devices: str | None = None, whole: bool = False) -> dict[str, str]:
    """The server's. The token goes here and not into arguments, which every user of the machine can read.

    ``whole``: with vLLM's calls that take whole models, and what guards them.
    """
    kept = {name: value for name, value in os.environ.items() if name not in _OURS}
    kept.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    fixed = {
        "VLLM_API_KEY": token, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1",
    }  # fmt: skip
    opened = {"VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": str(_INSIDE)} if whole else {"VLLM_SERVER_DEV_MODE": "0"}
    return kept | fixed | opened | ({} if devices is None else {"CUDA_VISIBLE_DEVICES": devices})


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@define(kw_only=True, eq=False)
class Server:
    """A process that serves, or none yet. It ends with this process, whatever ends that."""

    launch: Launch
    token: str = field(factory=lambda: os.environ.get(TOKEN) or secrets.token_urlsafe(24))
    process: subprocess.Popen[bytes] | None = None
    client: Client | None = None
    ended: bool = False  # for good

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def start(self, model: Path | None = None) -> Client:
        """Start it anew and wait until it generates. ``model``: another folder than the recipe's.

        Raises:
            ServerError: it ended, or does not generate in time; with the last lines of its log.
        """
        self.close()
        port = self.launch.port or free_port()
        command = self.launch.command(model or self.launch.model, port)
        self.process = spawn(command, environment(self.token, self.launch.devices, self.launch.whole), self.launch.log)
        if self.ended:  # by another thread, while or before this one started it
            self.close()
            raise ServerError("the vLLM server is not started: the run is ending", where=str(self.launch.log or ""))
        client = Client(url=f"http://127.0.0.1:{port}", token=self.token, timeout=self.launch.timeout)
        try:
            self._wait(client)
        except BaseException:
            self.close()
            raise
        self.client = client
        return client

    def _wait(self, client: Client) -> None:
        """Until a token is generated: /health is green before that, and after an engine died."""
        deadline, said = time.monotonic() + self.launch.startup, "nothing"
        while self.alive:
            left = deadline - time.monotonic()
            if left <= 0:
                raise self._failure(f"the vLLM server does not answer within {self.launch.startup:g} s", said)
            try:
                generates(Client(url=client.url, token=client.token, timeout=max(1.0, left)), BASE)
                return
            except Unreachable as error:
                said = str(error)
                time.sleep(0.3)
            except (Refused, Malformed) as error:
                raise self._failure("the vLLM server started, but does not generate", str(error)) from error
        raise self._failure("the vLLM server ended while it started", "no answer")

    def _failure(self, problem: str, got: str) -> ServerError:
        return ServerError(
            problem + last_words(self.launch.log), where=str(self.launch.log or "the vLLM server"), got=got,
            fix="mend what the log names, or raise sampler.startup; sampler=embedded needs no server",
        )  # fmt: skip

    def close(self) -> None:
        """Kill it and all that it started."""
        process, self.process, self.client = self.process, None, None
        if process is not None:
            with suppress(ProcessLookupError):  # the whole group has ended already
                os.killpg(process.pid, SIGKILL)
            process.wait()

    def end(self) -> None:
        """Close it for good: no thread starts it again."""
        self.ended = True
        self.close()


def spawn(command: Sequence[str], env: Mapping[str, str], log: Path | None) -> subprocess.Popen[bytes]:
    """The command under a launcher that ends it with this process; what both print goes to the end of ``log``."""
    keeper = [sys.executable, "-P", str(Path(__file__).with_name("launcher.py")), str(os.getpid()), *command]
    given, quiet = dict(env), subprocess.DEVNULL
    if log is None:
        return subprocess.Popen(keeper, stdin=quiet, env=given, start_new_session=True)
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            file.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(command)}\n".encode())
            file.flush()
            return subprocess.Popen(
                keeper, stdin=quiet, stdout=file, stderr=subprocess.STDOUT, env=given, start_new_session=True
            )
    except OSError as error:
        raise CapacityError("the server's log cannot be written", where=str(log), got=str(error)) from error


def generates(client: Client, model: str) -> None:
    """One token, to see that the engine works."""
    client.complete(model, [1], 1, {"max_tokens": 1, "temperature": 0.0})


def last_words(log: Path | None, lines: int = 15) -> str:
    """The first error of the server's last start, and the end of the log: what is between may be a thousand lines."""
    if log is None:
        return "; what it printed stands above"
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 1_000_000))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    said = _STARTED.split(text)[-1].splitlines()
    errors = (_ERROR.search(line) for line in said if "WARNING" not in line)
    first = next((found.group() for found in errors if found), None)
    cause = "" if first is None else f"; the first error in its log:\n  | {first[:220]}"
    return f"{cause}; its log ends:\n" + "\n".join("  | " + line[:220] for line in said[-lines:])


def retried(
    act: Callable[[], None], patience: float, *, first: float = 0.5, wait: Callable[[float], object] = time.sleep
) -> None:
    """``act`` until it is not Unreachable, waiting twice as long each time.

    Raises:
        Unreachable: it still is after ``patience`` seconds.
    """
    deadline, pause = time.monotonic() + patience, first
    while True:
        try:
            return act()
        except Unreachable:
            if time.monotonic() + pause > deadline:
                raise
            wait(pause)
            pause *= 2
