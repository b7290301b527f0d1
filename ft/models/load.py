"""From a model folder to a model: config, skeleton on the meta device, then the weights, tensor by tensor.

Every rank reads what it keeps and nothing is sent between ranks. Peak memory is the final model and one tensor.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import torch
from attrs import frozen
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_PRETRAINING_MAPPING,
    PretrainedConfig,
    PreTrainedModel,
)

from ft.dist import local_rows
from ft.errors import MissingFileError, ModelError
from ft.io.convert import Layout, Op, Plan, evaluate, make_plan
from ft.io.weights import Memory, TensorSource
from ft.models import head
from ft.models.mapping import extras, route_for
from ft.models.quant import piece_names, quantised, store
from ft.recipe.parts import Model
from ft.types import Asks

# Segments that wrappers of modules add to parameter names.
_WRAPPERS = ("base_layer.", "_checkpoint_wrapped_module.", "_orig_mod.")
_ADAPTER = ("lora_", "ft_lora")  # beginnings of segments
_ASKS = Asks()


def config_of(folder: Path) -> PretrainedConfig:
    """The config of the language model in ``folder``; a vision-language model gives its text tower's.

    Keys that begin with "_" and code references are left out: a stranger's config must not choose code to run.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise MissingFileError("the model folder has no config.json", where=str(folder))
    try:
        facts = _public(json.loads(path.read_text()))
        kind = facts.pop("model_type")
    except (ValueError, KeyError, AttributeError) as e:
        raise ModelError("config.json is not a model's config", where=str(path), got=repr(e)) from e
    if quantised_by := facts.get("quantization_config"):
        raise ModelError(
            "the weights are already quantised",
            where=str(path),
            expected="weights in 16 or 32 bits",
            got=str(quantised_by.get("quant_method", quantised_by)),
            fix="take the 16-bit weights; Model(quant=NF4()) quantises them while loading",
        )
    if kind not in CONFIG_MAPPING:
        raise ModelError(f"transformers knows no model type {kind!r}", where=str(path), fix="upgrade transformers")
    return text_config(CONFIG_MAPPING[kind].from_dict(facts))


def _public(value: Any) -> Any:
    """``value`` without private keys, references to code and choices of implementation, at any depth."""
    if isinstance(value, dict) and value.keys() == {"__float__"}:
        return float(value["__float__"])  # transformers' way to write an infinity
    if isinstance(value, dict):
        barred = ("auto_map", "attn_implementation", "experts_implementation")
        return {k: _public(v) for k, v in value.items() if not k.startswith("_") and k not in barred}
    return [_public(v) for v in value] if isinstance(value, list) else value


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The text tower's config where ``config`` is a wrapper's, else ``config``."""
    return config.get_text_config(decoder=True)


def causal_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class of the language model with its head."""
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_PRETRAINING_MAPPING):
        found: Any = mapping.get(type(config), None)
        if found is not None and found.__name__.endswith("ForCausalLM"):
            return found
    raise ModelError(f"transformers has no causal language model for {config.model_type!r}", where="model")


def model_class(config: PretrainedConfig, asks: Asks) -> type[PreTrainedModel]:
    """The class of the model with the head that a method asks for."""
    causal = causal_class(config)
    return causal if asks.head == "lm" else head.scoring_class(config, asks.head, causal)


def skeleton(config: PretrainedConfig, model: Model, asks: Asks = _ASKS) -> PreTrainedModel:
    """The model with its parameters on the meta device, in ``model.dtype``, in eval mode; its head as ``asks`` says.

    Parameters that the family keeps in float32 stay so. Buffers that no folder stores (rotary frequencies) are
    computed, on the CPU.
    """
    config = deepcopy(text_config(config))
    dtype = getattr(torch, model.dtype)
    made = model_class(config, asks)
    wish: dict[str, Any] = {} if model.attention == "auto" else {"attn_implementation": model.attention}
    try:
        with torch.device("meta"):
            built = made._from_config(config, dtype=dtype, **wish)
    except (ValueError, ImportError) as e:
        raise ModelError(
            f"{config.model_type} cannot be built as asked", where="model.attention", got=str(e),
            fix='attention="auto" takes what the model supports',
        ) from e  # fmt: skip
    built.config.use_cache = False
    if asks.head != "lm":
        head.check(built)
        head.carry_routing(built)
    _keep_float32(built, dtype)
    _fill_computed_buffers(built)
    return built.eval()


