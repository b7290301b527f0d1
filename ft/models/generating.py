"""The policy as a model that generates: what a forward outside of ``Scorer.forward`` needs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributed.fsdp import FSDPModule

from ft.models.policy import Policy


@contextmanager
def generating(policy: Policy) -> Iterator[None]:
    """Inside, ``policy.scorer.model`` can be called: no dropout, its own attention, what the root holds gathered.

    Layers gather their own weights in each forward, so that all ranks must forward equally often.
    """
    scorer = policy.scorer
    training = scorer.training
    scorer.eval()
    scorer.use_attention(scorer.own_attention)
    if isinstance(scorer, FSDPModule):
        scorer.unshard()
    try:
        yield
    finally:
        if isinstance(scorer, FSDPModule):
            scorer.reshard()
        scorer.train(training)
