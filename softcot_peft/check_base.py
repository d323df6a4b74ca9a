"""Rejects unsupported bases before an adapter is attached."""

from __future__ import annotations

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from .compat.models import check_decoder_lm, is_table


def check_base(model: nn.Module) -> str:
    """Check that a model can serve as the base.

    Returns:
        The module name of its input embedding.

    Raises:
        TypeError: `model` is not a transformers model.
        ValueError: `model` is not a decoder LM with a head and a single input embedding, or is already wrapped by
            FSDP.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"The base must be a transformers model, got {type(model).__name__}."
            + (
                " Pass its `get_base_model()`, on which its adapters stay, and an `adapter_name` that is new."
                if isinstance(model, PeftModel)
                else ""
            )
        )
    remedy = "SoftCoT works on models of `AutoModelForCausalLM`."
    check_decoder_lm(model.config, "The base", remedy, model)
    if model.get_output_embeddings() is None:
        raise ValueError(f"The base must have a language-modelling head, got {type(model).__name__}. {remedy}")
    embedding = model.get_input_embeddings()
    if not is_table(embedding):
        raise ValueError(
            f"The base must have one input embedding, which the thoughts are written over, but that of "
            f"{type(model).__name__} is a {type(embedding).__name__}. {remedy}"
        )
    name = next(name for name, module in model.named_modules() if module is embedding)
    if "_fsdp_wrapped_module" in name:
        raise ValueError(
            "The base must not be wrapped by FSDP yet when an adapter is attached, got its input embedding at "
            f"{name!r}, where FSDP would not see the adapter. Attach the adapter first."
        )
    return str(name)


def check_plain(embedding: nn.Module) -> nn.Module:
    """Reject an embedding wrapped by another adapter: loaders would not find its weights inside `SoftCoTLayer`."""
    if isinstance(embedding, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
        raise ValueError(
            f"The base's input embedding must be free of other adapters, got {type(embedding).__module__}."
            f"{type(embedding).__name__}. Merge that adapter first (`merge_and_unload()`), or keep the embedding out "
            "of its `target_modules`, `modules_to_save` and `trainable_token_indices`."
        )
    return embedding
