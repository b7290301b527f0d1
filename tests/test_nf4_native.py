"""NF4's C routine against the torch path, bit for bit, in three builds; and what happens where none can be built."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from attrs import evolve
from torch import Tensor

from ft.kernels import native, nf4
from ft.kernels.nf4 import NF4Tensor, reference
from ft.kernels.nf4 import native as routines
from ft.kernels.nf4.cases import CASES, Case, make

# Flags after -march=native, and the instructions that are left on x86.
BUILDS = {"native": (), "AVX2": ("-mno-avx512f",), "portable": ("-mno-avx512f", "-mno-avx2")}
X86 = os.uname().machine in ("x86_64", "AMD64") if os.name == "posix" else False
PORTABLE = "no vector instructions"

RAGGED = (1, 2, 31, 33, 64, 65, 127, 4095, 4096, 4097, 8191, 70_001)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A cache of this module's own."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o700)
        yield Path(name)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.delenv("FT_NATIVE", raising=False)


def built(build: str) -> routines.Routine:
    found = native.load(routines.SOURCE, BUILDS[build] if X86 else ())
    if found.library is None:
        pytest.skip(found.text)
    if X86 and build != "native":
        wanted = "AVX2" if build == "AVX2" else PORTABLE
        if wanted not in found.text:
            pytest.skip(f"this processor gives {found.text}")
    routine, _ = routines.made(found)
    assert routine is not None
    return routine


def bits(t: Tensor) -> Tensor:
    return t.contiguous().view(torch.int32 if t.dtype == torch.float32 else torch.int16)


def same(q: NF4Tensor, routine: routines.Routine) -> bool:
    got = routines.dequantise(q, routine)
    assert got is not None and got.shape == torch.Size(q.shape) and got.dtype == q.dtype
    return torch.equal(bits(got), bits(reference.dequantise(q)))


def quantised(case: Case) -> NF4Tensor:
    return nf4.quantise(make(case), block=case.block, double=case.double)


def random_nf4(n: int, dtype: torch.dtype = torch.bfloat16, block: int = 64, double: bool = True) -> NF4Tensor:
    """Random codes and scales, which takes less time than quantising."""
    rng, blocks = torch.Generator().manual_seed(n), -(-n // block)
    one = torch.rand(blocks, generator=rng)
    nested = {"absmax": (one * 256).to(torch.uint8), "offset": torch.tensor(0.3),
              "absmax2": torch.rand(-(-blocks // 256), generator=rng)}  # fmt: skip
    packed = torch.randint(0, 256, (-(-n // 2),), generator=rng, dtype=torch.uint8)
    return NF4Tensor(packed=packed, shape=(n,), dtype=dtype, block=block, **(nested if double else {"absmax": one}))


builds = pytest.mark.parametrize("build", BUILDS)


# ---- bits ------------------------------------------------------------------------------------------------------------


@builds
def test_every_case_equals_the_torch_path(build: str):
    routine = built(build)
    for case in CASES:
        assert same(quantised(case), routine), case.name


@builds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_block_size_and_ragged_end_equals_the_torch_path(build: str, dtype: torch.dtype):
    routine = built(build)
    for block in nf4.BLOCKS:
        for n in RAGGED:
            for double in (False, True):
                assert same(random_nf4(n, dtype, block, double), routine), (block, n, double)


@builds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_beyond_the_end_is_written(build: str, dtype: torch.dtype):
    """All values are those of code 15 with scale 1; what lies behind them keeps its 7."""
    routine = built(build)
    for n in range(1, 131):
        q = evolve(random_nf4(n, dtype, double=False), packed=torch.full((-(-n // 2),), 0xFF, dtype=torch.uint8))
        q, room = evolve(q, absmax=torch.ones_like(q.absmax)), torch.full((n + 64,), 7.0, dtype=dtype)
        routines.dequantise(q, lambda *a, to=room: routine(*a[:-1], to.data_ptr()))
        assert room.tolist() == [1.0] * n + [7.0] * 64


@builds
def test_outputs_of_8_and_32_MB_which_go_other_ways_to_memory_are_the_same(build: str):
    routine = built(build)
    for n, dtype in ((2**22 + 4099, torch.bfloat16), (2**21 + 1, torch.float32), (2**23, torch.float32)):
        assert same(random_nf4(n, dtype), routine)


@builds
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads_gives_the_same(build: str, threads: int):
    """131,072 values are enough for threads to share: 32 blocks of 4096, or 33 and a value, which 3 does not divide."""
    routine, before = built(build), torch.get_num_threads()
    weights = [random_nf4(n, block=block) for n in (2**17, 2**17 + 4097) for block in (64, 4096)]
    try:
        torch.set_num_threads(threads)
        assert all(same(q, routine) for q in weights) and torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


@builds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scales_of_any_size_round_as_torch_rounds(build: str, dtype: torch.dtype):
    """From denormals of float32 over ties and denormals of float16 to beyond the largest; zero, minus and infinity."""
    routine = built(build)
    exponent = torch.arange(-149, 128).float()
    scales = torch.cat([torch.ldexp(torch.tensor(m), exponent) for m in (1.0, 1.5, -1.0, 1.0009766, 1.2345678)])
    scales = torch.cat([scales, torch.tensor([0.0, -0.0, 65503.9, 65519.99, 65520.0, 3.4028235e38])])
    q = NF4Tensor(
        packed=torch.arange(256, dtype=torch.uint8).repeat(len(scales)),
        absmax=scales.repeat_interleave(512 // 64), shape=(len(scales), 512), dtype=dtype,
    )  # fmt: skip
    assert same(q, routine)
    wide = routines.dequantise(evolve(q, absmax=torch.full_like(q.absmax, torch.inf)), routine)
    assert wide is not None and wide.isnan().sum() == (q.packed >> 4 == 7).sum() + (q.packed & 15 == 7).sum()
    for payload in (0x7FFFFFFF, 0x7F800001, -1):
        nan = torch.full_like(q.absmax, payload, dtype=torch.int32).view(torch.float32)
        wide = routines.dequantise(evolve(q, absmax=nan), routine)
        assert wide is not None and wide.isnan().all()  # and not a number by rounding over


@builds
def test_product_and_sum_of_a_nested_scale_round_each(build: str):
    """With one rounding, as a fused multiply-add has, some of these scales would differ."""
    routine, n = built(build), 64 * 4096
    q = NF4Tensor(
        packed=torch.full((n // 2,), 0xFF, dtype=torch.uint8),  # code 15 is 1.0: values are the scales themselves
        absmax=torch.arange(4096).remainder(256).to(torch.uint8),
        absmax2=torch.linspace(0.001, 0.7, 16), offset=torch.tensor(0.0123), shape=(n,), dtype=torch.float32,
    )  # fmt: skip
    assert q.absmax2 is not None and q.offset is not None
    table, nested = nf4.dynamic_map()[q.absmax.long()], q.absmax2.repeat_interleave(256)
    got = routines.dequantise(q, routine)
    assert got is not None and torch.equal(got[::64], table * nested + q.offset)
    fused = (table.double() * nested.double() + q.offset.double()).float()
    assert not torch.equal(got[::64], fused)


@builds
def test_it_equals_bitsandbytes(build: str):
    oracle = pytest.importorskip("bitsandbytes.functional")
    routine = built(build)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for double in (False, True):
            w = make(Case(name="", shape=(96, 320), dtype=dtype))
            packed, state = oracle.quantize_4bit(w, quant_type="nf4", compress_statistics=double)
            got = routines.dequantise(nf4.quantise(w, double=double), routine)
            assert got is not None and torch.equal(got, oracle.dequantize_4bit(packed, state))


# ---- where it is used ------------------------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many values each call of the routine made."""
    routine, calls = built("native"), []

    def count(*args: object) -> None:
        calls.append(args[6])
        routine(*args)

    monkeypatch.setattr(routines, "_native", lambda: (count, "counted"))
    return calls


