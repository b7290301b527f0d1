"""The reference of a method: a frozen model to compare the policy with, or to learn from.

It is one of four, told by ``Policy.reference``: the policy with its adapters off (None), a second model (a Policy), the
policy with earlier adapters (``Factors``, by name), or nothing that can be asked, since batches bring its log-probs
("kept"). Each routes tokens itself, also where the policy is given the sampler's experts: what it says is a function of
the tokens alone, whoever sampled them, and the policy's experts are not those that other weights would choose.
Shapes: T positions of a batch, N trained positions, E width of the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from attrs import evolve, frozen
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import PretrainedConfig

from ft.dist import World, local_rows
from ft.errors import RecipeError
from ft.io.weights import ModelFolder
from ft.models import lora
from ft.models.build import build
from ft.models.policy import Factors, Policy, Scorer, logprobs
from ft.recipe.parts import Model, Parallel
from ft.types import Batch

Say = Callable[[str], None]


# What it says ---------------------------------------------------------------------------------------------------------


def reference_logps(policy: Policy, batch: Batch, *, temperature: float = 1.0) -> Tensor:
    """Log-probs [T] of a batch under the reference, without dropout. What the batch brings of it is not asked again.

    The base is the reference also of a run that starts from a saved adapter.

    Raises:
        RecipeError: all weights are trained, and no copy of them was kept.
    """
    if policy.reference == "kept":
        return _kept(batch)
    with _as_reference(policy) as reference:
        return policy_logps(reference, evolve(batch, routes_MTK=None), temperature=temperature)


def reference_states(policy: Policy, batch: Batch) -> tuple[Tensor, Tensor]:
    """(log-probs [T], last hidden states [N, E]) of a batch under the reference."""
    assert policy.reference != "kept" and not isinstance(policy.reference, Mapping), "refused before the run"
    with _as_reference(policy) as reference, _evaluating(reference.scorer):
        found = logprobs(reference, evolve(batch, routes_MTK=None), hidden=True)
    assert found.hidden_TD is not None
    return found.logp_T, found.hidden_TD[batch.trained_N]


def policy_logps(policy: Policy, batch: Batch, *, temperature: float = 1.0) -> Tensor:
    """Log-probs [T] of a batch under the policy as it is, without dropout and without gradient."""
    with _evaluating(policy.scorer):
        return logprobs(policy, batch, temperature=temperature).logp_T


def _kept(batch: Batch) -> Tensor:
    """A filler has no rows that could bring any."""
    if not batch.lengths:
        return torch.zeros(batch.input_T.shape, device=batch.input_T.device)
    assert batch.ref_logp_T is not None, "rows come with what is known of them"
    return batch.ref_logp_T


@contextmanager
def _evaluating(scorer: Scorer) -> Iterator[None]:
    training = scorer.training
    scorer.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        scorer.train(training)


@contextmanager
def _as_reference(policy: Policy) -> Iterator[Policy]:
    """What is asked in the place of the policy; the policy is afterwards what it was."""
    if isinstance(policy.reference, Policy):
        yield policy.reference
    elif isinstance(policy.reference, Mapping):
        _exchange(policy.scorer, policy.reference)
        try:
            yield policy
        finally:
            _exchange(policy.scorer, policy.reference)
    elif not lora.factors(policy.scorer.model):
        raise RecipeError(
            "this method compares the model with a reference, and full fine-tuning keeps none",
            where="adapter",
            expected="adapters, with which switched off the model is its own reference, or Policy.reference",
            got="none: all weights are trained, and no copy of them was built",
            fix="train adapters, adapter=LoRA(...), or use a method without a reference: SimPO, ORPO or CPO",
        )
    else:
        with lora.disabled(policy.scorer.model):
            yield policy


# A second model -------------------------------------------------------------------------------------------------------


@frozen(kw_only=True, eq=False)
class Second:
    """A reference that is a model of its own, before it is built.

    ``moves``: it follows the policy, so it is held as the policy is: in float32, sharded alike.
    """

    model: Model
    config: PretrainedConfig
    folder: ModelFolder | None
    seed: int  # of random weights, where it is a look-alike
    moves: bool = False


def build_second(second: Second, *, world: World, parallel: Parallel, say: Say) -> Policy:
    """The model, frozen and in eval mode, sharded like a policy. Its own layout is proven by its own leak check."""
    built = build(
        second.model,
        None,
        second.config,
        second.folder,
        world=world,
        parallel=parallel,
        seed=second.seed,
        say=say,
        trained=second.moves,
    )
    built.policy.scorer.requires_grad_(False).eval()
    return evolve(built.policy, aux=0.0)


# A moving reference ---------------------------------------------------------------------------------------------------


def base_factors(policy: Policy) -> Factors:
    """Adapters of zeros, with which the policy is its base: where a moving reference begins."""
    return {name: torch.zeros_like(p.detach()) for name, p in lora.factors(policy.scorer.model).items()}


def moving(policy: Policy) -> dict[str, Tensor]:
    """The tensors of a reference that moves, by name: adapters, or all parameters of the second model."""
    if isinstance(policy.reference, Policy):
        _reshard(policy.reference.scorer)
        return dict(policy.reference.scorer.model.named_parameters())
    assert isinstance(policy.reference, Mapping)
    return dict(policy.reference)


@torch.no_grad()
def move(policy: Policy, mix: float) -> None:
    """reference <- mix policy + (1 - mix) reference. Each rank moves its own shard.

    Source: Gorbatovski et al., "Learn Your Reference Model" (TR-DPO, arXiv 2404.09656).
    """
    _reshard(policy.scorer)
    net, targets = policy.scorer.model, moving(policy)
    sources = dict(net.named_parameters()) if isinstance(policy.reference, Policy) else lora.factors(net)
    assert targets.keys() == sources.keys()
    for name, target in targets.items():
        local_rows(target)[0].lerp_(local_rows(sources[name].detach())[0], mix)


@torch.no_grad()
def _exchange(scorer: Scorer, factors: Factors) -> None:
    """Swap the adapters' values with ``factors``, in place."""
    _reshard(scorer)
    for name, p in lora.factors(scorer.model).items():
        mine, other = local_rows(p.detach())[0], local_rows(factors[name])[0]
        kept = mine.clone()
        mine.copy_(other)
        other.copy_(kept)


def _reshard(scorer: Scorer) -> None:
    """Let go of gathered weights, which would not see what happens to the shards."""
    for module in scorer.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
