"""Model folders: where they are, and their safetensors weights read and written one tensor at a time.

Reading asks the file system for the bytes of one tensor, or of some of its rows, into memory of its own: nothing is
mapped, so a reader's memory is what it keeps. Pickled weights (.bin, .pt) are never opened.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Protocol

import torch
from attrs import field, frozen
from torch import Tensor

from ft.errors import CapacityError, MissingFileError, ModelError
from ft.io.stream import Entry, write_tensors

log = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_SMALL = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")  # config, templates, tokenizers
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@frozen(kw_only=True)
class ModelFolder:
    """A model on this machine. ``commit`` is the hub's, where it is known."""

    path: Path
    id: str
    commit: str | None = None


def models_folder() -> Path:
    """Where models are kept: $FT_MODELS, or ./models."""
    return Path(os.environ.get("FT_MODELS", "models"))


def resolve(
    id: str, revision: str | None = None, *, weights: bool = True, download: Callable[..., str] | None = None
) -> ModelFolder:
    """Find a model: a local folder, then ``$FT_MODELS/<id>``, then the hub at a resolved commit.

    Args:
        weights: False fetches config and tokenizer only, when it has to fetch.
        download: stands in for ``huggingface_hub.snapshot_download``.

    Raises ModelError that says where it looked. Only safetensors, JSON, templates and tokenizer files are fetched.
    """
    kept = models_folder() / id
    for path in (Path(id).expanduser(), kept):
        if path.is_dir():
            return _local(path, id, revision)
    if not _HUB_ID.fullmatch(id):
        raise MissingFileError(f"there is no model folder {id!r}", where="model.id", fix="check the path")
    return _from_hub(id, revision, weights, download, kept)


def _local(path: Path, id: str, revision: str | None) -> ModelFolder:
    """A folder on disk; inside the hub's cache its name is the commit."""
    commit = path.resolve().name if _COMMIT.fullmatch(path.resolve().name) else None
    if revision not in (None, commit):
        log.warning("model.revision %r is not checked: the local folder %s is used as it is", revision, path)
    return ModelFolder(path=path, id=id, commit=commit)


def _from_hub(
    id: str, revision: str | None, weights: bool, download: Callable[..., str] | None, kept: Path
) -> ModelFolder:
    if download is None:
        from huggingface_hub import snapshot_download as download
    patterns = [*_SMALL, *(["*.safetensors"] if weights else [])]
    try:
        path = Path(download(id, revision=revision, allow_patterns=patterns))
    except Exception as e:  # the hub client raises its HTTP library's errors, which share no base
        raise ModelError(
            f"model {id!r} is neither on this machine nor to be had from the hub",
            where="model.id",
            expected=f"a folder {id} or {kept}, or the hub",
            got=f"{type(e).__name__}: {str(e).strip().splitlines()[0] if str(e).strip() else 'no message'}",
            fix=f"put config.json, tokenizer files and *.safetensors into {kept} (or set FT_MODELS), "
            "or rehearse with --tiny",
        ) from e
    return ModelFolder(path=path, id=id, commit=path.name if _COMMIT.fullmatch(path.name) else None)


