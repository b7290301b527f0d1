"""One step's arithmetic: examples -> micro-batches with global counts -> shares of one global mean.

A share is a sum divided by the step's global count, so the sum of shares over micro-batches and ranks is the mean
over the step, however it was split.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import attrs
import torch
from attrs import frozen
from torch import Tensor

from ft import dist
from ft.data.pack import collate, count, pack, pack_rows, shard
from ft.data.share import share_prompts
from ft.dist import World
from ft.models.policy import Policy, forwarded, logprobs
from ft.types import Batch, Counts, Example, LossOutput, Method, asked


@frozen(kw_only=True, eq=False)
class Plan:
    """This rank's micro-batches of a step, and the step's denominators over all ranks."""

    batches: tuple[Batch, ...]
    counts: Counts
    forwarded: Tensor  # positions that all ranks forward, padding and fillers included


def plan(examples: Sequence[Example], method: Method, policy: Policy, world: World, *, tokens: int) -> Plan:
    """Pack ``examples`` into micro-batches of at most ``tokens`` positions, padding counted, for all ranks to share.

    Every rank passes the same examples and gets the same number of batches; a rank without work gets fillers.
    """
    packs = packs_of(sharing(examples, policy), policy, world, tokens=tokens)
    batches = [collate(p).to(world.device) for p in packs]
    with torch.no_grad():
        batches = [method.prepare(batch, policy) for batch in batches]
    local = attrs.asdict(sum((count(batch) for batch in batches), Counts()))
    local["forwarded"] = sum(forwarded(policy, batch) for batch in batches)
    total = dist.reduce_tree(local, world)
    return Plan(batches=tuple(batches), forwarded=total.pop("forwarded"), counts=Counts(**total))


def without_signal(examples: Sequence[Example]) -> bool:
    """Whether all answers were as good as the others of their groups, so that none is to be raised or lowered."""
    return all(example.adv_L is not None and not example.adv_L.any() for example in examples)


def sharing(examples: Sequence[Example], policy: Policy) -> Sequence[Example]:
    """The same, in order, cut where all that will forward them can forward a prompt once for its answers."""
    others = (policy.reference,) if isinstance(policy.reference, Policy) else ()
    return share_prompts(examples) if all(model.layout.shared for model in (policy, *others)) else examples


def packs_of(examples: Sequence[Example], policy: Policy, world: World, *, tokens: int) -> list[list[Example]]:
    """This rank's micro-batches, of these same objects."""
    make = pack if policy.layout.kind == "packed" else pack_rows
    return shard(make(examples, tokens=tokens), rank=world.rank, world=world.size)


def add(a: LossOutput, b: LossOutput) -> LossOutput:
    """Shares add up; maxima are compared. The result is detached."""
    sums = {name: torch.stack(_both(name, a.sums, b.sums)).sum(0) for name in {**a.sums, **b.sums}}
    maxes = {name: torch.stack(_both(name, a.maxes, b.maxes)).amax(0) for name in {**a.maxes, **b.maxes}}
    return LossOutput(loss=a.loss + b.loss.detach(), sums=sums, maxes=maxes)


def _both(name: str, *trees: Mapping[str, Tensor]) -> list[Tensor]:
    return [tree[name] for tree in trees if name in tree]


def run(plan: Plan, method: Method, policy: Policy, world: World, *, backward: bool) -> LossOutput:
    """Forward every micro-batch, and backward too where asked. Returns this rank's summed shares, detached.

    The router's balance loss, where the model gives one, is a share weighted by the micro-batch's positions.
    """
    total, asks = LossOutput(loss=torch.zeros((), device=world.device)), asked(method)
    for batch in plan.batches:
        scored = logprobs(
            policy,
            batch,
            entropy=asks.entropy,
            temperature=asks.temperature,
            compare=asks.compare,
        )
        out = method.loss(scored, batch, plan.counts)
        if scored.aux is not None:
            weight = sum(batch.lengths) / plan.counts.inputs
            balance = (scored.aux * weight).float()
            out = attrs.evolve(out, loss=out.loss + balance, sums={**out.sums, "router_balance": balance.detach()})
        if backward:
            out.loss.backward()
        total = add(total, out)
    return total


def reduce(out: LossOutput, world: World) -> LossOutput:
    """Shares summed and maxima compared over ranks: the step's own numbers, on every rank."""
    sums = dist.reduce_tree({"loss": out.loss, **{f"sums/{k}": v for k, v in out.sums.items()}}, world)
    return LossOutput(
        loss=sums.pop("loss"),
        sums={k.removeprefix("sums/"): v for k, v in sums.items()},
        maxes=dist.reduce_tree(out.maxes, world, "max"),
    )