def test_every_way_to_dequantise_on_a_cpu_takes_it(counted: list[int]):
    w = torch.randn(4, 8, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    q = nf4.quantise(w)
    dense = reference.dequantise(q)
    assert torch.equal(nf4.dequantise(q), dense)
    assert torch.equal(nf4.dequantise(q, torch.float32, impl="torch"), dense.float())
    assert counted == [2048, 2048]
    chosen = nf4.dequantise_rows(q, torch.tensor([3, 1]))
    assert torch.equal(chosen, dense[[3, 1]]) and counted[2:] == [1024]
    for r in range(4):  # storage that begins later
        assert torch.equal(nf4.dequantise(nf4.slice_rows(q, r)), dense[r : r + 1])
    assert counted[3:] == [512] * 4


def test_a_linear_layer_takes_it_forward_and_backward(counted: list[int]):
    q = nf4.quantise(torch.randn(8, 64, generator=torch.Generator().manual_seed(0)))
    x = torch.randn(2, 64, requires_grad=True)
    nf4.linear(x, q).sum().backward()
    assert counted == [512, 512] and x.grad is not None
    assert torch.equal(x.grad, torch.ones(2, 8) @ reference.dequantise(q))
    with torch.no_grad():
        nf4.linear(x, q)
    with torch.inference_mode():
        nf4.linear(x, q)
    assert len(counted) == 4


def test_what_is_not_plain_memory_never_reaches_it(counted: list[int]):
    from torch._subclasses.fake_tensor import FakeTensorMode

    q = nf4.quantise(torch.randn(4, 64, generator=torch.Generator().manual_seed(0)))
    parts = {name: getattr(q, name) for name in ("packed", "absmax", "absmax2", "offset")}
    assert routines.dequantise(evolve(q, **{k: v.to("meta") for k, v in parts.items()})) is None
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert routines.dequantise(evolve(q, **{k: mode.from_tensor(v) for k, v in parts.items()})) is None
        assert routines.dequantise(q) is None  # its result would be no memory
    assert routines.dequantise(evolve(q, packed=q.packed[:-1])) is None  # it would read beyond the end
    assert routines.dequantise(evolve(q, absmax=q.absmax[:-1])) is None
    assert routines.dequantise(evolve(q, absmax2=q.absmax2.double() if q.absmax2 is not None else None)) is None
    assert routines.dequantise(evolve(q, packed=q.packed.repeat_interleave(2)[::2])) is None
    assert routines.dequantise(evolve(q, dtype=torch.float64)) is None
    assert counted == []
    frozen = evolve(q, **{k: torch.nn.Parameter(v, requires_grad=False) for k, v in parts.items()})
    got = routines.dequantise(frozen)
    assert got is not None and torch.equal(got, reference.dequantise(q)) and counted == [256]


def test_no_values_are_no_work(counted: list[int]):
    q = nf4.quantise(torch.randn(4, 64))
    assert nf4.dequantise_rows(q, torch.tensor([], dtype=torch.int64)).shape == (0, 64) and counted == [0]


# ---- compiling -------------------------------------------------------------------------------------------------------


def compiler(folder: Path, script: str) -> str:
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def absent(monkeypatch: pytest.MonkeyPatch) -> str:
    """What is said, and that torch gives the result."""
    found = native.load(routines.SOURCE)
    assert found.library is None
    monkeypatch.setattr(routines, "_native", lambda: routines.made(found))
    q = nf4.quantise(torch.randn(4, 64, generator=torch.Generator().manual_seed(0)))
    assert routines.dequantise(q) is None and torch.equal(nf4.dequantise(q), reference.dequantise(q))
    return nf4.on_cpu()


def test_it_can_be_switched_off(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FT_NATIVE", "0")
    assert absent(monkeypatch) == "torch: FT_NATIVE=0 in the environment"


def test_no_compiler_leaves_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert absent(monkeypatch) == "torch: no C compiler found"


def test_a_compiler_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CC", "/no/such/compiler -m64")
    assert absent(monkeypatch).startswith("torch: /no/such/compiler cannot be run: ")
    monkeypatch.setenv("CC", "'half quoted")
    assert absent(monkeypatch) == "torch: No closing quotation"


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    failing = compiler(tmp_path, 'case "$*" in *-dM*) ;; *) echo "nf4.c:1:1: error: out of tune" >&2; exit 1;; esac')
    monkeypatch.setenv("CC", failing)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert absent(monkeypatch) == f"torch: {failing} failed: nf4.c:1:1: error: out of tune"
    assert list((tmp_path / "ft" / "native").iterdir()) == []


def test_a_library_that_cannot_be_loaded_leaves_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    broken = compiler(tmp_path, 'while [ $# -gt 0 ]; do [ "$1" = -o ] && echo nonsense > "$2"; shift; done; exit 0')
    monkeypatch.setenv("CC", broken)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert absent(monkeypatch).startswith("torch: ") and "nf4-" in nf4.on_cpu()


def test_a_flag_that_the_compiler_does_not_know_is_done_without(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """As on ARM, where some know -mcpu=native only, and on macOS, where there is no -fopenmp."""
    built("native")
    real = native.compiler()[0]
    refuse = 'case "$*" in *-march=native*|*-fopenmp*) echo "error: unknown" >&2; exit 1;; esac'
    drop = f'for a; do shift; [ "$a" = -mcpu=native ] || set -- "$@" "$a"; done; exec {real} "$@"'
    monkeypatch.setenv("CC", compiler(tmp_path, f"{refuse}\n{drop}"))
    found = native.load(routines.SOURCE)
    assert found.library is not None and "one thread: this compiler has no OpenMP" in found.text
    routine, _ = routines.made(found)
    assert routine is not None and same(random_nf4(154_201), routine)


def test_two_processes_compile_at_once_and_a_third_takes_it_from_the_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    built("native")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    script = "from ft.kernels.nf4 import native, on_cpu; assert not native._native.cache_info().misses; print(on_cpu())"
    both = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = {process.communicate(timeout=120)[0] for process in both}
    assert len(said) == 1 and said.pop().startswith("C routines (")
    cache = tmp_path / "ft" / "native"
    (library,) = cache.iterdir()  # two that compiled at once left one, and nothing else
    assert cache.stat().st_mode & 0o777 == 0o700 and library.suffix == ".so"
    before = library.stat().st_mtime_ns, library.stat().st_ino
    assert native.load(routines.SOURCE).library is not None
    assert (library.stat().st_mtime_ns, library.stat().st_ino) == before
    library.chmod(0o777)  # anybody may have written it: it is made anew
    assert native.load(routines.SOURCE).library is not None and library.stat().st_ino != before[1]
    assert native.safe(library)


def private(place: Path, why: str) -> None:
    """The cache at ``place`` is not used: a private folder is, which goes away, and that is said."""
    holder, remark = native.cache()
    assert isinstance(holder, tempfile.TemporaryDirectory)
    with holder as name:
        assert os.stat(name).st_mode & 0o777 == 0o700 and Path(name) != place
    assert remark == f", compiled by each process: {place} {why}"
    found = native.load(routines.SOURCE)
    if found.library is not None:
        assert found.text.startswith("C routines (") and found.text.endswith(remark)


def test_a_folder_that_others_can_write_is_not_trusted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    place = tmp_path / "ft" / "native"
    place.mkdir(parents=True)
    place.chmod(0o770)
    private(place, "is not this user's alone")
    place.chmod(0o707)
    private(place, "is not this user's alone")
    assert list(place.iterdir()) == []
    place.rmdir()
    place.symlink_to(tmp_path)
    private(place, "is not this user's alone")


def test_a_folder_of_another_user_is_not_trusted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    place = tmp_path / "ft" / "native"
    place.mkdir(parents=True, mode=0o700)
    assert native.safe(place)
    own = os.geteuid()
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: own + 1)
        assert not native.safe(place)
        holder, remark = native.cache()
    assert isinstance(holder, tempfile.TemporaryDirectory) and remark.endswith("is not this user's alone")
    holder.cleanup()


def test_a_cache_that_cannot_be_made_is_done_without(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "ft").write_text("a file where a folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    private(tmp_path / "ft" / "native", "cannot be made")


def test_a_relative_cache_is_not_followed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    holder, remark = native.cache()
    with holder as name:
        assert (name, remark) == (str(tmp_path / ".cache" / "ft" / "native"), "")


def test_the_source_ships_with_the_package():
    """What is under ft/ and not ignored by git is what the build takes."""
    assert files("ft.kernels.nf4").joinpath("nf4.c").read_text("utf-8") == routines.SOURCE.read_text("utf-8")
    root = Path(native.__file__).parents[2]
    if (root / ".git").exists():
        name = routines.SOURCE.relative_to(root).as_posix()
        ignored = subprocess.run(["git", "check-ignore", "-q", name], cwd=root)
        assert ignored.returncode == 1
