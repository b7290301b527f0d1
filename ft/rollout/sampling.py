"""Drawing tokens: which one, and how likely it was, as it was drawn. Shapes: B rows, V vocabulary, L new tokens.

To draw one, the vocabulary lies in K blocks of N tokens.
"""

from __future__ import annotations

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor

from ft.recipe.online import Sampling

_BLOCK = 256
_ALL = 1 - 2**-52  # of a sum in float64, the most that is less than it


def draws(seed: int, names: list[tuple[int, ...]], length: int) -> Tensor:
    """u_BL: uniform numbers in [0, 1) of each row. A row's depend on ``seed`` and its name alone, whoever draws it."""
    return torch.stack([_of_row(seed, name, length) for name in names])


def _of_row(seed: int, name: tuple[int, ...], length: int) -> Tensor:
    digest = hashlib.blake2b(repr((seed, *name)).encode(), digest_size=7).digest()
    return torch.rand(length, generator=torch.Generator().manual_seed(int.from_bytes(digest, "little")))


def pick(logits_BV: Tensor, u_B: Tensor | None, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """(token_B, logp_B): the next tokens and their log-probs under the distribution they were drawn from.

    softmax(logits / temperature), what top-k, top-p and min-p leave of it normalised anew. Without ``u_B`` the
    likeliest token is taken, and its log-prob is that of the same distribution.
    """
    logit_BV, temperature = logits_BV.float(), sampling.temperature
    if sampling.truncates:
        logit_BV, temperature = truncate((logit_BV / temperature).log_softmax(-1), sampling), 1.0
    if u_B is not None:
        return _invert(logit_BV, u_B, temperature)
    top_B = logit_BV.max(-1)
    return top_B.indices, -((logit_BV - top_B.values[:, None]) / temperature).logsumexp(-1)


def truncate(logp_BV: Tensor, sampling: Sampling) -> Tensor:
    """Log-probs of the truncated distribution: -inf where a token may not be drawn."""
    if not sampling.truncates:
        return logp_BV
    if sampling.top_k and sampling.top_k < logp_BV.shape[-1]:
        floor_B1 = logp_BV.topk(sampling.top_k).values[:, -1:]
        logp_BV = logp_BV.masked_fill(logp_BV < floor_B1, -torch.inf)
    if sampling.min_p:
        floor_B1 = logp_BV.amax(-1, keepdim=True) + torch.tensor(sampling.min_p).log()
        logp_BV = logp_BV.masked_fill(logp_BV < floor_B1, -torch.inf)
    if sampling.top_p < 1:
        logp_BV = _nucleus(logp_BV, sampling.top_p)
    return logp_BV.log_softmax(-1)


def _nucleus(logp_BV: Tensor, share: float) -> Tensor:
    """The likeliest tokens whose probabilities first reach ``share``; at least one."""
    sorted_BV, order_BV = logp_BV.log_softmax(-1).sort(dim=-1, descending=True)
    before_BV = sorted_BV.exp().cumsum(-1) - sorted_BV.exp()
    drop_BV = torch.zeros_like(order_BV, dtype=torch.bool).scatter(-1, order_BV, before_BV >= share)
    return logp_BV.masked_fill(drop_BV, -torch.inf)


def _invert(logit_BV: Tensor, u_B: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The first token at which the running sum of probabilities exceeds u times the total; and its log-prob.

    Found in two strides, the block of tokens and then the token in it: a running sum over the whole vocabulary in
    float64, which such a sum needs, took as long as a third of a small model's forward. The total normalises, so that
    the vocabulary is gone through once for both.
    """
    top_B1 = logit_BV.amax(-1, keepdim=True)
    p_BV, room = (logit_BV - top_B1).div_(temperature).exp_(), -logit_BV.shape[-1] % _BLOCK
    p_BKN = (F.pad(p_BV, (0, room)) if room else p_BV).unflatten(1, (-1, _BLOCK))
    running_BK = p_BKN.sum(-1).double().cumsum(-1)
    total_B1 = running_BK[:, -1:]
    wanted_B1 = u_B.to(running_BK)[:, None] * total_B1
    block_B1 = torch.searchsorted(running_BK, wanted_B1, right=True).clamp_(max=running_BK.shape[-1] - 1)
    before_B1 = F.pad(running_BK, (1, 0)).gather(1, block_B1)
    inside_BN = p_BKN[torch.arange(len(p_BKN), device=p_BKN.device), block_B1[:, 0]].double().cumsum(-1)
    # Rounding may put the number past the block's end, where tokens may be impossible: the last possible one is meant.
    left_B1 = torch.minimum(wanted_B1 - before_B1, inside_BN[:, -1:] * _ALL)
    token_B1 = block_B1 * _BLOCK + torch.searchsorted(inside_BN, left_B1, right=True)
    logp_B1 = (logit_BV.gather(-1, token_B1) - top_B1) / temperature - total_B1.log().float()
    return token_B1[:, 0], logp_B1[:, 0]
