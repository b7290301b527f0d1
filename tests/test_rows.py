"""Reading files, slices and hub datasets; every error names the file and the place in it."""

from __future__ import annotations

import gzip
import json
import sys
import types
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ft.data import hub
from ft.data.rows import digests, places, read
from ft.data.split import Slice, bounds, parse_split
from ft.errors import DataError, FtError, MissingFileError, RecipeError
from ft.recipe.parts import Source


def write(path: Path, content: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def values(path: str, **options: Any) -> list[Any]:
    return [row.value for row in read(Source(path=path, **options))]


def numbered(folder: Path, n: int) -> str:
    return write(folder / "n.jsonl", "".join(f'{{"i": {i}}}\n' for i in range(n)))


@pytest.mark.parametrize("ending", [".jsonl", ".ndjson", ".jsonl.gz", ".jsonl.zst", ".json"])
def test_json_lines_skip_blank_lines_and_keep_their_numbers(tmp_path: Path, ending: str):
    content = '\ufeff{"text": "a"}\n\n   \r\n{"text": "é"}'.encode()
    pack = {".gz": gzip.compress, ".zst": zstandard.compress}.get(Path("x" + ending).suffix, bytes)
    path = write(tmp_path / f"x{ending}", pack(content[:20]) + pack(content[20:]))  # archives may have many parts
    rows = list(read(Source(path=path)))
    assert [(row.value, row.source, row.error) for row in rows] == [
        ({"text": "a"}, f"{path}:1", None),
        ({"text": "é"}, f"{path}:4", None),
    ]


def test_json_array(tmp_path: Path):
    path = write(tmp_path / "x.json", '\n[{"text": "a"},\n {"text": "b"}]')
    assert [row.source for row in read(Source(path=path))] == [f"{path}:row 1", f"{path}:row 2"]
    assert values(path) == [{"text": "a"}, {"text": "b"}]


def test_csv_rows_are_named_by_the_line_on_which_they_begin(tmp_path: Path):
    path = write(tmp_path / "x.csv", 'prompt,completion\n"two\nlines",b\n\nc,"d, ""e"""\n')
    rows = list(read(Source(path=path)))
    assert [row.value for row in rows] == [
        {"prompt": "two\nlines", "completion": "b"},
        {"prompt": "c", "completion": 'd, "e"'},
    ]
    assert rows[0].source == f"{path}:2"


def test_csv_with_long_cells_and_with_wrong_rows(tmp_path: Path):
    path = write(tmp_path / "x.csv", "text\n" + "a" * 200_000 + "\nb,c\nd\n")
    long, wrong, good = read(Source(path=path))
    assert len(long.value["text"]) == 200_000
    assert wrong.error is not None and wrong.error.where == f"{path}:3" and wrong.error.got == "2 cells"
    assert good.value == {"text": "d"}


def test_parquet_drops_the_nulls_that_arrow_adds(tmp_path: Path):
    path = str(tmp_path / "x.parquet")
    tools = [{"name": "f", "parameters": {"a": 1}}], [{"name": "g", "parameters": {"b": 2}}]
    pq.write_table(pa.Table.from_pylist([{"tools": t} for t in tools]), path)
    assert pq.read_table(path).to_pylist()[0]["tools"][0]["parameters"] == {"a": 1, "b": None}
    rows = list(read(Source(path=path)))
    assert [row.value["tools"] for row in rows] == list(tools)
    assert [row.source for row in rows] == [f"{path}:row 1", f"{path}:row 2"]


def test_folder_and_glob_in_sorted_order(tmp_path: Path):
    for name in ("b.jsonl", "a.csv", "sub/c.json", ".hidden.jsonl", "notes.txt"):
        write(tmp_path / name, "text\nx\n" if name == "a.csv" else json.dumps({"text": name}))
    assert [v["text"] for v in values(str(tmp_path))] == ["x", "b.jsonl", "sub/c.json"]
    assert [v["text"] for v in values(str(tmp_path / "**/*.json*"))] == ["b.jsonl", "sub/c.json"]
    assert places(Source(path=str(tmp_path))) == [f"{tmp_path}/{name}:" for name in ("a.csv", "b.jsonl", "sub/c.json")]


BROKEN = [
    (b'{"a": 1,}\n', "broken JSON at column 9", '{"a": 1,}'),
    (b'{"text": "abc", "b" 3}', "broken JSON at column 21: Expecting ':' delimiter", '{"text": "abc", "b" 3}'),
    ('{"é": x}'.encode(), "broken JSON at column 7", '{"é": x}'),
    (b'{"a": NaN}', "broken JSON: JSON is malformed: invalid character", '{"a": NaN}'),
    (b'{"a": "\\ud800"}', "half of a surrogate pair", '{"a": "\\ud800"}'),
    (b'{"a": "\xff"}', "broken JSON at column 8: not UTF-8 (byte 0xff)", '{"a": "\ufffd"}'),
    (b"[" * 100_000, "nested too deeply", "[" * 30),
    (b'{"a": 1} {"a": 2}', "broken JSON at column 10: Extra data", '{"a": 1} {"a": 2}'),
]


@pytest.mark.parametrize(("line", "problem", "around"), BROKEN)
def test_broken_json_names_line_column_and_the_text_around(tmp_path: Path, line: bytes, problem: str, around: str):
    path = write(tmp_path / "x.jsonl", b'{"text": "a"}\n\n' + line + b'\n{"text": "b"}\n')
    first, broken, last = read(Source(path=path))
    assert (first.error, last.error) == (None, None)
    assert broken.error is not None
    assert broken.error.where == f"{path}:3"
    assert problem in broken.error.problem
    assert broken.error.got == around


PIECES = st.sampled_from(
    [b"{", b"}", b"[", b"]", b'"', b"\\", b":", b",", b"\n", b"1", b"\xff", b"\r", b'"a"', b"null"]
)
BYTES = st.lists(PIECES | st.binary(max_size=3), max_size=20).map(b"".join)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(BYTES, st.sampled_from(["x.jsonl", "x.json", "x.csv", "x.jsonl.gz", "x.jsonl.zst", "x.parquet"]))
def test_any_bytes_are_rows_or_a_data_error(tmp_path: Path, content: bytes, name: str):
    path = write(tmp_path / name, content)
    try:
        rows = list(read(Source(path=path)))
    except DataError as problem:
        assert path in problem.where
    else:
        assert rows and all(row.error is None or row.error.where == row.source for row in rows)


def test_an_object_over_many_lines_gets_the_remedy(tmp_path: Path):
    path = write(tmp_path / "x.jsonl", json.dumps({"text": "a"}, indent=1))
    errors = [row.error for row in read(Source(path=path))]
    assert errors[0] is not None and errors[0].fix.startswith("write one object per line")


def test_a_broken_array_names_its_line(tmp_path: Path):
    path = write(tmp_path / "x.json", '[{"a": 1},\n{"a": 2},\n{"b" 3}]')
    with pytest.raises(DataError, match=r"x\.json:3: broken JSON at column 6"):
        values(path)
    path = write(tmp_path / "y.json", '[{"a": 1},\n')
    with pytest.raises(DataError, match=r"y\.json:\d: broken JSON"):
        values(path)


def test_what_spoils_a_whole_file_is_said_with_the_place(tmp_path: Path):
    content = "".join(f'{{"text": "{i * 7919}"}}\n' for i in range(20_000)).encode()
    for name, packed in (("x.jsonl.gz", gzip.compress(content)), ("x.jsonl.zst", zstandard.compress(content))):
        path = write(tmp_path / name, packed[: len(packed) // 2])
        with pytest.raises(DataError, match=r"cannot be read after line [1-9]"):
            values(path)
        path = write(tmp_path / name, b"no archive")
        with pytest.raises(DataError, match="cannot be read"):
            values(path)
    with pytest.raises(DataError, match=r"c\.csv:2: broken csv"):
        values(write(tmp_path / "c.csv", 'text\n"open\n'))
    with pytest.raises(DataError, match=r"d\.csv:2: not UTF-8 at byte 3"):
        values(write(tmp_path / "d.csv", b"text\nab\xff\n"))
    with pytest.raises(DataError, match=r"e\.csv:1: two columns"):
        values(write(tmp_path / "e.csv", "a,a\n1,2\n"))
    with pytest.raises(DataError, match="cannot be read"):
        values(write(tmp_path / "x.parquet", b"PAR1"))


@pytest.mark.parametrize("name", ["x.jsonl", "x.csv", "x.json", "x.jsonl.gz"])
def test_an_empty_file_is_an_error(tmp_path: Path, name: str):
    empty = gzip.compress(b"\n") if name.endswith(".gz") else b"\n"
    with pytest.raises(DataError, match="the file has no rows"):
        values(write(tmp_path / name, empty))
    with pytest.raises(DataError, match="the file has no rows"):
        values(write(tmp_path / "array.json", "[]"))


def test_a_missing_file_names_what_is_near(tmp_path: Path):
    numbered(tmp_path, 1)
    write(tmp_path / "train_v2.jsonl", "{}")
    with pytest.raises(MissingFileError) as caught:
        values(str(tmp_path / "train.jsonl"))
    assert "did you mean" in caught.value.fix and "train_v2.jsonl" in caught.value.fix
    assert isinstance(caught.value, FileNotFoundError)
    with pytest.raises(MissingFileError, match="hf:owner/name"):
        values("owner/name")
    with pytest.raises(MissingFileError, match="no file fits this pattern"):
        values(str(tmp_path / "*.parquet"))
    with pytest.raises(DataError, match="not a kind of file"):
        values(write(tmp_path / "x.txt", "a"))
    with pytest.raises(DataError, match="no data file in this folder"):
        write(tmp_path / "d/x.txt", "a")
        values(str(tmp_path / "d"))


SLICES = [
    ("train", range(11)),
    ("train[:90%]", range(9)),
    ("train[90%:]", range(9, 11)),
    ("train[2:5]", range(2, 5)),
    ("train[:100]", range(11)),
    ("train[-3:]", range(8, 11)),
    ("train[:-3]", range(8)),
    ("train[-10%:]", range(9, 11)),  # 10% of 11 is rounded away from the start: -1.1 rows is 2 rows from the end
    ("train[:]", range(11)),
]


@pytest.mark.parametrize(("split", "expected"), SLICES)
def test_slices(tmp_path: Path, split: str, expected: range):
    assert [v["i"] for v in values(numbered(tmp_path, 11), split=split)] == list(expected)


def test_a_slice_runs_over_all_files_and_two_shares_never_overlap(tmp_path: Path):
    numbered(tmp_path, 7)
    write(tmp_path / "o.csv", "i\n7\n8\n9\n")
    pq.write_table(pa.Table.from_pylist([{"i": 10}, {"i": 11}, {"i": 12}]), tmp_path / "p.parquet")
    for share in range(1, 100):
        if 13 * share // 100 == 0:
            continue
        first = [int(v["i"]) for v in values(str(tmp_path), split=f"train[:{share}%]")]
        second = [int(v["i"]) for v in values(str(tmp_path), split=f"train[{share}%:]")]
        assert first + second == list(range(13))


@pytest.mark.parametrize("split", ["train[", "train[a:b]", "train[5]", "train[:110%]", "", "train[::2]", "tr ain"])
def test_a_bad_split_is_a_recipe_error(tmp_path: Path, split: str):
    with pytest.raises(RecipeError, match="not a split"):
        values(numbered(tmp_path, 3), split=split)


def test_a_slice_that_selects_nothing_and_a_split_that_files_lack(tmp_path: Path):
    path = numbered(tmp_path, 3)
    for split in ("train[5:9]", "train[2:2]", "train[:1%]", "train[3:]"):
        with pytest.raises(RecipeError, match="selects no rows"):
            values(path, split=split)
    with pytest.raises(RecipeError, match="files have the one split train"):
        values(path, split="test")
    assert parse_split("test[10:]") == ("test", Slice("10", None))
    assert bounds(Slice(None, "5"), None, "") == (0, 5)


def test_digests_follow_the_bytes(tmp_path: Path):
    path = numbered(tmp_path, 3)
    before = digests(Source(path=path))
    assert before == digests(Source(path=path, weight=2.0))
    numbered(tmp_path, 4)
    assert digests(Source(path=path)) != before


class FakeDataset(list):
    _fingerprint = "f1"

    def select(self, rows: range) -> FakeDataset:
        return FakeDataset(self[i] for i in rows)


def fake_hub(monkeypatch: pytest.MonkeyPatch, n: int = 10) -> list[dict[str, Any]]:
    """A `datasets` module whose load_dataset notes how it was called."""
    calls: list[dict[str, Any]] = []

    def load_dataset(path: str, name: str | None, **options: Any) -> Any:
        calls.append({"path": path, "name": name, **options})
        rows = FakeDataset({"i": i, "empty": None} for i in range(n))
        return iter(rows) if options["streaming"] else rows

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return calls


def test_hub_rows(monkeypatch: pytest.MonkeyPatch):
    calls = fake_hub(monkeypatch)
    rows = list(read(Source(path="hf:a/b", name="main", revision="v1", split="test[2:4]")))
    assert [(row.value, row.source) for row in rows] == [({"i": 2}, "hf:a/b:row 3"), ({"i": 3}, "hf:a/b:row 4")]
    assert calls == [{"path": "a/b", "name": "main", "split": "test", "revision": "v1", "streaming": False}]
    assert [v["i"] for v in values("hf:a/b", split="train[50%:]")] == [5, 6, 7, 8, 9]


def test_hub_streams_by_row_numbers_only(monkeypatch: pytest.MonkeyPatch):
    fake_hub(monkeypatch)
    assert [v["i"] for v in values("hf:a/b", split="train[2:4]", streaming=True)] == [2, 3]
    assert len(values("hf:a/b", streaming=True)) == 10
    with pytest.raises(RecipeError, match="a stream does not know its length"):
        values("hf:a/b", split="train[:90%]", streaming=True)


def test_hub_content_is_told_by_commit(monkeypatch: pytest.MonkeyPatch):
    fake_hub(monkeypatch)
    commit = "0123456789" * 4
    assert digests(Source(path="hf:a/b", revision=commit)) == [f"hf:a/b@{commit}:None"]
    assert digests(Source(path="hf:a/b")) == ["f1"]
    with pytest.raises(DataError, match="the commit of this stream is not known"):
        digests(Source(path="hf:a/b", streaming=True))

    class Api:
        def dataset_info(self, name: str, revision: str | None) -> Any:
            if name == "a/offline":
                raise ConnectionError("no network")
            return types.SimpleNamespace(sha=commit)

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(HfApi=Api))
    said: list[str] = []
    assert hub.pinned(Source(path="hf:a/b"), said.append).revision == commit
    assert hub.pinned(Source(path="x.jsonl"), said.append).revision is None
    assert said == []
    assert hub.pinned(Source(path="hf:a/offline"), said.append).revision is None
    assert len(said) == 1 and "no network" in said[0]


def test_missing_packages_say_how_to_install_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name in ("datasets", "pyarrow.parquet", "zstandard"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(FtError, match=r"pip install 'ft\[hub\]'"):
        values("hf:a/b")
    with pytest.raises(FtError, match=r"pip install 'ft\[data\]'"):
        values(write(tmp_path / "x.parquet", b""))
    with pytest.raises(FtError, match=r"pip install 'ft\[data\]'"):
        values(write(tmp_path / "x.jsonl.zst", b""))
