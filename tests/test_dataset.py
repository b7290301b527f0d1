"""Mixtures, drawing by step, fitting to max_tokens, bad rows, and the cache of tokenised rows."""

from __future__ import annotations

import errno
import json
import multiprocessing
import subprocess
import sys
import time
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ft.data import cache, dataset
from ft.data.build import Built
from ft.data.dataset import Prepared, prepare
from ft.data.mixture import Mixture, order, permutation, rows_of_step
from ft.data.pack import pack, shard
from ft.data.report import Report
from ft.data.tokenizer import byte_tokenizer
from ft.errors import DataError, MissingFileError, RecipeError
from ft.recipe.parts import Data, Source

tokenizer: Any = lru_cache(byte_tokenizer)
SILENT: Any = lambda said: None  # noqa: E731


def lines(path: Path, rows: list[Any]) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def texts(folder: Path, name: str, n: int, body: str = "row") -> str:
    return lines(folder / name, [{"text": f"{body} {i}"} for i in range(n)])


def chat(user: str, assistant: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]}


def ready(
    train: Any, *, quarantine: Path | None = None, announce: Any = SILENT, tok: Any = None, **options: Any
) -> Prepared:
    data = Data(train=train, **{"cache": None, **options})
    return prepare(data.train, data, tok or tokenizer(), quarantine=quarantine, announce=announce)


def said(example: Any) -> str:
    return bytes(example.tokens_L[example.tokens_L < 256].astype(np.uint8)).decode()


def same(a: Prepared, b: Prepared) -> bool:
    return len(a) == len(b) and all(
        x.tokens_L.tobytes() == y.tokens_L.tobytes()
        and x.mask_L.tobytes() == y.mask_L.tobytes()
        and x.source == y.source
        for x, y in zip(a, b, strict=True)
    )


# --- drawing ---------------------------------------------------------------------------------------------------------


def test_permutations_are_permutations_and_stay_what_they_were():
    for n in (0, 1, 2, 3, 64, 1000):
        assert sorted(permutation(n, (0, 0)).tolist()) == list(range(n))
    # Pinned: a run must resume in the same order after any update.
    assert permutation(8, (0, 0)).tolist() == [3, 2, 1, 6, 0, 7, 4, 5]
    assert permutation(8, (7, 1)).tolist() == [1, 3, 2, 7, 4, 5, 0, 6]


def test_permutations_are_even():
    """Each of the 6 orders of 3 rows has probability 1/6: 6000 draws give 1000 each, within 5 deviations (144)."""
    seen = Counter(tuple(permutation(3, (seed, 0)).tolist()) for seed in range(6000))
    assert len(seen) == 6
    assert max(abs(n - 1000) for n in seen.values()) < 5 * np.sqrt(6000 * 1 / 6 * 5 / 6)


def test_a_mixture_counts_whole_passes_and_draws_the_rest():
    mixture = Mixture((10, 4, 3), (0.5, 2.0, 1.5), True)
    assert mixture.per_epoch() == (5, 8, 5)  # 1.5 * 3 = 4.5 is rounded up
    epochs = [Counter(order(mixture, 0, epoch).tolist()) for epoch in range(40)]
    for epoch in epochs:
        assert sum(epoch[i] for i in range(10)) == 5 and max(epoch[i] for i in range(10)) == 1
        assert [epoch[i] for i in range(10, 14)] == [2, 2, 2, 2]
        assert sorted(epoch[i] for i in range(14, 17)) == [1, 2, 2]
    halves = {frozenset(i for i in range(10) if epoch[i]) for epoch in epochs}
    assert len(halves) > 20, "each epoch draws anew"
    assert all(sum(epoch[i] for epoch in epochs) > 5 for i in range(10)), "every row has its turn"


