"""`ft bench kernels`: each case's test, and only then its times, beside who else is installed."""

from __future__ import annotations

import json
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

import torch
from attrs import evolve, frozen
from rich.console import Console
from rich.markup import escape

from ft.commands.kernels import measure, roofline, tables
from ft.commands.kernels.contest import DTYPES, FT, Contest, Results, Run, Spec, faults
from ft.commands.kernels.shipped import Work
from ft.errors import RecipeError
from ft.kernels import launch, nf4
from ft.kernels.experts import rows

OPS = ("experts", "nf4", "logprobs", "routing", "reductions")
WITHOUT_CASES = ("tiled",)  # it recomputes what it is given, so its time is that of what it is given
WHERE = "ft bench kernels"


@frozen(kw_only=True)
class Options:
    """``compile``: Triton kernels, ahead of time, where there is no GPU; ``torch_compile``: one contender more."""

    case: str = ""
    rounds: int = 5
    dtypes: tuple[str, ...] = ()
    torch_compile: bool = False
    compile: bool = True
    file: Path | None = None


def specs(ops: Sequence[str], case: str) -> list[Spec]:
    """The cases of these ops (all, when none is named) whose names hold ``case``.

    Raises:
        RecipeError: an unknown op, one without cases, or no such case.
    """
    for op in ops:
        if op in WITHOUT_CASES:
            raise RecipeError(f"{op} has no timed cases", where=WHERE, expected=f"some of {', '.join(OPS)}")
        if op not in OPS:
            near = get_close_matches(op.lower(), OPS, n=1)
            fix = f"did you mean {near[0]}?" if near else ""
            raise RecipeError("no such op", where=WHERE, expected=f"some of {', '.join(OPS)}", got=op, fix=fix)
    found: list[Spec] = []
    for op in dict.fromkeys(ops or OPS):
        found += import_module(f"ft.commands.kernels.{op}").SPECS
    chosen = [spec for spec in found if case.lower() in spec.name.lower()]
    if not chosen:
        names = "\n    ".join(f"{spec.op}: {spec.name}" for spec in found)
        raise RecipeError("no case has this in its name", where=WHERE, expected=f"\n    {names}", got=case)
    return chosen


def run(ops: Sequence[str], options: Options, threads: int | None, console: Console) -> bool:
    """The command. False where a result was wrong.

    Raises:
        RecipeError: an unknown op, case or type, or a file that cannot be written.
    """
    chosen = specs(ops, options.case)
    if options.file is not None and not options.file.absolute().parent.is_dir():
        raise RecipeError("no such folder", where=f"{WHERE} --json", got=str(options.file.parent))
    if threads:
        torch.set_num_threads(threads)
    return bench(chosen, options, console)


def bench(chosen: Sequence[Spec], options: Options, console: Console) -> bool:
    """Test, time, print and record ``chosen``. False where a result was wrong, and so not timed."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtypes = dtypes_of(options, device)
    console.print(f"{measure.device()}, {torch.get_num_threads()} threads, torch {torch.__version__}", highlight=False)
    console.print("x ft: time over ft's. limit: dense products of the same FLOPs. Rates count the least work.")
    ops = {spec.op for spec in chosen} if device.type == "cpu" else set()
    if ops & {"nf4", "experts"}:
        console.print(f"NF4 is dequantised by {nf4.on_cpu()}", highlight=False, markup=False)
    if "experts" in ops:
        console.print(f"rows of experts are worked on by {rows.on_cpu()}", highlight=False, markup=False)
    for name in ("bitsandbytes", "torch._dynamo"):  # remarks on what is not installed, and on graph breaks
        logging.getLogger(name).setLevel(logging.CRITICAL)
    all_right = True
    for op in dict.fromkeys(spec.op for spec in chosen):
        lines: list[dict[str, Any]] = []
        for spec in (s for s in chosen if s.op == op):
            for dtype in dtypes:
                found, right = timed(spec, dtype, device, options, console)
                lines += found
                all_right &= right
        if lines:
            tables.timings(op, lines, console)
            record(lines, options.file, console)
    if device.type == "cpu" and options.compile:
        ahead(chosen, options.file, console)
    return all_right


def dtypes_of(options: Options, device: torch.device) -> tuple[str, ...]:
    """Those asked for, else what this device trains in."""
    if wrong := [name for name in options.dtypes if name not in DTYPES]:
        raise RecipeError("no such type", where=f"{WHERE} --dtype", expected=", ".join(DTYPES), got=", ".join(wrong))
    return options.dtypes or (("bfloat16",) if device.type == "cuda" else ("float32",))


def timed(
    spec: Spec, dtype: str, device: torch.device, options: Options, console: Console
) -> tuple[list[dict[str, Any]], bool]:
    """A line a contender, none if ft is wrong; and whether it is right."""
    console.print(f"  {spec.op}: {spec.name}, {dtype} ...", style="dim", highlight=False)
    kind = getattr(torch, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the peers' own
        contest = spec.make(kind, device)
        if options.torch_compile and contest.plain is not None:
            runs = {**contest.runs, "torch.compile": torch.compile(contest.plain)}
            contest = evolve(contest, runs=runs)  # type: ignore[arg-type]
        right, wrong = tested(contest)
        if FT in wrong:
            why = f"{spec.op}, {spec.name}, {dtype}: ft differs from {contest.oracle}: {wrong[FT]}; not timed"
            console.print(f"[bold red]{escape(why)}[/bold red]")
            return [], False
        for name, why in {**contest.missing, **wrong}.items():
            console.print(f"    without {escape(name)}: {escape(why)}", style="yellow", highlight=False)
        return list(lines(spec, dtype, right, contest.limit, options.rounds)), True


def tested(contest: Contest) -> tuple[dict[str, Run], dict[str, str]]:
    """Who gives the right results, and what is wrong with the others."""
    truth = contest.truth()
    right: dict[str, Run] = {}
    wrong: dict[str, str] = {}
    for name, run in contest.runs.items():
        try:
            found = _ours(run(), truth, contest) if name == FT else _theirs(run(), truth, contest)
        except Exception as error:  # a peer may fail in any way; ft may not
            if name == FT:
                raise
            found = f"{type(error).__name__}: {error}".splitlines()[0]
        if found:
            wrong[name] = found
        else:
            right[name] = run
    return right, wrong


def _ours(got: Results, truth: Results, contest: Contest) -> str:
    found = faults(got, truth, contest.tolerance)
    return f"{', '.join(found)} (allowed {contest.tolerance:g})" if found else ""


def _theirs(got: Results, truth: Results, contest: Contest) -> str:
    """A peer is held to what it gives, and to ten times ft's error: it sums in types of its own."""
    shared = {name: value for name, value in truth.items() if name in got}
    found = faults(got, shared, max(10 * contest.tolerance, 1e-4)) if shared else ["nothing to compare"]
    return f"it differs from {contest.oracle}: {', '.join(found)}" if found else ""


