"""Do the thoughts carry anything? Controls that change them, and figures that describe them.

A score with soft thoughts says little by itself: zero vectors in their place have been found to cost a few points
only, and thoughts to collapse to nearly the same vector for every question. So every score needs its controls::

    model = PeftModel.from_pretrained(base, "my-adapter").eval()
    for name in CONTROLS:
        with controlled(model, name, average=average_thoughts(model, tokenizer, prompts)):
            ...  # score the model as ever

What changes is the projection's output alone; prompts, places and everything else stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

CONTROLS = ("soft thoughts", "no thoughts", "zero vectors", "another question's", "random projection", "average")


@contextmanager
def controlled(model: PeftModel, control: str, average: Tensor | None = None, seed: int = 0) -> Iterator[None]:
    """Run a model with its thoughts changed.

    Args:
        model: With an active SoftCoT adapter.
        control: One of `CONTROLS`. "soft thoughts": as they are. "no thoughts": the plain base. "zero vectors": zeros
            in their place. "another question's": those of the next row of the batch, so batches need two rows or more
            of different questions. "random projection": of the assistant's hidden states by a new linear layer of the
            usual initialisation. "average": the same vectors for every question.
        average: The vectors `(N, H_base)` of the control "average"; see `average_thoughts`.
        seed: Of the random projection.

    Raises:
        ValueError: There is no such control, no average, or a batch of one row has no other question.
    """
    if control not in CONTROLS:
        raise ValueError(f"`control` must be one of {CONTROLS}, got {control!r}.")
    if control == "average" and average is None:
        raise ValueError("`average` must be given for the control 'average', got None. See `average_thoughts`.")
    if control in ("soft thoughts", "no thoughts"):
        with model.disable_adapter() if control == "no thoughts" else nullcontext():
            yield
        return
    projection = projection_of(model)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        fresh = nn.Linear(projection.in_features, projection.out_features).to(projection.weight)

    def change(module: nn.Module, arguments: tuple[Tensor, ...], thoughts: Tensor) -> Tensor:
        if control == "zero vectors":
            return torch.zeros_like(thoughts)
        if control == "random projection":
            return fresh(arguments[0].to(fresh.weight))
        if control == "average":
            return average.to(thoughts).expand_as(thoughts)
        if len(thoughts) < 2:
            raise ValueError('The control "another question\'s" needs batches of two rows or more, got one.')
        return thoughts.roll(1, dims=0)

    handle = projection.register_forward_hook(change)
    try:
        yield
    finally:
        handle.remove()


def projection_of(model: PeftModel) -> nn.Linear:
    """The active adapter's projection."""
    projections: nn.ModuleDict = model.get_base_model().get_input_embeddings().softcot_projection
    found = projections[model.active_adapter]
    if not isinstance(found, nn.Linear):
        raise TypeError(f"The projection must be a linear layer, got {type(found).__name__}.")
    return found


@torch.no_grad()
def thoughts_of(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], batch: int = 32, **tokenization: Any
) -> Tensor:
    """The soft thoughts of prompts, `(questions, N, H_base)`, in the projection's dtype, on the CPU.

    Args:
        model: With an active SoftCoT adapter, in eval mode.
        tokenizer: The base's.
        prompts: One text per question, all with the same number of thoughts.
        batch: Rows run at once.
        **tokenization: As tokenizers take it, such as `add_special_tokens=False` for prompts of a chat template.
    """
    seen: list[Tensor] = []
    handle = projection_of(model).register_forward_hook(lambda module, arguments, output: seen.append(output.cpu()))
    try:
        for start in range(0, len(prompts), batch):
            rows = tokenizer(prompts[start : start + batch], return_tensors="pt", padding=True, **tokenization)
            model(**rows.to(model.device), logits_to_keep=1)
    finally:
        handle.remove()
    return torch.cat(seen)


def average_thoughts(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], **tokenization: Any
) -> Tensor:
    """The thoughts averaged over questions, `(N, H_base)`: all that does not depend on the question."""
    return thoughts_of(model, tokenizer, prompts, **tokenization).mean(0)


def similarity(thoughts: Tensor) -> Tensor:
    """Cosine of the thoughts of every two questions, averaged over positions; near 1 everywhere is a collapse.

    Args:
        thoughts: `(Q, N, H)`.

    Returns:
        `(Q, Q)`, 1 on the diagonal.
    """
    unit = nn.functional.normalize(thoughts.float(), dim=-1)
    return torch.einsum("inh,jnh->ij", unit, unit) / thoughts.shape[1]


def norms(model: PeftModel, thoughts: Tensor) -> dict[str, float]:
    """Median length of thoughts and of the base's token embeddings, and their ratio.

    Args:
        model: With a SoftCoT adapter.
        thoughts: `(Q, N, H)`.
    """
    table = model.get_base_model().get_input_embeddings().weight
    thought, token = (float(values.float().norm(dim=-1).median()) for values in (thoughts, table))
    return {"thoughts": thought, "token embeddings": token, "ratio": thought / token}


def nearest_tokens(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, thoughts: Tensor, count: int = 3
) -> list[list[list[str]]]:
    """The base's tokens whose embeddings point most nearly the way of each thought, the nearest first.

    Args:
        model: With a SoftCoT adapter.
        tokenizer: The base's.
        thoughts: `(Q, N, H)`.
        count: How many tokens for each thought.

    Returns:
        Tokens by question, thought and rank.
    """
    table = model.get_base_model().get_input_embeddings().weight.detach().cpu()
    table = table[: len(tokenizer)]  # some bases have more rows than tokens
    cosine = nn.functional.normalize(thoughts.float(), dim=-1) @ nn.functional.normalize(table.float(), dim=-1).T
    ids = cosine.topk(count, dim=-1).indices.tolist()
    return [[tokenizer.convert_ids_to_tokens(ranked) for ranked in question] for question in ids]


@torch.no_grad()
def attention_to_thoughts(model: PeftModel, input_ids: Tensor, thought_token_id: int, **options: Any) -> Tensor:
    """How much of its attention each later token pays to the thoughts, by layer, averaged over heads.

    Thoughts must be placed by a run of the thought token: the columns of inserted thoughts are cut from attentions.
    The base must be loaded with `attn_implementation="eager"`.

    Args:
        model: With an active SoftCoT adapter whose config has a `thought_token`.
        input_ids: One row `(1, L)`: prompt, run, response.
        thought_token_id: Id of the thought token.
        **options: As the base's forward takes them.

    Returns:
        `(layers, L - end of the run)`: shares between 0 and 1.

    Raises:
        ValueError: There is no run, more than one row, or the base returns no attentions.
    """
    is_thought = input_ids[0] == thought_token_id
    if len(input_ids) != 1 or not is_thought.any():
        raise ValueError(f"`input_ids` must be one row with a run of {thought_token_id}, got {input_ids.tolist()}.")
    attentions = model(input_ids=input_ids, output_attentions=True, **options).attentions
    if not attentions or attentions[0] is None:
        raise ValueError("The base must return attentions, and did not. Load it with `attn_implementation='eager'`.")
    end = int(is_thought.nonzero().max()) + 1
    layers = torch.stack([layer[0].float().mean(0) for layer in attentions])  # (layers, L, L)
    return layers[:, end:, is_thought].sum(-1)
