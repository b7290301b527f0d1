"""Plain JSON values and typed ones, by the types that attrs classes declare.

``build`` is strict: no number is made from a text, no bool from an int, no list from a string. It serves recipe
files, recipe.json and overrides alike, so that one place decides what a field accepts. A class is named in the plain
form ("type": "pkg.mod:Name") only where the declared type leaves a choice: a union of classes, or a protocol. cattrs
coerces at the leaves and iterates strings as tuples; made strict it needs a hook of ours for every kind of type and a
walk over its errors, which is more code than this walk.
"""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from math import isfinite
from pathlib import Path
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

import attrs

from ft.errors import RecipeError

RECIPE_MODULE = "ft_recipe_"  # begins the names of the modules that recipe files become
_NoneType = type(None)
_WORDS: dict[Any, str] = {int: "int", float: "float", bool: "true or false", str: "text", Path: "path", Any: "anything"}


# Types ---------------------------------------------------------------------------------------------------------------


@cache
def hints(cls: type) -> dict[str, Any]:
    """Declared type of each field of an attrs class."""
    try:
        found = get_type_hints(cls)
    except NameError as error:
        raise RecipeError(
            f"the type of a field of {cls.__name__} cannot be read: {error}",
            where=sys.modules[cls.__module__].__file__ or cls.__module__,
            fix="import the type at the top of that file, outside `if TYPE_CHECKING`",
        ) from error
    return {f.name: found[f.name] for f in attrs.fields(cls)}


def members(tp: Any) -> tuple[Any, ...]:
    """The alternatives of a union; a type that is none is its own only alternative."""
    return get_args(tp) if get_origin(tp) in (Union, types.UnionType) else (tp,)


def is_protocol(tp: Any) -> bool:
    return isinstance(tp, type) and getattr(tp, "_is_protocol", False)


def is_callable(tp: Any) -> bool:
    return tp is Callable or get_origin(tp) is Callable


def is_frozen(cls: type) -> bool:
    return getattr(cls.__setattr__, "__name__", "") == "_frozen_setattrs"  # what attrs puts there; `define` does not


def classes(tp: Any) -> list[type]:
    """The attrs classes among the alternatives of ``tp``."""
    return [m for m in members(tp) if isinstance(m, type) and attrs.has(m)]


def is_open(tp: Any) -> bool:
    """Whether a plain value must name its class: several classes may stand here, or any that fits a protocol."""
    return len(classes(tp)) > 1 or any(is_protocol(m) for m in members(tp))


def spell(tp: Any) -> str:
    """A type in words: "int or none", "tuple of text", "one of 'a', 'b'"."""
    if len(members(tp)) > 1:
        return listed([spell(m) for m in members(tp)], last="or")
    origin, args = get_origin(tp), get_args(tp)
    if tp is _NoneType or tp is None:
        return "none"
    if origin is Literal:
        return "one of " + ", ".join(repr(a) for a in args)
    if is_callable(tp):
        return "function"
    if origin is tuple and not (len(args) == 2 and args[1] is ...):
        return "(" + ", ".join(spell(a) for a in args) + ")"
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return f"{origin.__name__.lower()} of {spell(args[0])}"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return f"{origin.__name__.lower()} of {spell(args[1])}"
    return _WORDS.get(tp) or getattr(tp, "__name__", str(tp))


def listed(words: Sequence[str], *, last: str = "and") -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + f" {last} {words[-1]}"


def hint(word: object, names: Iterable[str]) -> str:
    """Which of ``names`` was meant, as the end of a sentence; empty where none is near."""
    if not isinstance(word, str):
        return ""
    by_lower = {n.lower(): n for n in names}
    near = get_close_matches(word.lower(), by_lower, n=1)
    return f" Did you mean {by_lower[near[0]]!r}?" if near else ""


def unknown_field(cls: type, name: str) -> str:
    """The message for a name that is no field: "AdamW has no field 'lrr'. Did you mean 'lr'? It has: lr, ..."."""
    names = [f.name for f in attrs.fields(cls)]
    return f"{cls.__name__} has no field {name!r}.{hint(name, names)} It has: {', '.join(names) or 'none'}."


# Names of classes and functions ---------------------------------------------------------------------------------------


def name_of(thing: Any) -> str:
    """ "pkg.mod:Name" of a class or function at the top of a module, "path/x.py:name" of a function in a recipe."""
    if _in_recipe(thing) and isinstance(thing, types.FunctionType):
        return f"{_beside(thing.__code__.co_filename)}:{thing.__qualname__}"
    return f"{thing.__module__}:{thing.__qualname__}"


def _in_recipe(thing: Any) -> bool:
    return thing.__module__.startswith(RECIPE_MODULE)


def _beside(file: str) -> str:
    """The path from the current folder, where the file lies in it."""
    path, here = Path(file).resolve(), Path.cwd()
    return (path.relative_to(here) if path.is_relative_to(here) else path).as_posix()


