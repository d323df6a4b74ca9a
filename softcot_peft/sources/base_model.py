"""The base as its own thought source: no second model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..compat.caches import CACHE_NAME, find_cache
from ..compat.eval_mode import evaluating
from ..compat.models import backbone_of, ordinary_token, states_width, takes_positions
from ..config import SoftCoTConfig
from ..rows.placement import positions
from .backbone import Backbone
from .fingerprint import model_fingerprint
from .inputs import BaseLM, Prompts
from .match_scale import match_scale
from .projections import make_projection, project
from .source import ThoughtSource, register_source


@register_source("base")
class BaseSource(ThoughtSource):
    """Reads prompts with the base, its adapter inactive: `t = Base([prompt; thought token x N])`, `s = W t + b`.

    Nothing more is downloaded or held. If the base's cache can be shared, the prompt runs once: `read_into` fills a
    cache with it, which then serves the real pass.

    Example:
        ```python
        from peft import get_peft_model
        from softcot_peft import SoftCoTConfig
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained("path/to/base")
        config = SoftCoTConfig(thought_source="base", num_thought_tokens=8, task_type="CAUSAL_LM")
        model = get_peft_model(base, config)
        ```

    Args:
        config: The adapter's config.
        base: The base LM.

    Raises:
        ValueError: The base has no backbone of its own, or the thought token is not one of its tokens.
    """

    shares_cache = True

    def __init__(self, config: SoftCoTConfig, base: BaseLM) -> None:
        super().__init__(config, base)
        self.backbone = Backbone(
            backbone_of(base.model), base.model.get_input_embeddings
        )  # no module: the base is frozen, and not the source's
        self._takes_positions = takes_positions(self.backbone.model)
        width = states_width(base.model)
        self.projection = make_projection(config, width, base.hidden_size)
        token = self.thought_token_id
        self.position_token_id = ordinary_token(base.model) if token is None else token
        match_scale(self)

    def read(self, prompts: Prompts, num_thoughts: int) -> Tensor:
        """The base's last hidden states at the thought positions, `(B, 1, N, H_base)`, in its dtype."""
        with self._reading(prompts.device):
            states = self.backbone.last_states(*self._with_positions(prompts, num_thoughts), num_thoughts)
        return states.to(prompts.device)[:, None]

    def read_into(self, prompts: Prompts, num_thoughts: int, cache: Any = None) -> tuple[Tensor, Any]:
        """As `read`; also returns the base's cache of the prompts, which the same pass has filled."""
        ids, mask = self._with_positions(prompts, num_thoughts)
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": True, "return_dict": True}
        if self._takes_positions:
            inputs["position_ids"] = positions(mask)
        with self._reading(prompts.device):
            output = self.backbone.model(**inputs, **{CACHE_NAME: cache})
        cache = find_cache(output)
        cache.crop(-num_thoughts)
        return output.last_hidden_state[:, -num_thoughts:].clone()[:, None], cache

    def _with_positions(self, prompts: Prompts, num_thoughts: int) -> tuple[Tensor, Tensor]:
        """Return ids and mask of prompts with thought positions, `(B, P + N)`, on the device of the embeddings."""
        size = (len(prompts.input_ids), num_thoughts)
        ids = torch.cat([prompts.input_ids, prompts.input_ids.new_full(size, self.position_token_id)], 1)
        mask = torch.cat([prompts.attention_mask, prompts.attention_mask.new_ones(size)], 1)
        return ids.to(prompts.device), mask.to(prompts.device)

    @contextmanager
    def _reading(self, device: torch.device) -> Iterator[None]:
        """Read in eval mode and outside of autocast, whatever mode the base is in."""
        with torch.no_grad(), torch.autocast(device.type, enabled=False), evaluating(self.backbone.model):
            yield

    def project(self, states: Tensor) -> Tensor:
        """Project `(B, 1, N, H_base)` to soft thoughts of the same shape."""
        return project(self.projection, states)

    def fingerprint(self) -> dict[str, Any]:
        """The base's config, weights and dtype, and the token at thought positions."""
        return {
            **super().fingerprint(),
            **model_fingerprint(self.backbone.model),
            "position_token_id": self.position_token_id,
        }
