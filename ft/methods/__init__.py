"""Methods: each a frozen attrs class of three functions, named in a recipe."""

from ft.methods.bco import BCO
from ft.methods.cpo import CPO
from ft.methods.distill import Distill
from ft.methods.dpo import DPO
from ft.methods.grpo import GRPO, Correction
from ft.methods.kto import KTO
from ft.methods.orpo import ORPO
from ft.methods.reward import Reward
from ft.methods.rollouts import RewardFunction
from ft.methods.sft import SFT
from ft.methods.simpo import SimPO
from ft.methods.stepwise import Stepwise

__all__ = [
    "BCO",
    "CPO",
    "DPO",
    "GRPO",
    "KTO",
    "ORPO",
    "SFT",
    "Correction",
    "Distill",
    "Reward",
    "RewardFunction",
    "SimPO",
    "Stepwise",
]
