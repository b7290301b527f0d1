"""How much memory a run needs on each rank, before anything is loaded, and how much there is.

What stays (weights, adapters, gradients, moments) is counted exactly, on a skeleton without memory. What passes
(activations, gathered layers, tiles of logits) is estimated from the shapes of the layers; see ``passing``.

Shapes: T positions of a micro-batch, D model width, V vocabulary, E experts, K experts per token.
"""

from __future__ import annotations

import os
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from attrs import evolve, fields, frozen
from torch import nn

from ft.errors import CapacityError
from ft.models import head, quant, targets
from ft.models.experts import expert_modules, stack_shape
from ft.models.load import skeleton, slots
from ft.recipe.parts import LoRA, Recipe
from ft.types import asked

if TYPE_CHECKING:
    from ft.models.reference import Second

NORM_BYTES = 16  # per position, width unit and layer: norms and residuals, in float32 and as they come
TILE = 64 * 2**20  # tiles of logits and their gradients
PROCESS = 400 * 2**20  # the interpreter and the libraries of one rank
MARGIN = 0.05


@frozen(kw_only=True)
class Estimate:
    """Bytes on one rank. ``loading`` is what loading needs beside the weights; it is gone before the first step."""

    weights: int
    adapters: int
    reference: int = 0  # held beside the policy
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    logits: int
    loading: int
    by_dtype: dict[str, int]  # weights of the whole model, over all ranks

    @property
    def peak(self) -> int:
        """The most that is held at one time: while loading, or in a step."""
        step = self.gradients + self.optimizer + self.gathered + self.activations + self.logits
        return self.weights + self.adapters + self.reference + max(step, self.loading)

    def lines(self) -> list[str]:
        """One line per class of bytes, then the peak."""
        parts = [f.name for f in fields(Estimate) if f.name != "by_dtype"]
        return [f"{name:<12} {size(getattr(self, name)):>10}" for name in [*parts, "peak"]]


def size(n: float) -> str:
    """Bytes for people: 1536 -> "1.5 KB"; powers of 1024."""
    for unit in ("B", "KB", "MB", "GB"):
        if abs(n) < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} TB"


