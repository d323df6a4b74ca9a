"""`SoftCoTModel`, the PEFT tuner: attaches, saves, loads and removes SoftCoT adapters."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from ._version import __version__
from .attached import HOOKS, discard, layer_of, path_of, remove_hooks
from .check_base import check_base, check_plain
from .checkpoint.weights import OWN, check_tensors, without_adapter_name
from .compat.engines import device_map_of, is_whole
from .compat.releases import attached_configs
from .config import SoftCoTConfig
from .embedding import SoftCoTLayer
from .loading import load_checked
from .publishing import follow_uploads
from .rows.checks import check_adapter_names
from .sources import BaseLM, make_source


class SoftCoTModel(BaseTuner):
    """Adds soft thoughts of a frozen assistant to a frozen base LM (arXiv 2502.12134).

    [`~peft.get_peft_model`], [`~peft.PeftModel.from_pretrained`] and transformers' `load_adapter` create it.

    Example:
        ```python
        from peft import get_peft_model
        from softcot_peft import SoftCoTConfig
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained("path/to/base")
        config = SoftCoTConfig(
            assistant_model_name_or_path="path/to/assistant",
            num_thought_tokens=4,
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(base, config)  # `model.base_model` is a `SoftCoTModel`
        model.print_trainable_parameters()
        ```

    Args:
        model: The base, a decoder LM of transformers.
        peft_config: The adapter's [`SoftCoTConfig`], or a dict of configs by adapter name.
        adapter_name: Name of the adapter.
        *args: Passed to PEFT's `BaseTuner`.
        **kwargs: Passed to PEFT's `BaseTuner`, such as `low_cpu_mem_usage=True` to create the projection on the meta
            device, to be loaded later.

    Raises:
        TypeError: The base is not a transformers model.
        ValueError: Base, assistant and adapter are not compatible.
    """

    prefix: str = "softcot_"
    tuner_layer_cls = SoftCoTLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  # as BaseTuner declares it

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | dict[str, PeftConfig],
        adapter_name: str,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        attached = attached_configs(model)
        earlier = dict(attached)
        other = earlier.get(adapter_name)
        if other is not None and not isinstance(other, SoftCoTConfig):
            raise ValueError(
                f"`adapter_name` must be new to the base, got {adapter_name!r}, the name of its "
                f"{other.peft_type!s} adapter: under one name only one of the two would be saved. Pass another, "
                "such as `adapter_name='thoughts'`."
            )
        try:
            super().__init__(model, peft_config, adapter_name, *args, **kwargs)
        except Exception:
            attached.update(earlier)  # BaseTuner has overwritten the config of the same name with the rejected one
            raise

    def unmerge_adapter(self) -> None:
        """Raise an error: SoftCoT adapters are never merged.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "A SoftCoT adapter is never merged, so there is nothing to unmerge. Use `disable_adapter()` to run the "
            "plain base, or `unload()` to get it back."
        )

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Raise an error: SoftCoT adapters cannot be combined.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "`add_weighted_adapter` is not supported: each SoftCoT adapter has its own assistant and number of "
            "thoughts. Choose one with `set_adapter`."
        )

    # The following methods override private ones of BaseTuner, which is how PEFT subclasses it (peft 0.21).

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        return peft_config  # there are no target modules to choose

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        self._embedding_name = check_base(model)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Inject the adapter like BaseTuner, but remove its config if the adapter is rejected."""
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except Exception:
            self.peft_config.pop(adapter_name, None)
            raise

    def _check_target_module_exists(self, peft_config: PeftConfig, key: str) -> bool:  # type: ignore[override]
        return key == self._embedding_name

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = target if isinstance(target, SoftCoTLayer) else SoftCoTLayer(check_plain(target))
        base = BaseLM(self.model.name_or_path, layer.base_hidden_size, layer.vocabulary, self.model)
        source = make_source(cast(SoftCoTConfig, peft_config), base)
        layer.update_layer(adapter_name, source)
        # Not `_replace_module`: it moves the adapter to the device of the embedding's weight. If accelerate has
        # offloaded the embedding, this is the meta device, and nothing would restore the adapter.
        setattr(parent, target_name, layer)
        layer._move_adapter_to_device_of_base_layer(adapter_name)
        if not is_whole(layer.weight):
            # Otherwise, transformers' `load_adapter` would offload the source to disk like the embedding, unloaded.
            device_map_of(self.model).update(
                {self._source_prefix + part: "cpu" for part, _ in source.named_children()}
            )
        if HOOKS not in self.model.__dict__:
            from .hooks import ThoughtHooks  # not before there is a base: importing the passes takes time

            hooks = ThoughtHooks(self.model, layer, functools.partial(load_checked, layer))
            setattr(self.model, HOOKS, hooks)

    @property
    def _source_prefix(self) -> str:
        """Prefix of the module names of sources' children in the base."""
        return f"{self._embedding_name}.{OWN}"

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # Float32 for bases of any dtype, so that PeftModel and transformers' `load_adapter` agree.
        layer = layer_of(self.model)
        dtype = torch.float32 if autocast_adapter_dtype else layer.weight.dtype
        layer.source(adapter_name).to(dtype if dtype.is_floating_point else torch.float32)

    def _check_merge_allowed(self) -> None:
        raise ValueError(
            "A SoftCoT adapter cannot be merged: its thoughts depend on the prompt, so no change of the base's "
            "weights equals them. Keep the adapter loaded (`save_pretrained` writes a few MB), or call `unload()` to "
            "get the plain base back. Trainers that sample with vLLM merge adapters into the weights that they send: "
            "set `use_vllm=False`, because the engine would sample without thoughts."
        )

    def _unload_and_optionally_merge(  # type: ignore[override]  # peft annotates None and returns the base
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._check_merge_allowed()
        super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        remove_hooks(self.model, self._source_prefix)
        return self.model

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        check_adapter_names(kwargs.get("adapter_names"))  # PEFT removes the argument before the base's forward
        yield

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        # Called whenever an adapter is saved, before its config is written. Completes the config for loading it later.
        if isinstance(model, PeftModel):
            follow_uploads(model)
        config = cast(SoftCoTConfig, config)
        layer_of(model).source(adapter_name).complete(config)
        config.softcot_peft_version = __version__
        weights: dict[str, Tensor] = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        expected = layer_of(model).source(adapter_name).checkpoint_tensors()
        if expected and state_dict and not weights:  # a sharded model's state may be empty in later processes
            raise ValueError(
                f"The model's state must hold the projection of adapter {adapter_name!r} under its module's name, but "
                "does not: something that renames modules is wrapped around a part of the base. Remove it first."
            )
        return weights

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # Maps names to those in the file, and back on loading. Compiled backbones are saved like plain ones.
        return without_adapter_name(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        layer = layer_of(model)
        if isinstance(model, PeftModel):
            follow_uploads(model)
        try:
            checked = check_tensors(state_dict, model, path_of(model, layer), layer.source(adapter_name))
        except ValueError:
            if isinstance(model, PeftModel) and adapter_name in layer.fresh:
                discard(model, adapter_name)
            raise
        remapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, checked)
        if unknown := set(remapped).intersection(checked):  # still named as in the file: without a match in the model
            raise ValueError(
                f"The adapter's file must fit the names of the model's modules, but {sorted(unknown)} fit none: "
                "something that renames modules is wrapped around a part of the base. Load the adapter first."
            )
        return remapped
