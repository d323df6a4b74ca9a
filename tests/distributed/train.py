"""Trains an adapter on rows made by the test and writes what came out; run by `accelerate launch` or by itself.

The rows come in a fixed order, so that several processes together see in each step what one process sees.
"""

from __future__ import annotations

import json
import os
import sys
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from peft import get_peft_model
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from softcot_peft import SoftCoTConfig

FILLS = {"input_ids": 0, "attention_mask": 0, "labels": -100}


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Pad ids, mask and labels on the right."""
    rows = [row | {"attention_mask": [1] * len(row["input_ids"])} for row in rows]
    return {
        name: pad_sequence([torch.tensor(row[name]) for row in rows], batch_first=True, padding_value=fill)
        for name, fill in FILLS.items()
    }


def allow_fsdp_on_cpu() -> None:
    """Let accelerate shard on CPU, which torch can: accelerate 1.15 does it on accelerators alone."""
    original = AcceleratorState.__init__

    def with_fsdp(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = with_fsdp


def main() -> None:
    """Train, save, generate; rank 0 writes `result.json` beside the adapter."""
    parser = ArgumentParser()
    parser.add_argument("data", type=Path, help="JSON of the folders, the rows and the prompts")
    parser.add_argument("output", type=Path)
    parser.add_argument("--batch-size", type=int, default=4, help="rows per process")
    parser.add_argument("--cuda", action="store_true", help="bf16 on GPUs, instead of float32 on CPUs")
    args = parser.parse_args()
    data = json.loads(args.data.read_text())
    if not args.cuda:
        allow_fsdp_on_cpu()
    options = TrainingArguments(
        output_dir=str(args.output),
        max_steps=data["steps"],
        per_device_train_batch_size=args.batch_size,
        train_sampling_strategy="sequential",
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=not args.cuda,
        bf16=args.cuda,
        ddp_backend="gloo" if "LOCAL_RANK" in os.environ and not args.cuda else None,
        disable_tqdm=True,
        dataloader_pin_memory=args.cuda,
        seed=5,
    )
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(data["base"])
    model = get_peft_model(base, SoftCoTConfig(**data["config"]))
    trainer = Trainer(model, options, collate, train_dataset=data["rows"])
    trainer.train()
    trainer.save_model(str(args.output / "adapter"))
    accelerator = trainer.accelerator
    if accelerator.is_main_process:
        logs = [log for log in trainer.state.log_history if "loss" in log]
        result = {
            "losses": [log["loss"] for log in logs],
            "norms": [log["grad_norm"] for log in logs],
            "engine": str(accelerator.distributed_type),
            "processes": accelerator.num_processes,
            "sharded": sorted({type(weight).__name__ for weight in trainer.model_wrapped.parameters()}),
        }
        (args.output / "result.json").write_text(json.dumps(result))
    accelerator.end_training()


if __name__ == "__main__":
    sys.exit(main())