def lines(
    spec: Spec, dtype: str, runs: dict[str, Run], limit: Callable[[], Any] | None, rounds: int
) -> Iterator[dict[str, Any]]:
    """What is printed and recorded of one case, a contender at a time."""
    cost = spec.cost(getattr(torch, dtype))
    every: dict[str, Callable[[], Any]] = {**runs, **({"limit": limit} if limit else {})}
    times = measure.turns(every, rounds)
    for name, run in every.items():
        yield {
            "kind": "timed",
            "op": spec.op,
            "case": spec.name,
            "dtype": dtype,
            "contender": name,
            "seconds": median(times[name]),
            "least": min(times[name]),
            "rounds": len(times[name]),
            "x_ft": median(own / ours for own, ours in zip(times[name], times[FT], strict=False)),  # of equal rounds
            "extra": None if name == "limit" else measure.extra_memory(run),
            "bytes": cost.bytes,
            "flops": cost.flops,
            "threads": torch.get_num_threads(),
        }


def record(lines: Sequence[dict[str, Any]], file: Path | None, console: Console) -> None:
    """Append to ``file``, or in a checkout to bench/results/kernels.jsonl."""
    results = measure.CHECKOUT / "bench" / "results"
    if file is None and not results.is_dir():
        return
    place = file or results / "kernels.jsonl"
    same = {"time": time.strftime("%Y-%m-%dT%H:%M:%S"), "device": measure.device(), "commit": measure.commit()}
    with place.open("a", encoding="utf-8") as out:
        for line in lines:
            out.write(json.dumps({**same, **line}) + "\n")
    console.print(f"  {len(lines)} lines appended to {place}", style="dim", highlight=False)


def ahead(chosen: Sequence[Spec], file: Path | None, console: Console) -> None:
    """Without a GPU: whether the Triton kernels compile for each, and what they and the cases would need at least."""
    lines: list[dict[str, Any]] = []
    console.print()
    if launch.installed():
        console.print("  compiling the Triton kernels ...", style="dim")
        ops = list(dict.fromkeys(spec.op for spec in chosen))
        rows, works = roofline.compiled(ops), roofline.works(ops)
        tables.kernels(rows, console)
        console.print()
        tables.kernel_rooflines(works, rows, console)
        lines += [compiled(row, works.get(row["name"])) for row in rows]
    else:
        console.print("triton is not installed, so no kernel was compiled (pip install 'ft[triton]')", style="yellow")
    cases = [(spec, spec.cost(torch.bfloat16)) for spec in chosen]
    console.print()
    tables.rooflines([(f"{spec.op}: {spec.name}", cost) for spec, cost in cases], console)
    console.print()
    tables.peaks(console)
    for spec, cost in cases:
        same = {"kind": "roofline", "op": spec.op, "case": spec.name, "dtype": "bfloat16"}
        lines += [{**same, **roofline.bound(cost, target)} for target in roofline.PEAKS]
    record(lines, file, console)


def compiled(row: dict[str, Any], work: Work | None) -> dict[str, Any]:
    """What is recorded of one kernel compiled for one target: the compiler's report, and its roofline there."""
    line = {"kind": "compiled", "op": row["name"].partition(".")[0], **row}
    if work is None:
        return line
    return {**line, "problem": work.problem, **roofline.bound(work.cost, row["target"], single=work.single)}
