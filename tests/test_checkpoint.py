"""Checkpoints are whole or absent, and bitwise what was saved; safetensors' own reader is the oracle of the format."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from ft.errors import CapacityError, CheckpointError
from ft.io import checkpoint, stream
from ft.io.files import file_sha256, write_json_atomic
from ft.io.stream import Entry, entries

# Children are forked from a small server that has imported torch once, so that killing dozens of them is quick.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["pytest", "safetensors.torch", "ft.io.checkpoint"])


def content(step: int) -> dict[str, dict[str, Tensor]]:
    """What step ``step`` saves: different bits at every step, in several files."""
    g = torch.Generator().manual_seed(step)
    return {
        "weights": {"a": torch.randn(5, 3, generator=g), "b": torch.randn(7, generator=g).bfloat16()},
        "optimizer": {"a.exp_avg": torch.randn(5, 3, generator=g), "a.step": torch.tensor(float(step))},
        "bytes": {"codes": torch.randint(0, 255, (64,), generator=g).to(torch.uint8)},
    }


def save(run: Path, step: int, **options) -> Path:
    files = {stem: entries(tensors) for stem, tensors in content(step).items()}
    return checkpoint.save(run, step, files, {"step": step, "loss": step / 3}, **options)


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and stream._raw(entry(a)) == stream._raw(entry(b))


def entry(tensor: Tensor) -> Entry:
    return entries({"x": tensor})[0]


def assert_is(found: checkpoint.Checkpoint, step: int) -> None:
    assert found.step == step and found.meta == {"step": step, "loss": step / 3}
    for stem, tensors in content(step).items():
        assert set(found.open(stem)) == set(tensors)
        assert all(same(found.open(stem)[name], tensor) for name, tensor in tensors.items())


def assert_whole(run: Path) -> checkpoint.Checkpoint:
    """Every folder that has a checkpoint's name is one, bitwise; returns the newest."""
    for step in checkpoint.steps(run):
        assert_is(checkpoint.load(run / f"step-{step:06d}"), step)
    found = checkpoint.load_latest(run)
    assert found is not None
    return found


def names(run: Path) -> list[str]:
    return sorted(p.name for p in run.iterdir())


# --- the format


def test_safetensors_reads_every_type_that_we_write(tmp_path):
    bits = torch.arange(48, dtype=torch.uint8)
    tensors = {str(dtype): bits.view(dtype).reshape(2, -1) for dtype in stream._NAMES if dtype != torch.bool}
    tensors |= {"bool": bits % 3 == 0, "scalar": torch.tensor(1.5), "empty": torch.empty(0, 4), "ünï": torch.ones(3)}
    tensors["strided"] = torch.arange(12.0).reshape(3, 4).t()
    written = stream.write_tensors(tmp_path / "x.safetensors", entries(tensors), {"who": "me"})
    theirs = safetensors.torch.load_file(tmp_path / "x.safetensors")
    assert theirs.keys() == tensors.keys()
    assert all(same(theirs[name], tensor) for name, tensor in tensors.items())
    assert written.bytes == (tmp_path / "x.safetensors").stat().st_size
    assert written.bytes == stream.file_bytes(entries(tensors), {"who": "me"})
    assert written.sha256 == file_sha256(tmp_path / "x.safetensors")


def test_one_tensor_is_held_at_a_time(tmp_path):
    alive: list[str] = []

    class Held(np.ndarray):
        tag = ""

        def __del__(self):
            alive.remove(self.tag)

    def get(name: str) -> Tensor:
        assert not alive, f"{alive} still held while {name} is fetched"
        array = np.zeros(1000, dtype=np.float32).view(Held)
        array.tag = name
        alive.append(name)
        return torch.from_numpy(array)

    items = [Entry(name=n, shape=(1000,), dtype=torch.float32, get=lambda n=n: get(n)) for n in "abc"]
    stream.write_tensors(tmp_path / "x.safetensors", items)
    assert len(safetensors.torch.load_file(tmp_path / "x.safetensors")) == 3


def test_rows_reads_a_shard(tmp_path):
    x = torch.arange(20.0).reshape(10, 2)
    stream.write_tensors(tmp_path / "x.safetensors", entries({"x": x}))
    tensors = stream.Tensors(tmp_path / "x.safetensors")
    assert torch.equal(tensors.rows("x", 3, 5), torch.tensor([[6.0, 7.0], [8.0, 9.0]]))
    with pytest.raises(KeyError, match="y is not in"):
        tensors["y"]


def test_a_full_device_raises_after_every_gather(tmp_path):
    fetched = []

    def big(name: str) -> Entry:
        def get() -> Tensor:
            fetched.append(name)
            return torch.zeros(100_000)

        return Entry(name=name, shape=(100_000,), dtype=torch.float32, get=get)

    with pytest.raises(OSError) as caught:
        stream.write_tensors(Path("/dev/full"), [big(n) for n in "abc"])
    assert caught.value.errno == errno.ENOSPC
    assert fetched == ["a", "b", "c"]


