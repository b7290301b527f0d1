"""How stored tensors become a model's parameters: pure functions on names, shapes and tensors.

A hub folder may keep each expert by itself (``experts.7.gate_proj.weight``) where the model holds one stack
(``experts.gate_up_proj``), use other names, or hold more than the language model. ``make_plan`` decides, from names
and shapes alone, which stored tensors make each parameter; ``evaluate`` makes one parameter, or some of its rows,
reading only what it needs; ``invert`` takes a parameter apart again, so that a folder can be written as it was read.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from attrs import frozen
from torch import Tensor

from ft.errors import ModelError
from ft.io.weights import TensorSource, listing

Layout = Literal["plain", "per_expert", "fused"]


@frozen(kw_only=True)
class Read:
    """The parameter is one stored tensor."""

    source: str


@frozen(kw_only=True)
class Concat:
    """The parameter is stored tensors side by side along ``dim``."""

    sources: tuple[str, ...]
    sizes: tuple[int, ...]  # along dim
    dim: int


@frozen(kw_only=True)
class Stack:
    """Row e of the parameter (dimension 0) is ``rows[e]``, side by side along ``dim`` of the row."""

    rows: tuple[tuple[str, ...], ...]
    sizes: tuple[int, ...]  # of a row's pieces, along dim
    dim: int


@frozen(kw_only=True, eq=False)
class Computed:
    """The parameter is what ``make`` makes of whole stored tensors. Cannot be inverted."""

    sources: tuple[tuple[str, ...], ...]
    make: Callable[[list[list[Tensor]]], Tensor]


Op = Read | Concat | Stack | Computed


@frozen(kw_only=True, eq=False)
class Rule:
    """How several stored tensors make one parameter: ``slots`` kinds of them, stacked, or side by side, or both."""

    slots: tuple[str, ...]
    stack: bool
    dim: int | None  # of the parameter, along which the slots lie side by side
    make: Callable[[str], Callable[[list[list[Tensor]]], Tensor]] | None = None


@frozen(kw_only=True)
class Route:
    """Where a stored tensor goes. ``index`` is its row where the rule stacks."""

    target: str
    rule: Rule | None = None
    slot: int = 0
    index: int | None = None


@frozen(kw_only=True)
class Plan:
    """Which stored tensors make each parameter, which are left out, and how the folder keeps its experts."""

    ops: Mapping[str, Op]
    dropped: tuple[str, ...]
    layout: Layout


_NUMBER = re.compile(r"(\d+)")


def natural(name: str) -> list[Any]:
    """Sort key that puts expert 10 after expert 9."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in _NUMBER.split(name)]


def make_plan(
    stored: TensorSource,
    wanted: Mapping[str, tuple[int, ...]],
    route: Callable[[str], Route],
    *,
    drop: Iterable[str] = (),
    where: str = "",
) -> Plan:
    """Decide how ``stored`` fills ``wanted`` (name -> shape).

    Args:
        route: where a stored tensor goes; called once per name, in natural order.
        drop: patterns (``re.search``) of stored names that may be left over.

    Raises ModelError that lists names: parameters nothing is stored for, stored tensors nothing wants, two tensors
    for one parameter, gaps in a stack, shapes that differ.
    """
    groups, left = _group(sorted(stored.names(), key=natural), wanted, route, where)
    patterns = [re.compile(p) for p in drop]
    dropped = tuple(name for name in left if any(p.search(name) for p in patterns))
    _refuse("stored tensors that the model has no place for", [n for n in left if n not in set(dropped)], where)
    _refuse("the folder lacks tensors that the model needs", [n for n in wanted if n not in groups], where)
    ops = {target: _op(target, groups[target], stored, wanted[target], where) for target in wanted}
    _check_shapes(ops, stored, wanted, where)
    return Plan(ops=ops, dropped=dropped, layout=layout_of(ops, wanted))


_Group = list[tuple[str, Route]]


