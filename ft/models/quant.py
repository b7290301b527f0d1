"""NF4 storage of frozen weights: linear layers, and the stacked weights of routed experts.

A quantised parameter ``w`` becomes up to four frozen parameters: ``w`` (uint8, two codes a byte), ``w_absmax``,
``w_absmax2`` and ``w_offset``. All are integers, float32 scales as their bits, so that neither ``.to(dtype)`` nor the
mixed precision of FSDP2 can round them; dimension 0 is the layer's outputs or the experts, so that it shards well.

Routers, heads, embeddings and norms are never quantised. Shapes: E experts; n elements of w; b elements per scale.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod

import torch
from attrs import evolve, frozen
from torch import Tensor, nn

from ft.dist import copy_into
from ft.errors import ModelError
from ft.io.weights import listing
from ft.kernels import nf4
from ft.kernels.launch import Impl
from ft.kernels.nf4 import NF4Tensor
from ft.recipe.parts import NF4

NESTED_BLOCK = 256
# A path with one of these segments routes tokens, or chooses them: rounding it changes choices, not values.
_ROUTERS = frozenset({"gate", "router", "shared_expert_gate", "wg", "indexer"})


@frozen(kw_only=True)
class Item:
    """One parameter to be quantised."""

    path: str  # of its module
    leaf: str
    kind: str  # "linear" | "experts"
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.path}.{self.leaf}"


@frozen(kw_only=True)
class Held:
    """What a quantised parameter stands for."""

    shape: tuple[int, ...]
    dtype: torch.dtype  # of the unquantised values
    block: int
    double: bool


def plan(model: nn.Module, quant: NF4) -> tuple[Item, ...]:
    """Which parameters of an unquantised model are to be held in 4 bits.

    Raises ModelError where a scale's block would straddle two experts, which could then not be used one by one.
    """
    items = [*_linears(model)] if quant.linears else []
    items += [*_experts(model)] if quant.experts else []
    chosen = tuple(i for i in items if not _skipped(i, quant.skip))
    if odd := [i.name for i in chosen if i.kind == "experts" and prod(i.shape[1:]) % quant.block]:
        raise ModelError(
            "blocks of NF4 scales would straddle experts", where="model.quant.block", got=listing(odd),
            expected=f"experts of a multiple of {quant.block} weights", fix="choose a smaller block, or skip them",
        )  # fmt: skip
    return chosen


def _skipped(item: Item, skip: Sequence[str]) -> bool:
    return any(f".{name}".endswith(f".{end}") for name in (item.path, item.name) for end in skip)


def _linears(model: nn.Module) -> Iterator[Item]:
    head = getattr(model, "get_output_embeddings", lambda: None)() or getattr(model, "score", None)
    for path, module in model.named_modules():
        if not isinstance(module, nn.Linear) or isinstance(module, NF4Linear) or module is head:
            continue
        if not is_router(path) and not is_bypassed(model, path):
            yield Item(path=path, leaf="weight", kind="linear", shape=tuple(module.weight.shape))


def is_bypassed(model: nn.Module, path: str) -> bool:
    """Fused Mamba code reads out_proj's weight past its module: packed codes or an adapter there would not be seen."""
    parent, _, leaf = path.rpartition(".")
    return leaf == "out_proj" and "Mamba" in type(model.get_submodule(parent)).__name__


def _experts(model: nn.Module) -> Iterator[Item]:
    for path, module in model.named_modules():
        if "experts" in path.split("."):
            for leaf, p in module._parameters.items():
                if p is not None and p.ndim == 3 and p.is_floating_point():
                    yield Item(path=path, leaf=leaf, kind="experts", shape=tuple(p.shape))


def is_router(path: str) -> bool:
    """Whether a module chooses experts or tokens, or weighs a shared expert. ``gate_proj`` does not."""
    return not _ROUTERS.isdisjoint(path.split("."))


class NF4Linear(nn.Linear):
    """A frozen linear layer whose weight is held in 4 bits; peft takes it for the nn.Linear that it is."""

    def __init__(self, like: nn.Linear, held: Held, impl: Impl = "auto"):
        nn.Module.__init__(self)  # nn.Linear's own would make the weight in full
        self.impl: Impl = impl
        self.in_features, self.out_features = like.in_features, like.out_features
        hold(self, "weight", held, like.weight.device)
        self.register_parameter("bias", like.bias)
        self.train(like.training)

    def forward(self, input: Tensor) -> Tensor:
        return nf4.linear(input, nf4_of(self, "weight"), self.bias, impl=self.impl)


