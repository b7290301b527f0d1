"""A dense student, Qwen3.5-4B with LoRA, learns from Qwen3.5-35B-A3B, whose experts are held in NF4 beside it.

Rehearse anywhere: ft run recipes/qwen35_moe_distill.py --tiny
"""

from ft import NF4, AdamW, Batching, Cosine, Data, Distill, LoRA, Model, Recipe, Reference, Save

recipe = Recipe(
    model=Model(id="Qwen/Qwen3.5-4B", family="qwen3_5_text"),
    adapter=LoRA(r=32, alpha=64.0, targets=("attention", "mlp")),
    data=Data(train="data/chat.jsonl", rehearsal="recipes/data/chat.jsonl", max_tokens=4096),
    method=Distill(beta=0.5, temperature=1.0),
    reference=Reference(model=Model(id="Qwen/Qwen3.5-35B-A3B", family="qwen3_5_moe_text", quant=NF4())),
    optim=AdamW(lr=1e-4),
    schedule=Cosine(warmup=0.03),
    batch=Batching(examples=64, tokens=8192),
    save=Save(every=50),
    epochs=1.0,
)
