"""Training steps of SoftCoT in this package, and of the other methods, which are independent of the package.

    t = Assistant([prompt; thought token x N]).hidden[-1][thought positions]     (B, N, H_assistant)
    s = W t + b                                                                  (B, N, H_base)
    loss = NLL(response | prompt, s)          trained: W, b only

A step is forward and backward, without the optimizer, which is the same for all methods.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable

import datasets
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.benchmark import timer
from transformers import DynamicCache

from softcot_peft import compute_thoughts, use_thoughts
from softcot_peft.compat.caches import CACHE_NAME

from .models import IGNORED, Batch, M, Pair, attach, projection_of, twin

Step = Callable[[], Tensor]
Way = tuple[nn.Module, Step]  # what is trained, and its loss
Mark = Callable[[str], None]

SOFTCOT, PLAIN, FLOOR, AGAIN = "SoftCoT", "plain SoftCoT", "floor", "floor again"
PLAIN_PATH, CACHED, NO_ASSISTANT = "SoftCoT, plain path", "SoftCoT, cached thoughts", "floor without assistant"
PROMPT_TUNING, LORA, BASE = "prompt tuning", "LoRA", "base"
NEAR = (SOFTCOT, FLOOR, AGAIN, CACHED, NO_ASSISTANT)  # differ by a few percent
WHAT = {
    SOFTCOT: "the package, as `Trainer` calls it",
    PLAIN_PATH: "the package with two-pass training disabled",
    CACHED: "the package with precomputed thoughts",
    PLAIN: "the published equations: the assistant with its head and all hidden states, then one forward and backward "
    "of the base over prompt, thoughts and response",
    FLOOR: "the bare operations of a step, without other code: the assistant's backbone, the prompt without gradient "
    "into a cache, the projection, thoughts and response with gradient, and logits of the response only",
    AGAIN: "the floor measured a second time: its ratio to the floor is the noise of the run",
    NO_ASSISTANT: "the floor with precomputed hidden states",
    PROMPT_TUNING: "PEFT's implementation, with N virtual tokens",
    LORA: "PEFT's implementation, rank 16 in all linear layers",
    BASE: "the base alone: its loss, and the gradient with respect to its input embeddings",
}


def plain_loss(pair: Pair, base: nn.Module, projection: nn.Linear, batch: Batch) -> Tensor:
    """Compute the loss by the published equations, without optimizations.

    Args:
        pair: The models, of which only the assistant is used.
        base: The base.
        projection: W and b, float32.
        batch: Prompts and responses.
    """
    with torch.no_grad():
        read = pair.assistant(
            input_ids=batch.assistant_ids,
            attention_mask=batch.assistant_mask,
            position_ids=positions(batch.assistant_mask),
            output_hidden_states=True,
            use_cache=False,
        )
    hidden = read.hidden_states[-1][:, -batch.num_thoughts :]  # (B, N, H_assistant)
    embeddings = base.get_input_embeddings()(batch.placed_ids)
    thoughts = projection(hidden.float()).to(embeddings)  # (B, N, H_base)
    embeddings = embeddings.masked_scatter(batch.is_thought[..., None], thoughts)
    return base(inputs_embeds=embeddings, attention_mask=batch.placed_mask, labels=batch.placed_labels).loss


def floor_loss(
    pair: Pair, projection: nn.Linear, batch: Batch, hidden: Tensor | None = None, mark: Mark | None = None
) -> Tensor:
    """Compute the same loss with the fewest operations: gradient from the thoughts on, logits of the response only.

    Args:
        pair: Base and assistant.
        projection: W and b, float32.
        batch: Prompts and responses.
        hidden: The assistant's hidden states `(B, N, H_assistant)`; `None`: run the assistant.
        mark: Called with the name of each part when it is finished.
    """
    base, num = pair.base, batch.num_thoughts
    mark = mark or (lambda part: None)
    if hidden is None:
        hidden = assistant_states(pair, batch.assistant_ids, batch.assistant_mask, num)
    mark("assistant")
    cache = DynamicCache(config=base.config)
    with torch.no_grad():
        base.model(
            input_ids=batch.prompt,
            attention_mask=batch.prompt_mask,
            position_ids=positions(batch.prompt_mask),
            **{CACHE_NAME: cache},
        )
    mark("prompt")
    embedded = base.get_input_embeddings()(batch.response[:, :-1])  # nothing is predicted from the last token
    embeddings = torch.cat([projection(hidden.float()).to(embedded), embedded], 1)  # (B, N + R - 1, H_base)
    mask = torch.cat([batch.prompt_mask, batch.prompt_mask.new_ones(embeddings.shape[:2])], 1)
    states = base.model(
        inputs_embeds=embeddings,
        attention_mask=mask,
        position_ids=positions(mask)[:, -embeddings.shape[1] :],
        **{CACHE_NAME: cache},
    ).last_hidden_state[:, num - 1 :]  # (B, R, H_base)
    wanted = batch.response_labels != IGNORED
    loss = cross_entropy(base.lm_head(states[wanted]).float(), batch.response_labels[wanted])
    mark("thoughts and response, forward")
    return loss


@torch.no_grad()
def assistant_states(pair: Pair, ids: Tensor, mask: Tensor, num: int) -> Tensor:
    """Return the assistant's last hidden states at the last `num` positions of left-padded rows: `(B, num, H)`."""
    states = pair.assistant.model(input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False)
    return states.last_hidden_state[:, -num:]


