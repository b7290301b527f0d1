"""SmolLM2-135M-Instruct learns from the distributions of SmolLM2-360M-Instruct, which is held in NF4; all weights."""

from ft import NF4, AdamW, Batching, Cosine, Data, Distill, Model, Recipe, Reference, Save

recipe = Recipe(
    model=Model(id="HuggingFaceTB/SmolLM2-135M-Instruct", family="llama", dtype="float32"),
    data=Data(train="recipes/data/sums.train.jsonl", eval="recipes/data/sums.eval.jsonl", max_tokens=256),
    method=Distill(beta=0.5, sft=0.5),
    reference=Reference(model=Model(id="HuggingFaceTB/SmolLM2-360M-Instruct", family="llama", quant=NF4())),
    optim=AdamW(lr=5e-5),
    schedule=Cosine(warmup=0.05, floor=0.1),
    batch=Batching(examples=16, tokens=1024),
    save=Save(every=50, keep=1),
    epochs=1.0,
)
