r"""Create a tiny base and a tiny assistant from the text of GSM8K, to run `train_gsm8k.py` offline.

The two differ in family, size and tokenizer. The base learns the problems in the chat prompts of `train_gsm8k.py` and
the answers with their calculator annotations; SoftCoT then trains on answers without them. Both commands together take
about 7 minutes on one core (`OMP_NUM_THREADS=1`, which is faster than more threads on a busy machine):

    python examples/make_tiny_pair.py --train-file gsm8k/train.jsonl --out runs/pair
    python examples/train_gsm8k.py --base runs/pair/base --assistant runs/pair/assistant \
        --train-file gsm8k/train.jsonl --eval-file gsm8k/test.jsonl --output-dir runs/gsm8k \
        --max-steps 150 --learning-rate 3e-3 --eval-batch-size 64 --max-new-tokens 160

The loss decreases, and the saved adapter gives the same answers as the trained one. Models trained on a few hundred
thousand tokens cannot reason, so both accuracies are about 0 %, at chance level, and say nothing about SoftCoT.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from problems import encode_example, load_rows
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import trange
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    get_cosine_schedule_with_warmup,
    set_seed,
)

CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>\n{{ message['content'] }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)
BASE_TOKENS = ["<pad>", "<eos>", "<thought>", "<user>", "<assistant>", "<system>", "<end>"]
ASSISTANT_TOKENS = ["[pad]", "[eos]", "[unk]"]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Create a tiny base and a tiny assistant.")
    add = parser.add_argument
    add("--train-file", required=True, help="JSON Lines file of questions and answers")
    add("--out", required=True, type=Path, help="output folder, with subfolders 'base' and 'assistant'")
    add("--steps", type=int, default=200, help="pre-training steps of each model")
    add("--batch-size", type=int, default=8)
    add("--vocab-size", type=int, default=2048, help="vocabulary size of the base; the assistant has half of it")
    add("--seed", type=int, default=0)
    return parser.parse_args(argv)


def make_tokenizer(texts: list[str], vocab_size: int, tokens: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with single digits. The first two special tokens are pad and EOS."""
    bpe = Tokenizer(models.BPE())
    digits, bytes_ = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token=tokens[0], eos_token=tokens[1], extra_special_tokens=tokens[2:]
    )


def shape(tokenizer: PreTrainedTokenizerFast, width: int, layers: int) -> dict[str, Any]:
    """Return the fields shared by both configs. The MLP is 8/3 times as wide as the hidden states."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": width * 8 // 3,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
    }


def batches(rows: list[list[int]], size: int, seed: int) -> Iterator[list[torch.Tensor]]:
    """Yield endless batches of rows of similar length, in random order."""
    rows = sorted(rows, key=len)
    generator = random.Random(seed)
    while True:
        first = generator.randrange(max(1, len(rows) - size + 1))
        yield [torch.tensor(row) for row in rows[first : first + size]]


def pretrain(model: PreTrainedModel, rows: list[list[int]], args: argparse.Namespace, name: str) -> None:
    """Train on all tokens of the rows, including prompts."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, args.steps // 20, args.steps)
    stream = batches(rows, args.batch_size, args.seed)
    bar = trange(args.steps, desc=f"{name}, {model.num_parameters() / 1e6:.1f} M parameters", unit="step")
    for _ in bar:
        batch = next(stream)
        ids = pad_sequence(batch, batch_first=True, padding_value=model.config.pad_token_id)
        labels = pad_sequence(batch, batch_first=True, padding_value=-100)
        loss = model(input_ids=ids, attention_mask=(labels != -100).long(), labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.2f}", refresh=False)


def main(argv: list[str] | None = None) -> None:
    """Create, pre-train and save the pair."""
    args = parse_args(argv)
    set_seed(args.seed)
    problems = load_rows(args.train_file, "train")
    texts = [row["question"] + "\n" + row["answer"] for row in problems]

    tokenizer = make_tokenizer(texts, args.vocab_size, BASE_TOKENS)
    tokenizer.chat_template = CHAT_TEMPLATE
    base = LlamaForCausalLM(LlamaConfig(**shape(tokenizer, width=192, layers=4)))
    rows = [encode_example(tokenizer, row, keep_marks=True)["input_ids"] for row in problems]
    pretrain(base, rows, args, "base")
    base.save_pretrained(args.out / "base")
    tokenizer.save_pretrained(args.out / "base")

    tokenizer = make_tokenizer(texts, args.vocab_size // 2, ASSISTANT_TOKENS)
    tokenizer.unk_token = ASSISTANT_TOKENS[2]
    assistant = Qwen2ForCausalLM(Qwen2Config(**shape(tokenizer, width=96, layers=2)))
    eos = [tokenizer.eos_token_id]
    pretrain(assistant, [ids + eos for ids in tokenizer(texts)["input_ids"]], args, "assistant")
    assistant.save_pretrained(args.out / "assistant")
    tokenizer.save_pretrained(args.out / "assistant")


if __name__ == "__main__":
    main()