def test_steps_run_over_the_borders_of_epochs_without_gaps_or_repeats():
    mixture = Mixture((7, 5), (1.0, 1.0), True)
    for n in (1, 5, 12, 29):
        flat = [i for step in range(60) for i in rows_of_step(mixture, step, n, 3)]
        for begin in range(0, len(flat) - 12, 12):
            assert sorted(flat[begin : begin + 12]) == list(range(12))
    assert rows_of_step(mixture, 0, 0, 3) == []


def test_draws_are_a_function_of_seed_and_step_alone():
    mixture = Mixture((50,), (1.0,), True)
    straight = [rows_of_step(mixture, step, 8, 1) for step in range(30)]
    order.cache_clear()
    assert [rows_of_step(mixture, step, 8, 1) for step in range(11, 30)] == straight[11:], "resumed inside an epoch"
    assert [rows_of_step(mixture, step, 8, 1) for step in reversed(range(30))] == straight[::-1]
    assert [rows_of_step(mixture, step, 8, 2) for step in range(30)] != straight
    assert order(mixture, 1, 0).tolist() != order(mixture, 1, 1).tolist()


def test_without_shuffling_rows_keep_their_order():
    mixture = Mixture((3, 4), (2.0, 0.5), False)
    for epoch in range(5):
        rows = order(mixture, 9, epoch).tolist()
        assert rows[:6] == [0, 1, 2, 0, 1, 2]
        assert rows[6:] == sorted(set(rows[6:])) and len(rows) == 8


def test_ranks_share_out_one_draw(tmp_path: Path):
    """Whatever the number of ranks, together they train the rows of the one list that each of them draws."""
    data = ready(texts(tmp_path, "a.jsonl", 20))
    step = sorted(example.source for example in data.draw(3, 8, 0))
    for world in (1, 2, 3, 8):
        packs = pack(data.draw(3, 8, 0), tokens=16)
        shares = [shard(packs, rank=rank, world=world) for rank in range(world)]
        assert sorted(example.source for share in shares for part in share for example in part) == step
    assert len(set(step)) == 8


# --- rows to examples ------------------------------------------------------------------------------------------------


def test_examples_hold_tokens_mask_and_source(tmp_path: Path):
    path = lines(tmp_path / "a.jsonl", [chat("Hi", "Yo"), "", {"prompt": "1+1=", "completion": "2"}])
    data = ready(path)
    assert [example.source for example in data] == [f"{path}:1", f"{path}:3"]
    assert said(data[0]) == "user\nHi\nassistant\nYo\n"
    trained = data[0].tokens_L[data[0].mask_L]
    assert trained.tolist() == [ord("Y"), ord("o"), tokenizer().eos_token_id]
    assert data[1].mask_L.tolist() == [False] * 4 + [True, True]
    assert data[-1].source == data[1].source
    with pytest.raises(IndexError):
        data[2]
    assert (data.report.read, data.report.kept, data.report.bad) == (2, 2, 0)
    assert data.report.tokens == sum(map(len, data)) and data.report.trained == 5
    assert (data.report.bos, data.report.eos, data.report.eos_trained) == (None, 2, 2)


def test_the_first_token_is_never_trained(tmp_path: Path):
    data = ready(lines(tmp_path / "a.jsonl", [{"input_ids": [1, 2, 3]}]))
    assert data[0].mask_L.tolist() == [False, True, True]
    assert data.report.trained == 2


def test_overlong_rows_are_dropped_cut_or_an_error(tmp_path: Path):
    rows = [{"input_ids": [1] * n} for n in (3, 4, 5, 6)]
    path = lines(tmp_path / "a.jsonl", rows)
    dropped = ready(path, max_tokens=4, overlong="drop")
    assert [len(example) for example in dropped] == [3, 4]
    assert (dropped.report.overlong, dropped.report.truncated) == (2, 0)
    cut = ready(path, max_tokens=4, overlong="truncate")
    assert [len(example) for example in cut] == [3, 4, 4, 4]
    assert (cut.report.overlong, cut.report.truncated, cut.report.kept) == (0, 2, 4)
    with pytest.raises(DataError) as caught:
        ready(path, max_tokens=4, overlong="raise", on_bad_row="skip", bad_rows=1.0)
    assert caught.value.where == f"{path}:3"
    assert (caught.value.expected, caught.value.got) == ("at most 4 tokens", "5 tokens")


