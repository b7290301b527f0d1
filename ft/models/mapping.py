"""transformers' knowledge of how hub folders name and split weights, as routes for ``ft.io.convert``.

transformers keeps, per family, an ordered list of renamings and of converters. We ask it for the list
(``get_model_conversion_mapping``, which peft relies on too), let each entry rename names, and read the two
operations that language models use (merge a module list, concatenate) as data. Tensors never pass through it, save
for operations that we do not know, which run as they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming

from ft.errors import ModelError
from ft.io.convert import Route, Rule

# Prefixes under which folders of vision-language models keep the language model.
_TOWERS = (("model.language_model.", "model."), ("language_model.model.", "model."), ("language_model.", ""))
# Left over on purpose: other towers, heads for multi-token prediction, buffers that old folders stored.
_EXTRAS = (
    r"(^|\.)mtp\.",
    r"(^|\.)(visual|vision_tower|vision_model|multi_modal_projector|embed_vision|audio_tower|embed_audio)\.",
    r"rotary_emb\.(original_)?inv_freq$",
    r"(^|\.)(position_ids|masked_bias)$",
)


def route_for(model: PreTrainedModel, wanted: Iterable[str]) -> Callable[[str], Route]:
    """The function that says which of ``wanted`` a stored tensor of this model's family belongs to."""
    names = frozenset(wanted)
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    rules = [(t, _rule(t, model)) for t in transforms if isinstance(t, WeightConverter)]
    prefix = f"{model.base_model_prefix}."

    def route(name: str) -> Route:
        for candidate in (name, *_without_tower(name)):
            to = _convert(_rename(candidate, renamings), rules)
            for target in (to.target, prefix + to.target, to.target.removeprefix(prefix)):
                if target in names:
                    return Route(target=target, rule=to.rule, slot=to.slot, index=to.index)
            if candidate in names:
                return Route(target=candidate)
        return Route(target=name)

    return route


def _without_tower(name: str) -> list[str]:
    return [new + name.removeprefix(old) for old, new in _TOWERS if name.startswith(old)]


def _rename(name: str, renamings: Sequence[WeightRenaming]) -> str:
    for renaming in renamings:
        name, _ = renaming.rename_source_key(name)
    return name


def _convert(name: str, rules: Sequence[tuple[WeightConverter, Rule]]) -> Route:
    """At most one converter applies to a name."""
    for converter, rule in rules:
        target, pattern = converter.rename_source_key(name)
        if pattern is not None:
            if len(converter.target_patterns) > 1:
                raise ModelError(
                    "this family stores several parameters as one tensor, which ft cannot take apart", where=name,
                    fix="load the folder with transformers and store its state_dict() as safetensors",
                )  # fmt: skip
            index = re.search(pattern.replace("*", r"(\d+)"), name) if "*" in pattern else None
            return Route(
                target=target,
                rule=rule,
                slot=rule.slots.index(pattern),
                index=int(index.group(1)) if index else None,
            )
    return Route(target=name)


def _rule(converter: WeightConverter, model: PreTrainedModel) -> Rule:
    slots, ops = tuple(converter.source_patterns), converter.operations
    merges = [op for op in ops if type(op) is MergeModulelist and op.dim == 0]
    joins = [op for op in ops if type(op) is Concatenate]
    known = len(merges) + len(joins) == len(ops) and len(merges) <= 1 and len(joins) <= 1
    if known and ops == [*merges, *joins] and (joins or len(slots) == 1):
        return Rule(slots=slots, stack=bool(merges), dim=joins[0].dim if joins else None)
    return Rule(slots=slots, stack=False, dim=None, make=lambda target: _foreign(converter, model, target))


def _foreign(converter: WeightConverter, model: PreTrainedModel, target: str) -> Callable[[list[list[Tensor]]], Tensor]:
    """Run transformers' own operations on whole tensors."""

    def make(columns: list[list[Tensor]]) -> Tensor:
        values: dict[str, Any] = dict(zip(converter.source_patterns, columns, strict=True))
        for op in converter.operations:
            values = op.convert(
                values,
                source_patterns=converter.source_patterns,
                target_patterns=converter.target_patterns,
                full_layer_name=target,
                model=model,
                config=model.config,
            )
        value = next(v for pattern, v in values.items() if pattern in target)
        return value[0] if isinstance(value, list) else value

    return make


def extras(model: PreTrainedModel) -> list[str]:
    """Patterns of stored tensors that this model does without: what transformers ignores, and layers past the last.

    Some folders store the layers for multi-token prediction behind the model's own.
    """
    patterns = [*_EXTRAS, *sorted(model._keys_to_ignore_on_load_unexpected or ())]
    if model.get_output_embeddings() is None:  # a head that scores stands in the place of the vocabulary's
        patterns.append(r"(^|\.)lm_head\.")
    depth = getattr(model.config, "num_hidden_layers", 0)
    ahead = getattr(model.config, "num_nextn_predict_layers", 0) or 0
    patterns += [rf"(^|\.)layers\.{i}\." for i in range(depth, depth + ahead)]
    return patterns
