"""ft's losses under Lightning Fabric. Shapes: B padded rows, W columns; row b is sequence b."""

from collections.abc import Iterable, Iterator

import torch
from lightning.fabric import Fabric

from ft.losses import grpo, nll


def train(fabric: Fabric, model: torch.nn.Module, batches: Iterable[dict], lr: float) -> Iterator[float]:
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=lr))
    for batch in (fabric.to_device(given) for given in batches):
        logp_BWV = model(input_ids=batch["input_ids"]).logits[:, :-1].log_softmax(-1)
        logp_BW = logp_BWV.gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
        adv_BW = batch["advantages"][:, None].expand_as(logp_BW)
        row_BW = torch.arange(len(logp_BW), device=logp_BW.device)[:, None].expand_as(logp_BW)
        given = (x.flatten() for x in (logp_BW, batch["old_logps"], adv_BW, batch["mask"], row_BW))
        logp_T, old_T, adv_T, mask_T, seq_T = given
        policy = grpo(logp_T, old_T, adv_T, mask_T, seq_T=seq_T, aggregate="sequence")
        fabric.backward(loss := policy.loss + 0.1 * nll(logp_T, mask_T & (adv_T > 0)).loss)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()
