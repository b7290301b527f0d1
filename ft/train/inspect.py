"""Rows as the model will see them, and what the data, its packing and its steps come to. No weights, no ranks."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from attrs import evolve, frozen
from rich.text import Text

from ft.data.dataset import Prepared
from ft.data.pack import pack, positions
from ft.data.prompts import Prompts
from ft.recipe import Recipe, total_steps
from ft.recipe.parts import Source
from ft.train import setup
from ft.train.setup import Rows
from ft.types import Context, Example, asked

if TYPE_CHECKING:
    from rich.console import Console

STEPS = 5  # steps whose packing is tried
LONG = 1200  # characters between two special tokens that are shown
DROPPED = 0.1  # share of rows above which dropping them is worth a warning
TRAINED, SPECIAL, OTHER = "bold green", "cyan", "dim"

# What cannot be seen, or would act on the terminal, as a picture of it.
_PICTURES = {**{c: 0x2400 + c for c in range(32)}, 0x7F: 0x2421, ord("\t"): "⇥", ord("\n"): "↵\n"}
_PLAIN = str.maketrans({"⟦": "[[", "⟧": "]]", "↵": "\\n", "·": "_", "⇥": "\\t"})


def inspect(recipe: Recipe, console: Console, *, rows: int = 3) -> None:
    """Print the first ``rows`` rows of the first step, the data's report, how they pack, and what is odd.

    Raises:
        FtError: whatever keeps the rows from being prepared, or packed.
    """

    def say(line: object = "", style: str = "") -> None:
        text = line if isinstance(line, Text) else Text(str(line), style)
        console.print(text if _unicode(console) else _in_ascii(text), soft_wrap=True)

    tokenizer, _ = setup.tokenizer_of(recipe, say)
    data = prepared(recipe, recipe.data.train, tokenizer, say)
    say("\ntrained tokens stand in ⟦ ⟧ (green); ↵ ends a line, ⇥ is a tab, · a space at an edge", OTHER)
    first = step_of(recipe, data, tokenizer, 0)
    for example in [as_marked(e, asked(recipe.method).head) for e in first[:rows]]:
        say()
        say(header(example), "bold")
        say(marked(example, tokenizer))
    say()
    for line in data.report.lines():
        say(line)
    if isinstance(data, Prompts):
        return
    for line in packing(recipe, data, tokenizer).lines():
        say(line)
    for line in oddities(data, tokenizer, recipe):
        say(f"warning: {line}", "bold yellow")


def prepared(recipe: Recipe, sources: Sequence[Source], tokenizer: Any, say: setup.Say) -> Rows:
    """Rows as a run prepares them, but nothing is written into its folder: malformed rows are put aside in passing."""
    if recipe.model.tiny and sources and sources == recipe.data.rehearsal:
        say(f"rehearsal: the rows are those of {', '.join(s.path for s in sources)}")
    with TemporaryDirectory(prefix="ft-") as place:
        return setup.reader(recipe)(
            sources, recipe.data, tokenizer, quarantine=Path(place) / "bad_rows.jsonl", announce=say
        )


def step_of(recipe: Recipe, data: Rows, tokenizer: Any, step: int) -> Sequence[Example]:
    """The examples that a run of this recipe sees in ``step``; of a method that samples answers, the prompts."""
    if isinstance(data, Prompts):
        return data.draw(step, recipe.batch.examples, recipe.seed)
    context = Context(data=data, examples=recipe.batch.examples, seed=recipe.seed, tokenizer=tokenizer)
    return recipe.method.examples(step, context)


def as_marked(example: Example, head: str) -> Example:
    """An example to be shown. A head that scores reads the token before each that the mask marks: that one is shown."""
    if head == "lm":
        return example
    return evolve(example, tokens_L=example.tokens_L[:-1], mask_L=example.mask_L[1:])


# A row ----------------------------------------------------------------------------------------------------------------


def header(example: Example) -> str:
    """Where a row stands, and how much of it is trained."""
    trained = int(example.mask_L[1:].sum())
    return f"{example.source}  {len(example):,} tokens, {trained:,} trained ({trained / max(1, len(example)):.0%})"


def marked(example: Example, tokenizer: Any) -> Text:
    """The row's text, decoded. Trained stretches are coloured and stand in ⟦ ⟧, special tokens are written out."""
    specials = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    specials |= {token for token in tokenizer.all_special_tokens if token}
    between = re.compile("(" + "|".join(map(re.escape, sorted(specials, key=len, reverse=True))) + ")")
    text = Text()
    for piece, trained in stretches(example, tokenizer):
        style = TRAINED if trained else OTHER
        parts = [part for part in (between.split(piece) if specials else [piece]) if part]
        shown = [(part, SPECIAL) if part in specials else (visible(part), style) for part in parts]
        text.append_text(Text.assemble(("⟦", style), *shown, ("⟧", style)) if trained else Text.assemble(*shown))
    return text


def stretches(example: Example, tokenizer: Any) -> Iterator[tuple[str, bool]]:
    """(text, trained) of each run of tokens that are all trained, or all not; together they are the whole text.

    A stretch is what decoding up to its end adds, for some decoders drop the space before a text's first word.
    """
    flags = [False, *(bool(flag) for flag in example.mask_L[1:])]  # nothing predicts the first token
    end, before = 0, ""
    for trained, run in groupby(flags):
        start, end = end, end + len(list(run))
        until = _decode(tokenizer, example.tokens_L[:end])
        own = until[len(before) :] if until.startswith(before) else _decode(tokenizer, example.tokens_L[start:end])
        before = until
        yield own, trained


