"""`Host`: a base LM with its wrapped embedding, which locates the thought positions and runs the source."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ..compat.engines import is_whole
from ..compat.models import argument_names, ordinary_token, takes_positions
from ..compat.releases import attached_configs
from ..config import SoftCoTConfig
from ..embedding import SoftCoTLayer
from ..rows.arguments import tokens, unshift
from ..rows.locate import check_ids, has_run, locate
from ..rows.placement import Placement, prompts
from ..running import reading
from ..sources import Prompts, ThoughtSource
from ..sources.marker import find_starts


class Host:
    """A base LM that carries thoughts.

    Args:
        model: The base.
        layer: Its wrapped input embedding.
    """

    def __init__(self, model: PreTrainedModel, layer: SoftCoTLayer) -> None:
        self.model = model
        self.layer = layer
        self.names = argument_names(model)
        self.takes_positions = takes_positions(model)
        self.handles: list[RemovableHandle] = []  # handles of the registered hooks
        self._warned: set[str] = set()

    def locate(self, inputs: dict[str, Any], source: ThoughtSource, num_thoughts: int | None = None) -> Placement:
        """Locate the thought positions of a batch.

        Args:
            inputs: Arguments of the forward, padded on either side or not at all.
            source: The active adapter's thought source.
            num_thoughts: N for prompts without a run of thought tokens. `None`: the config's `num_thought_tokens` for
                batches with labels, else its `inference_num_thought_tokens`.

        Raises:
            ValueError: The batch cannot be combined with thoughts.
        """
        config = source.config
        reference, mask, labels = tokens(inputs), inputs.get("attention_mask"), inputs.get("labels")
        if labels is None and inputs.get("shift_labels") is not None:
            labels = unshift(inputs["shift_labels"])
        # Independent of `model.training`, so that log-probabilities are the same in training and evaluation.
        for_inference = None if labels is not None else config.inference_num_thought_tokens
        num = num_thoughts or for_inference or config.num_thought_tokens
        if inputs.get("input_ids") is None and mask is None:
            mask = torch.ones(reference.shape[:2], dtype=torch.long, device=reference.device)
        width = self.layer.base_hidden_size
        if reference.dim() == 3 and reference.shape[2] != width:
            raise ValueError(f"`inputs_embeds` must be as wide as the base's, {width}, got {reference.shape[2]}.")
        return locate(
            inputs.get("input_ids"),
            mask,
            labels,
            num,
            source.thought_token_id,
            run_required=config.placement == "thought_token",
            vocabulary=self.layer.vocabulary,
            shared_vocabulary=source.id_limit,
            starts=self._find_starts(inputs.get("input_ids"), mask, labels, source),
        )

    def _find_starts(
        self, input_ids: Tensor | None, mask: Tensor | None, labels: Tensor | None, source: ThoughtSource
    ) -> Tensor | None:
        """Return where thoughts begin by `response_marker`, `(B,)`; `None`: a run, or labels and mask, decide."""
        marker = source.config.response_marker
        if marker is None:
            return None
        if input_ids is None:
            raise ValueError(
                f"`input_ids` must be given, since `response_marker={marker!r}` is searched in their text, got "
                "`inputs_embeds` alone. Pass the ids as well, or set `response_marker=None`."
            )
        if has_run(input_ids, mask, labels, source.thought_token_id):
            return None
        check_ids(input_ids, self.layer.vocabulary)
        return find_starts(source, marker, input_ids, mask, labels)

    def read(
        self,
        input_ids: Tensor | None,
        placement: Placement,
        source: ThoughtSource,
        own: Mapping[str, Tensor | None] = MappingProxyType({}),
        afresh: bool = False,
        chains: tuple[int, ...] = (0,),
    ) -> Tensor:
        """Run the source on the prompts of a batch, once.

        Args:
            input_ids: The caller's ids `(B, L)`; ignored with `own` input.
            placement: The thought positions; the source sees only the tokens before them.
            source: The active adapter's thought source.
            own: The caller's input for the source: `assistant_input_ids` `(B, P)`, ending in N thought positions, and
                `assistant_attention_mask`.
            afresh: Whether to ignore precomputed states.
            chains: The chains to read, C of them.

        Returns:
            The source's states, `(B, C, N, H_source)`, on the base's device.

        Raises:
            ValueError: The caller's input is invalid, or another method's adapter, attached later, wraps the embedding
                or has the same name.
            RuntimeError: The model is in training mode, but the source is offloaded and cannot be trained.
        """
        self.check_ready()
        own_ids = own.get("assistant_input_ids")
        # Sharded or offloaded weights are stored elsewhere than they are used, which is on the device of the inputs.
        device = self.layer.weight.device if is_whole(self.layer.weight) else placement.start.device
        num = placement.num_thoughts
        with reading():
            if own_ids is not None:
                rows = len(placement.start)
                return source.read_own(own_ids, own.get("assistant_attention_mask"), num, rows, device, chains)
            if input_ids is None:
                raise ValueError("`input_ids` must be given for the assistant to read, got none.")
            batch = Prompts(*prompts(input_ids, placement), device, chains)
            states = source.read(batch, num) if afresh else source.states(batch, num)
        if states.dim() != 4 or states.shape[:3] != (len(placement.start), len(chains), num):
            raise ValueError(
                f"`read` of thought source {source.kind!r} must return states of the shape (B, C, N, H), here "
                f"({len(placement.start)}, {len(chains)}, {num}, H), got {tuple(states.shape)}."
            )
        return states

    def read_into(
        self, source: ThoughtSource, prompt_ids: Tensor, prompt_mask: Tensor, num_thoughts: int, cache: Any = None
    ) -> tuple[Tensor, Any]:
        """As `read`, for sources that share the base's cache of the prompts, `(B, P)`; returns it, too."""
        self.check_ready()
        with reading():
            return source.read_into(Prompts(prompt_ids, prompt_mask, prompt_ids.device), num_thoughts, cache)

    def check_ready(self) -> None:
        """Reject adapters of other methods in the way, and training what is offloaded."""
        self._check_other_adapters()
        if self.model.training:
            self.layer.check_trains()

    def filler(self, source: ThoughtSource) -> int:
        """Return the id for inserted thought positions: an ordinary one, because some models also inspect ids."""
        return ordinary_token(self.model) if source.thought_token_id is None else source.thought_token_id

    def warn_once(self, message: str) -> None:
        """Issue a warning that also applies to later batches, once."""
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=2)

    def _check_other_adapters(self) -> None:
        """Reject another method's adapter, attached later, that changes the thoughts or has the same name."""
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
