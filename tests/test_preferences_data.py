"""Pairs and rated answers: from rows to examples, through the cache, into the draws of a step."""

from __future__ import annotations

import json
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ft.data.build import build
from ft.data.dataset import Prepared, prepare
from ft.data.formats import Conversation, Labelled, Pair, Segments, convert, detect
from ft.data.pack import collate, pack
from ft.data.render import render
from ft.data.tokenizer import byte_tokenizer
from ft.errors import DataError, RecipeError
from ft.recipe.parts import Data, Source

tokenizer: Any = lru_cache(byte_tokenizer)
SILENT: Any = lambda said: None  # noqa: E731

ASK = {"role": "user", "content": "Hi"}
YES, NO = {"role": "assistant", "content": "Yo"}, {"role": "assistant", "content": "Go"}
SYSTEM = {"role": "system", "content": "Be kind."}


def read(row: Any, **options: Any) -> Any:
    return convert(row, source="train.jsonl:17", **options)


def error(row: Any, **options: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        read(row, **options)
    return caught.value


def turns(value: Any) -> list[tuple[str, str, bool | None]]:
    assert isinstance(value, Conversation)
    return [(message.role, message.content, message.train) for message in value.messages]


def lines(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def ready(train: Any, *, quarantine: Path | None = None, announce: Any = SILENT, **options: Any) -> Prepared:
    data = Data(train=train, **{"cache": None, **options})
    return prepare(data.train, data, tokenizer(), quarantine=quarantine, announce=announce)


def texts(prompt: str, chosen: str, rejected: str, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def pairs(n: int) -> list[dict[str, Any]]:
    return [texts(f"Q{i}:", f"good {i}", f"bad {i}", margin=i / 4) for i in range(n)]


def shown(example: Any) -> tuple[str, str]:
    """(the whole, the trained part), special tokens as #."""
    said = ["#" if t > 255 else chr(t) for t in example.tokens_L]
    return "".join(said), "".join(c for c, train in zip(said, example.mask_L, strict=True) if train)


# --- rows to values --------------------------------------------------------------------------------------------------


def test_three_strings_are_two_documents_of_which_the_answers_are_trained():
    row = texts("1+1=", "2", "3")
    value = read(row)
    assert value == read(row, format="preference")
    assert value == Pair(
        chosen=Segments(parts=(("1+1=", False), ("2", True)), whole=True),
        rejected=Segments(parts=(("1+1=", False), ("3", True)), whole=True),
    )


def test_a_prompt_may_be_messages_a_string_or_what_two_conversations_have_in_common():
    wanted = [[("user", "Hi", False), ("assistant", said, True)] for said in ("Yo", "Go")]
    for row in (
        {"prompt": [ASK], "chosen": [YES], "rejected": [NO]},
        {"prompt": "Hi", "chosen": [YES], "rejected": [NO]},
        {"prompt": "Hi", "chosen": YES, "rejected": NO},
        {"chosen": [ASK, YES], "rejected": [ASK, NO]},
        {"prompt": "Hi", "chosen": [ASK, YES], "rejected": [ASK, NO]},
        {"prompt": [ASK], "chosen": [ASK, YES], "rejected": [ASK, NO]},
        {"chosen": json.dumps([ASK, YES]), "rejected": json.dumps([ASK, NO])},
        {"chosen": [{"from": "human", "value": "Hi"}, YES], "rejected": [ASK, {"from": "gpt", "value": "Go"}]},
    ):
        value = read(row)
        assert [turns(value.chosen), turns(value.rejected)] == wanted, row


def test_in_pairs_of_many_turns_only_what_follows_the_common_part_is_trained():
    before = [SYSTEM, ASK, YES, {"role": "user", "content": "And?"}]
    after = [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]
    value = read({"chosen": [*before, *after, YES], "rejected": [*before, NO]})
    asked = [("system", "Be kind.", False), ("user", "Hi", False), ("assistant", "Yo", False), ("user", "And?", False)]
    assert turns(value.chosen) == [*asked, ("assistant", "a", True), ("user", "b", None), ("assistant", "Yo", True)]
    assert turns(value.rejected) == [*asked, ("assistant", "Go", True)]
    marked = read({"chosen": [ASK, {**YES, "train": True}, ASK, YES], "rejected": [ASK, YES, ASK, NO]})
    assert [train for _, _, train in turns(marked.chosen)] == [False, False, False, True], "marks do not part them"


def test_messages_that_say_so_are_not_trained():
    mute = {"role": "assistant", "content": "Hm", "weight": 0}
    value = read({"prompt": [ASK], "chosen": [mute, ASK, YES], "rejected": [NO]})
    assert turns(value.chosen)[1:] == [("assistant", "Hm", False), ("user", "Hi", None), ("assistant", "Yo", True)]


@pytest.mark.parametrize("prompt", ["42", "null", '{"a": 1}', '"Hi"'])
def test_a_prompt_that_happens_to_be_json_is_text(prompt: str):
    value = read({"prompt": prompt, "chosen": [YES], "rejected": [NO]})
    assert turns(value.chosen)[0] == ("user", prompt, False)
    assert read(texts(prompt, "1", "2")).chosen.parts == ((prompt, False), ("1", True))


def test_tools_and_a_system_prompt_stand_before_both_answers():
    row = {"chosen": [ASK, YES], "rejected": [ASK, NO], "system": "S", "tools": [{"name": "add"}]}
    value = read(row)
    for side in (value.chosen, value.rejected):
        assert turns(side)[0] == ("system", "S", False)
        assert side.tools == ({"type": "function", "function": {"name": "add"}},)


@pytest.mark.parametrize(
    ("columns", "margin"),
    [
        ({}, None),
        ({"margin": 1.5}, 1.5),
        ({"margin": "-2"}, -2.0),
        ({"margin": "", "score_chosen": "", "score_rejected": None}, None),
        ({"score_chosen": 8, "score_rejected": 6.5}, 1.5),
        ({"margin": 0, "score_chosen": 8, "score_rejected": 6.5}, 0.0),
    ],
)
def test_a_margin_is_a_column_or_the_difference_of_two_scores(columns: dict[str, Any], margin: float | None):
    assert read(texts("Q", "a", "b", **columns)).margin == margin


@pytest.mark.parametrize(("label", "good"), [(True, True), (False, False), (1, True), (0, False), ("False", False)])
def test_rated_answers_beside_a_prompt(label: Any, good: bool):
    row = {"prompt": "Q", "completion": "A", "label": label}
    answer = Segments(parts=(("Q", False), ("A", True)), whole=True)
    assert read(row, format="label") == Labelled(answer=answer, good=good)
    value = read({"prompt": [ASK], "completion": [YES], "label": label}, format="label")
    assert value.good is good and turns(value.answer) == [("user", "Hi", False), ("assistant", "Yo", True)]


def test_of_rated_messages_the_last_answer_is_trained():
    call = {"role": "assistant", "tool_calls": [{"name": "add", "arguments": {}}]}
    row = {"messages": [ASK, NO, ASK, call, {"role": "tool", "content": "2"}, YES], "label": True}
    value = read(row, format="label")
    assert [train for _, _, train in turns(value.answer)] == [False, False, False, True, None, True]


def test_rows_that_were_recognised_before_keep_their_format():
    pair = {"chosen": [ASK, YES], "rejected": [ASK, NO]}
    assert detect(pair) == "preference"
    assert detect({**pair, "messages": [ASK, YES]}) == "messages"
    assert detect({**pair, "text": "T"}) == "text"
    assert detect({"prompt": "Q", "completion": "A", "label": True}) == "label"
    assert detect({"prompt": "Q", "completion": "A", "label": 1}) == "prompt"
    assert detect({"messages": [ASK, YES], "label": True}) == "messages"


WHOLE = {"chosen": [ASK, YES], "rejected": [ASK, NO]}
MALFORMED: list[tuple[dict[str, Any], str, str]] = [
    (texts("Q", "a", "a"), "rejected: the two answers are the same", "'a'"),
    ({"chosen": [ASK, YES], "rejected": [ASK, YES]}, "rejected: the two answers are the same", "'Yo'"),
    ({"prompt": [ASK], "chosen": [YES], "rejected": [YES]}, "rejected: the two answers are the same", "'Yo'"),
    ({"prompt": "Q", "chosen": "a"}, "column 'rejected' is missing", "columns prompt, chosen"),
    ({"prompt": "Q", "chosen": None, "rejected": "a"}, "column 'chosen' is missing", "null"),
    ({"chosen": "Q a", "rejected": "Q b"}, "prompt: two answers without their prompt", "'Q a' (a string)"),
    (texts("Q", "a", ""), "rejected: this is empty", "an empty string"),
    (texts("Q", " \n", "a"), "chosen: this answer is empty", r"' \n' (a string)"),
    ({**WHOLE, "chosen": [ASK, {**YES, "content": " "}]}, "chosen: this answer is empty", "' ' (a string)"),
    ({**WHOLE, "chosen": [ASK]}, "chosen: this answer is empty", "no message after the prompt"),
    ({**WHOLE, "chosen": [ASK, YES, ASK, NO], "rejected": [ASK, YES]}, "rejected: this answer is empty", "no message"),
    ({**WHOLE, "chosen": [SYSTEM, YES]}, "rejected[0]: the two answers have no common prompt", "system: 'Be kind.'"),
    ({**WHOLE, "chosen": [SYSTEM, ASK, YES], "rejected": [SYSTEM, SYSTEM, NO]},
     "rejected[1]: the two answers have no common prompt", "user: 'Hi' (a string) in chosen"),
    ({"chosen": [YES], "rejected": [NO]}, "rejected[0]: the two answers have no common prompt", "assistant: 'Yo'"),
    ({**WHOLE, "prompt": "Hi", "rejected": [NO]}, "rejected[0]: the two answers have no common", "user: 'Hi'"),
    ({**WHOLE, "prompt": "Ho"}, "prompt: the prompt is not the one of the conversations", "'Ho'"),
    ({**WHOLE, "prompt": [SYSTEM]}, "prompt: the prompt is not the one of the conversations", "'Be kind.'"),
    ({"prompt": [ASK], "chosen": "a", "rejected": "b"}, "chosen: prompt, chosen and rejected differ in kind", "'a'"),
    ({"prompt": "Q", "chosen": [YES], "rejected": "b"}, "rejected: prompt, chosen and rejected differ", "'b'"),
    ({**WHOLE, "rejected": [ASK, {"role": "tool", "content": "x"}]}, "rejected: no assistant message", "roles tool"),
    ({**WHOLE, "rejected": [ASK, {**NO, "train": False}]}, "rejected: no message of the answer is trained", "false"),
    (texts("Q", "a", "b", system="S"), "system: a system prompt beside plain strings", "'S'"),
    (texts("Q", "a", "b", margin="much"), "margin: this must be a number", "'much'"),
    (texts("Q", "a", "b", margin=True), "margin: this must be a number", "true"),
    (texts("Q", "a", "b", margin=float("nan")), "margin: this must be a number", "nan"),
    (texts("Q", "a", "b", score_chosen=1), "score_rejected: one score without the other", "null"),
    ({"prompt": "Q", "completion": "A", "label": "good"}, "label: a label is yes or no", "'good'"),
    ({"prompt": "Q", "completion": "A", "label": 2}, "label: a label is yes or no", "2 (a number)"),
    ({"prompt": "Q", "completion": "A"}, "column 'label' is missing", "columns prompt, completion"),
    ({"prompt": "Q", "completion": " ", "label": True}, "completion: this answer is empty", "' '"),
    ({"prompt": [ASK], "completion": [{**YES, "content": ""}], "label": 1}, "completion: this answer is empty", "''"),
    ({"messages": [ASK, YES, ASK], "label": True}, "messages: no answer to rate", "roles user, assistant, user"),
    ({"messages": [YES], "label": True}, "messages: no message to answer", "roles assistant"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "problem", "got"), MALFORMED)
def test_malformed_rows_say_where_what_and_what_stood_there(row: Any, problem: str, got: str):
    caught = error(row, format="label" if "label" in row or "completion" in row else "preference")
    assert str(caught).startswith("train.jsonl:17")
    assert problem in str(caught)
    assert got in caught.got
    assert caught.expected
    assert len(str(caught)) < 700


MESSAGES = st.lists(
    st.builds(
        lambda role, content: {"role": role, "content": content},
        st.sampled_from(["system", "user", "assistant", "tool"]),
        st.sampled_from(["", "a", "b"]),
    ),
    max_size=4,
)


@settings(max_examples=300, deadline=None)
@given(MESSAGES, MESSAGES, st.none() | st.sampled_from(["a", "b"]) | MESSAGES)
def test_two_conversations_give_a_pair_with_one_prompt_or_a_data_error(chosen: Any, rejected: Any, prompt: Any):
    try:
        value = read({"chosen": chosen, "rejected": rejected, "prompt": prompt}, format="preference")
    except DataError:
        return
    sides = [turns(value.chosen), turns(value.rejected)]
    asked = [[turn for turn in side if turn[2] is False] for side in sides]
    assert asked[0] == asked[1] and len(asked[0]) > 0, "one prompt, none of it trained"
    for side, messages in zip(sides, (chosen, rejected), strict=True):
        assert side[: len(asked[0])] == asked[0]
        answer = side[len(asked[0]) :]
        assert answer[0][0] in ("assistant", "tool")
        assert any(train for _, _, train in answer)
        assert all((role == "assistant") == bool(train) for role, _, train in answer)
        assert [(m["role"], m["content"]) for m in messages][-len(answer) :] == [turn[:2] for turn in answer]
    assert sides[0] != sides[1]


# --- values to examples ----------------------------------------------------------------------------------------------


def test_a_pair_is_two_examples_of_one_unit_the_chosen_one_first(tmp_path: Path):
    path = lines(tmp_path / "a.jsonl", [texts("1+1=", "2", "33", margin=0.5), WHOLE | {"margin": 2}])
    data = ready(path)
    assert [shown(example) for example in data] == [
        ("1+1=2#", "2#"),
        ("1+1=33#", "33#"),
        ("#user\nHi#\n#assistant\nYo#\n", "Yo#"),
        ("#user\nHi#\n#assistant\nGo#\n", "Go#"),
    ]
    assert [example.margin for example in data] == [0.5, 0.5, 2.0, 2.0]
    assert [example.label for example in data] == [None] * 4
    assert [example.unit for example in data] == [0, 0, 1, 1]
    assert [example.source for example in data] == [f"{path}:1"] * 2 + [f"{path}:2"] * 2
    assert (len(data), data.rows, data.per_epoch) == (4, 2, 2)
    assert (data.report.read, data.report.kept, data.report.sources) == (2, 2, ((path, 2),))
    assert (data.report.eos, data.report.eos_trained) == (2, 2), "rows, not examples"
    assert data.report.trained == 2 + 3 + 3 + 3


def test_a_rated_answer_is_one_example_with_a_label(tmp_path: Path):
    rows = [{"prompt": "Q", "completion": "A", "label": good} for good in (True, False)]
    data = ready(lines(tmp_path / "a.jsonl", rows))
    assert [(shown(e), e.label, e.unit, e.margin) for e in data] == [
        (("QA#", "A#"), 1.0, None, None),
        (("QA#", "A#"), 0.0, None, None),
    ]
    assert data.arrays.first_R1 is None
    assert [e.label for e in data.draw(0, 2, 0)] == [
        1.0 if e.source.endswith(":1") else 0.0 for e in data.draw(0, 2, 0)
    ]


def test_the_last_turn_or_all_turns_of_an_answer():
    row = {"chosen": [ASK, YES, ASK, NO], "rejected": [ASK, NO]}
    rows = [(read(row), "a:1")]
    trained = {mask: [shown(e)[1] for e in render(rows, tokenizer(), Data(train="a", mask=mask))]
               for mask in ("assistant", "message", "last")}  # fmt: skip
    assert trained == {"assistant": ["Yo#Go#", "Go#"], "message": ["Yo#Go#", "Go#"], "last": ["Go#", "Go#"]}


def test_a_mask_of_all_tokens_is_refused_since_it_would_score_the_prompt(tmp_path: Path):
    rated = {"prompt": "Q", "completion": "A", "label": True}
    for row in (texts("Q", "a", "b"), rated):
        with pytest.raises(RecipeError, match=r"data\.mask"):
            ready(lines(tmp_path / "a.jsonl", [row]), mask="all", on_bad_row="skip", bad_rows=1.0)
    source = Source(path=lines(tmp_path / "a.jsonl", [rated]), format="prompt")
    assert shown(ready(source, mask="all")[0]) == ("QA#", "A#"), "nothing predicts the Q"


def test_answers_that_the_template_makes_equal_are_a_malformed_row(tmp_path: Path):
    row = {"chosen": [ASK, {"role": "assistant", "content": "Yo"}], "rejected": [ASK, {**YES, "name": "x"}]}
    with pytest.raises(DataError, match=r"a\.jsonl:2: the two answers become the same tokens"):
        ready(lines(tmp_path / "a.jsonl", [WHOLE, row, WHOLE]))
    data = ready(lines(tmp_path / "a.jsonl", [WHOLE, row, WHOLE]), on_bad_row="skip", bad_rows=0.5)
    assert (data.report.read, data.report.kept, data.report.bad) == (3, 2, 1)
    assert [e.source.rsplit(":")[-1] for e in data] == ["1", "1", "3", "3"]


# --- a pair is one row -----------------------------------------------------------------------------------------------


def test_a_pair_stays_or_goes_as_one(tmp_path: Path):
    """Tokens with EOS: 4 and 4, 4 and 9, 9 and 4, 9 and 9."""
    long, short = "abcdef", "a"
    rows = [texts("QQ", a, b) for a, b in ((short, "b"), (short, long), (long, short), (long, "bcdefg"))]
    path = lines(tmp_path / "a.jsonl", rows)
    data = ready(path, max_tokens=4)
    assert [e.source for e in data] == [f"{path}:1"] * 2
    assert (data.report.read, data.report.kept, data.report.overlong) == (4, 1, 3)
    with pytest.raises(DataError) as caught:
        ready(path, max_tokens=4, overlong="raise")
    assert (caught.value.where, caught.value.got) == (f"{path}:2", "4 and 9 tokens")


def test_truncation_cuts_the_ends_of_answers_and_never_one_prompt_alone(tmp_path: Path):
    rows = [
        texts("QQ", "abcdef", "b"),  # one is cut
        texts("QQ", "abcdef", "bcdefg"),  # both are
        texts("QQ", "abX", "abY"),  # cut where they differ: nothing left to compare
        texts("QQQQ", "abc", "d"),  # the prompt fills the row in both
        texts("QQQ", "abc", "d"),
    ]
    data = ready(lines(tmp_path / "a.jsonl", rows), max_tokens=4, overlong="truncate")
    assert [shown(e) for e in data] == [
        ("QQab", "ab"),
        ("QQb#", "b#"),
        ("QQab", "ab"),
        ("QQbc", "bc"),
        ("QQQa", "a"),
        ("QQQd", "d"),
    ]
    report = data.report
    assert (report.read, report.kept, report.truncated, report.overlong, report.unlabelled) == (5, 3, 3, 1, 1)


def test_a_pair_goes_if_the_cut_leaves_one_side_nothing_to_train(tmp_path: Path):
    """Cut to 26 tokens, 21 of them prompt and header, the rejected side ends in a message that is not trained."""
    mute = {"role": "assistant", "content": "Hm" * 20, "train": False}
    rows = [WHOLE, {"prompt": [ASK], "chosen": [YES], "rejected": [mute, ASK, NO]}]
    data = ready(lines(tmp_path / "a.jsonl", rows), max_tokens=26, overlong="truncate")
    assert (data.report.read, data.report.kept, data.report.unlabelled, data.rows) == (2, 1, 1, 1)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(*[st.text("ab", min_size=1, max_size=6)] * 3).filter(lambda t: t[1] != t[2]), min_size=1),
    st.integers(2, 12),
    st.sampled_from(["drop", "truncate"]),
)
def test_what_is_kept_are_whole_pairs_with_one_prompt(tmp_path_factory: Any, rows: Any, longest: int, overlong: Any):
    path = lines(tmp_path_factory.getbasetemp() / "any.jsonl", [texts(*row) for row in rows])
    data = Data(train=path, cache=None, max_tokens=longest, overlong=overlong)
    built = build(data.train, data, tokenizer(), SILENT)
    a, r = built.arrays, built.report
    assert r.read == len(rows) == r.kept + r.overlong + r.unlabelled + r.short
    assert r.kept == a.rows and len(a.number_N) == 2 * r.kept
    for i in range(0, 2 * r.kept, 2):
        prompt, *answers = rows[int(a.number_N[i]) - 1]
        spans = [slice(int(a.offsets_N1[k]), int(a.offsets_N1[k + 1])) for k in (i, i + 1)]
        for span, answer in zip(spans, answers, strict=True):
            said = [*map(ord, prompt + answer), tokenizer().eos_token_id][:longest]
            assert a.tokens_T[span].tolist() == said
            assert a.mask_T[span].tolist() == [k >= len(prompt) for k in range(len(said))]


def test_a_malformed_pair_is_put_aside_as_one_row(tmp_path: Path):
    bad = texts("Q", "same", "same")
    path = lines(tmp_path / "a.jsonl", [*pairs(2), bad, *pairs(2)])
    data = ready(path, quarantine=tmp_path / "bad.jsonl", on_bad_row="quarantine", bad_rows=0.2)
    (kept,) = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert (kept["source"], kept["row"]) == (f"{path}:3", bad)
    assert (data.report.read, data.report.kept, data.report.bad, data.rows) == (5, 4, 1, 4)


# --- drawing ---------------------------------------------------------------------------------------------------------


def test_a_step_draws_rows_and_each_pair_has_its_own_unit(tmp_path: Path):
    data = ready(lines(tmp_path / "a.jsonl", pairs(5)))
    for step in range(4):
        drawn = data.draw(step, 3, 1)
        assert [e.unit for e in drawn] == [0, 0, 1, 1, 2, 2]
        for chosen, rejected in zip(drawn[::2], drawn[1::2], strict=True):
            assert chosen.source == rejected.source and chosen.margin == rejected.margin
            assert "good" in shown(chosen)[1] and "bad" in shown(rejected)[1]
    epoch = [e.source for step in range(5) for e in data.draw(step, 1, 7)]
    assert Counter(epoch) == {f"{tmp_path}/a.jsonl:{i}": 2 for i in range(1, 6)}


def test_a_row_drawn_twice_in_a_step_is_two_units(tmp_path: Path):
    data = ready(Source(path=lines(tmp_path / "a.jsonl", pairs(2)), weight=2.0))
    drawn = data.draw(0, 4, 0)
    assert len({e.source for e in drawn}) == 2 and [e.unit for e in drawn] == [0, 0, 1, 1, 2, 2, 3, 3]
    batch = collate(pack(drawn, tokens=1000)[0])
    assert sorted(batch.unit_S.tolist()) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert batch.margin_S is not None and sorted(batch.margin_S.tolist()) == [0.0] * 4 + [0.25] * 4


def test_pairs_stay_whole_in_packs(tmp_path: Path):
    data = ready(lines(tmp_path / "a.jsonl", pairs(9)))
    for batch in pack(data.draw(0, 9, 0), tokens=40):
        assert [a.unit for a in batch[::2]] == [b.unit for b in batch[1::2]]


def test_pairs_and_single_rows_may_be_mixed(tmp_path: Path):
    a = lines(tmp_path / "a.jsonl", [texts("Q", "a", "b")])
    b = lines(tmp_path / "b.jsonl", [{"prompt": "Q", "completion": "c"}])
    data = ready((a, b, a))
    assert [(shown(e)[0], e.unit) for e in data] == [("Qa#", 0), ("Qb#", 0), ("Qc#", None), ("Qa#", 2), ("Qb#", 2)]
    assert [[shown(e)[0] for e in data.row(r)] for r in (0, 1, -1)] == [["Qa#", "Qb#"], ["Qc#"], ["Qa#", "Qb#"]]
    with pytest.raises(IndexError):
        data.row(3)
    drawn = data.draw(0, 3, 0)
    units = {e.unit for e in drawn if e.unit is not None}
    assert len(drawn) == 5 and len(units) == 2 and units < {0, 1, 2}
    assert data.report.sources == ((a, 1), (b, 1), (a, 1))


@pytest.mark.parametrize("name", ["margin", "label"])
def test_a_number_that_only_some_rows_have_is_an_error(tmp_path: Path, name: str):
    with_it: Any = {
        "margin": texts("Q", "a", "b", margin=1),
        "label": {"prompt": "Q", "completion": "A", "label": True},
    }
    without: Any = {"margin": texts("Q", "a", "c"), "label": {"prompt": "Q", "completion": "B"}}
    path = lines(tmp_path / "a.jsonl", [with_it[name], without[name]])
    with pytest.raises(DataError) as caught:
        ready(path, cache=tmp_path / "cache")
    assert caught.value.where == f"{path}:2" and f"without a {name}" in str(caught.value)
    assert "Source.columns" in caught.value.fix


# --- arrays and cache ------------------------------------------------------------------------------------------------


def test_plain_rows_have_no_column_more_than_before(tmp_path: Path):
    data = ready(lines(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "b"}]), cache=tmp_path / "cache")
    a = data.arrays
    assert (a.first_R1, a.label_N, a.margin_N) == (None, None, None)
    assert [(e.unit, e.label, e.margin) for e in data] == [(None, None, None)] * 2
    assert (len(data), data.rows) == (2, 2)


