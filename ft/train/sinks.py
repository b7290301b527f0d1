"""Trackers besides metrics.jsonl. Each runs behind a queue in a thread of its own, and may fail or hang unharmed."""

from __future__ import annotations

import queue
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from ft.errors import RecipeError

Facts = Mapping[str, object]
Numbers = Mapping[str, float]


class Sink(Protocol):
    """A tracker. ``step`` in ``start`` is where the run takes up; 0 for a new one."""

    def start(self, facts: Facts, step: int) -> None: ...
    def write(self, step: int, numbers: Numbers) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """Event files in the run folder: `tensorboard --logdir <run folder>`."""

    def __init__(self, folder: Path):
        self.folder = folder / "tensorboard"

    def start(self, facts: Facts, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What an earlier attempt wrote beyond the step at which this one takes up is hidden.
        self.writer = SummaryWriter(str(self.folder), purge_step=step + 1 if step else None, flush_secs=10)
        self.writer.add_text("facts", "\n".join(f"- {name}: {value}" for name, value in facts.items()), step)

    def write(self, step: int, numbers: Numbers) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class Trackio:
    """Local first: `trackio show`. A resumed run goes on under its name."""

    def __init__(self, project: str, name: str):
        self.project, self.name = project, name

    def start(self, facts: Facts, step: int) -> None:
        import trackio  # pyright: ignore[reportMissingImports]

        self.trackio: Any = trackio
        config = {name: str(value) for name, value in facts.items()}
        trackio.init(project=self.project, name=self.name, config=config, resume="allow", embed=False)

    def write(self, step: int, numbers: Numbers) -> None:
        self.trackio.log(dict(numbers), step=step)

    def close(self) -> None:
        self.trackio.finish()


class Wandb:
    """Weights & Biases. The run's id is kept in the run folder, so that a resumed run is the same run there."""

    def __init__(self, project: str, name: str, folder: Path):
        self.project, self.name, self.folder = project, name, folder

    def start(self, facts: Facts, step: int) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        path = self.folder / "wandb.id"
        if not path.is_file():
            path.write_text(secrets.token_hex(8))
        # Its own copy of the console would fight with ours; a prompt for a key must not wait for ever.
        settings = wandb.Settings(console="off", login_timeout=30)
        self.run: Any = wandb.init(
            project=self.project,
            name=self.name,
            dir=str(self.folder),
            id=path.read_text(),
            resume="allow",
            config={name: str(value) for name, value in facts.items()},
            settings=settings,
        )
        # Its own step never goes back; ours does when a run is taken up from a checkpoint.
        self.run.define_metric("*", step_metric="step")

    def write(self, step: int, numbers: Numbers) -> None:
        self.run.log({"step": step, **numbers})

    def close(self) -> None:
        self.run.finish()


class Queued:
    """A sink that never stops and never delays a run.

    Calls are put into a queue and made by a thread. The first failure is announced and ends the sink; when the
    queue is full, lines are left out, which is announced once; ``close`` waits ``patience`` seconds at most.
    """

    def __init__(
        self, name: str, sink: Sink, notice: Callable[[str], None], *, size: int = 1000, patience: float = 15.0
    ):
        self.name, self.sink, self.notice, self.patience = name, sink, notice, patience
        self.left_out = 0
        self.failed = False
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue(size)
        self._thread = threading.Thread(target=self._work, daemon=True, name=f"sink-{name}")
        self._thread.start()

    def start(self, facts: Facts, step: int) -> None:
        facts = dict(facts)
        self._put(lambda: self.sink.start(facts, step))

    def write(self, step: int, numbers: Numbers) -> None:
        numbers = dict(numbers)
        self._put(lambda: self.sink.write(step, numbers))

    def close(self) -> None:
        """Let it finish what is queued, for a while."""
        try:
            self._queue.put(None, timeout=0 if self.failed else self.patience)
            self._thread.join(self.patience)
        except queue.Full:
            pass  # the thread is alive and stuck, as is said below; or it has ended and was announced
        if self._thread.is_alive():
            self.notice(f"the tracker {self.name} did not finish within {self.patience:g} s and is left behind")
        elif self.left_out and not self.failed:
            self.notice(f"the tracker {self.name} misses {self.left_out} lines; metrics.jsonl has all of them")

    def _put(self, call: Callable[[], None]) -> None:
        if self.failed:
            return
        try:
            self._queue.put_nowait(call)
        except queue.Full:
            self.left_out += 1
            if self.left_out == 1:
                self.notice(f"the tracker {self.name} is too slow; lines are left out (metrics.jsonl has all of them)")

    def _work(self) -> None:
        try:
            while (call := self._queue.get()) is not None:
                call()
            self.sink.close()
        except BaseException as error:  # a tracker may even call sys.exit
            self.failed = True
            self.notice(
                f"the tracker {self.name} failed and is dropped, the run goes on: {type(error).__name__}: {error}"
            )


def make(names: Sequence[str], *, folder: Path, project: str, name: str, notice: Callable[[str], None]) -> list[Queued]:
    """The trackers a recipe names, each behind its queue.

    Raises:
        RecipeError: one is not installed; better now than after an hour of training.
    """
    makers: dict[str, Callable[[], Sink]] = {
        "tensorboard": lambda: TensorBoard(folder),
        "trackio": lambda: Trackio(project, name),
        "wandb": lambda: Wandb(project, name, folder),
    }
    for tracker in names:
        if tracker not in makers:
            raise RecipeError(f"no tracker {tracker!r}", where="log.sinks", expected=" | ".join(makers))
        if find_spec(tracker) is None:
            raise RecipeError(
                f"the tracker {tracker!r} is not installed", where="log.sinks", fix="pip install 'ft[trackers]'"
            )
    return [Queued(tracker, makers[tracker](), notice) for tracker in names]