def test_rows_without_a_trained_token_never_train_and_are_counted(tmp_path: Path):
    rows = [
        {"input_ids": [1, 2, 3, 4, 5, 6], "labels": [-100, -100, -100, -100, 5, 6]},  # its labels are cut off
        {"input_ids": [1, 2], "mask": [1, 0]},  # only the first token, which nothing predicts
        {"input_ids": [1]},
        {"input_ids": [1, 2]},
    ]
    data = ready(lines(tmp_path / "a.jsonl", rows), max_tokens=4, overlong="truncate")
    report = data.report
    assert (report.read, report.kept, report.unlabelled, report.short, report.truncated) == (4, 1, 2, 1, 0)
    assert len(data) == 1
    assert any("2 without a trained token" in line for line in report.lines())


def test_nothing_left_is_an_error_that_lists_the_counts(tmp_path: Path):
    good = texts(tmp_path, "good.jsonl", 3)
    path = lines(tmp_path / "a.jsonl", [{"input_ids": [1] * 9}, {"input_ids": [1]}])
    with pytest.raises(DataError) as caught:
        ready((good, path), max_tokens=8)
    assert path in caught.value.where and good not in caught.value.where
    assert "1 too long, dropped; 1 shorter than two tokens" in caught.value.got


def test_report_lines_of_known_counts():
    report = Report(read=12, kept=7, bad=1, overlong=2, unlabelled=1, short=1, tokens=1000, trained=250, eos=7,
                    eos_trained=6, longest=300, lengths=(0, 0, 0, 6, 0, 0, 0, 0, 0, 1),
                    reasons=("a.jsonl:3: x\n  got: y",), sources=(("a.jsonl", 5), ("b.jsonl", 2)))  # fmt: skip
    assert report.lines() == [
        "rows: 12 read, 7 kept; 1 malformed; 2 too long, dropped; 1 without a trained token, dropped; "
        "1 shorter than two tokens, dropped",
        "  a.jsonl: 5 rows",
        "  b.jsonl: 2 rows",
        "tokens: 1,000, 250 of them trained (25.0%)",
        "rows with EOS: 7, trained in 6",
        "lengths (longest 300):",
        "  <=       8 tokens          6  ##############################",
        "  <=     512 tokens          1  #####",
        "malformed: a.jsonl:3: x",
    ]


def test_of_prompts_no_share_of_trained_tokens_is_told():
    assert Report(read=2, kept=2, tokens=1000, longest=0).lines() == ["rows: 2 read, 2 kept", "tokens: 1,000"]


def test_histogram_bins_are_powers_of_two(tmp_path: Path):
    path = lines(tmp_path / "a.jsonl", [{"input_ids": [1] * n} for n in (2, 3, 4, 5, 8, 9, 64, 65)])
    assert ready(path).report.lengths == (0, 1, 2, 2, 1, 0, 1, 1)
    assert ready(path).report.longest == 65


def test_mixtures_of_sources_and_weights(tmp_path: Path):
    a, b = texts(tmp_path, "a.jsonl", 8, "a"), lines(tmp_path / "b.csv", ["text", "b", "c"])
    data = ready((Source(path=a, weight=0.5), Source(path=b, weight=3.0)))
    assert len(data) == 10 and data.per_epoch == 4 + 6
    for epoch in range(4):
        drawn = Counter(example.source for example in data.draw(epoch, 10, 0))
        assert sum(n for source, n in drawn.items() if source.startswith(a)) == 4
        assert (drawn[f"{b}:2"], drawn[f"{b}:3"]) == (3, 3)
    assert data.report.sources == ((a, 8), (b, 2))
    with pytest.raises(RecipeError, match="the weight leaves no row"):
        ready(Source(path=a, weight=0.01))


