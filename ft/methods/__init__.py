"""Methods: each a frozen attrs class of three functions, named in a recipe."""

from ft.methods.ahead import Ahead
from ft.methods.bco import BCO
from ft.methods.cpo import CPO
from ft.methods.credit import Overlong
from ft.methods.curriculum import Curriculum, Reroll
from ft.methods.distill import Distill
from ft.methods.dpo import DPO
from ft.methods.grpo import GRPO
from ft.methods.kto import KTO
from ft.methods.objectives import CISPO, DPPO, GMPO, LUSPO, RLOO, SAPO, VESPO, Clipped, Reinforce
from ft.methods.orpo import ORPO
from ft.methods.replay import Replay
from ft.methods.reward import Reward
from ft.methods.rollouts import Correction, RewardFunction
from ft.methods.sft import SFT
from ft.methods.simpo import SimPO
from ft.methods.stepwise import Stepwise

__all__ = [
    "BCO",
    "CISPO",
    "CPO",
    "DPO",
    "DPPO",
    "GMPO",
    "GRPO",
    "KTO",
    "LUSPO",
    "ORPO",
    "RLOO",
    "SAPO",
    "SFT",
    "VESPO",
    "Ahead",
    "Clipped",
    "Correction",
    "Curriculum",
    "Distill",
    "Overlong",
    "Reinforce",
    "Replay",
    "Reroll",
    "Reward",
    "RewardFunction",
    "SimPO",
    "Stepwise",
]