def estimate(recipe: Recipe, config: Any, *, world: int = 1, second: Second | None = None) -> Estimate:
    """Estimate a run of ``recipe`` on the model of ``config``, over ``world`` ranks. Nothing is read or allocated.

    Args:
        second: the reference, where it is a model of its own.
    """
    model, adapter = recipe.model, recipe.adapter
    dtype = model.dtype if adapter is not None else "float32"
    net = skeleton(config, evolve(model, attention="auto", dtype=dtype), asked(recipe.method))
    shards = max(1, world // recipe.parallel.replicate)
    adapted = adapter_elements(net, adapter) if adapter is not None else 0
    if adapter is not None and head.parts(net):  # a head that scores is trained beside adapters
        head.train(net)
    trained = adapted + sum(p.numel() for p in head.parts(net).values()) if adapter is not None else _elements(net)
    flow = passing(net, recipe)
    loading = 2 * max(prod(slot.shape) for slot in slots(net).values()) * getattr(torch, dtype).itemsize
    if model.quant is not None:
        quant.apply(net, quant.plan(net, model.quant), model.quant)
    rows = quant.table(net)
    whole = sum(row.bytes for row in rows)
    need = Estimate(
        weights=_share(whole, shards),
        adapters=_share(4 * adapted, shards),
        gradients=_share(4 * trained, shards),
        optimizer=_share(2 * trained * recipe.optim.bits // 8, shards),
        gathered=_gathered(net, recipe, shards),
        activations=flow[0],
        logits=flow[1],
        loading=loading,
        by_dtype={dtype: sum(r.bytes for r in rows if r.dtype == dtype) for dtype in {r.dtype for r in rows}},
    )
    if second is not None:
        return _with_second(need, second, recipe, shards)
    return evolve(need, reference=need.adapters if recipe.reference.every else 0)


def _with_second(need: Estimate, second: Second, recipe: Recipe, shards: int) -> Estimate:
    """The same with a second model. It keeps no activations: one layer's stand where the policy's will.

    If its log-probs are kept, it is gone before the policy comes, so that the larger of the two counts.
    """
    model = evolve(second.model, attention="auto", dtype="float32" if second.moves else second.model.dtype)
    net = skeleton(second.config, model)
    flow = recipe.batch.tokens * max((_flow(m, model.dtype, net.config.hidden_size) for m in _layers(net)), default=0)
    if model.quant is not None:
        quant.apply(net, quant.plan(net, model.quant), model.quant)
    held = _share(sum(row.bytes for row in quant.table(net)), shards)
    gathered = 0 if shards == 1 else _two_layers(net, None)
    if recipe.reference.cached:
        return evolve(need, loading=max(need.loading, held + gathered + flow - need.weights - need.adapters))
    most = {"activations": max(need.activations, flow), "gathered": max(need.gathered, gathered)}
    return evolve(need, reference=held, **most)


def _share(n: int, shards: int) -> int:
    return -(-n // shards)


def _elements(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def adapter_elements(net: Any, adapter: LoRA) -> int:
    """Trained weights of the adapters: r (in + out) per linear layer, E r (M + N) per stack of experts."""
    chosen = {name for names in targets.resolve(net, adapter.targets).values() for name in names}
    linears = [m for name, m in net.named_modules() if name in chosen and isinstance(m, nn.Linear)]
    total = sum(adapter.r * (m.in_features + m.out_features) for m in linears)
    for path, module in expert_modules(net).items():
        for leaf in module._parameters:
            if f"{path}.{leaf}" in chosen:
                E, M, N = stack_shape(module, leaf)
                total += E * adapter.r * (M + N)
    return total


def passing(net: Any, recipe: Recipe) -> tuple[int, int]:
    """(activations, logits) of a micro-batch of T = ``batch.tokens`` positions, in bytes.

    A layer keeps the output of each linear layer (for the experts: input and output, K times), float32 copies around
    its norms, and beside 16-bit weights the float32 input of each adapter. With checkpointing every layer keeps its
    input only, and one is held in full, with gradients for half of it. Of the logits there is one tile, and a float32
    gradient per hidden state; a head that scores has no tile. What a trained head adds is counted with the gradients.
    """
    T, D = recipe.batch.tokens, net.config.hidden_size
    width = getattr(torch, recipe.model.dtype).itemsize
    casts = 4 if recipe.adapter is not None and width < 4 else 0
    flows = [_flow(m, recipe.model.dtype, D) + casts * _inputs(m) for m in _layers(net)]
    most = T * max(flows, default=0)
    kept = T * D * width * len(flows) + most * 3 // 2 if recipe.model.checkpointing else T * sum(flows) + most // 2
    return kept, T * D * (4 + width) + (TILE if asked(recipe.method).head == "lm" else 0)


def _flow(layer: nn.Module, dtype: str, D: int) -> int:
    """Bytes that one position leaves behind in a layer."""
    return getattr(torch, dtype).itemsize * _outputs(layer) + NORM_BYTES * D


def _layers(net: nn.Module) -> list[nn.Module]:
    return list(max((m for m in net.modules() if isinstance(m, nn.ModuleList)), key=len, default=()))


def _inputs(layer: nn.Module) -> int:
    return sum(m.in_features for m in layer.modules() if isinstance(m, nn.Linear))


def _outputs(layer: nn.Module) -> int:
    """Values that one position leaves behind in a layer's linear layers and chosen experts."""
    total = sum(m.out_features for m in layer.modules() if isinstance(m, nn.Linear))
    for module in expert_modules(layer).values():
        shapes = [stack_shape(module, n) for n, p in module._parameters.items() if p is not None and p.ndim == 3]
        total += _top_k(module) * sum(M + N for _, M, N in shapes)
    return total


def _top_k(module: Any) -> int:
    config = module.config
    names = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts")
    found = next((v for n in names if (v := getattr(config, n, None))), 2)
    return max(found) if isinstance(found, list) else int(found)


def _gathered(net: nn.Module, recipe: Recipe, shards: int) -> int:
    """Whole layers that a rank holds while it computes: two of them, and what lies outside the layers."""
    if shards == 1 and recipe.adapter is not None:
        return 0
    width = getattr(torch, recipe.model.dtype).itemsize if recipe.adapter is None else None
    return _two_layers(net, width, whole=not recipe.parallel.reshard)


def _two_layers(net: nn.Module, width: int | None, *, whole: bool = False) -> int:
    per_layer = [_bytes(m, width) for m in _layers(net)]
    outside = _bytes(net, width) - sum(per_layer)
    return outside + (sum(per_layer) if whole else 2 * max(per_layer, default=0))


def _bytes(module: nn.Module, width: int | None) -> int:
    return sum(p.numel() * (width or p.element_size()) for p in module.parameters())


def available(device: torch.device | str = "cpu") -> int:
    """Bytes that are free: of the GPU, or of RAM (of the container's share, where it has one)."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = [_meminfo(), _cgroup(Path("/sys/fs/cgroup"))]
    return min(n for n in free if n is not None)


def _meminfo(path: Path = Path("/proc/meminfo")) -> int:
    """MemAvailable of Linux; elsewhere physical memory."""
    if path.is_file():
        for line in path.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cgroup(root: Path) -> int | None:
    """What a container (cgroup v2) may still take: its limit less its use, but for file cache that can be dropped."""
    try:
        limit = (root / "memory.max").read_text().strip()
        used = int((root / "memory.current").read_text())
        stat = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such container
        return None
    return None if limit == "max" else max(0, int(limit) - used + int(stat.get("inactive_file", 0)))


def fits(need: Estimate, *, have: int, ranks: int = 1, rehearsal: str = "", place: str = "this machine") -> None:
    """Raise CapacityError unless ``ranks`` ranks that share ``have`` bytes can hold what each needs.

    Args:
        have: free bytes, as ``available`` tells; on GPUs of one rank's own (``ranks`` 1).
        rehearsal: the command that runs the same recipe on a tiny model.
    """
    total = ranks * (int(need.peak * (1 + MARGIN)) + PROCESS)
    if total <= have:
        return
    each = f" ({ranks} ranks of {size(need.peak)})" if ranks > 1 else ""
    raise CapacityError(
        f"{place} cannot hold this run",
        where="model",
        expected=f"{size(total)} free{each}: {_biggest(need)}",
        got=f"{size(have)}",
        fix=_advice(need, rehearsal),
    )


def _advice(need: Estimate, rehearsal: str) -> str:
    quantise = [] if "nf4" in need.by_dtype else ["model.quant=NF4() with an adapter"]
    return ", ".join([*quantise, "more ranks", "a smaller batch.tokens"]) + (f"; or {rehearsal}" if rehearsal else "")


def _biggest(need: Estimate) -> str:
    parts = [(f.name, getattr(need, f.name)) for f in fields(Estimate) if f.name != "by_dtype"]
    return ", ".join(f"{name} {size(n)}" for name, n in sorted(parts, key=lambda p: -p[1])[:3])
