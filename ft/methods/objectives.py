"""What a policy is trained on once answers have advantages: a class for each loss of ``ft.losses``, with its options.

``aggregates`` are the averages that fit a loss, its own first: over all "token"s, over answers ("sequence"), or a sum
over a "constant" length. ``level`` says whose the ratio is, by a user's choice or as the loss has it.
Shapes: T positions of a batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from attrs import field, frozen, validators

from ft import losses
from ft.types import LossOutput

if TYPE_CHECKING:
    from torch import Tensor

_positive, _natural = validators.gt(0.0), validators.ge(0.0)
_below_one = validators.and_(_natural, validators.lt(1.0))
_EVERY = ("token", "sequence", "constant")


def _range(thing: Any, attribute: Any, value: tuple[float, float]) -> None:
    if not (0 <= value[0] < 1 and value[1] >= 0):
        raise ValueError(f"'{attribute.name}' must be (0 to under 1, 0 or more): distances from a ratio of 1")


def _naturals(thing: Any, attribute: Any, value: tuple[float, float]) -> None:
    if min(value) < 0:
        raise ValueError(f"'{attribute.name}' must be two numbers of 0 or more")


def _positives(thing: Any, attribute: Any, value: tuple[float, float]) -> None:
    if min(value) <= 0:
        raise ValueError(f"'{attribute.name}' must be two numbers over 0")


def _over_clip(thing: Any, attribute: Any, value: float | None) -> None:
    if value is not None and value <= 1 + thing.clip[1]:
        raise ValueError(f"'dual_clip' must be over 1 + clip[1] = {1 + thing.clip[1]:g}, or it would clip first")


@frozen(kw_only=True)
class Clipped:
    """The clipped ratio of GRPO, DAPO, Dr. GRPO (by ``aggregate``) and GSPO (``level="sequence"``)."""

    aggregates: ClassVar[tuple[str, ...]] = _EVERY
    level: Literal["token", "sequence", "sequence_token"] = "token"
    """Of the ratio: each token's; the answer's geometric mean; that, with each token's own gradient."""
    clip: tuple[float, float] = field(default=(0.2, 0.2), validator=_range)
    """How far the ratio may fall and rise before it stops counting."""
    dual_clip: float | None = field(default=None, validator=_over_clip)
    """Most that a ratio counts where the advantage is negative."""

    def loss(self, logp_T: Tensor, old_T: Tensor | None, adv_T: Tensor, mask_T: Tensor, **common: Any) -> LossOutput:
        return losses.grpo(
            logp_T, old_T, adv_T, mask_T, level=self.level, clip=self.clip, dual_clip=self.dual_clip, **common
        )


@frozen(kw_only=True)
class RLOO:
    """The clipped ratio of whole answers, each counted once; made for ``advantage="leave_one_out"``."""

    aggregates: ClassVar[tuple[str, ...]] = ("sequence",)
    level: ClassVar[str] = "sequence_sum"
    clip: tuple[float, float] = field(default=(0.2, 0.2), validator=_range)
    """How far the ratio may fall and rise before it stops counting."""

    def loss(self, logp_T: Tensor, old_T: Tensor | None, adv_T: Tensor, mask_T: Tensor, **common: Any) -> LossOutput:
        return losses.rloo(logp_T, old_T, adv_T, mask_T, clip=self.clip, **common)


@frozen(kw_only=True)
class LUSPO:
    """GSPO with each answer weighted by its length."""

    aggregates: ClassVar[tuple[str, ...]] = ("constant",)
    level: ClassVar[str] = "sequence"
    clip: tuple[float, float] = field(default=(0.2, 0.2), validator=_range)
    """How far the ratio may fall and rise before it stops counting."""

    def loss(self, logp_T: Tensor, old_T: Tensor | None, adv_T: Tensor, mask_T: Tensor, **common: Any) -> LossOutput:
        given: dict[str, Any] = common | {"constant": 1.0}
        return losses.luspo(logp_T, old_T, adv_T, mask_T, clip=self.clip, **given)


