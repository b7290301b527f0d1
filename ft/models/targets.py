"""Which weights a LoRA recipe means: groups and ends of names, resolved against the model at hand.

Groups go by the names of modules, which are much the same in all of transformers' families:

    attention       what mixes tokens: attention, Gated DeltaNet, Mamba (but its out_proj, which fused code bypasses)
    mlp             dense feed-forward layers
    shared_experts  feed-forward layers that every token passes, beside the routed experts
    experts         stacks of routed experts
    all-linear      all of these and any other linear layer, except the head, routers and what groups leave out

No group holds routers, gates of shared experts, sparse-attention indexers (language modelling gives them no gradient),
the head, or towers for images and sound. A name that ends in theirs does, as "lm_head" or "router.gate".
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from attrs import frozen
from torch import nn

from ft.errors import ModelError
from ft.models.experts import expert_modules, stack_names
from ft.models.quant import is_bypassed, is_router

EVERYTHING = "all-linear"
GROUPS = ("attention", "mlp", "shared_experts", "experts", EVERYTHING)

_TOWER = re.compile(r"vis(ion|ual)|audio")
_MIXER = re.compile(r"attn|attention|mamba")
_DENSE = frozenset({"mlp", "feed_forward", "ffn"})
_IN_MIXER = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj", "in_proj", "out_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}


@frozen(kw_only=True)
class Weights:
    """What can be adapted, by group ("" is in none): linear modules, and stacks as "<experts module>.<stack>"."""

    linears: Mapping[str, str]
    stacks: Mapping[str, str]

    def names(self) -> dict[str, str]:
        return {**self.linears, **self.stacks}


def adaptable(model: Any) -> Weights:
    """Every linear layer and every stack of experts of a transformers model, with its group."""
    head = getattr(model, "get_output_embeddings", lambda: None)() or getattr(model, "score", None)
    linears = {
        name: "" if module is head or is_bypassed(model, name) else _group(name.split("."))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    stacks = (f"{name}.{stack}" for name, m in expert_modules(model).items() for stack in stack_names(m))
    return Weights(linears=linears, stacks=dict.fromkeys(stacks, "experts"))


def _group(path: Sequence[str]) -> str:
    *parents, leaf = path
    if is_router(".".join(path)) or any(_TOWER.match(part) for part in parents):
        return ""
    if any(part.startswith(("shared_expert", "shared_mlp")) for part in parents):
        return "shared_experts"
    if any(_MIXER.search(part) for part in parents):
        return "attention"
    if "mixer" in parents:  # one name for what a layer does, whatever that is
        return next((group for group, leaves in _IN_MIXER.items() if leaf in leaves), EVERYTHING)
    return "mlp" if _DENSE.intersection(parents) else EVERYTHING


def resolve(model: Any, targets: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The names that each target means, in the model's order.

    Raises:
        ModelError: a target matches nothing. The message lists what there is.
    """
    names = adaptable(model).names()
    found = {target: tuple(n for n, group in names.items() if _means(target, n, group)) for target in targets}
    for target, matched in found.items():
        if not matched:
            raise _nothing(target, names)
    return found


def _means(target: str, name: str, group: str) -> bool:
    if target in GROUPS:
        return bool(group) and target in (group, EVERYTHING)
    if name != target and not name.endswith(f".{target}"):
        return False
    return not is_router(name) or is_router(target)  # "proj" is not enough to mean "router.proj"


def _nothing(target: str, names: Mapping[str, str]) -> ModelError:
    groups = Counter(names.values())
    held = ", ".join(f"{g} ({groups[g]})" for g in GROUPS if groups[g])
    ends = dict.fromkeys(".".join(n.split(".")[-2:]) for n in names)
    known = [*groups, EVERYTHING, *(n.split(".")[-1] for n in names), *ends]
    near = difflib.get_close_matches(target, known, n=1)
    return ModelError(
        f"LoRA target {target!r} matches nothing in this model",
        where="adapter.targets",
        expected=f"a group: {held or 'none here'}; or the end of a name: {', '.join(ends)}",
        got=target,
        fix=f"did you mean {near[0]!r}?" if near else "name one of these",
    )


def shortest(names: Iterable[str], universe: Collection[str]) -> list[str]:
    """The shortest ends of names that match exactly ``names`` and nothing else of ``universe``."""
    wanted = set(names)
    everywhere, here = Counter(_ends(universe)), Counter(_ends(wanted))

    def shorten(name: str) -> str:
        return next((end for end in _ends([name]) if everywhere[end] == here[end]), name)

    return sorted({shorten(name) for name in wanted})


def _ends(names: Iterable[str]) -> Iterable[str]:
    for name in names:
        parts = name.split(".")
        yield from (".".join(parts[-k:]) for k in range(1, len(parts) + 1))