def test_one_file_in_two_slices(tmp_path: Path):
    path = texts(tmp_path, "a.jsonl", 10)
    data = ready((Source(path=path, split="train[:3]"), Source(path=path, split="train[7:]", weight=2.0)))
    assert [example.source for example in data] == [f"{path}:{i}" for i in (1, 2, 3, 8, 9, 10)]
    assert data.per_epoch == 9


# --- bad rows --------------------------------------------------------------------------------------------------------

BAD = ['{"text": "a"', {"texts": "b"}, {"input_ids": [999]}]


def test_bad_rows_raise_with_their_place(tmp_path: Path):
    for bad, problem in zip(BAD, ("broken JSON", "no known format", "a token that the tokenizer does not have"),
                            strict=True):  # fmt: skip
        with pytest.raises(DataError, match=f":2.*{problem}"):
            ready(lines(tmp_path / "a.jsonl", [{"text": "good"}, bad]))


def test_skipped_rows_are_counted_and_said(tmp_path: Path):
    path = lines(tmp_path / "a.jsonl", [*BAD, *({"text": f"good {i}"} for i in range(7))])
    notes: list[str] = []
    data = ready(path, on_bad_row="skip", bad_rows=0.3, announce=notes.append)
    assert (data.report.read, data.report.bad, data.report.kept) == (10, 3, 7)
    assert len(notes) == 1 and "3 of 10 rows are malformed" in notes[0] and f"{path}:1" in notes[0]
    with pytest.raises(DataError) as caught:
        ready(path, on_bad_row="skip", bad_rows=0.29)
    assert "3 of 10 rows (30.00%)" in caught.value.got and f"{path}:1" in caught.value.got


def test_quarantined_rows_are_kept_with_reason_and_place(tmp_path: Path):
    path = lines(tmp_path / "a.jsonl", [*BAD, *({"text": f"good {i}"} for i in range(7))])
    options: dict[str, Any] = {"on_bad_row": "quarantine", "bad_rows": 0.3, "cache": tmp_path / "cache"}
    for run in ("first", "cached"):
        file = tmp_path / run / "bad.jsonl"
        ready(path, quarantine=file, **options)
        kept = [json.loads(line) for line in file.read_text().splitlines()]
        assert [row["source"] for row in kept] == [f"{path}:{i}" for i in (1, 2, 3)]
        assert [row["row"] for row in kept] == BAD
        assert "no known format" in kept[1]["reason"]
    with pytest.raises(RecipeError, match="nowhere to put"):
        ready(path, **options)


def test_rows_that_the_template_refuses_are_bad_rows_and_only_they(tmp_path: Path):
    tok = byte_tokenizer()
    refuse = "{%- if messages[0].content == 'no' %}{{- raise_exception('refused') }}{%- endif %}"
    tok.chat_template = refuse + str(tok.chat_template)
    rows = [chat("no" if i in (3, 17, 18) else f"q{i}", "a") for i in range(20)]
    path = lines(tmp_path / "a.jsonl", rows)
    data = ready(path, tok=tok, on_bad_row="skip", bad_rows=0.5)
    assert [example.source for example in data] == [f"{path}:{i + 1}" for i in range(20) if i not in (3, 17, 18)]
    assert data.report.bad == 3 and "refused" in data.report.reasons[0]
    with pytest.raises(DataError, match=r"a\.jsonl:4"):
        ready(path, tok=tok)


def test_a_file_of_bad_rows_stops_early(tmp_path: Path):
    path = lines(tmp_path / "a.jsonl", [{"wrong": i} for i in range(500)])
    with pytest.raises(DataError, match="100 of 100 rows"):
        ready(path, on_bad_row="skip")


