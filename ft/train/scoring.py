"""What the policy says of examples as it is: log-probs and entropies, without gradient or dropout.

Shapes: L tokens of one sequence, T positions of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ft import dist
from ft.data.pack import collate
from ft.dist import World
from ft.models.policy import Policy, logprobs
from ft.train import step
from ft.types import Example, Said


@torch.no_grad()
def score(examples: Sequence[Example], policy: Policy, world: World, *, tokens: int, temperature: float) -> list[Said]:
    """Of each example, on every rank. They are packed as a step packs them, so that it finds these numbers again."""
    cut = step.sharing(examples, policy)
    at = {id(example): i for i, example in enumerate(cut)}
    starts = np.cumsum([0, *map(len, examples)])
    table = torch.zeros(2, int(starts[-1]), dtype=torch.float64)  # of all examples, one after the other
    module = policy.scorer
    training = module.training
    module.eval()
    try:
        for pack in step.packs_of(cut, policy, world, tokens=tokens):
            batch = collate(pack).to(world.device)
            said = logprobs(policy, batch, entropy=True, temperature=temperature)
            assert said.entropy_T is not None
            both_2T = torch.stack([said.logp_T, said.entropy_T]).double().cpu()
            _lay(both_2T, table, [starts[at[id(example)]] + example.shared for example in pack], batch.lengths)
    finally:
        module.train(training)
    every = dist.sum_over_ranks(table.to(world.device), world).float().cpu().numpy()
    return [Said(every[0, begin:end].copy(), every[1, begin:end].copy()) for begin, end in pairwise(starts)]


def _lay(both_2T: Tensor, table: Tensor, starts: Sequence[int], lengths: Sequence[int]) -> None:
    """Each sequence's numbers at the tokens they are of: nothing is said of the first token."""
    begin = 0
    for start, length in zip(starts, lengths, strict=True):
        table[:, start + 1 : start + 1 + length] = both_2T[:, begin : begin + length]
        begin += length
