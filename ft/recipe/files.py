"""Recipe files: a Python file that ends in one name, ``recipe``, or the recipe.json that every run folder keeps.

A recipe file is code and runs as code. A recipe.json names classes and functions of installed modules, and functions
of recipe files, which then run too; it can name nothing but frozen attrs classes and plain functions, yet is worth no
more trust than whoever wrote it.
"""

from __future__ import annotations

import json
import re
import sys
import traceback
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

import attrs

from ft.errors import FtError, MissingFileError, RecipeError
from ft.recipe.parts import Recipe
from ft.recipe.typed import RECIPE_MODULE, build, hint, plain, reworded, unknown_field


def dump(recipe: Recipe) -> dict[str, Any]:
    """The recipe as JSON can hold it; RecipeError where a value is not of its declared type."""
    return plain(_strict(recipe), Recipe)


def dumps(recipe: Recipe) -> str:
    """The text of recipe.json."""
    return json.dumps(dump(recipe), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def restore(value: dict[str, Any]) -> Recipe:
    """The recipe that ``dump`` wrote."""
    return build(value, Recipe)


def load(path: Path | str) -> Recipe:
    """The recipe in a .py or .json file, every value checked against its declared type; named after the file if
    it has no name. Every error says file:line, or the file and the path inside the recipe."""
    path = Path(path)
    if not path.is_file():
        raise MissingFileError("no such recipe", where=str(path), fix=_near(path))
    if path.suffix not in (".py", ".json"):
        raise RecipeError("a recipe is a .py file, or the recipe.json of a run folder", where=str(path))
    recipe = _placed(_from_json if path.suffix == ".json" else _from_python, path)
    name = re.sub(r"[^\w.-]", "-", path.stem)
    return recipe if recipe.name else attrs.evolve(recipe, name=name)


def _strict(recipe: Recipe) -> Recipe:
    return build(plain(recipe, Recipe), Recipe)


def _placed(read: Any, path: Path) -> Recipe:
    """``read(path)``, with the file's name before the place of an error inside the recipe."""
    try:
        return read(path)
    except RecipeError as error:
        if error.where.startswith(str(path)):
            raise
        raise RecipeError(
            error.problem,
            where=f"{path}: {error.where}" if error.where else str(path),
            expected=error.expected,
            got=error.got,
            fix=error.fix,
        ) from error


def _near(path: Path) -> str:
    """Which recipe was meant: a run folder's recipe.json, or a file of nearly this name here or in recipes/."""
    if (path / "recipe.json").is_file():
        return f"name the file itself: {path / 'recipe.json'}"
    folders = dict.fromkeys((path.parent, Path("recipes")))  # its own neighbours first
    files = [f for folder in folders for f in sorted(folder.glob("*.py")) if not f.name.startswith("_")]
    near = get_close_matches(path.stem, [f.stem for f in files], n=1)
    if near:
        return f"did you mean {next(f for f in files if f.stem == near[0])}?"
    return f"recipes here: {', '.join(str(f) for f in files[:8])}" if files else ""


# JSON -----------------------------------------------------------------------------------------------------------------


def _from_json(path: Path) -> Recipe:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        line = getattr(error, "lineno", 1)
        raise RecipeError(f"not JSON: {getattr(error, 'msg', error)}", where=f"{path}:{line}") from error
    return restore(value)


# Python ---------------------------------------------------------------------------------------------------------------


def _from_python(path: Path) -> Recipe:
    module = _execute(path)
    recipe = getattr(module, "recipe", None)
    if isinstance(recipe, Recipe):
        return _strict(recipe)
    others = [name for name, value in vars(module).items() if isinstance(value, Recipe)]
    if hasattr(module, "recipe"):
        raise RecipeError(
            "`recipe` is not a Recipe", where=str(path), expected="recipe = Recipe(...)", got=repr(recipe)
        )
    raise RecipeError(
        "the file has no name `recipe`",
        where=str(path),
        expected="recipe = Recipe(...)",
        got=", ".join(f"{name} = Recipe(...)" for name in others),
    )


def executed(path: Path) -> ModuleType:
    """The file as the module it already became in this process; as a new one if it did not, or has changed since."""
    known = _known.get(path.resolve())
    return known[1] if known is not None and known[0] == path.read_bytes() else _execute(path)


_known: dict[Path, tuple[bytes, ModuleType]] = {}


def _execute(path: Path) -> ModuleType:
    """The file as a fresh module, which stays in sys.modules so that its classes can resolve their types.

    Its functions stay those of the first module of the same text, so that a recipe read twice is equal.
    """
    module, source = ModuleType(RECIPE_MODULE + re.sub(r"\W", "_", path.stem)), path.read_bytes()
    module.__file__ = str(path)
    sys.modules[module.__name__] = module
    try:
        exec(compile(source, str(path), "exec"), vars(module))
    except FtError:
        raise
    except SyntaxError as error:
        got = (error.text or "").strip()
        raise RecipeError(
            f"SyntaxError: {error.msg}", where=f"{error.filename or path}:{error.lineno}", got=got
        ) from error
    except (Exception, SystemExit) as error:
        raise RecipeError(_explained(error, module), where=f"{path}:{_line(error, path)}") from error
    if path.resolve() not in _known or _known[path.resolve()][0] != source:
        _known[path.resolve()] = (source, module)
    return module


def _line(error: BaseException, path: Path) -> int:
    """The last line of the recipe file that was running."""
    frames = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    return (frames[-1] or 0) if frames else 0


def _explained(error: BaseException, module: ModuleType) -> str:
    """What went wrong, in the words of recipes where attrs raised it."""
    message = str(error)
    if isinstance(error, TypeError) and (m := re.match(r"(\w+)\.__init__\(\) (.*)", message)):
        return _bad_call(m[1], m[2], module)
    if isinstance(error, ImportError) and (m := re.match(r"cannot import name '(\w+)' from 'ft'", message)):
        return f"ft has no name {m[1]!r}.{hint(m[1], sys.modules['ft'].__all__)}"
    if isinstance(error, NameError) and error.name:
        return f"{message}.{hint(error.name, vars(module))}"
    if isinstance(error, (ValueError, TypeError)) and (field := reworded(error))[0]:
        return f"{field[0]}: {field[1]}"
    return f"{type(error).__name__}: {message}"


def _bad_call(name: str, problem: str, module: ModuleType) -> str:
    """A class was called with names it does not have, without those it needs, or without names at all."""
    if (m := re.match(r"got an unexpected keyword argument '(\w+)'", problem)) and (cls := _class_called(name, module)):
        return unknown_field(cls, m[1])
    if m := re.match(r"missing \d+ required keyword-only arguments?: (.*)", problem):
        return f"{name} needs {m[1]}"
    if "positional argument" in problem:
        return f"{name} takes named values only: {name}(name=value, ...)"
    return f"{name}: {problem}"


def _class_called(name: str, module: ModuleType) -> type | None:
    homes = (module, sys.modules["ft"], sys.modules["ft.recipe.parts"])
    found = (getattr(home, name, None) for home in homes)
    return next((c for c in found if isinstance(c, type) and attrs.has(c)), None)
