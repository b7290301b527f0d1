"""`ft bench kernels`: a wrong kernel is refused, and what is printed and recorded is what was measured."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve
from rich.console import Console

from ft import cli
from ft.commands import bench
from ft.commands.bench import Options
from ft.commands.kernels import contest, experts, logprobs, measure, nf4, reductions, roofline, routing, shipped, tables
from ft.commands.kernels.contest import Contest, Cost, Results, Spec
from ft.errors import RecipeError
from ft.kernels import aot
from ft.kernels.logprobs.cases import Case
from ft.kernels.nf4 import quantise
from ft.kernels.reductions.cases import Features, Policy, Segments

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A checkout without bench/results."""
    monkeypatch.setattr(measure, "CHECKOUT", tmp_path)


def run(specs: list[Spec], **options: Any) -> tuple[bool, str]:
    console = Console(file=io.StringIO(), width=160)
    right = bench.bench(specs, Options(**{"compile": False, "rounds": 2, **options}), console)
    return right, console.file.getvalue()  # type: ignore[attr-defined]


def ones(value: float = 1.0) -> Results:
    return {"out": torch.full((4,), value), "grad x": torch.ones(2)}


def spec(name: str = "ones", **over: Any) -> Spec:
    """A case whose contenders give (1, 1, 1, 1) and (1, 1)."""
    made = Contest(runs={"ft": ones, "peer": ones}, truth=ones, oracle="the number one", tolerance=1e-5)
    return Spec(op="toy", name=name, make=lambda dtype, device: evolve(made, **over), cost=lambda _: Cost(bytes=1000))


# ---- what is wrong is not timed --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "message"),
    [
        (partial(ones, 1.1), "out by 0.1"),
        (partial(ones, float("nan")), "out by nan"),
        (lambda: {"out": torch.ones(4)}, "no grad x"),
        (lambda: {"out": torch.ones(3), "grad x": torch.ones(2)}, "out by inf"),
    ],
)
def test_a_wrong_kernel_is_refused_and_others_go_on(tmp_path: Path, ours: Callable[[], Results], message: str):
    runs = {"ft": ours, "peer": ones}
    right, text = run([spec("bad", runs=runs), spec("good")], file=tmp_path / "k.jsonl")
    assert not right
    assert f"toy, bad, float32: ft differs from the number one: {message} (allowed 1e-05); not timed" in text
    recorded = [json.loads(line) for line in (tmp_path / "k.jsonl").read_text().splitlines()]
    assert {line["case"] for line in recorded} == {"good"}


def test_a_peer_that_is_wrong_or_fails_is_named_and_left_out():
    def fails() -> Results:
        raise ValueError("no such device\nmore")

    right, text = run([spec(runs={"ft": ones, "off": partial(ones, 2.0), "broken": fails}, missing={"gone": "why"})])
    assert right
    assert "without off: it differs from the number one: out by 1" in text
    assert "without broken: ValueError: no such device" in text and "without gone: why" in text


def test_a_kernel_of_ours_that_fails_is_a_failure():
    def fails() -> Results:
        raise ValueError("ours")

    with pytest.raises(ValueError, match="ours"):
        run([spec(runs={"ft": fails})])


def test_relative_error_by_hand():
    assert contest.relative(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 5.0])) == pytest.approx(1 / 34**0.5)
    assert contest.relative(torch.zeros(2), torch.zeros(2)) == 0.0
    assert contest.relative(torch.tensor([1], dtype=torch.uint8), torch.tensor([2], dtype=torch.uint8)) == 0.5


# ---- what is printed and recorded ------------------------------------------------------------------------------------


def test_the_table_and_the_lines_hold_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    times = {"ft": [0.002, 0.004], "peer": [0.006, 0.006], "limit": [0.0015, 0.0015]}
    monkeypatch.setattr(measure, "turns", lambda runs, rounds: times)
    right, text = run([spec(limit=lambda: None)], file=tmp_path / "k.jsonl")
    assert right
    ft, peer, limit = (json.loads(line) for line in (tmp_path / "k.jsonl").read_text().splitlines())
    assert (ft["op"], ft["case"], ft["dtype"], ft["contender"]) == ("toy", "ones", "float32", "ft")
    assert ft["seconds"] == pytest.approx(0.003) and ft["least"] == 0.002 and ft["rounds"] == 2 and ft["x_ft"] == 1.0
    # of equal rounds: 6/2 and 6/4, 1.5/2 and 1.5/4
    assert peer["x_ft"] == pytest.approx(2.25) and limit["x_ft"] == pytest.approx(0.5625) and limit["extra"] is None
    assert ft["bytes"] == 1000 and ft["flops"] == 0 and ft["device"] and ft["commit"] is None
    rows = [line.split() for line in text.splitlines()]
    assert ["ones,", "float32", "ft", "3", "ms", "0.00", "GB/s", "0", "B", "1.00"] in rows
    assert ["peer", "6", "ms", "0.00", "GB/s", "0", "B", "2.25"] in rows


