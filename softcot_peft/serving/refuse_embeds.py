"""Rejects requests that bring embeddings of their own to a server that makes them."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

_KEY = "prompt_embeds"
_MESSAGE = (
    f"`{_KEY}` must not be in requests to this server, which makes the embeddings of its SoftCoT adapters itself. "
    "Send text, and name the adapter in `model`."
)


class RefuseEmbeds:
    """ASGI middleware that answers requests with `prompt_embeds` with status 400.

    Engines read such embeddings with `torch.load`. They are searched wherever a body can have them: among its own
    fields, and in the parts of messages. Texts that mention the word pass.

    Args:
        app: The application behind it.
    """

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass a request on unless its body has embeddings."""
        if scope["type"] != "http" or scope.get("method") in ("GET", "HEAD", "OPTIONS"):
            await self.app(scope, receive, send)
            return
        body, read = bytearray(), False

        async def receive_once() -> Message:
            # The body is complete when its last message passes, before the application can act on it.
            nonlocal read
            if not read:
                read = True
                return {"type": "http.request", "body": bytes(body), "more_body": False}
            return await receive()

        more = True
        while more:
            message = await receive()
            if message["type"] != "http.request":  # the client has gone
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
        if has_embeds(bytes(body)):
            await _reject(send)
            return
        await self.app(scope, receive_once, send)


def has_embeds(body: bytes) -> bool:
    """Return whether a JSON body has `prompt_embeds` as a field or as a part of a message.

    >>> has_embeds(b'{"prompt": "What are prompt_embeds?"}'), has_embeds(b'{"prompt_embeds": "AA=="}')
    (False, True)
    """
    if _KEY.encode() not in body and b"\\u" not in body:  # letters may be escaped
        return False
    try:
        return _find(json.loads(body))
    except (ValueError, RecursionError):
        return False  # the server rejects it


def _find(value: Any) -> bool:
    if isinstance(value, dict):
        if value.get(_KEY) is not None or value.get("type") == _KEY:
            return True
        return any(_find(part) for name, part in value.items() if name != "tools")  # whose schemas are text
    return isinstance(value, list) and any(_find(part) for part in value)


async def _reject(send: Send) -> None:
    error = {"message": _MESSAGE, "type": "BadRequestError", "param": _KEY, "code": 400}
    content = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": content})
