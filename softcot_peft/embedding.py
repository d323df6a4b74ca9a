"""The base's input embedding, wrapped: looks tokens up as before and writes soft thoughts over thought positions."""

from __future__ import annotations

import warnings
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .checkpoint.weights import OWN, name_in_model
from .compat.engines import full_shape, uncompiled
from .rows.columns import write_thoughts
from .sources import ThoughtSource


@dataclass
class Writing:
    """What one forward pass of a base makes its soft thoughts of, and where it writes them.

    The layer projects within its own forward: that is where engines that shard or offload weights bring its weights
    in (FSDP2 gathers them there, accelerate loads them there).
    """

    layer: SoftCoTLayer  # the layer that writes
    states: Tensor  # the source's states at the thought positions, `(B, K, N, H_source)`
    # Column of the first thought within this pass, `(B * K,)`; negative when earlier columns were passed before.
    start: Tensor
    shape: torch.Size  # `(B * K, L)` of the ids that carry them; ids of another shape are looked up as they are
    thoughts: Tensor | None = None  # what was written, `(B, K, N, H_base)`; `None` before


class Running(Protocol):
    """What the embedding asks of the running pass."""

    writing: Writing | None


# The pass that is running. Per thread, so that threads can share a model.
RUNNING: ContextVar[Running | None] = ContextVar("softcot_pass", default=None)


class SoftCoTLayer(nn.Module, BaseTunerLayer):
    """Input embedding of a base, and the thought sources of its SoftCoT adapters."""

    adapter_layer_names: tuple[str, ...] = ()
    other_param_names = ("softcot_source",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        # Not a `ModuleDict`: PEFT's disk offloading (0.21) expects an adapter's name right before a weight's own. The
        # children of sources are registered here instead, as `softcot_projection.default` and the like.
        self.softcot_source: dict[str, ThoughtSource] = {}
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

    def update_layer(self, adapter_name: str, source: ThoughtSource) -> None:
        """Add an adapter, whose thoughts come from `source`.

        Raises:
            TypeError: The source has parameters that are not in a child of its own.
        """
        if direct := [name for name, _ in source.named_parameters(recurse=False)]:
            raise TypeError(
                f"The parameters of a thought source must be in child modules, but {type(source).__name__} has "
                f"{direct} of its own. Put them into a module, such as `nn.Embedding`."
            )
        self.softcot_source[adapter_name] = source
        for part, child in source.named_children():
            name = OWN + part
            if name not in self.adapter_layer_names:
                self.adapter_layer_names = (*self.adapter_layer_names, name)
                setattr(self, name, nn.ModuleDict())
            getattr(self, name)[adapter_name] = child
        self.fresh.add(adapter_name)
        self.set_adapter(self.active_adapters or [adapter_name], inference_mode=source.config.inference_mode)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # Every `load_state_dict` comes by here, PEFT's and the user's.
        filled = {
            name
            for name in self.fresh
            if all(prefix + name_in_model(key, name) in state_dict for key in self.source(name).checkpoint_tensors())
        }
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.fresh -= filled

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's own also casts to the base's dtype, which rounds what `low_cpu_mem_usage=True` has just loaded.
        # Where accelerate has offloaded the embedding, the source stays where it is, and projects there.
        device, source = device or self.weight.device, self.source(adapter_name)
        devices = {weight.device for weight in source.parameters()} | {device}
        if torch.device("meta") not in devices:
            source.to(device)

    def source(self, adapter_name: str) -> ThoughtSource:
        """The thought source of an adapter."""
        return self.softcot_source[adapter_name]

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

    def active_source(self) -> ThoughtSource | None:
        """The source of the active adapter; `None` when adapters are disabled or there is none."""
        name = self.active_name()
        return None if name is None else self.source(name)

    def _active_names(self) -> list[str]:
        """The active adapters that are SoftCoT's; transformers' API names those of other methods on the base too."""
        return [name for name in self.active_adapters if name in self.softcot_source]

    def soft_thoughts(self, states: Tensor) -> Tensor:
        """Project states `(B, K, N, H_source)` of the active adapter to soft thoughts `(B, K, N, H_base)`."""
        (name,) = self._active_names()
        source = self.source(name)
        if name in self.fresh and source.config.inference_mode:
            raise ValueError(
                f"The projection of adapter {name!r} must be loaded before it answers, but no file filled it, and "
                "its config says `inference_mode=True`. Load it with `PeftModel.from_pretrained` or `load_adapter` "
                "instead of `get_peft_model`; to train a new one, set `inference_mode=False` in the config."
            )
        self.fresh.discard(name)
        projected: Tensor = source(states)
        return projected

    def check_trains(self) -> None:
        """Reject training a source that is offloaded: accelerate drops the copy that gets the gradients."""
        (name,) = self._active_names()
        offloaded = any(w.device.type == "meta" and w.requires_grad for w in self.source(name).parameters())
        if offloaded and torch.is_grad_enabled():
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
        running = RUNNING.get()
        writing = None if running is None else running.writing
        if writing is None or writing.layer is not self or shape != writing.shape:
            return embeddings
        writing.thoughts = self.soft_thoughts(writing.states)
        return write_thoughts(embeddings, writing.thoughts.flatten(0, 1), writing.start)

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
