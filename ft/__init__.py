"""ft: fine-tune language models with pure functions, one loop and typed Python recipes.

    from ft import AdamW, Data, LoRA, Model, Recipe, SFT

Importing ``ft`` imports no torch; what needs it (``ft.losses``, ``ft.train``, ...) imports it when used.
"""

from ft.errors import FtError
from ft.methods import BCO, CPO, DPO, KTO, ORPO, SFT, Distill, Reward, SimPO, Stepwise
from ft.recipe import (
    NF4,
    WSD,
    AdamW,
    Batching,
    Constant,
    Cosine,
    Data,
    Eval,
    Linear,
    Log,
    LoRA,
    Model,
    Parallel,
    Recipe,
    Reference,
    Save,
    Source,
)

__version__ = "0.1.0"
__all__ = [
    "BCO",
    "CPO",
    "DPO",
    "KTO",
    "NF4",
    "ORPO",
    "SFT",
    "WSD",
    "AdamW",
    "Batching",
    "Constant",
    "Cosine",
    "Data",
    "Distill",
    "Eval",
    "FtError",
    "Linear",
    "LoRA",
    "Log",
    "Model",
    "Parallel",
    "Recipe",
    "Reference",
    "Reward",
    "Save",
    "SimPO",
    "Source",
    "Stepwise",
]
