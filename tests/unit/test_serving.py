"""What a server with adapters does without its engine: settings, batches, refused embeddings, prompts and outputs."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import (
    Batches,
    RefuseEmbeds,
    check_environment,
    check_outputs,
    find_tokens,
    has_embeds,
    read_adapters,
    read_device,
    with_thoughts,
    without_thoughts,
)
from torch import Tensor

# Settings


def test_adapters_are_named_in_the_environment() -> None:
    assert read_adapters({}) == {}
    assert read_adapters({"SOFTCOT_ADAPTERS": " a=./x , b=org/name,"}) == {"a": "./x", "b": "org/name"}
    assert read_adapters({"SOFTCOT_ADAPTERS": "a=/x/y=z"}) == {"a": "/x/y=z"}
    assert (read_device({}), read_device({"SOFTCOT_DEVICE": "cuda:1"})) == ("cpu", "cuda:1")


@pytest.mark.parametrize("text", ["gsm8k", "=./x", "a=", "a=./x,b"])
def test_entries_of_another_form_are_rejected(text: str) -> None:
    with pytest.raises(ValueError, match=r"must have the form 'name=path'"):
        read_adapters({"SOFTCOT_ADAPTERS": text})


def test_names_are_given_once() -> None:
    with pytest.raises(ValueError, match="must name each adapter once, got 'a' twice"):
        read_adapters({"SOFTCOT_ADAPTERS": "a=x,a=y"})


def test_adapters_need_the_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    monkeypatch.delenv("SOFTCOT_ADAPTERS", raising=False)
    check_environment()
    monkeypatch.delenv("VLLM_SKIP_MODEL_NAME_VALIDATION", raising=False)
    monkeypatch.setenv("SOFTCOT_ADAPTERS", "a=./x")
    with pytest.raises(ValueError, match="`VLLM_PLUGINS` must name 'softcot'"):
        check_environment()
    monkeypatch.setenv("VLLM_PLUGINS", "softcot")
    check_environment()
    monkeypatch.setenv("VLLM_SKIP_MODEL_NAME_VALIDATION", "1")
    with pytest.raises(ValueError, match="the base would answer in their name"):
        check_environment()


# Batches


class Recorder:
    """Embeds prompts as zeros; waits for `go` before each batch, and fails for prompts with a 13."""

    def __init__(self) -> None:
        self.batches: list[list[list[int]]] = []
        self.started, self.go = threading.Semaphore(0), threading.Semaphore(0)

    def __call__(self, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        self.batches.append([list(row) for row in rows])
        self.started.release()
        assert self.go.acquire(timeout=10)
        if any(13 in row for row in rows):
            raise RuntimeError("unlucky")
        return [torch.full((len(row) + 1, 2), float(row[0])) for row in rows]


def test_prompts_that_wait_run_together() -> None:
    recorder, other = Recorder(), Recorder()
    batches = Batches({"a": recorder, "b": other}, max_rows=3)
    first = batches.submit("a", [1])
    assert recorder.started.acquire(timeout=10)
    waiting = [batches.submit(name, [number]) for number, name in enumerate("aabaaa", start=2)]
    for each in (recorder, other):
        for _ in range(9):
            each.go.release()
    found = [int(future.result(10)[0, 0]) for future in (first, *waiting)]
    assert found == [1, 2, 3, 4, 5, 6, 7]
    assert recorder.batches == [[[1]], [[2], [3], [5]], [[6], [7]]]
    assert other.batches == [[[4]]]
    batches.close()


def test_padding_bounds_a_batch() -> None:
    recorder = Recorder()
    batches = Batches({"a": recorder}, max_tokens=10)
    first = batches.submit("a", [1])
    assert recorder.started.acquire(timeout=10)
    waiting = [batches.submit("a", [number] * length) for number, length in ((2, 20), (3, 4), (4, 5), (5, 1))]
    for _ in range(9):
        recorder.go.release()
    assert [int(future.result(10)[0, 0]) for future in (first, *waiting)] == [1, 2, 3, 4, 5]
    assert [len(batch) for batch in recorder.batches] == [1, 1, 2, 1]
    batches.close()


def test_a_prompt_that_fails_fails_alone() -> None:
    recorder = Recorder()
    batches = Batches({"a": recorder})
    first = batches.submit("a", [1])
    assert recorder.started.acquire(timeout=10)
    waiting = [batches.submit("a", [number]) for number in (12, 13, 14)]
    for _ in range(9):
        recorder.go.release()
    assert [int(future.result(10)[0, 0]) for future in (first, waiting[0], waiting[2])] == [1, 12, 14]
    with pytest.raises(RuntimeError, match="unlucky"):
        waiting[1].result(10)
    batches.close()


def test_requests_that_are_cancelled_are_not_run() -> None:
    recorder = Recorder()
    batches = Batches({"a": recorder})

    async def ask() -> None:
        first = asyncio.ensure_future(batches.embed("a", [1]))
        await asyncio.get_running_loop().run_in_executor(None, recorder.started.acquire)
        waiting = [asyncio.ensure_future(batches.embed("a", [number])) for number in (2, 3)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        await asyncio.sleep(0)
        for _ in range(9):
            recorder.go.release()
        await asyncio.gather(first, waiting[1])

    asyncio.run(ask())
    assert recorder.batches == [[[1]], [[3]]]
    batches.close()


def test_a_closed_thread_takes_no_prompts() -> None:
    batches = Batches({})
    batches.close()
    with pytest.raises(RuntimeError, match="shutting down"):
        batches.submit("a", [1])


# Embeddings of clients


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ({"prompt": "What are prompt_embeds?"}, False),
        ({"prompt": "x", "prompt_embeds": None}, False),
        ({"prompt_embeds": "AA=="}, True),
        ({"messages": [{"role": "user", "content": [{"type": "prompt_embeds", "data": "AA=="}]}]}, True),
        ({"messages": [{"role": "user", "content": [{"prompt_embeds": "AA=="}]}]}, True),
        ({"messages": [], "tools": [{"function": {"parameters": {"prompt_embeds": {"type": "string"}}}}]}, False),
        ([{"prompt_embeds": "AA=="}], True),
    ],
)
def test_embeddings_are_found_where_servers_read_them(body: Any, found: bool) -> None:
    text = json.dumps(body)
    assert has_embeds(text.encode()) is found
    assert has_embeds(text.replace("prompt_", "\\u0070rompt_").encode()) is found


def test_what_is_no_json_is_left_to_the_server() -> None:
    assert not has_embeds(b"prompt_embeds {")
    assert not has_embeds(b'{"prompt_embeds": \xff')


def passed_on(chunks: list[bytes]) -> tuple[list[bytes], list[dict[str, Any]]]:
    """The bodies that the application behind the middleware reads, and what the client is sent."""
    bodies, sent = [], []
    messages = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
    messages += [{"type": "http.request", "body": b""}, {"type": "http.disconnect"}]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        bodies.append((await receive())["body"])
        assert (await receive())["type"] == "http.disconnect"

    async def receive() -> dict[str, Any]:
        return messages.pop(0)

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(RefuseEmbeds(app)({"type": "http", "method": "POST"}, receive, send))
    return bodies, sent


def test_bodies_in_pieces() -> None:
    assert passed_on([b'{"prompt": ', b'"x"}']) == ([b'{"prompt": "x"}'], [])
    bodies, sent = passed_on([b'{"prompt_', b'embeds": "AA=="}'])
    assert bodies == []
    assert [message.get("status") for message in sent] == [400, None]
    assert json.loads(sent[1]["body"])["error"]["param"] == "prompt_embeds"


# Prompts and outputs of the engine


@pytest.mark.parametrize("start", [0, 1, 3])
def test_a_prompt_of_the_engine_has_ids_at_tokens_and_embeddings_at_thoughts(start: int) -> None:
    ids, tokens, thoughts = [5, 6, 8], torch.randn(3, 4), torch.randn(2, 4)
    embedded = find_tokens(torch.cat([tokens[:start], thoughts, tokens[start:]]), tokens)
    assert embedded.is_token == [True] * start + [False] * 2 + [True] * (3 - start)
    prompt = with_thoughts(ids, embedded, "a", "own")
    assert torch.equal(prompt["prompt_embeds"], embedded.embeds)
    assert prompt["prompt_token_ids"] == [*ids[:start], 5, 5, *ids[start:]]
    assert prompt["prompt_is_token_ids"] == embedded.is_token
    salts = [with_thoughts(ids, embedded, *given)["cache_salt"] for given in (("a", "own"), ("b", "own"), ("a", None))]
    assert len(set(salts)) == 3


def test_a_run_stands_among_the_prompts_tokens() -> None:
    tokens = torch.randn(4, 4)
    embeds = tokens.clone()
    embeds[1:3] = torch.randn(2, 4)
    embedded = find_tokens(embeds, tokens)
    assert embedded.is_token == [True, False, False, True]
    assert with_thoughts([5, 2, 2, 6], embedded, "a")["prompt_token_ids"] == [5, 2, 2, 6]


def test_thoughts_that_are_embeddings_of_tokens_are_read_all_the_same() -> None:
    """A thought equal to the token in whose place it stands moves the border, but no vector."""
    tokens, ids = torch.randn(3, 4), [5, 6, 8]
    embeds = torch.cat([tokens[:1], tokens[1:2], torch.randn(1, 4), tokens[1:]])
    embedded = find_tokens(embeds, tokens)
    prompt = with_thoughts(ids, embedded, "a")
    table = dict(zip(ids, tokens, strict=True))
    read = [
        table[token] if is_token else row
        for token, is_token, row in zip(prompt["prompt_token_ids"], embedded.is_token, embeds, strict=True)
    ]
    assert torch.equal(torch.stack(read), embeds)


def test_embeddings_of_other_tokens_are_read_as_they_are() -> None:
    assert find_tokens(torch.randn(5, 4), torch.randn(3, 4)).is_token == [False] * 5


def test_outputs_speak_of_the_callers_prompt() -> None:
    output = SimpleNamespace(prompt_token_ids=[5, 5, 5, 6], num_cached_tokens=4)
    assert vars(without_thoughts(output, [5, 6])) == {"prompt_token_ids": [5, 6], "num_cached_tokens": 2}
    later = SimpleNamespace(prompt_token_ids=None, num_cached_tokens=None)
    assert vars(without_thoughts(later, [5, 6])) == {"prompt_token_ids": None, "num_cached_tokens": None}


def output_with(**logprobs: float) -> Any:
    found = {token: SimpleNamespace(logprob=value) for token, value in logprobs.items()}
    return SimpleNamespace(outputs=[SimpleNamespace(logprobs=[found])])


def test_engines_that_read_embeddings_otherwise_are_rejected() -> None:
    tokens = output_with(a=-0.5)
    check_outputs([tokens, output_with(a=-0.5001)], torch.float32)
    check_outputs([tokens, output_with(a=-0.55)], torch.bfloat16)
    for other, dtype in ((output_with(a=-0.55), torch.float32), (output_with(b=-0.5), torch.bfloat16)):
        with pytest.raises(ValueError, match="must compute the same from embeddings as from tokens"):
            check_outputs([tokens, other], dtype)
