"""Scored answers as they are kept: a few of each step in <run folder>/rollouts.jsonl, and two for the terminal.

A line is one answer: step, source (the prompt's row), prompt (its last message), text, reward (null: none), parts by
reward function, finish ("stop" or "length"), length in tokens, and policy_step, the age of the weights that wrote it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from attrs import define, field

from ft.train.log import Appender, json_line, truncate
from ft.types import Rollout

FILE = "rollouts.jsonl"
Hook = Callable[[int, Sequence[Rollout]], None]


@define(kw_only=True, eq=False)
class Record:
    """Keeps answers on the first rank, and hands all of them to a hook. What fails is announced, and given up."""

    folder: Path
    most: int  # lines of a step
    first: bool  # of the ranks
    notice: Callable[[str], None]
    hook: Hook | None = None
    latest: Sequence[Rollout] = ()
    file: Appender | None = field(default=None, init=False)

    def begin(self, step: int) -> None:
        """Go on after ``step``: later lines of an earlier attempt are removed."""
        if self.first:
            truncate(self.folder / FILE, step)

    def add(self, step: int, rollouts: Sequence[Rollout]) -> None:
        """The answers of the step after ``step`` others; it counts from 1 in the file, as in metrics.jsonl."""
        if not self.first:
            return
        self.latest = rollouts
        self._keep(step + 1, rollouts)
        if self.hook is not None:
            self._call(self.hook, step + 1, rollouts)

    def _keep(self, step: int, rollouts: Sequence[Rollout]) -> None:
        try:
            for rollout in spread(rollouts, self.most):
                self.file = self.file or Appender(self.folder / FILE)
                self.file.write(json_line(line(step, rollout)))
        except OSError as error:
            self.most = 0
            self.notice(f"cannot write {self.folder / FILE}: {error.strerror}; no more answers are kept there")

    def _call(self, hook: Hook, step: int, rollouts: Sequence[Rollout]) -> None:
        try:
            hook(step, rollouts)
        except Exception as error:  # whatever a user's function raises
            self.hook = None
            self.notice(f"judging.hook failed at step {step} ({type(error).__name__}: {error}) and is not called again")

    def samples(self) -> str:
        """The best and the worst of the last answers, a line each; what was told is not told again."""
        chosen, self.latest = spread(self.latest, min(2, self.most)), ()
        return "\n".join(f"  {short(line(0, rollout))}" for rollout in chosen)

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None


def spread(rollouts: Sequence[Rollout], most: int) -> list[Rollout]:
    """At most ``most`` of them, evenly from the best to the worst; those without a reward stand last."""
    ranked = sorted(rollouts, key=lambda r: (r.reward is None, -(r.reward or 0.0)))
    if len(ranked) <= most:
        return ranked
    return [ranked[round(i * (len(ranked) - 1) / max(1, most - 1))] for i in range(most)]


def line(step: int, rollout: Rollout) -> dict[str, Any]:
    """What the file says of an answer."""
    asked = (rollout.prompt.columns or {}).get("prompt") or [{}]
    return {
        "step": step, "source": rollout.prompt.source, "prompt": asked[-1].get("content", ""), "text": rollout.text,
        "reward": rollout.reward, "parts": dict(rollout.parts), "finish": rollout.finish,
        "length": len(rollout.tokens_L), "policy_step": rollout.policy_step,
    }  # fmt: skip


def short(kept: dict[str, Any], width: int = 100) -> str:
    """One line: reward, the end of the prompt, and the answer's beginning and end."""
    reward = "  none" if kept["reward"] is None else f"{float(kept['reward']):6.3g}"
    prompt, text = json.dumps(kept["prompt"], ensure_ascii=False), json.dumps(kept["text"], ensure_ascii=False)
    cut = " (cut off)" if kept["finish"] == "length" else ""
    return f"{reward}  {middle(prompt, width // 2)} -> {middle(text, width)}{cut}"


def middle(text: str, width: int) -> str:
    """The text without its middle where it is longer than ``width``."""
    half = (width - 5) // 2
    return text if len(text) <= width else f"{text[:half]} ... {text[-half:]}"


def read(folder: Path) -> Iterator[dict[str, Any]]:
    """The lines of a run's file; one that was cut short by a kill is left out."""
    for text in (folder / FILE).read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(text)
        except ValueError:
            continue
