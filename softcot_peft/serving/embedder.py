"""`Embedder`: `prompt_embeds` without the base's layers, for a process beside the engine that runs the base."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any
from weakref import WeakValueDictionary

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel

from ..check_base import check_base
from ..checkpoint.single_weight import read_weight
from ..checkpoint.untrusted import meta_model, read_config
from ..compat.engines import loaded_whole
from ..compat.releases import commit_of, fill_buffers
from ..config import SoftCoTConfig
from ..sources.describe import describe
from ..sources.names import missing_folder
from ..sources.source import SOURCES
from .feeding import check_structure
from .prompt_embeds import prompt_embeds

_lock = Lock()
_matrices: WeakValueDictionary[tuple[Any, ...], nn.Parameter] = WeakValueDictionary()  # adapters share the matrix


class Embedder:
    """Makes the embeddings of prompts and thoughts with the base's embedding matrix, the assistant and the projection.

    The base's layers are not loaded: they stay on the meta device. Everything else is the same as in a loaded model,
    and so are the embeddings, bit for bit. Threads may share an embedder. Embedders share matrix and assistant.

    Args:
        model: The PEFT model of a base with nothing but its input embedding in memory.

    Example:
        ```python
        from softcot_peft.serving import Embedder

        model.save_pretrained("my-adapter")
        embedder = Embedder.from_pretrained("my-adapter", base="path/to/base")
        batch = tokenizer(prompts, return_tensors="pt", padding=True)
        rows = embedder(batch["input_ids"], batch["attention_mask"])  # as `prompt_embeds` of the loaded model
        ```
    """

    def __init__(self, model: PeftModel) -> None:
        self.model = model

    @classmethod
    def from_pretrained(
        cls,
        adapter: str | Path,
        base: str | Path | None = None,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        subfolder: str | None = None,
    ) -> Embedder:
        """Load an adapter, its assistant's config, and the embedding matrix of its base.

        The assistant's weights are loaded when the first prompt is read.

        Args:
            adapter: Hub id or folder of the adapter.
            base: Hub id or folder of the base, whose weights must be safetensors. `None`: the one that the adapter's
                config names.
            device: Device of the matrix, the projection and the assistant; an assistant registered with
                `use_assistant` stays where it is.
            dtype: Dtype of the base in the engine. `None`: that of its config, else of its weights.
            revision: Revision of the adapter on the Hub.
            subfolder: Folder of the adapter within its repository or folder.

        Raises:
            ValueError: The adapter is no SoftCoT adapter or reads with the base's layers, the base is unknown or has
                no safetensors, or the base reads ids beside embeddings.
        """
        where = {"revision": revision, "subfolder": subfolder}
        options: dict[str, Any] = {name: value for name, value in where.items() if value is not None}
        config = PeftConfig.from_pretrained(str(adapter), **options)
        name = _check(config, None if base is None else str(base))
        commit = config.revision if name == config.base_model_name_or_path else None
        model = _with_embedding(name, commit, torch.device(device), dtype)
        # On the CPU first: PEFT would take the file's tensors through the first GPU.
        return cls(PeftModel.from_pretrained(model, str(adapter), torch_device="cpu", **options).eval())

    def __repr__(self) -> str:
        layer: Any = self.model.get_input_embeddings()
        source, weight = layer.source(self.model.active_adapter), layer.weight
        where = f"base={source.base.name_or_path!r}, dtype={weight.dtype}, device={str(weight.device)!r}"
        return f"{type(self).__name__}({describe(source)}, {where})"

    @property
    def config(self) -> SoftCoTConfig:
        """The adapter's config."""
        config: Any = self.model.peft_config[self.model.active_adapter]
        return config

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        chains: int | Sequence[int] | None = None,
        assistant_input_ids: Tensor | None = None,
        assistant_attention_mask: Tensor | None = None,
    ) -> list[Tensor]:
        """Return the embeddings of prompts and thoughts. Arguments and result are those of [`prompt_embeds`].

        The tensors may be on any device.
        """
        device = self.model.get_input_embeddings().weight.device
        own = {"assistant_input_ids": assistant_input_ids, "assistant_attention_mask": assistant_attention_mask}
        given = {"input_ids": input_ids, "attention_mask": attention_mask, **own}
        inputs: dict[str, Any] = {
            name: value.to(device) if isinstance(value, Tensor) else value for name, value in given.items()
        }
        return prompt_embeds(self.model, **inputs, chains=chains)


def _check(config: PeftConfig, base: str | None) -> str:
    """Reject adapters that need the base's layers; returns the name of the base."""
    if not isinstance(config, SoftCoTConfig):
        raise ValueError(
            f"`adapter` must be a SoftCoT adapter, got one of {config.peft_type!s}, which acts in the base's layers. "
            "Load it in the engine."
        )
    if SOURCES.find(config.thought_source).shares_cache:
        raise ValueError(
            f"`adapter` must read with an assistant, got `thought_source={config.thought_source!r}`, which reads with "
            "the base's layers. Load the whole base and call `prompt_embeds` with it."
        )
    name = base or config.base_model_name_or_path
    if not name:
        raise ValueError("`base` must be given, since the adapter's config names none. Pass its Hub id or folder.")
    return name


def _with_embedding(
    name: str, revision: str | None, device: torch.device, dtype: torch.dtype | None
) -> PreTrainedModel:
    """Return a base on the meta device whose input embedding has its values."""
    try:
        revision = commit_of(name, revision) or revision
        config = read_config(name, revision)
    except Exception as error:  # untrusted files can fail anywhere
        raise ValueError(
            f"`base` must be the Hub id or folder of a decoder LM, got {name!r}: {error} {missing_folder(name)}"
        ) from error
    wanted: Any = dtype or config.dtype  # transformers reads the names of dtypes as dtypes
    model, path = _build(config, wanted)
    matrix = _matrix(name, revision, f"{path}.weight", model, device, wanted)
    if matrix.dtype != model.dtype:  # neither the caller nor the config says
        model, path = _build(config, matrix.dtype)
    embedding = model.get_input_embeddings()
    check_structure(model, embedding)
    fill_buffers(model, embedding, device)
    embedding.weight = matrix
    with suppress(OSError):  # if there is none, the model's is made from its config
        model.generation_config = GenerationConfig.from_pretrained(name, revision=revision or "main")
    return model.requires_grad_(False).eval()


def _build(config: PretrainedConfig, dtype: torch.dtype | None) -> tuple[PreTrainedModel, str]:
    """Return a base without weights, and the name of its input embedding."""
    with loaded_whole(), meta_model():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype or torch.float32, trust_remote_code=False
        )
    path = check_base(model)
    parameters = [name for name, _ in model.get_input_embeddings().named_parameters()]
    if parameters != ["weight"]:
        raise ValueError(
            f"The base's input embedding must be one matrix to be read by itself, got {parameters}. Load the whole "
            "base and call `prompt_embeds` with it."
        )
    return model, path


def _matrix(
    name: str, revision: str | None, key: str, model: PreTrainedModel, device: torch.device, dtype: torch.dtype | None
) -> nn.Parameter:
    """Return the embedding matrix of a base, `(V, H)`, which embedders of the same base share."""
    place = (name, revision, key, device, dtype)
    with _lock:
        matrix = _matrices.get(place)
        if matrix is None:
            read = read_weight(name, revision, key, model.get_parameter(key).shape, device)
            kept = read.to(dtype or read.dtype, copy=read.device.type == "cpu")  # not the file, mapped into memory
            matrix = _matrices[place] = nn.Parameter(kept, requires_grad=False)
        return matrix
