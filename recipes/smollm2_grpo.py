"""GRPO of SmolLM2-135M-Instruct with LoRA: sums of two digits, rewarded where the last number said is right."""

from ft import GRPO, AdamW, Batching, Constant, Data, Eval, LoRA, Model, Recipe, Sampling, Save
from ft.rollout.rewards import last_number

recipe = Recipe(
    model=Model(id="HuggingFaceTB/SmolLM2-135M-Instruct", family="llama", dtype="float32", checkpointing=False),
    adapter=LoRA(r=16, alpha=32.0, targets=("attention", "mlp")),
    data=Data(
        train="recipes/data/tasks.train.jsonl",
        eval="recipes/data/tasks.eval.jsonl",
        max_tokens=256,
    ),
    method=GRPO(
        rewards=last_number,
        group=8,
        sampling=Sampling(max_tokens=24, temperature=0.7),
    ),
    optim=AdamW(lr=2e-4),
    schedule=Constant(warmup=3.0),
    batch=Batching(examples=8, tokens=4096),
    eval=Eval(every=20),
    save=Save(every=20),
    steps=40,
)
