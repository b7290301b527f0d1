"""The leak check: before the first step, prove on the model in use that a batch's sequences do not see each other.

Shapes: T positions, D model width, N positions compared.

Three measurements on one small seeded batch of ragged documents, cheap enough for any start-up:
1. gradient: d(outputs of one document) / d(embeddings of the others) must be exactly 0, whatever the dtype;
2. perturbation: with the first document replaced, log-probs of the others must not move (this also sees what has no
   gradient, such as a top-k over keys);
3. values: log-probs must equal those of each document alone by the model's own attention and own logits, which also
   proves positions, sliding windows, and the scale and softcap of the head.
Values are compared by their median: a router's top-k may flip on a rounding error, and a flip is not a leak.

That several answers may share one prompt (``ft.data.share``) is proved likewise, on a batch of its own, against the
same answers each behind its own copy of the prompt: values, gradients into prompt and answer, no gradient from one
answer into another, and no change where another answer is replaced.
Where the head scores, there are no log-probs: a fixed random projection of the hidden states stands in for them. What
the head makes of one hidden state depends on no other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as c10d
from attrs import evolve, frozen
from torch import Tensor, nn

from ft.errors import ModelError
from ft.models.layout import Layout, alone, candidates, may_share
from ft.models.policy import Scorer
from ft.types import Batch

LENGTHS = (37, 64, 2, 29)  # positions per document; together they cross the chunks (16 to 64) of recurrent kernels
UNIT = (11, 24, 13, 5, 19)  # of a lone document, then of a prompt and its three answers
WINDOW = 16  # sliding windows are shrunk to this meanwhile, so that short documents reach past them
_FAILURES = (RuntimeError, TypeError, ValueError, AttributeError, KeyError, ModelError)
# Times the standard deviation of the log-probs themselves, which is small on random models and large on real ones.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 2e-4, torch.float16: 0.03, torch.bfloat16: 0.1}


@frozen(kw_only=True)
class Finding:
    """What one layout showed. Numbers are nan where it did not run."""

    layout: Layout
    leak: float = float("nan")
    """Largest gradient of one document's outputs with respect to another's embeddings, relative to its own."""
    moved: float = float("nan")
    """Change of log-probs when another document is replaced, in nats: the largest in 32 bits, else the median."""
    gap: float = float("nan")
    """Median distance from the log-probs of each document alone, in nats."""
    worst: float = float("nan")
    """Largest such distance."""
    bent: float = 0.0
    """With a shared prompt: median distance of gradients from those of unshared ones, over what is tolerated."""
    error: str = ""
    """Why it did not run."""
    tolerance: float = 0.0

    @property
    def ok(self) -> bool:
        close = self.moved <= self.tolerance and self.gap <= self.tolerance and self.bent <= 1
        return not self.error and self.leak == 0 and close

    def __str__(self) -> str:
        if self.error:
            return f"{self.layout}: did not run ({self.error})"
        verdict = "passes" if self.ok else "FAILS"
        return (
            f"{self.layout}: {verdict}; gradient into other sequences {self.leak:.1e} (must be 0), outputs moved by "
            f"another sequence {self.moved:.1e}, away from each alone {self.gap:.1e} (at most {self.tolerance:.0e}; "
            f"largest {self.worst:.1e})"
        )


@frozen(kw_only=True)
class Report:
    """What was tried, in order; the last finding is the one in use."""

    findings: tuple[Finding, ...]
    requested: str
    sharing: Finding | None = None
    """The same layout with shared prompts, where it can have them; in use if it passes."""

    @property
    def layout(self) -> Layout:
        return self.sharing.layout if self.sharing is not None and self.sharing.ok else self.findings[-1].layout

    def lines(self) -> list[str]:
        """One plain line on the layout in use; where `auto` fell back to padding, also why."""
        used = self.findings[-1]
        lines = [
            f"layout: {self.layout}; checked: no gradient reaches another sequence, and outputs are within "
            f"{used.gap:.0e} of each sequence alone"
        ]
        if self.requested == "auto" and used.layout.kind == "padded":
            best = next((f for f in self.findings if not f.error), self.findings[0])
            lines.append(f"packing would let sequences see each other on this model, so rows are padded. {best}")
        if not self.layout.shared:
            lines.append(f"where several answers have one prompt, each forwards a copy of it: {self._why_copies()}")
        return lines

    def _why_copies(self) -> str:
        if self.sharing is not None:
            return f"sharing it does not give the same here. {self.sharing}"
        if self.layout.kind == "padded":
            return "rows are padded"
        recurrent = self.layout.split or self.layout.varlen
        return "recurrent layers cannot look back at it" if recurrent else "the attention is not ft's own"


def check(
    scorer: Scorer,
    *,
    requested: Literal["auto", "packed", "padded"] = "auto",
    attention: str | None = None,
    device: torch.device | str = "cpu",
    tried: Sequence[Layout] | None = None,
) -> tuple[Layout, Report]:
    """The first layout that passes, and what was measured. Every rank must call it, and gets the same answer.

    Gradients, training mode, attention and weights are left as they were.

    Args:
        scorer: as it will train: sharded, quantised, checkpointed.
        attention: an implementation the user asked for; None lets ours stand in for the model's own.
        tried: layouts to try, best first; by default all that ``requested`` allows.

    Raises:
        ModelError: nothing passes; for "packed" with the measured leak.
    """
    device = torch.device(device)
    if tried is None:
        tried = candidates(
            scorer.model, own=scorer.own_attention, attention=attention, device=device.type, kind=requested
        )
    findings: list[Finding] = []
    with _quiet(scorer), _short_windows(scorer):
        tokens = _tokens(scorer, LENGTHS, device)
        oracle = _alone(scorer, tokens, attention or scorer.own_attention)
        for layout in tried:
            findings.append(_finding(scorer, layout, tokens, oracle))
            if findings[-1].ok:
                sharing = _sharing(scorer, evolve(layout, shared=True), device) if may_share(layout) else None
                report = Report(findings=tuple(findings), requested=requested, sharing=sharing)
                return report.layout, report
    raise _refusal(findings, requested)


def _refusal(findings: Sequence[Finding], requested: str) -> ModelError:
    measured = "\n".join(f"    {finding}" for finding in findings)
    if requested == "packed":
        problem, fix = "this model cannot keep packed sequences apart", "model.layout=auto or model.layout=padded"
    else:
        problem = "no layout gives each sequence the log-probs that it has alone"
        fix = "another model.attention; a family whose head does more than scale and softcap needs an entry in ft"
    return ModelError(problem, where="model.layout", expected="a layout that passes", got="\n" + measured, fix=fix)


def _finding(scorer: Scorer, layout: Layout, tokens: Sequence[Tensor], oracle_N: Tensor) -> Finding:
    try:
        leak, value_N, dtype = _gradient_leak(scorer, layout, tokens)
        moved_N = _perturbed(scorer, layout, tokens)[len(tokens[0]) - 1 :] - value_N[len(tokens[0]) - 1 :]
    except _FAILURES as error:
        return _failed(layout, error)
    return _measured(layout, leak, moved_N, value_N, oracle_N, dtype)


def _failed(layout: Layout, error: Exception) -> Finding:
    return Finding(layout=layout, error=f"{type(error).__name__}: {error}".splitlines()[0][:200])


def _measured(
    layout: Layout,
    leak: Tensor,
    moved_N: Tensor,
    value_N: Tensor,
    oracle_N: Tensor,
    dtype: torch.dtype,
    bent: Tensor | None = None,
) -> Finding:
    gap_N = (value_N - oracle_N).abs()
    exact = dtype in (torch.float32, torch.float64)
    moved = moved_N.abs().max() if exact else moved_N.abs().median()
    bent = torch.zeros_like(leak) if bent is None else bent / _TOLERANCE[dtype]
    measured = torch.stack([leak, moved, gap_N.median(), gap_N.max(), bent]).double()
    if c10d.is_available() and c10d.is_initialized() and c10d.get_world_size() > 1:
        c10d.all_reduce(measured, c10d.ReduceOp.MAX)  # ranks must not disagree
    a, b, c, d, e = measured.tolist()
    tolerance = max(1e-6, _TOLERANCE[dtype] * float(oracle_N.std()))
    return Finding(layout=layout, leak=a, moved=b, gap=c, worst=d, bent=e, tolerance=tolerance)


def _sharing(scorer: Scorer, layout: Layout, device: torch.device) -> Finding:
    """Three answers behind one prompt against three with a copy each. The first keeps the prompt; the last one's
    gradient tells of leaks."""
    lone, prompt, *answers = _tokens(scorer, UNIT, device)
    n, own, vocab = len(prompt) - 1, len(answers[-1]), scorer.text_config.vocab_size

    def unit(first: Tensor) -> Batch:
        cut = [torch.cat([prompt[n:], answer]) for answer in answers[1:]]
        return _batch([lone, torch.cat([prompt, first]), *cut], (0, 0, n, n))

    batch, copies = unit(answers[0]), _batch([lone, *(torch.cat([prompt, answer]) for answer in answers)])
    start, first_cut = batch.lengths[0], sum(batch.lengths[:2])
    try:
        oracle_TD, oracle_T, _ = _last_gradient(scorer, copies, layout, own)
        grad_TD, value_T, dtype = _last_gradient(scorer, batch, layout, own)
        with torch.no_grad():
            other_T = _values(scorer, scorer(unit((answers[0] + vocab // 2) % vocab), layout, hidden=scorer.scores))
    except _FAILURES as error:
        return _failed(layout, error)
    oracle_N = torch.cat([part[n:] for part in oracle_T.split(copies.lengths)[2:]])
    inside_LD = torch.cat([grad_TD[start : start + n], grad_TD[-own:]])
    outside_LD = torch.cat([grad_TD[:start], grad_TD[start + n : -own]])
    bent_L = (inside_LD - oracle_TD[-n - own :]).abs().amax(-1) / oracle_TD.abs().amax()
    bent = torch.maximum(bent_L[:n].median(), bent_L[n:].median()).nan_to_num(torch.inf)
    leak = _ratio(inside_LD.abs().amax(), outside_LD.abs().amax())
    moved_N = (other_T - value_T)[first_cut:]
    return _measured(layout, leak, moved_N, value_T[first_cut:], oracle_N, dtype, bent)


def _last_gradient(scorer: Scorer, batch: Batch, layout: Layout, own: int) -> tuple[Tensor, Tensor, torch.dtype]:
    """Gradient [T, D] of the last ``own`` positions with respect to the embeddings; values; precision."""
    with torch.enable_grad(), _embeddings(scorer) as leaves:
        found = scorer(batch, layout, hidden=True)
        hidden_LD = found["hidden_TD"][-own:].float()
        weight_LD = torch.randn(hidden_LD.shape, generator=torch.Generator().manual_seed(1)).to(hidden_LD)
        (grad,) = torch.autograd.grad((hidden_LD * weight_LD).sum(), leaves)
    return grad[0].detach().float(), _values(scorer, found), _precision(scorer, found["hidden_TD"].dtype)


def _gradient_leak(scorer: Scorer, layout: Layout, tokens: Sequence[Tensor]) -> tuple[Tensor, Tensor, torch.dtype]:
    """Largest gradient of the second document outside of it, over the largest inside; values; precision."""
    batch = _batch(tokens)
    with torch.enable_grad(), _embeddings(scorer) as leaves:
        found = scorer(batch, layout, hidden=True)
        start, stop = (sum(batch.lengths[:i]) for i in (1, 2))
        hidden_LD = found["hidden_TD"][start:stop].float()
        weight_LD = torch.randn(hidden_LD.shape, generator=torch.Generator().manual_seed(1)).to(hidden_LD)
        (grad,) = torch.autograd.grad((hidden_LD * weight_LD).sum(), leaves)
    size_R = grad.detach().float().abs().amax(-1).flatten()
    rows = size_R.view(grad.shape[0], -1)
    own = torch.zeros_like(rows, dtype=torch.bool)
    if layout.kind == "packed":
        own[0, start:stop] = True
    else:
        own[1, : batch.lengths[1]] = True
    inside, outside = rows[own].amax(), rows[~own].amax()
    return _ratio(inside, outside), _values(scorer, found), _precision(scorer, found["hidden_TD"].dtype)


def _ratio(inside: Tensor, outside: Tensor) -> Tensor:
    """nan compares as no leak, and no gradient inside proves nothing: both count as an infinite leak."""
    return torch.where(torch.isfinite(inside) & (inside > 0) & torch.isfinite(outside), outside / inside, torch.inf)


@torch.no_grad()
def _perturbed(scorer: Scorer, layout: Layout, tokens: Sequence[Tensor]) -> Tensor:
    """Values with every token of the first document replaced."""
    vocab = scorer.text_config.vocab_size
    batch = _batch([(tokens[0] + vocab // 2) % vocab, *tokens[1:]])
    return _values(scorer, scorer(batch, layout, hidden=scorer.scores))


@torch.no_grad()
def _alone(scorer: Scorer, tokens: Sequence[Tensor], attention: str) -> Tensor:
    """The oracle: each document by itself, the model's own attention, its own masks and logits."""
    own: dict[str, bool] = {"hidden": True} if scorer.scores else {"own_logits": True}
    return torch.cat([_values(scorer, scorer(_batch([t]), alone(attention), **own)) for t in tokens])


