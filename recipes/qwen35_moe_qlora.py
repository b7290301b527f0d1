"""QLoRA on Qwen3.5-35B-A3B: everything frozen in NF4, the routed experts too; LoRA on attention and experts.

Rehearse anywhere: ft run recipes/qwen35_moe_qlora.py --tiny
"""

from ft import NF4, SFT, AdamW, Batching, Cosine, Data, LoRA, Model, Recipe, Save

recipe = Recipe(
    model=Model(id="Qwen/Qwen3.5-35B-A3B", family="qwen3_5_moe_text", quant=NF4()),
    adapter=LoRA(r=16, alpha=32.0, targets=("attention", "shared_experts", "experts")),
    data=Data(train="data/chat.jsonl", rehearsal="recipes/data/chat.jsonl", max_tokens=4096),
    method=SFT(),
    optim=AdamW(lr=1e-4),
    schedule=Cosine(warmup=0.03),
    batch=Batching(examples=64, tokens=8192),
    save=Save(every=50),
    epochs=1.0,
)
