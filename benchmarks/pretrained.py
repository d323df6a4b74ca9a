"""A pretrained pair, and the rows of GSM8K that it is measured on, as `examples/train_gsm8k.py` loads them."""

from __future__ import annotations

from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import problems
import torch
import train_gsm8k
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from evaluation import data

from .sizes import Size

Row = tuple[Tensor, Tensor]  # ids of the prompt, and of the response with EOS
RANDOM, ALIKE, RESPONSES = "rows in random order", "rows of like length", "rows with responses of like length"
READ = ("assistant_prompt", "assistant_prefix", "assistant_prompt_between")


@dataclass(frozen=True)
class Reading:
    """What an assistant with another tokenizer reads of a prompt. Independent of the package.

    Args:
        tokenizer: The base's tokenizer.
        assistant_tokenizer: The assistant's, with a chat template.
        fields: Fields of the adapter's config that say what the assistant reads.
    """

    tokenizer: PreTrainedTokenizerBase
    assistant_tokenizer: PreTrainedTokenizerBase
    fields: dict[str, Any]

    @property
    def thought_id(self) -> int:
        """Id at the assistant's thought positions."""
        own = self.assistant_tokenizer
        return next(each for each in (own.unk_token_id, own.eos_token_id, own.pad_token_id) if each is not None)

    def ids(self, prompts: Sequence[Tensor], num_thoughts: int) -> list[Tensor]:
        """Return the assistant's ids for each prompt of the base, without thought tokens."""
        template, prefix, (before, after) = (self.fields[name] for name in READ)
        found = []
        for prompt in prompts:
            text = self.tokenizer.decode(prompt, clean_up_tokenization_spaces=False)
            question = text.partition(before)[2].partition(after)[0]
            turn = {"role": "user", "content": template.format(prompt=question, num_thought_tokens=num_thoughts)}
            chat = self.assistant_tokenizer.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)
            ids = self.assistant_tokenizer(
                chat + prefix.format(num_thought_tokens=num_thoughts), add_special_tokens=False
            ).input_ids
            found.append(torch.tensor(ids, device=prompt.device))
        return found


def script_args(size: Size, folder: Path | None, data_dir: str | None = None) -> Namespace:
    """Return the options of `examples/train_gsm8k.py` for a size.

    Args:
        size: A size with pretrained models.
        folder: Folder with a subfolder for each model, named as on the Hub, in lower case and without "-Instruct";
            `None`: the Hub.
        data_dir: Folder with `gsm8k/train.jsonl`; `None`: the Hub.
    """
    options = ["--num-thoughts", str(size.case.thoughts), "--bf16" if size.dtype == "bfloat16" else "--no-bf16"]
    options += ["--no-own-rationales"]
    for role, name in (("--base", str(size.base)), ("--assistant", str(size.assistant))):
        local = name.rpartition("/")[2].lower().removesuffix("-instruct")
        options += [role, name if folder is None else str(folder / local)]
    if data_dir is not None:
        options += ["--train-file", str(data.local_file(data_dir, "gsm8k", "train.jsonl"))]
    return train_gsm8k.parse_args(options)


def load(size: Size, device: str, folder: Path | None) -> tuple[PreTrainedModel, PreTrainedModel, Reading]:
    """Load a pair, frozen, and how its assistant reads prompts."""
    args = script_args(size, folder)
    config = train_gsm8k.make_config(args)
    tokenizer = train_gsm8k.load_tokenizer(args, config)
    base = train_gsm8k.load_base(args, tokenizer)
    base.generation_config.eos_token_id = tokenizer.eos_token_id  # the one that ends answers of given lengths
    assistant = AutoModelForCausalLM.from_pretrained(args.assistant, dtype=base.dtype)
    own = AutoTokenizer.from_pretrained(args.assistant)
    fields = {name: getattr(config, name) for name in READ} | {"assistant_shares_tokenizer": False}
    frozen = (model.to(device).eval().requires_grad_(False) for model in (base, assistant))
    return *frozen, Reading(tokenizer, own, fields)


def load_rows(tokenizer: PreTrainedTokenizerBase, args: Namespace) -> list[Row]:
    """Load and encode the training rows, in a random order that is always the same."""
    rows = []
    for row in train_gsm8k.encode_rows("training", problems.load_rows(args.train_file, "train"), tokenizer, args):
        start = row["labels"].count(-100)
        rows.append(torch.tensor(row["input_ids"]).tensor_split([start]))
    return Random(0).sample(rows, len(rows))


def batches(rows: Sequence[Row], size: int) -> dict[str, list[Sequence[Row]]]:
    """Divide rows in random order into batches: as they come, by length, and by that of their responses."""
    orders = {
        RANDOM: rows,
        ALIKE: sorted(rows, key=lambda row: len(row[0]) + len(row[1])),
        RESPONSES: sorted(rows, key=lambda row: len(row[1])),
    }
    return {
        name: [order[start : start + size] for start in range(0, len(order) - size + 1, size)]
        for name, order in orders.items()
    }


def columns(batch: Sequence[Row], num_thoughts: int) -> tuple[int, int]:
    """Return the columns per row of both passes, as the package divides rows.

    All rows are divided where their own response begins, or where the first one does if that is cheaper.
    """
    prompts, responses = ([len(ids) for ids in part] for part in zip(*batch, strict=True))
    earliest, length = min(prompts), max(map(sum, zip(prompts, responses, strict=True)))
    own, shared = (max(prompts), max(responses)), (earliest, length - earliest)
    first, second = own if own[0] + 4 * own[1] <= shared[0] + 4 * shared[1] else shared
    return first, num_thoughts + second


def typical(batches: Sequence[Sequence[Row]]) -> Sequence[Row]:
    """Return the batch with the median number of columns."""
    return sorted(batches, key=lambda batch: sum(columns(batch, 0)))[len(batches) // 2]


def padding(batches: Sequence[Sequence[Row]], num_thoughts: int) -> dict[str, float]:
    """Return the columns per row of both passes, and the shares of padding, and of prompts in the second pass."""
    total: Counter[str] = Counter()
    for batch in batches:
        first, second = columns(batch, num_thoughts)
        prompts, responses = (sum(map(len, part)) for part in zip(*batch, strict=True))
        early = sum(min(len(prompt), first) for prompt, _ in batch)
        total["first"] += first * len(batch)
        total["second"] += second * len(batch)
        total["first_empty"] += first * len(batch) - early
        total["second_prompts"] += prompts - early
        total["second_empty"] += second * len(batch) - (prompts - early + responses + num_thoughts * len(batch))
    rows = sum(map(len, batches))
    return {
        "first_columns": total["first"] / rows,
        "first_padding": total["first_empty"] / total["first"],
        "second_columns": total["second"] / rows,
        "second_padding": total["second_empty"] / total["second"],
        "second_prompts": total["second_prompts"] / total["second"],
    }
