"""A tiny pair with different tokenizers, vocabularies and sizes, made from configs."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from softcot_peft import SoftCoTConfig

QUESTIONS = [
    "Tom has three apples and buys nine more. How many apples has he now?",
    "How many legs have seven dogs?",
    "A train runs for two hours at sixty miles an hour, then stops. How far did it go?",
    "What is nine less four?",
]
ANSWERS = [" Twelve.", " They have twenty eight legs.", " One hundred and twenty miles.", " Five."]
RUN = {"thought_token": "<thought>", "placement": "thought_token"}  # what a config has for prompts with a run
BASE_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ASSISTANT_TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def make_base_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with a chat template, as Llama and Qwen have."""
    special = ["<pad>", "<eos>", "<thought>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(QUESTIONS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        extra_special_tokens=special[2:],
        chat_template=BASE_TEMPLATE,
        padding_side="left",
    )


def make_assistant_tokenizer(chat: bool = False) -> PreTrainedTokenizerFast:
    """Lower-casing WordPiece that puts [BOS] first: as unlike the base's as tokenizers get."""
    # Written down, since the library's trainer breaks ties between pieces by chance.
    words = sorted(set(re.findall(r"[a-z]+", " ".join(QUESTIONS).lower())))
    letters = sorted({letter for word in words for letter in word})
    marks = ["[UNK]", "[PAD]", "[BOS]", "[EOS]", *"?,."]
    ends = sorted({part for word in words for part in (word[:2], f"##{word[-2:]}")})
    parts = [*letters, *(f"##{letter}" for letter in letters), *words, *ends]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys([*marks, *parts]))}
    tokenizer = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(single="[BOS] $A", special_tokens=[("[BOS]", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        bos_token="[BOS]",
        eos_token="[EOS]",
        chat_template=ASSISTANT_TEMPLATE if chat else None,
    )


def with_template(tokenizer: PreTrainedTokenizerBase, template: str | None) -> PreTrainedTokenizerBase:
    """A copy of a tokenizer with another chat template."""
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def make_base(vocab_size: int, **changes: object) -> LlamaForCausalLM:
    """Two Llama layers of width 32 with large weights, so that greedy tokens depend on everything before them."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.4,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        **changes,
    )
    return LlamaForCausalLM(config)


def make_assistant(vocab_size: int) -> Olmo2ForCausalLM:
    """Two Olmo2 layers of width 24; a type whose tokenizer transformers loads as it was saved."""
    config = Olmo2Config(
        vocab_size=vocab_size,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        initializer_range=0.4,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=3,
    )
    return Olmo2ForCausalLM(config)


@dataclass
class Pair:
    """Folders of a base, an assistant, a chatting assistant and an assistant that shares the base's tokenizer."""

    base: Path
    assistant: Path
    chat_assistant: Path
    twin: Path
    tokenizer: PreTrainedTokenizerFast

    def load_base(self) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(self.base).eval()

    def config(self, **changes: object) -> SoftCoTConfig:
        """A config with few thoughts and a projection large enough to change tokens."""
        defaults: dict[str, object] = {
            "task_type": "CAUSAL_LM",
            "assistant_model_name_or_path": str(self.assistant),
            "num_thought_tokens": 4,
            "init_weights": False,
        }
        return SoftCoTConfig(**(defaults | changes))  # type: ignore[arg-type]

    def model(self, **changes: object) -> PeftModel:
        torch.manual_seed(0)
        return get_peft_model(self.load_base(), self.config(**changes)).eval()

    def batch(self, texts: list[str], side: str = "left") -> dict[str, torch.Tensor]:
        """Prompts as a batch."""
        return dict(self.tokenizer(texts, return_tensors="pt", padding=True, padding_side=side))

    def rows(self, texts: list[str]) -> list[list[int]]:
        """Prompts as lists of ids, unpadded."""
        return list(self.tokenizer(texts)["input_ids"])


def make_pair(root: Path) -> Pair:
    """The pair in new folders below a root."""
    torch.manual_seed(0)
    tokenizer = make_base_tokenizer()
    make_base(len(tokenizer)).save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    for name, chat in (("assistant", False), ("chat_assistant", True)):
        own = make_assistant_tokenizer(chat)
        make_assistant(len(own)).save_pretrained(root / name)
        own.save_pretrained(root / name)
    twin = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_embd=20,
            n_layer=2,
            n_head=2,
            n_positions=256,
            initializer_range=0.4,
            bos_token_id=1,
            eos_token_id=1,
        )
    )
    twin.save_pretrained(root / "twin")
    tokenizer.save_pretrained(root / "twin")
    return Pair(
        root / "base",
        root / "assistant",
        root / "chat_assistant",
        root / "twin",
        AutoTokenizer.from_pretrained(root / "base"),
    )