@frozen(kw_only=True)
class Info:
    """What a stored tensor is, known without reading it."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class TensorSource(Protocol):
    """Named tensors that are read when asked for, whole or by rows of dimension 0."""

    def names(self) -> Sequence[str]: ...
    def info(self, name: str) -> Info: ...
    def read(self, name: str) -> Tensor: ...
    def rows(self, name: str, start: int, stop: int) -> Tensor: ...


@frozen(kw_only=True)
class Memory:
    """Tensors that are already here."""

    tensors: Mapping[str, Tensor]

    def names(self) -> Sequence[str]:
        return list(self.tensors)

    def info(self, name: str) -> Info:
        return Info(shape=tuple(self.tensors[name].shape), dtype=self.tensors[name].dtype)

    def read(self, name: str) -> Tensor:
        return self.tensors[name]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.tensors[name][start:stop]


@frozen(kw_only=True)
class _Place:
    file: Path
    offset: int  # of the first byte, from the start of the file
    info: Info


@frozen(kw_only=True)
class Weights:
    """The weights of a model folder: all its shards, no tensor read yet. Made by ``open_weights``."""

    folder: Path
    _places: Mapping[str, _Place] = field(alias="places", repr=False)

    def names(self) -> Sequence[str]:
        return list(self._places)

    def info(self, name: str) -> Info:
        return self._places[name].info

    def total_bytes(self) -> int:
        return sum(place.info.bytes for place in self._places.values())

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own."""
        place = self._places[name]
        return _read(place.file, place.offset, place.info.shape, place.info.dtype)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows ``start:stop`` of dimension 0; no other byte is read."""
        place = self._places[name]
        rest = place.info.shape[1:]
        width = prod(rest) * place.info.dtype.itemsize
        return _read(place.file, place.offset + start * width, (stop - start, *rest), place.info.dtype)


def _read(file: Path, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    raw = torch.empty(prod(shape) * dtype.itemsize, dtype=torch.uint8)
    view = raw.numpy().data
    with file.open("rb", buffering=0) as f:
        f.seek(offset)
        while len(view):
            n = f.readinto(view)
            if not n:
                raise ModelError("the file ends before its tensors do", where=str(file), fix="fetch it again")
            view = view[n:]
    return raw.view(dtype).reshape(shape)


def open_weights(folder: Path) -> Weights:
    """Read the headers of all shards of ``folder``.

    Raises ModelError where the folder has no safetensors, a shard is missing or cut short, or the index and the
    shards disagree.
    """
    shards, index = _shards(folder)
    places: dict[str, _Place] = {}
    for shard in shards:
        for name, place in _header(shard):
            if name in places:
                raise ModelError(f"tensor {name!r} stands in two files", where=str(shard), got=str(places[name].file))
            places[name] = place
    if index is not None:
        _check_index(folder, index, places)
    return Weights(folder=folder, places=places)


def _shards(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    if not folder.is_dir():
        raise MissingFileError("there is no such model folder", where=str(folder))
    if (folder / INDEX).is_file():
        index = _index(folder / INDEX)
        shards = [folder / name for name in sorted(set(index.values()))]
        if missing := [s.name for s in shards if not s.is_file()]:
            raise ModelError(
                "weight files are missing", where=str(folder), got=listing(missing), fix="fetch the folder again"
            )
        return shards, index
    if (folder / SINGLE).is_file():
        return [folder / SINGLE], None
    raise _no_weights(folder)


def _no_weights(folder: Path) -> ModelError:
    pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
    if pickled:
        return ModelError(
            "the weights are pickled; reading them could run code",
            where=str(folder),
            expected=f"{SINGLE}, or {INDEX} and its shards",
            got=listing(pickled),
            fix="convert them once, in a place you trust, with the model's save_pretrained",
        )
    found = listing(sorted(p.name for p in folder.iterdir())) or "an empty folder"
    return ModelError(
        "the model folder holds no weights", where=str(folder), expected=f"{SINGLE}, or {INDEX} and its shards",
        got=found,
    )  # fmt: skip


def _index(path: Path) -> dict[str, str]:
    try:
        table = json.loads(path.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as e:
        raise ModelError("the index of the weights is not readable", where=str(path), got=repr(e)) from e
    if outside := [v for v in table.values() if Path(v).name != v]:
        raise ModelError("the index names files outside of its folder", where=str(path), got=listing(outside))
    return table


def _check_index(folder: Path, index: Mapping[str, str], places: Mapping[str, _Place]) -> None:
    wrong = sorted(n for n in index.keys() | places.keys() if n not in places or index.get(n) != places[n].file.name)
    if wrong:
        raise ModelError(
            f"index and weight files disagree on {len(wrong)} tensors",
            where=str(folder / INDEX),
            got=listing(wrong),
            fix="fetch the folder again",
        )


def _header(path: Path) -> Iterator[tuple[str, _Place]]:
    """Names and places of the tensors of one file: 8 bytes of length, a JSON table, then the data."""
    size = path.stat().st_size
    with path.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if length + 8 > size:
            raise ModelError("this is no whole safetensors file", where=str(path), got=f"{size} bytes")
        try:
            table = json.loads(f.read(length))
        except ValueError as e:
            raise ModelError("this is no safetensors file", where=str(path), got=str(e)) from e
    table.pop("__metadata__", None)
    for name, entry in table.items():
        yield name, _place(path, name, entry, 8 + length, size)


def _place(path: Path, name: str, entry: Mapping[str, list[int]], start: int, size: int) -> _Place:
    dtype = DTYPES.get(str(entry["dtype"]))
    if dtype is None:
        raise ModelError(f"tensor {name!r} has an unknown type", where=str(path), got=str(entry["dtype"]))
    begin, end = entry["data_offsets"]
    info = Info(shape=tuple(entry["shape"]), dtype=dtype)
    if start + end > size or end - begin != info.bytes:
        raise ModelError(
            f"tensor {name!r} does not fit into the file", where=str(path), expected=f"{start + end} bytes",
            got=f"{size} bytes", fix="fetch it again: the file was cut short",
        )  # fmt: skip
    return _Place(file=path, offset=start + begin, info=info)


def listing(names: Sequence[str], most: int = 10) -> str:
    """The first names, and how many there are."""
    return ", ".join(names[:most]) + (f" ... ({len(names)} in all)" if len(names) > most else "")


def write_weights(
    folder: Path, items: Iterable[Entry], *, max_shard: int = 5_000_000_000, metadata: Mapping[str, str] | None = None
) -> list[Path]:
    """Write tensors as a model folder's weights: one file, or shards of at most ``max_shard`` bytes and an index.

    Each tensor is fetched when its turn comes and let go; one larger than ``max_shard`` gets a file of its own.
    """
    shards = split(list(items), max_shard)
    if len(shards) == 1:
        names = [SINGLE]
    else:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    paths = [folder / name for name in names]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for path, shard in zip(paths, shards, strict=True):
            write_tensors(path, shard, {"format": "pt", **(metadata or {})})
        if len(shards) > 1:
            _write_index(folder / INDEX, names, shards)
    except OSError as e:
        need = sum(e.bytes for shard in shards for e in shard)
        raise CapacityError("cannot write the weights", where=str(folder), expected=f"{need} bytes", got=str(e)) from e
    return paths


def split(items: Sequence[Entry], max_shard: int) -> list[list[Entry]]:
    """Cut ``items``, in their order, into runs of at most ``max_shard`` bytes (at least one tensor each)."""
    shards: list[list[Entry]] = [[]]
    used = 0
    for item in items:
        if shards[-1] and used + item.bytes > max_shard:
            shards.append([])
            used = 0
        shards[-1].append(item)
        used += item.bytes
    return shards


def _write_index(path: Path, names: Sequence[str], shards: Sequence[Sequence[Entry]]) -> None:
    table = {e.name: name for name, shard in zip(names, shards, strict=True) for e in shard}
    total = sum(e.bytes for shard in shards for e in shard)
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": table}, indent=2)
    path.write_text(text + "\n")
