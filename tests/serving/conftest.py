"""A tiny pair that vLLM runs on CPUs, its adapters, and servers in processes of their own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from served import Served, Server, make_served


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return make_served(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def server(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Prefix caching and batches as vLLM has them by default."""
    options = ["--enable-prompt-tokens-details", "--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    with Server(served, tmp_path_factory.mktemp("server") / "log", options) as server:
        yield server


@pytest.fixture(scope="session")
def strained(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """No prefix caching, prompts in chunks, and too few blocks for all requests at once."""
    options = ["--no-enable-prefix-caching", "--max-num-batched-tokens", "48", "--num-gpu-blocks-override", "14"]
    with Server(served, tmp_path_factory.mktemp("strained") / "log", options) as server:
        yield server
