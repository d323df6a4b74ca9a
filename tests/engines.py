"""Runs `train_script.py` in one process or several, and compares what came out."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import labelled, responses_of
from helpers import PROJECTION
from peft import PeftModel
from project_files import process_environment
from safetensors.torch import load_file
from tiny_pair import ANSWERS, QUESTIONS, Pair

SCRIPT = Path(__file__).with_name("train_script.py")
STEPS, ROWS = 6, 4  # rows per step, over all processes
KEY = f"base_model.model.model.embed_tokens.{PROJECTION}"

FSDP2 = {
    "fsdp_version": 2,
    "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "fsdp_cpu_ram_efficient_loading": True,
    "fsdp_offload_params": False,
    "fsdp_reshard_after_forward": True,
    "fsdp_state_dict_type": "FULL_STATE_DICT",  # with SHARDED_STATE_DICT, `save_model` writes nothing
}
ZERO3 = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": False,
        "stage3_gather_16bit_weights_on_model_save": True,
        "stage3_param_persistence_threshold": 0,  # the tiny pair's weights would all stay whole
    },
}
ENGINES = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero3": "DEEPSPEED"}


def launch_config(engine: str, folder: Path) -> dict[str, Any]:
    """What `accelerate config` would write."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": ENGINES[engine],
        "machine_rank": 0,
        "main_process_ip": "127.0.0.1",
        "main_process_port": port,
        "num_machines": 1,
        "num_processes": 2,
        "use_cpu": False,  # would start one process; the environment says it
    }
    if engine == "fsdp2":
        config["fsdp_config"] = FSDP2
    if engine == "zero3":
        (folder / "zero3.json").write_text(json.dumps(ZERO3))
        config["deepspeed_config"] = {"deepspeed_config_file": str(folder / "zero3.json"), "zero3_init_flag": True}
    else:
        config["mixed_precision"] = "no"
    return config


def train(data: Path, folder: Path, engine: str | None = None, cuda: bool = False) -> dict[str, Any]:
    """Run the script in two processes, or without an engine in one; returns what it wrote."""
    folder.mkdir()
    environment = {name: value for name, value in process_environment().items() if not name.startswith("ACCELERATE_")}
    environment |= {
        "OMP_NUM_THREADS": "1",
        "HF_HOME": str(folder / "home"),  # where accelerate looks for a default config
    }
    if not cuda:
        environment["CUDA_VISIBLE_DEVICES"] = ""
        environment |= {"DS_ACCELERATOR": "cpu"} if engine == "zero3" else {"ACCELERATE_USE_CPU": "true"}
    command = [sys.executable]
    if engine is not None:
        (folder / "launch.json").write_text(json.dumps(launch_config(engine, folder)))
        command += ["-m", "accelerate.commands.launch", "--config_file", str(folder / "launch.json")]
    rows = ROWS if engine is None else ROWS // 2
    command += [str(SCRIPT), str(data), str(folder), "--batch-size", str(rows), *(["--cuda"] if cuda else [])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


class Runs:
    """The data, and what one process makes of it."""

    def __init__(self, pair: Pair, root: Path) -> None:
        self.pair, self.root = pair, root
        self.data = root / "data.json"
        prompts, responses, numbers = pair.rows(QUESTIONS), responses_of(pair, ANSWERS), range(STEPS * ROWS)
        rows = labelled(  # every prompt with every response; no two steps alike
            [prompts[index % 4] for index in numbers], [responses[(index + index // 4) % 4] for index in numbers]
        )
        config = pair.config().to_dict()
        names = ("task_type", "assistant_model_name_or_path", "num_thought_tokens", "init_weights")
        data = {
            "base": str(pair.base),
            "config": {name: config[name] for name in names},
            "steps": STEPS,
            "rows": rows,
            "prompts": prompts,
        }
        self.data.write_text(json.dumps(data))
        self.one = cache(self.one)

    def one(self, cuda: bool = False) -> tuple[dict[str, Any], Path]:
        folder = self.root / f"one-{'cuda' if cuda else 'cpu'}"
        return train(self.data, folder, cuda=cuda), folder / "adapter"


def check_same(runs: Runs, engine: str, folder: Path, cuda: bool = False) -> None:
    """Losses, gradient norms, answers and adapter of two processes are those of one."""
    tolerance = 2e-2 if cuda else 1e-4  # bf16 has 8 bits of mantissa, and sums in another order
    expected, expected_adapter = runs.one(cuda)
    found = train(runs.data, folder, engine, cuda)
    assert found["processes"] == 2
    assert expected["processes"] == 1
    assert (found["sharded"] > 0.9) == (engine != "ddp")
    assert len(found["losses"]) == STEPS
    assert found["losses"] == pytest.approx(expected["losses"], abs=tolerance)
    assert found["norms"] == pytest.approx(expected["norms"], abs=tolerance)
    weights, ones = (
        load_file(folder / "adapter" / "adapter_model.safetensors"),
        load_file(expected_adapter / "adapter_model.safetensors"),
    )
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == {
        f"{KEY}.weight": (32, 24),
        f"{KEY}.bias": (32,),
    }
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, ones[name], atol=tolerance, rtol=0)
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert (config["assistant_hidden_size"], config["base_hidden_size"]) == (24, 32)
    if not cuda:
        check_answers(runs, found, expected, folder / "adapter")


def check_answers(runs: Runs, found: dict[str, Any], expected: dict[str, Any], adapter: Path) -> None:
    """The processes, each with its own prompts, wrote what one wrote; so does the saved adapter, loaded in one."""
    prompts = runs.pair.rows(QUESTIONS)
    order = [*range(0, len(prompts), 2), *range(1, len(prompts), 2)]  # the first process's, then the second's
    assert found["continued"] == [expected["continued"][index] for index in order]
    assert len({len(short) for _, short in found["continued"]}) > 1  # the processes ended at different steps
    model = PeftModel.from_pretrained(runs.pair.load_base(), adapter)
    for prompt, (full, _) in zip(prompts, expected["continued"], strict=True):
        ids = model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=8, do_sample=False)
        assert ids[0, len(prompt) :].tolist() == full
