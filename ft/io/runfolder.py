"""Whether a run may use a folder: a new run needs a new one, a resumed run must be the run that began there.

    recipe.json   the recipe of the latest attempt
    run.json      the data's fingerprint, and of each attempt: command, versions, commit, changes of the recipe

``ft.io.lock`` keeps two runs from using it at once.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from attrs import frozen

from ft.errors import CheckpointError, RunFolderError
from ft.io.files import write_json_atomic
from ft.io.lock import LOCK, Notice, RunLock, now, to_stderr

__all__ = ["Opened", "RunLock", "claim", "diff", "environment", "git_commit", "has_checkpoints", "open_run"]

RECIPE, RUN = "recipe.json", "run.json"
PACKAGES = ("ft", "torch", "transformers", "peft", "tokenizers", "safetensors", "numpy", "triton")

# What may change between attempts: how long, where, how fast and how closely watched, but not what is learnt.
FREE = (
    *("steps", "epochs", "name", "save", "log", "eval", "parallel", "batch.tokens", "data.eval", "data.cache"),
    *("model.checkpointing", "model.kernels", "model.attention", "model.layout"),
    *(f"sampler.{part}" for part in ("url", "python", "port", "arguments", "devices", "transfer", "concurrency")),
    *("sampler.startup", "sampler.timeout", "sampler.patience", "judging.workers", "judging.timeout"),
)


@frozen(kw_only=True)
class Opened:
    """A run folder that is ours to write into. ``attempt`` counts from 1; ``resume`` says there are checkpoints."""

    folder: Path
    attempt: int
    resume: bool


def claim(folder: Path, *, resume: bool) -> None:
    """Refuse an occupied folder. Cheap, so that it can come before any long preparation.

    Raises:
        RunFolderError: names the three ways out.
    """
    if has_checkpoints(folder):
        if not resume:
            raise _occupied(folder, "it holds checkpoints of an earlier run")
    elif not (folder / RUN).is_file() and (strange := _strangers(folder)):
        raise _occupied(folder, f"it holds files that no run has written: {', '.join(strange[:5])}")


def open_run(
    folder: Path,
    *,
    resume: bool,
    recipe: Mapping[str, Any],
    fingerprint: str,
    claimed: bool = False,
    notice: Notice = to_stderr,
    command: list[str] | None = None,
) -> Opened:
    """Decide whether this run may use ``folder``, and write recipe.json and run.json. Call it under the lock.

    A new folder starts a run. A folder with checkpoints is only used with ``resume``, and only by the same run:
    the recipe may differ in ``FREE`` fields, the data's ``fingerprint`` not at all. An attempt that ended before
    its first checkpoint is started over: its metrics are kept under another name.

    Args:
        claimed: ``claim`` was called earlier, so what else lies here now was written by this run.

    Raises:
        RunFolderError: the folder is occupied, or holds something that is not a run.
        CheckpointError: lists what changed since the run began.
    """
    if not claimed:
        claim(folder, resume=resume)
    folder.mkdir(parents=True, exist_ok=True)
    recipe = json.loads(json.dumps(recipe, default=str))
    saved = has_checkpoints(folder)
    state = _read(folder / RUN) if saved or (folder / RUN).is_file() else {"data": fingerprint, "attempts": []}
    attempts = state["attempts"]
    changes: dict[str, list[Any]] = {}
    if saved:
        changes = _same_run(folder, state, recipe, fingerprint)
        for path, (old, new) in changes.items():
            notice(f"recipe changed since the last attempt: {path}: {_short(old)} -> {_short(new)}")
    elif attempts:
        _start_over(folder, len(attempts), notice)
    elif resume:
        notice(f"{folder} holds nothing to resume; starting at step 0")
    attempt = {"attempt": len(attempts) + 1, "resumed": saved, **environment(command), "changes": changes}
    write_json_atomic(folder / RECIPE, recipe)
    write_json_atomic(folder / RUN, {"data": fingerprint, "attempts": [*attempts, attempt]})
    return Opened(folder=folder, attempt=len(attempts) + 1, resume=saved)


def has_checkpoints(folder: Path) -> bool:
    """Whether anything was saved here, whole or not; half-removed folders do not count."""
    return any("." not in p.name for p in folder.glob("step-*"))


def _strangers(folder: Path) -> list[str]:
    known = (LOCK, RECIPE, RUN, "bad_rows.jsonl", "ft-error-")  # of an attempt that ended before it began
    return sorted(p.name for p in folder.iterdir() if not p.name.startswith(known)) if folder.is_dir() else []


def _occupied(folder: Path, why: str) -> RunFolderError:
    return RunFolderError(
        f"the run folder is occupied: {why}",
        where=str(folder),
        fix=f"continue that run with --resume, choose another folder with save.dir=..., or delete {folder}",
    )


def _start_over(folder: Path, attempt: int, notice: Notice) -> None:
    """Nothing was saved, so nothing but the record of it is lost, and that is kept."""
    text = f"attempt {attempt} in {folder} ended before its first checkpoint; starting over at step 0"
    if (folder / "metrics.jsonl").is_file():
        kept = folder / f"metrics.attempt-{attempt}.jsonl"
        shutil.move(folder / "metrics.jsonl", kept)
        text += f" (its metrics are in {kept.name})"
    notice(text)


def _same_run(
    folder: Path, state: Mapping[str, Any], recipe: Mapping[str, Any], fingerprint: str
) -> dict[str, list[Any]]:
    """The changes between attempts, once none of them touches what is learnt."""
    changes = diff(_read(folder / RECIPE), recipe)
    fixed = [f"{path}: {_short(old)} -> {_short(new)}" for path, (old, new) in changes.items() if not is_free(path)]
    if fixed:
        raise CheckpointError(
            "the recipe is not the one this run began with:\n    " + "\n    ".join(fixed),
            where=str(folder / RECIPE),
            fix="undo these changes, or start a new run in another folder with save.dir=...",
        )
    if state["data"] != fingerprint:
        raise CheckpointError(
            "the training data is not what this run began with: its rows, or how they become tokens, have changed",
            where=str(folder / RUN),
            expected=f"fingerprint {state['data']}",
            got=fingerprint,
            fix="restore the data, or start a new run in another folder with save.dir=...",
        )
    return changes


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise RunFolderError(
            "a file of the run cannot be read", where=str(path), got=str(error), fix="restore it from a copy"
        ) from error


def diff(old: Any, new: Any, path: str = "") -> dict[str, list[Any]]:
    """Path of each leaf that differs -> [old, new]. A list is one leaf; what is absent is None."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = [*old, *(k for k in new if k not in old)]
        parts = [diff(old.get(k), new.get(k), f"{path}.{k}" if path else str(k)) for k in keys]
        return {k: v for part in parts for k, v in part.items()}
    return {} if old == new else {path: [old, new]}


def is_free(path: str) -> bool:
    return any(path == free or path.startswith(free + ".") for free in FREE)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


# --- what a run remembers of its surroundings


def environment(command: list[str] | None = None) -> dict[str, Any]:
    """Where and with what this attempt runs. No environment variables: they hold secrets."""
    return {
        "started": now(),
        "command": sys.argv if command is None else command,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "folder": os.getcwd(),
        "commit": git_commit(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: v for name in PACKAGES if (v := _version(name))},
    }


def git_commit(folder: Path | None = None) -> str | None:
    """Commit of the checkout, ending in "-dirty" where files were changed; None outside of one."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):  # no git here: the record says null
        return None
    return done.stdout.strip() or None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
