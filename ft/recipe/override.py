"""Overrides: ``optim.lr=2e-5``, ``--optim.lr 2e-5``, ``adapter=none``, ``schedule=linear``, ``data.train=a.jsonl,b``.

A text is first read as the plain value that the field's type suggests (``read``; it never fails), then built by the
strict rules of ``ft.recipe.typed``. All overrides are laid on the recipe's plain form, in order, and the whole is
built once, so that values that only fit together can be given in any order.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import attrs

from ft.errors import RecipeError
from ft.recipe.parts import Recipe
from ft.recipe.typed import (
    build,
    classes,
    concrete,
    hints,
    is_open,
    is_protocol,
    join,
    members,
    name_of,
    plain,
    spell,
    unknown_field,
)

_NONE = ("none", "null")
_BOOL = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def override(recipe: Recipe, arguments: Sequence[str]) -> Recipe:
    """The recipe with ``arguments`` applied; later ones win. RecipeError names the path of what does not fit."""
    whole = plain(recipe, Recipe)
    for path, text in pairs(arguments):
        _apply(whole, path, text)
    return build(whole, Recipe)


def pairs(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """(path, text) of each override: ``a.b=v``, ``--a.b=v`` or ``--a.b v``."""
    found, rest = [], list(arguments)
    while rest:
        word = rest.pop(0)
        name, equals, text = word.removeprefix("--").partition("=")
        if not equals and word.startswith("--") and rest and not rest[0].startswith("--"):
            equals, text = "=", rest.pop(0)
        if not equals or not re.fullmatch(r"[A-Za-z_][\w.-]*", name):
            raise RecipeError(
                f"{word!r} is not an override", expected="name=value, such as optim.lr=2e-5, or --optim.lr 2e-5"
            )
        found.append((name.replace("-", "_"), text))
    return found


def _apply(whole: dict[str, Any], path: str, text: str) -> None:
    """Lay one override on the plain recipe, in place."""
    *parents, last = path.split(".")
    node: Any = whole
    tp, at = Recipe, ""
    for name in parents:
        tp, at, parent = _declared(node, tp, name, at), join(at, name), node
        node = parent[int(name)] if isinstance(parent, list) else parent.get(name)
        if node is None:
            raise RecipeError(_closed(at, tp, path), where=f"{path}={text}")
    declared = _declared(node, tp, last, at)
    value = read(text, declared)
    _check(value, declared, path, text)
    if isinstance(node, list):
        node[int(last)] = value
    else:
        node[last] = value


def _declared(node: Any, tp: Any, name: str, at: str) -> Any:
    """The declared type of ``name`` inside ``node``, a plain value that stands where ``tp`` is declared."""
    path = join(at, name)
    if isinstance(node, list):
        if not (name.isdecimal() and int(name) < len(node)):
            have = f"0 to {len(node) - 1}" if node else "nothing"
            raise RecipeError(f"{at} holds {len(node)} items: {have}", where=path)
        args = get_args(next(m for m in members(tp) if get_args(m)))
        return args[0] if len(args) == 1 or args[-1] is ... else args[int(name)]
    if isinstance(node, dict) and not (classes(tp) or is_open(tp)):
        return next(get_args(m)[1] for m in members(tp) if len(get_args(m)) == 2)
    if not isinstance(node, dict):
        raise RecipeError(f"{at} is {spell(tp)} and has no fields", where=path)
    cls = concrete(node, tp, at)
    if name not in hints(cls):
        raise RecipeError(unknown_field(cls, name), where=path)
    return hints(cls)[name]


def _closed(at: str, tp: Any, path: str) -> str:
    """Why a path through None leads nowhere, and what opens it."""
    options = [c.__name__ for c in classes(tp)]
    if not options:
        return f"{at} is {spell(tp)} and has no fields"
    return f"{at} is none here; write {at}={options[0]} before {path}=..."


def _check(value: Any, declared: Any, path: str, text: str) -> None:
    """Refuse a wrong value now, while the text that was typed is at hand. Ranges wait until the whole is built."""
    if isinstance(value, str) and any(is_protocol(m) for m in members(declared)):
        fix = f"override its fields, as {path}.name=value, or edit the file"
        raise RecipeError("the recipe file chooses the class", where=f"{path}={text}", fix=fix)
    if classes(declared) == [declared] and not isinstance(value, dict):
        fields = ", ".join(f.name for f in attrs.fields(declared))
        raise RecipeError(f"{path} is a group; set its fields: {fields}", where=f"{path}={text}")
    try:
        build(value, declared, path)
    except RecipeError as error:
        if error.where == path and error.problem.startswith("expected"):
            raise RecipeError(_as_typed(error.problem, value, text), where=f"{path}={text}") from error
        raise


def _as_typed(problem: str, value: Any, text: str) -> str:
    """Show the text itself, not what it was read as."""
    return problem.replace(f"got {value!r}", f"got {text!r}", 1)


# Text -> plain --------------------------------------------------------------------------------------------------------


def read(text: str, tp: Any) -> Any:
    """The plain value that ``text`` stands for where ``tp`` is declared; the text itself where it fits nothing."""
    if text[:1] in ("[", "{") and not _accepts_text(tp):
        return _json(text)
    for member in members(tp):
        value = _read_one(text, member, tp)
        if value is not text:
            return value
    return text


def _accepts_text(tp: Any) -> bool:
    return any(m in (str, Path) for m in members(tp))


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _read_one(text: str, member: Any, tp: Any) -> Any:
    word, origin = text.strip().lower(), get_origin(member)
    if member is type(None):
        return None if word in _NONE else text
    if member is bool:
        return _BOOL.get(word, text)
    if member is int:
        return _int(text)
    if member is float:
        return _float(text)
    if origin is Literal:
        return next((c for c in get_args(member) if str(c) == text.strip()), text)
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return _items(text, member)
    if classes(member) and len(members(tp)) > 1 and word == member.__name__.lower():
        return {"type": name_of(member)} if is_open(tp) else {}
    return text


def _int(text: str) -> int | str:
    """1000, 1_000 and 1e3; neither 1.5 nor 1.0."""
    m = re.fullmatch(r"\s*([+-]?\d[\d_]*)(?:[eE]\+?(\d{1,2}))?\s*", text)
    return int(m[1].replace("_", "")) * 10 ** int(m[2] or 0) if m else text


def _float(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _items(text: str, tp: Any) -> list[Any]:
    """Comma-separated items; a class with one required field is made from that field: a Source from its path."""
    if text.strip().lower() in (*_NONE, ""):
        return []
    parts = [p.strip() for p in text.strip().removeprefix("(").removesuffix(")").split(",")]
    args = get_args(tp)
    kinds = args if len(args) == len(parts) and ... not in args else [args[0]] * len(parts)
    return [_item(p, kind) for p, kind in zip(parts, kinds, strict=True) if p]


def _item(text: str, tp: Any) -> Any:
    if classes(tp) != [tp]:
        return read(text, tp)
    required = [f.name for f in attrs.fields(tp) if f.default is attrs.NOTHING]
    return {required[0]: text} if len(required) == 1 else text