def _keep_float32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give float32 to the tensors for which the family asks it, where the model is held in 16 bits."""
    patterns = list(model._keep_in_fp32_modules_strict or ()) if dtype != torch.float32 else []
    patterns += list(model._keep_in_fp32_modules or ()) if dtype == torch.float16 else []
    for name, _ in list(model.named_parameters()) + list(model.named_buffers()):
        if any(_glob(pattern, name) for pattern in patterns):
            owner, leaf = _owner(model, name)
            tensor = getattr(owner, leaf).to(torch.float32)
            setattr(owner, leaf, nn.Parameter(tensor) if leaf in owner._parameters else tensor)


def _glob(pattern: str, name: str) -> bool:
    return re.search(pattern.replace("*", ".*"), name) is not None


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def _fill_computed_buffers(model: PreTrainedModel) -> None:
    """Compute the non-persistent buffers, which the meta device lost, with the family's own initialisation."""
    for owner, module in _modules(model):
        names = [n for n in module._non_persistent_buffers_set if isinstance(module._buffers.get(n), Tensor)]
        for name in names:
            module._buffers[name] = _unset(cast(Tensor, module._buffers[name]))
        if names:
            owner._init_weights(module)
        lost = [n for n in names if _is_unset(cast(Tensor, module._buffers[n]))]
        assert not lost, f"{type(module).__name__} leaves its buffers {lost} uncomputed"


def _modules(model: PreTrainedModel) -> Iterator[tuple[PreTrainedModel, nn.Module]]:
    """Every module, with the innermost PreTrainedModel around it, children first."""

    def walk(module: nn.Module, owner: PreTrainedModel) -> Iterator[tuple[PreTrainedModel, nn.Module]]:
        owner = module if isinstance(module, PreTrainedModel) else owner
        for child in module.children():
            yield from walk(child, owner)
        yield owner, module

    yield from walk(model, model)


def _unset(like: Tensor) -> Tensor:
    return torch.full_like(like, math.nan if like.is_floating_point() else 0, device="cpu")


def _is_unset(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and bool(tensor.isnan().any())


def materialise(module: nn.Module, device: torch.device | str) -> None:
    """Give memory (not values) to what is on the meta device, and move the rest; tied parameters stay tied.

    Unlike ``to_empty`` this keeps the values of buffers that the skeleton computed. Sharded modules are welcome.
    """
    ties = _ties(module)
    module._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))
    for first, *others in ties:
        shared = getattr(*first)
        for owner, leaf in others:
            owner._parameters[leaf] = shared


def _ties(module: nn.Module) -> list[list[tuple[nn.Module, str]]]:
    """Groups of places that hold one and the same parameter."""
    places: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for m in module.modules():
        for leaf, p in m._parameters.items():
            if p is not None:
                places[id(p)].append((m, leaf))
    return [group for group in places.values() if len(group) > 1]


def causal_model(module: nn.Module) -> PreTrainedModel:
    """The outermost transformers model in ``module``."""
    for m in module.modules():
        if isinstance(m, PreTrainedModel):
            return m
    raise AssertionError("no transformers model inside")


@frozen(kw_only=True)
class Filled:
    """What loading did: tensors filled, names left out on purpose, how the folder keeps its experts."""

    tensors: int
    dropped: tuple[str, ...]
    layout: Layout


@frozen(kw_only=True, eq=False)
class Slot:
    """A parameter or stored buffer of the model, under the name that transformers gives it."""

    owner: nn.Module
    leaf: str
    shape: tuple[int, ...]
    tied: tuple[str, ...] = ()  # other names of the same parameter


def slots(module: nn.Module) -> dict[str, Slot]:
    """Everything that a folder must fill; wrappers' names are undone, adapters left out, a tie counted once.

    Quantised parameters count as one slot of their unquantised shape.
    """
    model = causal_model(module)
    names: dict[int, list[str]] = defaultdict(list)
    found: dict[int, Slot] = {}
    for path, owner in model.named_modules(remove_duplicate=False):
        if any(segment.startswith(_ADAPTER) for segment in path.split(".")):
            continue
        for leaf, tensor in _stored(owner):
            names[id(tensor)].append(_plain(f"{path}.{leaf}" if path else leaf))
            found.setdefault(id(tensor), Slot(owner=owner, leaf=leaf, shape=_shape(owner, leaf, tensor)))
    table = {}
    for key, slot in found.items():
        first, *others = dict.fromkeys(names[key])
        table[first] = Slot(owner=slot.owner, leaf=slot.leaf, shape=slot.shape, tied=tuple(others))
    return table