def _decode(tokenizer: Any, tokens_L: Any) -> str:
    return tokenizer.decode(tokens_L.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def visible(piece: str) -> str:
    """Text with whitespace shown where it can be missed: line ends, tabs, spaces at edges. Long text is cut."""
    if len(piece) > LONG:
        half = LONG // 2
        return f"{_shown(piece[:half])} [... {len(piece) - LONG:,} characters not shown ...] {_shown(piece[-half:])}"
    return _shown(piece)


def _shown(piece: str) -> str:
    """Spaces become dots before a line's end, and at both ends of the text."""
    lines = [_dotted(line, line.rstrip(" "), end=True) for line in piece.split("\n")]
    lines[0] = _dotted(lines[0], lines[0].lstrip(" "), end=False)
    return "\n".join(lines).translate(_PICTURES)


def _dotted(line: str, bare: str, *, end: bool) -> str:
    dots = "·" * (len(line) - len(bare))
    return bare + dots if end else dots + bare


def _unicode(console: Console) -> bool:
    return console.encoding.lower().startswith("utf")


def _in_ascii(text: Text) -> Text:
    """Marks that any terminal has; colours are lost there."""
    return Text(text.plain.translate(_PLAIN).encode("ascii", "backslashreplace").decode())


# All rows -------------------------------------------------------------------------------------------------------------


@frozen(kw_only=True)
class Packing:
    """What a few steps come to on one rank. Sums over ``tried`` steps."""

    tried: int
    steps: int  # of the whole run
    rows: int
    batches: int
    budget: int  # positions that fit into one micro-batch
    inputs: int  # positions of the rows
    trained: int
    padded: int  # positions if each micro-batch's rows were padded to its longest

    def lines(self) -> list[str]:
        """For a terminal."""
        n = self.tried
        full = self.inputs / max(1, self.batches * self.budget)
        waste = 1 - self.inputs / max(1, self.padded)
        return [
            f"steps: {self.steps:,}; of the first {n}, each has {self.rows / n:,.0f} rows and "
            f"{self.inputs / n:,.0f} tokens, {self.trained / n:,.0f} of them trained",
            f"packing: {self.batches / n:.1f} micro-batches a step, {full:.0%} full (batch.tokens={self.budget:,}); "
            f"packed, no position is padding; if this model needs its rows padded, {waste:.0%} would be",
        ]


def packing(recipe: Recipe, data: Prepared, tokenizer: Any) -> Packing:
    """Pack the first steps as a run on one rank does.

    Raises:
        DataError: a row is longer than batch.tokens.
    """
    steps = total_steps(recipe, data.per_epoch)
    drawn = [step_of(recipe, data, tokenizer, step) for step in range(min(STEPS, steps))]
    packs = [p for examples in drawn for p in pack(examples, tokens=recipe.batch.tokens)]
    return Packing(
        tried=len(drawn),
        steps=steps,
        rows=sum(map(len, drawn)),
        batches=len(packs),
        budget=recipe.batch.tokens,
        inputs=sum(map(positions, packs)),
        trained=sum(int(example.mask_L[1:].sum()) for examples in drawn for example in examples),
        padded=sum(len(p) * (max(map(len, p)) - 1) for p in packs),
    )


def oddities(data: Prepared, tokenizer: Any, recipe: Recipe) -> list[str]:
    """What is allowed and seldom meant, in plain words."""
    report, found = data.report, []
    if report.trained == 0:
        found.append("no token is trained: the run would learn nothing; see data.mask")
    elif report.trained >= report.tokens - len(data) and recipe.data.mask != "all":  # all but each row's first
        found.append(
            "every token of every row is trained: right for plain text; in chats the model also learns to write the "
            "users' turns (see data.mask)"
        )
    if report.eos_trained == 0 and asked(recipe.method).head == "lm":
        found.append(
            f"the end-of-sequence token {tokenizer.eos_token!r} is trained in no row: the model does not learn to stop "
            "(see data.end_of_turn and data.append_eos; a chat template may end turns with another token)"
        )
    if doubled := double_bos(data, tokenizer):
        found.append(f"{doubled:,} rows hold {tokenizer.bos_token!r} twice in a row: text and template both add it")
    lost = report.bad + report.overlong + report.unlabelled + report.short
    if lost > DROPPED * report.read:
        found.append(f"{lost:,} of {report.read:,} rows ({lost / report.read:.0%}) are dropped; the counts say why")
    return found


def double_bos(data: Prepared, tokenizer: Any) -> int:
    """Rows in which two beginning-of-sequence tokens stand side by side."""
    bos, a = tokenizer.bos_token_id, data.arrays
    if bos is None or bos == tokenizer.eos_token_id:  # one token for both: an end and a beginning may meet
        return 0
    is_bos_T = a.tokens_T == bos
    first_T = (is_bos_T[:-1] & is_bos_T[1:]).nonzero()[0]
    row, next_row = (np.searchsorted(a.offsets_N1, at_T, side="right") for at_T in (first_T, first_T + 1))
    return len(np.unique(row[row == next_row]))
