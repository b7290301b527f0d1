"""Full fine-tuning of SmolLM2-135M-Instruct on chat rows."""

from ft import SFT, AdamW, Batching, Data, Linear, Model, Recipe, Save

recipe = Recipe(
    model=Model(id="HuggingFaceTB/SmolLM2-135M-Instruct", family="llama", dtype="float32"),
    data=Data(train="recipes/data/sums.train.jsonl", eval="recipes/data/sums.eval.jsonl", max_tokens=512),
    method=SFT(),
    optim=AdamW(lr=5e-5, weight_decay=0.01),
    schedule=Linear(warmup=0.05),
    batch=Batching(examples=16, tokens=1024),
    save=Save(every=50, keep=1),
    epochs=1.0,
)
