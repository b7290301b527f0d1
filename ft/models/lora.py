"""LoRA on a transformers model: peft's own layers on linear modules, ft's grouped factors on stacks of experts.

The state of both is exchanged in peft's names and layout. peft keeps a stack's factors as two matrices: A (E*r, N) with
the rows of one expert together, B (M, r*E) with the columns of one rank together (column k*E + e is expert e's k-th).
Two adapted stacks of one experts module nest there: the one defined first is called ``<module>.base_layer``, the last
one ``<module>``; one alone is called ``<module>`` whichever it is.

Shapes: E experts, M and N out- and input width of a weight, r LoRA rank.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Literal

import torch
from attrs import frozen
from torch import Tensor, nn

from ft.dist import copy_into, whole
from ft.errors import ModelError, RecipeError
from ft.io.stream import Entry
from ft.models import head
from ft.models.experts import NAME, ExpertLoRA, expert_modules, stack_names, stack_shape, use_ft_experts
from ft.models.targets import adaptable, resolve, shortest
from ft.recipe import LoRA

_PREFIX = "base_model.model."
_ADAPTER = "default"
_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")
# Module names that peft rewrites in models whose experts were once separate modules: an adapter listing them under
# target_modules would load onto the stacks. Named as parameters instead (x.weight), the same modules keep theirs.
_REWRITTEN = frozenset({"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})


@frozen(kw_only=True)
class Attached:
    """What ``attach`` adapted. ``matched``: the weights that each target of the recipe means."""

    lora: LoRA
    matched: Mapping[str, tuple[str, ...]]
    linears: tuple[str, ...]
    stacks: tuple[str, ...]  # "<experts module>.<stack>"
    target_modules: tuple[str, ...]  # the same for peft
    target_parameters: tuple[str, ...]
    task: str = "CAUSAL_LM"  # peft's name; any other has a head that is trained and saved whole


def scaling(lora: LoRA) -> float:
    """The factor of B A."""
    return lora.alpha / (math.sqrt(lora.r) if lora.rslora else lora.r)


def attach(model: Any, lora: LoRA) -> Attached:
    """Add adapters to ``model`` in place and freeze all else. Works on the meta device; ``init`` fills them later.

    Adapters are float32. Until ``init`` or ``load_state``, a model with real weights computes what it did before.

    Raises:
        ModelError: a target matches nothing, or the model has adapters already.
        RecipeError: dropout with experts.
    """
    if next(_slots(model), None) is not None:
        raise ModelError("the model has adapters already", where="adapter")
    everything = adaptable(model)
    matched = resolve(model, lora.targets)
    chosen = {name for names in matched.values() for name in names}
    linears = tuple(name for name in everything.linears if name in chosen)
    stacks = tuple(name for name in everything.stacks if name in chosen)
    if stacks and lora.dropout:
        raise RecipeError(
            "LoRA on experts has no dropout", where="adapter.dropout", expected="0.0", got=str(lora.dropout),
            fix="set adapter.dropout=0.0, or leave experts out of adapter.targets",
        )  # fmt: skip
    modules, parameters = _peft_targets(model, linears, stacks)
    if linears:
        _attach_linears(model, linears, lora)
    _attach_stacks(model, stacks, lora)
    adapters = {id(slot.parameter) for slot in _slots(model)}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in adapters)
    return Attached(
        lora=lora, matched=matched, linears=linears, stacks=stacks, target_modules=modules, target_parameters=parameters
    )


def import_peft() -> ModuleType:
    """peft, which takes seconds to import.

    It imports bitsandbytes where that is installed, which warns on some CPUs that it lacks the package of a kernel
    that nothing here calls. That line is left out; whatever else is said comes through.
    """
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.addFilter(_concerns_us)
    try:
        import peft
    finally:
        logger.removeFilter(_concerns_us)
    return peft


def _concerns_us(record: logging.LogRecord) -> bool:
    return "gemm_4bit_forward" not in str(record.msg)


def _attach_linears(model: nn.Module, names: tuple[str, ...], lora: LoRA) -> None:
    peft = import_peft()
    # Inside a plain module peft sees no transformers config, so it adapts the modules that were named (see _REWRITTEN).
    holder = nn.Module()
    holder.add_module("model", model)
    config = peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        target_modules=[f"model.{name}" for name in names],
    )
    on_meta = all(p.is_meta for p in model.parameters())
    peft.inject_adapter_in_model(config, holder, adapter_name=_ADAPTER, low_cpu_mem_usage=on_meta)
    for _, module in _adapted_linears(model):
        for part in (module.lora_A, module.lora_B):
            part[_ADAPTER].float()
        module.train(module.get_base_layer().training)


def _attach_stacks(model: nn.Module, stacks: tuple[str, ...], lora: LoRA) -> None:
    modules = expert_modules(model)
    if stacks and any(m.config._experts_implementation != NAME for m in modules.values()):
        use_ft_experts(model)  # nothing else reads the factors
    for name, module in modules.items():
        shapes = {s: stack_shape(module, s) for s in stack_names(module) if f"{name}.{s}" in stacks}
        if shapes:
            device = next(module.parameters()).device
            module.ft_lora = ExpertLoRA(shapes, r=lora.r, scaling=scaling(lora), device=device)


def _peft_targets(
    model: nn.Module, linears: tuple[str, ...], stacks: tuple[str, ...]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """target_modules and target_parameters with which peft adapts the same weights of the same base model."""
    everything = adaptable(model)
    rewritten = {n for n in linears if everything.stacks and n.rpartition(".")[2] in _REWRITTEN}
    modules = shortest(set(linears) - rewritten, [name for name, _ in model.named_modules() if name])
    weights = {f"{name}.weight" for name, module in model.named_modules() if name and hasattr(module, "weight")}
    parameters = shortest({*stacks, *(f"{n}.weight" for n in rewritten)}, weights | everything.stacks.keys())
    return tuple(modules), tuple(parameters)


# --- adapters as peft names them -------------------------------------------------------------------------------------


@frozen(kw_only=True, eq=False)
class _Slot:
    """A factor where it lies, and the name peft gives it. Stacked factors are (E, r, N) and (E, M, r)."""

    key: str
    parameter: nn.Parameter
    factor: Literal["A", "B", "whole"]  # whole: a parameter of the head, which is no factor
    stacked: bool

    def to_peft(self, value: Tensor) -> Tensor:
        if not self.stacked:
            return value
        return value.flatten(0, 1) if self.factor == "A" else value.permute(1, 2, 0).flatten(1)

    def from_peft(self, value: Tensor) -> Tensor:
        if not self.stacked:
            return value
        E = self.parameter.shape[0]
        if self.factor == "A":
            return value.unflatten(0, (E, -1))
        return value.unflatten(1, (-1, E)).permute(2, 0, 1)

    @property
    def peft_shape(self) -> tuple[int, ...]:
        if not self.stacked:
            return tuple(self.parameter.shape)
        E, i, j = self.parameter.shape
        return (E * i, j) if self.factor == "A" else (i, j * E)


def _slots(model: nn.Module) -> Iterator[_Slot]:
    """Every adapter parameter, in the model's order."""
    for name, module in _adapted_linears(model):
        for factor in ("A", "B"):
            parameter = getattr(module, f"lora_{factor}")[_ADAPTER].weight
            yield _Slot(key=f"{_PREFIX}{name}.lora_{factor}.weight", parameter=parameter, factor=factor, stacked=False)
    for name, module in expert_modules(model).items():
        lora: ExpertLoRA | None = getattr(module, "ft_lora", None)
        for depth, stack in enumerate(reversed(lora.stacks if lora else ())):
            for factor in ("A", "B"):
                key = f"{_PREFIX}{_plain(name)}{'.base_layer' * depth}.lora_{factor}.weight"
                yield _Slot(key=key, parameter=getattr(lora, f"{stack}_{factor}"), factor=factor, stacked=True)


