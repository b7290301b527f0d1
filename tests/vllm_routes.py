"""Run by a Python that has vLLM: the experts that its own capture writes down while it answers.

``python vllm_routes.py MODEL OUT.npz``. Written are the tokens of a prompt and its answer, and ``routes`` of those that
were forwarded, [tokens, layers, experts per token], as a server with --enable-return-routed-experts tells them. Its
builds for a CPU refuse that flag (it wants their second model runner, which wants Triton), so that the capture, which
works there, is bound to the model by hand.
"""

from __future__ import annotations

import os
import sys

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}

import numpy as np
import torch
from vllm import LLM, SamplingParams
from vllm.model_executor.layers.fused_moe.routed_experts_capturer import (
    RoutedExpertsCapturer,
    bind_routed_experts_capturer,
)

PROMPT = [5, 9, 14, 3, 77, 21, 8]

if __name__ == "__main__":
    torch.set_num_threads(1)
    made = LLM(
        model=sys.argv[1],
        dtype="float32",
        max_model_len=96,
        enforce_eager=True,
        block_size=32,
        generation_config="vllm",
    )
    worker = made.llm_engine.model_executor.driver_worker  # type: ignore[attr-defined]
    runner = getattr(worker, "worker", worker).model_runner
    capturer = RoutedExpertsCapturer(256, runner.vllm_config)
    bind_routed_experts_capturer(runner.model, capturer)
    execute, steps = runner.execute_model, []

    def watched(scheduled, *args, **kwargs):
        out = execute(scheduled, *args, **kwargs)
        steps.append(capturer.snapshot_routing_data(scheduled.total_num_scheduled_tokens).clone())
        return out

    runner.execute_model = watched
    options = SamplingParams(max_tokens=8, seed=3, ignore_eos=True)
    (found,) = made.generate([{"prompt_token_ids": PROMPT}], options)
    tokens = [*PROMPT, *found.outputs[0].token_ids]
    np.savez(sys.argv[2], tokens=np.array(tokens), routes=torch.cat(steps).numpy()[: len(tokens) - 1])