def _group(
    names: Sequence[str], wanted: Mapping[str, tuple[int, ...]], route: Callable[[str], Route], where: str
) -> tuple[dict[str, _Group], list[str]]:
    groups: dict[str, _Group] = defaultdict(list)
    left: list[str] = []
    for name in names:
        to = route(name)
        if to.target in wanted:
            groups[to.target].append((name, to))
        else:
            left.append(name)
    kinds = {t: {to.rule is None for _, to in g} for t, g in groups.items()}
    clash = [t for t, g in groups.items() if len(kinds[t]) > 1 or (True in kinds[t] and len(g) > 1)]
    _refuse("several stored tensors claim one parameter", [n for t in clash for n, _ in groups[t]], where)
    return groups, left


def _op(target: str, group: _Group, stored: TensorSource, shape: tuple[int, ...], where: str) -> Op:
    rule = group[0][1].rule
    if rule is None:
        return Read(source=group[0][0])
    columns = [[(n, to.index) for n, to in group if to.slot == s] for s in range(len(rule.slots))]
    if empty := [slot for slot, column in zip(rule.slots, columns, strict=True) if not column]:
        _refuse(f"the folder lacks tensors that make {target}", empty, where)
    if rule.make is not None:
        return Computed(sources=tuple(tuple(n for n, _ in c) for c in columns), make=rule.make(target))
    if not rule.stack:
        assert rule.dim is not None
        _refuse(f"several stored tensors claim one part of {target}", _doubles(columns), where)
        sources = tuple(column[0][0] for column in columns)
        return Concat(sources=sources, sizes=_sizes(sources, stored, rule.dim), dim=rule.dim)
    _refuse(f"the stored experts of {target} are not 0 to {shape[0] - 1}", _gaps(columns, shape[0]), where)
    rows = tuple(zip(*([n for n, _ in column] for column in columns), strict=True))
    dim = 0 if rule.dim is None else rule.dim - 1
    return Stack(rows=rows, sizes=_sizes(rows[0], stored, dim), dim=dim)


def _doubles(columns: Sequence[Sequence[tuple[str, int | None]]]) -> list[str]:
    return [n for column in columns if len(column) > 1 for n, _ in column]


def _gaps(columns: Sequence[Sequence[tuple[str, int | None]]], n: int) -> list[str]:
    """Names that a stack of ``n`` rows lacks ("no ...") or cannot place."""
    wrong: list[str] = []
    for column in columns:
        have = [index for _, index in column]
        model_name, model_index = column[0]
        wrong += [f"no {_renumber(model_name, model_index, i)}" for i in range(n) if i not in have]
        wrong += [name for name, i in column if i is None or i >= n or have.count(i) > 1]
    return wrong


def _renumber(name: str, old: int | None, new: int) -> str:
    head, dot, tail = name.rpartition(f".{old}.")
    return f"{head}.{new}.{tail}" if dot else f"{name} (expert {new})"


def _sizes(names: Sequence[str], stored: TensorSource, dim: int) -> tuple[int, ...]:
    return tuple(_at(stored.info(n).shape, dim) for n in names)


def _at(shape: tuple[int, ...], dim: int) -> int:
    return shape[dim] if dim < len(shape) else 1


def shape_of(op: Op, stored: TensorSource) -> tuple[int, ...] | None:
    """Shape of the parameter ``op`` makes; None where only making it tells."""
    if isinstance(op, Read):
        return stored.info(op.source).shape
    if isinstance(op, Concat):
        return _replace(stored.info(op.sources[0]).shape, op.dim, sum(op.sizes))
    if isinstance(op, Stack):
        return (len(op.rows), *_replace(stored.info(op.rows[0][0]).shape, op.dim, sum(op.sizes)))
    return None


def _replace(shape: tuple[int, ...], dim: int, size: int) -> tuple[int, ...]:
    return tuple(size if i == dim else n for i, n in enumerate(shape))


def sources_of(op: Op) -> list[str]:
    """Names of the stored tensors that ``op`` reads."""
    if isinstance(op, Read):
        return [op.source]
    if isinstance(op, Concat):
        return list(op.sources)
    return [n for names in (op.rows if isinstance(op, Stack) else op.sources) for n in names]


