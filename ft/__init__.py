"""ft: fine-tune language models with pure functions, one loop and typed Python recipes.

    from ft import AdamW, Data, LoRA, Model, Recipe, SFT

Importing ``ft`` imports no torch; what needs it (``ft.losses``, ``ft.train``, ...) imports it when used.
"""

from ft.errors import FtError
from ft.methods import (
    BCO,
    CPO,
    DPO,
    GRPO,
    KTO,
    ORPO,
    SFT,
    Correction,
    Distill,
    Reward,
    RewardFunction,
    SimPO,
    Stepwise,
)
from ft.recipe import (
    NF4,
    WSD,
    AdamW,
    Batching,
    Constant,
    Cosine,
    Data,
    Embedded,
    Eval,
    Judging,
    Linear,
    Log,
    LoRA,
    Model,
    Parallel,
    Recipe,
    Reference,
    Sampling,
    Save,
    Source,
)

__version__ = "0.1.0"
__all__ = [
    "BCO",
    "CPO",
    "DPO",
    "GRPO",
    "KTO",
    "NF4",
    "ORPO",
    "SFT",
    "WSD",
    "AdamW",
    "Batching",
    "Constant",
    "Correction",
    "Cosine",
    "Data",
    "Distill",
    "Embedded",
    "Eval",
    "FtError",
    "Judging",
    "Linear",
    "LoRA",
    "Log",
    "Model",
    "Parallel",
    "Recipe",
    "Reference",
    "Reward",
    "RewardFunction",
    "Sampling",
    "Save",
    "SimPO",
    "Source",
    "Stepwise",
]
