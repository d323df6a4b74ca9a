"""The plugin of vLLM's server: adapters named in `SOFTCOT_ADAPTERS` are served beside the base.

It is an endpoint plugin, since these exist to add to the server's HTTP surface, are loaded in its front end alone, and
get the handlers of requests, where the name in `model` is known. A renderer of `RENDERER_REGISTRY` gets neither names
nor requests, and would replace vLLM's own for every model of that kind.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch
from vllm import SamplingParams

from ..batches import Batches
from ..refuse_embeds import RefuseEmbeds
from ..settings import ADAPTERS, read_adapters, read_device
from .answer import Adapter, Answers
from .check import NAME
from .check_fit import SAMPLING, check_outputs, prompts
from .load import load_adapters
from .private import HANDLERS, adapter_card, check_handlers, engine_inputs


class SoftCoTPlugin:
    """Serves SoftCoT adapters; an entry point of `vllm.endpoint_plugins`.

    Example:
        ```sh
        VLLM_PLUGINS=softcot SOFTCOT_ADAPTERS="gsm8k=./my-adapter" vllm serve BASE --enable-prompt-embeds
        ```
    """

    name = NAME
    required_tasks = None  # whatever the model is for: adapters that are named and cannot be served stop the start

    def attach_router(self, app: Any) -> None:
        """Reject embeddings of clients. Routes stay vLLM's own."""
        if read_adapters():
            app.add_middleware(RefuseEmbeds)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Load the adapters and put them beside the base.

        Raises:
            ValueError: An adapter does not fit the base, or the server's options exclude adapters.
            RuntimeError: This release of vLLM is not supported.
        """
        if not (paths := read_adapters()):
            return
        if engine_client is None:
            raise ValueError(
                "SoftCoT adapters must be served by an engine, but this server only renders prompts. "
                f"Unset `{ADAPTERS}`."
            )
        check_handlers(state)
        config, models = engine_client.vllm_config, state.openai_serving_models
        _check_options(config)
        _check_names(paths, [path.name for path in models.base_model_paths], list(models.lora_requests))
        loaded, dtype = load_adapters(paths, config.model_config, read_device()), config.model_config.dtype
        await _check_fit(engine_client, next(iter(loaded.values())).embeddings, dtype)
        batches = Batches({name: adapter.embed for name, adapter in loaded.items()})
        adapters = {name: Adapter(name, path, batches, loaded[name].chat_template) for name, path in paths.items()}
        for attribute, method in HANDLERS.items():
            setattr(state, attribute, Answers(getattr(state, attribute), method, adapters))
        state.openai_serving_models = ListedModels(models, adapters)


class ListedModels:
    """vLLM's record of served models, which lists adapters as well.

    Args:
        models: The server's `OpenAIServingModels`.
        adapters: The adapters by name.
    """

    def __init__(self, models: Any, adapters: dict[str, Adapter]) -> None:
        self._models = models
        self._adapters = adapters

    def __getattr__(self, name: str) -> Any:
        return getattr(self._models, name)

    async def show_available_models(self) -> Any:
        """Return vLLM's list with the adapters at its end."""
        listed = await self._models.show_available_models()
        base = self._models.base_model_paths[0].name
        listed.data += [adapter_card(adapter.name, adapter.path, base) for adapter in self._adapters.values()]
        return listed


async def _check_fit(engine: Any, embeddings: Any, dtype: torch.dtype) -> None:
    """Send the engine the same prompt as ids and as embeddings."""
    outputs = []
    for number, prompt in enumerate(engine_inputs(engine.renderer, prompts(embeddings, dtype))):
        async for output in engine.generate(prompt, SamplingParams(**SAMPLING), f"softcot-check-{number}"):
            last = output
        outputs.append(last)
    check_outputs(outputs, dtype)


def _check_options(config: Any) -> None:
    if not config.model_config.enable_prompt_embeds:
        raise ValueError(
            "`--enable-prompt-embeds` must be set to serve SoftCoT adapters, whose thoughts reach the engine as "
            "embeddings. Clients cannot send any."
        )
    if config.speculative_config is not None:
        raise ValueError(
            "Speculative decoding must be off to serve SoftCoT adapters: vLLM's draft models do not read embeddings. "
            "Leave out `--speculative-config`."
        )


def _check_names(paths: dict[str, str], base: list[str], loras: list[str]) -> None:
    if taken := [name for name in paths if name in (*base, *loras)]:
        raise ValueError(
            f"`{ADAPTERS}` must name adapters differently from the base and its LoRA modules, got {taken[0]!r}, which "
            f"is one of {[*base, *loras]}. Rename the adapter or set `--served-model-name`."
        )
