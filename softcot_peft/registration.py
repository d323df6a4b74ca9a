"""Registers `PeftType.SOFTCOT` with PEFT, and thereby with transformers. Changes nothing else."""

from __future__ import annotations

import warnings

from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method

NAME = "SOFTCOT"


def add_peft_type() -> None:
    """Add the enum member `PeftType.SOFTCOT`, unless it exists.

    Transformers' `load_adapter` reads `peft_type.value`, so a plain string is not enough. Enums cannot be extended and
    peft 0.21 offers no other way, so this creates the member in the same way as `enum.EnumType`.
    """
    if NAME in PeftType.__members__:
        return
    member = str.__new__(PeftType, NAME)
    member._name_ = NAME
    member._value_ = NAME
    type.__setattr__(PeftType, NAME, member)
    PeftType._member_names_.append(NAME)
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member


def register(config_cls: type[PeftConfig], model_cls: type[BaseTuner]) -> None:
    """Register the method with PEFT, once.

    Args:
        config_cls: The configuration class of the method.
        model_cls: The tuner class of the method.

    Warns:
        UserWarning: PEFT provides the method itself; its classes stay registered.
    """
    registered = PEFT_TYPE_TO_CONFIG_MAPPING.get(PeftType[NAME])
    if registered is None:
        register_peft_method(name=NAME.lower(), config_cls=config_cls, model_cls=model_cls, prefix="softcot_")
    elif registered is not config_cls:
        warnings.warn(
            f"PEFT already knows the method 'softcot' as {registered.__module__}.{registered.__name__}, which stays "
            "registered. PEFT loads adapters with it instead of softcot-peft.",
            stacklevel=2,
        )
