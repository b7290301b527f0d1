"""Rows as a person reads them: marks that survive plain text, counts that can be checked by hand, warnings."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attrs import evolve
from rich.console import Console

from ft.data.dataset import Prepared
from ft.data.tokenizer import byte_tokenizer
from ft.errors import DataError
from ft.methods import SFT
from ft.recipe import Batching, Data, Model, Recipe, Save
from ft.train.inspect import double_bos, inspect, marked, oddities, packing, prepared, stretches, visible
from ft.types import Example


def answers(of: Recipe, tokenizer: Any) -> Prepared:
    found = prepared(of, of.data.train, tokenizer, lambda line: None)
    assert isinstance(found, Prepared)
    return found


def recipe(folder: Path, rows: list[dict[str, Any]], *, batch: Batching | None = None, **data: Any) -> Recipe:
    """A rehearsal of a model that is not at hand, on ``rows``: bytes are its tokens."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Recipe(
        model=Model(id="nobody/nothing", family="llama", tiny=True),
        data=Data(**{"train": str(path), "shuffle": False, "cache": None, **data}),
        method=SFT(),
        batch=batch or Batching(examples=2, tokens=64),
        save=Save(dir=folder / "run"),
        steps=3,
    )


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))


def chat(user: str, assistant: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]}


def shown(of: Recipe, **options: Any) -> str:
    out = StringIO()
    console = Console(file=out, width=200, force_terminal=False)
    inspect(of, console, **options)
    return out.getvalue()


def example(tokenizer: Any, *parts: tuple[str, bool]) -> Example:
    """Text whose parts are trained or not; a byte is a token."""
    tokens = [tokenizer.encode(text, add_special_tokens=False) for text, _ in parts]
    flags = [np.full(len(ids), trained) for ids, (_, trained) in zip(tokens, parts, strict=True)]
    return Example(tokens_L=np.concatenate(tokens).astype(np.int32), mask_L=np.concatenate(flags), source="a.jsonl:1")


def test_trained_tokens_are_marked_without_colours():
    tokenizer = byte_tokenizer()
    row = example(tokenizer, ("<|im_start|>user\n2 + 2<|im_end|>", False), ("4<|im_end|>", True), ("\n", False))
    assert marked(row, tokenizer).plain == "<|im_start|>user↵\n2 + 2<|im_end|>⟦4<|im_end|>⟧↵\n"


def test_a_space_before_a_special_token_can_be_seen():
    tokenizer = byte_tokenizer()
    row = example(tokenizer, ("<|im_start|> a b ", False), ("c <|im_end|>", True))
    assert marked(row, tokenizer).plain == "<|im_start|>·a b·⟦c·<|im_end|>⟧"


def test_trained_and_special_tokens_are_coloured():
    tokenizer = byte_tokenizer()
    text = marked(example(tokenizer, ("a", False), ("b<|im_end|>", True)), tokenizer)
    styles = {(text.plain[span.start : span.end], str(span.style)) for span in text.spans}
    assert {("b", "bold green"), ("<|im_end|>", "cyan"), ("a", "dim")} <= styles


def test_a_first_token_is_never_shown_as_trained():
    """Nothing predicts it, whatever its mask says."""
    tokenizer = byte_tokenizer()
    assert list(stretches(example(tokenizer, ("abc", True)), tokenizer)) == [("a", False), ("bc", True)]


