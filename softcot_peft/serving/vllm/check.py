"""Says so if adapters are named for a server that does not load this package's plugin."""

from __future__ import annotations

import os

from ..settings import ADAPTERS, read_adapters

NAME = "softcot"  # of the plugin, in `VLLM_PLUGINS`


def check_environment() -> None:
    """Reject a start that names adapters without this plugin; an entry point of `vllm.general_plugins`.

    vLLM loads general plugins unless told otherwise, but endpoint plugins only if `VLLM_PLUGINS` names them.

    Raises:
        ValueError: `SOFTCOT_ADAPTERS` is set, but `VLLM_PLUGINS` is not, or the names in requests are not checked.
    """
    if not read_adapters():
        return
    if os.environ.get("VLLM_SKIP_MODEL_NAME_VALIDATION", "0").lower() in ("1", "true"):
        raise ValueError(
            "`VLLM_SKIP_MODEL_NAME_VALIDATION` must not be set when SoftCoT adapters are served: at routes that know "
            "no adapters, the base would answer in their name. Unset it."
        )
    if not os.environ.get("VLLM_PLUGINS"):
        raise ValueError(
            f"`VLLM_PLUGINS` must name '{NAME}' for the adapters in `{ADAPTERS}` to be served, but it is not set: "
            f"vLLM loads plugins that change its HTTP interface only if they are named. Set `VLLM_PLUGINS={NAME}`, "
            "with the names of other plugins that you use after a comma."
        )
