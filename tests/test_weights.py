"""Model folders, the reader and writer of their weights, and conversion plans, on tensors a reader can check."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ft.errors import MissingFileError, ModelError
from ft.io.convert import Concat, Plan, Read, Route, Rule, Stack, evaluate, invert, make_plan
from ft.io.stream import entries
from ft.io.weights import INDEX, SINGLE, Memory, open_weights, resolve, split, write_weights

STACK = Rule(slots=("gate", "up"), stack=True, dim=1)


def tensors() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "a": torch.randn(5, 3, generator=g),
        "b": torch.randn(4, 2, 2, generator=g).bfloat16(),
        "scalar": torch.tensor(7.5),
        "ids": torch.arange(6),
        "empty": torch.empty(0, 3),
    }


# --- where a model is -----------------------------------------------------------------------------------------------


def no_network(*args: object, **kwargs: object) -> str:
    raise OSError("no network")


def test_resolve_takes_a_folder_then_ft_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.setenv("FT_MODELS", str(tmp_path))
    assert resolve("org/name", download=no_network).path == tmp_path / "org" / "name"
    assert resolve(str(tmp_path / "org"), download=no_network).path == tmp_path / "org"


def test_resolve_asks_the_hub_for_safe_files_only_and_records_the_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FT_MODELS", str(tmp_path / "none"))
    asked: dict[str, object] = {}

    def download(id: str, **kwargs: object) -> str:
        asked.update(kwargs, id=id)
        return str(tmp_path / ("0" * 40))

    found = resolve("org/name", "main", download=download)
    assert found.commit == "0" * 40
    assert asked["id"] == "org/name" and asked["revision"] == "main"
    patterns = asked["allow_patterns"]
    assert isinstance(patterns, list) and "*.safetensors" in patterns and "*.json" in patterns
    assert not [p for p in patterns if "bin" in p or p.endswith((".pt", ".py", "*"))]
    resolve("org/name", weights=False, download=download)
    assert "*.safetensors" not in asked["allow_patterns"]  # type: ignore[operator]


def test_resolve_offline_says_where_it_looked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FT_MODELS", str(tmp_path))
    with pytest.raises(ModelError) as e:
        resolve("org/name", download=no_network)
    assert str(tmp_path / "org" / "name") in str(e.value) and "no network" in str(e.value)
    with pytest.raises(MissingFileError, match="there is no model folder"):
        resolve("./not/there", download=no_network)


def test_the_commit_of_a_hub_cache_is_its_folder_name(tmp_path: Path) -> None:
    folder = tmp_path / "snapshots" / ("ab" * 20)
    folder.mkdir(parents=True)
    assert resolve(str(folder)).commit == "ab" * 20


# --- reading and writing --------------------------------------------------------------------------------------------


def test_reads_what_safetensors_wrote(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / SINGLE)
    weights = open_weights(tmp_path)
    assert sorted(weights.names()) == sorted(tensors())
    for name, tensor in tensors().items():
        assert weights.info(name).shape == tuple(tensor.shape) and weights.info(name).dtype == tensor.dtype
        assert torch.equal(weights.read(name), tensor)
    assert torch.equal(weights.rows("b", 1, 3), tensors()["b"][1:3])
    assert torch.equal(weights.rows("a", 2, 2), tensors()["a"][2:2])
    assert weights.total_bytes() == 60 + 32 + 4 + 48


@pytest.mark.parametrize("max_shard", [1, 70, 10**9])
def test_safetensors_reads_what_we_wrote(tmp_path: Path, max_shard: int) -> None:
    paths = write_weights(tmp_path, entries(tensors()), max_shard=max_shard)
    back = {name: t for path in paths for name, t in load_file(path).items()}
    assert back.keys() == tensors().keys()
    assert all(torch.equal(back[n], t) and back[n].dtype == t.dtype for n, t in tensors().items())
    assert (tmp_path / INDEX).is_file() == (len(paths) > 1)
    weights = open_weights(tmp_path)
    assert all(torch.equal(weights.read(n), t) for n, t in tensors().items())


def test_shards_hold_at_most_what_was_asked() -> None:
    sizes = [[e.name for e in shard] for shard in split(entries(tensors()), 92)]
    assert sizes == [["a", "b"], ["scalar", "ids", "empty"]]  # 60 + 32, then 4 + 48 + 0 bytes


def sharded(folder: Path) -> None:
    write_weights(folder, entries(tensors()), max_shard=70)


def lose_a_shard(folder: Path) -> None:
    next(folder.glob("model-00002*")).unlink()


def cut_a_shard(folder: Path) -> None:
    path = next(folder.glob("model-00001*"))
    os.truncate(path, path.stat().st_size - 8)


def garble(folder: Path) -> None:
    next(folder.glob("model-00001*")).write_bytes(b"not a safetensors file, but long enough to look like one")


def lie_in_the_index(folder: Path) -> None:
    table = json.loads((folder / INDEX).read_text())
    table["weight_map"]["ghost"] = table["weight_map"]["a"]
    (folder / INDEX).write_text(json.dumps(table))


def point_outside(folder: Path) -> None:
    table = json.loads((folder / INDEX).read_text())
    table["weight_map"]["a"] = "../elsewhere.safetensors"
    (folder / INDEX).write_text(json.dumps(table))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lose_a_shard, "weight files are missing"),
        (cut_a_shard, "does not fit into the file"),
        (garble, "no whole safetensors file"),
        (lie_in_the_index, "disagree on 1 tensors"),
        (point_outside, "outside of its folder"),
    ],
)
def test_damaged_folders_are_refused(tmp_path: Path, harm: Callable[[Path], None], message: str) -> None:
    sharded(tmp_path)
    open_weights(tmp_path)
    harm(tmp_path)
    with pytest.raises(ModelError, match=message):
        open_weights(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="holds no weights"):
        open_weights(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="save_pretrained"):
        open_weights(tmp_path)
    with pytest.raises(MissingFileError):
        open_weights(tmp_path / "absent")


# --- conversion -----------------------------------------------------------------------------------------------------


def route(name: str) -> Route:
    """experts.<e>.gate and experts.<e>.up make `stack`, q and k make `qk`, everything else keeps its name."""
    parts = name.split(".")
    if parts[0] == "experts":
        return Route(target="stack", rule=STACK, slot=STACK.slots.index(parts[2]), index=int(parts[1]))
    if name in ("q", "k"):
        return Route(target="qk", rule=Rule(slots=("q", "k"), stack=False, dim=0), slot="qk".index(name))
    return Route(target=name)


def experts(n: int) -> dict[str, torch.Tensor]:
    """Expert e: gate is a (2, 3) of e, up of e + 0.5."""
    return {
        f"experts.{e}.{slot}": torch.full((2, 3), e + half)
        for e in range(n)
        for slot, half in (("gate", 0.0), ("up", 0.5))
    }


def plan(stored: dict[str, torch.Tensor], **wanted: tuple[int, ...]) -> Plan:
    return make_plan(Memory(tensors=stored), wanted, route, drop=[r"^mtp\."], where="here")


def test_experts_are_stacked_in_numeric_order() -> None:
    stored = experts(11)
    op = plan(stored, stack=(11, 4, 3)).ops["stack"]
    value = evaluate(op, Memory(tensors=stored))
    assert value[:, :2, 0].tolist() == [[e, e] for e in range(11)]  # not 0, 1, 10, 2 ...
    assert value[:, 2:, 0].tolist() == [[e + 0.5] * 2 for e in range(11)]
    assert torch.equal(evaluate(op, Memory(tensors=stored), 3, 5), value[3:5])
    back = invert(op, value)
    assert back.keys() == stored.keys() and all(torch.equal(back[n], stored[n]) for n in stored)


@settings(max_examples=30, deadline=None)
@given(q=st.integers(1, 4), k=st.integers(1, 4), data=st.data())
def test_rows_of_a_concatenation_are_rows_of_the_whole(q: int, k: int, data: st.DataObject) -> None:
    stored = {"q": torch.randn(q, 3), "k": torch.randn(k, 3)}
    op = plan(stored, qk=(q + k, 3)).ops["qk"]
    assert isinstance(op, Concat)
    whole = torch.cat([stored["q"], stored["k"]])
    start = data.draw(st.integers(0, q + k))
    stop = data.draw(st.integers(start, q + k))
    assert torch.equal(evaluate(op, Memory(tensors=stored), start, stop), whole[start:stop])
    assert torch.equal(invert(op, whole)["k"], stored["k"])


def test_the_layout_of_experts_is_remembered() -> None:
    assert plan(experts(2), stack=(2, 4, 3)).layout == "per_expert"
    fused = {"mlp.experts.down_proj": torch.zeros(2, 4, 3)}
    assert make_plan(Memory(tensors=fused), {"mlp.experts.down_proj": (2, 4, 3)}, route).layout == "fused"
    assert plan({"a": torch.zeros(2)}, a=(2,)).layout == "plain"


def test_declared_extras_are_dropped_and_named() -> None:
    found = plan({"a": torch.zeros(2), "mtp.x": torch.zeros(1)}, a=(2,))
    assert found.dropped == ("mtp.x",) and found.ops == {"a": Read(source="a")}


def without(stored: dict[str, torch.Tensor], *names: str) -> dict[str, torch.Tensor]:
    return {n: t for n, t in stored.items() if n not in names}


@pytest.mark.parametrize(
    ("stored", "wanted", "message"),
    [
        (without(experts(3), "experts.1.up"), {"stack": (3, 4, 3)}, r"no experts\.1\.up"),
        (without(experts(3), "experts.2.up", "experts.2.gate"), {"stack": (3, 4, 3)}, r"no experts\.2\.gate"),
        (experts(4), {"stack": (3, 4, 3)}, r"not 0 to 2: 2\n  got: experts\.3\.gate, experts\.3\.up"),
        ({n: t for n, t in experts(2).items() if "up" not in n}, {"stack": (2, 4, 3)}, "lacks tensors that make stack"),
        (experts(2), {"stack": (2, 5, 3)}, r"stack: stored \[2, 4, 3\], model \[2, 5, 3\]"),
        ({**experts(2), "experts.1.gate": torch.zeros(2, 9)}, {"stack": (2, 4, 3)}, "unlike its neighbours"),
        ({**experts(2), "experts.1.up": torch.zeros(2, 3).half()}, {"stack": (2, 4, 3)}, "unlike its neighbours"),
        ({"q": torch.zeros(1), "k": torch.zeros(1).half()}, {"qk": (2,)}, "unlike its neighbours"),
        ({**experts(2), "stack": torch.zeros(2, 4, 3)}, {"stack": (2, 4, 3)}, "claim one parameter"),
        ({"a": torch.zeros(2)}, {"a": (2,), "b": (1,)}, "lacks tensors that the model needs: 1\n  got: b"),
        ({"a": torch.zeros(2), "z": torch.zeros(1)}, {"a": (2,)}, "no place for: 1\n  got: z"),
        ({"a": torch.zeros(2)}, {"a": (3,)}, "do not fit the model's config"),
    ],
)
def test_what_does_not_fit_is_listed(
    stored: dict[str, torch.Tensor], wanted: dict[str, tuple[int, ...]], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        plan(stored, **wanted)


def test_computed_parameters_cannot_be_written_back() -> None:
    halves = Rule(slots=("x",), stack=False, dim=None, make=lambda target: lambda columns: columns[0][0] / 2)
    stored = Memory(tensors={"x": torch.tensor([2.0, 4.0, 6.0])})
    op = make_plan(stored, {"half": (3,)}, lambda name: Route(target="half", rule=halves)).ops["half"]
    assert evaluate(op, stored).tolist() == [1.0, 2.0, 3.0]
    assert evaluate(op, stored, 1, 2).tolist() == [2.0]
    with pytest.raises(ModelError, match="cannot be written back"):
        invert(op, evaluate(op, stored))


def test_long_lists_are_cut_and_counted() -> None:
    with pytest.raises(ModelError) as e:
        plan({f"x{i:02d}": torch.zeros(1) for i in range(25)})
    assert "x09 ... (25 in all)" in str(e.value) and "x10" not in str(e.value)


def test_a_stack_op_reads_one_piece_at_a_time() -> None:
    class Counting(Memory):
        def read(self, name: str) -> torch.Tensor:
            reads.append(name)
            return super().read(name)

    reads: list[str] = []
    op = plan(experts(4), stack=(4, 4, 3)).ops["stack"]
    assert isinstance(op, Stack)
    evaluate(op, Counting(tensors=experts(4)), 1, 2)
    assert reads == ["experts.1.gate", "experts.1.up"]  # a rank reads its own experts only
