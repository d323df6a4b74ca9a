"""Uses an installed softcot-peft as a newcomer would: `use_release.py VERSION`, away from the checkout and offline.

Makes two tiny models in the current folder, trains an adapter for one step, saves it, and loads it in another process,
which must generate the same tokens. Imports nothing of the tests.
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

import softcot_peft

PROMPT, RESPONSE = "a farmer has twelve hens and buys more how many are there", "forty six"
WORDS = ["[PAD]", "[EOS]", "[UNK]", *sorted({*PROMPT.split(), *RESPONSE.split()})]


def make_model(folder: str, width: int) -> None:
    """Save a tiny model and its tokenizer."""
    vocabulary = models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]")
    tokenizer = Tokenizer(vocabulary)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", eos_token="[EOS]").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(width)
    LlamaForCausalLM(config).save_pretrained(folder)


def train() -> Any:
    """Attach an adapter to the base, train it for one step, and save it."""
    tokenizer = AutoTokenizer.from_pretrained("base")
    config = softcot_peft.SoftCoTConfig(
        task_type="CAUSAL_LM", assistant_model_name_or_path="assistant", num_thought_tokens=4
    )
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained("base"), config)
    prompt, response = tokenizer(PROMPT)["input_ids"], tokenizer(RESPONSE)["input_ids"]
    rows = [{"input_ids": prompt + response, "labels": [-100] * len(prompt) + response}]
    before = {name: value.clone() for name, value in model.named_parameters()}
    arguments = TrainingArguments("run", max_steps=1, learning_rate=0.1, report_to=[], use_cpu=True, disable_tqdm=True)
    Trainer(model, arguments, train_dataset=rows).train()
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert moved, "nothing was trained"
    assert all("softcot" in name for name in moved), moved
    model.save_pretrained("adapter")
    return model


def generate(model: Any) -> list[int]:
    """Return the tokens that a model generates after the prompt."""
    batch = AutoTokenizer.from_pretrained("base")(PROMPT, return_tensors="pt")
    batch.pop("token_type_ids", None)
    tokens = model.eval().generate(**batch, max_new_tokens=8, do_sample=False)
    return [int(token) for token in tokens[0, batch["input_ids"].shape[1] :]]


def main(version: str) -> None:
    """Train and save here, then load and generate in another process."""
    assert importlib.metadata.version("softcot-peft") == softcot_peft.__version__ == version
    assert Path(sys.prefix) in Path(softcot_peft.__file__).parents, softcot_peft.__file__
    make_model("base", 32)
    make_model("assistant", 16)
    tokens = generate(train())
    command = [sys.executable, "-I", __file__, "load"]
    loaded = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
    assert loaded == tokens, (loaded, tokens)
    print(f"softcot-peft {version}: trained, saved, loaded in another process and generated {len(tokens)} tokens")


if __name__ == "__main__":
    if sys.argv[1] == "load":
        print(json.dumps(generate(peft.AutoPeftModelForCausalLM.from_pretrained("adapter"))))
    else:
        main(sys.argv[1])
