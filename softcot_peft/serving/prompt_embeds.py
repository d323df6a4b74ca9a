"""`prompt_embeds`: prompts and soft thoughts as the embeddings that the base reads, for engines that run the base."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..attached import active
from ..passes.cache_record import check_room
from ..passes.options import infer_mask
from ..rows.arguments import insert_thoughts, repeat_for_chains
from ..rows.checks import check_arguments
from .feeding import check_feeding


@torch.no_grad()
def prompt_embeds(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    chains: int | Sequence[int] | None = None,
    assistant_input_ids: Tensor | None = None,
    assistant_attention_mask: Tensor | None = None,
) -> list[Tensor]:
    """Return prompts and their soft thoughts as the embeddings that the base reads.

    A plain copy of the base that generates from these embeddings writes what `model.generate` writes. Thoughts are
    placed as in `generate`: over the run of `thought_token`, else before `response_marker` or after the prompt.

    The first call runs a short row of the base twice, to check that the base computes the same from embeddings as from
    ids.

    Args:
        model: The PEFT model, or the base that the adapter was injected into. Its active adapter is used.
        input_ids: Prompts `(B, L)` int64, padded on either side, on the device of the base's embeddings.
        attention_mask: `(B, L)`, 1 = attended. `None`: derived from the padding id, as in `generate`.
        chains: The chains of an adapter with several: one, some, or with `None` all of them.
        assistant_input_ids: What the assistant reads instead of the prompts, `(B, P + N)`, ending in N thought
            positions.
        assistant_attention_mask: `(B, P + N)`. `None`: all tokens are attended.

    Returns:
        For each row the embeddings `(L + N, H)` without padding, in the dtype and on the device of the base's
        embeddings; `(L, H)` if a run of thought tokens stands in the prompt. With several chains, those of one prompt
        are adjacent, as in `generate`.

    Raises:
        TypeError: An argument is not a tensor of ids.
        ValueError: The model has no active SoftCoT adapter, the prompts cannot be combined with thoughts, or the base
            reads ids beside embeddings.

    Example:
        ```python
        from softcot_peft import prompt_embeds

        batch = tokenizer(prompts, return_tensors="pt", padding=True)
        for embeds in prompt_embeds(model, batch["input_ids"], batch["attention_mask"]):
            print(embeds.shape)  # (tokens and thoughts, H)
        ```
    """
    host, source = active(model)
    selected = source.select_chains(chains)
    own = {"assistant_input_ids": assistant_input_ids, "assistant_attention_mask": assistant_attention_mask}
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
    check_arguments(inputs, own)
    if attention_mask is None:
        inputs["attention_mask"] = infer_mask(inputs, host.model)
    placement = host.locate(inputs, source)
    check_room(host.model, None, inputs, input_ids.shape[1], placement.num_inserted)
    states = host.read(input_ids, placement, source, own, chains=selected)  # (B, C, N, H_source)
    inputs["inputs_embeds"] = host.model.get_input_embeddings()(input_ids)
    placement = repeat_for_chains(inputs, placement, len(selected))
    insert_thoughts(inputs, placement, host.layer.soft_thoughts(states).flatten(0, 1), host.filler(source))
    masks = inputs["attention_mask"].bool()
    embeds: list[Tensor] = [row[mask] for row, mask in zip(inputs["inputs_embeds"], masks, strict=True)]
    before = int(masks[0, : placement.start[0]].sum())
    check_feeding(host, inputs["input_ids"][:1, masks[0]], embeds[0][None], before, states[:1, :1])
    return embeds
