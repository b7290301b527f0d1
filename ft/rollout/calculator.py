"""An example of an environment: the model may ask a calculator before it answers.

It writes <calc>17 * 23</calc>, reads what that is, and goes on; a turn without that is its answer.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Mapping
from typing import Any

from attrs import evolve, field, frozen, validators

_OPERATORS: dict[type, Any] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.USub: operator.neg, ast.UAdd: operator.pos,
}  # fmt: skip


@frozen(kw_only=True)
class Asked:
    """Of one answer: the row's answer, how often the calculator was asked, and the last turn without a question."""

    right: str
    asked: int = 0
    said: str = ""


@frozen(kw_only=True)
class Calculator:
    """1 where the last number of the last turn is the column ``answer``; less ``cost`` for each question."""

    most: int = field(default=3, validator=validators.ge(1))
    """Questions before the answer must come."""
    cost: float = field(default=0.0, validator=validators.ge(0.0))
    """Taken off for each question."""

    def reset(self, columns: Mapping[str, Any]) -> Asked:
        return Asked(right=str(columns["answer"]))

    def step(self, state: Asked, said: str) -> tuple[Asked, str | None]:
        found = re.findall(r"<calc>(.*?)</calc>", said, re.DOTALL)
        if not found or state.asked == self.most:
            return evolve(state, said=said), None
        return evolve(state, asked=state.asked + 1), f"<result>{calculate(found[-1])}</result>"

    def reward(self, state: Asked) -> float:
        numbers = re.findall(r"-?\d+(?:\.\d+)?", state.said.replace(",", ""))
        return float(bool(numbers) and float(numbers[-1]) == float(state.right)) - self.cost * state.asked


def calculate(text: str) -> str:
    """The value of an arithmetic expression, or "error". Its numbers and its length are bounded; nothing is executed.

    >>> calculate("17 * (2 + 3)")
    '85'
    """
    try:
        value = _value(ast.parse(text.strip()[:200], mode="eval").body)
        return str(value) if isinstance(value, int) else f"{value:.10g}"
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError, TypeError):
        return "error"


def _value(node: ast.AST) -> int | float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value  # type: ignore[return-value]
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.operand))
    raise ValueError("not arithmetic")
