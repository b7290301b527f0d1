"""Compiles every Triton kernel for every target on a machine without a GPU: does it compile, does it fit?

    python -m ft.kernels.aot [op ...]

One JSON line for each kernel and target. Registers and spills are read from the binary, shared memory from Triton.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from attrs import asdict, frozen

from ft.errors import RecipeError
from ft.kernels.launch import Launch, interpreted

OPS = ("nf4", "experts", "logprobs", "routing", "reductions")


@frozen
class Target:
    """A kind of device, and how many bytes of shared memory one program may have there."""

    backend: str
    arch: int | str
    threads: int  # of a warp
    shared: int


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 163 * 1024),
    "sm_90": Target("cuda", 90, 32, 227 * 1024),
    "sm_100": Target("cuda", 100, 32, 227 * 1024),
    "gfx942": Target("hip", "gfx942", 64, 64 * 1024),
}


@frozen(kw_only=True)
class Compiled:
    """What became of one launch on one target.

    ``registers`` and ``spills`` are 4-byte words a thread; on NVIDIA any use of the stack counts as spilled.
    """

    name: str
    target: str
    ok: bool
    error: str = ""
    registers: int = 0
    spills: int = 0
    shared: int = 0  # bytes a program
    limit: int = 0  # bytes a program may have
    warps: int = 0
    stages: int = 0

    @property
    def fits(self) -> bool:
        return self.ok and self.shared <= self.limit


def launches(*ops: str) -> list[Launch]:
    """What ships: the launches of these ops, or of all that have Triton kernels.

    Raises:
        RecipeError: an unknown op.
    """
    if unknown := set(ops) - set(OPS):
        raise RecipeError("no such kernels", expected=f"some of {', '.join(OPS)}", got=", ".join(sorted(unknown)))
    found = []
    for op in ops or OPS:
        # An op of this list may not be written yet, or have no Triton form.
        if importlib.util.find_spec(f"ft.kernels.{op}") and importlib.util.find_spec(f"ft.kernels.{op}.triton"):
            found += importlib.import_module(f"ft.kernels.{op}.triton").launches()
    return found


def compile(launch: Launch, target: str) -> Compiled:
    """Compile one launch for one of TARGETS; a kernel that fails to is a result, not an exception.

    Raises:
        RecipeError: the process interprets Triton kernels, so none can be compiled.
    """
    if interpreted():
        raise RecipeError(
            "kernels cannot be compiled in a process that interprets them",
            where="TRITON_INTERPRET",
            fix="unset it; tests compile in a process of their own",
        )
    try:
        return _report(launch, target, _binary(launch, TARGETS[target]))
    except Exception as error:  # the compiler's errors have no common class
        text = " ".join(f"{type(error).__name__}: {error}".split())
        return Compiled(name=launch.name, target=target, ok=False, error=text[:2000])


def _binary(launch: Launch, target: Target) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as triton_compile

    types, attrs = _types(launch)
    source = ASTSource(launch.kernel, types, dict(launch.constants), attrs)
    gpu = GPUTarget(target.backend, target.arch, target.threads)
    return triton_compile(source, target=gpu, options=launch.options)


def _types(launch: Launch) -> tuple[dict[str, str], dict[Any, Any]]:
    """The signature in the kernel's own order, and which arguments are multiples of 16."""
    names = launch.kernel.arg_names
    if wrong := set(names) ^ (set(launch.signature) | set(launch.constants)):
        raise ValueError(f"{launch.name}: arguments missing or unknown: {', '.join(sorted(wrong))}")
    types, attrs = {}, {}
    for i, name in enumerate(names):
        kind, _, multiple = launch.signature.get(name, "constexpr").partition(":")
        types[name] = kind
        if multiple or kind.startswith("*"):
            attrs[(i,)] = [["tt.divisibility", 16]]
    return types, attrs


def _report(launch: Launch, target: str, binary: Any) -> Compiled:
    read = _cubin if TARGETS[target].backend == "cuda" else _amdgcn
    registers, spills = read(binary.asm)
    return Compiled(
        name=launch.name,
        target=target,
        ok=True,
        registers=registers,
        spills=spills,
        shared=binary.metadata.shared,
        limit=TARGETS[target].shared,
        warps=launch.warps,
        stages=launch.stages,
    )


def _cubin(asm: dict[str, Any]) -> tuple[int, int]:
    """Registers, and words of stack, as cuobjdump reports them."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return _number(r"REG:(\d+)", text), _number(r"STACK:(\d+)", text) // 4


def _amdgcn(asm: dict[str, Any]) -> tuple[int, int]:
    """Vector registers, and those of them that were spilled, from the kernel's metadata."""
    text = asm["amdgcn"]
    return _number(r"\.vgpr_count:\s+(\d+)", text), _number(r"\.vgpr_spill_count:\s+(\d+)", text)


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if not found:
        raise ValueError(f"no {pattern} in the compiler's report")
    return int(found.group(1))


def compile_all(ops: Sequence[str] = (), part: int = 0, parts: int = 1) -> Iterator[Compiled]:
    """Every launch of ``ops`` on each of its targets; or one of ``parts`` equal shares of them."""
    jobs = [(launch, target) for launch in launches(*ops) for target in launch.targets or TARGETS]
    for launch, target in jobs[part::parts]:
        yield compile(launch, target)


def main(words: Sequence[str]) -> None:
    """``[op ...] [part/parts]``: JSON lines on stdout."""
    share = [word for word in words if "/" in word]
    part, parts = map(int, share[0].split("/")) if share else (0, 1)
    for result in compile_all([word for word in words if word not in share], part, parts):
        print(json.dumps(asdict(result) | {"fits": result.fits}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