def test_missing_files_and_data_errors_pass_through(tmp_path: Path):
    with pytest.raises(MissingFileError):
        ready(str(tmp_path / "none.jsonl"), cache=tmp_path / "cache")
    with pytest.raises(RecipeError, match="no source of rows"):
        ready(())


# --- cache -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each time that rows were really tokenised."""
    done: list[int] = []
    real = dataset.build

    def counted(*args: Any) -> Built:
        done.append(1)
        return real(*args)

    monkeypatch.setattr(dataset, "build", counted)
    return done


def test_a_hit_is_bitwise_the_same_and_builds_nothing(tmp_path: Path, builds: list[int]):
    path = texts(tmp_path, "a.jsonl", 50)
    memory = ready(path)
    fresh = ready(path, cache=tmp_path / "cache")
    hit = ready(path, cache=tmp_path / "cache")
    assert len(builds) == 2
    assert same(memory, fresh) and same(fresh, hit)
    assert memory.fingerprint == fresh.fingerprint == hit.fingerprint
    assert memory.report == hit.report
    assert [e.source for e in memory.draw(2, 7, 5)] == [e.source for e in hit.draw(2, 7, 5)]
    assert not hit.arrays.tokens_T.flags.owndata, "mapped, not copied"
    assert hit.arrays.tokens_T.dtype == np.int32 and hit.arrays.mask_T.dtype == np.bool_


def test_what_changes_an_example_changes_the_entry_and_the_fingerprint(tmp_path: Path, builds: list[int]):
    path = texts(tmp_path, "a.jsonl", 5)
    options: Any = {"cache": tmp_path / "cache"}
    seen: list[str] = [ready(path, **options).fingerprint]
    other = byte_tokenizer()
    other.chat_template = str(other.chat_template) + " "
    seen.append(ready(path, tok=other, **options).fingerprint)
    spare = byte_tokenizer()
    spare.add_special_tokens({"bos_token": "<|begin|>"})
    seen.append(ready(path, tok=spare, **options).fingerprint)
    changes: Any = ({"max_tokens": 99}, {"mask": "all"}, {"append_eos": False}, {"end_of_turn": False},
                    {"overlong": "truncate"}, {"thinking": True})  # fmt: skip
    for change in changes:
        seen.append(ready(path, **options, **change).fingerprint)
    seen.append(ready(Source(path=path, split="train[:4]"), **options).fingerprint)
    Path(path).write_text(Path(path).read_text().replace("row 3", "row 4"))
    seen.append(ready(path, **options).fingerprint)
    assert len(set(seen)) == len(seen) == len(builds) == 11


def test_what_changes_no_token_builds_nothing(tmp_path: Path, builds: list[int]):
    path = texts(tmp_path, "a.jsonl", 4)
    options: dict[str, Any] = {"cache": tmp_path / "cache"}
    first = ready(path, **options)
    weighted = ready(Source(path=path, weight=2.0), **options)
    assert weighted.fingerprint != first.fingerprint, "another order of rows"
    assert ready(path, shuffle=False, **options).fingerprint != first.fingerprint
    padded: Any = byte_tokenizer()
    padded.backend_tokenizer.enable_padding(length=8)
    assert ready(path, tok=padded, **options).fingerprint == first.fingerprint
    moved = str(Path(path).rename(tmp_path / "moved.jsonl"))
    renamed = ready(moved, **options)
    assert renamed.fingerprint == first.fingerprint and renamed[3].source == f"{moved}:4"
    assert len(builds) == 1


def damage(kind: str, entry: Path) -> None:
    rows = entry / "rows.safetensors"
    if kind == "cut":
        rows.write_bytes(rows.read_bytes()[:-1])
    elif kind == "flipped":
        content = bytearray(rows.read_bytes())
        content[-3] ^= 1
        rows.write_bytes(content)
    elif kind == "gone":
        rows.unlink()
    elif kind == "manifest":
        (entry / "manifest.json").write_text("{")
    else:
        (entry / "manifest.json").write_text('{"files": {}, "report": {"unknown": 1}}')


