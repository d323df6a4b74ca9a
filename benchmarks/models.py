"""Pairs of models with random weights and the batches they read: what all rivals share. Nothing is timed here.

Time and memory do not depend on the weights' values, so that nothing has to be downloaded.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from softcot_peft import SoftCoTConfig, use_assistant

from .sizes import Case, Size

PAD, EOS, UNK, FIRST = 0, 1, 2, 3  # FIRST: the first id that stands for a word
SPECIAL = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
IGNORED = -100
M = TypeVar("M", bound=nn.Module)


@dataclass
class Pair:
    """A frozen base and a frozen assistant that reads the base's ids.

    Args:
        base: Llama; rivals get twins of it, since hooks and LoRA change the module they are attached to.
        assistant: Llama, shared by all rivals.
    """

    base: PreTrainedModel
    assistant: PreTrainedModel

    @property
    def device(self) -> torch.device:
        """Where both are."""
        return self.base.device


def make_pair(size: Size, device: str) -> Pair:
    """Both models with random weights.

    Args:
        size: Their shapes.
        device: Where they are made.
    """
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
    """A model of its own modules around the same weights."""
    shared = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def make_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer with a word for every id: the assistant is given ids, and refuses those that it does not know."""
    words = {str(number): number for number in range(FIRST, vocabulary)}
    words |= {SPECIAL["pad_token"]: PAD, SPECIAL["eos_token"]: EOS, SPECIAL["unk_token"]: UNK}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words)), **SPECIAL)


def config_of(assistant: str, num_thoughts: int, **fields: Any) -> SoftCoTConfig:
    """The adapter's config.

    Args:
        assistant: Its folder or name.
        num_thoughts: N.
        **fields: Further fields.
    """
    return SoftCoTConfig(
        task_type="CAUSAL_LM",
        assistant_model_name_or_path=assistant,
        assistant_shares_tokenizer=True,
        num_thought_tokens=num_thoughts,
        **fields,
    )


def attach(pair: Pair, num_thoughts: int, **fields: Any) -> PeftModel:
    """SoftCoT as its users attach it, in eval mode, on a twin of the base.

    Args:
        pair: The models.
        num_thoughts: N.
        **fields: Further fields of [`SoftCoTConfig`].
    """
    name = use_assistant(pair.assistant, make_tokenizer(pair.assistant.config.vocab_size), name="benchmark")
    torch.manual_seed(0)  # the same projection every time
    return get_peft_model(twin(pair.base), config_of(name, num_thoughts, **fields)).eval()


def projection_of(model: PeftModel) -> nn.Linear:
    """The adapter's projection as a layer of its own, with the same values."""
    state = {name.rpartition(".")[2]: tensor for name, tensor in get_peft_model_state_dict(model).items()}
    weight = state["weight"]
    layer = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device, dtype=weight.dtype)
    layer.load_state_dict(state)
    return layer


def lengths(longest: int, rows: int, ragged: bool) -> list[int]:
    """Tokens of each row: all the longest, or from the longest down to half of it in even steps."""
    if not ragged or rows == 1:
        return [longest] * rows
    return [longest - round(row * (longest - longest // 2) / (rows - 1)) for row in range(rows)]


@dataclass
class Batch:
    """A training batch, laid out beforehand as each rival wants it, so that none pays for that.

    Args:
        prompts: Ids of each prompt.
        responses: Ids of each response.
        num_thoughts: N.
        device: Where the tensors go.
    """

    prompts: list[Tensor]
    responses: list[Tensor]
    num_thoughts: int
    device: torch.device

    def __post_init__(self) -> None:
        pairs = list(zip(self.prompts, self.responses, strict=True))
        filler = torch.full((self.num_thoughts,), UNK)
        silent = torch.full((self.num_thoughts,), IGNORED)
        # What a data collator hands to a model: ids, mask and labels, each (B, P + R), right-padded.
        self.rows = {
            "input_ids": self._pad([torch.cat(pair) for pair in pairs], PAD),
            "attention_mask": self._pad([torch.ones(len(p) + len(r), dtype=torch.long) for p, r in pairs], 0),
            "labels": self._pad([torch.cat([torch.full_like(p, IGNORED), r]) for p, r in pairs], IGNORED),
        }
        # The same with N places for thoughts after each prompt, each (B, P + N + R).
        self.placed_ids = self._pad([torch.cat([p, filler, r]) for p, r in pairs], PAD)
        self.placed_mask = self._pad([torch.ones(len(p) + len(filler) + len(r)) for p, r in pairs], 0).long()
        self.placed_labels = self._pad(
            [torch.cat([torch.full_like(p, IGNORED), silent, r]) for p, r in pairs], IGNORED
        )
        thoughts = [torch.cat([p * 0, filler * 0 + 1, r * 0]) for p, r in pairs]
        self.is_thought = self._pad(thoughts, 0).bool()
        # Prompts (B, P) that end in the last column, what the assistant reads (B, P + N), and the responses (B, R).
        self.prompt = self._pad(self.prompts, PAD, "left")
        self.prompt_mask = self._pad([torch.ones_like(p) for p in self.prompts], 0, "left")
        self.assistant_ids = torch.cat([self.prompt, filler.to(self.device).expand(len(pairs), -1)], 1)
        self.assistant_mask = torch.cat([self.prompt_mask, self.prompt_mask.new_ones(len(pairs), len(filler))], 1)
        self.response = self._pad(self.responses, PAD)
        self.response_labels = self._pad(self.responses, IGNORED)

    def _pad(self, rows: list[Tensor], value: int, side: str = "right") -> Tensor:
        return pad_sequence(rows, True, value, side).to(self.device)


def make_batch(case: Case, vocabulary: int, device: torch.device) -> Batch:
    """Random ids in the shape of a case.

    Args:
        case: The shape.
        vocabulary: Ids that the models know.
        device: Where the tensors go.
    """
    generator = torch.Generator().manual_seed(0)
    prompts, responses = (
        [
            torch.randint(FIRST, vocabulary, (length,), generator=generator)
            for length in lengths(longest, case.batch, case.ragged)
        ]
        for longest in (case.prompt, case.response)
    )
    # the longest prompt with the shortest response, as far as lengths differ
    return Batch(prompts, responses[::-1], case.thoughts, device)
