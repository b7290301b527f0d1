"""Tokenised rows on disk, found by the hash of everything that decides them; safetensors and JSON only.

An entry is the folder <cache>/<key> of rows.safetensors, bad.jsonl and manifest.json, which holds the size and the
SHA-256 of both. It is built by one process under a lock, into a folder beside it that is renamed once complete.
Nothing removes old entries: the folder may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attrs
import msgspec
import numpy as np
from filelock import FileLock, Timeout

from ft.data import bad, report
from ft.data.build import Arrays, Built
from ft.data.files import digest, free_name
from ft.data.rows import digests
from ft.recipe.parts import Data, Source

VERSION = 2
"""Raise it whenever the same rows and options would give other tokens, or the files another layout."""

_OPTIONS = ("mask", "end_of_turn", "max_tokens", "overlong", "on_bad_row", "thinking", "append_eos", "separator")
_TYPES = {"I32": np.int32, "I64": np.int64, "F32": np.float32, "BOOL": np.bool_}


class Damaged(Exception):
    """An entry whose files are not what its manifest says."""


def key(sources: Sequence[Source], data: Data, tokenizer: Any) -> str:
    """SHA-256 over the rows' bytes, the tokenizer, its template and the options that matter. File names do not."""
    what = {
        "version": VERSION,
        "sources": [[digests(s), s.split, s.format, sorted(s.columns.items())] for s in sources],
        "tokenizer": tokenizer_digest(tokenizer),
        "options": {name: getattr(data, name) for name in _OPTIONS},
    }
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 of what a tokenizer does: its serialised form, its special tokens and its chat template.

    A tokenizer without a serialised form (one written in Python) is told by its class and vocabulary.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        # Padding and truncation are left behind by whoever called last, and play no part here.
        parts = msgspec.json.decode(backend.to_str(), type=dict[str, msgspec.Raw])
        body = b"".join(bytes(raw) for name, raw in parts.items() if name not in ("padding", "truncation"))
    else:
        body = json.dumps([type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]).encode()
    said = [{name: str(token) for name, token in tokenizer.special_tokens_map.items()}, tokenizer.chat_template]
    return hashlib.sha256(body + json.dumps(said, sort_keys=True).encode()).hexdigest()


def get(folder: Path | None, key: str, build: Callable[[], Built], announce: Callable[[str], None]) -> Built:
    """The entry ``key`` of ``folder``, built by one process where there is none; others wait and read it.

    A damaged entry is built anew. Where the folder cannot be written the rows stay in memory. Both are announced.
    """
    if folder is None:
        return build()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return _in_memory(folder, error, build(), announce)
    entry = folder / key
    if (built := _load(entry, announce)) is not None:
        return built
    with _locked(folder / f"{key}.lock", announce):
        if (built := _load(entry, announce)) is None:
            built = _keep(entry, build(), announce)
    return built


def _locked(path: Path, announce: Callable[[str], None]) -> Any:
    lock = FileLock(path)
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        announce(f"another process is preparing these rows; waiting for it ({path})")
        return lock.acquire()


def _load(entry: Path, announce: Callable[[str], None]) -> Built | None:
    if not entry.exists():
        return None
    try:
        return load(entry)
    except Damaged as problem:
        announce(f"the prepared rows in {entry} are damaged ({problem}); they are prepared anew")
        return None


def load(entry: Path) -> Built:
    """Read an entry; its arrays are mapped, not copied.

    Raises:
        Damaged: a file is missing, or not what the manifest says.
    """
    try:
        manifest = json.loads((entry / "manifest.json").read_bytes())
        for name, said in manifest["files"].items():
            _check(entry / name, said)
        rows = [bad.BadRow(**json.loads(line)) for line in (entry / "bad.jsonl").read_bytes().splitlines()]
        arrays = Arrays(**_tensors(entry / "rows.safetensors"))
        return Built(arrays=arrays, report=report.from_json(manifest["report"]), bad=tuple(rows))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{type(error).__name__}: {error}") from None


def _check(path: Path, said: dict[str, Any]) -> None:
    if (size := path.stat().st_size) != said["bytes"]:
        raise Damaged(f"{path.name} has {size} bytes, not {said['bytes']}")
    if digest(path) != said["sha256"]:
        raise Damaged(f"the checksum of {path.name} is wrong")


def _keep(entry: Path, built: Built, announce: Callable[[str], None]) -> Built:
    temporary = free_name(entry)
    try:
        for left in entry.parent.glob(f"{entry.name}.*.tmp"):  # of processes that died; we hold the lock
            shutil.rmtree(left)
        save(temporary, built)
        if entry.exists():
            shutil.rmtree(entry)
        temporary.rename(entry)
        return load(entry)
    except (OSError, Damaged) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        return _in_memory(entry.parent, error, built, announce)


def _in_memory(folder: Path, error: Exception, built: Built, announce: Callable[[str], None]) -> Built:
    announce(f"prepared rows cannot be kept in {folder} ({error}); they stay in memory, and the next run starts anew")
    return built


def save(folder: Path, built: Built) -> None:
    """Write the files of an entry; the manifest comes last."""
    from safetensors.numpy import save_file

    folder.mkdir()
    columns = attrs.asdict(built.arrays, recurse=False, filter=lambda _, column: column is not None)
    save_file(columns, folder / "rows.safetensors")
    (folder / "bad.jsonl").write_bytes(bad.to_json(built.bad))
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": digest(folder / name)}
        for name in ("rows.safetensors", "bad.jsonl")
    }
    manifest = {"version": VERSION, "report": report.to_json(built.report), "files": files}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))


def _tensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file as views of the mapped file (the library would copy them)."""
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    begin = 8 + int.from_bytes(mapped[:8], "little")
    header = json.loads(mapped[8:begin])
    return {
        name: np.frombuffer(mapped, _TYPES[said["dtype"]], said["shape"][0], begin + said["data_offsets"][0])
        for name, said in header.items()
        if name != "__metadata__"
    }
