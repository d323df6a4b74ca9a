"""What a source is, on one line: for `print(model)` and the `repr` of what holds a source."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..config import SoftCoTConfig

# Fields of a config that are shown if they are not at their defaults.
_CHANGES = ("inference_num_thought_tokens", "thought_token", "placement", "response_marker", "num_chains")


def fields(config: SoftCoTConfig) -> str:
    """Return the fields of a config that say what is read and how many thoughts there are."""
    shown: dict[str, Any] = {"num_thought_tokens": config.num_thought_tokens}
    if config.assistant_model_name_or_path is not None:
        shown = {"assistant": config.assistant_model_name_or_path, **shown}
    defaults = type(config).__dataclass_fields__
    shown |= {name: getattr(config, name) for name in _CHANGES if getattr(config, name) != defaults[name].default}
    return ", ".join(f"{name}={value!r}" for name, value in shown.items())


def describe(source: nn.Module) -> str:
    """Return a source's class and what its `extra_repr` says, on one line."""
    return f"{type(source).__name__}({' '.join(source.extra_repr().split())})"
