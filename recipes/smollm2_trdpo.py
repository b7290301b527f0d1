"""TR-DPO of SmolLM2-135M-Instruct with LoRA: every 8 steps the reference becomes a copy of what has been learnt."""

from ft import DPO, AdamW, Batching, Cosine, Data, LoRA, Model, Recipe, Reference, Save, Source

recipe = Recipe(
    model=Model(id="HuggingFaceTB/SmolLM2-135M-Instruct", family="llama", dtype="float32", checkpointing=False),
    adapter=LoRA(r=16, alpha=32.0, targets=("attention", "mlp")),
    data=Data(
        train=Source(path="recipes/data/pairs.jsonl", split="train[:512]"),
        eval=Source(path="recipes/data/pairs.jsonl", split="train[512:]"),
        max_tokens=256,
    ),
    method=DPO(beta=0.1),
    reference=Reference(every=8),
    optim=AdamW(lr=5e-4),
    schedule=Cosine(warmup=0.1, floor=0.1),
    batch=Batching(examples=16, tokens=2048),
    save=Save(every=32),
    epochs=1.0,
)
