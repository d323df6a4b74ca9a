"""Finds where the thoughts of a batch go and has the assistant think, with the active adapter's config."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import PreTrainedModel

from ._compat import attached_configs, is_whole, ordinary_token
from .config import SoftCoTConfig
from .inputs import tokens
from .layer import SoftCoTLayer
from .placement import IGNORED, Placement, locate, prompts
from .reader import PromptReader

# Whether an assistant is reading: it may be the very base that the thoughts are for, given with `use_assistant`.
THINKING: ContextVar[bool] = ContextVar("softcot_thinking", default=False)


class Thinker:
    """Places the thoughts of one base and computes what they are made of."""

    def __init__(self, model: PreTrainedModel, layer: SoftCoTLayer) -> None:
        self.model = model
        self.layer = layer

    def locate(self, inputs: dict[str, Any], reader: PromptReader, num_thoughts: int | None = None) -> Placement:
        """Find the thoughts' place in the rows of a batch.

        Args:
            inputs: The forward's arguments, unpadded or padded on either side.
            reader: The active adapter's.
            num_thoughts: N where the prompts hold no run of thought tokens; `None`: the config's for texts that are
                scored, which have labels, or its other one for texts that are to be continued.

        Raises:
            ValueError: The batch cannot carry thoughts.
        """
        config = reader.config
        reference, mask, labels = tokens(inputs), inputs.get("attention_mask"), inputs.get("labels")
        if labels is None and inputs.get("shift_labels") is not None:
            labels = unshift(inputs["shift_labels"])
        # Not by `model.training`: a text's log-probabilities are the same in training and evaluation.
        written = None if labels is not None else config.inference_num_thought_tokens
        num = num_thoughts or written or config.num_thought_tokens
        if inputs.get("input_ids") is None and mask is None:
            mask = torch.ones(reference.shape[:2], dtype=torch.long, device=reference.device)
        width = self.layer.base_hidden_size
        if reference.dim() == 3 and reference.shape[2] != width:
            raise ValueError(f"`inputs_embeds` must be as wide as the base's, {width}, got {reference.shape[2]}.")
        run_required = config.placement == "thought_token"
        return locate(
            inputs.get("input_ids"),
            mask,
            labels,
            num,
            reader.thought_token_id,
            run_required,
            self.layer.vocabulary,
            reader.shared_vocabulary,
        )

    def _check_neighbours(self) -> None:
        """Refuse to go on where another method's adapter, attached later, changes the thoughts or took the name."""
        embedding, name = self.model.get_input_embeddings(), self.layer.active_name()
        if embedding is not self.layer and isinstance(embedding, BaseTunerLayer):
            kind = type(embedding)
            raise ValueError(
                f"The base's input embedding must be free of other adapters, got {kind.__module__}.{kind.__name__} "
                "around the thoughts, which it would change. Call `unload()` and keep the embedding out of its "
                "`target_modules`."
            )
        config = attached_configs(self.model).get(str(name))
        if config is not None and not isinstance(config, SoftCoTConfig):
            raise ValueError(
                f"Adapter {name!r} must have a name of its own, but a {config.peft_type!s} adapter was attached under "
                "it, and only that one would be saved. Call `unload()` and give the two different names."
            )

    def think(
        self,
        input_ids: Tensor | None,
        placement: Placement,
        reader: PromptReader,
        assistant_input_ids: Tensor | None = None,
        assistant_attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Run the assistant once: `t = Assistant([prompt; thought token x N])` (section 3), or look up what it said.

        Args:
            input_ids: The caller's ids `(B, L)`; not looked at with `assistant_input_ids`.
            placement: Where the thoughts stand; the assistant sees nothing beyond.
            reader: The active adapter's.
            assistant_input_ids: The caller's own assistant input `(B, P)`, ending in N thought positions.
            assistant_attention_mask: Its mask `(B, P)`; `None`: all attended.

        Returns:
            The hidden states that the layer projects, `(B, N, H_assistant)`, in the assistant's dtype; those looked up
            are float32 for bfloat16.

        Raises:
            ValueError: The caller's assistant input does not fit the batch or N, or an adapter of another method that
                was attached later has taken over the embedding or the name.
            RuntimeError: The model is in training mode and the projection cannot be trained where it is.
        """
        self._check_neighbours()
        if self.model.training:
            self.layer.check_trains()
        num, batch = placement.num_thoughts, len(placement.start)
        # Weights that are sharded or offloaded rest elsewhere than where they are used: with the inputs.
        device = self.layer.weight.device if is_whole(self.layer.weight) else placement.start.device
        if assistant_input_ids is None:
            if input_ids is None:
                raise ValueError("`input_ids` must be given for the assistant to read, got none.")
            prompt = prompts(input_ids, placement)
            known = None if reader.lookup is None else reader.lookup.find(*prompt, num)
            if known is not None:
                return known.to(device)
            ids, mask = reader.read(*prompt, num)
        else:
            ids = assistant_input_ids
            mask = torch.ones_like(ids) if assistant_attention_mask is None else assistant_attention_mask
            if ids.dim() != 2 or ids.shape[0] != batch or ids.shape[1] < num or mask.shape != ids.shape:
                raise ValueError(
                    f"`assistant_input_ids` must have {batch} rows that end in {num} thought positions, and a mask of "
                    f"the same shape, got {tuple(ids.shape)} and {tuple(mask.shape)}. Make one row per prompt, padded "
                    "on the left."
                )
            if not ((mask == 0) | (mask == 1)).all():
                raise ValueError("`assistant_attention_mask` must hold 0 and 1 only, found other values.")
            if assistant_attention_mask is not None and (mask[:, -num:] == 0).any():
                raise ValueError(
                    f"`assistant_attention_mask` must attend to the {num} thought positions at the end of every row, "
                    "got 0 there. Pad on the left."
                )
            unknown = (ids < 0) | (ids >= reader.assistant.vocabulary)
            ids = ids.masked_fill(unknown & (mask == 0), 0)  # the tokenizer's padding may have no embedding
            if (unknown & (mask != 0)).any():
                raise ValueError(
                    "`assistant_input_ids` must lie within the assistant's vocabulary, 0 to "
                    f"{reader.assistant.vocabulary - 1}, got {int(ids.min())} to {int(ids.max())}. Tokenize with the "
                    "assistant's tokenizer."
                )
        token = THINKING.set(True)
        try:
            return reader.assistant.hidden_states(ids, mask, num, device, self.layer)
        finally:
            THINKING.reset(token)

    def filler(self, reader: PromptReader) -> int:
        """An ordinary id for inserted thought positions, for models that look at ids beside the embeddings."""
        if reader.thought_token_id is not None:
            return reader.thought_token_id
        return ordinary_token(self.model)


def unshift(shift_labels: Tensor) -> Tensor:
    """Labels `(B, L)` in line with the ids from labels shifted one to the left; the first one is not predicted."""
    return torch.cat([torch.full_like(shift_labels[:, :1], IGNORED), shift_labels[:, :-1]], dim=1)