def apply(model: nn.Module, items: Sequence[Item], quant: NF4, impl: Impl = "auto") -> None:
    """Give ``model`` (a skeleton) places for the quantised parameters; ``ft.models.load.fill`` fills them.

    ``impl``: which kernels linear layers use.
    """
    for item in items:
        module = model.get_submodule(item.path)
        old = module._parameters[item.leaf]
        assert old is not None
        held = Held(shape=item.shape, dtype=old.dtype, block=quant.block, double=quant.double)
        if item.kind == "experts":
            hold(module, item.leaf, held, old.device)
            continue
        assert isinstance(module, nn.Linear)
        parent, _, name = item.path.rpartition(".")
        setattr(model.get_submodule(parent), name, NF4Linear(module, held, impl))


def hold(owner: nn.Module, leaf: str, held: Held, device: torch.device) -> None:
    """Register the pieces of a quantised parameter in place of the parameter."""
    owner._parameters.pop(leaf, None)
    owner._nf4_held = {**quantised(owner), leaf: held}  # type: ignore[assignment]
    for piece, (shape, dtype) in piece_shapes(held).items():
        empty = torch.empty(shape, dtype=dtype, device=device)
        owner.register_parameter(leaf + piece, nn.Parameter(empty, requires_grad=False))


def quantised(owner: nn.Module) -> Mapping[str, Held]:
    """The quantised parameters of a module itself: name -> what it stands for."""
    return owner.__dict__.get("_nf4_held", {})


def piece_names(owner: nn.Module) -> frozenset[str]:
    """Names of a module's parameters that only serve a quantised one."""
    return frozenset(leaf + piece for leaf, held in quantised(owner).items() for piece in piece_shapes(held) if piece)


def piece_shapes(held: Held) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and type of each piece, by the ending of its name. Rows of dimension 0 where they divide evenly."""
    n, rows = prod(held.shape), held.shape[0]
    blocks = -(-n // held.block)
    pieces = {"": (_by_rows(-(-n // 2), rows, n % (2 * rows) == 0), torch.uint8)}
    even = n % (rows * held.block) == 0
    if not held.double:
        return {**pieces, "_absmax": (_by_rows(blocks, rows, even), torch.int32)}
    pieces["_absmax"] = (_by_rows(blocks, rows, even), torch.uint8)
    return {**pieces, "_absmax2": ((-(-blocks // NESTED_BLOCK),), torch.int32), "_offset": ((1,), torch.int32)}


def _by_rows(n: int, rows: int, even: bool) -> tuple[int, ...]:
    return (rows, n // rows) if even else (n,)


def piece_bytes(held: Held) -> int:
    """Bytes of a quantised parameter, scales included."""
    return sum(prod(shape) * dtype.itemsize for shape, dtype in piece_shapes(held).values())


@torch.no_grad()
def store(owner: nn.Module, leaf: str, value: Tensor) -> None:
    """Quantise ``value`` (whole, on any device) into the pieces of ``owner.leaf``; a rank keeps its rows of each."""
    held = quantised(owner)[leaf]
    device = getattr(owner, leaf).device
    q = nf4.quantise(value.to(device=device, dtype=held.dtype), block=held.block, double=held.double)
    for piece, tensor in zip(piece_shapes(held), _tensors(q), strict=True):
        target = getattr(owner, leaf + piece)
        copy_into(target, _bits(tensor).reshape(target.shape))


def _tensors(q: NF4Tensor) -> list[Tensor]:
    return [t for t in (q.packed, q.absmax, q.absmax2, q.offset) if t is not None]


def _bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.int32) if tensor.is_floating_point() else tensor


def nf4_of(owner: nn.Module, leaf: str) -> NF4Tensor:
    """The kernel's view of a quantised parameter; no copy. Under FSDP2 only inside a forward, once gathered."""
    held = quantised(owner)[leaf]
    packed, absmax, *nested = (getattr(owner, leaf + piece).reshape(-1) for piece in piece_shapes(held))
    absmax2, offset = (t.view(torch.float32) for t in nested) if held.double else (None, None)
    return NF4Tensor(
        packed=packed,
        absmax=absmax if held.double else absmax.view(torch.float32),
        absmax2=absmax2,
        offset=None if offset is None else offset.reshape(()),
        shape=held.shape,
        dtype=held.dtype,
        block=held.block,
    )