def test_a_stretch_keeps_the_space_that_a_decoder_drops_at_the_start_of_a_text():
    """Metaspace decoders (Llama 2) drop it; decoding "▁b" alone would give "b"."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"▁a": 0, "▁b": 1, "<unk>": 2}, unk_token="<unk>"))
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)
    row = Example(tokens_L=np.array([0, 1, 0], np.int32), mask_L=np.array([False, True, False]))
    assert tokenizer.decode([1]) == "b"
    assert list(stretches(row, tokenizer)) == [("a", False), (" b", True), (" a", False)]


def test_a_character_split_between_stretches_is_shown_in_both():
    """Bytes of "é" on either side of a boundary: neither part is text, and nothing else gets lost."""
    tokenizer = byte_tokenizer()
    row = Example(tokens_L=np.array([97, 0xC3, 0xA9, 98], np.int32), mask_L=np.array([0, 0, 1, 1], bool))
    assert list(stretches(row, tokenizer)) == [("a�", False), ("�b", True)]


@pytest.mark.parametrize(
    ("piece", "seen"),
    [
        ("  a b  ", "··a b··"),
        ("a \n  b", "a·↵\n  b"),
        ("a\tb", "a⇥b"),
        ("\x1b[31mred\r", "␛[31mred␍"),
        ("   ", "···"),
    ],
)
def test_whitespace_and_control_characters_can_be_seen(piece: str, seen: str):
    assert visible(piece) == seen


def test_a_long_stretch_says_what_it_leaves_out():
    assert visible("a" * 600 + "b" * 34 + "c" * 600) == "a" * 600 + " [... 34 characters not shown ...] " + "c" * 600


def test_everything_is_printed(tmp_path: Path):
    rows = [chat("hi", "yes"), chat("you", "no"), chat("third", "row")]
    out = shown(recipe(tmp_path, rows), rows=1)
    assert "nobody/nothing is not at hand" in out
    assert f"{tmp_path}/rows.jsonl:1  26 tokens, 4 trained (15%)" in out  # 1+5+2+1+1, 1+10+3+1+1; "yes" and its end
    assert "⟦yes<|im_end|>⟧↵" in out and "⟦no" not in out, "one row was asked for"
    assert "rows: 3 read, 3 kept" in out and "rows with EOS: 3, trained in 3" in out
    assert "steps: 3; of the first 3, each has 2 rows" in out
    assert "warning" not in out
    assert not (tmp_path / "run").exists()


def test_a_terminal_without_unicode_gets_plain_marks(tmp_path: Path):
    raw = (tmp_path / "out").open("w+", encoding="ascii")
    inspect(recipe(tmp_path, [chat("é", "yes ")]), Console(file=raw, width=200))
    raw.seek(0)
    assert "[[yes_<|im_end|>]]\\n" in raw.read()


def test_packing_counts_positions(tmp_path: Path):
    """Rows of 11, 5, 5, 5 tokens take 10, 4, 4, 4 positions; steps of two rows, micro-batches of 10."""
    rows = [{"text": "x" * (n - 1)} for n in (11, 5, 5, 5)]
    of = evolve(recipe(tmp_path, rows, batch=Batching(examples=2, tokens=10)), steps=2)
    tokenizer = byte_tokenizer()
    found = packing(of, answers(of, tokenizer), tokenizer)
    assert (found.tried, found.rows, found.inputs, found.batches, found.padded) == (2, 4, 22, 3, 22)
    wide = evolve(of, batch=Batching(examples=2, tokens=14))
    found = packing(wide, answers(of, tokenizer), tokenizer)
    assert (found.batches, found.padded) == (2, 10 * 2 + 4 * 2), "10 beside 4 is padded to 10 and 10"
    assert "79% full (batch.tokens=14)" in found.lines()[1]  # 22 of 28
    assert "21% would be" in found.lines()[1]  # 6 of 28


def test_a_row_longer_than_a_micro_batch_is_an_error(tmp_path: Path):
    with pytest.raises(DataError, match="longer than a micro-batch"):
        shown(recipe(tmp_path, [{"text": "x" * 100}]))


# Warnings -------------------------------------------------------------------------------------------------------------


def odd(of: Recipe, tokenizer: Any = None) -> list[str]:
    tokenizer = tokenizer or byte_tokenizer()
    return oddities(answers(of, tokenizer), tokenizer, of)


def test_nothing_odd_is_not_warned_of(tmp_path: Path):
    assert odd(recipe(tmp_path, [chat("hi", "yes")])) == []


def test_all_tokens_trained(tmp_path: Path):
    (line,) = odd(recipe(tmp_path, [{"text": "abc"}]))
    assert line.startswith("every token of every row is trained")
    assert odd(recipe(tmp_path, [{"text": "abc"}], mask="all")) == [], "asked for"


def test_eos_never_trained(tmp_path: Path):
    (line,) = odd(recipe(tmp_path, [chat("hi", "yes")], end_of_turn=False))
    assert "'<|im_end|>' is trained in no row: the model does not learn to stop" in line


def test_many_dropped_rows(tmp_path: Path):
    rows = [chat("hi", "yes")] * 8 + [chat("x" * 100, "y")] * 2
    (line,) = odd(recipe(tmp_path, rows, max_tokens=40))
    assert line.startswith("2 of 10 rows (20%) are dropped")
    assert odd(recipe(tmp_path, rows[:-1] + rows[:2], max_tokens=40)) == [], "1 of 11"


def test_two_bos_side_by_side_within_a_row(tmp_path: Path):
    """Not two rows of which one ends and the next begins with it, and not at the same place in another row."""
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = "<|im_start|>"
    bos = tokenizer.bos_token_id
    rows = [[bos, 1, bos], [bos, 2, 3], [4, bos, bos, bos], [5, bos, 6]]
    of = recipe(tmp_path, [{"input_ids": ids, "labels": ids} for ids in rows])
    data = answers(of, tokenizer)
    assert double_bos(data, tokenizer) == 1
    assert any("1 rows hold '<|im_start|>' twice in a row" in line for line in oddities(data, tokenizer, of))


def test_malformed_rows_are_not_put_into_the_run_folder(tmp_path: Path):
    rows = [chat("hi", "yes"), {"messages": "no"}]
    out = shown(recipe(tmp_path, rows, on_bad_row="quarantine", bad_rows=1.0))
    assert "2 read, 1 kept; 1 malformed" in out and not (tmp_path / "run").exists()
