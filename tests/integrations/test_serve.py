"""`transformers serve`: a folder with a base and its adapter answers as `generate` does, over HTTP on this machine."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import pytest
import torch
from batches import up_to_eos
from oracle import Oracle
from project_files import process_environment
from tiny_pair import QUESTIONS, Pair

NEW = 6
COMMAND = "import softcot_peft; from transformers.cli.transformers import main; main()"  # as in docs/serving.md


@pytest.fixture(scope="module")
def adapter(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter's folder, with the tokenizer beside it."""
    folder = tmp_path_factory.mktemp("adapter")
    pair.model().save_pretrained(folder)
    pair.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def served(pair: Pair, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the base, and those of the adapter."""
    folder = tmp_path_factory.mktemp("served")
    for source in (pair.base, adapter):
        shutil.copytree(source, folder, dirs_exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def oracle(pair: Pair) -> Oracle:
    return Oracle.of(pair.model(), pair.base, pair.assistant, 4)


def test_its_loader_takes_a_folder_with_base_and_adapter(pair: Pair, served: Path, oracle: Oracle) -> None:
    manager = pytest.importorskip("transformers.cli.serving.model_manager").ModelManager(device="cpu")
    model, tokenizer = manager.load_model_and_processor(manager.process_model_name(str(served)))
    try:
        batch = tokenizer(QUESTIONS[:1], return_tensors="pt")
        with torch.no_grad():
            output = model.generate(**batch, max_new_tokens=NEW, do_sample=False)
        expected = oracle.generate(pair.rows(QUESTIONS[:1])[0], NEW)
        assert up_to_eos(output[:, batch["input_ids"].shape[1] :].tolist()) == [expected]
    finally:
        manager.shutdown()


def test_its_loader_does_not_take_an_adapter_alone(adapter: Path) -> None:
    """Of no method: it reads the config of a model from the folder."""
    manager = pytest.importorskip("transformers.cli.serving.model_manager").ModelManager(device="cpu")
    with pytest.raises((OSError, ValueError)):
        manager.load_model_and_processor(manager.process_model_name(str(adapter)))


# Over HTTP


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def serving(folder: Path, log: Path, *options: str) -> Iterator[str]:
    """A server in a process of its own; its address."""
    for module in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(
            module, reason=f"`transformers serve` needs {module} (`pip install transformers[serving]`)"
        )
    port = free_port()
    command = [sys.executable, "-c", COMMAND, "serve", str(folder), "--host", "127.0.0.1", "--port", str(port)]
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [*command, "--device", "cpu", *options], env=process_environment(), stdout=file, stderr=subprocess.STDOUT
        )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            if process.poll() is not None:
                break
            try:
                urlopen(f"{address}/health")
                break
            except URLError:
                time.sleep(0.2)
        assert process.poll() is None, log.read_text(encoding="utf-8")
        yield address
    finally:
        process.terminate()
        process.wait(30)


def post(address: str, path: str, **body: Any) -> str:
    data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
    with urlopen(Request(address + path, data, headers)) as answer:
        text: str = answer.read().decode()
    return text


def chat(text: str) -> str:
    return f"<|user|>{text}<|end|><|assistant|>"


def test_it_answers_as_generate_does(pair: Pair, served: Path, oracle: Oracle, tmp_path: Path) -> None:
    def expected(prompt: str) -> str:
        (row,) = pair.rows([prompt])
        return str(pair.tokenizer.decode(oracle.generate(row, NEW), skip_special_tokens=True))

    with serving(served, tmp_path / "log") as address:
        for question in QUESTIONS:
            body = {"model": str(served), "max_tokens": NEW, "temperature": 0.0}
            answer = json.loads(post(address, "/v1/completions", prompt=question, **body))
            assert answer["choices"][0]["text"] == expected(question)
            assert answer["usage"]["prompt_tokens"] == len(pair.rows([question])[0])  # without thoughts
            messages = [{"role": "user", "content": question}]
            answer = json.loads(post(address, "/v1/chat/completions", messages=messages, **body))
            assert answer["choices"][0]["message"]["content"] == expected(chat(question))
            lines = post(address, "/v1/chat/completions", messages=messages, stream=True, **body).splitlines()
            chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
            parts = [choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"]]
            assert "".join(parts) == expected(chat(question))


def test_continuous_batching_is_refused(served: Path, tmp_path: Path) -> None:
    with serving(served, tmp_path / "log", "--continuous-batching") as address:
        body = {"model": str(served), "max_tokens": 2}
        with pytest.raises(HTTPError, match="500"):
            post(address, "/v1/completions", prompt=QUESTIONS[0], **body)
    assert "must not be called with an active SoftCoT adapter: continuous batching" in (tmp_path / "log").read_text()
