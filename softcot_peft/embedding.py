"""Wraps the base's input embedding: looks tokens up as before and writes soft thoughts at the thought positions."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .checkpoint.weights import OWN, name_in_model
from .compat.engines import uncompiled
from .compat.models import embedding_width
from .rows.columns import write_thoughts
from .running import RUNNING
from .sources import ThoughtSource
from .sources.describe import describe


@dataclass
class Writing:
    """The states that one forward pass projects to soft thoughts, and the positions it writes them to.

    The layer projects within its own forward, where engines that shard or offload weights make them available (FSDP2
    gathers them there, accelerate loads them there).
    """

    layer: SoftCoTLayer  # the layer that writes the thoughts
    states: Tensor  # the source's states at the thought positions, `(B, K, N, H_source)`
    # Column of the first thought in this pass, `(B * K,)`; negative if it was in an earlier pass.
    start: Tensor
    shape: torch.Size  # `(B * K, L)`, shape of the ids with thought positions; other ids are only looked up
    thoughts: Tensor | None = None  # the written thoughts, `(B, K, N, H_base)`; `None` until then


class SoftCoTLayer(nn.Module, BaseTunerLayer):
    """The input embedding of a base, together with the thought sources of its SoftCoT adapters."""

    adapter_layer_names: tuple[str, ...] = ()
    other_param_names = ("softcot_source",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        # Not a `ModuleDict`: PEFT's disk offloading (0.21) expects the adapter name right before the parameter name.
        # Instead, the layer registers the children of the sources, such as `softcot_projection.default`.
        self.softcot_source: dict[str, ThoughtSource] = {}
        self.fresh: set[str] = set()  # adapters that were neither run nor loaded yet
        self._active_adapter = []
        self.merged_adapters = []

    @property
    def base_hidden_size(self) -> int:
        """Width of the base's input embeddings."""
        return embedding_width(self.base_layer)

    @property
    def vocabulary(self) -> int | None:
        """Number of ids the base has embeddings for; `None` if its embedding does not tell."""
        return self.base_layer.num_embeddings if isinstance(self.base_layer, nn.Embedding) else None

    def update_layer(self, adapter_name: str, source: ThoughtSource) -> None:
        """Add an adapter whose thoughts come from `source`.

        Raises:
            TypeError: The source has parameters outside of its child modules.
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
        # Called by every `load_state_dict`, PEFT's and the user's.
        filled = {
            name
            for name in self.fresh
            if all(prefix + name_in_model(key, name) in state_dict for key in self.source(name).checkpoint_tensors())
        }
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.fresh -= filled

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's method also casts to the base's dtype, which rounds weights just loaded with `low_cpu_mem_usage=True`.
        # If accelerate has offloaded the embedding, the source stays on its device and projects there.
        device, source = device or self.weight.device, self.source(adapter_name)
        devices = {weight.device for weight in source.parameters()} | {device}
        if torch.device("meta") not in devices:
            source.to(device)

    def source(self, adapter_name: str) -> ThoughtSource:
        """Return the thought source of an adapter."""
        return self.softcot_source[adapter_name]

    def active_name(self) -> str | None:
        """Return the name of the active adapter; `None` if adapters are disabled or none is active."""
        names = self._active_names()
        if self.disable_adapters or not names:
            return None
        if len(names) > 1:
            raise ValueError(
                f"One SoftCoT adapter can be active at a time, got {names}. Choose one with `set_adapter`."
            )
        return names[0]

    def active_source(self) -> ThoughtSource | None:
        """Return the source of the active adapter; `None` if adapters are disabled or none is active."""
        name = self.active_name()
        return None if name is None else self.source(name)

    def _active_names(self) -> list[str]:
        """Return the active SoftCoT adapters; transformers' API also lists active adapters of other methods."""
        return [name for name in self.active_adapters if name in self.softcot_source]

    def soft_thoughts(self, states: Tensor) -> Tensor:
        """Project states `(B, K, N, H_source)` of the active adapter to soft thoughts `(B, K, N, H_base)`."""
        (name,) = self._active_names()
        source = self.source(name)
        if name in self.fresh and source.config.inference_mode:
            raise ValueError(
                f"The projection of adapter {name!r} must be loaded before inference, but nothing was loaded into it, "
                "and its config has `inference_mode=True`. Load it with `PeftModel.from_pretrained` or `load_adapter` "
                "instead of `get_peft_model`; to train a new one, set `inference_mode=False` in the config."
            )
        self.fresh.discard(name)
        projected: Tensor = source(states)
        return projected

    def check_trains(self) -> None:
        """Reject training of an offloaded source: accelerate discards the copy that receives the gradients."""
        (name,) = self._active_names()
        offloaded = any(w.device.type == "meta" and w.requires_grad for w in self.source(name).parameters())
        if offloaded and torch.is_grad_enabled():
            raise RuntimeError(
                "The projection must be in memory to be trained, but accelerate has offloaded it, and its gradients "
                "would be lost. Offload the base first and add the adapter then, or call the model in eval mode."
            )

    def forward(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Look up ids `(B, L)` and write the soft thoughts of the running pass, if any; returns `(B, L, H_base)`."""
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
        """Raise an error: SoftCoT adapters cannot be merged. See `SoftCoTModel.merge_and_unload`."""
        raise ValueError(
            "A SoftCoT adapter cannot be merged into the base; use `unload()` to get the plain base back."
        )

    def unmerge(self) -> None:
        """Warn like PEFT's other layers and do nothing: the base may also have a merged LoRA adapter."""
        warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)

    def extra_repr(self) -> str:
        """Return a line for each adapter: its name, whether it is active, and its source."""
        state = " (disabled)" if self.disable_adapters else " (active)"
        active = self._active_names()
        return "\n".join(
            f"{name}{state * (name in active)}: {describe(source)}" for name, source in self.softcot_source.items()
        )

    def __repr__(self) -> str:
        return "softcot." + super().__repr__()
