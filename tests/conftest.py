"""What every test runs under: the network off, new random numbers, the tiny pair of tiny_pair.py."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import logging
import socket
import time
from collections.abc import Callable

import last_run
import peft
import pytest
import torch
import transformers
from helpers import forget_given
from hypothesis import settings
from oracle import Oracle
from packaging.version import Version
from peft import PeftModel
from tiny_pair import Pair, make_pair
from transformers.integrations import peft as bare_adapters

BEGAN = time.time()
torch.set_num_threads(1)  # the workers of pytest-xdist are the parallelism

# The normal run draws the same cases every time; `make fuzz` draws new ones and says how to draw a failure again.
settings.register_profile("stable", derandomize=True, deadline=None)
settings.register_profile("fuzz", max_examples=2000, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "stable"))


class OldNamesAreErrors(logging.Handler):
    """transformers 5.24 logs the use of caches' old name, where filters of warnings do not see it."""

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "past_key_values" in message and "deprecated" in message:
            raise AssertionError(message)


logging.getLogger("transformers").addHandler(OldNamesAreErrors(logging.WARNING))


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def model(pair: Pair) -> PeftModel:
    """Automatic placement of 4 thoughts, an assistant with another tokenizer; a test may change it."""
    return pair.model(thought_token="<thought>")


@pytest.fixture
def oracle(pair: Pair, model: PeftModel) -> Oracle:
    """What `model` must do."""
    return Oracle.of(model, pair.base, pair.assistant, 4)


@pytest.fixture
def nothing_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names given in one test are unknown in the next."""
    forget_given(monkeypatch)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--last-run", metavar="TARGET", help="write the result into this row of docs/support.md")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say how many random cases the tests of test_properties.py checked to their end."""
    reports = terminalreporter.getreports("passed")
    cases = sum(value for report in reports for name, value in report.user_properties if name == "cases")
    if cases:
        terminalreporter.write_line(f"{cases} random cases checked")
    target = config.getoption("--last-run")
    if target and not hasattr(config, "workerinput"):  # xdist's workers know their own tests alone
        last_run.write(terminalreporter, target, BEGAN, cases)


@pytest.fixture(autouse=True)
def _skip_refused_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip at the calls on bare models for which transformers 5.24 wants a newer PEFT than is released."""
    wanted = bare_adapters.MIN_PEFT_VERSION
    if Version(peft.__version__) < Version(wanted):
        reason = (
            f"transformers {transformers.__version__} wants PEFT {wanted} for adapters of bare models, any method's"
        )
        monkeypatch.setattr(bare_adapters, "check_peft_version", lambda **_: pytest.skip(reason))


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    connect: Callable[..., object] = socket.socket.connect

    def refuse(self: socket.socket, address: object) -> object:
        if self.family == socket.AF_UNIX or (isinstance(address, tuple) and address[0] in ("127.0.0.1", "::1")):
            return connect(self, address)
        raise RuntimeError(f"a test reached for the network: {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
