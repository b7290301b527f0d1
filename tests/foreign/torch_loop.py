"""ft's losses in a plain PyTorch loop. Shapes: B padded rows, W columns; row b is sequence b, its tokens in order."""

from collections.abc import Iterable, Iterator

import torch

from ft.losses import grpo, nll


def train(model: torch.nn.Module, batches: Iterable[dict[str, torch.Tensor]], lr: float) -> Iterator[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for batch in batches:
        logits_BWV = model(input_ids=batch["input_ids"]).logits[:, :-1]
        logp_BW = logits_BWV.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
        adv_BW = batch["advantages"][:, None].expand_as(logp_BW)
        row_BW = torch.arange(len(logp_BW))[:, None].expand_as(logp_BW)
        given = (x.flatten() for x in (logp_BW, batch["old_logps"], adv_BW, batch["mask"], row_BW))
        logp_T, old_T, adv_T, mask_T, seq_T = given
        policy = grpo(logp_T, old_T, adv_T, mask_T, seq_T=seq_T, aggregate="sequence")
        loss = policy.loss + 0.1 * nll(logp_T, mask_T & (adv_T > 0)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()