def _adapted_linears(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """peft's layers, told without importing peft."""
    for name, module in model.named_modules():
        if isinstance(getattr(module, "lora_A", None), nn.ModuleDict):
            yield _plain(name), module


def _plain(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _head_slots(model: nn.Module) -> Iterator[_Slot]:
    """The head that is trained beside the adapters, where it scores."""
    for name, parameter in head.parts(model).items():
        yield _Slot(key=f"{_PREFIX}{name}", parameter=parameter, factor="whole", stacked=False)


def head_state(model: nn.Module) -> dict[str, Tensor]:
    """The head that is trained beside the adapters, whole, in peft's names: copies. Empty for a language model."""
    return {slot.key: whole(slot.parameter.detach()).clone() for slot in _head_slots(model)}


def adapter_entries(model: nn.Module) -> list[Entry]:
    """The adapters, and the head trained beside them, in peft's names and layout, to be written.

    Each is gathered, by all ranks, when its turn comes.
    """

    def entry(slot: _Slot) -> Entry:
        def get() -> Tensor:
            return slot.to_peft(whole(slot.parameter.detach())).contiguous()

        return Entry(name=slot.key, shape=slot.peft_shape, dtype=slot.parameter.dtype, get=get)

    return [entry(slot) for slot in (*_slots(model), *_head_slots(model))]


def factors(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters' parameters where they lie, by peft's names."""
    return {slot.key: slot.parameter for slot in _slots(model)}


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The same, gathered whole at once: copies."""
    return {entry.name: entry.get().clone() for entry in adapter_entries(model)}


def adapter_config(attached: Attached, base: str) -> dict[str, Any]:
    """adapter_config.json, as the installed peft writes it, for adapters on the model called ``base``."""
    lora = attached.lora
    by_parameter = any(name.endswith(".weight") for name in attached.target_parameters)
    config = import_peft().LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=0.0 if by_parameter else lora.dropout,  # peft refuses dropout on parameters, even for inference
        use_rslora=lora.rslora,
        target_modules=list(attached.target_modules),
        target_parameters=list(attached.target_parameters) or None,
        task_type=attached.task,
        modules_to_save=None if attached.task == "CAUSAL_LM" else [head.NAME],
        base_model_name_or_path=base,
        inference_mode=True,
    )
    plain = json.loads(json.dumps(config.to_dict(), default=sorted))
    plain["target_modules"] = sorted(plain["target_modules"])
    plain["lora_alpha"] = int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha
    return plain


# --- values ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def init(model: nn.Module, seed: int) -> None:
    """Fill all adapters: A uniform within 1 / sqrt(N), as peft's, B zero.

    A value depends on the seed and the adapter's name only, not on the number of ranks or on other adapters.
    """
    for slot in _slots(model):
        value = torch.zeros(slot.peft_shape)
        if slot.factor == "A":
            rng = torch.Generator().manual_seed(_seed(seed, slot.key))
            value.uniform_(-1.0, 1.0, generator=rng).mul_(slot.peft_shape[1] ** -0.5)
        _assign(slot, value)


def _seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=7).digest(), "little")