# --- saving and loading


def test_what_is_saved_is_loaded(tmp_path):
    path = save(tmp_path / "run", 7)
    assert path == tmp_path / "run" / "step-000007"
    assert names(path) == [
        "bytes.safetensors",
        "manifest.json",
        "meta.json",
        "optimizer.safetensors",
        "weights.safetensors",
    ]
    assert_is(checkpoint.load(path), 7)
    assert checkpoint.latest(tmp_path / "run") == path
    assert "weights" in checkpoint.load(path) and "other" not in checkpoint.load(path)


def test_documents_lie_beside_the_weights_and_are_checked(tmp_path):
    path = checkpoint.save(tmp_path, 1, {}, {}, documents={"adapter_config": {"r": 8}})
    assert json.loads((path / "adapter_config.json").read_text()) == {"r": 8}
    (path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        checkpoint.load(path)


def test_nothing_saved_is_none(tmp_path):
    assert checkpoint.latest(tmp_path) is None
    assert checkpoint.latest(tmp_path / "absent") is None


def test_other_ranks_fetch_in_the_writers_order_and_write_nothing(tmp_path):
    def fetches(writer: bool, order: str) -> list[str]:
        log: list[str] = []

        def item(name: str) -> Entry:
            return Entry(name=name, shape=(1,), dtype=torch.float32, get=lambda: log.append(name) or torch.zeros(1))

        checkpoint.save(tmp_path / str(writer), 1, {"weights": [item(n) for n in order]}, {}, writer=writer)
        return log

    assert fetches(True, "cab") == fetches(False, "bca") == ["a", "b", "c"]
    assert not (tmp_path / "False").exists()


def test_retention_keeps_the_newest_and_the_best(tmp_path):
    for step in (10, 20, 30, 40):
        save(tmp_path, step, keep=2, best=10)
    assert names(tmp_path) == ["best.json", "step-000010", "step-000030", "step-000040"]
    save(tmp_path, 50, keep=1)  # best.json still says 10
    assert names(tmp_path) == ["best.json", "step-000010", "step-000050"]
    save(tmp_path, 60, keep=1, best=60)
    assert names(tmp_path) == ["best.json", "step-000060"]
    assert checkpoint.best_step(tmp_path) == 60
    assert_is(checkpoint.load(tmp_path / "step-000060"), 60)


def test_steps_past_a_million_are_ordered_as_numbers(tmp_path):
    for step in (999_999, 1_000_000):
        save(tmp_path, step, keep=1)
    assert names(tmp_path) == ["step-1000000"]


def test_going_back_removes_the_abandoned_future(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step, keep=3)
    said = []
    save(tmp_path, 15, keep=3, notice=said.append)
    assert checkpoint.steps(tmp_path) == [10, 15]
    assert "[20, 30]" in said[0]


def test_the_same_step_saved_again(tmp_path):
    path = save(tmp_path, 5)
    first = path.stat().st_ino
    save(tmp_path, 5)
    assert path.stat().st_ino == first  # nothing changed, nothing replaced
    checkpoint.save(tmp_path, 5, {"weights": entries({"a": torch.ones(2)})}, {"new": True})
    assert checkpoint.load(path).meta == {"new": True}
    assert names(tmp_path) == ["step-000005"]


@pytest.mark.parametrize("name", ["weights.safetensors", "meta.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_is_named_and_the_newest_whole_one_is_taken(tmp_path, name, damage):
    save(tmp_path, 1)
    file = save(tmp_path, 2) / name
    data = bytearray(file.read_bytes())
    if damage == "remove":
        file.unlink()
    else:
        data[len(data) // 2] ^= 0x10
        file.write_bytes(data if damage == "flip" else data[:-5])
    with pytest.raises(CheckpointError, match=r"step-000002"):
        checkpoint.load(tmp_path / "step-000002")
    said: list[str] = []
    found = checkpoint.load_latest(tmp_path, notice=said.append)
    assert found is not None
    assert_is(found, 1)
    assert len(said) == 1 and "step-000002" in said[0] and "falling back to step-000001" in said[0]


def test_no_whole_checkpoint_is_an_error_not_a_fresh_start(tmp_path):
    (save(tmp_path, 1) / "weights.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no whole checkpoint is left"):
        checkpoint.latest(tmp_path)


def test_sweep_clears_leftovers_and_finishes_a_rename(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2).rename(tmp_path / "step-000002.tmp-ab12")  # whole, only the name is missing
    (tmp_path / "step-000003.tmp-ab12").mkdir()
    save(tmp_path, 4, keep=9).rename(tmp_path / "step-000004.trash-ab12")
    assert checkpoint.steps(tmp_path) == [1]
    said: list[str] = []
    checkpoint.sweep(tmp_path, notice=said.append)
    assert names(tmp_path) == ["step-000001", "step-000002"]
    assert len(said) == 3
    assert_is(checkpoint.load(tmp_path / "step-000002"), 2)


def test_json_is_replaced_whole(tmp_path):
    write_json_atomic(tmp_path / "x.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json_atomic(tmp_path / "x.json", {"a": object()})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}
    assert names(tmp_path) == ["x.json"]


# --- kill -9


def save_for_ever(run: Path, first: int) -> None:
    torch.set_num_threads(1)
    checkpoint.sweep(run, notice=lambda _: None)
    found = checkpoint.load_latest(run)
    for step in range(found.step + 1 if found else first, 10**6):
        save(run, step, keep=1, best=step - step % 3 or None)


def save_and_die(run: Path, step: int, death: int) -> None:
    """Save, but kill this process at its ``death``-th file operation; audit hooks fire just before each."""
    seen = 0

    def hook(event: str, args: tuple) -> None:
        nonlocal seen
        ours = event == "open" and isinstance(args[0], (str, os.PathLike)) and str(run) in os.fspath(args[0])
        if ours or event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir"):
            seen += 1
            if seen == death:
                os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    sys.addaudithook(hook)
    save(run, step, keep=1)
    os._exit(0)


def test_kill_at_random_moments_leaves_a_whole_checkpoint(tmp_path):
    rng = random.Random(0)
    save(tmp_path, 1)
    last = 1
    for _ in range(24):
        child = CONTEXT.Process(target=save_for_ever, args=(tmp_path, 2))
        child.start()
        reached = last
        deadline = time.monotonic() + 60
        while reached == last and time.monotonic() < deadline:  # it is saving now
            time.sleep(0.002)
            reached = max(checkpoint.steps(tmp_path), default=last)
        time.sleep(rng.uniform(0, 0.03))
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        found = assert_whole(tmp_path)
        assert found.step > last
        last = found.step


def test_kill_at_every_file_operation_leaves_a_whole_checkpoint(tmp_path):
    save(tmp_path, 1)
    exits, seen = [], set()
    for death in range(1, 100):
        before = assert_whole(tmp_path)
        child = CONTEXT.Process(target=save_and_die, args=(tmp_path, before.step + 1, death))
        child.start()
        child.join()
        exits.append(child.exitcode)
        found = assert_whole(tmp_path)
        assert found.step in (before.step, before.step + 1)
        seen.add(found.step - before.step)
        checkpoint.sweep(tmp_path, notice=lambda _: None)
        assert all(name.startswith("step-") and "." not in name for name in names(tmp_path))
        if child.exitcode == 0:
            break
    assert exits[-1] == 0 and set(exits[:-1]) == {-signal.SIGKILL}
    assert len(exits) > 15 and seen == {0, 1}  # deaths before and after the rename


# --- a failing disk


def save_beyond_the_limit(run: Path, report) -> None:
    """A file-size limit makes the kernel refuse the write, as a full disk does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    fetched: list[str] = []

    def item(name: str, n: int) -> Entry:
        return Entry(name=name, shape=(n,), dtype=torch.float32, get=lambda: fetched.append(name) or torch.zeros(n))

    files = {"weights": [item("a", 10), item("b", 90_000), item("c", 10)], "optimizer": [item("d", 10)]}
    try:
        checkpoint.save(run, 2, files, {})
        report.send(("saved", fetched))
    except CapacityError as error:
        report.send((str(error), fetched))


def test_a_failed_write_leaves_the_last_checkpoint_and_no_litter(tmp_path):
    save(tmp_path, 1)
    ours, theirs = CONTEXT.Pipe()
    child = CONTEXT.Process(target=save_beyond_the_limit, args=(tmp_path, theirs))
    child.start()
    message, fetched = ours.recv()
    child.join()
    assert "File too large" in message and "0.36 MB to write" in message and "free" in message
    assert fetched == ["a", "b", "c", "d"]  # ranks that gather with this one are not left waiting
    assert names(tmp_path) == ["step-000001"]
    assert_is(checkpoint.load(tmp_path / "step-000001"), 1)


def test_an_unwritable_folder_is_a_capacity_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CapacityError, match="cannot save the checkpoint"):
        save(tmp_path / "file" / "run", 1)


def test_preflight(tmp_path):
    free = checkpoint.free_bytes(tmp_path / "not" / "yet")
    checkpoint.preflight(tmp_path, 1)
    with pytest.raises(CapacityError, match=r"will not fit[\s\S]*save.keep"):
        checkpoint.preflight(tmp_path / "not" / "yet", free * 2)


def test_checkpoint_bytes_is_what_lies_on_disk(tmp_path):
    files = {stem: entries(tensors) for stem, tensors in content(1).items()}
    path = save(tmp_path, 1)
    assert checkpoint.checkpoint_bytes(files) == sum(p.stat().st_size for p in path.glob("*.safetensors"))


def test_what_cannot_be_json_stops_every_rank(tmp_path):
    for writer in (True, False):
        with pytest.raises(TypeError):
            checkpoint.save(tmp_path, 1, {}, {"x": object()}, writer=writer)
    assert names(tmp_path) == []