def test_a_checkout_keeps_results_by_itself(tmp_path: Path):
    (tmp_path / "bench" / "results").mkdir(parents=True)
    run([spec()])
    assert len((tmp_path / "bench" / "results" / "kernels.jsonl").read_text().splitlines()) == 2


def test_rates_by_hand():
    line = {"bytes": 2_000_000, "flops": 0, "seconds": 0.001}
    assert tables.rate(line) == "2.00 GB/s"
    assert tables.rate(line | {"flops": 8_000_000_000}) == "8000.0 GFLOP/s"
    assert [tables.span(s) for s in (2.5, 0.0123, 4e-7)] == ["2.5 s", "12.3 ms", "0.4 us"]
    assert [tables.size(n) for n in (5, 1500, 2_000_000, 3 * 10**9)] == ["5 B", "1.5 kB", "2.0 MB", "3.0 GB"]


def test_extra_memory_is_what_is_freed_again():
    def run() -> torch.Tensor:
        temporary = torch.ones(1000)  # 4,000 bytes, freed
        return temporary[:10] + 1  # 40 bytes, kept

    assert 4000 <= measure.extra_memory(run) < 4040  # scalars count too


def test_slow_contenders_take_one_turn(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(measure, "seconds", lambda run: run())
    assert measure.turns({"quick": lambda: 0.5, "slow": lambda: 1.5}, 3) == {"quick": [0.5] * 3, "slow": [1.5]}


def test_the_roofline_by_hand():
    """2.04 MB at 2.04 TB/s take 1 us; 624 MFLOP at 312 TFLOP/s take 2 us."""
    peak = roofline.PEAKS["sm_80"]
    copy, both = (roofline.least(Cost(bytes=2_040_000, flops=flops), peak) for flops in (0, 624_000_000))
    assert (copy.seconds, copy.bound) == (pytest.approx(1e-6), "memory")
    assert (both.seconds, both.bound) == (pytest.approx(2e-6), "products")
    slow = roofline.least(Cost(bytes=2_040_000, flops=624_000_000), peak, single=True)  # at 19.5 TFLOP/s
    assert (slow.seconds, slow.bound) == (pytest.approx(32e-6), "products")
    assert roofline.PEAKS.keys() == aot.TARGETS.keys()
    assert peak.ridge == pytest.approx(312 / 2.04)


def test_every_kernel_that_ships_has_a_problem():
    """A kernel that is renamed or new needs its least work in ft/commands/kernels/shipped.py."""
    pytest.importorskip("triton")
    works = roofline.works(bench.OPS)
    assert works.keys() == {launch.name for launch in aot.launches()}
    assert [name for name, work in works.items() if work is None or work.cost.bytes <= 0] == []


def test_least_work_of_kernels_by_hand():
    pytest.importorskip("triton")
    works = roofline.works(bench.OPS)

    def least(name: str) -> tuple[int, int]:
        work = works[name]
        assert work is not None
        return work.cost.bytes, work.cost.flops

    # 4096 tokens' 128 bf16 logits, 8 indices of 8 bytes and 8 bf16 weights; then ids of 8 bytes beside them
    assert least("routing.forward softmax E128 K8") == (4096 * (128 * 2 + 8 * 8 + 8 * 2), 0)
    assert least("routing.forward softmax E128 K8, given") == (4096 * (128 * 2 + 2 * 8 * 8 + 8 * 2), 0)
    # half a byte a value, a byte for 64 of them and 4 for 16,384; a bf16 result
    n = 4096 * 4096
    assert least("nf4.dequantise_kernel double") == (n // 2 + n // 64 + n // 4096 + 2 * n, 0)
    # 16 rows in and out, 2 bytes a value
    moved, flops = least("nf4.forward_kernel m16 double")
    assert (moved, flops) == (n // 2 + n // 64 + n // 4096 + 2 * 16 * 4096 * 2, 2 * 16 * n)
    # 65,536 rows read, summed for 8,192 tokens: bf16, and float32 weights
    assert least("experts.combine, 128 rows, AMD") == (65_536 * (2048 * 2 + 4) + 8192 * 2048 * 2, 0)
    # every one of 128 experts is reached: 1536 x 2048 weights each, in bf16
    assert least("experts.forward, bf16, 128 rows, NVIDIA") == (
        8192 * 2048 * 2 + 128 * 1536 * 2048 * 2 + 65_536 * 1536 * 2, 2 * 65_536 * 1536 * 2048)  # fmt: skip
    single = works["logprobs.statistics fp32"]
    assert single is not None and single.single and not works["logprobs.statistics bf16"].single  # type: ignore[union-attr]


def test_rooflines_of_kernels_are_printed_and_recorded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A kernel for each maker in one row, a kernel without a problem named, and lines of three kinds."""
    good = {"name": "toy.a, NVIDIA", "target": "sm_80", "ok": True, "error": "", "registers": 40, "spills": 0,
            "shared": 2048, "limit": 232_448, "fits": True}  # fmt: skip
    rows = [good, good | {"name": "toy.a, AMD", "target": "gfx942"}, good | {"name": "toy.b"}]
    work = shipped.Work(problem="T1", cost=Cost(bytes=2_040_000, flops=624_000_000))
    works = {"toy.a, NVIDIA": work, "toy.a, AMD": work, "toy.b": None}
    monkeypatch.setattr(roofline, "compiled", lambda ops: rows)
    monkeypatch.setattr(roofline, "works", lambda ops: works)
    _, text = run([spec()], compile=True, file=tmp_path / "k.jsonl")
    assert "a bound, not a measurement" in text and "no problem is stated for toy.b" in text
    printed = [line.split() for line in text.splitlines() if line.startswith("a ")]
    # 624 MFLOP at 1307 TFLOP/s take 0.477 us
    assert printed == ["a 2.0 MB 0.62 G 306 2 us p - - 0.477 us p".split()] and "\ntoy: T1 " in text
    assert "NVIDIA, data sheet of A100" in text
    lines = [json.loads(line) for line in (tmp_path / "k.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["timed"] * 2 + ["compiled"] * 3 + ["roofline"] * 4
    first, second, third, case = lines[2], lines[3], lines[4], lines[5]
    assert (first["registers"], first["problem"], first["bound"]) == (40, "T1", "products")
    assert first["least_seconds"] == pytest.approx(2e-6) and first["intensity"] == pytest.approx(624 / 2.04)
    assert second["target"] == "gfx942" and "bytes" not in third
    assert (case["case"], case["target"], case["bytes"], case["bound"]) == ("ones", "sm_80", 1000, "memory")


def test_compiled_kernels_are_a_row_each(monkeypatch: pytest.MonkeyPatch):
    good = {"name": "a", "target": "sm_90", "ok": True, "error": "", "registers": 40, "spills": 0, "shared": 2048,
            "limit": 232_448, "fits": True}  # fmt: skip
    rows = [good, good | {"target": "sm_80", "spills": 3}, good | {"target": "gfx942", "ok": False, "error": "no dot"}]
    asked: list[list[str]] = []
    monkeypatch.setattr(roofline, "compiled", lambda ops: asked.append(ops) or rows)
    _, text = run([spec()], compile=True)
    assert asked == [["toy"]]
    row = next(line.split() for line in text.splitlines() if line.startswith("a "))
    assert row == "a 40/3/2 of 227 40/0/2 of 227 - fails".split()
    assert "a, gfx942: no dot" in text and "toy: ones" in text


def test_compiling_goes_by_processes_that_interpret_nothing():
    """As this one does."""
    pytest.importorskip("triton")
    found = roofline.compiled(["routing"])
    assert {row["target"] for row in found} == set(aot.TARGETS) and all(row["ok"] for row in found)


# ---- the cases themselves --------------------------------------------------------------------------------------------


def tiny() -> list[Spec]:
    """Every op and mode at a size for tests."""
    small = experts.Case(name="", T=8, K=2, E=4, D=64, I=64, r=4)
    modes: tuple[experts.Mode, ...] = ("lora", "nf4", "frozen", "trained")
    words = Case(name="words", N=16, D=32, V=300)
    matrix = nf4.Case(name="matrix", shape=(64, 128))
    ops: tuple[nf4.Op, ...] = ("quantise", "dequantise", "linear")
    made: list[tuple[str, Any, Any]] = [
        *(("experts", experts, experts.Timed(mode=m, case=small)) for m in modes),
        *(("logprobs", logprobs, logprobs.Timed(case=words, trained=trained)) for trained in (False, True)),
        ("logprobs", logprobs, logprobs.Timed(case=evolve(words, options={"softcap": 5.0, "entropy": True}))),
        *(("routing", routing, evolve(timed, T=16)) for timed in routing.TIMED),
        *(("nf4", nf4, nf4.Timed(op=op, case=matrix, rows=8 if op == "linear" else 0)) for op in ops),
    ]
    specs = [Spec(op=op, name=t.name, make=partial(m.contest, t), cost=partial(m.cost, t)) for op, m, t in made]
    for make, cost, case in (
        (reductions.segment_contest, reductions.segment_cost, Segments(name="segments", lengths=(3, 4))),
        (reductions.policy_contest, reductions.policy_cost, Policy(name="policy", T=20, trained=1.0)),
        (reductions.similarity_contest, reductions.similarity_cost, Features(name="features", G=4, D=40)),
    ):
        specs.append(Spec(op="reductions", name=case.name, make=partial(make, case), cost=partial(cost, case)))
    return specs


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_op_is_right_and_so_are_its_peers(dtype: str):
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("liger_kernel")
    for spec in tiny():
        made = spec.make(getattr(torch, dtype), CPU)
        right, wrong = bench.tested(made)
        assert not wrong and right.keys() == made.runs.keys(), (spec.op, spec.name, wrong)
        assert len(made.runs) > 1 and (spec.cost(torch.bfloat16).bytes < spec.cost(torch.float32).bytes)


def test_experts_meet_all_of_transformers_and_say_who_cannot_come():
    spec = next(s for s in tiny() if s.name.startswith("lora"))
    assert list(spec.make(torch.float32, CPU).runs) == ["ft", "eager, peft", "batched_mm, peft", "grouped_mm, peft"]
    large = experts.Timed(mode="lora", case=experts.Case(name="", T=1024, K=8, E=128, D=512, I=256))
    assert "8.0 GiB of weights" in experts.absent("batched_mm", large, torch.float32)
    assert "dense deltas" in experts.absent("eager", large, torch.float32)
    assert experts.absent("grouped_mm", large, torch.float32) == ""


def test_the_definition_of_nf4_is_what_dequantise_gives():
    w = torch.randn(32, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    q = quantise(w)
    assert torch.equal(nf4.by_definition(q), nf4.nf4.dequantise(q))
    assert contest.relative(nf4.by_definition(q), w) < 0.15


def test_the_smallest_shipped_case_of_each_op_runs():
    chosen = [min(bench.specs([op], ""), key=lambda s: s.cost(torch.float32).bytes) for op in bench.OPS]
    right, text = run(chosen, rounds=1)
    assert right and all(f"\n{op} " in text for op in bench.OPS)


def test_costs_by_hand():
    """One of 4 experts gets one row: 3 products of 2 * 8 * 8 FLOPs and a weight of 3 * 64 values, in each pass."""
    timed = experts.Timed(mode="frozen", case=experts.Case(name="", T=1, K=1, E=4, D=8, I=8))
    assert experts.cost(timed, torch.float32) == Cost(bytes=2 * 3 * 64 * 4 + 4 * 8 * 4, flops=2 * 3 * 128)
    head = logprobs.Timed(case=Case(name="", N=2, D=4, V=10))
    assert logprobs.cost(head, torch.float32) == Cost(bytes=10 * 4 * 4 + 2 * 2 * 4 * 4 + 12 * 2, flops=4 * 2 * 10 * 4)


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ops", "case", "message"),
    [
        (["exprts"], "", r"no such op\n.*some of experts, nf4.*\n.*exprts\n.*did you mean experts\?"),
        (["tiled"], "", r"tiled has no timed cases"),
        (["nf4"], "lora", r"no case has this in its name\n(.|\n)*nf4: quantise 2048x2048(.|\n)*got: lora"),
    ],
)
def test_unknown_names_are_told(ops: list[str], case: str, message: str):
    with pytest.raises(RecipeError, match=message):
        bench.specs(ops, case)


def test_unknown_types_and_folders_are_told(tmp_path: Path):
    console = Console(file=io.StringIO())
    with pytest.raises(RecipeError, match=r"no such type\n.*float32, bfloat16, float16\n.*int8"):
        bench.run(["routing"], Options(dtypes=("int8",)), None, console)
    with pytest.raises(RecipeError, match=r"--json: no such folder"):
        bench.run(["routing"], Options(file=tmp_path / "none" / "k.jsonl"), None, console)


def test_a_wrong_kernel_is_status_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    wrong = spec("bad", runs={"ft": partial(ones, 2.0)})
    monkeypatch.setattr(bench, "specs", lambda ops, case: [wrong])
    monkeypatch.setattr(sys, "argv", ["ft", "bench", "kernels", "--no-compile"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1 and "ft differs from the number one" in capsys.readouterr().out


def test_the_command_line_says_nothing_on_stderr(tmp_path: Path):
    words = "routing --case qwen --rounds 1 --threads 1 --no-compile --json".split()
    command = [sys.executable, "-m", "ft", "bench", "kernels", *words, str(tmp_path / "k.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and "plain torch" in done.stdout
    assert len((tmp_path / "k.jsonl").read_text().splitlines()) == 2


def test_unknown_names_are_status_2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(sys, "argv", ["ft", "bench", "kernels", "nf5"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2 and "got: nf5" in capsys.readouterr().err
