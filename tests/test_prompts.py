"""Prompts: what a row may look like, what is dropped or refused, and which a step sees."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ft import Data
from ft.data.prompts import Prompts, prepare
from ft.data.tokenizer import byte_tokenizer
from ft.errors import DataError

TOKENIZER: Any = byte_tokenizer()


def prepared(folder: Path, rows: list[Any], **options: Any) -> Prompts:
    path = folder / "rows.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    data = Data(train=str(path), **options)
    return prepare(data.train, data, TOKENIZER, announce=lambda _: None)


def said(prompt: Any) -> str:
    return TOKENIZER.decode(prompt.tokens_L.tolist())


def test_a_prompt_is_a_string_or_messages_and_ends_where_the_answer_begins(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    apart = {"prompt": "hi", "system": "be brief"}
    found = prepared(tmp_path, [{"prompt": "hi", "answer": 3}, {"prompt": messages}, {"messages": messages}, apart])
    texts = [said(found.row(i)[0]) for i in range(4)]
    assert texts[0] == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert texts[1] == texts[2] == texts[3] == "<|im_start|>system\nbe brief<|im_end|>\n" + texts[0]
    assert not any(example.mask_L.any() for example in found.examples)


def test_other_columns_go_to_the_rewards_as_they_are(tmp_path: Path) -> None:
    found = prepared(tmp_path, [{"prompt": "hi", "answer": 3, "entry": {"a": [1]}}])
    columns = found.row(0)[0].columns
    assert columns == {"answer": 3, "entry": {"a": [1]}, "prompt": [{"role": "user", "content": "hi"}]}


def test_a_prompt_without_room_for_an_answer_is_dropped_or_refused_and_never_cut(tmp_path: Path) -> None:
    rows = [{"prompt": "x" * 500}, {"prompt": "hi"}]
    for overlong in ("drop", "truncate"):
        found = prepared(tmp_path, rows, max_tokens=100, overlong=overlong)
        assert (found.rows, found.report.overlong) == (1, 1)
    with pytest.raises(DataError, match=r"rows.jsonl:1.*no room"):
        prepared(tmp_path, rows, max_tokens=100, overlong="raise")
    with pytest.raises(DataError, match="no prompt is left"):
        prepared(tmp_path, rows[:1], max_tokens=100)


@pytest.mark.parametrize("row, why", [
    ({"text": "hi"}, "no prompt"),
    ({"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "ends with an answer"),
    ({"prompt": 3}, "a string, or a list of messages"),
    ({"prompt": ""}, "prompt"),
    ([1], "object"),
    ("{", "JSON"),
], ids=["none", "answered", "number", "empty", "array", "broken"])  # fmt: skip
def test_a_malformed_row_is_named_with_its_line(tmp_path: Path, row: Any, why: str) -> None:
    with pytest.raises(DataError) as caught:
        prepared(tmp_path, [{"prompt": "hi"}, row])
    assert "rows.jsonl:2" in str(caught.value) and why in str(caught.value)
    kept = prepared(tmp_path, [{"prompt": "hi"}, row], on_bad_row="skip", bad_rows=0.9)
    assert (kept.rows, kept.report.bad) == (1, 1)


def test_a_step_s_prompts_are_a_function_of_seed_and_step_each_a_group_of_its_own(tmp_path: Path) -> None:
    found = prepared(tmp_path, [{"prompt": f"say {i}"} for i in range(10)])
    draw = [[said(p) for p in found.draw(step, 4, 0)] for step in range(5)]
    assert draw == [[said(p) for p in found.draw(step, 4, 0)] for step in range(5)]
    assert len({text for step in draw for text in step}) == 10, "two epochs of ten rows"
    assert draw != [[said(p) for p in found.draw(step, 4, 1)] for step in range(5)]
    assert all(said(found.row(p.row)[0]) == said(p) for p in found.draw(0, 4, 0) if p.row is not None)
    assert sorted(p.row for p in found.draw(0, 10, 0) if p.row is not None) == list(range(10))
    twice = found.draw(0, 20, 0)
    assert [p.group for p in twice] == list(range(20)), "a row that is drawn twice is two groups"


def test_the_fingerprint_follows_the_prompts(tmp_path: Path) -> None:
    a, b = (prepared(tmp_path, [{"prompt": text}]).fingerprint for text in ("hi", "ho"))
    assert a != b and a == prepared(tmp_path, [{"prompt": "hi"}]).fingerprint
    assert all(example.tokens_L.dtype == np.int32 for example in prepared(tmp_path, [{"prompt": "hi"}]).examples)
