"""From a recipe to a policy that can train: skeleton, 4-bit storage, adapters, sharding, weights, layout.

The order matters. Nothing has memory before the model has its final shape and is sharded, so that a rank never
holds more than its share and one tensor.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from attrs import evolve, frozen
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers import PretrainedConfig, PreTrainedModel

from ft.dist import World
from ft.errors import ModelError, RecipeError
from ft.io.adapter import load_adapter
from ft.io.weights import ModelFolder, listing, open_weights
from ft.models import experts, head, leak, load, lora, quant, routes, tiles, tiny
from ft.models.policy import Policy, Scorer, has_balance_loss
from ft.recipe import LoRA, Model, Parallel
from ft.types import Asks

Say = Callable[[str], None]
_ASKS = Asks()


@frozen(kw_only=True, eq=False)
class Built:
    """A policy, what was adapted (None: full fine-tuning), and where its weights came from (None: random)."""

    policy: Policy
    attached: lora.Attached | None
    folder: ModelFolder | None


def plan_config(model: Model, folder: ModelFolder | None, *, vocab: int, asks: Asks = _ASKS) -> PretrainedConfig:
    """The config to build: the folder's; under ``tiny`` a shrunken one of the same architecture.

    ``vocab`` is the tokenizer's size, which a tiny model gets.

    Raises:
        ModelError: there is no folder, and no family to make a tiny model of.
    """
    return head.planned(_config(model, folder, vocab), asks)


def _config(model: Model, folder: ModelFolder | None, vocab: int) -> PretrainedConfig:
    if folder is not None:
        config = load.config_of(folder.path)
        return tiny.shrink(config, vocab) if model.tiny else config
    if model.family is None:
        raise ModelError(
            f"neither the model {model.id!r} nor its config is on this machine",
            where="model.family",
            fix="name the architecture for a rehearsal, such as model.family=qwen3_moe",
        )
    return tiny.shrink(tiny.config_by_family(model.family), vocab)


@frozen(kw_only=True, eq=False)
class Structure:
    """A model in its final shape, on the meta device: nothing is read and nothing takes memory."""

    net: PreTrainedModel
    items: tuple[quant.Item, ...]  # what is held in 4 bits
    attached: lora.Attached | None


def structure(
    model: Model, adapter: LoRA | None, config: PretrainedConfig, asks: Asks = _ASKS, *, trained: bool = True
) -> Structure:
    """Skeleton, 4-bit storage, adapters, and what is frozen. A head that scores is trained beside adapters too.

    Raises:
        RecipeError: full fine-tuning of quantised weights; dropout on experts; a frozen name that does not exist;
            an adapter on a head that scores.
        ModelError: a target that matches nothing.
    """
    if adapter is None and trained and model.quant is not None:
        raise RecipeError(
            "quantised weights cannot be trained",
            where="model.quant",
            fix="set model.quant=none, or train adapters: adapter=LoRA(...)",
        )
    net = load.skeleton(config, evolve(model, dtype="float32") if adapter is None and trained else model, asks)
    items = quant.plan(net, model.quant) if model.quant else ()
    if model.quant is not None:
        quant.apply(net, items, model.quant, model.kernels)
    experts.use_ft_experts(net, model.kernels)
    attached = lora.attach(net, adapter) if adapter else None
    if attached is not None and asks.head != "lm":
        if head.NAME in attached.linears:
            raise RecipeError(
                "the head that scores is trained whole, and takes no adapter",
                where="adapter.targets",
                got=head.NAME,
                fix="take it out",
            )
        head.train(net)
        attached = evolve(attached, task=head.TASKS[asks.head])
    if not trained:
        net.requires_grad_(False)
    elif adapter is None:
        freeze(net, model.frozen)
    return Structure(net=net, items=items, attached=attached)


def build(
    model: Model,
    adapter: LoRA | None,
    config: PretrainedConfig,
    folder: ModelFolder | None,
    *,
    world: World,
    parallel: Parallel,
    seed: int,
    say: Say,
    asks: Asks = _ASKS,
    trained: bool = True,
) -> Built:
    """Put the policy together on this rank; or with ``trained`` False, a model of which nothing is trained.

    Random weights and fresh adapters are functions of ``seed``, whatever the number of ranks.

    Raises:
        RecipeError, ModelError: see ``structure``; weights are missing or left over; no layout keeps sequences apart.
    """
    made = structure(model, adapter, config, asks, trained=trained)
    net = made.net
    if model.tile is not None:
        tiles.apply(net, model.tile)
    if model.checkpointing and trained:
        recompute(net)
    scorer = Scorer(net, kernels=model.kernels).train(trained)
    shard(scorer, world, parallel, getattr(torch, model.dtype) if adapter is None and trained else None)
    if model.tiny or folder is None:
        load.fill_random(scorer, seed, device=world.device)
    else:
        stored = open_weights(folder.path)
        filled = load.fill(scorer, stored, device=world.device, where=str(folder.path))
        if load.fresh_head(scorer, stored):
            head.init(net, seed)
            say("the head that scores starts from random weights, for the folder stores none")
        if filled.dropped:
            say(f"{len(filled.dropped):,} stored tensors have no part in the language model: {listing(filled.dropped)}")
    if head.is_ours(net):
        say(f"transformers has no {type(net).__name__}: to load what is saved, call ft.models.head.register first")
    quant.verify(net, made.items)
    if adapter:
        start_adapter(net, adapter, seed, say)
    wanted = None if model.attention == "auto" else model.attention
    layout, report = leak.check(scorer, requested=model.layout, attention=wanted, device=world.device)
    for line in report.lines():
        say(line)
    policy = Policy(scorer=scorer, config=config, layout=layout, aux=router_loss(net))
    return Built(policy=policy, attached=made.attached, folder=folder)


def router_loss(net: PreTrainedModel) -> float:
    """Coefficient of the router's balance loss: the family's own where its routers are trained, else 0."""
    trained = any(p.requires_grad and quant.is_router(name.rpartition(".")[0]) for name, p in net.named_parameters())
    coefficient = getattr(net.config, "router_aux_loss_coef", None)
    return float(coefficient) if trained and coefficient and has_balance_loss(net) else 0.0


def recompute(net: PreTrainedModel) -> None:
    """Layers recompute their activations in backward, but not which experts they choose (see routes.py)."""
    options: dict[str, Any] = {"use_reentrant": False}
    if experts.expert_modules(net):
        options["context_fn"] = routes.kept
    # transformers renamed the switch in 5.2x
    enable = getattr(net, "activation_checkpointing_enable", net.gradient_checkpointing_enable)
    enable(options)


def freeze(net: nn.Module, ends: tuple[str, ...]) -> None:
    """Full fine-tuning trains every floating parameter but those that the family keeps fixed or ``ends`` name."""
    names = {name for name, p in net.named_parameters() if p.requires_grad}
    for end in ends:
        hit = {name for name in names if name == end or name.endswith("." + end)}
        if not hit:
            raise RecipeError(f"no trained parameter ends in {end!r}", where="model.frozen")
        for name in hit:
            net.get_parameter(name).requires_grad_(False)


def start_adapter(net: nn.Module, adapter: LoRA, seed: int, say: Say = lambda _: None) -> None:
    """Fresh factors (no change to the base), or those of a saved adapter; with its head, where it has one."""
    if adapter.init is None:
        lora.init(net, seed)
        return
    tensors, config = load_adapter(adapter.init)
    own = lora.head_state(net)
    if own and not own.keys() & tensors.keys():
        say(f"{adapter.init} has no head that scores: it starts as it would without this adapter")
        tensors = {**tensors, **own}
    lora.load_state(net, tensors, config)


def layers(net: nn.Module) -> Iterator[nn.Module]:
    """The decoder layers: the members of the longest list of modules."""
    lists = [m for m in net.modules() if isinstance(m, nn.ModuleList)]
    yield from max(lists, key=len, default=())


def shard(scorer: Scorer, world: World, parallel: Parallel, compute: torch.dtype | None) -> None:
    """FSDP2 over each decoder layer and the rest. Gradients are summed over ranks, never averaged.

    ``compute``: float32 masters are gathered in this type for forward and backward (full fine-tuning). Adapters
    compute in float32 beside frozen weights of any type, so nothing is cast there, least of all 4-bit scales. A
    single rank leaves frozen weights out: there is nothing to gather, and no copy to pay for.
    """
    reduce_dtype = getattr(torch, parallel.reduce_dtype)
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=reduce_dtype if world.size > 1 else None)
    frozen_ones = {p for p in scorer.parameters() if not p.requires_grad} if world.size == 1 else set()
    options: dict[str, Any] = {
        "mesh": world.mesh if parallel.replicate > 1 else world.mesh["shard"],
        "reshard_after_forward": parallel.reshard,
        "ignored_params": frozen_ones,
    }
    if compute not in (None, torch.float32):
        for module in keep_float32(scorer.model):
            fully_shard(module, **options, mp_policy=MixedPrecisionPolicy())
    for layer in layers(scorer.model):
        fully_shard(layer, **options, mp_policy=policy)
    fully_shard(scorer, **options, mp_policy=policy)
    for module in scorer.modules():  # neither setting reaches the modules inside
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def keep_float32(net: PreTrainedModel) -> list[nn.Module]:
    """Modules whose own parameters the family asks to keep in float32 whatever the rest computes in."""
    patterns = [p.replace("*", ".*") for p in net._keep_in_fp32_modules_strict or ()]
    return [
        module
        for path, module in net.named_modules()
        if any(re.search(p, f"{path}.{leaf}") for p in patterns for leaf in module._parameters)
    ]
