"""The thought source of the paper (arXiv 2502.12134): a frozen assistant LM whose hidden states are projected."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..config import SoftCoTConfig
from ..config_checks import READ_AS_TEXT
from .chains import chain_token_ids, contrastive_loss, trained_embeddings
from .find_assistant import find_assistant
from .fingerprint import fingerprint, tensor_digest
from .frozen_lm import FrozenLM
from .inputs import BaseLM, Prompts
from .match_scale import match_scale
from .projections import check_whole, make_projection, project
from .prompt_reader import PromptReader
from .source import ThoughtSource, register_source
from .tokenizers import assistant_thought_token_id


@register_source("assistant")
class AssistantSource(ThoughtSource):
    """Reads prompts with a frozen assistant LM: `t = Assistant([prompt; thought token x N])`, `s = W t + b`.

    Args:
        config: The adapter's config, which names the assistant and the projection.
        base: The base LM.

    Raises:
        ValueError: The assistant, the tokenizers and the base do not match.
    """

    def __init__(self, config: SoftCoTConfig, base: BaseLM) -> None:
        name = str(config.assistant_model_name_or_path)
        assistant = find_assistant(name, config.assistant_revision, config.assistant_dtype)
        trained = (
            config.assistant_hidden_size or assistant.hidden_size,
            config.base_hidden_size or base.hidden_size,
        )
        if trained != (assistant.hidden_size, base.hidden_size):
            raise ValueError(_size_mismatch(*trained, assistant.hidden_size, base.hidden_size))
        super().__init__(config, base)
        self.assistant = assistant
        self.reader = self._make_reader(assistant)
        self.projection = make_projection(config, assistant.hidden_size, base.hidden_size)
        self.num_chains = config.num_chains
        self.chain_token_ids = chain_token_ids(config, assistant)
        self.chains: nn.Embedding | None = None  # the trained embedding of each chain
        if self.chain_token_ids is not None and config.chain_init != "fixed":
            device = next(base.model.get_input_embeddings().parameters()).device
            self.chains = trained_embeddings(config, assistant, self.chain_token_ids, device)
            self.learns_to_read = True
        match_scale(self)

    @classmethod
    def _needs_tokenizer(cls, config: SoftCoTConfig) -> bool:
        return config.assistant_shares_tokenizer is not True or super()._needs_tokenizer(config)

    def _make_reader(self, assistant: FrozenLM) -> PromptReader:
        config, tokenizer = self.config, self.base_tokenizer
        vocabulary = {} if tokenizer is None else tokenizer.get_vocab()
        shares = config.assistant_shares_tokenizer
        if shares is None:
            shares = (
                not any(getattr(config, name) for name in READ_AS_TEXT)
                and vocabulary == assistant.tokenizer.get_vocab()
            )
        largest = max((found for token, found in vocabulary.items() if token != config.thought_token), default=-1)
        if config.assistant_shares_tokenizer and largest >= assistant.vocabulary:
            raise ValueError(
                f"`assistant_shares_tokenizer` must not be True: the base's tokenizer has {largest + 1} ids and the "
                f"assistant {assistant.vocabulary}. Set it to False, so that prompts are decoded and encoded again."
            )
        thought = assistant_thought_token_id(config, assistant)
        reader = PromptReader(config, assistant, None if shares else tokenizer, thought)
        reader.check_chat_template()
        return reader

    @property
    def id_limit(self) -> int | None:  # type: ignore[override]
        """Number of base ids that the assistant's tokenizer and embeddings cover; `None` if it reads text."""
        return self.reader.shared_vocabulary

    def read(self, prompts: Prompts, num_thoughts: int) -> Tensor:
        """Return the assistant's last hidden states at the thought positions, `(B, C, N, H_assistant)`."""
        ids, mask = self.reader.read(prompts.input_ids, prompts.attention_mask, num_thoughts)
        return self._run(ids, mask, num_thoughts, prompts.device, prompts.chains)

    def read_own(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        num_thoughts: int,
        rows: int,
        device: torch.device,
        chains: tuple[int, ...] = (0,),
    ) -> Tensor:
        """Like `read`, for an assistant input `(B, P + N)` from the caller, which ends in N thought positions.

        Raises:
            ValueError: The input does not match the batch, N or the assistant's vocabulary.
        """
        num = num_thoughts
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if (
            input_ids.dim() != 2
            or input_ids.shape[0] != rows
            or input_ids.shape[1] < num
            or mask.shape != input_ids.shape
        ):
            raise ValueError(
                f"`assistant_input_ids` must have {rows} rows that end in {num} thought positions, and a mask of "
                f"the same shape, got {tuple(input_ids.shape)} and {tuple(mask.shape)}. Make one row per prompt, "
                "padded on the left."
            )
        if not ((mask == 0) | (mask == 1)).all():
            raise ValueError("`assistant_attention_mask` must hold 0 and 1 only, found other values.")
        if attention_mask is not None and (mask[:, -num:] == 0).any():
            raise ValueError(
                f"`assistant_attention_mask` must attend to the {num} thought positions at the end of every row, "
                "got 0 there. Pad on the left."
            )
        unknown = (input_ids < 0) | (input_ids >= self.assistant.vocabulary)
        if (unknown & (mask != 0)).any():
            raise ValueError(
                "`assistant_input_ids` must lie within the assistant's vocabulary, 0 to "
                f"{self.assistant.vocabulary - 1}, got {int(input_ids.min())} to {int(input_ids.max())}. Tokenize "
                "with the assistant's tokenizer."
            )
        return self._run(input_ids.masked_fill(unknown, 0), mask, num, device, chains)  # padding may be any id

    def _run(
        self, ids: Tensor, mask: Tensor, num_thoughts: int, device: torch.device, chains: tuple[int, ...]
    ) -> Tensor:
        """Read each row once for each chain, with the chain's embedding at all thought positions."""
        rows, vectors = len(ids), None
        if self.chain_token_ids is not None:
            ids, mask = (values.repeat_interleave(len(chains), dim=0) for values in (ids, mask))
            if self.chains is None:
                here = [self.chain_token_ids[chain] for chain in chains] * rows
                ids[:, -num_thoughts:] = torch.tensor(here, device=ids.device)[:, None]
            else:
                check_whole(self.chains.weight, "The embeddings of the chains")
                vectors = self.chains.weight[list(chains)].repeat(rows, 1)
        states = self.assistant.hidden_states(ids, mask, num_thoughts, device, self, vectors)
        return states.unflatten(0, (rows, len(chains)))

    def project(self, states: Tensor) -> Tensor:
        """Project `(B, K, N, H_assistant)` to `(B, K, N, H_base)`."""
        return project(self.projection, states)

    def auxiliary_loss(self, thoughts: Tensor) -> Tensor | None:
        """Return the contrastive term of SoftCoT++, which keeps the chains apart, if there are several."""
        weight = self.config.contrastive_weight
        return weight * contrastive_loss(thoughts) if weight and thoughts.shape[1] > 1 else None

    def check_checkpoint(self, tensors: Mapping[str, Tensor]) -> None:
        """Reject a linear projection that was trained for other hidden sizes."""
        found = tuple(tensors["projection.weight"].shape) if "projection.weight" in tensors else ()
        wanted = (self.base.hidden_size, self.assistant.hidden_size)
        if self.config.projection == "linear" and len(found) == 2 and found != wanted:
            raise ValueError(_size_mismatch(found[1], found[0], wanted[1], wanted[0]))

    def fingerprint(self) -> dict[str, Any]:
        """Return the assistant, its commit or weights, dtype, template, tokenizers, thought token and chains."""
        found = fingerprint(self.reader)
        if self.chains is not None:
            found["chains"] = tensor_digest(self.chains.weight)
        elif self.chain_token_ids is not None:
            found["chain_token_ids"] = self.chain_token_ids
        return found

    def complete(self, config: SoftCoTConfig) -> None:
        """Write the hidden sizes and the assistant's resolved commit into the config."""
        super().complete(config)
        config.assistant_hidden_size = self.assistant.hidden_size
        config.chain_token_ids = self.chain_token_ids
        config.assistant_revision = self.assistant.revision or config.assistant_revision

    def release(self) -> None:
        """Free the weights of an assistant that this package loaded."""
        self.assistant.release()


def _size_mismatch(trained_assistant: int, trained_base: int, assistant_size: int, base_size: int) -> str:
    """Return the error message for an adapter that was trained for other hidden sizes."""
    return (
        f"The adapter's projection goes from assistant hidden size {trained_assistant} to base hidden size "
        f"{trained_base}, but this assistant has {assistant_size} and this base {base_size}. Load it with the pair it "
        "was trained for: the adapter's `base_model_name_or_path` and `assistant_model_name_or_path`."
    )
