"""The trained module: one linear layer from the assistant's hidden states to the base's input embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ._compat import is_whole


class ThoughtProjection(nn.Linear):
    """`s = W t + b` (section 3 of arXiv 2502.12134).

    Args:
        assistant_hidden_size: Width of t.
        base_hidden_size: Width of s.
        init_weights: `True`: the usual initialisation of a linear layer. `False`: standard normal values, large enough
            to see in a test.
    """

    def __init__(self, assistant_hidden_size: int, base_hidden_size: int, init_weights: bool = True) -> None:
        super().__init__(assistant_hidden_size, base_hidden_size)
        if not init_weights:
            nn.init.normal_(self.weight)
            nn.init.normal_(self.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Project `(B, N, H_assistant)` to `(B, N, H_base)`, in the projection's dtype and on its device.

        Raises:
            RuntimeError: The weights are sharded or offloaded and nothing brought them in, or they were never loaded.
        """
        if not is_whole(self.weight):
            raise RuntimeError(
                "The projection's weights must be here when it runs, but they are sharded or offloaded, or were made "
                "with `low_cpu_mem_usage=True` and never loaded. Engines bring sharded ones in while the input "
                "embedding runs: pass `input_ids` instead of `inputs_embeds`. After `cpu_offload` or `disk_offload`, "
                "load adapters with `PeftModel.from_pretrained` instead of `load_adapter`. To load them otherwise, "
                "call `load_adapter` or `set_peft_model_state_dict`."
            )
        with torch.autocast(hidden.device.type, enabled=False):  # the same thoughts in training and inference
            return super().forward(hidden.to(self.weight))
