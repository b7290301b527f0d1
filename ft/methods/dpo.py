"""Direct preference optimisation: prefer the chosen answer of a pair, more than the reference does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

from attrs import Attribute, evolve, field, frozen, validators

from ft import losses
from ft.methods import pairs
from ft.types import Asks, Batch, Context, Counts, Example, LogProbs, LossOutput

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal[
    "sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "aot",
    "aot_unpaired", "apo_zero", "apo_down", "discopop",
]  # fmt: skip
Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]
WITH_MARGIN = ("sigmoid", "sigmoid_norm", "robust", "hinge")
SORTED = ("aot", "aot_unpaired")  # they compare pairs with each other
SMOOTHED = ("sigmoid", "sigmoid_norm", "robust", "exo_pair", *SORTED)
HALF = 0.5  # see _weights
DIVERGENT = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop")


def _kind(method: DPO, attribute: Attribute[Any], value: str | Mapping[str, float]) -> None:
    known = get_args(Kind)
    mixture = {value: 1.0} if isinstance(value, str) else value
    allowed = known if isinstance(value, str) else (*known, "sft")
    unknown = [name for name in mixture if name not in allowed]
    if unknown:
        raise ValueError(f"'kind' must be of {', '.join(allowed)}; got {', '.join(unknown)}")
    if not _kinds(value) or min(mixture.values()) <= 0:
        got = ", ".join(f"{name} {weight:g}" for name, weight in mixture.items()) or "none"
        raise ValueError(f"'kind' must name at least one preference loss, with weights > 0; got {got}")


def _kinds(kind: str | Mapping[str, float]) -> set[str]:
    """The preference losses among the terms."""
    return {kind} if isinstance(kind, str) else set(kind) - {"sft"}


def _only(*takers: str) -> Callable[[DPO, Attribute[Any], Any], None]:
    """A field that stays at its default unless all kinds are of ``takers``."""

    def check(method: DPO, attribute: Attribute[Any], value: Any) -> None:
        others = sorted(_kinds(method.kind) - set(takers))
        if value != attribute.default and others:
            raise ValueError(
                f"'{attribute.name}' must be left alone with {', '.join(others)}; it is for {', '.join(takers)}"
            )

    return check


def _smoothing(method: DPO, attribute: Attribute[Any], value: float) -> None:
    if value == 0 and "exo_pair" in _kinds(method.kind):
        raise ValueError("'label_smoothing' must be > 0 with exo_pair, whose loss is infinite at 0; 0.001 is usual")


def _alpha(method: DPO, attribute: Attribute[Any], value: float | None) -> None:
    if (method.divergence == "alpha") != (value is not None):
        raise ValueError("'alpha' must be given with divergence='alpha', and only there")


def _wpo(method: DPO, attribute: Attribute[Any], value: bool) -> None:
    others = sorted(_kinds(method.kind) & set(SORTED))
    if value and others:
        raise ValueError(f"'wpo' must be left alone with {', '.join(others)}, whose terms belong to no one pair")


def _wpo_cap(method: DPO, attribute: Attribute[Any], value: float | None) -> None:
    if value is not None and not method.wpo:
        raise ValueError("'wpo_cap' must be left alone without wpo=True")


def _tau(method: DPO, attribute: Attribute[Any], value: float | None) -> None:
    if value is not None and "discopop" not in _kinds(method.kind):
        raise ValueError("'tau' must be left alone without discopop")


@frozen(kw_only=True)
class DPO:
    """Preference losses against a reference, on pairs. The reference is that of the recipe (``Recipe.reference``).

    Formulas and sources: ``ft.losses.pairs``. Averaged over all of a step's pairs on all ranks.
    """

    kind: Kind | dict[str, float] = field(default="sigmoid", validator=_kind)
    """The loss, or several with weights, "sft" (the likelihood of chosen answers) among them: {"sigmoid": 1.0,
    "sft": 1.0} is RPO; {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0} is MPO. aot and aot_unpaired sort all pairs of a
    step among each other, so that these must fit into one micro-batch."""
    beta: float = field(default=0.1, validator=validators.gt(0.0))
    """How strongly the policy is held to the reference."""
    label_smoothing: float = field(
        default=0.0, validator=[validators.ge(0.0), validators.lt(0.5), _only(*SMOOTHED), _smoothing]
    )
    """Share of pairs taken to be labelled the wrong way round (sigmoid, sigmoid_norm, robust, exo_pair,
    aot, aot_unpaired)."""
    divergence: Divergence = field(
        default="reverse_kl", validator=[validators.in_(get_args(Divergence)), _only(*DIVERGENT)]
    )
    """Which f-divergence from the reference is kept small."""
    alpha: float | None = field(default=None, validator=_alpha)
    """Parameter of the alpha divergence."""
    tau: float | None = field(
        default=None,
        validator=[validators.optional(validators.and_(validators.gt(0.0), validators.le(1.0))), _tau],
    )
    """discopop's temperature; None is 0.05."""
    shared_length: float = field(default=1.0, validator=validators.and_(validators.ge(0.0), validators.le(1.0)))
    """LD-DPO: weight of the tokens of an answer beyond the length of the pair's shorter one; 1 is plain DPO."""
    margin: bool = field(default=False, validator=_only(*WITH_MARGIN))
    """ODPO: ask of each pair the margin in its row (`margin`, or `score_chosen` - `score_rejected`), in rewards."""
    wpo: bool = field(default=False, validator=_wpo)
    """WPO: weigh each pair by how likely the policy itself would be to write its two answers. Costs a forward."""
    wpo_cap: float | None = field(default=None, validator=[validators.optional(validators.gt(0.0)), _wpo_cap])
    """Largest weight of a pair; None is the paper's, 1 was usual in earlier code."""

    asks = Asks(reference="logps")

    def examples(self, step: int, ctx: Context) -> Sequence[Example]:
        drawn = pairs.draw(step, ctx, margin=self.margin)
        return pairs.together(drawn, ctx) if _kinds(self.kind) & set(SORTED) else drawn

    def prepare(self, batch: Batch, policy: Any) -> Batch:
        from ft.models.reference import policy_logps, reference_logps

        pairs.check(batch)
        half_T = policy_logps(policy, batch, temperature=HALF) if self.wpo else None
        batch = evolve(batch, ref_logp_T=reference_logps(policy, batch), old_logp_T=half_T)
        return pairs.weigh_chosen(batch) if "sft" in self.kind else batch

    def loss(self, logprobs: LogProbs, batch: Batch, counts: Counts) -> LossOutput:
        assert batch.ref_logp_T is not None
        sft: dict[str, Any] = {}
        if "sft" in self.kind:
            sft = {"sft_P": pairs.sums(logprobs.logp_T, batch)[0], "tokens": counts.ce_tokens}
        weight_P = _weights(logprobs.logp_T, batch, self.wpo_cap) if self.wpo else None
        n = pairs.number(counts)
        out = losses.dpo(
            *_sums(logprobs.logp_T, batch, self.shared_length),
            *_sums(batch.ref_logp_T, batch, self.shared_length),
            kind=self.kind,
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            divergence=self.divergence,
            alpha=self.alpha,
            tau=self.tau,
            lengths=pairs.lengths(batch),
            margin=pairs.split(batch.margin_S)[0] if self.margin and batch.margin_S is not None else None,
            weight_P=weight_P,
            units=n,
            **sft,
        )
        return out if weight_P is None else evolve(out, sums={**out.sums, "wpo_weight": weight_P.sum() / n})


