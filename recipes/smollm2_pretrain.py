"""Continued pretraining of SmolLM2-135M on plain text: every token is trained."""

from ft import SFT, WSD, AdamW, Batching, Data, Model, Recipe, Save

recipe = Recipe(
    model=Model(id="HuggingFaceTB/SmolLM2-135M-Instruct", family="llama", dtype="float32"),
    data=Data(train="recipes/data/text.jsonl", mask="all", max_tokens=1024, overlong="truncate"),
    method=SFT(),
    optim=AdamW(lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1),
    schedule=WSD(warmup=0.05, decay=0.2),
    batch=Batching(examples=16, tokens=2048),
    save=Save(every=50, keep=1),
    epochs=1.0,
)
