"""Checkpoints: folders of safetensors and JSON that are whole or absent, whenever the process is killed.

    run/step-000100/
        weights.safetensors  optimizer.safetensors   one file per stem, whole tensors
        meta.json            what the loop keeps besides tensors
        manifest.json        bytes and SHA-256 of each file; written last
    run/best.json            the step that no retention removes

A save writes `step-000100.tmp-<hex>/`, forces it to disk, renames it, and only then removes older ones, each of
which is first renamed to `.trash-<hex>`: a name without such an ending is always a whole checkpoint. Tensors are
written whole, by one rank, so any number of ranks can read them.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from attrs import frozen

from ft.errors import CapacityError, CheckpointError
from ft.io.files import Written, file_sha256, json_text, sync_folder, write_file, write_json_atomic
from ft.io.lock import Notice, to_stderr
from ft.io.stream import Entry, Tensors, drain, file_bytes, in_order, write_tensors

FORMAT = "ft-checkpoint-1"
MANIFEST, META, BEST = "manifest.json", "meta.json", "best.json"
_NAME = re.compile(r"step-(\d{6,})")
_LEFTOVER = re.compile(r"(step-\d{6,})\.(tmp|trash)-[0-9a-f]+")


@frozen(kw_only=True)
class Checkpoint:
    """A checkpoint found whole. Tensors are read when asked for."""

    path: Path
    step: int
    meta: dict[str, Any]

    def open(self, stem: str) -> Tensors:
        """The tensors of ``<stem>.safetensors``."""
        path = self.path / f"{stem}.safetensors"
        if not path.is_file():
            raise CheckpointError("the checkpoint has no such file", where=str(path))
        return Tensors(path)

    def __contains__(self, stem: str) -> bool:
        return (self.path / f"{stem}.safetensors").is_file()


# --- saving


def save(
    run: Path,
    step: int,
    files: Mapping[str, Iterable[Entry]],
    meta: Mapping[str, Any],
    *,
    documents: Mapping[str, Any] | None = None,
    keep: int = 2,
    best: int | None = None,
    writer: bool = True,
    notice: Notice = to_stderr,
) -> Path:
    """Save step ``step`` of a run, then remove all but the ``keep`` newest checkpoints and the best.

    Checkpoints of later steps, from before the run went back to an earlier one, are removed too, with a notice.

    Args:
        files: file stem -> its tensors. Tensors are fetched one at a time, in the same order on every rank.
        meta: JSON values. Non-finite floats are kept in Python's spelling (NaN, Infinity).
        documents: further JSON files, name -> value, such as the config another library wants beside the weights.
        best: the best step so far, which may be this one; None keeps what best.json says.
        writer: True on one rank. The others take part in the gathers and write nothing.

    Raises:
        CapacityError: the disk is full or failing (on the writer only, and after all gathers). Nothing is left
            behind, and earlier checkpoints are as they were.
    """
    files = {stem: in_order(items) for stem, items in files.items()}
    texts = {META: json_text(dict(meta))}  # on every rank: what cannot be JSON must stop all of them
    texts |= {f"{name}.json": json_text(value) for name, value in (documents or {}).items()}
    target = run / f"step-{step:06d}"
    if not writer:
        for items in files.values():
            drain(items)
        return target
    temporary = run / f"{target.name}.tmp-{secrets.token_hex(4)}"
    try:
        _write(temporary, step, files, texts)
        _publish(temporary, target)
        if best is not None:
            write_json_atomic(run / BEST, {"step": best, "checkpoint": f"step-{best:06d}"})
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)  # before the free space is measured
        raise _capacity(error, target, checkpoint_bytes(files)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # gone already, unless something failed
    _retain(run, step, keep, notice)
    return target


def _write(folder: Path, step: int, files: Mapping[str, list[Entry]], texts: Mapping[str, bytes]) -> None:
    """All files of a checkpoint, manifest last. A failing disk does not keep the other ranks' gathers waiting."""
    rest = iter(files.items())
    written: dict[str, Written] = {}
    try:
        folder.mkdir(parents=True)
        for name, text in texts.items():
            written[name] = write_file(folder / name, [text])
        for stem, items in rest:
            name = f"{stem}.safetensors"
            written[name] = write_tensors(folder / name, items)
        table = {name: {"bytes": w.bytes, "sha256": w.sha256} for name, w in written.items()}
        write_file(folder / MANIFEST, [json_text({"format": FORMAT, "step": step, "files": table})])
        sync_folder(folder)
    except OSError:
        for _, items in rest:
            drain(items)
        raise


def _publish(temporary: Path, target: Path) -> None:
    """Give a finished folder its name. The same step saved again replaces the first, unless nothing changed.

    While it replaces, there is an instant when neither has the name; ``sweep`` finishes the rename.
    """
    if target.exists():
        if (target / MANIFEST).is_file() and file_sha256(target / MANIFEST) == file_sha256(temporary / MANIFEST):
            return
        _discard(target)
    os.rename(temporary, target)
    sync_folder(target.parent)


def _discard(folder: Path) -> None:
    """Remove a checkpoint so that its name never stands on half a folder."""
    trash = folder.with_name(f"{folder.name}.trash-{secrets.token_hex(4)}")
    os.rename(folder, trash)
    shutil.rmtree(trash)


def _retain(run: Path, step: int, keep: int, notice: Notice) -> None:
    assert keep >= 1
    saved, best = steps(run), best_step(run)
    stale = [s for s in saved if s > step and s != best]
    if stale:
        notice(f"removing checkpoints of steps {stale}: the run went back behind them and has now saved step {step}")
    past = [s for s in saved if s <= step]
    for s in stale + [s for s in past[:-keep] if s != best]:
        try:
            _discard(run / f"step-{s:06d}")
        except OSError as error:
            notice(f"could not remove the old checkpoint of step {s}: {error}")


