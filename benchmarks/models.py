"""Pairs of models, and their batches, shared by all methods. Nothing is timed here.

Time and memory do not depend on the weights' values. So weights are random, except in the size that measures a
pretrained pair on rows of a data set.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from softcot_peft import SoftCoTConfig, use_assistant

from .pretrained import Reading, load
from .sizes import Case, Size

PAD, EOS, UNK, FIRST = 0, 1, 2, 3  # FIRST: the first id of a word
SPECIAL = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
IGNORED = -100
M = TypeVar("M", bound=nn.Module)


@dataclass
class Pair:
    """A frozen base and a frozen assistant.

    Args:
        base: The base. Each method gets a twin, because hooks and LoRA modify the module they are attached to.
        assistant: The assistant, shared by all methods.
        reading: How the assistant reads prompts; `None`: it reads the base's ids.
    """

    base: PreTrainedModel
    assistant: PreTrainedModel
    reading: Reading | None = None

    @property
    def device(self) -> torch.device:
        """Device of both models."""
        return self.base.device

    @property
    def eos(self) -> int:
        """Id that ends an answer."""
        return int(self.base.generation_config.eos_token_id)


def make_pair(size: Size, device: str, folder: Path | None = None) -> Pair:
    """Create both models with random weights, or load them.

    Args:
        size: Shapes or names of the models.
        device: Device of the models.
        folder: Folder of pretrained models; `None`: the Hub.
    """
    if size.pretrained:
        return Pair(*load(size, device, folder))
    torch.manual_seed(0)
    models = []
    for fields in (size.base, size.assistant):
        config = LlamaConfig(
            vocab_size=size.vocabulary,
            max_position_embeddings=4096,
            pad_token_id=PAD,
            bos_token_id=None,
            eos_token_id=EOS,
            **fields,
        )
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, size.dtype))
        models.append(model.eval().requires_grad_(False))
    return Pair(*models)


def twin(model: M) -> M:
    """Copy a model's modules, sharing the weights."""
    shared = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def as_loaded(model: M) -> M:
    """As `twin`, with weights that are not frozen, as those of a base that was loaded to generate.

    PyTorch multiplies a slice of the hidden states differently with a frozen head, much slower on CPUs.
    """
    weights = {id(weight): nn.Parameter(weight.data) for weight in model.parameters()}
    return copy.deepcopy(model, weights | {id(buffer): buffer for buffer in model.buffers()})


def make_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Create a tokenizer with a word for every id; the assistant reads ids, and rejects unknown ones."""
    words = {str(number): number for number in range(FIRST, vocabulary)}
    words |= {SPECIAL["pad_token"]: PAD, SPECIAL["eos_token"]: EOS, SPECIAL["unk_token"]: UNK}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words)), **SPECIAL)


def config_of(assistant: str, num_thoughts: int, **fields: Any) -> SoftCoTConfig:
    """Create the adapter's config.

    Args:
        assistant: Folder or name of the assistant.
        num_thoughts: N.
        **fields: Other fields.
    """
    return SoftCoTConfig(
        task_type="CAUSAL_LM",
        assistant_model_name_or_path=assistant,
        num_thought_tokens=num_thoughts,
        **{"assistant_shares_tokenizer": True, **fields},
    )


def attach(pair: Pair, num_thoughts: int, **fields: Any) -> PeftModel:
    """Attach SoftCoT to a twin of the base, in eval mode.

    Args:
        pair: The models.
        num_thoughts: N.
        **fields: Other fields of [`SoftCoTConfig`].
    """
    if pair.reading is None:
        tokenizer = make_tokenizer(pair.assistant.config.vocab_size)
    else:
        tokenizer, fields = pair.reading.assistant_tokenizer, pair.reading.fields | fields
    name = use_assistant(pair.assistant, tokenizer, name="benchmark")
    torch.manual_seed(0)  # always the same projection
    return get_peft_model(twin(pair.base), config_of(name, num_thoughts, **fields)).eval()


def projection_of(model: PeftModel) -> nn.Linear:
    """Return a copy of the adapter's projection as a linear layer."""
    state = {name.rpartition(".")[2]: tensor for name, tensor in get_peft_model_state_dict(model).items()}
    weight = state["weight"]
    layer = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device, dtype=weight.dtype)
    layer.load_state_dict(state)
    return layer