def _check_shapes(
    ops: Mapping[str, Op], stored: TensorSource, wanted: Mapping[str, tuple[int, ...]], where: str
) -> None:
    wrong = []
    for target, op in ops.items():
        shape = shape_of(op, stored)
        if shape is not None and shape != wanted[target]:
            wrong.append(f"{target}: stored {list(shape)}, model {list(wanted[target])}")
        elif odd := _odd(op, stored):
            wrong.append(f"{target}: {odd[0]} is unlike its neighbours in shape or type")
    _refuse("stored shapes do not fit the model's config", wrong, where)


def _odd(op: Op, stored: TensorSource) -> list[str]:
    """Pieces of another shape or type than the first of their kind."""
    if isinstance(op, Concat):
        return [n for n in op.sources if stored.info(n).dtype != stored.info(op.sources[0]).dtype]
    if not isinstance(op, Stack):
        return []
    first = [stored.info(n) for n in op.rows[0]]
    odd = [n for row in op.rows for n, info in zip(row, first, strict=True) if stored.info(n) != info]
    return odd + [n for n, info in zip(op.rows[0], first, strict=True) if info.dtype != first[0].dtype]


def layout_of(ops: Mapping[str, Op], wanted: Mapping[str, tuple[int, ...]]) -> Layout:
    """How a folder keeps its experts, so that an export can restore it."""
    if any(isinstance(op, Stack) for op in ops.values()):
        return "per_expert"
    stacked = any(".experts." in name and len(shape) == 3 for name, shape in wanted.items())
    return "fused" if stacked else "plain"


def _refuse(problem: str, names: Sequence[str], where: str) -> None:
    if names:
        raise ModelError(f"{problem}: {len(names)}", where=where, got=listing(names))


def evaluate(op: Op, stored: TensorSource, start: int = 0, stop: int | None = None) -> Tensor:
    """Rows ``start:stop`` of the parameter ``op`` makes, in the stored type.

    A stack is filled row by row: beside the result, one stored tensor is in memory at a time.
    """
    if isinstance(op, Computed):
        return op.make([[stored.read(n) for n in names] for names in op.sources])[start:stop]
    shape = shape_of(op, stored)
    assert shape is not None
    if not shape:
        return stored.read(sources_of(op)[0])
    stop = shape[0] if stop is None else stop
    if isinstance(op, Read):
        return stored.rows(op.source, start, stop)
    dtype = stored.info(sources_of(op)[0]).dtype
    out = torch.empty((stop - start, *shape[1:]), dtype=dtype)
    if isinstance(op, Stack):
        for row, names in zip(out, op.rows[start:stop], strict=True):
            _fill_row(row, names, op, stored)
        return out
    offset = 0
    for name, size in zip(op.sources, op.sizes, strict=True):
        if op.dim == 0:
            a, b = max(start - offset, 0), min(stop - offset, size)
            if a < b:
                out[offset + a - start : offset + b - start].copy_(stored.rows(name, a, b))
        else:
            out.narrow(op.dim, offset, size).copy_(stored.rows(name, start, stop))
        offset += size
    return out


def _fill_row(row: Tensor, names: Sequence[str], op: Stack, stored: TensorSource) -> None:
    offset = 0
    for name, size in zip(names, op.sizes, strict=True):
        part = row.narrow(op.dim, offset, size) if row.ndim else row
        part.copy_(stored.read(name))
        offset += size


def invert(op: Op, value: Tensor) -> dict[str, Tensor]:
    """The stored tensors that ``op`` made ``value`` of; views of it. Raises ModelError where that is not known."""
    if isinstance(op, Read):
        return {op.source: value}
    if isinstance(op, Concat):
        return dict(zip(op.sources, value.split(list(op.sizes), dim=op.dim), strict=True))
    if isinstance(op, Stack):
        pairs = (zip(names, _pieces(row, op), strict=True) for names, row in zip(op.rows, value, strict=True))
        return {name: piece for pair in pairs for name, piece in pair}
    raise ModelError("this model's weights cannot be written back in the layout they came in", got=sources_of(op)[0])


def _pieces(row: Tensor, op: Stack) -> Sequence[Tensor]:
    return row.split(list(op.sizes), dim=op.dim) if row.ndim else [row]
