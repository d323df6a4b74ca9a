"""The initialisation `"matched"`: thoughts begin with the norm of the base's token embeddings."""

from __future__ import annotations

import torch
from torch import Tensor

from ..running import reading
from .inputs import Prompts
from .source import ThoughtSource

_PROBE = "Tom has 12 apples and eats 7 of them. How many apples are left?"
_COUNT = 32  # ids, if the source reads ids


@torch.no_grad()
def match_scale(source: ThoughtSource) -> None:
    """Scale a source's projection, so that its thoughts of a short text have the median norm of the text's tokens.

    Does nothing unless the config asks for `projection_init="matched"` and a projection that is to be trained.

    Both depend on the frozen models alone, so that every process finds the same scale.

    Raises:
        ValueError: The base is not in memory, or the projection cannot be scaled.
    """
    if source.config.projection_init != "matched" or source.config.inference_mode:
        return
    embedding = source.base.model.get_input_embeddings()
    weight = next(embedding.parameters())
    rescale = getattr(source.projection, "rescale", None)
    if weight.device.type == "meta" or not callable(rescale):
        found = "one on the meta device" if callable(rescale) else f"`projection={source.config.projection!r}`"
        raise ValueError(
            "`projection_init='matched'` needs a base in memory and a projection with a method `rescale`, got "
            f"{found}. Choose another initialisation."
        )
    ids = _probe(source).to(weight.device)
    with reading():
        tokens: Tensor = embedding(ids)
        states = source.read(Prompts(ids, torch.ones_like(ids), weight.device), source.config.num_thought_tokens)
    rescale(float(tokens.float().norm(dim=-1).median() / source.project(states).float().norm(dim=-1).mean()))


def _probe(source: ThoughtSource) -> Tensor:
    """Ids of a short text, `(1, P)`; where prompts are read as ids, some that both models know."""
    if source.base_tokenizer is not None:
        before, after = source.config.assistant_prompt_between or ("", "")
        return torch.tensor([source.base_tokenizer(before + _PROBE + after)["input_ids"]])
    known = min(limit for limit in (source.base.vocab_size, source.id_limit, 2**31) if limit is not None)
    return torch.linspace(0, known - 1, _COUNT).long()[None]
