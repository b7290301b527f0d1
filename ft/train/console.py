"""How a run looks while it trains: a progress bar in a terminal, the same facts as plain lines anywhere else."""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol, TextIO

from attrs import frozen

if TYPE_CHECKING:
    from rich.console import RenderableType

# Numbers with a form of their own, in the order in which they are shown; the others follow, as they are named.
_FORMS = {
    "loss": "loss {:.4f}",
    "grad_norm": "grad {:.3g}",
    "lr": "lr {:.2e}",
    "tokens_per_s": "{:,.0f} tok/s",
    "trained_share": "trained {:.0%}",
    "padding": "padding {:.0%}",
}
_HIDDEN = ("tokens", "step_s", "peak_bytes")


@frozen(kw_only=True)
class Pace:
    """Seconds per step, an average that forgets: a step counts half as much after ``HALF`` later ones."""

    total: float = 0.0  # weighted seconds
    weight: float = 0.0  # of the steps in it

    HALF = 20

    def add(self, seconds: float, steps: int = 1) -> Pace:
        """With ``steps`` more steps of ``seconds`` each."""
        kept = 0.5 ** (steps / self.HALF)
        return Pace(total=self.total * kept + seconds * (1 - kept), weight=self.weight * kept + 1 - kept)

    @property
    def seconds(self) -> float | None:
        return self.total / self.weight if self.weight else None


def eta(step: int, total: int, pace: Pace) -> float | None:
    """Seconds to the end; None before the first step was timed."""
    return None if pace.seconds is None else max(0, total - step) * pace.seconds


def clock(seconds: float) -> str:
    """Seconds as 59 s, 1:02 (minutes) or 1:02:03."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def facts(numbers: Mapping[str, float], *, left: float | None = None) -> str:
    """One line of a step's numbers. Bad steps show if there are any; what repeats a loss other than 0 does not."""
    parts = [form.format(numbers[name]) for name, form in _FORMS.items() if name in numbers]
    for name, value in numbers.items():
        known = name in _FORMS or name in _HIDDEN or (name != "loss" and value == numbers.get("loss") != 0)
        if not known and not (name == "bad_steps" and value == 0):
            parts.append(f"{name.replace('_', ' ')} {value:.4g}")
    if "peak_bytes" in numbers:
        parts.append(f"peak {numbers['peak_bytes'] / 1e9:.1f} GB")
    return "  ".join(parts) + (f"  eta {clock(left)}" if left is not None else "")


def table(values: Mapping[str, object]) -> str:
    """Names and values in two columns."""
    width = max((len(name) for name in values), default=0)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in values.items())


def peak_bytes() -> float:
    """Most memory this rank has held: the GPU's where one is in use, else the process's resident set."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return float(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak if sys.platform == "darwin" else peak * 1024)


class Screen(Protocol):
    """Where lines go. ``show`` is for numbers that the next ones replace, ``say`` for what should stay."""

    def open(self, step: int, total: int) -> None: ...
    def show(self, step: int, text: str) -> None: ...
    def say(self, text: str) -> None: ...
    def close(self) -> None: ...


def screen(stream: TextIO) -> Screen:
    """A bar where ``stream`` is a terminal, else lines."""
    return Bar(stream) if stream.isatty() else Lines(stream)


class Lines:
    """Plain lines, each out at once: what nohup, SLURM and a pipe should see."""

    def __init__(self, stream: TextIO):
        self.stream, self.total = stream, 0

    def open(self, step: int, total: int) -> None:
        self.total = total

    def show(self, step: int, text: str) -> None:
        self.say(f"step {step}/{self.total}  {text}")

    def say(self, text: str) -> None:
        print(text, file=self.stream, flush=True)

    def close(self) -> None:
        pass


class Bar:
    """A bar and a line of facts below it; whatever is said scrolls by above."""

    def __init__(self, stream: TextIO):
        from rich.console import Console
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

        self.text = ""
        self.console = Console(file=stream, highlight=False)
        self.bar = Progress(BarColumn(bar_width=None), MofNCompleteColumn(), TimeElapsedColumn(), expand=True)
        self.live = Live(get_renderable=self._render, console=self.console, refresh_per_second=4)

    def _render(self) -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        return Group(self.bar, Text(self.text, no_wrap=False))  # said outright, or it is cut whenever `say` prints

    def open(self, step: int, total: int) -> None:
        self.task = self.bar.add_task("", total=total, completed=step)
        self.live.start()

    def show(self, step: int, text: str) -> None:
        self.text = text
        self.bar.update(self.task, completed=step)

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    def close(self) -> None:
        self.live.stop()
