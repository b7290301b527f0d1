"""Documentation of fields: the string below each one in the source of its class."""

from __future__ import annotations

import ast
import inspect
import sys
from functools import cache


@cache
def field_docs(cls: type) -> dict[str, str]:
    """{field: text} of an attrs class; empty where its source is not at hand."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        docs |= _class_docs(base.__module__).get(base.__qualname__, {})
    return docs


def class_doc(cls: type) -> str:
    """The first line of the docstring."""
    return (inspect.getdoc(cls) or "").partition("\n")[0]


@cache
def _class_docs(module: str) -> dict[str, dict[str, str]]:
    file = getattr(sys.modules.get(module), "__file__", None)
    if not file or not file.endswith(".py"):
        return {}
    with open(file, "rb") as source:
        tree = ast.parse(source.read())
    return {node.name: _docs_in(node) for node in tree.body if isinstance(node, ast.ClassDef)}


def _docs_in(node: ast.ClassDef) -> dict[str, str]:
    docs = {}
    for statement, below in zip(node.body, node.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and (text := _string(below)):
            docs[statement.target.id] = inspect.cleandoc(text)
    return docs


def _string(node: ast.stmt) -> str:
    value = node.value if isinstance(node, ast.Expr) else None
    return value.value if isinstance(value, ast.Constant) and isinstance(value.value, str) else ""
