"""What a server with adapters rejects, in whose words, and that it goes on."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from serve import BAD
from served import BASE, LENGTH, PROMPTS, Served, Server, message, skip_without_vllm

skip_without_vllm()

TOO_LONG = [10] * (LENGTH - 1)  # as ids of a prompt, with thoughts
BODIES: dict[str, tuple[dict[str, Any], int, str]] = {
    "unknown model": ({"model": "third"}, 404, "does not exist"),
    "too long": ({"prompt": [10] * (LENGTH + 8)}, 400, "maximum"),
    "too long with thoughts": ({"prompt": TOO_LONG}, 400, "maximum context length"),
    "no run": ({"model": "run"}, 400, "every prompt must hold a run"),
    "unknown id": ({"prompt": [99999]}, 400, "base's vocabulary"),
    "beams": ({"use_beam_search": True, "n": 2}, 400, "`use_beam_search` must not be set"),
    "prompt logprobs": ({"prompt_logprobs": 1}, 400, "`prompt_logprobs` "),
    "echoed logprobs": ({"echo": True, "logprobs": 1}, 400, "`echo with logprobs` must not be set"),
    "embeddings": ({"prompt_embeds": "AAAA"}, 400, "`prompt_embeds` must not be in requests"),
    "embeddings for the base": ({"model": BASE, "prompt_embeds": "AAAA"}, 400, "`prompt_embeds` must not be"),
    "reserved text": ({"prompt": "What is <prompt_embeds>?"}, 400, "base's vocabulary"),
    "negative temperature": ({"temperature": -1}, 400, "temperature"),
    "failing assistant": ({"model": "failing", "prompt": [5, BAD]}, 500, "out of order"),
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("case", BODIES)
def test_a_request_that_cannot_be_answered_has_an_ordinary_error(server: Server, case: str, stream: bool) -> None:
    changes, status, words = BODIES[case]
    body = {"model": "first", "prompt": PROMPTS[0], "max_tokens": 1, "stream": stream, **changes}
    if changes.get("use_beam_search"):
        body["stream"] = False
    found, error = server.post("/v1/completions", body)
    assert found == status
    assert words in error["error"]["message"]
    assert error["error"]["code"] == status
    assert server.ask("first", PROMPTS[0])["tokens"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/messages", "/tokenize"])
def test_embeddings_are_refused_wherever_messages_are_read(server: Server, path: str) -> None:
    part = {"type": "prompt_embeds", "data": "AAAA"}
    chat = [{"role": "user", "content": [part]}]
    for name in ("first", BASE):
        status, error = server.post(path, {"model": name, "messages": chat, "input": chat, "max_tokens": 1})
        assert status == 400
        assert "`prompt_embeds` must not be in requests" in error["error"]["message"]
    escaped = json.dumps({"model": BASE, "messages": chat}).replace("prompt_", "\\u0070rompt_").encode()
    assert server.post(path, escaped)[0] == 400


def test_text_about_embeddings_is_text(served: Served, server: Server) -> None:
    text = "What are prompt_embeds?"
    assert server.ask("first", text)["tokens"] == served.answer("first", served.ids(text))


def test_malformed_requests(server: Server) -> None:
    for body in (b"{nope", b"[]", b"", b'{"model": "first"}'):
        assert server.post("/v1/completions", body)[0] in (400, 422)


def test_a_failing_assistant_fails_its_own_requests(served: Served, server: Server) -> None:
    bad = {"model": "failing", "prompt": [5, BAD], "max_tokens": 1}
    with ThreadPoolExecutor(12) as clients:
        failed = [clients.submit(server.post, "/v1/completions", bad) for _ in range(6)]
        good = [clients.submit(server.ask, "failing", prompt) for prompt in PROMPTS]
        assert [each.result()[0] for each in failed] == [500] * 6
        for prompt, each in zip(PROMPTS, good, strict=True):
            assert each.result()["tokens"] == served.answer("first", served.ids(prompt))


def test_clients_that_leave_take_nothing_with_them(served: Served, server: Server) -> None:
    draw = random.Random(0)

    def leave(number: int) -> None:
        body = {"model": "first", "messages": message(PROMPTS[number % 4]), "max_tokens": 150, "ignore_eos": True}
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        stream = number % 2 == 0
        connection.request(
            "POST", "/v1/chat/completions", json.dumps(body | {"stream": stream}), {"content-type": "application/json"}
        )
        time.sleep(draw.random() * 0.3)
        if stream and number % 4 == 0:
            with contextlib.suppress(OSError):
                connection.getresponse().read(200)
        connection.close()

    asked = [("second", prompt) for prompt in PROMPTS] * 10
    with ThreadPoolExecutor(16) as leaving, ThreadPoolExecutor(2) as staying:
        left = [leaving.submit(leave, number) for number in range(2000)]
        answers = list(staying.map(lambda each: server.ask(*each), asked))
        for each in left:
            each.result()
    answers += [server.ask(*each) for each in asked[:4]]
    for (name, prompt), answer in zip(asked + asked[:4], answers, strict=True):
        assert answer["tokens"] == served.answer(name, served.ids(prompt))
    for _ in range(100):
        if not server.metric("vllm:num_requests_running") + server.metric("vllm:num_requests_waiting"):
            return
        time.sleep(0.1)
    raise AssertionError("Requests of clients that left are still running.")
