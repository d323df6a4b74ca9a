"""The systems of jobs: built, trained weights saved and loaded, and the rows that they are trained on."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from baselines import Baseline
from results.store import Store
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, set_seed

from softcot_peft.analysis import mean_thoughts

from . import data, probing, tasks
from .jobs import PAIRS, Evaluation, Training, Writing
from .systems import (
    Models,
    RealAssistCoT,
    RealCotUnk,
    RealLora,
    RealPlaceholders,
    RealPromptTuning,
    RealSoftCoT,
    RealZeroShot,
    softcot,
    unused_token,
)

SEEN = 64  # training questions whose states and thoughts are averaged


@dataclass(frozen=True)
class Setting:
    """Where the models, data and results are.

    Args:
        models: Folder or Hub id by size.
        folder: Of the store.
        data_dir: Folder of the data sets' files, or None for the Hub.
        writings: The jobs that write rationales, by base.
        dtype: Of the models.
        max_new_tokens: Of an answer.
        batch: Answers generated at once.
        code: State of the code, kept with each result.
    """

    models: dict[str, str]
    folder: Path
    data_dir: str | None
    writings: dict[str, tuple[Writing, ...]]
    dtype: str = "bfloat16"
    max_new_tokens: int = 320
    batch: int = 16
    code: str = field(default="", compare=False)

    def pair(self, name: str) -> Models:
        """Return the models of a pair."""
        base, assistant = (self.models[size] for size in PAIRS[name])
        return Models(base, assistant, self.dtype, self.max_new_tokens, self.batch)


def code_state(files: Sequence[Path]) -> str:
    """Return a short hash of files, without the libraries' versions."""
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def examples(task: str, rows: Sequence[tasks.Row], system: Baseline) -> list[dict[str, Any]]:
    """Return rows with their rendered prompt and response."""
    return [
        {
            **row,
            "prompt": tasks.rendered(system.tokenizer, tasks.question_text(task, row)),
            "response": row["solution"],
        }
        for row in rows
    ]


def blinded(rows: Sequence[tasks.Row], system: Baseline) -> list[dict[str, Any]]:
    """Return GSM8K rows whose prompts have a number in place of the question."""
    numbered = [row | {"question": f"Problem {number}"} for number, row in enumerate(rows)]
    return examples("gsm8k", numbered, system)


def seen(system: Baseline, setting: Setting) -> list[dict[str, Any]]:
    """Return the training questions whose states and thoughts are averaged."""
    return examples("gsm8k", data.split("gsm8k", "training", setting.data_dir)[:SEEN], system)


def training_rows(job: Training, setting: Setting) -> list[tasks.Row]:
    """Return the training rows of a kind of rationales.

    Raises:
        ValueError: The base has written too few rationales.
    """
    rows = data.split("gsm8k", "training", setting.data_dir)
    if job.rationales == "human":
        return rows[: job.steps * job.batch]
    store, base = Store(setting.folder), PAIRS[job.pair][0]
    own = {kept["question"]: kept["text"] for each in setting.writings[base] for kept in store[each]["kept"]}
    chosen = [row for row in rows if row["question"] in own][: job.steps * job.batch]
    if len(chosen) < job.batch:
        raise ValueError(
            f"`rationales` must be 'human' for the {base} model, which wrote {len(own)} right answers, fewer than a "
            f"batch of {job.batch}. Set 'human', or let it answer more questions."
        )
    return [row | {"solution": own[row["question"]]} for row in chosen] if job.rationales == "own" else chosen


def build(job: Training, setting: Setting, marked: bool = False) -> Baseline:
    """Create an untrained system, with weights drawn from the seed."""
    set_seed(job.seed)
    models = setting.pair(job.pair)
    if job.system == "SoftCoT":
        system = softcot(models, job, marked)
        if job.standardized:
            probing.standardize(system, system.rows(seen(system, setting)))
        return system
    if job.system == "LoRA":
        return RealLora(models)
    kind = {"prompt tuning": RealPromptTuning, "placeholders": RealPlaceholders}[job.system]
    return kind(models, job.thoughts)


def weights_file(job: Training, setting: Setting) -> Path:
    """Return the file of the trained weights; its folder also has the adapter, for systems of PEFT."""
    return Store(setting.folder).path(job).with_suffix("") / "trained.safetensors"


def keep(system: Baseline, path: Path) -> None:
    """Save the trained weights; a folder is renamed when it is complete."""
    half = path.parent.with_name(path.parent.name + ".half")
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir(parents=True)
    trained = {name: value.detach() for name, value in system.model.named_parameters() if value.requires_grad}
    save_file(trained, half / path.name)
    if isinstance(system, RealSoftCoT):
        system.model.save_pretrained(str(half / "adapter"))
    shutil.rmtree(path.parent, ignore_errors=True)
    os.replace(half, path.parent)


def load(job: Training, setting: Setting, marked: bool = False) -> Baseline:
    """Create a system with its trained weights."""
    system = build(job, setting, marked)
    saved = load_file(weights_file(job, setting))
    parameters = {name: value for name, value in system.model.named_parameters() if value.requires_grad}
    with torch.no_grad():
        for name in saved | parameters:
            parameters[name].copy_(saved[name])
    return system


def system_of(job: Evaluation, setting: Setting) -> Baseline:
    """Create the system of an evaluation."""
    models = setting.pair(job.pair)
    if job.training is not None:
        return load(job.training, setting)
    if job.system == "Assist-CoT":
        return RealAssistCoT(models)
    if job.system == "CoT-Unk":
        return RealCotUnk(models, placeholder=unused_token(AutoTokenizer.from_pretrained(models.base)))
    return RealZeroShot(models)


def average(system: RealSoftCoT, prompts: Sequence[str]) -> torch.Tensor:
    """Return the mean thoughts of prompts, with as many as the system has at inference."""
    special = system.tokenizer.chat_template is None
    left = {"padding_side": "left", "add_special_tokens": special}
    return mean_thoughts(system.model, system.tokenizer, list(prompts), batch_size=16, **left)