def _stored(owner: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's own parameters and persistent buffers; of a quantised one its first piece only."""
    pieces = piece_names(owner)
    for leaf, p in owner._parameters.items():
        if p is not None and leaf not in pieces and not leaf.startswith(_ADAPTER):
            yield leaf, p
    for leaf, b in owner._buffers.items():
        if b is not None and leaf not in owner._non_persistent_buffers_set:
            yield leaf, b


def _shape(owner: nn.Module, leaf: str, tensor: Tensor) -> tuple[int, ...]:
    held = quantised(owner).get(leaf)
    return tuple(tensor.shape) if held is None else held.shape


def _plain(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def fill(
    module: nn.Module,
    source: TensorSource,
    *,
    device: torch.device | str = "cpu",
    where: str = "",
    progress: Callable[[str], None] | None = None,
) -> Filled:
    """Fill the model in ``module`` from stored tensors: converted, cast, quantised where its parameter is.

    Args:
        module: a skeleton, with or without quantised parameters, adapters, sharding and wrappers. What is on the
            meta device gets memory on ``device`` first. Adapter weights are not touched.
        where: the folder's name, for messages.
        progress: called with the name of each parameter before it is read.

    Raises ModelError that lists parameters nothing is stored for, or stored tensors that nothing wants.
    """
    if any(t.is_meta for t in [*module.parameters(), *module.buffers()]):
        materialise(module, device)
    table, found = slots(module), plan(module, source, where=where)
    aliases = _aliases(table)
    for name, op in found.ops.items():
        if progress is not None:
            progress(name)
        first = aliases[name]
        canonical = next(n for n in (first, *table[first].tied) if n in found.ops)
        if name == canonical:
            put(table[first], op, source)
        else:
            _check_tie(name, op, found.ops[canonical], source, where)
    return Filled(tensors=len(found.ops), dropped=found.dropped, layout=found.layout)


def plan(module: nn.Module, source: TensorSource, *, where: str = "") -> Plan:
    """How ``fill`` would make each parameter, from names and shapes alone. Raises as ``fill`` does."""
    model, table = causal_model(module), slots(module)
    to = route_for(model, _aliases(table))
    if fresh_head(module, source):
        table = {name: slot for name, slot in table.items() if name not in head.parts(model)}
    return make_plan(source, _present(source, to, table), to, drop=extras(model), where=where)


def fresh_head(module: nn.Module, source: TensorSource) -> bool:
    """Whether the model has a head that scores, of which ``source`` stores nothing: a language model's folder."""
    own = head.parts(causal_model(module))
    return bool(own) and not any(name.rpartition(".")[0].endswith(head.NAME) for name in source.names())


def _aliases(table: Mapping[str, Slot]) -> dict[str, str]:
    """First name of a slot by each of its names."""
    return {name: first for first, slot in table.items() for name in (first, *slot.tied)}


def _present(source: TensorSource, route: Callable, table: Mapping[str, Slot]) -> dict[str, tuple[int, ...]]:
    """Names to be filled: each slot once, and again under those other names of a tie that the folder stores too."""
    hit = {route(name).target for name in source.names()}
    wanted: dict[str, tuple[int, ...]] = {}
    for first, slot in table.items():
        stored = [name for name in (first, *slot.tied) if name in hit]
        for name in stored or [first]:
            wanted[name] = slot.shape
    return wanted


def _check_tie(name: str, op: Op, other: Op, source: TensorSource, where: str) -> None:
    if not torch.equal(evaluate(op, source), evaluate(other, source)):
        raise ModelError(
            f"the config ties {name} to the embeddings, but the folder stores other values for it",
            where=where,
            fix='set "tie_word_embeddings": false in config.json',
        )


@torch.no_grad()
def put(slot: Slot, op: Op, source: TensorSource) -> None:
    """Make one parameter's value and copy it in; a sharded parameter keeps its rows, a quantised one its codes."""
    if slot.leaf in quantised(slot.owner):
        store(slot.owner, slot.leaf, evaluate(op, source))
        return
    tensor = getattr(slot.owner, slot.leaf)
    local, start, stop = local_rows(tensor)
    if local.ndim and stop == start:
        return
    local.copy_(evaluate(op, source, start, stop) if local.ndim else evaluate(op, source).reshape(()))


def fill_random(module: nn.Module, seed: int, *, device: torch.device | str = "cpu") -> Filled:
    """Fill with the family's own random initialisation: the same values on any number of ranks.

    A float32 twin of the whole model is drawn on the CPU from ``seed``; each rank keeps its part.
    """
    config = deepcopy(causal_model(module).config)
    config.dtype = torch.float32
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        twin = type(causal_model(module))._from_config(config, dtype=torch.float32)
    tensors = {name: getattr(slot.owner, slot.leaf).detach() for name, slot in slots(twin).items()}
    return fill(module, Memory(tensors=tensors), device=device, where="random weights")
