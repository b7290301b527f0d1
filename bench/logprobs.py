"""Log-probs of given tokens under a large head, forward and backward: ft against naive autograd, TRL and Liger.

    python bench/logprobs.py [--n 512] [--v 151936] [--d 576] [--dtype bfloat16] [--rounds 5] [--share 0.3] [--head]

``x limit`` divides by the time of the matrix products that no method can do without: hidden @ head.T and
P @ head (with --head, where the head is trained too, also P.T @ hidden). All contenders take turns in one process, so
that a slow moment of the machine strikes each; figures are medians over rounds. ``extra MB`` is the peak of resident
memory over what stood there before the call, each contender in a process of its own. Log-probs and the gradient of
hidden are compared with naive autograd's before anything is timed.

The last table, for a frozen head, is a batch of which a share of the positions is trained: ft projects only those.
``naive`` projects all, as a model's forward does, and so does TRL's path away from a GPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from attrs import evolve, frozen
from common import record
from torch import Tensor

Method = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden, head, targets -> log-probs


@frozen
class Setting:
    n: int
    v: int
    d: int
    dtype: str
    head: bool  # whether the head is trained

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Made in place, in their own type, so that no temporary hides in the memory figures."""
        torch.manual_seed(0)
        dtype = getattr(torch, self.dtype)
        hidden = torch.empty(self.n, self.d, dtype=dtype).normal_().requires_grad_()
        weight = torch.empty(self.v, self.d, dtype=dtype).normal_(std=2 * self.d**-0.5).requires_grad_(self.head)
        return hidden, weight, torch.randint(self.v, (self.n,))


