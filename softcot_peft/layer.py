"""The base's input embedding, wrapped: looks tokens up as before and writes soft thoughts over thought positions."""

from __future__ import annotations

import warnings
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ._compat import full_shape, uncompiled
from .projection import ThoughtProjection
from .reader import PromptReader


@dataclass
class Writing:
    """What one forward pass of a base makes its soft thoughts of, to write them into its embeddings.

    The layer projects within its own forward: that is where engines that shard or offload weights bring its weights
    in (FSDP2 gathers them there, accelerate loads them there).
    """

    layer: SoftCoTLayer  # the layer that writes
    hidden: Tensor  # the assistant's hidden states at the thought positions, `(B, N, H_assistant)`
    # Column of the first thought within this pass, `(B,)`; negative when earlier columns were passed before.
    start: Tensor
    shape: torch.Size  # shape `(B, L)` of the ids that carry them; ids of another shape are looked up as they are
    done: bool = False  # whether they were written


# Per thread, so that threads can share a model.
WRITING: ContextVar[Writing | None] = ContextVar("softcot_writing", default=None)


class SoftCoTLayer(nn.Module, BaseTunerLayer):
    """Input embedding of a base with the projections of its SoftCoT adapters."""

    adapter_layer_names = ("softcot_projection",)
    other_param_names = ("softcot_reader",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.softcot_projection = nn.ModuleDict()
        # Not modules: PEFT saves, casts and counts every child of a tuner layer, and the assistant hangs on these.
        self.softcot_reader: dict[str, PromptReader] = {}
        self.fresh: set[str] = set()  # adapters that never ran and were never loaded
        self._active_adapter = []
        self.merged_adapters = []

    @property
    def base_hidden_size(self) -> int:
        """Width of the base's input embeddings; a packed weight (GGUF, 4 bits) has another one."""
        width = getattr(self.base_layer, "embedding_dim", None)
        return width if isinstance(width, int) else int(full_shape(self.weight)[-1])

    @property
    def vocabulary(self) -> int | None:
        """How many ids the base has embeddings for; `None` where its embedding does not say."""
        return self.base_layer.num_embeddings if isinstance(self.base_layer, nn.Embedding) else None

    def update_layer(self, adapter_name: str, reader: PromptReader) -> None:
        """Add an adapter, whose `reader` makes the assistant's input."""
        config = reader.config
        self.softcot_projection[adapter_name] = ThoughtProjection(
            reader.assistant.hidden_size, self.base_hidden_size, config.init_weights
        )
        self.softcot_reader[adapter_name] = reader
        self.fresh.add(adapter_name)
        self.set_adapter(self.active_adapters or [adapter_name], inference_mode=config.inference_mode)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # Every `load_state_dict` comes by here, PEFT's and the user's.
        filled = {name for name in self.fresh if f"{prefix}softcot_projection.{name}.weight" in state_dict}
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.fresh -= filled

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's own also casts to the base's dtype, which rounds what `low_cpu_mem_usage=True` has just loaded.
        # Where accelerate has offloaded the embedding, the projection stays where it is, and computes there.
        device, projection = device or self.weight.device, self.softcot_projection[adapter_name]
        if torch.device("meta") not in (device, projection.weight.device):
            projection.to(device)

    def active_name(self) -> str | None:
        """Name of the active adapter; `None` when adapters are disabled or there is none."""
        names = self._active_names()
        if self.disable_adapters or not names:
            return None
        if len(names) > 1:
            raise ValueError(
                f"One SoftCoT adapter can be active at a time, got {names}. Choose one with `set_adapter`."
            )
        return names[0]

    def active_reader(self) -> PromptReader | None:
        """The reader of the active adapter; `None` when adapters are disabled or there is none."""
        name = self.active_name()
        return None if name is None else self.softcot_reader[name]

    def _active_names(self) -> list[str]:
        """The active adapters that are SoftCoT's; transformers' API names those of other methods on the base too."""
        return [name for name in self.active_adapters if name in self.softcot_reader]

    def soft_thoughts(self, hidden: Tensor) -> Tensor:
        """Project the assistant's hidden states `(B, N, H_assistant)` with the active adapter to `(B, N, H_base)`."""
        (name,) = self._active_names()
        if name in self.fresh and self.softcot_reader[name].config.inference_mode:
            raise ValueError(
                f"The projection of adapter {name!r} must be loaded before it answers, but no file filled it, and "
                "its config says `inference_mode=True`. Load it with `PeftModel.from_pretrained` or `load_adapter` "
                "instead of `get_peft_model`; to train a new one, set `inference_mode=False` in the config."
            )
        self.fresh.discard(name)
        projected: Tensor = self.softcot_projection[name](hidden)
        return projected

    def check_trains(self) -> None:
        """Refuse to train a projection that is offloaded: accelerate drops the copy that gets the gradients."""
        (name,) = self._active_names()
        weight = self.softcot_projection[name].weight
        if weight.device.type == "meta" and weight.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                "The projection must be in memory to be trained, but accelerate has offloaded it, and its gradients "
                "would be lost. Offload the base first and add the adapter then, or call the model in eval mode."
            )

    def forward(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Look ids `(B, L)` up, and write the soft thoughts of the running pass, if any: `(B, L, H_base)`."""
        embeddings: Tensor = self.base_layer(input_ids, *args, **kwargs)
        return self._write(embeddings, input_ids.shape)

    @uncompiled
    def _write(self, embeddings: Tensor, shape: torch.Size) -> Tensor:
        writing = WRITING.get()
        if writing is None or writing.layer is not self or shape != writing.shape:
            return embeddings
        writing.done = True
        return write_thoughts(embeddings, self.soft_thoughts(writing.hidden), writing.start)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """SoftCoT cannot be merged; see `SoftCoTModel.merge_and_unload`."""
        raise ValueError(
            "A SoftCoT adapter cannot be merged into the base; use `unload()` to get the plain base back."
        )

    def unmerge(self) -> None:
        """Nothing to do, said as PEFT's other layers say it: a base may carry a merged LoRA beside."""
        warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)

    def __repr__(self) -> str:
        return "softcot." + super().__repr__()


def write_thoughts(embeddings: Tensor, thoughts: Tensor, start: Tensor) -> Tensor:
    """Replace the embeddings at the thought positions, out of place.

    Args:
        embeddings: `(B, L, H)`.
        thoughts: `(B, N, H)`, of any dtype and device.
        start: Column of the first thought, `(B,)`; may be negative or beyond L, when thoughts lie partly outside.

    Returns:
        `(B, L, H)` in the embeddings' dtype.
    """
    thoughts = thoughts.to(embeddings)
    columns = torch.arange(embeddings.shape[1], device=embeddings.device)
    offset = columns - start.to(embeddings.device)[:, None]  # (B, L)
    inside = (offset >= 0) & (offset < thoughts.shape[1])
    index = offset.clamp(0, thoughts.shape[1] - 1)[..., None].expand(-1, -1, thoughts.shape[2])
    return torch.where(inside[..., None], thoughts.gather(1, index), embeddings)
