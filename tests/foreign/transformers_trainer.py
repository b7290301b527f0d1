"""ft's losses in a transformers Trainer. Shapes: B padded rows, W columns; row b is sequence b."""

from typing import Any

import torch
from transformers import Trainer

from ft.losses import grpo, nll


class PolicyTrainer(Trainer):
    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(input_ids=inputs["input_ids"])
        logp_BW = outputs.logits[:, :-1].log_softmax(-1).gather(-1, inputs["input_ids"][:, 1:, None])[..., 0]
        adv_BW = inputs["advantages"][:, None].expand_as(logp_BW)
        row_BW = torch.arange(len(logp_BW), device=logp_BW.device)[:, None].expand_as(logp_BW)
        tensors = (logp_BW, inputs["old_logps"], adv_BW, inputs["mask"], row_BW)
        logp_T, old_T, adv_T, mask_T, seq_T = (x.flatten() for x in tensors)
        policy = grpo(logp_T, old_T, adv_T, mask_T, seq_T=seq_T, aggregate="sequence")
        loss = policy.loss + 0.1 * nll(logp_T, mask_T & (adv_T > 0)).loss
        return (loss, outputs) if return_outputs else loss
