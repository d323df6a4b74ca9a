"""What this package takes from vLLM beside its documented interfaces, and why. Tried with vLLM 0.32.

- `OpenAIServingChat` and `OpenAIServingCompletion` answer requests. They get the prompt's tokens from
  `online_renderer`, names from `models`, and tokens from `engine_client`; a shallow copy with these three replaced
  answers for an adapter. Their constructors take twenty arguments that change with each release.
- `OnlineRenderer.chat_template` is the server's chat template; an adapter may have its own.
- `app.state` holds the handlers that the routes use, `openai_serving_*`. Plugins are given it to initialise.
- `LLM._preprocess_cmpl` and `LLM._preprocess_chat` tokenize prompts and conversations as `generate` and `chat` do.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from vllm import LLM
from vllm.entrypoints.serve.engine.protocol import ErrorResponse, ModelCard, ModelPermission

__all__ = [
    "HANDLERS",
    "ErrorResponse",
    "adapter_card",
    "adapter_handler",
    "check_handlers",
    "engine_inputs",
    "tokenize",
    "with_chat_template",
]

HANDLERS = {"openai_serving_chat": "create_chat_completion", "openai_serving_completion": "create_completion"}
_PARTS = ("online_renderer", "models", "engine_client")


def check_handlers(state: Any) -> None:
    """Reject releases of vLLM whose server is built in another way.

    Raises:
        RuntimeError: The server's state has no handlers of the known form.
    """
    for name, method in HANDLERS.items():
        handler = getattr(state, name, None)
        missing = [part for part in (*_PARTS, method) if not hasattr(handler, part)]
        if missing:
            import vllm

            raise RuntimeError(
                f"vLLM's server must have a `{name}` with {missing}, but that of vLLM {vllm.__version__} has none: "
                "either the model does not generate text, or this release is not supported. See docs/serving.md for "
                "the releases that were tried."
            )


def with_chat_template(online_renderer: Any, chat_template: str | None) -> Any:
    """Return a renderer of requests with another chat template; the same one if there is none."""
    if chat_template is None:
        return online_renderer
    copied = copy.copy(online_renderer)
    copied.chat_template = chat_template
    return copied


def adapter_handler(handler: Any, online_renderer: Any, models: Any, engine_client: Any) -> Any:
    """Return a copy of a handler that answers for an adapter."""
    copied = copy.copy(handler)
    for part, value in zip(_PARTS, (online_renderer, models, engine_client), strict=True):
        setattr(copied, part, value)
    return copied


def adapter_card(name: str, path: str, parent: str) -> ModelCard:
    """Return what the list of models says about an adapter; the same as about a LoRA."""
    return ModelCard(id=name, root=path, parent=parent, permission=[ModelPermission()])


def engine_inputs(renderer: Any, prompts: Sequence[Any]) -> list[Any]:
    """Return prompts of ids or embeddings as the engine takes them."""
    return list(renderer.render_cmpl(prompts))


def tokenize(llm: LLM, prompts: Sequence[Any], chat: bool, **options: Any) -> list[dict[str, Any]]:
    """Return prompts or conversations as the engine would read them without an adapter."""
    render = llm._preprocess_chat if chat else llm._preprocess_cmpl
    return list(render(prompts, **options))
