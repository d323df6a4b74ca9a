"""Answers requests for an adapter: vLLM's own handlers, with embeddings in place of the prompt's tokens."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from ..batches import Batches
from .inputs import Embedded, with_thoughts, without_thoughts
from .private import ErrorResponse, adapter_handler, with_chat_template

_OWN = "softcot_prompt"  # key of an engine's input: the caller's ids
USAGE = "thought_tokens"  # field of a response's `usage`


@dataclass(frozen=True)
class Adapter:
    """An adapter that is served."""

    name: str  # what requests have as `model`
    path: str
    batches: Batches[Embedded]  # makes its embeddings
    chat_template: str | None = None  # `None`: the server's


class Answers:
    """A handler of vLLM's server that answers for adapters as well as for the base.

    Args:
        handler: The server's own handler.
        method: Name of the method that its route calls.
        adapters: The adapters by name.
    """

    def __init__(self, handler: Any, method: str, adapters: dict[str, Adapter]) -> None:
        self._handler = handler
        self._method = method
        self._adapters = adapters
        setattr(self, method, self.answer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handler, name)

    async def answer(self, request: Any, raw_request: Any = None) -> Any:
        """Answer a request: with thoughts if its `model` is an adapter, else as without this package."""
        adapter = self._adapters.get(request.model)
        if adapter is None:
            return await getattr(self._handler, self._method)(request, raw_request)
        renderer = AdapterRenderer(self._handler.online_renderer, adapter)
        models, engine = AdapterModels(self._handler.models, adapter.name), AdapterEngine(self._handler.engine_client)
        handler = adapter_handler(self._handler, renderer, models, engine)
        answered = await getattr(handler, self._method)(request, raw_request)
        if isinstance(answered, ErrorResponse):
            return answered
        if isinstance(answered, AsyncIterator):
            return add_to_stream(answered, renderer)
        setattr(answered.usage, USAGE, renderer.thoughts)
        return answered


class AdapterRenderer:
    """vLLM's renderer of one request, which replaces the tokens of a prompt by embeddings with thoughts.

    A request is checked and its thoughts are made before its answer begins, so that whatever fails has an ordinary
    error and status, streamed or not.

    Args:
        renderer: The server's `OnlineRenderer`.
        adapter: The adapter that the request names.
    """

    def __init__(self, renderer: Any, adapter: Adapter) -> None:
        self._renderer = with_chat_template(renderer, adapter.chat_template)
        self._adapter = adapter
        self.thoughts = 0  # how many positions thoughts take beside the tokens of the prompts

    def __getattr__(self, name: str) -> Any:
        return getattr(self._renderer, name)

    async def render_chat(self, request: Any, **options: Any) -> Any:
        """Return the conversation and the engine's inputs, or an error."""
        _check_request(request)
        result = await self._renderer.render_chat(request, **options)
        if isinstance(result, ErrorResponse):
            return result
        conversation, inputs = result
        return conversation, [await self._with_thoughts(each) for each in inputs]

    async def render_completion(self, request: Any, **options: Any) -> Any:
        """Return the engine's inputs, or an error."""
        _check_request(request)
        result = await self._renderer.render_completion(request, **options)
        if isinstance(result, ErrorResponse):
            return result
        return await _all([self._with_thoughts(each) for each in result])

    async def _with_thoughts(self, given: dict[str, Any]) -> dict[str, Any]:
        adapter = self._adapter
        if given["type"] != "token":
            raise ValueError(
                f"Prompts for the SoftCoT adapter {adapter.name!r} must be text or token ids, got input of type "
                f"{given['type']!r}. Send text, or name the base in `model`."
            )
        ids = given["prompt_token_ids"]
        embedded = await adapter.batches.embed(adapter.name, ids)
        self.thoughts += len(embedded.embeds) - len(ids)
        made = with_thoughts(ids, embedded, adapter.name, given.get("cache_salt"))
        made["is_token_ids"] = made.pop("prompt_is_token_ids")  # the name in inputs of the engine
        kept: dict[str, Any] = {name: given[name] for name in ("prompt", "arrival_time") if name in given}
        return {"type": "embeds", **made, **kept, _OWN: ids}


class AdapterEngine:
    """vLLM's engine, whose outputs speak of the caller's prompt, without thoughts.

    Args:
        engine: The server's `EngineClient`.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def generate(self, prompt: dict[str, Any], *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        """Yield the outputs of a request. Closing the iterator aborts the request."""
        engine_input = dict(prompt)
        ids = engine_input.pop(_OWN)
        async with contextlib.aclosing(self._engine.generate(engine_input, *args, **kwargs)) as outputs:
            async for output in outputs:
                yield without_thoughts(output, ids)


class AdapterModels:
    """vLLM's record of served models, which knows an adapter as the only one.

    Args:
        models: The server's `OpenAIServingModels`.
        adapter: Name of the adapter.
    """

    def __init__(self, models: Any, adapter: str) -> None:
        self._models = models
        self._adapter = adapter
        self.lora_requests: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._models, name)

    def is_base_model(self, name: str) -> bool:
        """Return whether requests may have this name."""
        return name == self._adapter

    def model_name(self, lora_request: Any = None) -> str:
        """Return the name that responses have."""
        return self._adapter


async def _all(awaitables: list[Any]) -> list[Any]:
    """Await all; if one fails, cancel the others."""
    tasks = [asyncio.ensure_future(each) for each in awaitables]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        raise


def _check_request(request: Any) -> None:
    """Reject what the engine cannot do for prompts that it has no tokens of."""
    echoed = getattr(request, "echo", False) and request.logprobs is not None
    asked = {
        "use_beam_search": request.use_beam_search,
        "prompt_logprobs": request.prompt_logprobs is not None,
        "echo with logprobs": echoed,
    }
    if found := [name for name, given in asked.items() if given]:
        raise ValueError(
            f"`{found[0]}` must not be set for a SoftCoT adapter: vLLM has no log-probabilities and no beams for "
            "prompts given as embeddings. Leave it out, or name the base in `model`."
        )


async def add_to_stream(events: Any, renderer: AdapterRenderer) -> AsyncIterator[str]:
    """Add the number of thoughts to the usage in a stream of server-sent events."""
    start, mark = "data: ", '"usage":{'
    async with contextlib.aclosing(events):
        async for event in events:
            if event.startswith(start) and mark in event:
                content = json.loads(event.removeprefix(start))
                content["usage"][USAGE] = renderer.thoughts
                yield f"{start}{json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"
            else:
                yield event
