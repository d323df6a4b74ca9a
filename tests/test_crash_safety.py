"""Killed at any moment while saving, or out of disk space, an adapter's folder is the old adapter or the new one.

A process of its own saves one adapter over another, once per file operation of the save, and dies at that operation.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft.peft_model
import pytest
import safetensors.torch
import torch
import transformers.modeling_utils
from conftest import Pair
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import softcot_peft
from softcot_peft import SoftCoTConfig
from softcot_peft._saving import STAGED, install

EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
ROUTES = ("peft", "transformers")
NUMS = ((4, 8), (4, 4), (0, 4))  # adapters with different configs, with the same, and a folder with none
HOW = ("killed", "full")
SWALLOWED, RAISED, OTHERWISE = 1, 2, 3  # exit codes of a save that met a full disk
Save = Callable[[Path], None]


class Interruption:
    """Ends a save at the k-th operation on a folder's files.

    Args:
        folder: The folder; operations on other files are not counted.
        at: k, counted from 1.
        how: "killed": killed before it, or when the file it writes is there, but empty or half full; "full": the
            operation raises that the disk is full.
    """

    def __init__(self, folder: Path, at: int, how: str) -> None:
        self.folder, self.at, self.how, self.count = str(folder), at, how, 0
        sys.addaudithook(self.watch)
        self.serialize = safetensors.torch.serialize_file
        safetensors.torch.serialize_file = self.write_weights  # writes beyond the sight of audit hooks

    def watch(self, event: str, args: tuple[Any, ...]) -> None:
        if event not in EVENTS or not str(args[0]).startswith(self.folder):
            return
        writes = event == "open" and bool(args[2] & (os.O_WRONLY | os.O_RDWR))
        if event != "open" or writes:
            self.step(str(args[0]), b"" if writes else None)

    def write_weights(self, tensors: Any, path: Any, **kwargs: Any) -> None:
        """What safetensors before 0.8 does, which wrote in place."""
        self.step(str(path), safetensors.torch.serialize(tensors, **kwargs)[:100])
        self.serialize(tensors, path, **kwargs)

    def step(self, path: str, torn: bytes | None) -> None:
        self.count += 1
        if self.count != self.at:
            return
        if self.how == "full":
            raise OSError(errno.ENOSPC, "No space left on device", path)
        if torn is not None:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.write(descriptor, torn)
            os.close(descriptor)
        os.kill(os.getpid(), signal.SIGKILL)


def read(folder: Path) -> str:
    """What a folder's adapter is, or the error that loading it raises."""
    try:
        config = SoftCoTConfig.from_pretrained(str(folder))
    except ValueError as error:
        return str(error)
    weights = {key: value.tolist() for key, value in load_file(folder / WEIGHTS).items()}
    return f"{config.num_thought_tokens} {sorted(weights.items())}"


