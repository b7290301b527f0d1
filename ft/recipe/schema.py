"""JSON Schema (2020-12) of recipes: what ``restore`` accepts, for editors and other programs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import attrs

from ft.recipe.docs import class_doc, field_docs
from ft.recipe.parts import Recipe
from ft.recipe.typed import classes, hints, is_callable, is_open, is_protocol, members, name_of, plain

_LEAVES = {bool: "boolean", int: "integer", float: "number", str: "string", Path: "string", type(None): "null"}
_BOUNDS = {">": "exclusiveMinimum", ">=": "minimum", "<": "exclusiveMaximum", "<=": "maximum"}
_NAME = r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"
_FUNCTION = r"^([A-Za-z_][\w.]*|.+\.py):[A-Za-z_]\w*$"  # recipe files hold functions too


def schema(recipe: Recipe | None = None) -> dict[str, Any]:
    """The schema of all recipes, or, where one is given, of those with its method."""
    defs: dict[str, Any] = {}
    methods = () if recipe is None else tuple(dict.fromkeys(_methods(recipe)))
    root = _class(Recipe, defs, methods)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "ft recipe"} | root | {"$defs": defs}


def _methods(thing: Any) -> Iterator[type]:
    """The classes that stand where a protocol is declared, methods inside methods too."""
    for name, tp in hints(type(thing)).items():
        value = getattr(thing, name)
        if attrs.has(type(value)):
            if any(is_protocol(m) for m in members(tp)):
                yield type(value)
            yield from _methods(value)


def _class(cls: type, defs: dict[str, Any], methods: Sequence[type], named: bool = False) -> dict[str, Any]:
    """An object with the fields of ``cls``; with "type" where the class is a choice."""
    docs, properties = field_docs(cls), {}
    for f in attrs.fields(cls):
        tp = hints(cls)[f.name]
        properties[f.name] = _type(tp, defs, methods) | _limits(f.validator)
        if f.name in docs:
            properties[f.name]["description"] = docs[f.name]
        if f.default is not attrs.NOTHING and not isinstance(f.default, attrs.Factory):  # type: ignore[arg-type]
            properties[f.name]["default"] = plain(f.default, tp)
    required = [f.name for f in attrs.fields(cls) if f.default is attrs.NOTHING]
    if named:
        properties, required = {"type": {"const": name_of(cls)}} | properties, ["type", *required]
    return {
        "type": "object",
        "description": class_doc(cls),
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


def _type(tp: Any, defs: dict[str, Any], methods: Sequence[type]) -> dict[str, Any]:
    if len(members(tp)) > 1:
        return {"anyOf": [_member(m, defs, methods, is_open(tp)) for m in members(tp)]}
    return _member(tp, defs, methods, is_open(tp))


def _member(tp: Any, defs: dict[str, Any], methods: Sequence[type], named: bool) -> dict[str, Any]:
    origin, args = get_origin(tp), get_args(tp)
    if tp in _LEAVES:
        return {"type": _LEAVES[tp]}
    if origin is Literal:
        return {"enum": list(args)}
    if is_protocol(tp):
        return _protocol(tp, defs, methods)
    if classes(tp):
        return _reference(tp, defs, methods, named)
    if is_callable(tp):
        return {"type": "string", "pattern": _FUNCTION}
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return _array(origin, args, defs, methods)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {"type": "object", "additionalProperties": _type(args[1], defs, methods)}
    return {}


def _array(origin: type, args: tuple[Any, ...], defs: dict[str, Any], methods: Sequence[type]) -> dict[str, Any]:
    if origin is not tuple or args[-1] is ...:
        return {"type": "array", "items": _type(args[0], defs, methods)}
    items = [_type(a, defs, methods) for a in args]
    return {"type": "array", "prefixItems": items, "minItems": len(args), "maxItems": len(args)}


def _reference(cls: type, defs: dict[str, Any], methods: Sequence[type], named: bool) -> dict[str, Any]:
    key = name_of(cls) if named else cls.__qualname__
    if key not in defs:
        defs[key] = {}  # stands while the class is being described, should it contain itself
        defs[key] = _class(cls, defs, methods, named)
    return {"$ref": f"#/$defs/{key}"}


def _protocol(tp: type, defs: dict[str, Any], methods: Sequence[type]) -> dict[str, Any]:
    """The classes in use that fulfil ``tp``; any class, by its name, where none is."""
    wanted = [name for name in vars(tp) if not name.startswith("_")]
    fitting = [m for m in methods if all(hasattr(m, name) for name in wanted)]
    if fitting:
        found = [_reference(m, defs, methods, named=True) for m in fitting]
        return found[0] if len(found) == 1 else {"anyOf": found}
    named = {"type": {"type": "string", "pattern": _NAME}}
    return {"type": "object", "properties": named, "required": ["type"]}


def _limits(validator: Any) -> dict[str, Any]:
    """What attrs' validators say, in JSON Schema's words."""
    if validator is None:
        return {}
    if hasattr(validator, "_validators"):
        return {k: v for inner in validator._validators for k, v in _limits(inner).items()}
    if hasattr(validator, "validator"):
        return _limits(validator.validator)
    if hasattr(validator, "compare_op"):
        return {_BOUNDS[validator.compare_op]: validator.bound}
    if hasattr(validator, "options"):
        return {"enum": list(validator.options)}
    if hasattr(validator, "pattern"):
        return {"pattern": f"^(?:{validator.pattern.pattern})$"}
    return {}
