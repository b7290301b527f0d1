"""A recipe as rows to read: path, type, value, default and documentation of every field, and what is changed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import attrs

from ft.recipe.docs import class_doc, field_docs
from ft.recipe.parts import Recipe
from ft.recipe.typed import classes, hints, is_protocol, join, members, name_of, spell

if TYPE_CHECKING:
    from rich.console import Console

REQUIRED = "(required)"


@attrs.frozen(kw_only=True)
class Row:
    """One field. ``value`` and ``default`` are written as an override would be."""

    path: str
    type: str
    value: str
    default: str
    doc: str
    changed: bool


def describe(recipe: Recipe) -> list[Row]:
    """Every field of the recipe, depth first, in the order of the classes. Fields without default are changed."""
    return list(_rows(recipe, ""))


def _rows(thing: Any, prefix: str) -> Iterator[Row]:
    cls, docs = type(thing), field_docs(type(thing))
    for f in attrs.fields(cls):
        value, tp, path = getattr(thing, f.name), hints(cls)[f.name], join(prefix, f.name)
        default = _default(f)
        part = attrs.has(type(value))
        if not part or [type(value)] != list(members(tp)):  # a part whose class is a choice has a row of its own
            same = type(value) is type(default) if part else value == default
            doc = docs.get(f.name, class_doc(type(value)) if part else "")
            yield Row(
                path=path,
                type=_spell(tp),
                value=write(value),
                default=REQUIRED if default is attrs.NOTHING else write(default),
                doc=doc,
                changed=not same,
            )
        if part:
            yield from _rows(value, path)


def _spell(tp: Any) -> str:
    return "method" if is_protocol(tp) else spell(tp)


def _default(f: Any) -> Any:
    """The value of a field that nobody set, after its converter."""
    value = f.default.factory() if isinstance(f.default, attrs.Factory) else f.default  # type: ignore[arg-type]
    return value if value is attrs.NOTHING or f.converter is None else f.converter(value)


def write(value: Any) -> str:
    """A value as one types it: none, true, 0.9,0.999, a class by its name, a Source by its path."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    if isinstance(value, Path):
        return value.as_posix()
    if isinstance(value, (tuple, list)):
        return ",".join(_item(v) for v in value) or "none"
    if isinstance(value, dict):
        return ",".join(f"{k}:{write(v)}" for k, v in value.items()) or "none"
    if attrs.has(type(value)):
        return type(value).__name__
    return name_of(value) if callable(value) else str(value) or "(empty)"


def _item(value: Any) -> str:
    """An item of a tuple: a Source by its path, and by what else of it is set."""
    if not attrs.has(type(value)):
        return write(value)
    fields = attrs.fields(type(value))
    required = " ".join(write(getattr(value, f.name)) for f in fields if f.default is attrs.NOTHING)
    others = [f for f in fields if f.default is not attrs.NOTHING and getattr(value, f.name) != _default(f)]
    extra = ", ".join(f"{f.name}={write(getattr(value, f.name))}" for f in others)
    return f"{required} ({extra})" if extra else required


def items(recipe: Recipe) -> list[Row]:
    """The fields of the classes that stand in tuples (Source in data.train), with N for the number of an item."""
    found: dict[type, list[str]] = {}
    for cls, path in _parts(recipe, ""):
        for name, tp in hints(cls).items():
            for inner in {c for m in members(tp) for a in get_args(m) for c in classes(a)}:
                found.setdefault(inner, []).append(join(path, name))
    return [row for cls, paths in found.items() for row in _blank_rows(cls, f"{paths[0]}.N")]


def _parts(thing: Any, prefix: str) -> Iterator[tuple[type, str]]:
    yield type(thing), prefix
    for f in attrs.fields(type(thing)):
        if attrs.has(type(value := getattr(thing, f.name))):
            yield from _parts(value, join(prefix, f.name))


def _blank_rows(cls: type, prefix: str) -> Iterator[Row]:
    for f in attrs.fields(cls):
        default = _default(f)
        text = REQUIRED if default is attrs.NOTHING else write(default)
        doc = field_docs(cls).get(f.name, "")
        yield Row(
            path=join(prefix, f.name), type=spell(hints(cls)[f.name]), value=text, default=text, doc=doc, changed=False
        )


def compare(before: Recipe, after: Recipe) -> list[tuple[str, str, str]]:
    """(path, before, after) of every field that differs."""
    old = {row.path: row.value for row in describe(before)}
    new = {row.path: row.value for row in describe(after)}
    paths = dict.fromkeys([*old, *new])
    return [(p, old.get(p, "-"), new.get(p, "-")) for p in paths if old.get(p) != new.get(p)]


# Printing -------------------------------------------------------------------------------------------------------------


def print_recipe(recipe: Recipe, console: Console) -> None:
    """The recipe as one table per part. ``*`` and bold type mark what differs from its default."""
    groups: dict[str, list[Row]] = {}
    for row in describe(recipe):
        head, _, rest = row.path.partition(".")
        part = head if rest or attrs.has(type(getattr(recipe, head))) else "run"
        groups.setdefault(part, []).append(row)
    for part, rows in groups.items():
        doc = "" if part in ("run", rows[0].path) else class_doc(type(getattr(recipe, part)))
        _print_part(part, doc, rows, console)
    _print_part("data.*.N", "each item of a tuple, by its number: data.train.0.weight=2", items(recipe), console)
    changed = sum(row.changed for rows in groups.values() for row in rows)
    console.print(f"* set by this recipe ({changed}); the others hold their default", style="dim", highlight=False)


def _print_part(part: str, doc: str, rows: Sequence[Row], console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    console.print(Text.assemble((part, "bold cyan"), (f"  {doc}" if doc else "", "dim")), highlight=False)
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold", max_width=max(16, console.width // 3))
    table.add_column()
    for row in rows:
        note = f" [default: {row.default}]" if row.changed and row.default != REQUIRED else ""
        style = "bold" if row.changed else "dim"
        table.add_row(
            "*" if row.changed else " ",
            Text(row.path, style=style),
            Text(row.value, style=style),
            Text.assemble((row.type, "cyan"), ". ", row.doc, note),
        )
    console.print(table)
    console.print()