def interrupted(save: Save, folder: Path, at: int, how: str) -> int:
    """The exit status of a process that saves, and is interrupted at the k-th operation."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    interruption = Interruption(folder, at, how)
    try:
        save(folder)
    except (OSError, safetensors.SafetensorError):
        os._exit(RAISED)
    except BaseException:
        os._exit(OTHERWISE)
    os._exit(SWALLOWED if interruption.count >= at else 0)


def finish(folder: Path) -> Path:
    """A copy of a folder for which loading asks to move up what is staged, with that done."""
    finished = Path(shutil.copytree(folder, folder.with_name("finished"), dirs_exist_ok=True))
    for path in (finished / STAGED).iterdir():
        path.replace(finished / path.name)
    return finished


def sweep(old: Save, new: Save, folder: Path, how: str) -> dict[str, int]:
    """Save the new adapter over the old one, interrupted at each operation in turn; how often each outcome came."""
    reference = {}
    for name, save in (("old", old), ("new", new)):
        save(folder)
        reference[read(folder)] = name
        shutil.rmtree(folder)
    new(folder)
    files = {path.name for path in folder.iterdir()}
    counts = dict.fromkeys(
        ("old", "new", "marked", "half", "killed", "raised", "swallowed", "otherwise", "unclean"), 0
    )
    status, at = -1, 0
    while status != 0:
        at += 1
        shutil.rmtree(folder)
        old(folder)
        status = interrupted(new, folder, at, how)
        outcome = reference.get(read(folder), "half")
        if STAGED in str(read(folder)) and reference.get(read(finish(folder))) == "new":
            outcome = "marked"
        counts[outcome] += 1
        code = os.waitstatus_to_exitcode(status)
        if code:
            counts[{-signal.SIGKILL: "killed", RAISED: "raised", SWALLOWED: "swallowed"}.get(code, "otherwise")] += 1
        new(folder)  # the next save: as if nothing had happened
        counts["unclean"] += {path.name for path in folder.iterdir()} != files or reference.get(read(folder)) != "new"
    shutil.rmtree(folder)
    return counts


def saves(base: Path, assistant: Path, route: str, nums: tuple[int, int]) -> list[Save]:
    """Two ways of saving, of adapters that differ."""
    found: list[Save] = []
    for seed, num in enumerate(nums):
        if num == 0:
            found.append(lambda folder: folder.mkdir())
            continue
        torch.manual_seed(seed)
        config = SoftCoTConfig(
            task_type="CAUSAL_LM",
            assistant_model_name_or_path=str(assistant),
            num_thought_tokens=num,
            init_weights=False,
        )
        model: Any = AutoModelForCausalLM.from_pretrained(base)
        if route == "peft":
            model = PeftModel(model, config)
        else:
            model.add_adapter(config)
        found.append(lambda folder, model=model: model.save_pretrained(folder))
    return found


def main(base: str, assistant: str, folder: str) -> None:
    """Print the outcomes of every sweep, by route, kind of interruption and number of thoughts."""
    found = {}
    for route in ROUTES:
        for nums in NUMS:
            old, new = saves(Path(base), Path(assistant), route, nums)
            for how in HOW:
                found[f"{route} {nums} {how}"] = sweep(old, new, Path(folder), how)
    print(json.dumps(found))


@pytest.fixture(scope="module")
def swept(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    folder = tmp_path_factory.mktemp("swept") / "adapter"
    command = [sys.executable, __file__, str(pair.base), str(pair.assistant), str(folder)]
    environment = os.environ | {"PYTHONPATH": str(Path(softcot_peft.__file__).parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("nums", NUMS)
@pytest.mark.parametrize("route", ROUTES)
def test_a_killed_save_leaves_the_old_adapter_or_the_new_one(
    swept: dict[str, dict[str, int]], route: str, nums: tuple[int, int]
) -> None:
    counts = swept[f"{route} {nums} killed"]
    assert counts["half"] == counts["unclean"] == 0
    assert counts["old"] >= 5
    assert counts["new"] >= 1
    assert counts["killed"] == counts["old"] + counts["new"] + counts["marked"] - 1  # the last one ran to its end


@pytest.mark.parametrize("route", ROUTES)
def test_only_between_different_configs_a_save_has_to_be_finished(
    swept: dict[str, dict[str, int]], route: str
) -> None:
    assert swept[f"{route} {(4, 8)} killed"]["marked"] == 2  # before and after the weights are moved
    assert swept[f"{route} {(4, 4)} killed"]["marked"] == swept[f"{route} {(0, 4)} killed"]["marked"] == 0


@pytest.mark.parametrize("nums", NUMS)
@pytest.mark.parametrize("route", ROUTES)
def test_a_save_without_disk_space_raises_and_leaves_an_adapter_whole(
    swept: dict[str, dict[str, int]], route: str, nums: tuple[int, int]
) -> None:
    counts = swept[f"{route} {nums} full"]
    assert counts["half"] == counts["unclean"] == counts["otherwise"] == 0
    assert counts["raised"] >= 5
    assert counts["old"] >= 4


# The mark, and what is not SoftCoT's


@pytest.fixture
def marked(pair: Pair, tmp_path: Path) -> Path:
    """A folder whose adapter was being replaced by one with another config when the process was killed."""
    pair.model(num_thought_tokens=8).save_pretrained(tmp_path / STAGED)
    config = json.loads((tmp_path / STAGED / CONFIG).read_text(encoding="utf-8"))
    (tmp_path / CONFIG).write_text(json.dumps(config | {"interrupted_save": True}), encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    "load",
    [
        lambda pair, folder: PeftModel.from_pretrained(pair.load_base(), folder),
        lambda pair, folder: pair.model().load_adapter(str(folder), adapter_name="other"),
        lambda pair, folder: pair.load_base().load_adapter(str(folder)),
        lambda pair, folder: AutoPeftModelForCausalLM.from_pretrained(folder),
        lambda pair, folder: AutoModelForCausalLM.from_pretrained(folder),
    ],
    ids=["PeftModel.from_pretrained", "PeftModel.load_adapter", "load_adapter", "AutoPeft", "Auto"],
)
def test_every_route_refuses_a_save_that_has_to_be_finished(
    pair: Pair, marked: Path, load: Callable[[Pair, Path], Any]
) -> None:
    with pytest.raises(ValueError, match=r"`adapter_config.json` must be.*killed.*Move the files.*\.softcot-staged"):
        load(pair, marked)


def test_the_next_save_finishes_the_one_before_it_fails(
    pair: Pair, marked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    model = pair.model(num_thought_tokens=2)
    monkeypatch.setattr(safetensors.torch, "serialize_file", fail)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(marked)
    assert SoftCoTConfig.from_pretrained(str(marked)).num_thought_tokens == 8
    assert (marked / WEIGHTS).exists()
    assert not (marked / STAGED).exists()


def test_a_config_saved_alone_replaces_the_config_alone(pair: Pair, tmp_path: Path) -> None:
    pair.model().save_pretrained(tmp_path)
    before = (tmp_path / WEIGHTS).read_bytes()
    pair.config(num_thought_tokens=2).save_pretrained(str(tmp_path))
    assert SoftCoTConfig.from_pretrained(str(tmp_path)).num_thought_tokens == 2
    assert (tmp_path / WEIGHTS).read_bytes() == before
    assert not (tmp_path / STAGED).exists()


def test_adapters_of_other_methods_and_models_are_saved_as_ever(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []
    serialize = safetensors.torch.serialize_file

    def watch(tensors: Any, path: Any, **kwargs: Any) -> None:
        written.append(Path(path))
        serialize(tensors, path, **kwargs)

    monkeypatch.setattr(safetensors.torch, "serialize_file", watch)
    get_peft_model(pair.load_base(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])).save_pretrained(
        tmp_path / "lora"
    )
    pair.load_base().save_pretrained(tmp_path / "base")
    pair.model().save_pretrained(tmp_path / "softcot")
    assert written == [
        tmp_path / "lora" / WEIGHTS,
        tmp_path / "base" / "model.safetensors",
        tmp_path / "softcot" / STAGED / WEIGHTS,
    ]


def test_installing_again_changes_nothing() -> None:
    before = peft.peft_model.safe_save_file, transformers.modeling_utils.safe_save_file
    install()
    assert (peft.peft_model.safe_save_file, transformers.modeling_utils.safe_save_file) == before


if __name__ == "__main__":
    main(*sys.argv[1:])