def positions(mask: Tensor) -> Tensor:
    """Return position ids `(B, L)` that count attended tokens."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def backward(model: nn.Module, loss: Callable[[], Tensor]) -> Step:
    """Return a step that clears gradients, then runs forward and backward."""

    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        found = loss()
        found.backward()
        return found.detach()

    return step


def steps(pair: Pair, batch: Batch, only: tuple[str, ...] | None = None) -> dict[str, Step]:
    """Return the steps of all methods on one batch; arguments as those of `ways`."""
    return {name: backward(*way) for name, way in ways(pair, batch, only).items()}


def ways(pair: Pair, batch: Batch, only: tuple[str, ...] | None = None) -> dict[str, Way]:
    """Return what each method trains, and its loss on one batch, each with its own modules around shared weights.

    Args:
        pair: The models.
        batch: Prompts and responses.
        only: Names of the methods; `None`: all.
    """
    num, projection = batch.num_thoughts, projection_of(attach(pair, batch.num_thoughts))
    makers: dict[str, Callable[[], Way]] = {
        SOFTCOT: lambda: _called(attach(pair, num), batch),
        PLAIN: lambda: _plain(pair, projection, batch),
        FLOOR: lambda: _floor(pair, projection, batch),
        AGAIN: lambda: _floor(pair, projection, batch),
        NO_ASSISTANT: lambda: _floor(
            pair, projection, batch, assistant_states(pair, batch.assistant_ids, batch.assistant_mask, num)
        ),
        PROMPT_TUNING: lambda: _called(prompt_tuning(pair, num), batch),
        LORA: lambda: _called(lora(pair), batch),
        BASE: lambda: _base(pair, batch),
        CACHED: lambda: _called(cached(attach(pair, num), batch), batch),
        PLAIN_PATH: lambda: _called(attach(pair, num, two_pass_training=False), batch),
    }
    return {name: make() for name, make in makers.items() if only is None or name in only}


def lora(pair: Pair) -> PeftModel:
    """Return a twin of the base with PEFT's LoRA."""
    config = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
    return get_peft_model(twin(pair.base), config)


def prompt_tuning(pair: Pair, num: int) -> PeftModel:
    """Return a twin of the base with PEFT's prompt tuning and `num` virtual tokens."""
    return get_peft_model(twin(pair.base), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=num))


def cached(model: PeftModel, batch: Batch) -> PeftModel:
    """Let a model use precomputed thoughts of a batch from a file."""
    rows = datasets.Dataset.from_dict({name: rows.tolist() for name, rows in batch.rows.items()})
    with tempfile.TemporaryDirectory() as folder:  # the file is memory-mapped and stays readable
        file = f"{folder}/thoughts.arrow"
        use_thoughts(model, rows.map(compute_thoughts(model), batched=True, batch_size=16, cache_file_name=file))
    return model


def _called(model: nn.Module, batch: Batch) -> Way:
    model = training(model)
    return model, lambda: model(**batch.rows).loss


def _plain(pair: Pair, projection: nn.Linear, batch: Batch) -> Way:
    base = training(twin(pair.base))
    return projection, lambda: plain_loss(pair, base, projection, batch)


def _floor(pair: Pair, projection: nn.Linear, batch: Batch, hidden: Tensor | None = None) -> Way:
    return projection, lambda: floor_loss(pair, projection, batch, hidden)


def _base(pair: Pair, batch: Batch) -> Way:
    base = training(twin(pair.base))

    def loss() -> Tensor:
        embeddings = base.get_input_embeddings()(batch.rows["input_ids"]).requires_grad_()
        return base(inputs_embeds=embeddings, **{name: batch.rows[name] for name in ("attention_mask", "labels")}).loss

    return base, loss


def training(model: M) -> M:
    """Set a model up as in `Trainer`: training mode, and no cache in the config."""
    model.config.use_cache = False
    return model.train()


def floor_parts(pair: Pair, projection: nn.Linear, batch: Batch) -> dict[str, float]:
    """Measure the seconds of each part of one step of the floor."""
    parts, before = dict[str, float](), timer()

    def mark(part: str) -> None:
        nonlocal before
        now = timer()
        parts[part], before = now - before, now

    projection.zero_grad(set_to_none=True)
    floor_loss(pair, projection, batch, mark=mark).backward()
    mark("thoughts and response, backward")
    return parts