def find(name: str, path: str) -> Any:
    """The class or function that ``name_of`` named; only what the module itself defines.

    A recipe file is looked for from the current folder, and runs once more in a process that has not read it.
    """
    if in_file := re.fullmatch(r"(.+\.py):([A-Za-z_]\w*)", name):
        return _find_in_recipe(in_file[1], in_file[2], path)
    if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name):
        wrong(path, 'a name as "package.module:Name"', name)
    module, attribute = name.split(":")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise RecipeError(
            f"cannot find {name!r}: {error}",
            where=path,
            fix="what a recipe names lives in a module that can be imported; functions may stand in the recipe file",
        ) from error
    if getattr(found, "__module__", None) != module:
        raise RecipeError(f"{name!r} is not defined in {module}", where=path)
    return found


def _find_in_recipe(file: str, attribute: str, path: str) -> Any:
    from ft.recipe.files import executed

    if not Path(file).is_file():
        raise RecipeError(
            f"cannot find {file}:{attribute}: there is no such file",
            where=path,
            fix="start from the folder that the run was started from, with the recipe file where it was",
        )
    found = getattr(executed(Path(file)), attribute, None)
    if not isinstance(found, types.FunctionType) or name_of(found) != f"{_beside(file)}:{attribute}":
        raise RecipeError(f"{file} defines no function {attribute!r}", where=path)
    return found


# Plain -> typed -------------------------------------------------------------------------------------------------------


def wrong(path: str, expected: str, got: Any, note: str = "") -> NoReturn:
    raise RecipeError(f"expected {expected}, got {got!r}{'.' + note if note else ''}", where=path)


def build(value: Any, tp: Any, path: str = "") -> Any:
    """The typed value that a plain one stands for; RecipeError with its path where it does not fit ``tp``."""
    if tp is Any:
        return value
    if len(members(tp)) > 1:
        return _union(value, tp, path)
    origin, args = get_origin(tp), get_args(tp)
    if origin is Literal:
        return _literal(value, tp, path)
    if is_protocol(tp) or (isinstance(tp, type) and attrs.has(tp)):
        return _class(value, tp, path)
    if is_callable(tp):
        return _function(value, path)
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return _sequence(value, tp, path)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(value, Mapping) or not all(isinstance(k, str) for k in value):
            wrong(path, spell(tp), value)
        return {k: build(v, args[1], join(path, k)) for k, v in value.items()}
    return _leaf(value, tp, path)


def join(path: str, name: object) -> str:
    return f"{path}.{name}" if path else str(name)


def _leaf(value: Any, tp: Any, path: str) -> Any:
    if type(value) is tp and (tp is not float or isfinite(value)):
        return value
    if tp is float and type(value) is int:
        return float(value)
    if tp is Path and isinstance(value, (str, Path)):
        return Path(value)
    if tp in (None, _NoneType) and value is None:
        return None
    wrong(path, ("finite " if tp is float and type(value) is float else "") + spell(tp), value)


def _literal(value: Any, tp: Any, path: str) -> Any:
    choices = get_args(tp)
    if any(type(value) is type(c) and value == c for c in choices):
        return value
    wrong(path, spell(tp), value, hint(value, [c for c in choices if isinstance(c, str)]))


def _function(value: Any, path: str) -> Any:
    found = find(value, path) if isinstance(value, str) else value
    if not isinstance(found, types.FunctionType):
        wrong(path, 'a function, as "package.module:name"', value)
    return found


def _sequence(value: Any, tp: Any, path: str) -> Any:
    origin, args = get_origin(tp), get_args(tp)
    ragged = origin is not tuple or (len(args) == 2 and args[1] is ...)
    if not isinstance(value, (list, tuple)) or not (ragged or len(value) == len(args)):
        wrong(path, spell(tp), value)
    kinds = [args[0]] * len(value) if ragged else args
    items = [build(v, kind, join(path, i)) for i, (v, kind) in enumerate(zip(value, kinds, strict=True))]
    return items if origin is list else tuple(items)


def _union(value: Any, tp: Any, path: str) -> Any:
    if isinstance(value, Mapping) and (classes(tp) or is_open(tp)):
        return _class(value, tp, path)
    failures = []
    for member in members(tp):
        try:
            return build(value, member, path)
        except RecipeError as error:
            failures.append(error)
    for error in failures:  # one that fails further in says more than "none of these"
        if error.where != path or "Did you mean" in error.problem:
            raise error
    wrong(path, spell(tp), value, hint(value, [c.__name__ for c in classes(tp)]))


