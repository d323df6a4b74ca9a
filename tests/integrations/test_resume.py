"""Training that is killed, and goes on from its last whole checkpoint, ends on the weights it would have ended on."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from batches import labelled, same
from project_files import ROOT, load_example, load_script, process_environment
from safetensors.torch import load_file
from tiny_pair import QUESTIONS, Pair
from torch import Tensor

SCRIPT = ROOT / "tests" / "train_script.py"
STEPS = 6
# In the order in which `Trainer` writes them; what comes before the state may be there in part.
WRITTEN = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
OPTIONS = {  # everything that has to come back: moments, schedule, order of the rows
    "save_strategy": "steps",
    "save_steps": 1,
    "lr_scheduler_type": "linear",
    "train_sampling_strategy": "random",
}


def make_data(pair: Pair, steps: int) -> dict[str, Any]:
    prompts, responses = pair.rows(QUESTIONS), pair.rows([" Five.<eos>", " It has eight legs.<eos>"])
    rows = [(prompt, response) for prompt in prompts for response in responses]
    config = pair.config().to_dict()
    return {
        "base": str(pair.base),
        "config": {name: config[name] for name in ("task_type", "assistant_model_name_or_path", "num_thought_tokens")},
        "steps": steps,
        "prompts": [],
        "rows": labelled(*zip(*rows, strict=True)),
    }


class Training:
    """A whole training of some steps, with a checkpoint after each."""

    def __init__(self, pair: Pair, folder: Path) -> None:
        self.data, self.folder = make_data(pair, STEPS), folder
        self.script = load_script(SCRIPT, "train_script")
        self.last_whole_checkpoint = load_example("train_gsm8k").last_whole_checkpoint
        self.run(folder / "whole")
        self.weights = self.adapter(folder / "whole", STEPS)

    def run(self, output: Path, resume: str | bool | None = None) -> None:
        self.script.make_trainer(self.data, output, **OPTIONS).train(resume_from_checkpoint=resume)

    def adapter(self, output: Path, step: int) -> dict[str, Tensor]:
        return load_file(output / f"checkpoint-{step}" / "adapter_model.safetensors")

    def cut(self, output: Path, step: int, file: str) -> None:
        """Leave what is there when a process is killed halfway through a file of a step's checkpoint."""
        for number in range(1, step + 1):
            shutil.copytree(self.folder / "whole" / f"checkpoint-{number}", output / f"checkpoint-{number}")
        checkpoint = output / f"checkpoint-{step}"
        for later in WRITTEN[WRITTEN.index(file) + 1 :]:
            (checkpoint / later).unlink()
        content = (checkpoint / file).read_bytes()
        (checkpoint / file).write_bytes(content[: len(content) // 2])


@pytest.fixture(scope="module")
def training(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Training:
    return Training(pair, tmp_path_factory.mktemp("training"))


def test_the_state_is_what_the_trainer_writes_last(training: Training) -> None:
    folder = training.folder / "whole" / "checkpoint-3"
    written = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}  # clocks of file systems may tie
    assert all(written[file] <= written[later] for file, later in pairwise(WRITTEN))
    assert written[WRITTEN[-1]] == max(written.values())


def test_training_goes_on_from_the_last_checkpoint_bit_for_bit(training: Training, tmp_path: Path) -> None:
    shutil.copytree(training.folder / "whole" / "checkpoint-4", tmp_path / "checkpoint-4")
    training.run(tmp_path, resume=True)
    assert same(training.adapter(tmp_path, STEPS), training.weights)
    assert not same(training.adapter(training.folder / "whole", 4), training.weights)


@pytest.mark.parametrize("file", WRITTEN)
def test_a_half_checkpoint_is_passed_over(training: Training, tmp_path: Path, file: str) -> None:
    training.cut(tmp_path, 4, file)
    found = training.last_whole_checkpoint(tmp_path)
    assert Path(found).name == "checkpoint-3"
    training.run(tmp_path, resume=found)
    assert same(training.adapter(tmp_path, STEPS), training.weights)


@pytest.mark.parametrize("file", WRITTEN)
def test_the_trainer_alone_never_trains_on_from_a_half_checkpoint(
    training: Training, tmp_path: Path, file: str
) -> None:
    training.cut(tmp_path, 4, file)
    with pytest.raises(Exception):  # noqa: B017, PT011  # of safetensors, json or the file system, by the file
        training.run(tmp_path, resume=True)
    assert not (tmp_path / f"checkpoint-{STEPS}").exists()


def test_without_a_whole_checkpoint_resuming_is_refused(training: Training, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs a complete checkpoint in"):
        training.last_whole_checkpoint(tmp_path)
    training.cut(tmp_path, 1, "optimizer.pt")
    with pytest.raises(ValueError, match="needs a complete checkpoint in"):
        training.last_whole_checkpoint(tmp_path)


def test_training_killed_at_any_moment_ends_on_the_same_weights(pair: Pair, tmp_path: Path) -> None:
    steps, last = 30, random.SystemRandom().randint(2, 15)
    training = make_data(pair, steps)
    (tmp_path / "data.json").write_text(json.dumps(training))
    command = [sys.executable, str(SCRIPT), str(tmp_path / "data.json"), str(tmp_path), "--options"]
    environment = process_environment() | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, json.dumps(OPTIONS)], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        while not (tmp_path / f"checkpoint-{last}").exists():
            assert process.poll() is None
            time.sleep(0.001)
        time.sleep(random.SystemRandom().uniform(0, 0.05))  # about as long as writing it takes
    finally:
        process.kill()
        process.wait()
    assert not (tmp_path / f"checkpoint-{steps}").exists()
    script, find = load_script(SCRIPT, "train_script"), load_example("train_gsm8k").last_whole_checkpoint
    found = find(tmp_path)
    script.make_trainer(training, tmp_path, **OPTIONS).train(resume_from_checkpoint=found)
    options = OPTIONS | {"save_steps": steps}
    script.make_trainer(training, tmp_path / "whole", **options).train()
    killed, whole = (
        load_file(folder / f"checkpoint-{steps}" / "adapter_model.safetensors")
        for folder in (tmp_path, tmp_path / "whole")
    )
    assert same(killed, whole), f"after {found}"
