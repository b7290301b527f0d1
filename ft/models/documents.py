"""Keep packed documents apart inside the layers that mix tokens: attention and recurrent mixers.

Shapes: T packed positions, B rows, L positions of one row, H heads, D width of one head.

transformers hands keyword arguments of a forward down to every mixer. ``Documents`` travels that way, under the name
``documents``, so that a recomputed layer (activation checkpointing) sees the documents of its own forward.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from attrs import Factory, frozen
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ft.errors import ModelError

BY_DOCUMENT = "ft_by_document"  # the name of `attention` among transformers' attention implementations
_WASTE = 1.25  # most padded positions per real one, when documents share a call of a recurrent mixer
_ALWAYS = ("linear_attn", "mamba", "conv")  # names of a layer's children that are recurrent mixers
_SOMETIMES = ("self_attn", "mixer", "temporal_block")  # and of those that may be, by the kind of the layer
_RECURRENT = ("linear_attention", "mamba", "conv", "recurrent")


@frozen(kw_only=True, eq=False)
class Documents:
    """Which positions belong together.

    ``lengths`` cut the one packed row; None means that each row is a document. A document with ``shared`` n also sees
    the first n positions of the last document before it that shares none. ``rows`` and ``back_T`` turn the
    packed row into few groups of padded rows and back, for mixers that know rows only; empty where none is split.
    """

    lengths: tuple[int, ...] | None = None
    shared: tuple[int, ...] = ()  # per document: see ``Batch.shared``; empty where none shares
    rows: tuple[Tensor, ...] = ()  # per group: positions [B, L]; padding repeats a document's last position
    back_T: Tensor | None = None  # where each position stands in the groups laid end to end
    pending: dict[int, list[Any]] = Factory(dict)  # outputs of all groups but the last, per mixer


def documents(
    lengths: tuple[int, ...], *, split: bool, device: torch.device, shared: tuple[int, ...] = ()
) -> Documents:
    """The documents of a packed row; ``split`` prepares them for recurrent mixers too, which cannot share."""
    assert not (split and shared)
    if not split:
        return Documents(lengths=lengths, shared=shared)
    rows, back = _groups(lengths)
    return Documents(lengths=lengths, rows=tuple(r.to(device) for r in rows), back_T=back.to(device))


@lru_cache(maxsize=64)
def _groups(lengths: tuple[int, ...]) -> tuple[tuple[Tensor, ...], Tensor]:
    """Documents of similar length side by side, longest first, each group within ``_WASTE``; and the way back."""
    starts = torch.tensor((0, *lengths)).cumsum(0)
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        group = groups[-1] if groups else []
        real = sum(lengths[j] for j in group) + lengths[i]
        if group and lengths[group[0]] * (len(group) + 1) <= _WASTE * real:
            group.append(i)
        else:
            groups.append([i])
    back, rows, at = torch.empty(sum(lengths), dtype=torch.int64), [], 0
    for group in groups:
        longest = lengths[group[0]]
        for row, i in enumerate(group):
            back[starts[i] : starts[i + 1]] = at + row * longest + torch.arange(lengths[i])
        ends = torch.tensor([lengths[i] - 1 for i in group])[:, None]
        rows.append(starts[group][:, None] + torch.minimum(torch.arange(longest)[None], ends))
        at += longest * len(group)
    return tuple(rows), back


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    documents: Documents | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention of each document with itself and what it shares: exact by construction, no T x T mask.

    Args:
        query, key, value: [B, H, T, D]; key and value may have fewer heads.
        documents: which positions belong together.
        sliding_window: how many positions a query sees, itself included.
        softcap: scores become softcap * tanh(scores / softcap).
        s_aux: [H], one more logit per head that takes probability and gives no value (attention sinks).

    Returns:
        [B, T, H, D], and None for the weights.

    Raises:
        ModelError: called without ``documents`` (by a generation, or by a family that drops keywords on the way), or
            with a mask, bias or cache, which it would otherwise ignore.
    """
    if documents is None:
        raise ModelError(
            "attention by document was called without documents",
            fix="outside of a Scorer's forward, switch back first: scorer.use_attention(scorer.own_attention)",
        )
    if attention_mask is not None or position_bias is not None or query.shape[2] != key.shape[2]:
        raise ModelError("attention by document takes no mask, no position bias and no cache")
    if sliding_window is not None and sliding_window <= 0:
        sliding_window = None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    plain = softcap is None and s_aux is None
    gqa = query.shape[1] != key.shape[1]
    if gqa and (not plain or key.shape[-1] != value.shape[-1]):
        times = query.shape[1] // key.shape[1]
        key, value, gqa = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1), False

    def one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        Q, K = q.shape[2], k.shape[2]
        banded = sliding_window is not None and sliding_window < K
        mask = _band(Q, K, sliding_window, q.device) if banded or not plain or Q < K else None
        if not plain:
            assert mask is not None
            return _explicit(q, k, v, mask, scale, dropout, softcap, s_aux)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scale, enable_gqa=gqa
        )

    lengths = documents.lengths if documents.lengths is not None else (query.shape[2],)
    parts = zip(
        query.split(lengths, 2), *(_seen(x.split(lengths, 2), documents.shared) for x in (key, value)), strict=True
    )
    outputs = [one(q, k, v).transpose(1, 2) for q, k, v in parts]
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)).contiguous(), None