def concrete(value: Any, tp: Any, path: str) -> type:
    """The attrs class that a plain mapping stands for."""
    named = value.get("type")
    if named is None:
        if is_open(tp):
            raise RecipeError('needs "type", the class, as "package.module:Name"', where=path)
        return classes(tp)[0]
    if not isinstance(named, str):
        wrong(join(path, "type"), 'a name as "package.module:Name"', named)
    known = {name_of(c): c for c in classes(tp)}
    if named in known:
        return known[named]
    if not any(is_protocol(m) for m in members(tp)):
        wrong(path, spell(tp), named)
    cls = find(named, path)
    if not (isinstance(cls, type) and attrs.has(cls) and is_frozen(cls)):
        wrong(path, "a frozen attrs class", named)
    _fulfils(cls, tp, path)
    return cls


def _fulfils(cls: type, tp: Any, path: str) -> None:
    protocol = next(m for m in members(tp) if is_protocol(m))
    lacking = [name for name in vars(protocol) if not name.startswith("_") and not hasattr(cls, name)]
    if lacking:
        raise RecipeError(f"{cls.__name__} is no {protocol.__name__}: it lacks {listed(lacking)}", where=path)


def _class(value: Any, tp: Any, path: str) -> Any:
    if not isinstance(value, Mapping):
        wrong(path, spell(tp), value)
    cls = concrete(value, tp, path)
    kinds = hints(cls)
    given = {k: v for k, v in value.items() if k != "type"}
    for name in given:
        if name not in kinds:
            raise RecipeError(unknown_field(cls, name), where=join(path, name))
    for f in attrs.fields(cls):
        if f.default is attrs.NOTHING and f.name not in given:
            raise RecipeError(f"{cls.__name__} needs {f.name!r}", where=join(path, f.name))
    return construct(cls, {k: build(v, kinds[k], join(path, k)) for k, v in given.items()}, path)


def construct(cls: type, values: Mapping[str, Any], path: str) -> Any:
    """``cls(**values)``; what a validator says is put as "optim.lr: must be > 0, got -1"."""
    try:
        return cls(**values)
    except (ValueError, TypeError) as error:
        name, problem = reworded(error)
        raise RecipeError(problem, where=join(path, name) if name else path) from error


def reworded(error: Exception) -> tuple[str, str]:
    """Field and message of an attrs validator's error; no field where the error is not a validator's."""
    message = str(error.args[0]) if error.args else str(error)
    field = re.match(r"'(\w+)' (?=must|does)", message)
    if not field:
        return "", message
    rest = message[field.end() :]
    if "must match regex" in rest and len(error.args) == 4:
        return field[1], f"must match {error.args[2].pattern}, got {error.args[3]!r}"
    for pattern in (r"(must .*) \(got (.*)\)", r"(must [^:]*): (.*)"):
        if m := re.fullmatch(pattern, rest, re.DOTALL):
            return field[1], f"{_bare(m[1])}, got {_bare(m[2])}"
    return field[1], rest


def _bare(text: str) -> str:
    """-1 for -1.0, as people write it."""
    return re.sub(r"(?<=\d)\.0\b(?!\d)", "", text)


# Typed -> plain -------------------------------------------------------------------------------------------------------


def plain(value: Any, tp: Any, path: str = "") -> Any:
    """What JSON can hold of ``value``, which stands where ``tp`` is declared. Wrong leaves are left for ``build``."""
    if isinstance(value, Path):
        return value.as_posix()
    if attrs.has(type(value)):
        return _plain_class(value, tp, path)
    if isinstance(value, Mapping):
        inner = next((get_args(m)[1] for m in members(tp) if len(get_args(m)) == 2), Any)
        return {k: plain(v, inner, join(path, k)) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        kinds = _element_types(tp, len(value))
        return [plain(v, kind, join(path, i)) for i, (v, kind) in enumerate(zip(value, kinds, strict=True))]
    if any(is_callable(m) for m in members(tp)) and callable(value):
        return _importable(value, path)
    return value


def _element_types(tp: Any, n: int) -> Sequence[Any]:
    args = next((get_args(m) for m in members(tp) if get_origin(m) not in (None, Literal)), ())
    if not args or args[-1] is ... or len(args) != n:
        return [args[0] if args else Any] * n
    return args


def _plain_class(value: Any, tp: Any, path: str) -> dict[str, Any]:
    cls = type(value)
    head = {"type": _importable(cls, path)} if is_open(tp) or cls not in classes(tp) else {}
    return head | {name: plain(getattr(value, name), kind, join(path, name)) for name, kind in hints(cls).items()}


def _importable(thing: Any, path: str) -> str:
    """The stored name; refuses what another process could not find again."""
    name = name_of(thing)
    if _in_recipe(thing) and isinstance(thing, types.FunctionType):
        if thing.__qualname__.isidentifier():
            return name
    elif not _in_recipe(thing) and getattr(sys.modules.get(thing.__module__), thing.__qualname__, None) is thing:
        return name
    raise RecipeError(
        f"{thing.__qualname__} is defined where no other process can import it",
        where=path,
        expected="a class or function at the top of a module that can be imported, or a function of the recipe file",
        got=name,
        fix="move it out of the recipe into a module beside it, and import it from there",
    )