def naive(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return (hidden @ weight.T).float().log_softmax(-1).gather(1, target[:, None])[:, 0]


def ours(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    from ft.kernels.logprobs import token_logps

    return token_logps(hidden, weight, target)[0]


def trl_selective(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    from trl.trainer.utils import selective_log_softmax

    return selective_log_softmax(hidden @ weight.T, target)


def trl_chunked(hidden: Tensor, weight: Tensor, target: Tensor, outputs: tuple[str, ...] = ()) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction

    return ChunkedLogProbFunction.apply(hidden, weight, None, target, 1.0, 32768, None, 1.0, outputs)[0]  # type: ignore


def trl_default(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return trl_chunked(hidden, weight, target, ("entropy", "is_top1"))


def liger(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    from liger_kernel.chunked_loss.fused_linear_ppo import _ChunkedSelectiveLogProbFunction as Function

    return Function.apply(hidden, weight, target, None, 1.0, 4096)  # type: ignore[no-any-return]


def methods() -> dict[str, Method]:
    """Those whose packages are there."""
    found: dict[str, Method] = {"ft": ours, "naive autograd": naive}
    if find_spec("trl"):
        found |= {
            "TRL selective_log_softmax": trl_selective,
            "TRL chunked": trl_chunked,
            "TRL chunked, + entropy, top-1": trl_default,
        }
    if find_spec("liger_kernel"):
        found["Liger chunked"] = liger
    return found


def step(method: Method, inputs: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """(log-probs, gradient of hidden) of a mean negative log-likelihood."""
    logp = method(*inputs)
    grads = torch.autograd.grad(-logp.mean(), [t for t in inputs[:2] if t.requires_grad])
    return logp.detach(), grads[0]


@torch.no_grad()
def limit(hidden: Tensor, weight: Tensor, target: Tensor, head: bool) -> None:
    product = hidden @ weight.T
    _ = product @ weight
    if head:
        _ = product.T @ hidden


def check(inputs: tuple[Tensor, Tensor, Tensor], contenders: dict[str, Method]) -> None:
    """Stop if a contender computes something else than naive autograd does."""
    want_logp, want_grad = step(naive, inputs)
    loose = inputs[0].dtype != torch.float32
    for name, method in contenders.items():
        logp, grad = step(method, inputs)
        off = float((logp.float() - want_logp).abs().mean())
        off_grad = float((grad.float() - want_grad.float()).norm() / want_grad.float().norm())
        if off > (0.05 if loose else 1e-4) or off_grad > (0.05 if loose else 1e-3):
            raise SystemExit(f"{name} differs from naive autograd: log-probs by {off:.2g}, gradient by {off_grad:.2g}")


def interleave(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each, one warm-up round aside."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: median(seconds[1:]) for name, seconds in times.items()}


# ---- memory ---------------------------------------------------------------------------------------------------------


def resident(peak: bool) -> int:
    """kB resident now, or at most since the process began or the mark was reset."""
    key = "VmHWM:" if peak else "VmRSS:"
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def child(setting: Setting, name: str) -> None:
    """Print the kB that one step takes above what stands before it."""
    method = methods()[name]
    step(method, evolve(setting, n=2, v=64).inputs())  # imports and the libraries' own buffers
    inputs = setting.inputs()
    Path("/proc/self/clear_refs").write_text("5")  # resets the mark of the peak
    before = resident(peak=False)
    step(method, inputs)
    print(json.dumps({"kb": resident(peak=True) - before}))


def extra_memory(setting: Setting, name: str) -> float | None:
    """MB, or None where the system does not tell."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    words = [f"--{key}={getattr(setting, key)}" for key in ("n", "v", "d", "dtype")] + ["--head"] * setting.head
    words += [f"--threads={torch.get_num_threads()}", f"--child={name}"]
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])["kb"] / 1024


# ---- tables ---------------------------------------------------------------------------------------------------------


def row(name: str, seconds: float, base: float, memory: float | None) -> None:
    extra = "" if memory is None else f"{memory:10.0f}"
    print(f"  {name:32s} {seconds * 1e3:9.1f} {seconds / base:8.2f} {extra}")


def whole(setting: Setting, rounds: int) -> None:
    inputs = setting.inputs()
    contenders = methods()
    check(inputs, contenders)
    calls: dict[str, Callable[[], Any]] = {"limit": lambda: limit(*inputs, setting.head)}
    calls |= {name: lambda method=method: step(method, inputs) for name, method in contenders.items()}
    seconds = interleave(calls, rounds)
    memory = {name: extra_memory(setting, name) for name in contenders}
    trained = "hidden and head" if setting.head else "hidden"
    print(f"N={setting.n} V={setting.v} D={setting.d} {setting.dtype}, gradient to {trained}")
    print(f"  {'':32s} {'ms':>9s} {'x limit':>8s} {'extra MB':>10s}")
    for name, value in seconds.items():
        row(name, value, seconds["limit"], memory.get(name))
        numbers = {"method": name, "seconds": value, "x_limit": value / seconds["limit"], "extra_mb": memory.get(name)}
        keep(setting, "whole", numbers)


def sparse(setting: Setting, share: float, rounds: int) -> None:
    hidden, weight, target = setting.inputs()
    trained = (torch.rand(setting.n, generator=torch.Generator().manual_seed(1)) < share).nonzero()[:, 0]

    def all_positions(method: Method) -> Tensor:
        return torch.autograd.grad(-method(hidden, weight, target)[trained].mean(), hidden)[0]

    def trained_positions(method: Method) -> Tensor:
        return torch.autograd.grad(-method(hidden[trained], weight, target[trained]).mean(), hidden)[0]

    calls: dict[str, Callable[[], Any]] = {
        "limit, trained positions": lambda: limit(hidden[trained], weight, target, False),
        "ft, trained positions": lambda: trained_positions(ours),
        "naive autograd, all positions": lambda: all_positions(naive),
    }
    if find_spec("trl"):
        calls["TRL chunked, all positions"] = lambda: all_positions(trl_default)
    seconds = interleave(calls, rounds)
    base = seconds["limit, trained positions"]
    print(f"{len(trained)} of {setting.n} positions trained")
    for name, value in seconds.items():
        row(name, value, base, None)
        keep(setting, "sparse", {"method": name, "share": share, "seconds": value, "x_limit": value / base})


def keep(setting: Setting, table: str, numbers: dict[str, Any]) -> None:
    what = {"n": setting.n, "v": setting.v, "d": setting.d, "dtype": setting.dtype, "head": setting.head}
    record("logprobs", {"table": table, "threads": torch.get_num_threads(), **what, **numbers})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=512, help="positions")
    parser.add_argument("--v", type=int, default=151_936, help="tokens of the vocabulary")
    parser.add_argument("--d", type=int, default=576, help="model width")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--share", type=float, default=0.3, help="share of trained positions in the last table")
    parser.add_argument("--head", action="store_true", help="train the head too")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--child", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    setting = Setting(args.n, args.v, args.d, args.dtype, args.head)
    if args.child:
        child(setting, args.child)
        return
    whole(setting, args.rounds)
    if not setting.head:
        sparse(setting, args.share, args.rounds)


if __name__ == "__main__":
    main()
