"""What a server reads from its environment: the adapters to serve, and where their assistants run."""

from __future__ import annotations

import os
from collections.abc import Mapping

ADAPTERS = "SOFTCOT_ADAPTERS"
DEVICE = "SOFTCOT_DEVICE"


def read_adapters(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the adapters to serve, as Hub ids or folders by name.

        >>> read_adapters({"SOFTCOT_ADAPTERS": "gsm8k=./my-adapter, aqua=owner/name"})
        {'gsm8k': './my-adapter', 'aqua': 'owner/name'}

    Raises:
        ValueError: An entry has another form, or two have the same name.
    """
    found: dict[str, str] = {}
    entries = [entry.strip() for entry in _value(ADAPTERS, environment).split(",")]
    for entry in filter(None, entries):
        name, _, path = (part.strip() for part in entry.partition("="))
        if not name or not path:
            raise ValueError(
                f"`{ADAPTERS}` must have the form 'name=path' or 'name=path,other=path', got {entry!r}. The name is "
                "what requests have as `model`, the path an adapter's folder or Hub id."
            )
        if name in found:
            raise ValueError(f"`{ADAPTERS}` must name each adapter once, got {name!r} twice. Rename one of the two.")
        found[name] = path
    return found


def read_device(environment: Mapping[str, str] | None = None) -> str:
    """Return the device that assistants and projections run on; the CPU unless the environment names one."""
    return _value(DEVICE, environment).strip() or "cpu"


def _value(name: str, environment: Mapping[str, str] | None) -> str:
    """Return a variable of an environment; `None`: that of the process, as it is now."""
    return (os.environ if environment is None else environment).get(name, "")
