"""How the sequences of a batch share one forward: in one packed row, or in padded rows.

Shapes: T positions of a batch, S sequences (rows where padded), L positions of the longest row.

A ``Layout`` is a plan, fixed before the first step by ``ft.models.leak.check``; ``arrange`` carries it out.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from attrs import evolve, field, frozen
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from ft.models.documents import BY_DOCUMENT, Documents, documents, recurrent_mixers
from ft.types import Batch


@frozen(kw_only=True)
class Layout:
    """What keeps sequences apart."""

    kind: Literal["packed", "padded"]
    attention: str
    """transformers' name of the attention implementation; ``BY_DOCUMENT`` is ours."""
    masks: Literal["none", "by kind", "one"] = "none"
    """Explicit [T, T] masks: one per kind of layer, or one for all; families take one form or the other."""
    varlen: bool = False
    """Hand over cu_seqlens and seq_idx, which flash attention and the kernels of recurrent layers understand."""
    split: bool = False
    """Recurrent mixers run document by document."""
    shared: bool = False
    """A prompt with several answers is forwarded once; they read its keys and values."""

    def __str__(self) -> str:
        how = [] if self.attention == BY_DOCUMENT else [f"{self.attention} attention"]
        how += ["attention by document"] if self.attention == BY_DOCUMENT and self.kind == "packed" else []
        how += ["explicit masks"] if self.masks != "none" else []
        how += ["cu_seqlens"] if self.varlen else []
        how += ["recurrent layers by document"] if self.split else []
        how += ["a prompt once for all its answers"] if self.shared else []
        return f"{self.kind} ({', '.join(how)})" if how else self.kind


def alone(attention: str) -> Layout:
    """The oracle's layout: plain rows, the model's own attention, nothing of ours."""
    return Layout(kind="padded", attention=attention)


def candidates(
    model: PreTrainedModel, *, own: str, attention: str | None = None, device: str = "cpu", kind: str = "auto"
) -> tuple[Layout, ...]:
    """Layouts worth trying, best first.

    Args:
        own: the model's own attention implementation, tried after ours.
        attention: an implementation the user asked for, and then the only one.
        kind: "packed", "padded", or "auto" for both.
    """
    recurrent = next(recurrent_mixers(model), None) is not None
    names = (attention,) if attention else (BY_DOCUMENT, own)
    found: list[Layout] = []
    if kind in ("auto", "packed"):
        for base in (form for name in names for form in _packed_forms(name)):
            if recurrent and device != "cpu":  # on a CPU transformers' recurrent layers ignore cu_seqlens
                found.append(evolve(base, varlen=True))
            found.append(evolve(base, split=recurrent))
    if kind in ("auto", "padded"):
        found += [Layout(kind="padded", attention=name) for name in names]
    return tuple(found)


def may_share(layout: Layout) -> bool:
    """Whether a prompt can stand before several answers: attention can look back at it, a carried state cannot."""
    return layout.attention == BY_DOCUMENT and layout.kind == "packed" and not layout.split and not layout.varlen


def _packed_forms(name: str) -> tuple[Layout, ...]:
    plain = Layout(kind="packed", attention=name)
    if name == BY_DOCUMENT:
        return (plain,)
    if name.startswith("flash"):
        return (evolve(plain, varlen=True),)
    return evolve(plain, masks="by kind"), evolve(plain, masks="one")


@frozen(kw_only=True, eq=False)
class Rows:
    """A batch as a model's trunk takes it."""

    tokens_SL: Tensor
    kwargs: dict[str, Any] = field(repr=False)
    place_T: Tensor | None = None
    """Where each position of the batch stands among S * L; None: in its own place. Filler points anywhere."""
    real_SL: Tensor | None = None
    """False on padding and filler; None where there is none."""


def arrange(batch: Batch, layout: Layout, config: PretrainedConfig, dtype: torch.dtype) -> Rows:
    """Lay a batch out. Shapes come from ``batch.lengths``, so that nothing waits for the device."""
    assert layout.shared or not batch.shared, "this layout forwards each prompt with each of its answers"
    if layout.kind == "packed":
        return _packed(batch, layout, config, dtype)
    return _padded(batch, layout)