@pytest.mark.parametrize("kind", ["cut", "flipped", "gone", "manifest", "report"])
def test_a_damaged_entry_is_built_anew_and_said(tmp_path: Path, builds: list[int], kind: str):
    path, notes = texts(tmp_path, "a.jsonl", 5), []
    first = ready(path, cache=tmp_path / "cache")
    memory = [example.tokens_L.copy() for example in first]
    (entry,) = (p for p in (tmp_path / "cache").iterdir() if p.is_dir())
    del first
    damage(kind, entry)
    again = ready(path, cache=tmp_path / "cache", announce=notes.append)
    assert len(builds) == 2
    assert any("damaged" in note for note in notes)
    for example, tokens in zip(again, memory, strict=True):
        np.testing.assert_array_equal(example.tokens_L, tokens)
    ready(path, cache=tmp_path / "cache", announce=pytest.fail)
    assert len(builds) == 2


def test_where_nothing_can_be_kept_the_rows_stay_in_memory_and_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path, notes = texts(tmp_path, "a.jsonl", 5), []
    (tmp_path / "file").write_text("")
    assert len(ready(path, cache=tmp_path / "file" / "cache", announce=notes.append)) == 5

    def full(folder: Path, built: Built) -> None:
        folder.mkdir()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache, "save", full)
    assert len(ready(path, cache=tmp_path / "cache", announce=notes.append)) == 5
    assert len(notes) == 2 and "No space left on device" in notes[1]
    assert [p.suffix for p in (tmp_path / "cache").iterdir()] == [".lock"], "nothing half-written is left"


def test_what_a_dead_builder_left_is_removed(tmp_path: Path):
    path = texts(tmp_path, "a.jsonl", 5)
    data = Data(train=path)
    left = tmp_path / "cache" / f"{cache.key(data.train, data, tokenizer())}.1.tmp"
    left.mkdir(parents=True)
    (left / "rows.safetensors").write_text("half")
    ready(path, cache=tmp_path / "cache")
    assert not left.exists()


def test_a_stricter_limit_holds_for_kept_rows_too(tmp_path: Path):
    path = lines(tmp_path / "a.jsonl", [*BAD, *({"text": f"good {i}"} for i in range(7))])
    options: dict[str, Any] = {"on_bad_row": "skip", "cache": tmp_path / "cache"}
    ready(path, bad_rows=0.5, **options)
    with pytest.raises(DataError, match="too many malformed rows"):
        ready(path, bad_rows=0.1, **options)


def _one_of_many(folder: Path, results: Any) -> None:
    def build() -> Built:
        with (folder / "builds").open("a") as log:
            log.write("x")
        time.sleep(0.3)
        data = Data(train=str(folder / "a.jsonl"))
        return dataset.build(data.train, data, tokenizer(), SILENT)

    notes: list[str] = []
    built = cache.get(folder / "cache", "key", build, notes.append)
    results.put((built.arrays.tokens_T.tobytes(), len(notes)))


def test_of_many_processes_one_builds_and_the_others_wait_and_read(tmp_path: Path):
    texts(tmp_path, "a.jsonl", 5)
    tokenizer()
    context = multiprocessing.get_context("fork")
    results: Any = context.Queue()
    workers = [context.Process(target=_one_of_many, args=(tmp_path, results)) for _ in range(3)]
    for worker in workers:
        worker.start()
    outcomes = [results.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join(60)
    assert (tmp_path / "builds").read_text() == "x"
    assert len({tokens for tokens, _ in outcomes}) == 1 and len(outcomes[0][0]) > 0
    assert all(worker.exitcode == 0 for worker in workers)


def test_preparing_data_imports_no_torch():
    code = "import sys, ft.data.dataset; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
