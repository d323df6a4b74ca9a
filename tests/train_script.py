"""Trains an adapter on rows made by the test and writes what came out; run by `accelerate launch` or by itself.

The rows come in a fixed order, so that several processes together see in each step what one process sees.
"""

from __future__ import annotations

import gc
import json
import os
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, gather_object
from batches import collate
from helpers import is_whole
from peft import get_peft_model
from trainers import losses
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from softcot_peft import SoftCoTConfig


def allow_fsdp_on_cpu() -> None:
    """Let accelerate shard on CPU, which torch can: accelerate 1.15 does it on accelerators alone."""
    original = AcceleratorState.__init__

    def with_fsdp(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = with_fsdp


def share(items: list[Any], accelerator: Accelerator) -> list[Any]:
    """One process's part; all parts are of one length."""
    return items[accelerator.process_index :: accelerator.num_processes]


def answers(trainer: Trainer, prompt: list[int]) -> list[list[int]]:
    """Greedy tokens, and as many of them again as come before a token that ends this prompt's answer early."""
    ids = torch.tensor([prompt], device=trainer.accelerator.device)
    model, options = trainer.model.eval(), {"max_new_tokens": 8, "do_sample": False}
    options["synced_gpus"] = trainer.accelerator.num_processes > 1
    full = model.generate(input_ids=ids, **options)[0, len(prompt) :].tolist()
    # The shorter the prompt, the earlier: the processes end at different steps, and have to wait for each other.
    stop = full[min(len(prompt) // 8, len(full) - 1)]
    short = model.generate(input_ids=ids, eos_token_id=stop, **options)
    return [full, short[0, len(prompt) :].tolist()]


def make_trainer(
    data: dict[str, Any], output: Path, batch_size: int = 4, cuda: bool = False, **changes: Any
) -> Trainer:
    """A trainer of a fresh adapter.

    Args:
        data: The folders of base and assistant, the adapter's config, the rows, the number of steps.
        output: Folder of its checkpoints.
        batch_size: Rows per process.
        cuda: bf16 on GPUs, instead of float32 on CPUs.
        **changes: Other training arguments.
    """
    options: dict[str, Any] = {
        "output_dir": str(output),
        "max_steps": data["steps"],
        "per_device_train_batch_size": batch_size,
        "train_sampling_strategy": "sequential",
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": not cuda,
        "bf16": cuda,
        "ddp_backend": "gloo" if "LOCAL_RANK" in os.environ and not cuda else None,
        "disable_tqdm": True,
        "dataloader_pin_memory": cuda,
        "seed": 5,
    }
    arguments = TrainingArguments(**(options | changes))
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(data["base"])
    model = get_peft_model(base, SoftCoTConfig(**data["config"]))
    return Trainer(model, arguments, collate, train_dataset=data["rows"])


def main() -> None:
    """Train, save, generate; rank 0 writes `result.json` beside the adapter."""
    parser = ArgumentParser()
    parser.add_argument("data", type=Path, help="JSON of the folders, the rows and the prompts")
    parser.add_argument("output", type=Path)
    parser.add_argument("--batch-size", type=int, default=4, help="rows per process")
    parser.add_argument("--cuda", action="store_true", help="bf16 on GPUs, instead of float32 on CPUs")
    parser.add_argument("--options", type=json.loads, default={}, help="other training arguments")
    args = parser.parse_args()
    data = json.loads(args.data.read_text())
    if not args.cuda:
        allow_fsdp_on_cpu()
    trainer = make_trainer(data, args.output, args.batch_size, args.cuda, **args.options)
    model = trainer.model
    trainer.train()
    sharded = sum(not is_whole(weight) for weight in model.parameters())
    trainer.save_model(str(args.output / "adapter"))
    accelerator = trainer.accelerator
    continued = gather_object([answers(trainer, prompt) for prompt in share(data["prompts"], accelerator)])
    if accelerator.is_main_process:
        logs = [log for log in trainer.state.log_history if "loss" in log]
        result = {
            "losses": losses(trainer),
            "norms": [log["grad_norm"] for log in logs],
            "engine": str(accelerator.distributed_type),
            "processes": accelerator.num_processes,
            "sharded": sharded / len(list(model.parameters())),
            "continued": continued,
        }
        (args.output / "result.json").write_text(json.dumps(result))
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    main()
    gc.collect()  # frees the wrapped model: DDP's reducer may hang if its process group went first (torch 2.13)
    if dist.is_initialized():
        dist.destroy_process_group()
