"""Distillation: a student learns a teacher's whole distributions, not only the tokens of the rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from attrs import evolve, field, frozen, validators

from ft import losses
from ft.errors import RecipeError
from ft.methods.sft import SFT
from ft.types import Asks, Batch, Context, Counts, Example, LogProbs, LossOutput

if TYPE_CHECKING:
    from torch import Tensor


@frozen(kw_only=True)
class Distill:
    """Bring the model's next-token distributions near to those of `reference.model`, the teacher, on the rows' tokens.

        divergence(teacher, student) + sft * negative log-likelihood

    Each is a mean over all of a step's trained tokens on all ranks; formulas and sources are in ``ft.losses.distill``.
    The vocabularies must be the same, widths and families need not be. The teacher's hidden states of a whole step are
    held at a time, its logits for a tile of positions.
    """

    beta: float = field(default=0.5, validator=validators.and_(validators.ge(0.0), validators.le(1.0)))
    """Which divergence: 0 is KL(teacher | student), which covers all a teacher may say; 1 is KL(student | teacher),
    which settles on a part of it; between them the generalised Jensen-Shannon divergence."""
    temperature: float = field(default=1.0, validator=validators.gt(0.0))
    """Both distributions are taken at this temperature. The loss is not multiplied by its square."""
    sft: float = field(default=0.0, validator=validators.ge(0.0))
    """Weight of the rows' own likelihood beside it, at temperature 1."""

    @property
    def asks(self) -> Asks:
        return Asks(reference="states", compare=self._divergence)

    def _divergence(self, student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
        beta, temperature = self.beta, self.temperature
        return losses.generalized_jsd(student_NV, teacher_NV, beta=beta, temperature=temperature, tokens=1).loss

    def examples(self, step: int, ctx: Context) -> Sequence[Example]:
        return SFT().examples(step, ctx)

    def prepare(self, batch: Batch, policy: Any) -> Batch:
        from ft.models.reference import reference_states

        if policy.reference is None and self.sft == 0:
            raise RecipeError(
                "there is no teacher: with its adapters off the model has nothing new to teach itself",
                where="reference.model",
                expected="a second model of the same vocabulary",
                got="none",
                fix="name the teacher, reference=Reference(model=Model(...))",
            )
        ref_logp_T, ref_hidden_ND = reference_states(policy, batch)
        return evolve(batch, ref_logp_T=ref_logp_T, ref_hidden_ND=ref_hidden_ND)

    def loss(self, logprobs: LogProbs, batch: Batch, counts: Counts) -> LossOutput:
        assert logprobs.compared is not None and batch.ref_logp_T is not None
        divergence = logprobs.compared / counts.tokens
        own = losses.nll(logprobs.logp_T, batch.mask_T, tokens=counts.tokens)
        teacher = losses.nll(batch.ref_logp_T, batch.mask_T, tokens=counts.tokens)
        loss = divergence + self.sft * own.loss if self.sft else divergence
        sums = {"distill": divergence.detach(), "nll": own.loss.detach(), "teacher/nll": teacher.loss}
        return LossOutput(loss=loss.float(), sums=sums)
