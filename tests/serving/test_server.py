"""Adapters in vLLM's server: the tokens of `generate` in float32, over HTTP, however a request is put."""

from __future__ import annotations

import json
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
from served import BASE, LONG, NEW, PROMPTS, RUN_TEXT, Served, Server, message, skip_without_vllm

skip_without_vllm()

NAMES = ["first", "second", "shared", "chatting", BASE]
N = 4  # thoughts


def test_models_are_the_base_and_its_adapters(served: Served, server: Server) -> None:
    models = json.loads(server.get("/v1/models"))["data"]
    assert [model["id"] for model in models] == [BASE, *served.adapters]
    assert all(model["parent"] == BASE for model in models[1:])


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("chat", [False, True], ids=["completion", "chat"])
@pytest.mark.parametrize("name", NAMES)
def test_answers_are_those_of_generate(served: Served, server: Server, name: str, chat: bool, stream: bool) -> None:
    for prompt in PROMPTS:
        ids = served.ids(prompt, chat)
        answer = server.ask(name, prompt, chat, stream)
        assert answer["tokens"] == served.answer(name, ids)
        assert answer["model"] == name
        usage = answer["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(ids), len(answer["tokens"]))
        assert usage["total_tokens"] == len(ids) + len(answer["tokens"])
        assert usage.get("thought_tokens") == (None if name == BASE else N)


def test_every_adapter_and_the_base_answer_differently(served: Served, server: Server) -> None:
    answers = [server.ask(name, LONG)["tokens"] for name in NAMES]
    assert len({tuple(tokens) for tokens in answers}) == len(NAMES)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_thoughts_stand_at_a_run_in_the_prompt(served: Served, server: Server, stream: bool) -> None:
    prompt = f"How many legs{RUN_TEXT} have seven dogs?"
    answer = server.ask("run", prompt, stream=stream)
    assert answer["tokens"] == served.answer("run", served.ids(prompt))
    assert answer["usage"]["prompt_tokens"] == len(served.ids(prompt))
    assert answer["usage"]["thought_tokens"] == 0  # they are among the prompt's tokens


def test_chats_are_rendered_with_the_adapters_own_template(served: Served, server: Server) -> None:
    ids = served.ids(PROMPTS[0], chat=True, name="run")
    assert len(ids) == len(served.ids(PROMPTS[0], chat=True)) + N
    assert server.ask("run", PROMPTS[0], chat=True)["tokens"] == served.answer("run", ids)
    shorter = server.ask("run", PROMPTS[0], chat=True, chat_template_kwargs={"num_thought_tokens": 2})
    assert shorter["usage"]["prompt_tokens"] == len(ids) - 2


def test_several_prompts_and_ids_in_one_request(served: Served, server: Server) -> None:
    rows = [served.ids(prompt) for prompt in PROMPTS]
    for prompts in (PROMPTS, rows):
        body = {"model": "first", "prompt": prompts, "max_tokens": NEW, "temperature": 0, "return_token_ids": True}
        status, found = server.post("/v1/completions", body)
        assert status == 200
        assert [choice["token_ids"] for choice in found["choices"]] == [served.answer("first", row) for row in rows]
        assert [choice["prompt_token_ids"] for choice in found["choices"]] == [list(row) for row in rows]
        assert found["usage"]["prompt_tokens"] == sum(map(len, rows))
        assert found["usage"]["thought_tokens"] == N * len(rows)


def test_samples_stops_and_echoes(served: Served, server: Server) -> None:
    body = {"model": "first", "prompt": PROMPTS[0], "max_tokens": NEW, "temperature": 0}
    whole = server.ask("first", PROMPTS[0])["text"]
    _, found = server.post("/v1/completions", {**body, "n": 3, "temperature": 1.0, "seed": 1})
    assert len({choice["text"] for choice in found["choices"]}) == 3
    stop = whole[3]
    _, found = server.post("/v1/completions", {**body, "stop": [stop]})
    assert found["choices"][0]["text"] == whole[: whole.index(stop)]
    assert found["choices"][0]["finish_reason"] == "stop"
    _, found = server.post("/v1/completions", {**body, "echo": True})
    assert found["choices"][0]["text"] == PROMPTS[0] + whole


def test_log_probabilities_are_those_of_generate(served: Served, server: Server) -> None:
    import torch

    ids = served.ids(PROMPTS[0])
    model, row = served.model("first"), torch.tensor([ids])
    out = model.generate(
        input_ids=row,
        attention_mask=torch.ones_like(row),
        max_new_tokens=NEW,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    expected = [logits[0].log_softmax(-1).max().item() for logits in out.logits]
    body = {"model": "first", "prompt": PROMPTS[0], "max_tokens": NEW, "temperature": 0, "logprobs": 2}
    _, found = server.post("/v1/completions", body)
    assert found["choices"][0]["logprobs"]["token_logprobs"] == pytest.approx(expected, abs=1e-4)


def test_repetition_penalties_count_the_prompts_tokens_alone(served: Served, server: Server) -> None:
    import torch

    ids = served.ids(PROMPTS[0])
    row = torch.tensor([ids])
    out = served.model("first").generate(
        input_ids=row,
        attention_mask=torch.ones_like(row),
        max_new_tokens=NEW,
        do_sample=False,
        repetition_penalty=1.5,
    )
    tokens = server.ask("first", PROMPTS[0], repetition_penalty=1.5)["tokens"]
    assert tokens == out[0, len(ids) :].tolist()
    assert tokens != served.answer("first", ids)


def test_schemas_guide_answers(server: Server) -> None:
    schema = {"type": "object", "properties": {"legs": {"type": "integer"}}, "required": ["legs"]}
    body = {
        "model": "first",
        "messages": message(PROMPTS[1]),
        "max_tokens": 48,
        "temperature": 0,
        "response_format": {"type": "json_schema", "json_schema": {"name": "legs", "schema": schema}},
    }
    _, found = server.post("/v1/chat/completions", body)
    assert found["choices"][0]["message"]["content"].startswith("{")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_tools_are_called(served: Served, server: Server, stream: bool) -> None:
    tokenizer = served.pair.tokenizer
    spaces = [token for token in range(len(tokenizer)) if tokenizer.decode([token]).isspace()]
    legs = {"type": "object", "properties": {"legs": {"enum": [2, 4]}}, "required": ["legs"]}
    function = {"name": "count", "parameters": legs | {"additionalProperties": False}, "strict": True}
    body = {
        "model": "first",
        "messages": message(PROMPTS[1]),
        "max_tokens": 120,
        "temperature": 0,
        "logit_bias": dict.fromkeys(map(str, spaces), -100),  # JSON may have any number of them
        "tools": [{"type": "function", "function": function}],
        "tool_choice": {"type": "function", "function": {"name": "count"}},
    }
    if stream:
        arguments = ""
        with server.open("/v1/chat/completions", {**body, "stream": True}) as response:
            for line in response:
                if line.startswith(b"data: {"):
                    for choice in json.loads(line.removeprefix(b"data: "))["choices"]:
                        for call in choice["delta"].get("tool_calls") or []:
                            arguments += call["function"].get("arguments") or ""
    else:
        _, found = server.post("/v1/chat/completions", body)
        (call,) = found["choices"][0]["message"]["tool_calls"]
        assert call["function"]["name"] == "count"
        arguments = call["function"]["arguments"]
    assert json.loads(arguments)["legs"] in (2, 4)


def test_prompts_are_cut_before_thoughts_are_made(served: Served, server: Server) -> None:
    answer = server.ask("first", LONG, truncate_prompt_tokens=9)
    assert answer["tokens"] == served.answer("first", served.ids(LONG)[-9:])
    assert answer["usage"]["prompt_tokens"] == 9


@pytest.mark.parametrize("kind", ["server", "strained"])
def test_sixteen_clients_get_the_answers_of_their_own_adapters(
    served: Served, kind: str, request: pytest.FixtureRequest
) -> None:
    server = request.getfixturevalue(kind)
    draw = random.Random(0)
    asked = [(draw.choice(NAMES), draw.choice(PROMPTS), draw.random() < 0.5, draw.random() < 0.5) for _ in range(160)]
    with ThreadPoolExecutor(16) as clients:
        answers = list(clients.map(lambda each: server.ask(*each), asked))
    for (name, prompt, chat, _), answer in zip(asked, answers, strict=True):
        assert answer["tokens"] == served.answer(name, served.ids(prompt, chat)), (name, prompt, chat)


def test_requests_are_taken_out_and_come_back(served: Served, strained: Server) -> None:
    """Answers so long that their blocks do not fit: the engine drops some, and computes them again later."""
    new = 100
    with ThreadPoolExecutor(8) as clients:
        asked = [("first", PROMPTS[0]), ("second", PROMPTS[0]), (BASE, PROMPTS[0]), ("shared", PROMPTS[2])] * 2
        answers = list(clients.map(lambda each: strained.ask(*each, max_tokens=new), asked))
    for (name, prompt), answer in zip(asked, answers, strict=True):
        assert answer["tokens"] == served.answer(name, served.ids(prompt), new)
    assert strained.metric("vllm:num_preemptions_total") > 0


def test_adapters_share_no_cache_entries(served: Served, server: Server) -> None:
    def cached(name: str) -> int:
        answer = server.ask(name, prompt)
        assert answer["tokens"] == served.answer(name, served.ids(prompt))
        return (answer["usage"]["prompt_tokens_details"] or {}).get("cached_tokens") or 0

    prompt = f"Tom has dogs. {LONG}"
    assert [cached(name) for name in ("first", "second", BASE)] == [0, 0, 0]
    again = [cached(name) for name in ("first", "second", BASE)]
    assert min(again) >= 32
    assert max(again) <= len(served.ids(prompt))
