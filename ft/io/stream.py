"""Writes and reads safetensors one tensor at a time, so that memory never holds more than one of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from attrs import frozen
from safetensors import safe_open
from torch import Tensor

from ft.io.files import Written, write_file

# The format's own names of the types.
_NAMES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@frozen(kw_only=True, eq=False)
class Entry:
    """A tensor to be written: its name, shape and type are known before ``get`` makes it.

    ``get`` may be collective (gathering shards): then every rank holds the same entries, and calls them all.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    get: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def entries(tensors: Mapping[str, Tensor]) -> list[Entry]:
    """Entries of tensors that are already here, whole."""

    def entry(name: str, tensor: Tensor) -> Entry:
        return Entry(name=name, shape=tuple(tensor.shape), dtype=tensor.dtype, get=lambda: tensor)

    return [entry(name, tensor) for name, tensor in tensors.items()]


def in_order(items: Iterable[Entry]) -> list[Entry]:
    """Wide types first, so that each tensor stays aligned to its type; then by name, so that all ranks agree."""
    return sorted(items, key=lambda e: (-e.dtype.itemsize, e.name))


def header(items: Sequence[Entry], metadata: Mapping[str, str] | None = None) -> bytes:
    """The file's first bytes: length of the JSON text (8 bytes, little endian), then the text, padded to 8 bytes."""
    table: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for e in items:
        assert e.name not in table, f"two tensors are called {e.name!r}"
        table[e.name] = {"dtype": _NAMES[e.dtype], "shape": list(e.shape), "data_offsets": [offset, offset + e.bytes]}
        offset += e.bytes
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def file_bytes(items: Iterable[Entry], metadata: Mapping[str, str] | None = None) -> int:
    """Size of the file that ``write_tensors`` will write."""
    items = in_order(items)
    return len(header(items, metadata)) + sum(e.bytes for e in items)


def write_tensors(path: Path, items: Iterable[Entry], metadata: Mapping[str, str] | None = None) -> Written:
    """Write ``items`` to ``path`` as safetensors, durably; each is fetched, written and let go.

    When the disk fails, the remaining entries are still fetched before the OSError is raised: other ranks may be
    waiting in the same gathers.
    """
    items = in_order(items)
    rest = iter(items)

    def chunks() -> Iterator[bytes | memoryview]:
        yield header(items, metadata)
        for e in rest:
            yield _raw(e)

    try:
        return write_file(path, chunks())
    except OSError:
        drain(rest)
        raise


def drain(items: Iterable[Entry]) -> None:
    """Fetch and discard: the part of a rank, or of a failed write, that only takes part in gathers."""
    for e in items:
        e.get()


def _raw(e: Entry) -> memoryview:
    tensor = e.get()
    assert tuple(tensor.shape) == e.shape and tensor.dtype == e.dtype, f"{e.name} is not what was announced"
    return tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().data


class Tensors(Mapping[str, Tensor]):
    """The tensors of one safetensors file, each read from disk when asked for, on the CPU."""

    def __init__(self, path: Path):
        self.path = path
        self._file = safe_open(path, framework="pt", device="cpu")
        self._names = frozenset(self._file.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(f"{name} is not in {self.path}")
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._names))

    def __len__(self) -> int:
        return len(self._names)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows ``start:stop`` of dimension 0: a rank's shard, without reading the rest."""
        return self._file.get_slice(name)[start:stop]
