"""Reward functions that ship: ``reward(completions, **columns) -> scores``, one number or None for each completion."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

Scores = list[float | None]


def reasoning_gym(completions: Sequence[str], dataset: Sequence[str], entry: Sequence[Any], **columns: Any) -> Scores:
    """The task's own scorer, 0 to 1. ``dataset`` names the task, ``entry`` is its entry (an object, or JSON text)."""
    import reasoning_gym as gym

    def score(said: str, name: str, asked: Any) -> float:
        task = json.loads(asked) if isinstance(asked, str) else asked
        judge: Any = gym.get_score_answer_fn(name)
        return float(judge(answer=_last(said).strip(), entry=task))

    return [score(*row) for row in zip(completions, dataset, entry, strict=True)]


def exact(completions: Sequence[str], answer: Sequence[Any], **columns: Any) -> Scores:
    """1 where the answer, without spaces around it, is the column ``answer``; else 0."""
    return [float(_last(said).strip() == str(right).strip()) for said, right in zip(completions, answer, strict=True)]


def math_verify(completions: Sequence[str], answer: Sequence[Any], **columns: Any) -> Scores:
    """1 where the last formula of the completion equals the column ``answer``, as math-verify judges it; else 0."""
    from math_verify import parse, verify

    return [float(verify(parse(str(right)), parse(said))) for said, right in zip(completions, answer, strict=True)]


def matches(completions: Sequence[str], pattern: str, **columns: Any) -> Scores:
    """1 where the regular expression ``pattern`` matches the whole completion (``.`` takes line ends too); else 0."""
    rule = re.compile(pattern, re.DOTALL)
    return [float(rule.fullmatch(said) is not None) for said in completions]


def short(completions: Sequence[str], completion_ids: Sequence[Sequence[int]], most: int, **columns: Any) -> Scores:
    """1 up to ``most`` tokens, falling in a line to 0 at twice as many."""
    return [min(1.0, max(0.0, 2 - len(ids) / most)) for ids in completion_ids]


def _last(said: str) -> str:
    """What stands in the last <answer>...</answer> of a completion; all of it where there is none."""
    found = re.findall(r"<answer>(.*?)</answer>", said, re.DOTALL)
    return found[-1] if found else said


def last_number(completions: Sequence[str], answer: Sequence[Any], **columns: Any) -> Scores:
    """1 where the last number in the completion equals the column ``answer``; else 0."""
    found = [re.findall(r"-?\s?\d[\d,]*(?:\.\d+)?", said) for said in completions]
    said = [re.sub(r"[\s,]", "", numbers[-1]) if numbers else None for numbers in found]
    return [float(one is not None and float(one) == float(right)) for one, right in zip(said, answer, strict=True)]
