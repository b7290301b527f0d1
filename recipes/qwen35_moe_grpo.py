"""GRPO of Qwen3.5-35B-A3B in NF4, with LoRA on attention and experts, with DAPO's options: sums, rewarded where right.

Rehearse anywhere: ft run recipes/qwen35_moe_grpo.py --tiny
"""

from ft import GRPO, NF4, AdamW, Batching, Clipped, Constant, Data, LoRA, Model, Overlong, Recipe, Sampling, Save
from ft.rollout.rewards import last_number

recipe = Recipe(
    model=Model(id="Qwen/Qwen3.5-35B-A3B", family="qwen3_5_moe_text", quant=NF4()),
    adapter=LoRA(r=16, alpha=32.0, targets=("attention", "shared_experts", "experts")),
    data=Data(train="recipes/data/tasks.train.jsonl", max_tokens=512, thinking=False),
    method=GRPO(
        rewards=last_number,
        group=8,
        sampling=Sampling(max_tokens=64, temperature=1.0),
        objective=Clipped(clip=(0.2, 0.28)),
        overlong=Overlong(buffer=16),
        resample=1,
    ),
    optim=AdamW(lr=2e-5),
    schedule=Constant(warmup=5.0),
    batch=Batching(examples=16, tokens=8192),
    save=Save(every=20),
    steps=100,
)