@frozen(kw_only=True)
class Row:
    """A line of the start-up table. ``bytes`` are of the whole model, over all ranks."""

    kind: str  # embeddings, head, routers, experts, linears, norms, adapter, buffers
    dtype: str  # "nf4", or torch's name
    trained: bool
    tensors: int = 0
    elements: int = 0
    bytes: int = 0


def table(module: nn.Module) -> list[Row]:
    """What the model is made of, by kind and type; a quantised parameter counts once, a tied one once."""
    rows: dict[tuple[str, str, bool], Row] = {}
    seen: set[int] = set()
    for path, owner in module.named_modules():
        for leaf, tensor, persistent in _own(owner):
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            held = quantised(owner).get(leaf)
            kind = kind_of(f"{path}.{leaf}", owner) if persistent else "buffers"
            dtype = "nf4" if held else str(tensor.dtype).removeprefix("torch.")
            key = (kind, dtype, tensor.requires_grad)
            old = rows.get(key) or Row(kind=kind, dtype=dtype, trained=tensor.requires_grad)
            rows[key] = evolve(
                old,
                tensors=old.tensors + 1,
                elements=old.elements + (prod(held.shape) if held else tensor.numel()),
                bytes=old.bytes + (piece_bytes(held) if held else tensor.numel() * tensor.element_size()),
            )
    return sorted(rows.values(), key=lambda r: -r.bytes)


def _own(owner: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    """A module's own tensors; of a quantised parameter its first piece."""
    pieces = piece_names(owner)
    for leaf, p in owner._parameters.items():
        if p is not None and leaf not in pieces:
            yield leaf, p, True
    for leaf, b in owner._buffers.items():
        if b is not None:
            yield leaf, b, leaf not in owner._non_persistent_buffers_set


def kind_of(name: str, owner: nn.Module) -> str:
    """Which line of the table a parameter belongs to, by its name and module."""
    segments = name.split(".")
    if any("lora" in s for s in segments):
        return "adapter"
    if isinstance(owner, nn.Embedding):
        return "embeddings"
    if "lm_head" in segments or segments[0] == "score":
        return "head"
    if is_router(".".join(segments[:-1])) or segments[-1].endswith("correction_bias"):
        return "routers"
    if "experts" in segments:
        return "experts"
    if isinstance(owner, nn.Linear):
        return "shared experts" if any(s.startswith("shared_") for s in segments) else "linears"
    return "norms" if "norm" in name.lower() else "others"


def verify(module: nn.Module, items: Sequence[Item]) -> None:
    """Raise ModelError unless just the planned parameters are held in 4 bits, in the bytes that their shapes give."""
    planned = {i.name: i.shape for i in items}
    have = {
        _unwrapped(f"{path}.{leaf}"): held.shape if _whole(owner, leaf, held) else None
        for path, owner in module.named_modules()
        for leaf, held in quantised(owner).items()
    }
    lost = [n for n, shape in planned.items() if not any(_ends(h, n) and s == shape for h, s in have.items())]
    if lost or len(have) != len(planned):
        raise ModelError(
            "weights that were to be held in 4 bits are not, or others are",
            expected=f"{len(planned)} parameters in NF4",
            got=f"{len(have)} in NF4; not {listing(lost)}" if lost else f"{len(have)} in NF4",
        )


def _unwrapped(name: str) -> str:
    return name.replace(".base_layer", "").replace("_checkpoint_wrapped_module.", "")


def _ends(name: str, end: str) -> bool:
    """Wrappers put segments before a name."""
    return f".{name}".endswith(f".{end}")


def _whole(owner: nn.Module, leaf: str, held: Held) -> bool:
    have = (getattr(owner, leaf + piece) for piece in piece_shapes(held))
    return sum(p.numel() * p.element_size() for p in have) == piece_bytes(held)