def forwarded(batch: Batch, layout: Layout) -> int:
    """Positions that the trunk sees, padding and filler included."""
    if layout.kind == "packed" or not batch.lengths:
        return batch.input_T.shape[0]
    return len(batch.lengths) * max(batch.lengths)


def _packed(batch: Batch, layout: Layout, config: PretrainedConfig, dtype: torch.dtype) -> Rows:
    T, device = batch.input_T.shape[0], batch.input_T.device
    filler = T - sum(batch.lengths)
    lengths = (*batch.lengths, filler) if filler else batch.lengths  # filler is one more document
    kwargs: dict[str, Any] = {"position_ids": batch.pos_T[None], "attention_mask": None}
    if layout.attention == BY_DOCUMENT or layout.split:
        shared = (*batch.shared, 0) if batch.shared and filler else batch.shared
        kwargs["documents"] = documents(lengths, shared=shared, split=layout.split, device=device)
    if layout.masks != "none":
        kwargs["attention_mask"] = _masks(batch, layout, config, dtype)
    if layout.varlen:
        kwargs |= _varlen(batch, lengths)
    real = torch.arange(T, device=device)[None] < T - filler if filler else None
    return Rows(tokens_SL=batch.input_T[None], kwargs=kwargs, real_SL=real)


def _varlen(batch: Batch, lengths: tuple[int, ...]) -> dict[str, Any]:
    cu_S1 = batch.cu_S1
    if len(lengths) > len(batch.lengths):
        cu_S1 = torch.cat([cu_S1, cu_S1.new_full((1,), sum(lengths))])
    longest = max(lengths)
    return {
        "cu_seq_lens_q": cu_S1, "cu_seq_lens_k": cu_S1, "max_length_q": longest, "max_length_k": longest,
        "seq_idx": batch.seq_T.to(torch.int32)[None],
    }  # fmt: skip


def _masks(batch: Batch, layout: Layout, config: PretrainedConfig, dtype: torch.dtype) -> Tensor | dict[str, Any]:
    """Block-diagonal causal masks [1, 1, T, T], in the form that the attention implementation reads.

    A row of ``_masks`` always sees itself, so that no softmax is over nothing. Filler is a document.
    """
    T, device = batch.input_T.shape[0], batch.input_T.device
    at = torch.arange(T, device=device)
    behind_TT = at[:, None] - at[None, :]
    causal_TT = (batch.seq_T[:, None] == batch.seq_T[None, :]) & (behind_TT >= 0)
    window = getattr(config, "sliding_window", None)

    def form(mask_TT: Tensor) -> Tensor:
        if layout.attention == "eager":  # eager attention adds the mask to the scores
            mask_TT = torch.zeros((), dtype=dtype, device=device).masked_fill(~mask_TT, torch.finfo(dtype).min)
        return mask_TT[None, None]

    near_TT = causal_TT & (behind_TT < window) if window else causal_TT
    if layout.masks == "one":
        return form(near_TT)
    full, sliding = form(causal_TT), form(near_TT)
    return {
        "full_attention": full, "sliding_attention": sliding, "indexed_attention": full, "linear_attention": None,
    }  # fmt: skip


def _padded(batch: Batch, layout: Layout) -> Rows:
    """Rows padded on the right, where causal layers cannot see it; filler takes part only if there is nothing else."""
    T, device = batch.input_T.shape[0], batch.input_T.device
    lengths, real = batch.lengths or (T,), sum(batch.lengths) or T
    S, L = len(lengths), max(lengths)
    positions_SL = torch.arange(L, device=device).expand(S, L)
    kwargs: dict[str, Any] = {"position_ids": positions_SL, "attention_mask": None}
    if layout.attention == BY_DOCUMENT:
        kwargs["documents"] = Documents()
    place_T = torch.zeros(T, dtype=torch.int64, device=device)
    place_T[:real] = batch.seq_T[:real] * L + batch.pos_T[:real]
    tokens_SL = torch.zeros(S * L, dtype=torch.int64, device=device).scatter(0, place_T[:real], batch.input_T[:real])
    real_SL = torch.zeros_like(tokens_SL, dtype=torch.bool).scatter(0, place_T[:real], True).view(S, L)
    return Rows(tokens_SL=tokens_SL.view(S, L), kwargs=kwargs, place_T=place_T, real_SL=real_SL)
