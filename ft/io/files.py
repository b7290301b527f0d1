"""Files that are either whole or absent, also after a crash or a power cut."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from attrs import frozen


@frozen(kw_only=True)
class Written:
    """What lies on disk: size in bytes and SHA-256 in hex (the figure `sha256sum` prints)."""

    bytes: int
    sha256: str


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> Written:
    """Write ``chunks`` to ``path`` and force them to disk before returning."""
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        for chunk in chunks:
            file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
            del chunk  # else it would live on while the next one is made
        file.flush()
        os.fsync(file.fileno())
    return Written(bytes=size, sha256=digest.hexdigest())


def sync_folder(folder: Path) -> None:
    """Make creations, renames and removals in ``folder`` durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def json_text(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def write_json_atomic(path: Path, value: Any) -> None:
    """Replace ``path`` as a whole: a reader sees the old text or the new one."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        write_file(temporary, [json_text(value)])
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