@frozen(kw_only=True)
class GMPO:
    """The geometric mean of an answer's ratios, which are clipped one by one."""

    aggregates: ClassVar[tuple[str, ...]] = ("sequence",)
    level: ClassVar[str] = "token"
    clip: tuple[float, float] = field(default=(0.4, 0.4), validator=_naturals)
    """Bounds of the ratio's logarithm, down and up."""

    def loss(self, logp_T: Tensor, old_T: Tensor | None, adv_T: Tensor, mask_T: Tensor, **common: Any) -> LossOutput:
        return losses.gmpo(logp_T, old_T, adv_T, mask_T, clip=self.clip, **common)


@frozen(kw_only=True)
class CISPO:
    """The score, weighted by a bounded ratio: every token keeps a gradient."""

    aggregates: ClassVar[tuple[str, ...]] = _EVERY
    cap: float = field(default=5.0, validator=validators.ge(1.0))
    """Upper bound of the ratio itself."""
    floor: float = field(default=0.0, validator=validators.and_(_natural, validators.le(1.0)))
    """Lower bound of the ratio itself."""
    level: Literal["token", "sequence"] = "token"
    """Of the ratio."""

    def loss(self, logp_T: Tensor, old_T: Tensor | None, adv_T: Tensor, mask_T: Tensor, **common: Any) -> LossOutput:
        return losses.cispo(
            logp_T, old_T, adv_T, mask_T, cap=self.cap, floor=self.floor, level=self.level, **common
        )  # fmt: skip


@frozen(kw_only=True)
class SAPO:
    """A soft gate in place of a clip."""

    aggregates: ClassVar[tuple[str, ...]] = ("sequence", "token", "constant")
    tau: tuple[float, float] = field(default=(1.0, 1.05), validator=_positives)
    """How steep it is where the advantage is positive, and elsewhere."""
    level: Literal["token", "sequence"] = "token"
    """Of the ratio."""

    def loss(self, logp_T: Tensor, old_T: Tensor | None, adv_T: Tensor, mask_T: Tensor, **common: Any) -> LossOutput:
        return losses.sapo(logp_T, old_T, adv_T, mask_T, tau=self.tau, level=self.level, **common)


@frozen(kw_only=True)
class VESPO:
    """The score, weighted by how near an answer's likelihood has stayed. Wants a correction by tokens, or none."""

    aggregates: ClassVar[tuple[str, ...]] = _EVERY
    level: ClassVar[str] = "token"
    k: tuple[float, float] = field(default=(2.0, 3.0), validator=_naturals)
    """Power of the weight where the advantage is at least 0, and elsewhere."""
    lam: tuple[float, float] = field(default=(3.0, 2.0), validator=_naturals)
    """How fast it falls, likewise."""

    def loss(self, logp_T: Tensor, old_T: Tensor | None, adv_T: Tensor, mask_T: Tensor, **common: Any) -> LossOutput:
        return losses.vespo(logp_T, old_T, adv_T, mask_T, k=self.k, lam=self.lam, **common)


@frozen(kw_only=True)
class DPPO:
    """The score where a token's probability has not moved too far from the sampler's. Wants ``old="sampler"``."""

    aggregates: ClassVar[tuple[str, ...]] = _EVERY
    level: ClassVar[str] = "token"
    divergence: Literal["tv", "kl"] = "tv"
    """How the distance is measured."""
    clip: tuple[float, float] = field(default=(0.2, 0.2), validator=_naturals)
    """Greatest distance, down and up."""
    cap: float = field(default=20.0, validator=validators.ge(1.0))
    """Most that a ratio counts."""

    def loss(self, logp_T: Tensor, old_T: Tensor | None, adv_T: Tensor, mask_T: Tensor, **common: Any) -> LossOutput:
        old_T = logp_T.detach() if old_T is None else old_T
        return losses.dppo(
            logp_T, old_T, adv_T, mask_T, divergence=self.divergence, clip=self.clip, cap=self.cap, **common
        )


@frozen(kw_only=True)
class Reinforce:
    """The score times the advantage, with no ratio: for one step on each batch of answers."""

    aggregates: ClassVar[tuple[str, ...]] = _EVERY
    level: ClassVar[str] = "token"

    def loss(self, logp_T: Tensor, old_T: Tensor | None, adv_T: Tensor, mask_T: Tensor, **common: Any) -> LossOutput:
        return losses.reinforce(logp_T, adv_T, mask_T, **common)


Objective = Clipped | CISPO | SAPO | GMPO | VESPO | LUSPO | DPPO | Reinforce | RLOO