def _seen(parts: Sequence[Tensor], shared: Sequence[int]) -> list[Tensor]:
    """Keys or values [B, H, K, D] that each document sees: what it shares, then its own."""
    if not shared:
        return list(parts)
    seen, whole = [], parts[0]
    for part, n in zip(parts, shared, strict=True):
        whole = whole if n else part
        seen.append(torch.cat([whole[:, :, :n], part], 2) if n else part)
    return seen


def _band(Q: int, K: int, window: int | None, device: torch.device) -> Tensor:
    """[Q, K], True where a query (row) sees a key (column); the last query stands at the last key."""
    seen = torch.ones(Q, K, dtype=torch.bool, device=device).tril(K - Q)
    return seen if window is None else seen.triu(K - Q + 1 - window)


def _explicit(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, dropout: float, softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:  # fmt: skip
    """Attention written out, for what the fused kernels do not know."""
    scores = q @ k.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, float("-inf"))
    if s_aux is not None:
        scores = torch.cat([scores, s_aux.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)[..., : k.shape[2]]
    return F.dropout(weights, dropout) @ v


def register() -> None:
    """Make ``attention`` known to transformers under ``BY_DOCUMENT``; doing it twice does no harm."""
    ALL_ATTENTION_FUNCTIONS.register(BY_DOCUMENT, attention)


def trunk(model: PreTrainedModel) -> nn.Module:
    """The model without its head."""
    decoder = model.get_decoder()
    return model.model if decoder is model else decoder


def recurrent_mixers(model: PreTrainedModel) -> Iterator[nn.Module]:
    """The modules that carry a state along the row (Gated DeltaNet, Mamba, lightning attention, convolutions).

    A family missed here is not packed wrongly: the leak check finds its state and pads.
    """
    for layer in getattr(trunk(model), "layers", ()):
        for name, mixer in layer.named_children():
            kind = getattr(layer, "block_type", None) or getattr(mixer, "layer_type", None)
            if name in _ALWAYS or (name in _SOMETIMES and kind in _RECURRENT):
                yield mixer


def split_mixers(model: PreTrainedModel) -> None:
    """Run each recurrent mixer document by document wherever a forward brings ``Documents`` with ``rows``.

    Such mixers know rows only. The pre-hook turns the packed row into groups of padded rows and runs all but the
    last group itself; the mixer's own call runs the last one; the hook after it lays the outputs end to end again.
    Padding stands to the right, so nothing causal sees it, and its outputs are dropped. Other forwards pass through.
    """
    for mixer in recurrent_mixers(model):
        before, after = _split_hooks(mixer)
        mixer.register_forward_pre_hook(before, with_kwargs=True)
        mixer.register_forward_hook(after)


def _split_hooks(mixer: nn.Module) -> tuple[Callable[..., Any], Callable[..., Any]]:
    # Only a weak reference stays here: a recomputation that stops early must not keep a batch's graph alive.
    current: list[weakref.ref[Documents] | None] = [None]

    def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        docs = kwargs.get("documents")
        current[0] = None
        if docs is None:
            return None
        kwargs = {name: value for name, value in kwargs.items() if name != "documents"}
        if docs.rows:
            current[0] = weakref.ref(docs)
            groups = [_rows((args, kwargs), rows, docs.back_T.numel()) for rows in docs.rows]
            docs.pending[id(module)] = [_hidden(module.forward(*a, **k)) for a, k in groups[:-1]]
            args, kwargs = groups[-1]
        return args, kwargs

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        docs = current[0]() if current[0] is not None else None
        if docs is None:
            return None
        parts = [*docs.pending.pop(id(module)), _hidden(output)]
        hidden = torch.cat([part.flatten(0, 1) for part in parts])[docs.back_T][None]
        return (hidden, *(None for _ in output[1:])) if isinstance(output, tuple) else hidden

    return before, after


def _hidden(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _rows(values: Any, rows_BL: Tensor, T: int) -> Any:
    """Every tensor of one packed row [1, T, ...] as padded rows [B, L, ...]; the rest as it is."""
    return tree_map(lambda x: x[0][rows_BL] if isinstance(x, Tensor) and x.shape[:2] == (1, T) else x, values)
