"""Two processes train what one trains on the same global batch, under every engine, and save a whole adapter."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from engines import ENGINES, Runs, check_same
from tiny_pair import Pair

needs_two_gpus = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="NCCL needs a CUDA device for each of the two processes"
)


@pytest.fixture(scope="module")
def runs(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(pair, tmp_path_factory.mktemp("runs"))


def needs(engine: str) -> None:
    if engine == "zero3" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed (on CPU: `DS_BUILD_OPS=0 pip install deepspeed`)")


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_two_processes_train_what_one_trains(runs: Runs, tmp_path: Path, engine: str) -> None:
    needs(engine)
    check_same(runs, engine, tmp_path / engine)


@needs_two_gpus
@pytest.mark.parametrize("engine", ENGINES)
def test_two_gpus_train_what_one_trains(runs: Runs, tmp_path: Path, engine: str) -> None:
    needs(engine)
    check_same(runs, engine, tmp_path / engine, cuda=True)
