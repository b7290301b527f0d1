"""Which files a path names, and how they are opened. Errors name near files and the package that is missing."""

from __future__ import annotations

import difflib
import glob
import gzip
import hashlib
import importlib
import io
import os
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import IO, Any, cast

from ft.errors import DataError, FtError, MissingFileError

KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
PACKED = (".gz", ".zst")


def kind(path: Path) -> str | None:
    """ ".jsonl" for train.jsonl.gz; None for a file we do not read."""
    packed = path.suffix.lower() in PACKED
    inner = Path(path.stem).suffix.lower() if packed else path.suffix.lower()
    return inner if inner in KINDS and not (packed and inner == ".parquet") else None


def find(path: str) -> list[Path]:
    """The files of a file name, a glob or a folder (hidden ones left out), sorted.

    Raises:
        MissingFileError: nothing is there; names what is near.
        DataError: a file of a kind we do not read, or a folder without any that we do.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        return _all_known(path, (p for p in place.rglob("*") if p.is_file() and not _hidden(p.relative_to(place))))
    if place.exists():
        return [_known(place)]
    if glob.has_magic(path):
        found = sorted(Path(p) for p in glob.glob(str(place), recursive=True))
        files = [_known(p) for p in found if p.is_file()]
        if files:
            return files
    raise _missing(path, place)


def _hidden(path: Path) -> bool:
    return any(part.startswith((".", "_")) for part in path.parts)


def _all_known(path: str, files: Iterable[Path]) -> list[Path]:
    found = sorted(file for file in files if kind(file))
    if not found:
        raise DataError("no data file in this folder", where=path, expected="files ending in " + " ".join(KINDS))
    return found


def _known(path: Path) -> Path:
    if kind(path) is None:
        raise DataError(
            "not a kind of file that can be read",
            where=str(path),
            expected=f"a name ending in {' '.join(KINDS)}, and {' or '.join(PACKED)} after it (not after .parquet)",
            got=path.suffix or "no ending",
        )
    return path


def _missing(path: str, place: Path) -> MissingFileError:
    folder = place.parent
    if glob.has_magic(path):
        return MissingFileError("no file fits this pattern", where=path, fix="check the pattern and the working folder")
    if not folder.is_dir():
        hub = path.count("/") == 1 and not place.suffix and path[0] not in "./~"
        fix = f"for a dataset of the hub write hf:{path}" if hub else "check the path and the working folder"
        return MissingFileError("no such file or folder", where=path, got=f"no folder {folder} either", fix=fix)
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    near = difflib.get_close_matches(place.name, names, n=3, cutoff=0.5)
    fix = f"did you mean {' or '.join(str(folder / name) for name in near)}?" if near else ""
    there = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return MissingFileError("no such file or folder", where=path, got=f"{folder} holds {there or 'nothing'}", fix=fix)


def need(module: str, extra: str, what: str) -> ModuleType:
    """Import an optional package, or say how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise FtError(f"{what} needs the package {package}", got=str(error), fix=f"pip install 'ft[{extra}]'") from None


def open_bytes(path: Path) -> IO[bytes]:
    """The file's bytes, unpacked. Reading a damaged archive raises OSError, EOFError or zlib.error."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise unreadable(path, error) from None
    if path.suffix.lower() == ".gz":
        return cast("IO[bytes]", gzip.open(file))
    if path.suffix.lower() == ".zst":
        return io.BufferedReader(_Zstd(file, need("zstandard", "data", f"reading {path.name}")), 1 << 16)
    return file


class _Zstd(io.RawIOBase):
    """Frames of a .zst file, one after the other; the package's own reader takes a cut file for a whole one."""

    def __init__(self, file: IO[bytes], zstandard: Any):
        self.file, self.zstandard = file, zstandard
        self.frame, self.packed, self.plain = None, b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.plain:
            self.packed = self.packed or self.file.read(1 << 16)
            if not self.packed:
                if self.frame is not None:
                    raise EOFError("the archive ends in the middle of a frame")
                return 0
            self._unpack()
        n = min(len(buffer), len(self.plain))
        buffer[:n], self.plain = self.plain[:n], self.plain[n:]
        return n

    def _unpack(self) -> None:
        self.frame = self.frame or self.zstandard.ZstdDecompressor().decompressobj()
        try:
            self.plain = self.frame.decompress(self.packed)
        except self.zstandard.ZstdError as error:
            raise OSError(str(error)) from None
        self.packed = b""
        if self.frame.eof:
            self.packed, self.frame = self.frame.unused_data, None

    def close(self) -> None:
        self.file.close()
        super().close()


def unreadable(path: Path, error: BaseException, after: str = "") -> DataError:
    """The error for a file that the system, the unpacker or the parquet reader gave up on."""
    problem = "the file cannot be read" + (f" after {after}" if after else "")
    return DataError(problem, where=str(path), got=f"{type(error).__name__}: {error}")


def digest(path: Path) -> str:
    """SHA-256 of the bytes as they lie on disk."""
    try:
        with path.open("rb", buffering=0) as file:
            return hashlib.file_digest(cast("Any", file), "sha256").hexdigest()
    except OSError as error:
        raise unreadable(path, error) from None


def free_name(path: Path) -> Path:
    """A sibling of ``path`` that no other process uses, for writing before renaming."""
    return path.with_name(f"{path.name}.{os.getpid()}.tmp")
