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
    """1 where the last formula of the completion equals the column ``answer``, as math-verify judges it; else 0.

    None where math-verify finds no formula in ``answer``. It stops itself after 5 seconds a formula, by an alarm,
    which works in a main thread alone; workers have one.
    """
    from math_verify import parse, verify

    def score(said: str, right: Any) -> float | None:
        expected = parse(f"${right}$") or parse(str(right))
        return float(verify(expected, parse(said))) if expected else None

    return [score(*row) for row in zip(completions, answer, strict=True)]


def unit_tests(
    completions: Sequence[str], tests: Sequence[Any], seconds: float = 5.0, share: bool = False, **columns: Any
) -> Scores:
    """1 where the last block of Python in a completion passes the column ``tests``; else 0, or the share it passes.

    ``tests`` is a list of statements (``assert double(2) == 4``), or one text, which is one test. ``seconds`` are for
    one completion; ``judging.timeout`` must have room for a worker's share of them. Read in ``ft.rollout.sandbox``
    what the sandbox does and does not keep away.
    """
    from ft.rollout import sandbox

    def score(said: str, asked: Any) -> float | None:
        wanted = [asked] if isinstance(asked, str) else list(asked or ())
        if not wanted:
            return None
        passed = sandbox.run(sandbox.code_of(said), wanted, seconds=seconds).passed / len(wanted)
        return passed if share else float(passed == 1)

    return [score(*row) for row in zip(completions, tests, strict=True)]


def reward_model(
    completions: Sequence[str], prompts: Sequence[Any], folder: str, batch: int = 8, max_tokens: int = 2048,
    device: str = "cpu", **columns: Any,
) -> Scores:  # fmt: skip
    """The score of a reward model in ``folder``: one of ft's, whole or an adapter, or any that transformers loads.

    Each worker holds a copy (``judging.workers``). Loading counts towards ``judging.timeout``.
    """
    from ft.rollout.scoring_model import scores

    return list(scores(prompts, completions, folder, batch=batch, max_tokens=max_tokens, device=device))


def matches(completions: Sequence[str], pattern: str, **columns: Any) -> Scores:
    """1 where the regular expression ``pattern`` matches the whole completion (``.`` takes line ends too); else 0."""
    rule = re.compile(pattern, re.DOTALL)
    return [float(rule.fullmatch(said) is not None) for said in completions]


def short(completions: Sequence[str], completion_ids: Sequence[Sequence[int]], most: int, **columns: Any) -> Scores:
    """1 up to ``most`` tokens, falling in a line to 0 at twice as many."""
    return [min(1.0, max(0.0, 2 - len(ids) / most)) for ids in completion_ids]


def last_number(completions: Sequence[str], answer: Sequence[Any], **columns: Any) -> Scores:
    """1 where the last number in the completion equals the column ``answer``; else 0."""
    found = [re.findall(r"-?\s?\d[\d,]*(?:\.\d+)?", said) for said in completions]
    said = [re.sub(r"[\s,]", "", numbers[-1]) if numbers else None for numbers in found]
    return [float(one is not None and float(one) == float(right)) for one, right in zip(said, answer, strict=True)]


def environment(completions: Sequence[str], environment: Sequence[float | None], **columns: Any) -> Scores:
    """What the recipe's environment says of each answer."""
    return list(environment)


def _last(said: str) -> str:
    """What stands in the last <answer>...</answer> of a completion; all of it where there is none."""
    found = re.findall(r"<answer>(.*?)</answer>", said, re.DOTALL)
    return found[-1] if found else said
