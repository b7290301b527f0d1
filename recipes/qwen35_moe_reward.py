"""A reward model of Qwen3.5-35B-A3B in NF4, with LoRA on attention and experts, and a head that scores.

Rehearse anywhere: ft run recipes/qwen35_moe_reward.py --tiny
"""

from ft import NF4, AdamW, Batching, Cosine, Data, LoRA, Model, Recipe, Reward, Save

recipe = Recipe(
    model=Model(id="Qwen/Qwen3.5-35B-A3B", family="qwen3_5_moe_text", quant=NF4()),
    adapter=LoRA(r=16, alpha=32.0, targets=("attention", "shared_experts", "experts")),
    data=Data(train="data/pairs.jsonl", rehearsal="recipes/data/pairs.jsonl", max_tokens=2048),
    method=Reward(centring=0.01),
    optim=AdamW(lr=2e-5),
    schedule=Cosine(warmup=0.1),
    batch=Batching(examples=64, tokens=8192),
    save=Save(every=50),
    epochs=1.0,
)
