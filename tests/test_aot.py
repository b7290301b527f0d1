"""Every Triton kernel that ships compiles for every target without a GPU, without spills, within shared memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve

from ft.errors import RecipeError
from ft.kernels import aot, launch

pytest.importorskip("triton")
ROOT = Path(__file__).parents[1]

# Kernels that must be refused, each in its own way, beside one that must not.
PLANTED = """
import json
import triton, triton.language as tl
from attrs import asdict
from ft.kernels.aot import TARGETS, compile
from ft.kernels.launch import Launch

@triton.jit
def copy(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, i < n), i < n)

@triton.jit
def product(x, y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a = tl.load(x + i[:, None] * BLOCK + i)
    tl.store(y + i[:, None] * BLOCK + i, tl.dot(a, tl.trans(a)))

types = {"x": "*fp32", "y": "*fp32"}
for name, kernel, more, block in [
    ("good", copy, {"n": "i32:16"}, 1024), ("not a power of two", copy, {"n": "i32"}, 1000), ("no n", copy, {}, 64),
    ("large", product, {}, 128),
]:
    for target in TARGETS if name != "large" else ["sm_90"]:
        launch = Launch(name=name, kernel=kernel, signature=types | more, constants={"BLOCK": block}, warps=1)
        result = compile(launch, target)
        print(json.dumps(asdict(result) | {"fits": result.fits}))
"""


def run(*words: str) -> subprocess.Popen[str]:
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, *words]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def lines(process: subprocess.Popen[str]) -> list[dict[str, Any]]:
    out, err = process.communicate(timeout=850)
    assert process.returncode == 0, err
    return [json.loads(line) for line in out.splitlines()]


@pytest.mark.timeout(900)  # a minute of compiling, once; Triton keeps what it compiled
def test_every_kernel_compiles_for_every_target_and_fits():
    shares = [run("-m", "ft.kernels.aot", f"{part}/2") for part in range(2)]
    results = [line for share in shares for line in lines(share)]
    expected = [(x.name, target) for x in aot.launches() for target in x.targets or aot.TARGETS]
    assert sorted((r["name"], r["target"]) for r in results) == sorted(expected)
    failed = [f"{r['name']} for {r['target']}: {r['error']}" for r in results if not r["ok"]]
    failed += [f"{r['name']} for {r['target']}: {r['shared']} of {r['limit']} bytes" for r in results if not r["fits"]]
    failed += [f"{r['name']} spills {r['spills']}" for r in results if r["target"] == "sm_90" and r["spills"]]
    assert not failed, "\n".join(failed)


def test_what_does_not_compile_or_fit_is_reported(tmp_path):
    (tmp_path / "planted.py").write_text(PLANTED)
    results = lines(run(str(tmp_path / "planted.py")))
    by_name = {name: [r for r in results if r["name"] == name] for name in ("good", "not a power of two", "no n")}
    assert all(len(found) == 4 for found in by_name.values())
    assert all(r["fits"] and 0 < r["registers"] < 64 and r["spills"] == 0 for r in by_name["good"])
    assert all(not r["ok"] and "power of 2" in r["error"] for r in by_name["not a power of two"])
    assert all(not r["ok"] and "missing or unknown: n" in r["error"] for r in by_name["no n"])
    (large,) = [r for r in results if r["name"] == "large"]
    assert large["spills"] > 0 and large["limit"] == 232448  # 128 x 128 float32 results on 32 threads


def test_too_much_shared_memory_does_not_fit():
    fitting = aot.Compiled(name="x", target="gfx942", ok=True, shared=65536, limit=aot.TARGETS["gfx942"].shared)
    assert fitting.fits and not evolve(fitting, shared=65537).fits and not evolve(fitting, ok=False).fits


def test_a_process_that_interprets_cannot_compile():
    broken = launch.Launch(name="x", kernel=None, signature={})
    with pytest.raises(RecipeError, match=r"TRITON_INTERPRET: .*cannot be compiled"):
        aot.compile(broken, "sm_90")


def test_unknown_kernels_are_named():
    with pytest.raises(RecipeError, match=r"some of nf4, .*\n.*nf5"):
        aot.launches("nf4", "nf5")


def test_the_implementation_follows_device_and_wish(monkeypatch):
    x = torch.ones(2)
    assert launch.check("auto", x) == launch.check("torch", x) == "torch"
    assert launch.check("triton", x, None) == "triton"  # this process interprets kernels
    assert launch.usable(x, None)
    with pytest.raises(RecipeError, match=r"model\.kernels: no such kernels\n.*auto, torch, triton\n.*cuda"):
        launch.check("cuda", x)
    monkeypatch.delenv("TRITON_INTERPRET")
    assert not launch.usable(x) and launch.check("auto", x) == "torch"
    with pytest.raises(RecipeError, match=r"model\.kernels: Triton kernels cannot run here\n.*GPU.*\n.*on cpu\n.*auto"):
        launch.check("triton", x, None)
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"no triton\n.*pip install"):
        launch.check("triton", x)
