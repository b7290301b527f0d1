"""Prompts for methods that sample their own answers: rows whose answer is not there, and what it is judged by.

A row has a ``prompt``: a list of messages, or a string, which is what a user says. Messages may also stand in
``messages`` and end before the answer; ``tools`` and ``system`` are read as everywhere. All other columns go to the
reward functions, as they are.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from attrs import evolve, frozen

from ft.data import bad
from ft.data.bad import BadRows
from ft.data.columns import with_system
from ft.data.formats import rename
from ft.data.messages import Conversation, Message, read_messages, read_tools
from ft.data.mixture import Mixture, rows_of_step
from ft.data.place import fail, parsed, shown, text
from ft.data.render import prompt as render_prompt
from ft.data.report import Report
from ft.data.rows import Row, digests, read
from ft.errors import DataError
from ft.recipe.parts import Data, Source
from ft.types import Example

_READ = ("prompt", "messages", "tools", "system")


@frozen(kw_only=True, eq=False)
class Prompts:
    """Prompts by index, and those of a step; implements ``ft.types.Dataset``. No token of theirs is trained."""

    examples: tuple[Example, ...]
    mixture: Mixture
    report: Report
    fingerprint: str

    @property
    def rows(self) -> int:
        return len(self.examples)

    @property
    def per_epoch(self) -> int:
        return sum(self.mixture.per_epoch())

    def row(self, index: int) -> list[Example]:
        return [self.examples[index]]

    def draw(self, step: int, n: int, seed: int) -> list[Example]:
        """The ``n`` prompts of ``step``; each is a group of its own, also where a row is drawn twice."""
        rows = rows_of_step(self.mixture, step, n, seed)
        return [evolve(self.examples[row], group=group) for group, row in enumerate(rows)]


def prepare(
    sources: Sequence[Source],
    data: Data,
    tokenizer: Any,
    *,
    quarantine: Path | None = None,
    announce: Callable[[str], None] = print,
) -> Prompts:
    """Read and render the prompts of ``sources``.

    Raises:
        DataError: a malformed row, or too many of them; no prompt is left.
        MissingFileError: a file is missing.
    """
    aside, counts = BadRows(data), Counter[str]()
    kept = [_of_source(source, data, tokenizer, aside, counts) for source in sources]
    bad.check_share(len(aside.rows), counts["read"], data.bad_rows, [row.reason for row in aside.rows[:3]])
    for source, examples in zip(sources, kept, strict=True):
        if not examples:
            raise DataError("no prompt is left", where=source.path, expected="at least one row",
                            got=f"{counts['read']:,} rows read, {counts['overlong']:,} too long",
                            fix="raise data.max_tokens, which limits a prompt and its answer")  # fmt: skip
    if aside.rows:
        put = f"put aside in {quarantine}" if quarantine and data.on_bad_row == "quarantine" else "skipped"
        announce(f"{len(aside.rows):,} of {counts['read']:,} rows are malformed and were {put}; the first: "
                 f"{aside.rows[0].reason}")  # fmt: skip
        if quarantine and data.on_bad_row == "quarantine":
            bad.write(quarantine, bad.to_json(aside.rows))
    mixture = Mixture(tuple(map(len, kept)), tuple(source.weight for source in sources), data.shuffle)
    every = (example for part in kept for example in part)
    examples = tuple(evolve(example, row=row) for row, example in enumerate(every))
    return Prompts(
        examples=examples, mixture=mixture, report=_report(examples, sources, kept, counts, aside),
        fingerprint=_fingerprint(sources, examples, mixture),
    )  # fmt: skip


def _of_source(source: Source, data: Data, tokenizer: Any, aside: BadRows, counts: Counter[str]) -> list[Example]:
    found = []
    for row in read(source):
        counts["read"] += 1
        try:
            example = _example(row, source, data, tokenizer)
        except DataError as error:
            counts["bad"] += 1
            aside.take(row, error, counts["read"] - counts["bad"])
            continue
        if len(example) >= data.max_tokens:  # a prompt is never cut: its end is the question
            if data.overlong == "raise":
                raise _overlong(row.source, len(example), data.max_tokens)
            counts["overlong"] += 1
            continue
        found.append(example)
    return found


def _overlong(source: str, tokens: int, most: int) -> DataError:
    return fail(
        source,
        "a prompt leaves no room for an answer",
        path="prompt",
        expected=f"fewer than data.max_tokens={most:,} tokens",
        got=f"{tokens:,}",
        fix="raise data.max_tokens, or set data.overlong to drop",
    )


def _example(row: Row, source: Source, data: Data, tokenizer: Any) -> Example:
    if row.error is not None:
        raise row.error
    if not isinstance(row.value, Mapping):
        raise fail(row.source, "a row must be an object", expected="an object with named columns", got=shown(row.value))
    value = rename(row.value, source.columns, row.source) if source.columns else dict(row.value)
    asked = conversation(value, row.source)
    tokens_L = render_prompt(asked, tokenizer, thinking=data.thinking, source=row.source)
    columns = {name: v for name, v in value.items() if name not in _READ}
    return Example(
        tokens_L=tokens_L, mask_L=np.zeros(len(tokens_L), bool), source=row.source,
        columns={**columns, "prompt": _plain(asked)},
    )  # fmt: skip


def conversation(row: Mapping[str, Any], source: str) -> Conversation:
    """What is asked in a row, ending before the answer.

    Raises:
        DataError: there is nothing to answer.
    """
    path = "prompt" if row.get("prompt") is not None else "messages"
    value = row.get(path)
    if value is None:
        raise fail(source, "the row has no prompt", path="prompt", expected="a string, or a list of messages",
                   got=f"columns {', '.join(map(str, row)) or '(none)'}",
                   fix="rename the column that holds it: Source.columns={'theirs': 'prompt'}")  # fmt: skip
    if not isinstance(value, (str, list, tuple)):
        raise fail(source, "this is nothing to answer", path=path, expected="a string, or a list of messages",
                   got=shown(value))  # fmt: skip
    if isinstance(value, str) and not isinstance(parsed(value, source, path), list):
        asked: tuple[Message, ...] = (Message(role="user", content=text(value, source, path, filled=True)),)
    else:
        asked = read_messages(value, source, path, train=False)
    asked = with_system(asked, row, source, path)
    if asked[-1].role == "assistant":
        raise fail(source, "the prompt ends with an answer", path=path,
                   expected="a last message that is not the assistant's", got="assistant",
                   fix="leave the answer out; other columns can hold it for the rewards")  # fmt: skip
    return Conversation(messages=asked, tools=read_tools(row.get("tools"), source, "tools"))


def _plain(asked: Conversation) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in asked.messages]


def _report(
    examples: Sequence[Example],
    sources: Sequence[Source],
    kept: Sequence[Sequence[Example]],
    counts: Counter[str],
    aside: BadRows,
) -> Report:
    sizes = [len(example) for example in examples]
    bins = Counter(int(np.ceil(np.log2(max(1, n)))) for n in sizes)
    return Report(
        read=counts["read"],
        kept=len(examples),
        bad=counts["bad"],
        overlong=counts["overlong"],
        tokens=sum(sizes),
        longest=max(sizes, default=0),
        lengths=[bins[k] for k in range(max(bins, default=-1) + 1)],
        sources=[(source.path, len(part)) for source, part in zip(sources, kept, strict=True)],
        reasons=[row.reason for row in aside.rows[:3]],
    )


def _fingerprint(sources: Sequence[Source], examples: Sequence[Example], mixture: Mixture) -> str:
    sha = hashlib.sha256(json.dumps([[digests(s) for s in sources], mixture.weights, mixture.shuffle]).encode())
    for example in examples:
        sha.update(example.tokens_L.tobytes())
    return sha.hexdigest()
