"""Datasets of the hub, `hf:owner/name`, through the `datasets` package, which is an extra."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any

from attrs import evolve

from ft.data import files
from ft.data.split import Slice, bounds, parse_split
from ft.data.tables import without_nulls
from ft.errors import DataError, RecipeError
from ft.recipe.parts import Source

_SCHEME = "hf:"
_COMMIT = re.compile(r"[0-9a-f]{40}")


def is_hub(source: Source) -> bool:
    """Whether the rows come from the hub."""
    return source.path.startswith(_SCHEME)


def place(source: Source) -> str:
    """What the places of its rows begin with; the row's number in the split follows."""
    return f"{source.path}:row "


def read(source: Source, split: str, part: Slice) -> Iterator[tuple[str, Any]]:
    """("hf:owner/name:row 12", the row); rows are counted from 1 over the whole split."""
    if source.streaming and part.relative:
        raise RecipeError("a stream does not know its length", where=f"split of {source.path}",
                          expected="a slice by row numbers, as train[:1000]", got=source.split)  # fmt: skip
    return _rows(source, _load(source, split), part)


def _rows(source: Source, dataset: Any, part: Slice) -> Iterator[tuple[str, Any]]:
    total = None if source.streaming else len(dataset)
    start, stop = bounds(part, total, f"split of {source.path}")
    if source.streaming:
        selected = itertools.islice(dataset, start, stop)
    else:
        selected = iter(dataset.select(range(start, min(total or 0, total or 0 if stop is None else stop))))
    number = start
    for row in selected:
        number += 1
        yield f"{place(source)}{number}", without_nulls(row)
    if number == start:
        raise DataError("the dataset has no rows", where=source.path, expected="at least one row", got=source.split)


def _load(source: Source, split: str) -> Any:
    datasets: Any = files.need("datasets", "hub", f"reading {source.path}")
    try:
        return datasets.load_dataset(source.path.removeprefix(_SCHEME), source.name, split=split,
                                     revision=source.revision, streaming=source.streaming)  # fmt: skip
    except (OSError, ValueError) as error:
        raise DataError("the dataset cannot be loaded", where=source.path, got=f"{type(error).__name__}: {error}",
                        fix="check name, revision and split, and that the hub can be reached") from None  # fmt: skip


def pinned(source: Source, announce: Callable[[str], None]) -> Source:
    """The same source at the commit its revision now stands for; as it is, and said so, where that is unknown."""
    if not is_hub(source) or (source.revision and _COMMIT.fullmatch(source.revision)):
        return source
    client: Any = files.need("huggingface_hub", "hub", f"reading {source.path}")
    try:
        info = client.HfApi().dataset_info(source.path.removeprefix(_SCHEME), revision=source.revision)
    except Exception as error:  # the client's network errors have no common class; loading decides what it means
        announce(f"{source.path}: its commit is unknown, a local copy is used if there is one ({error})")
        return source
    return evolve(source, revision=info.sha)


def digest(source: Source) -> str:
    """The commit, with the configuration; for a local copy that has none, the fingerprint of its tables.

    Raises:
        DataError: a stream whose commit is not known: nothing would tell when its rows change.
    """
    if source.revision and _COMMIT.fullmatch(source.revision):
        return f"{source.path}@{source.revision}:{source.name}"
    if source.streaming:
        raise DataError("the commit of this stream is not known", where=source.path, expected="40 hex digits",
                        got=source.revision or "no revision", fix="set Source.revision to a commit")  # fmt: skip
    return str(_load(source, parse_split(source.split)[0])._fingerprint)