def assistant_input(
    reading: Reading | None, prompts: list[Tensor], num_thoughts: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return what the assistant reads, left-padded and with N thought tokens at the end, and its mask: `(B, P' + N)`.

    Args:
        reading: How the assistant reads prompts; `None`: it reads the base's ids.
        prompts: Ids of each prompt.
        num_thoughts: N.
        device: Device of the tensors.
    """
    texts, token = (prompts, UNK) if reading is None else (reading.ids(prompts, num_thoughts), reading.thought_id)
    rows = [torch.cat([ids, ids.new_full((num_thoughts,), token)]) for ids in texts]
    padded = (
        pad_sequence(rows, True, PAD, "left"),
        pad_sequence([torch.ones_like(row) for row in rows], True, 0, "left"),
    )
    return padded[0].to(device), padded[1].to(device)


def lengths(longest: int, rows: int, ragged: bool) -> list[int]:
    """Return the lengths of the rows: all equal, or decreasing evenly from the longest to half of it."""
    if not ragged or rows == 1:
        return [longest] * rows
    return [longest - round(row * (longest - longest // 2) / (rows - 1)) for row in range(rows)]


@dataclass
class Batch:
    """A training batch, prepared in the layout of each method, so that preparation is not timed.

    Args:
        prompts: Ids of each prompt.
        responses: Ids of each response.
        num_thoughts: N.
        device: Device of the tensors.
        reading: How the assistant reads prompts; `None`: it reads the base's ids.
    """

    prompts: list[Tensor]
    responses: list[Tensor]
    num_thoughts: int
    device: torch.device
    reading: Reading | None = None

    def __post_init__(self) -> None:
        pairs = list(zip(self.prompts, self.responses, strict=True))
        filler = torch.full((self.num_thoughts,), UNK)
        silent = torch.full((self.num_thoughts,), IGNORED)
        # The output of a data collator: ids, mask and labels, each (B, P + R), right-padded.
        self.rows = {
            "input_ids": self._pad([torch.cat(pair) for pair in pairs], PAD),
            "attention_mask": self._pad([torch.ones(len(p) + len(r), dtype=torch.long) for p, r in pairs], 0),
            "labels": self._pad([torch.cat([torch.full_like(p, IGNORED), r]) for p, r in pairs], IGNORED),
        }
        # The same with N thought positions after each prompt, each (B, P + N + R).
        self.placed_ids = self._pad([torch.cat([p, filler, r]) for p, r in pairs], PAD)
        self.placed_mask = self._pad([torch.ones(len(p) + len(filler) + len(r)) for p, r in pairs], 0).long()
        self.placed_labels = self._pad(
            [torch.cat([torch.full_like(p, IGNORED), silent, r]) for p, r in pairs], IGNORED
        )
        thoughts = [torch.cat([p * 0, filler * 0 + 1, r * 0]) for p, r in pairs]
        self.is_thought = self._pad(thoughts, 0).bool()
        # Left-padded prompts (B, P), the assistant's input (B, P' + N), and the responses (B, R).
        self.prompt = self._pad(self.prompts, PAD, "left")
        self.prompt_mask = self._pad([torch.ones_like(p) for p in self.prompts], 0, "left")
        self.assistant_ids, self.assistant_mask = assistant_input(
            self.reading, self.prompts, self.num_thoughts, self.device
        )
        self.response = self._pad(self.responses, PAD)
        self.response_labels = self._pad(self.responses, IGNORED)

    def _pad(self, rows: list[Tensor], value: int, side: str = "right") -> Tensor:
        return pad_sequence(rows, True, value, side).to(self.device)


def make_batch(case: Case, vocabulary: int, device: torch.device) -> Batch:
    """Create random ids in the shape of a case.

    Args:
        case: The shape.
        vocabulary: Size of the models' vocabulary.
        device: Device of the tensors.
    """
    generator = torch.Generator().manual_seed(0)
    prompts, responses = (
        [
            torch.randint(FIRST, vocabulary, (length,), generator=generator)
            for length in lengths(longest, case.batch, case.ragged)
        ]
        for longest in (case.prompt, case.response)
    )
    # if lengths differ, the longest prompt has the shortest response
    return Batch(prompts, responses[::-1], case.thoughts, device)
