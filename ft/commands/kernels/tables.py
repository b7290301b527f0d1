"""What `ft bench kernels` prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ft.commands.kernels.contest import Cost
from ft.commands.kernels.roofline import PEAKS, Least, least
from ft.commands.kernels.shipped import Work

BOUNDS = "a bound, not a measurement; m: memory binds, p: products"
MEMORY_BOUND = 8.0  # FLOPs a byte, below which bytes say more


def timings(op: str, lines: Sequence[dict[str, Any]], console: Console) -> None:
    """One row a contender; ``x ft`` is its time over ft's, above 1 where ft is the faster."""
    table = Table(title=op, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for name, justify in (("case", "left"), ("contender", "left"), ("median", "right"), ("rate", "right"),
                          ("extra memory", "right"), ("x ft", "right")):  # fmt: skip
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    last = None
    for line in lines:
        case = f"{line['case']}, {line['dtype']}"
        times = span(line["seconds"]) + ("" if line["rounds"] > 1 else " (once)")
        ratio = "" if line["x_ft"] is None else f"{line['x_ft']:.2f}"
        extra = "" if line["extra"] is None else size(line["extra"])
        name = f"[bold]{line['contender']}[/bold]" if line["contender"] == "ft" else escape(line["contender"])
        table.add_row(escape(case) if case != last else "", name, times, rate(line), extra, ratio)
        last = case
    console.print(table)


def rate(line: dict[str, Any]) -> str:
    """GFLOP/s where products bound the case, else GB/s; both of the least work, so useful work alone counts."""
    if line["flops"] > MEMORY_BOUND * line["bytes"]:
        return f"{line['flops'] / line['seconds'] / 1e9:.1f} GFLOP/s"
    return f"{line['bytes'] / line['seconds'] / 1e9:.2f} GB/s"


def kernels(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """A row a kernel, a column a target; what fails is told beneath."""
    table = Table(title="Triton kernels: registers / spilled words / KiB of shared memory of those there are",
                  title_justify="left", title_style="bold", box=None, pad_edge=False)  # fmt: skip
    table.add_column("kernel")
    for target in PEAKS:
        table.add_column(target, justify="right", no_wrap=True)
    for name in dict.fromkeys(row["name"] for row in rows):
        cells = {row["target"]: cell(row) for row in rows if row["name"] == name}
        table.add_row(escape(name), *(cells.get(target, "-") for target in PEAKS))
    console.print(table)
    for row in rows:
        if not row["ok"]:
            console.print(f"[red]{escape(row['name'])}, {row['target']}: {escape(row['error'])}[/red]")


def cell(row: dict[str, Any]) -> str:
    if not row["ok"]:
        return "[red]fails[/red]"
    text = f"{row['registers']}/{row['spills']}/{row['shared'] / 1024:.0f} of {row['limit'] // 1024}"
    return f"[red]{text}[/red]" if row["spills"] or not row["fits"] else text


def peaks(console: Console) -> None:
    """The figures that the rooflines stand on."""
    table = _bounds("Peaks", "target", "memory", "16-bit products", "float32", "ridge", "source")
    for target, peak in PEAKS.items():
        figures = (f"{peak.memory / 1e12:.2f} TB/s", f"{peak.products / 1e12:.0f} TFLOP/s",
                   f"{peak.single / 1e12:.4g} TFLOP/s", f"{peak.ridge:.0f} FLOP/B")  # fmt: skip
        table.add_row(f"{target} ({peak.part})", *figures, escape(peak.source))
    console.print(table)


def kernel_rooflines(works: Mapping[str, Work | None], rows: Sequence[dict[str, Any]], console: Console) -> None:
    """A table an op, a row a kernel, for the targets that it was compiled for; one for each maker shares a row."""
    merged: dict[tuple[str, str], dict[str, Work]] = {}
    for row in rows:
        if work := works.get(row["name"]):
            op, _, kernel = row["name"].removesuffix(", NVIDIA").removesuffix(", AMD").partition(".")
            merged.setdefault((op, kernel), {})[row["target"]] = work
    console.print(f"[bold]Least time of each Triton kernel at one problem: {BOUNDS}[/bold]")
    for op in dict.fromkeys(op for op, _ in merged):
        console.print(_of_op(op, {kernel: works for (owner, kernel), works in merged.items() if owner == op}))
    if missing := [name for name, work in works.items() if work is None]:
        console.print(f"no problem is stated for {escape(', '.join(missing))}", style="yellow", highlight=False)


def _of_op(op: str, kernels: Mapping[str, Mapping[str, Work]]) -> Table:
    """What all problems share stands in the title, the rest beside each kernel."""
    problems = {kernel: next(iter(works.values())).problem.split() for kernel, works in kernels.items()}
    first = next(iter(problems.values()))
    shared = [word for word in first if all(word in words for words in problems.values())]
    table = _bounds(
        f"{op}: {' '.join(shared)}" if shared else op, "kernel", "problem", "bytes", "FLOPs", "FLOP/B", *PEAKS
    )
    for kernel, works in kernels.items():
        own = " ".join(word for word in problems[kernel] if word not in shared)
        cells = [
            _bound(least(works[t].cost, peak, single=works[t].single)) if t in works else "-"
            for t, peak in PEAKS.items()
        ]
        table.add_row(escape(kernel), own, *_work(next(iter(works.values())).cost), *cells)
    return table


def rooflines(cases: Sequence[tuple[str, Cost]], console: Console) -> None:
    """The least time of each case in bfloat16 on each target, and what bounds it there."""
    table = _bounds(f"Least time of each case in bfloat16: {BOUNDS}", "case", "bytes", "FLOPs", "FLOP/B", *PEAKS)
    for name, cost in cases:
        table.add_row(escape(name), *_work(cost), *(_bound(least(cost, peak)) for peak in PEAKS.values()))
    console.print(table)


def _bounds(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for name in columns:
        words = name in ("case", "kernel", "problem", "target", "source")
        table.add_column(name, justify="left" if words else "right", no_wrap=not words)
    return table


def _work(cost: Cost) -> tuple[str, str, str]:
    """Bytes, FLOPs of products, and their ratio."""
    if not cost.flops:
        return size(cost.bytes), "-", "-"
    return size(cost.bytes), f"{cost.flops / 1e9:.2f} G", f"{cost.flops / cost.bytes:.3g}"


def _bound(bound: Least) -> str:
    return f"{span(bound.seconds)} {bound.bound[0]}"


def span(seconds: float) -> str:
    for factor, unit in ((1, "s"), (1e3, "ms")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def size(count: int) -> str:
    for power, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= power:
            return f"{count / power:.1f} {unit}"
    return f"{count} B"