def _capacity(error: OSError, target: Path, needed: int) -> CapacityError:
    return CapacityError(
        f"cannot save the checkpoint: {error.strerror or error}",
        where=str(target),
        expected=f"{_size(needed)} to write",
        got=f"{_size(free_bytes(target))} free",
        fix="free some space; earlier checkpoints are whole",
    )


def checkpoint_bytes(files: Mapping[str, Iterable[Entry]]) -> int:
    """Bytes that ``save`` will write, but for a few kilobytes of JSON."""
    return sum(file_bytes(items) for items in files.values())


def free_bytes(path: Path) -> int:
    """Bytes a user may still write where ``path`` lies or will lie."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def preflight(run: Path, bytes_needed: int) -> None:
    """Stop before the run starts where its checkpoints would not fit.

    A run keeps ``keep`` checkpoints and the best, and writes one more before it removes one: (keep + 2) times
    ``checkpoint_bytes``, less what already lies there.
    """
    free = free_bytes(run)
    if free < bytes_needed:
        raise CapacityError(
            "the run's checkpoints will not fit on the disk",
            where=str(run),
            expected=f"{_size(bytes_needed)} free",
            got=f"{_size(free)} free",
            fix="free some space, lower save.keep, or name another disk with save.dir",
        )


def _size(n: int) -> str:
    return f"{n / 1e9:,.2f} GB" if n >= 1e8 else f"{n / 1e6:,.2f} MB"


# --- finding and loading


def steps(run: Path) -> list[int]:
    """Steps saved under ``run``, oldest first, whole or not."""
    if not run.is_dir():
        return []
    return sorted(int(m[1]) for p in run.iterdir() if (m := _NAME.fullmatch(p.name)))


def best_step(run: Path) -> int | None:
    """The step best.json names, while its checkpoint is there."""
    path = run / BEST
    if not path.is_file():
        return None
    step = _json(path).get("step")
    return step if isinstance(step, int) and (run / f"step-{step:06d}").is_dir() else None


def load(path: Path, *, checksums: bool = True) -> Checkpoint:
    """Check a checkpoint and open it. Sizes are always compared; checksums cost one read of every file.

    Raises:
        CheckpointError: names the file that is missing, cut short or altered.
    """
    manifest = _json(path / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise CheckpointError("not a checkpoint of this format", where=str(path / MANIFEST), expected=FORMAT)
    try:
        for name, entry in manifest["files"].items():
            _check(path / name, Written(bytes=entry["bytes"], sha256=entry["sha256"]), checksums)
        step = int(manifest["step"])
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError("the manifest is damaged", where=str(path / MANIFEST), got=repr(error)) from error
    return Checkpoint(path=path, step=step, meta=_json(path / META))


def _check(path: Path, expected: Written, checksums: bool) -> None:
    if not path.is_file():
        raise CheckpointError("a file of the checkpoint is missing", where=str(path))
    size = path.stat().st_size
    if size != expected.bytes:
        raise CheckpointError(
            "a file of the checkpoint has the wrong size",
            where=str(path),
            expected=f"{expected.bytes} bytes",
            got=f"{size} bytes",
        )
    if checksums and (found := file_sha256(path)) != expected.sha256:
        raise CheckpointError(
            "a file of the checkpoint was altered", where=str(path), expected=f"sha256 {expected.sha256}", got=found
        )


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError("a file of the checkpoint cannot be read", where=str(path), got=str(error)) from error
    if not isinstance(value, dict):
        raise CheckpointError("a file of the checkpoint is damaged", where=str(path), expected="a JSON object")
    return value


def load_latest(run: Path, *, checksums: bool = True, notice: Notice = to_stderr) -> Checkpoint | None:
    """The newest whole checkpoint, or None where nothing was saved. Damaged ones are announced and passed over.

    Ranks must not each decide: one calls this and tells the others the path.

    Raises:
        CheckpointError: something was saved, and none of it is whole.
    """
    damaged: list[str] = []
    for step in reversed(steps(run)):
        try:
            checkpoint = load(run / f"step-{step:06d}", checksums=checksums)
        except CheckpointError as error:
            damaged.append(str(error))
            continue
        for text in damaged:
            notice(f"damaged checkpoint passed over: {text}\n  falling back to {checkpoint.path.name}")
        return checkpoint
    if damaged:
        raise CheckpointError(
            "no whole checkpoint is left:\n  " + "\n  ".join(damaged),
            where=str(run),
            fix="restore one from a copy, or start again in another folder (save.dir)",
        )
    return None


def latest(run: Path, *, checksums: bool = False, notice: Notice = to_stderr) -> Path | None:
    """Where the newest whole checkpoint lies; see ``load_latest``."""
    checkpoint = load_latest(run, checksums=checksums, notice=notice)
    return checkpoint.path if checkpoint else None


def sweep(run: Path, *, notice: Notice = to_stderr) -> None:
    """Clear what a killed save left behind. Only for the process that holds the run's lock.

    A finished folder that missed its rename gets its name; everything else of a save or a removal is deleted.
    """
    for path in sorted(run.iterdir()) if run.is_dir() else ():
        match = _LEFTOVER.fullmatch(path.name)
        if not match:
            continue
        target = run / match[1]
        if match[2] == "tmp" and not target.exists() and _whole(path):
            os.rename(path, target)
            notice(f"{target.name} was saved whole before the last run ended; it has its name now")
        else:
            shutil.rmtree(path)
            notice(f"removed {path.name}, left by a run that was killed")
    if run.is_dir():
        sync_folder(run)


def _whole(path: Path) -> bool:
    try:
        load(path)
    except CheckpointError:
        return False
    return True
