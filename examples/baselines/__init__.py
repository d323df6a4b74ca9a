"""SoftCoT and the systems it is compared with, all with the interface of [`System`]."""

from .assist_cot import AssistCoT
from .coconut import Coconut
from .common import Baseline, System
from .cot_unk import CotUnk, TrainedPlaceholders
from .lora import Lora
from .prompt_tuning import PromptTuning
from .softcot import SoftCoT
from .zero_shot import ZeroShot

__all__ = [
    "AssistCoT",
    "Baseline",
    "Coconut",
    "CotUnk",
    "Lora",
    "PromptTuning",
    "SoftCoT",
    "System",
    "TrainedPlaceholders",
    "ZeroShot",
]
