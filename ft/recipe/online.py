"""Parts of a recipe for methods that sample their own answers: how they are drawn, where, and how they are scored."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Literal

from attrs import field, frozen, validators

from ft.recipe.limits import natural, positive, share


@frozen(kw_only=True)
class Sampling:
    """How answers are drawn. Their log-probs are those of the distribution drawn from, whatever it is."""

    max_tokens: int = field(default=256, validator=positive)
    """Most tokens of an answer; one that reaches it is cut off there."""
    temperature: float = field(default=1.0, validator=positive)
    """Logits are divided by it, in training as well."""
    top_p: float = field(default=1.0, validator=validators.and_(validators.gt(0.0), validators.le(1.0)))
    """Draw only from the likeliest tokens that reach this probability together."""
    top_k: int = field(default=0, validator=natural)
    """Draw only from this many; 0 draws from all."""
    min_p: float = field(default=0.0, validator=share)
    """Draw only tokens at least this likely in proportion to the likeliest."""
    greedy: bool = False
    """Take the likeliest token instead of drawing one."""

    @property
    def truncates(self) -> bool:
        """Whether some tokens are never drawn, so that log-probs are not the policy's own."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0


@frozen(kw_only=True)
class Embedded:
    """Answers are sampled from the model in training, in its own process."""

    rows: int = field(default=64, validator=positive)
    """Answers sampled at a time on each rank."""


def _address(sampler: VLLM, attribute: Any, value: str | None) -> None:
    if value is not None and not re.match(r"https?://[^/\s]+", value):
        raise ValueError("'url' must be an address such as http://127.0.0.1:8000")


@frozen(kw_only=True)
class VLLM:
    """Answers are sampled by a vLLM server over HTTP, which is given the weights of each step.

    It needs vLLM in an environment of its own, or a server that runs already (see `ft serve`).
    """

    url: str | None = field(default=None, validator=_address)
    """Address of a server that runs already and reads this machine's disk; its API key is taken from $FT_VLLM_TOKEN.
    None starts one, on this machine only, that ends with the run."""
    python: str | None = None
    """Python that has vLLM; None takes $FT_VLLM_PYTHON, else the one that runs ft."""
    port: int = field(default=0, validator=validators.and_(validators.ge(0), validators.lt(1 << 16)))
    """Port of a server that is started; 0 takes a free one."""
    context: int | None = field(default=None, validator=validators.optional(positive))
    """Most tokens of a prompt and its answer; None is data.max_tokens + method.sampling.max_tokens."""
    arguments: tuple[str, ...] = ()
    """More arguments for a server that is started, as vLLM names them: "--gpu-memory-utilization", "0.4"."""
    devices: str | None = None
    """GPUs of a server that is started, as CUDA_VISIBLE_DEVICES numbers them; None leaves it those that ft sees."""
    transfer: Literal["auto", "file", "nccl"] = "auto"
    """How a whole model reaches the running server, where no adapter is trained: "file" writes a folder which the
    server reads again, "nccl" sends tensors from GPU to GPU. "auto" is nccl where `devices` are GPUs that the trainer
    does not use, else file."""
    routes: bool = False
    """Train each token with the experts that the server chose for it, of models with routed experts: rounding leads
    sampler and trainer to different ones, which makes ratios noisy and runs collapse. A server that runs already must
    be started with --enable-return-routed-experts, as `ft serve` does then."""
    concurrency: int = field(default=32, validator=positive)
    """Prompts that are asked for at a time."""
    startup: float = field(default=600.0, validator=positive)
    """Seconds a server may take to start before the run stops."""
    timeout: float = field(default=600.0, validator=positive)
    """Seconds a prompt's answers may take before the server counts as hung."""
    patience: float = field(default=120.0, validator=natural)
    """Seconds for which a server that we did not start is tried again when it is gone."""
    canary: float | None = field(default=0.05, validator=validators.optional(positive))
    """Largest divergence, per token, between the server's and the trainer's log-probs of a fixed text after new weights
    were sent; above it the run stops. None only logs it."""


@frozen(kw_only=True)
class Judging:
    """How answers are scored, in processes of their own."""

    workers: int = field(default=2, validator=positive)
    """Processes that score at a time."""
    timeout: float = field(default=30.0, validator=positive)
    """Seconds that a call of a reward function may take before its process is killed."""
    failures: float = field(default=0.2, validator=share)
    """Largest share of a step's answers that a reward function may fail on before the run stops."""
    hook: Callable[..., Any] | None = None
    """Called on the first rank with each step's number and its scored answers (a list of ft.types.Rollout): a function
    at the top of a module or of the recipe. One that raises is dropped with a warning."""
