"""Answers in steps as rows: where each step is judged, what is malformed, and which methods take them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attrs import evolve

from ft import DPO, KTO, SFT, Data, Reward, Stepwise
from ft.data.dataset import prepare
from ft.data.pack import collate
from ft.data.tokenizer import byte_tokenizer
from ft.errors import DataError
from ft.types import Context, Example, Given, Method

PAIR = [
    Example(tokens_L=np.arange(k, dtype=np.int32), mask_L=np.arange(k) > 0, unit=0, margin=1.0, source="rows:1")
    for k in (3, 4)
]


def examples(tmp_path: Path, *lines: dict[str, Any], **options: Any) -> Any:
    options = {"cache": None, "shuffle": False, **options}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = Data(train=str(path), **options)
    return prepare(data.train, data, byte_tokenizer(), announce=lambda _: None)


GOOD = {"prompt": "1+1+1?", "completions": ["1+1=2", "2+1=4"], "labels": [True, False]}


def test_steps_are_judged_at_their_last_tokens(tmp_path: Path) -> None:
    (row,) = examples(tmp_path, GOOD)
    assert byte_tokenizer().decode(row.tokens_L) == "1+1+1?1+1=2\n2+1=4\n"
    assert np.flatnonzero(row.mask_L).tolist() == [11, 17] and row.label_L[[11, 17]].tolist() == [1, 0]
    (made,) = Stepwise().examples(0, Context(data=Given(examples=[row]), examples=1, seed=0))
    batch = collate([made])
    assert batch.trained_N.tolist() == [11, 17] and batch.input_T.tolist() == row.tokens_L.tolist()
    assert batch.label_T is not None and batch.label_T[batch.mask_T].tolist() == [1, 0]
    (row,) = examples(tmp_path, GOOD, separator="")
    assert np.flatnonzero(row.mask_L).tolist() == [10, 15]


def test_steps_go_on_from_a_conversation(tmp_path: Path) -> None:
    (row,) = examples(tmp_path, {**GOOD, "prompt": [{"role": "user", "content": "hi"}], "labels": [0.25, 1]})
    text = byte_tokenizer().decode(row.tokens_L)
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n1+1=2\n2+1=4\n"
    assert row.label_L[row.mask_L].tolist() == [0.25, 1]


def test_a_row_that_is_cut_keeps_the_labels_of_what_is_left(tmp_path: Path) -> None:
    (row,) = examples(tmp_path, GOOD, max_tokens=14, overlong="truncate")
    assert len(row.label_L) == len(row) == 14 and row.label_L[row.mask_L].tolist() == [1]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"labels": [True]}, r"rows.jsonl:1.*labels: not a label for each step(?s:.*)2 labels"),
        ({"completions": []}, r"must be a list that is not empty(?s:.*)completions|completions(?s:.*)not empty"),
        ({"completions": ["a", "  "]}, r"answer is empty(?s:.*)|completions\[1\]"),
        ({"completions": ["a", 3]}, r"completions\[1\]"),
        ({"labels": [True, 1.5]}, r"labels\[1\]"),
        ({"labels": ["yes", "no"]}, r"labels\[0\]"),
        ({"prompt": ""}, r"prompt"),
    ],
)
def test_malformed_steps_say_what_is_wrong(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        examples(tmp_path, {**GOOD, **changes})


def test_a_row_without_labels_among_others_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows.jsonl:2: a row without a label, where others have one"):
        examples(tmp_path, GOOD, {"prompt": "a", "completion": "b"})


@pytest.mark.parametrize("method", [SFT(), DPO(), KTO(), Reward()], ids=lambda m: type(m).__name__)
def test_other_methods_refuse_judged_steps(tmp_path: Path, method: Method) -> None:
    with pytest.raises(DataError, match=r"rows.jsonl:1"):
        method.examples(0, Context(data=examples(tmp_path, GOOD), examples=1, seed=0))


def test_rows_that_do_not_fit_the_method_are_refused(tmp_path: Path) -> None:
    soft = examples(tmp_path, {**GOOD, "labels": [0.5, 1]})
    context = Context(data=soft, examples=1, seed=0)
    assert len(Stepwise(scores=1).examples(0, context)) == 1
    with pytest.raises(DataError, match=r"rows.jsonl:1: a label between good and bad(?s:.*)method.scores=1"):
        Stepwise().examples(0, context)
    with pytest.raises(DataError, match="learns from judged steps"):
        Stepwise().examples(0, Context(data=Given(examples=PAIR), examples=1, seed=0))
    without = [evolve(e, margin=None) for e in PAIR]
    with pytest.raises(DataError, match=r"rows:1: this method asks for a margin(?s:.*)method.margin=False"):
        Reward(margin=True).examples(0, Context(data=Given(examples=without), examples=1, seed=0))
