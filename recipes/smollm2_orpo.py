"""ORPO of SmolLM2-135M-Instruct, all weights: it needs no reference, so that nothing is held beside the model."""

from ft import ORPO, AdamW, Batching, Data, Linear, Model, Recipe, Save, Source

recipe = Recipe(
    model=Model(id="HuggingFaceTB/SmolLM2-135M-Instruct", family="llama", dtype="float32"),
    data=Data(
        train=Source(path="recipes/data/pairs.jsonl", split="train[:512]"),
        eval=Source(path="recipes/data/pairs.jsonl", split="train[512:]"),
        max_tokens=256,
    ),
    method=ORPO(beta=0.1),
    optim=AdamW(lr=2e-5),
    schedule=Linear(warmup=0.05),
    batch=Batching(examples=16, tokens=2048),
    save=Save(every=50, keep=1),
    epochs=1.0,
)
