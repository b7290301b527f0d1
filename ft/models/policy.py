"""The policy: a causal language model that says how likely a batch's tokens are.

Shapes: T positions of a batch, N trained positions, S x L rows as they are forwarded (R positions in all), D model
width, V vocabulary, C scores of a position.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from attrs import frozen
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ft.dist import whole
from ft.errors import ModelError
from ft.kernels.logprobs import token_logps
from ft.models import documents, head, layout, routes
from ft.models.compare import Head, Term, compared
from ft.models.layout import Layout, Rows, arrange
from ft.types import Batch, LogProbs

Factors = Mapping[str, Tensor]  # adapters by name, each sharded as the policy's own


@frozen(kw_only=True, eq=False)
class Policy:
    """A model and how it is asked. ``aux`` is the coefficient of the router's balance loss; 0 leaves it out.

    ``reference`` is told in ``ft.models.reference``; None is the model with its adapters off.
    """

    scorer: Scorer
    config: PretrainedConfig
    layout: Layout
    aux: float = 0.0
    reference: Policy | Factors | Literal["kept"] | None = None


def logprobs(
    policy: Policy,
    batch: Batch,
    *,
    entropy: bool = False,
    temperature: float = 1.0,
    hidden: bool = False,
    compare: Term | None = None,
) -> LogProbs:
    """Log-probs of a batch's targets under the policy, each sequence as if it stood alone.

    Args:
        entropy: also the entropy of the next-token distribution, without gradient.
        temperature: logits are divided by it.
        hidden: also the trunk's last hidden states [T, D], undefined on filler.
        compare: also the sum of this function of the policy's and the reference's logits, of whose hidden states the
            batch brings ``ref_hidden_ND``.
    """
    options: dict[str, Any] = {"entropy": entropy, "temperature": temperature, "aux": policy.aux, "hidden": hidden}
    if compare is not None:
        other = policy.reference.scorer.output(frozen=True) if isinstance(policy.reference, Policy) else None
        options |= {"compare": compare, "other": other}
    return LogProbs(**policy.scorer(batch, policy.layout, **options))


def forwarded(policy: Policy, batch: Batch) -> int:
    """Positions that this batch makes the model forward, padding and filler included."""
    return layout.forwarded(batch, policy.layout)


class Scorer(nn.Module):
    """A transformers causal LM whose forward gives log-probs and never holds T x V logits.

    It is meant to be the root of FSDP: whatever the root holds (embedding, final norm, head) is used inside its
    forward. It gives a plain dict, because FSDP looks for tensors in outputs and sees none inside other classes.
    """

    def __init__(self, model: PreTrainedModel, *, kernels: str = "auto"):
        super().__init__()
        documents.register()
        documents.split_mixers(model)
        self.model = model
        self.kernels = kernels
        self.own_attention = str(model.config._attn_implementation)
        self.scores = bool(head.parts(model))  # the head gives scores to be trained, in the place of log-probs
        self.options = head_options(model.config)

    def forward(
        self,
        batch: Batch,
        layout: Layout,
        *,
        entropy: bool = False,
        temperature: float = 1.0,
        aux: float = 0.0,
        hidden: bool = False,
        own_logits: bool = False,
        compare: Term | None = None,
        other: Head | None = None,
    ) -> dict[str, Tensor]:
        """Fields of ``LogProbs``. A batch without trained positions gives zeros that still have a graph.

        A model with a head that scores gives ``score_TC``, and log-probs of 0.

        Args:
            aux: coefficient of the router's balance loss; 0 leaves it out.
            compare: see ``logprobs``. ``other`` is the reference's head; None is this model's without its adapter.
            own_logits: compute the log-probs from the model's own logits, all T x V of them: the oracle of the
                leak check.
        """
        if aux and not has_balance_loss(self.model):
            raise ModelError(f"{type(self.model).__name__} has no load-balancing loss", fix="train without it: aux=0")
        self.use_attention(layout.attention)
        rows = arrange(batch, layout, self.text_config, self.dtype)
        if own_logits:
            return {"logp_T": self._from_own_logits(batch, rows)}
        with _routed(self.model, batch, rows):
            out = documents.trunk(self.model)(
                input_ids=rows.tokens_SL, use_cache=False, **rows.kwargs, **_router_logits(aux > 0)
            )
        hidden_RD = out.last_hidden_state.flatten(0, 1)
        hidden_ND = hidden_RD[_trained_places(batch, rows)]
        found = self._scores(hidden_ND, batch) if self.scores else self._logps(hidden_ND, batch, temperature, entropy)
        if compare is not None:
            found["compared"] = self._compared(hidden_ND, batch, compare, other)
        if aux:
            found["aux"] = aux * balance_loss(self.model, out, rows.real_SL, empty=not batch.lengths)
        if hidden:
            # a copy, never a view: FSDP cannot guard the views that a root gives out
            found["hidden_TD"] = hidden_RD.clone() if rows.place_T is None else hidden_RD[rows.place_T]
        return found

    @property
    def text_config(self) -> PretrainedConfig:
        return self.model.config.get_text_config()

    @property
    def dtype(self) -> torch.dtype:
        """Type of the hidden states, as far as the embedding tells."""
        embedding: Any = self.model.get_input_embeddings()
        return embedding.weight.dtype

    def use_attention(self, name: str) -> None:
        """Switch transformers' attention implementation; generation wants ``own_attention``."""
        if self.model.config._attn_implementation != name:
            self.model.set_attn_implementation(name)

    def output(self, *, frozen: bool = False) -> Head:
        """The output layer, for use inside the forward; ``frozen``: without its adapter, gathered whole anywhere."""
        weight_VD, bias_V, lora = head_parts(self.model.get_output_embeddings())
        if frozen:
            weight_VD, lora = whole(weight_VD.detach()), None
            bias_V = None if bias_V is None else whole(bias_V.detach())
        return Head(weight_VD=weight_VD, bias_V=bias_V, lora=lora, **self.options)

    def _logps(self, hidden_ND: Tensor, batch: Batch, temperature: float, entropy: bool) -> dict[str, Tensor]:
        """Of a head over the vocabulary: log-probs of the targets and, where asked, entropies without gradient."""
        weight_VD, bias_V, lora = head_parts(self.model.get_output_embeddings())
        logp_N, entropy_N = token_logps(
            hidden_ND,
            weight_VD,
            batch.target_T[batch.trained_N],
            bias_V=bias_V,
            temperature=temperature,
            entropy=entropy,
            lora=lora,
            impl=self.kernels,
            **self.options,
        )
        found = {"logp_T": _scatter(logp_N, batch)}
        return found if entropy_N is None else found | {"entropy_T": _scatter(entropy_N.detach(), batch)}

    def _scores(self, hidden_ND: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Of a head that scores, beside log-probs of 0."""
        score_TC = _scatter(head.scores(hidden_ND, self.model), batch)
        return {"logp_T": torch.zeros_like(score_TC[:, 0]), "score_TC": score_TC}

    def _compared(self, hidden_ND: Tensor, batch: Batch, term: Term, other: Head | None) -> Tensor:
        """The sum of ``term`` over trained positions. ``other``: see ``forward``."""
        assert batch.ref_hidden_ND is not None, "the method's prepare asks the reference"
        other = other or self.output(frozen=True)
        return compared(term, hidden_ND, self.output(), batch.ref_hidden_ND, other)

    def _from_own_logits(self, batch: Batch, rows: Rows) -> Tensor:
        logits_RV = self.model(input_ids=rows.tokens_SL, use_cache=False, **rows.kwargs).logits.flatten(0, 1)
        logp_NV = logits_RV[_trained_places(batch, rows)].float().log_softmax(-1)
        return _scatter(logp_NV.gather(-1, batch.target_T[batch.trained_N][:, None])[:, 0], batch)


def _trained_places(batch: Batch, rows: Rows) -> Tensor:
    """place_N: where the trained positions stand among those forwarded."""
    return batch.trained_N if rows.place_T is None else rows.place_T[batch.trained_N]


def _routed(model: nn.Module, batch: Batch, rows: Rows) -> AbstractContextManager[None]:
    """A forward in which tokens go to the experts that the batch names, where it names any; padding goes as ever."""
    if batch.routes_MTK is None:
        return nullcontext()
    if rows.place_T is None:
        return routes.given(model, batch.routes_MTK)
    (M, _, K), real = batch.routes_MTK.shape, sum(batch.lengths)
    laid_MRK = batch.routes_MTK.new_full((M, rows.tokens_SL.numel(), K), -1)
    return routes.given(model, laid_MRK.index_copy(1, rows.place_T[:real], batch.routes_MTK[:, :real]))


def _scatter(x_N: Tensor, batch: Batch) -> Tensor:
    """Values of trained positions, [N] or [N, C], where they belong; 0 elsewhere."""
    shape = (*batch.input_T.shape, *x_N.shape[1:])
    zeros_T = torch.zeros(shape, dtype=torch.float32, device=batch.input_T.device)
    return zeros_T.index_copy(0, batch.trained_N, x_N.float())


def _router_logits(aux: bool) -> dict[str, bool]:
    return {"output_router_logits": True} if aux else {}


# What families do to logits after the head, by config field: fields whose value multiplies them, and divides them.
# Two families give one name two meanings, so a family's own entry goes first. The leak check compares the result
# with the model's own logits, so that a family missing here is refused and not quietly wrong.
_MULTIPLY = ("logit_scale", "lm_head_multiplier", "output_multiplier")
_DIVIDE = ("logits_scaling", "logits_mup_width_multiplier")
_MULTIPLY_BY_FAMILY = {"hyperclovax": ("logits_scaling",)}


def head_options(config: PretrainedConfig) -> dict[str, Any]:
    """``scale`` and ``softcap`` of ``token_logps``: logits are softcap * tanh(scale * logits / softcap)."""
    config = config.get_text_config()
    multiply = _MULTIPLY_BY_FAMILY.get(config.model_type, _MULTIPLY)
    divide = () if config.model_type in _MULTIPLY_BY_FAMILY else _DIVIDE
    scale = 1.0
    for name in multiply:
        scale *= _number(config, name)
    for name in divide:
        scale /= _number(config, name)
    return {"scale": scale, "softcap": getattr(config, "final_logit_softcapping", None)}


def _number(config: PretrainedConfig, name: str) -> float:
    value = getattr(config, name, None)
    return 1.0 if value is None else float(value)


def head_parts(head: Any) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor, float] | None]:
    """Weight [V, D], bias [V] and LoRA (A [r, D], B [V, r], scaling) of an output layer, peft-wrapped or plain.

    Raises:
        ModelError: an adapter on the head that log-probs cannot honour.
    """
    base = getattr(head, "base_layer", head)
    active = [name for name in getattr(head, "active_adapters", ()) if name in getattr(head, "lora_A", ())]
    if not active or getattr(head, "disable_adapters", False) or getattr(head, "merged", False):
        return base.weight, base.bias, None
    name: Any = active[0]
    if len(active) > 1 or getattr(head, "use_dora", {}).get(name, False):
        raise ModelError("the head's adapter must be one plain LoRA", where="adapter.targets", got=f"{active} (DoRA?)")
    if head.training and not isinstance(head.lora_dropout[name], nn.Identity):
        raise ModelError("LoRA dropout on the head is not supported", where="adapter.dropout", fix="set it to 0.0")
    lora = (head.lora_A[name].weight, head.lora_B[name].weight, head.scaling[name])
    return base.weight, base.bias, lora


def balance_loss(model: Any, out: Any, real_SL: Tensor | None, *, empty: bool) -> Tensor:
    """The family's own load-balancing loss, a mean over real tokens, before its coefficient; 0 for a filler batch."""
    mask_SL = None if empty else real_SL
    loss = _balance_function(model)(out.router_logits, model.num_experts, model.num_experts_per_tok, mask_SL)
    return loss * 0.0 if empty else loss


def has_balance_loss(model: PreTrainedModel) -> bool:
    """Whether transformers computes a load-balancing loss for this family."""
    return _balance_function(model) is not None and hasattr(model, "num_experts_per_tok")


def _balance_function(model: PreTrainedModel) -> Any:
    return getattr(inspect.getmodule(type(model)), "load_balancing_loss_func", None)
