"""GRPO of SmolLM2-135M-Instruct with LoRA, answers sampled by a vLLM server; otherwise as smollm2_grpo, in fewer steps.

The server is started by the run and ends with it. Its Python is named by sampler.python or $FT_VLLM_PYTHON. On a CPU
vLLM takes several times as long to apply an adapter as to apply the model.
"""

from ft import GRPO, VLLM, AdamW, Batching, Constant, Data, Eval, LoRA, Model, Recipe, Sampling, Save
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
    sampler=VLLM(),
    optim=AdamW(lr=2e-4),
    schedule=Constant(warmup=3.0),
    batch=Batching(examples=8, tokens=4096),
    eval=Eval(every=12),
    save=Save(every=12),
    steps=24,
)