@pytest.mark.parametrize(
    "rows", [pairs(30), [{"prompt": "Q", "completion": "A", "label": i % 2 == 0} for i in range(9)]]
)
def test_a_cached_entry_gives_the_same_examples(tmp_path: Path, rows: list[Any]):
    path = lines(tmp_path / "a.jsonl", rows)
    memory, fresh, hit = (ready(path, cache=cache) for cache in (None, tmp_path / "cache", tmp_path / "cache"))
    assert hit.arrays.tokens_T.flags.owndata is False
    for other in (fresh, hit):
        assert other.fingerprint == memory.fingerprint and other.report == memory.report
        for a, b in zip(memory.draw(3, 7, 2), other.draw(3, 7, 2), strict=True):
            np.testing.assert_array_equal(a.tokens_L, b.tokens_L)
            np.testing.assert_array_equal(a.mask_L, b.mask_L)
            fields = ("source", "unit", "label", "margin")
            assert [getattr(a, name) for name in fields] == [getattr(b, name) for name in fields]


def test_the_order_of_pairs_is_the_order_of_rows(tmp_path: Path):
    """A file of pairs is shuffled as a file of as many plain rows: only what stands in a row is another."""
    paired = ready(lines(tmp_path / "a.jsonl", pairs(12)))
    plain = ready(lines(tmp_path / "b.jsonl", [{"text": str(i)} for i in range(12)]))
    for step in range(5):
        numbers = [[e.source.rsplit(":")[-1] for e in data.draw(step, 5, 3)] for data in (paired, plain)]
        assert numbers[0][::2] == numbers[0][1::2] == numbers[1]


def test_values_of_pairs_are_frozen():
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        read(texts("Q", "a", "b")).margin = 1.0