def _weights(logp_T: Tensor, batch: Batch, cap: float | None) -> Tensor:
    """weight_P: WPO's, the product over a pair's answers of exp(mean of logp - log sum_v p(v)^2). No gradient.

    At temperature 1/2 logits double, so that its log-probs are 2 logp - log sum_v p(v)^2: ``prepare`` asks for them,
    and nothing of the vocabulary's size is kept. They are without dropout, ``logp_T`` is as trained.
    """
    half_T = batch.old_logp_T
    assert half_T is not None
    logp_T = logp_T.detach()
    weight_S = losses.wpo_weights(logp_T, 2 * logp_T - half_T, batch.mask_T, batch.seq_T, len(batch.lengths))
    chosen_P, rejected_P = pairs.split(weight_S)
    weight_P = chosen_P * rejected_P
    return weight_P if cap is None else weight_P.clamp(max=cap)


def _sums(logp_T: Tensor, batch: Batch, shared_length: float) -> tuple[Tensor, Tensor]:
    """(chosen_P, rejected_P) log-prob sums, LD-DPO's where the longer answer's surplus weighs less."""
    if shared_length == 1:
        return pairs.sums(logp_T, batch)
    import torch

    partner_S = torch.arange(len(batch.lengths), device=logp_T.device) ^ 1
    return pairs.split(losses.ld_sums(logp_T, batch.mask_T, batch.seq_T, partner_S, alpha=shared_length))
