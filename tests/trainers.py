"""Trainers of adapters on the tiny pair."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_pair import Pair
from transformers import Trainer

from softcot_peft import SoftCoTConfig

# Four rows a step on the CPU, no files, no reports
SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "seed": 5,
}


def sft(pair: Pair, folder: Path, config: SoftCoTConfig, data: Any, tokenizer: Any = None, **changes: Any) -> Any:
    """TRL's trainer of a fresh adapter, for two steps."""
    import trl

    torch.manual_seed(0)
    settings = SETTINGS | {"output_dir": str(folder), "max_steps": 2, "learning_rate": 6e-2, "bf16": False} | changes
    return trl.SFTTrainer(
        model=pair.load_base(),
        peft_config=config,
        processing_class=tokenizer or pair.tokenizer,
        args=trl.SFTConfig(**settings),
        train_dataset=data,
        eval_dataset=data,
    )


def losses(trainer: Trainer) -> list[float]:
    """The losses that a trainer logged."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
