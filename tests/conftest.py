"""A tiny pair with different tokenizers, vocabularies and sizes, made from configs; the network is off."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import importlib
import logging
import re
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import peft
import pytest
import torch
import transformers
from hypothesis import settings
from packaging.version import Version
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
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
    PreTrainedTokenizerFast,
)
from transformers.integrations import peft as bare_adapters

from softcot_peft import SoftCoTConfig

torch.set_num_threads(1)  # the workers of pytest-xdist are the parallelism

# The normal run draws the same cases every time; `make fuzz` draws new ones and says how to draw a failure again.
settings.register_profile("stable", derandomize=True, deadline=None)
settings.register_profile("fuzz", max_examples=2000, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "stable"))

EXAMPLES = Path(__file__).parents[1] / "examples"
DATA = Path(os.environ.get("SOFTCOT_DATA", Path(__file__).parents[2] / "shared" / "data"))
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="no data beside the project, nor in SOFTCOT_DATA")
QUESTIONS = [
    "Tom has three apples and buys nine more. How many apples has he now?",
    "How many legs have seven dogs?",
    "A train runs for two hours at sixty miles an hour, then stops. How far did it go?",
    "What is nine less four?",
]
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


def load_example(name: str) -> ModuleType:
    """A script of examples/, which is no package; one imports another by its name, as when it is run."""
    if str(EXAMPLES) not in sys.path:
        sys.path.append(str(EXAMPLES))
    return importlib.import_module(name)


def next_logits(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of the token after each row of a batch, `(B, V)`."""
    with torch.no_grad():
        return model(**batch, logits_to_keep=1).logits[:, -1]


class OldNamesAreErrors(logging.Handler):
    """transformers 5.24 logs the use of caches' old name, where filters of warnings do not see it."""

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "past_key_values" in message and "deprecated" in message:
            raise AssertionError(message)


logging.getLogger("transformers").addHandler(OldNamesAreErrors(logging.WARNING))


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


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    root = tmp_path_factory.mktemp("pair")
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


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many random cases the tests of test_properties.py checked to their end."""
    reports = terminalreporter.getreports("passed")
    cases = sum(value for report in reports for name, value in report.user_properties if name == "cases")
    if cases:
        terminalreporter.write_line(f"{cases} random cases checked")


@pytest.fixture(autouse=True)
def _skip_refused_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip at the calls on bare models for which transformers 5.24 wants a newer PEFT than is released."""
    wanted = bare_adapters.MIN_PEFT_VERSION
    if Version(peft.__version__) < Version(wanted):
        reason = (
            f"transformers {transformers.__version__} wants PEFT {wanted} for adapters of bare models, any method's"
        )
        monkeypatch.setattr(bare_adapters, "check_peft_version", lambda **_: pytest.skip(reason))


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    connect: Callable[..., object] = socket.socket.connect

    def refuse(self: socket.socket, address: object) -> object:
        if self.family == socket.AF_UNIX or (isinstance(address, tuple) and address[0] in ("127.0.0.1", "::1")):
            return connect(self, address)
        raise RuntimeError(f"a test reached for the network: {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
