"""A model and its adapters as vLLM reads them: under the names, and in the layout, of the model's stored folder.

vLLM looks factors up by what their weights are called on disk. Experts that a folder keeps one by one have factors one
by one there; experts that it keeps as stacks have peft's: A (E*r, N), an expert's rows together, and B (M, r*E), whose
column k*E + e is expert e's k-th.

Shapes: E experts, M and N out- and input width of a weight, r LoRA rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from ft.errors import RecipeError
from ft.io.convert import Op, Plan, Read, Stack, invert
from ft.io.stream import Entry, entries
from ft.io.weights import TensorSource

_PREFIX, _A, _B, _INNER = "base_model.model.", ".lora_A.weight", ".lora_B.weight", ".base_layer"
_UP = ("gate_up_proj", "up_proj")


def adapter(tensors: Mapping[str, Tensor], ops: Mapping[str, Op]) -> dict[str, Tensor]:
    """Factors in peft's names and layout -> the same for vLLM. ``ops`` say how the folder stores each weight.

    Raises:
        RecipeError: one of the two stacks of an experts module has no factors, which vLLM does not take.
    """
    found: dict[str, Tensor] = {}
    for key, A in tensors.items():
        if key.endswith(_A):
            name = key.removeprefix(_PREFIX).removesuffix(_A)
            found |= _factors(name, A, tensors[f"{_PREFIX}{name}{_B}"], tensors, ops)
    return found


def _factors(
    name: str, A: Tensor, B: Tensor, tensors: Mapping[str, Tensor], ops: Mapping[str, Op]
) -> dict[str, Tensor]:
    linear, experts, inner = ops.get(f"{name}.weight"), name.removesuffix(_INNER), name.endswith(_INNER)
    if isinstance(linear, Read):
        return dict(_pair(linear.source.removesuffix(".weight"), A, B))
    stacks = [ops[f"{experts}.{leaf}"] for leaf in (*_UP, "down_proj") if f"{experts}.{leaf}" in ops]
    if linear is None and not stacks:  # a weight tied to another, which the folder stores once
        return dict(_pair(name, A, B))
    if linear is None and f"{_PREFIX}{experts}{_INNER}{_A}" not in tensors:
        raise RecipeError(
            "vLLM takes adapters of routed experts only where all their projections have one", where="adapter.targets",
            got=f"one stack of {experts}", fix='name "experts", or leave experts out; sampler=embedded takes any',
        )  # fmt: skip
    stack = stacks[0 if inner else -1] if linear is None else None
    if isinstance(stack, Read):
        return dict(_pair(stack.source.rpartition(".")[0] + _INNER * inner, A, B))
    if isinstance(stack, Stack) and (stack.dim == 0 or len(stack.sizes) == 1):
        return dict(_one_by_one(stack, A, B))
    raise RecipeError(
        "the adapter of this weight cannot be sent to vLLM: the model's folder stores it in parts", where="sampler",
        got=name, fix="leave it out of adapter.targets, or set sampler=embedded",
    )  # fmt: skip


def _one_by_one(stack: Stack, A: Tensor, B: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Factors of each expert's stored weights. Those side by side in a stack (gate and up) share A and split B."""
    E = len(stack.rows)
    A_ErN, B_EMr = A.unflatten(0, (E, -1)), B.unflatten(1, (-1, E)).permute(2, 0, 1)
    for names, A_rN, B_Mr in zip(stack.rows, A_ErN, B_EMr, strict=True):
        pieces = B_Mr.split(list(stack.sizes)) if len(names) > 1 else [B_Mr]
        for name, piece in zip(names, pieces, strict=True):
            yield from _pair(name.removesuffix(".weight"), A_rN, piece)


def _pair(name: str, A: Tensor, B: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield f"{_PREFIX}{name}{_A}", A.contiguous()
    yield f"{_PREFIX}{name}{_B}", B.contiguous()


def adapter_config(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """peft's config for factors that ``adapter`` renamed: each is a module's own."""
    modules = sorted({key.removesuffix(_A).rpartition(".")[2] for key in tensors if key.endswith(_A)})
    return {**config, "target_modules": modules, "target_parameters": None}


def model(tensors: Mapping[str, Tensor], plan: Plan, source: TensorSource) -> list[Entry]:
    """All of a folder's tensors: parameters and buffers taken apart as they were stored, and what was left out of them.

    Raises:
        ModelError: some cannot be taken apart.
    """
    own = {name: piece for key, op in plan.ops.items() for name, piece in invert(op, tensors[key]).items()}

    def copied(name: str) -> Entry:
        info = source.info(name)
        return Entry(name=name, shape=info.shape, dtype=info.dtype, get=lambda: source.read(name))

    return [*entries(own), *map(copied, plan.dropped)]