def _values(scorer: Scorer, found: Mapping[str, Tensor]) -> Tensor:
    """One number per position that depends on all that the trunk says there: a log-prob, or a projection."""
    if not scorer.scores:
        return found["logp_T"].detach()
    hidden_TD = found["hidden_TD"].detach().float()
    weight_D = torch.randn(hidden_TD.shape[1], generator=torch.Generator().manual_seed(2)).to(hidden_TD)
    return hidden_TD @ weight_D / weight_D.norm()


def _tokens(scorer: Scorer, lengths: Sequence[int], device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    vocab = scorer.text_config.vocab_size
    return [torch.randint(0, vocab, (n + 1,), generator=generator).to(device) for n in lengths]


def _batch(tokens: Sequence[Tensor], shared: tuple[int, ...] = ()) -> Batch:
    """Documents end to end, every position trained."""
    lengths = tuple(len(t) - 1 for t in tokens)
    T, S, device = sum(lengths), len(lengths), tokens[0].device
    lengths_S = torch.tensor(lengths)
    return Batch(
        input_T=torch.cat([t[:-1] for t in tokens]),
        target_T=torch.cat([t[1:] for t in tokens]),
        pos_T=torch.cat([torch.arange(n) + at for n, at in zip(lengths, shared or [0] * S, strict=True)]).to(device),
        seq_T=torch.arange(S).repeat_interleave(lengths_S).to(device),
        cu_S1=torch.cat([torch.zeros(1), lengths_S.cumsum(0)]).to(device, torch.int32),
        mask_T=torch.ones(T, dtype=torch.bool, device=device),
        trained_N=torch.arange(T, device=device),
        lengths=lengths,
        shared=shared,
        unit_S=torch.arange(S, device=device),
        group_S=torch.full((S,), -1, device=device),
    )


def _precision(scorer: Scorer, compute: torch.dtype) -> torch.dtype:
    """The coarsest float type at work: what layers compute in (masters may be finer), or what weights are held in."""
    held = {p.dtype for p in scorer.parameters() if p.dtype in _TOLERANCE}
    return max(held | {compute}, key=lambda dtype: _TOLERANCE[dtype])


@contextmanager
def _embeddings(scorer: Scorer) -> Iterator[list[Tensor]]:
    """Make the embedding's output a leaf that wants a gradient, and collect it."""
    leaves: list[Tensor] = []

    def leaf(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[-1]

    handle = scorer.model.get_input_embeddings().register_forward_hook(leaf)
    try:
        yield leaves
    finally:
        handle.remove()


@contextmanager
def _quiet(scorer: Scorer) -> Iterator[None]:
    """No dropout and no jitter; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in scorer.modules()]
    scorer.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _short_windows(scorer: Scorer) -> Iterator[None]:
    """Shrink sliding windows and attention chunks, which real models have in thousands, to what is affordable."""
    owners = [scorer.model.config, scorer.text_config, *scorer.modules()]
    saved: list[tuple[Any, str, int]] = []
    for owner in owners:
        for name in ("sliding_window", "attention_chunk_size"):
            size = getattr(owner, name, None)
            if isinstance(size, int) and size > WINDOW:
                saved.append((owner, name, size))
                setattr(owner, name, WINDOW)
    try:
        yield
    finally:
        for owner, name, size in saved:
            setattr(owner, name, size)