@torch.no_grad()
def load_state(model: nn.Module, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> None:
    """Fill all adapters from a state in peft's names and layout; every rank passes the same.

    Args:
        config: the adapter's adapter_config.json. Where given, its scaling and its experts' stacks must be the model's.

    Raises:
        ModelError: tensors that are missing, left over or of another shape, or a config that does not fit.
    """
    slots = {slot.key: slot for slot in (*_slots(model), *_head_slots(model))}
    missing, unexpected = sorted(slots.keys() - tensors.keys()), sorted(tensors.keys() - slots.keys())
    if missing or unexpected:
        raise ModelError(
            "the adapter does not fit the model", where="adapter.init",
            expected=f"missing {_listing(missing)}", got=f"unexpected {_listing(unexpected)}",
            fix="set adapter.targets to what the adapter was trained with",
        )  # fmt: skip
    wrong = [name for name, slot in slots.items() if tuple(tensors[name].shape) != slot.peft_shape]
    if wrong:
        raise ModelError(
            f"{len(wrong)} tensors of the adapter have another shape", where=wrong[0],
            expected=str(slots[wrong[0]].peft_shape), got=str(tuple(tensors[wrong[0]].shape)),
            fix="set adapter.r to the adapter's rank, and train on the base that it was made for",
        )  # fmt: skip
    if config is not None:
        _check_config(model, config)
    for name, slot in slots.items():
        _assign(slot, tensors[name].to(slot.parameter.dtype))


def _check_config(model: nn.Module, config: Mapping[str, Any]) -> None:
    r, alpha = config.get("r", 8), config.get("lora_alpha", 8)
    theirs = alpha / (math.sqrt(r) if config.get("use_rslora") else r)
    for ours in _scalings(model):
        if not math.isclose(ours, theirs, rel_tol=1e-6):
            raise ModelError(
                "the adapter was trained with another scaling", where="adapter.alpha",
                expected=f"{ours} (from adapter.alpha, adapter.r and adapter.rslora)", got=f"{theirs}",
                fix=f"set adapter.alpha={alpha} adapter.r={r} adapter.rslora={bool(config.get('use_rslora'))}",
            )  # fmt: skip
    stacks = {stack for m in expert_modules(model).values() if hasattr(m, "ft_lora") for stack in m.ft_lora.stacks}
    named = {name.rpartition(".")[2] for name in config.get("target_parameters") or ()}
    if len(stacks) == 1 and named and not stacks & named:  # their tensors have the same name
        raise ModelError(
            "the adapter adapts another stack of the experts", where="adapter.targets",
            expected=", ".join(stacks), got=", ".join(sorted(named)),
        )  # fmt: skip


def _scalings(model: nn.Module) -> set[float]:
    linears = {float(module.scaling[_ADAPTER]) for _, module in _adapted_linears(model)}
    return linears | {m.ft_lora.scaling for m in expert_modules(model).values() if hasattr(m, "ft_lora")}


def _listing(names: list[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "nothing") + more


def _assign(slot: _Slot, value: Tensor) -> None:
    """Copy a whole value in peft's layout to where the factor lies; each rank keeps its shard, without a message."""
    parameter: Tensor = slot.parameter
    assert not parameter.is_meta, f"{slot.key} has no storage yet"
    copy_into(parameter, slot.from_peft(value.to(parameter.device)))


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Switch all adapters off: inside, the model is its base."""
    linears = [module for _, module in _adapted_linears(model)]
    stacks = [m.ft_lora for m in expert_modules(model).values() if hasattr(m, "ft_lora")]
    # peft's own switch also toggles requires_grad, which FSDP reads once, at a parameter's first use.
    before = [module._disable_adapters for module in linears], [lora.enabled for lora in stacks]
    for module in linears:
        module._disable_adapters = True
    for lora in stacks:
        lora.enabled = False
    try:
        yield
    finally:
        for module, value in zip(linears, before[0], strict=True):
            module._disable_adapters = value
        for lora, value in zip(stacks, before[1], strict=True):
            lora.enabled = value
