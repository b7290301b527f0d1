"""LoRA on SmolLM2-135M-Instruct: adding two numbers, a task where the model starts near zero. Minutes on two cores."""

from ft import SFT, AdamW, Batching, Cosine, Data, Eval, LoRA, Model, Recipe, Save

recipe = Recipe(
    model=Model(id="HuggingFaceTB/SmolLM2-135M-Instruct", family="llama", dtype="float32", checkpointing=False),
    adapter=LoRA(r=16, alpha=32.0, targets=("attention", "mlp")),
    data=Data(train="recipes/data/sums.train.jsonl", eval="recipes/data/sums.eval.jsonl", max_tokens=256),
    method=SFT(),
    optim=AdamW(lr=1e-3),
    schedule=Cosine(warmup=0.05, floor=0.05),
    batch=Batching(examples=16, tokens=1024),
    eval=Eval(every=0),
    save=Save(every=32),
    steps=80,
)
