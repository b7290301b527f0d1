"""Who may import whom: five floors, and an import only ever goes down. Read from the source, nothing is imported.

Floors: 5 methods, cli, commands; 4 train, rollout; 3 models, data, losses; 2 io, types, recipe; 1 kernels, dist,
errors. ``ft/__init__.py`` is the list of public names and is exempt; nothing inside ft imports it.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from attrs import frozen

ROOT = Path(__file__).parents[1]
ROOMS = [
    ("kernels", "dist", "errors"),
    ("io", "types", "recipe"),
    ("models", "data", "losses"),
    ("train", "rollout"),
    ("methods", "cli", "commands", "__main__"),
]
FLOOR = {room: floor for floor, rooms in enumerate(ROOMS, start=1) for room in rooms}

# Packages that only some rooms may import; a file may be named where its whole room may not.
ONLY = {
    "torch.distributed": ("dist", "models", "io", "train", "commands/ranks"),
    "transformers": ("data", "models", "rollout", "commands/kernels/peers"),
    "vllm": ("rollout",),
}
# Modules of ft/data that make tensors; the others read rows and text.
TENSORS = ("data/pack",)


@frozen
class Import:
    """``target`` is a dotted module, or a name in one; ``typing`` where it stands under TYPE_CHECKING."""

    target: str
    line: int
    typing: bool = False


def offences(path: str, source: str) -> list[str]:
    """What the file at ``path`` (as "ft/data/rows.py") imports and may not, as "ft/data/rows.py:3: why"."""
    checks = _recipe_rules if path.startswith("recipes/") else _ft_rules
    tree = ast.parse(source)
    return [f"{path}:{i.line}: {why}" for i in imports(tree, path) for why in checks(path, i)]


def imports(tree: ast.AST, path: str, typing: bool = False) -> Iterator[Import]:
    """Every import of a file, also inside functions, and every use of ``torch.distributed`` by its dots."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (Import(a.name, node.lineno, typing) for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, path)
            yield from (Import(f"{base}.{a.name}", node.lineno, typing) for a in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            yield Import("torch.distributed", node.lineno, typing)
        elif isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            yield from imports(ast.Module(body=node.body, type_ignores=[]), path, typing=True)
            yield from imports(ast.Module(body=node.orelse, type_ignores=[]), path, typing)
        else:
            yield from imports(node, path, typing)


def _absolute(node: ast.ImportFrom, path: str) -> str:
    if not node.level:
        return node.module or ""
    package = path.split("/")[: -node.level]
    return ".".join([*package, *([node.module] if node.module else [])])


def _home(path: str) -> str:
    """ "data/rows" of "ft/data/rows.py"."""
    return path.removeprefix("ft/").removesuffix(".py").removesuffix("/__init__")


def _room(home: str) -> str:
    return home.partition("/")[0]


def _within(target: str, package: str) -> bool:
    return target == package or target.startswith(package + ".")


def _ft_rules(path: str, found: Import) -> Iterator[str]:
    home = _home(path)
    if _within(found.target, "ft"):
        yield from _floor_rules(_room(home), found)
    else:
        yield from _package_rules(home, found)


def _floor_rules(room: str, found: Import) -> Iterator[str]:
    other = [*found.target.split("."), ""][1]
    if other not in FLOOR:
        yield f"{found.target} is a public name: import it from its own room"
    elif other == room or (other == "types" and found.typing):
        return
    elif FLOOR[other] > FLOOR[room]:
        yield f"{room} (floor {FLOOR[room]}) imports {other} (floor {FLOOR[other]})"
    elif room == "losses" and other != "types":
        yield f"losses imports {other}: only torch and ft.types are allowed"
    elif FLOOR[other] == FLOOR[room] == 3:
        yield f"{room} imports {other}: rooms of floor 3 share through types and io"


def _package_rules(home: str, found: Import) -> Iterator[str]:
    room, package = _room(home), found.target.partition(".")[0]
    for name, allowed in ONLY.items():
        if _within(found.target, name) and room not in allowed and home not in allowed:
            yield f"{name} is only for {', '.join(allowed)}"
    if room == "losses" and package != "torch" and package not in sys.stdlib_module_names:
        yield f"losses imports {package}: only torch and ft.types are allowed"
    if room == "data" and package == "torch" and home not in TENSORS and not found.typing:
        yield f"torch is only for {', '.join(TENSORS)} in ft/data"
    if (
        room in ("recipe", "errors", "types", "cli")
        and package in ("torch", "numpy", "transformers")
        and not found.typing
    ):
        yield f"{package} makes `ft --help` slow: {room} must be light"


def _recipe_rules(path: str, found: Import) -> Iterator[str]:
    if not _within(found.target, "ft"):
        yield f"a recipe imports only ft, not {found.target}"


def files() -> list[Path]:
    return [p for p in sorted((ROOT / "ft").rglob("*.py")) if p != ROOT / "ft" / "__init__.py"] + sorted(
        (ROOT / "recipes").glob("*.py")
    )


@pytest.mark.parametrize("path", files(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_imports_only_go_down(path: Path):
    found = offences(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))
    assert not found, "\n".join(found)


def test_every_room_has_a_floor():
    rooms = {_room(_home(p.relative_to(ROOT).as_posix())) for p in files() if ROOT / "ft" in p.parents}
    assert rooms <= set(FLOOR)
    assert len(files()) > 20, "the files were not found"


@pytest.mark.parametrize(
    ("path", "source", "message"),
    [
        ("ft/kernels/x.py", "from ft.io.weights import resolve", "kernels (floor 1) imports io (floor 2)"),
        ("ft/kernels/x.py", "def f():\n  import ft.train.loop", "kernels (floor 1) imports train (floor 4)"),
        ("ft/kernels/x.py", "from ft.types import Batch", "kernels (floor 1) imports types (floor 2)"),
        ("ft/kernels/x/reference.py", "from ...io import y", "kernels (floor 1) imports io (floor 2)"),
        (
            "ft/models/x.py",
            "from ft.data.pack import pack",
            "models imports data: rooms of floor 3 share through types and io",
        ),
        ("ft/data/x.py", "from ft import losses", "data imports losses: rooms of floor 3 share through types and io"),
        ("ft/data/x.py", "if TYPE_CHECKING:\n  import ft.models.policy", "data imports models: rooms of floor 3"),
        ("ft/io/x.py", "if TYPE_CHECKING:\n  from ft.train import loop", "io (floor 2) imports train (floor 4)"),
        ("ft/train/x.py", "from ft.methods.sft import SFT", "train (floor 4) imports methods (floor 5)"),
        ("ft/train/x.py", "from ft import SFT", "ft.SFT is a public name: import it from its own room"),
        ("ft/losses/x.py", "from ft.io import weights", "losses imports io: only torch and ft.types are allowed"),
        ("ft/losses/x.py", "import numpy as np", "losses imports numpy: only torch and ft.types are allowed"),
        ("ft/rollout/x.py", "from torch import distributed", "torch.distributed is only for dist, models, io, train,"),
        ("ft/methods/x.py", "import torch\ntorch.distributed.barrier()", "torch.distributed is only for dist, models"),
        ("ft/commands/x.py", "import torch.distributed.run", "torch.distributed is only for dist, models, io, train"),
        ("ft/train/x.py", "from transformers import AutoModel", "transformers is only for data, models, rollout"),
        ("ft/models/x.py", "import vllm.entrypoints", "vllm is only for rollout"),
        ("ft/data/rows.py", "import torch", "torch is only for data/pack in ft/data"),
        ("ft/recipe/x.py", "def f():\n  import torch", "torch makes `ft --help` slow: recipe must be light"),
        ("recipes/x.py", "import torch", "a recipe imports only ft, not torch"),
        ("recipes/x.py", "from pathlib import Path", "a recipe imports only ft, not pathlib.Path"),
    ],
)
def test_a_planted_offence_is_found(path: str, source: str, message: str):
    (found,) = offences(path, source)
    line = source.count("\n") + 1
    assert found.startswith(f"{path}:{line}: {message}")


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("ft/kernels/x.py", "if TYPE_CHECKING:\n  from ft.types import Batch"),
        ("ft/recipe/x.py", "from ft.types import Method"),
        ("ft/data/pack.py", "import torch"),
        ("ft/data/x.py", "if TYPE_CHECKING:\n  from torch import Tensor"),
        ("ft/losses/x.py", "import math\nimport torch\nfrom ft.types import Batch\nfrom ft.losses.sft import nll"),
        ("ft/train/x.py", "import torch.distributed as dist\nfrom ft.rollout import x"),
        ("ft/commands/ranks.py", "from torch.distributed import run"),
        ("ft/methods/x.py", "from ft import losses"),
        ("ft/rollout/x.py", "import vllm\nimport transformers"),
        ("recipes/x.py", "from ft import Recipe"),
    ],
)
def test_what_is_allowed_is_not_an_offence(path: str, source: str):
    assert offences(path, source) == []
