"""What the extensions cost: a base that reads for itself, and several chains."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from softcot_peft import SoftCoTConfig

from . import rivals
from .models import FIRST, Batch, Pair, as_loaded, attach, twin

CHAINS = 4
SOFTCOT, OWN, OWN_CACHED = rivals.SOFTCOT, "base as source", "base as source, cached thoughts"
TRAINED, FIXED = f"{CHAINS} chains, trained embeddings", f"{CHAINS} chains, fixed embeddings"
SAMPLES = f"SoftCoT, {CHAINS} samples"
LONGER, LONGER_AGAIN = "base on prompt and N more tokens", "the same again"


def own_source(pair: Pair, num_thoughts: int) -> PeftModel:
    """Attach SoftCoT to a twin of the base, which reads for itself; in eval mode."""
    torch.manual_seed(0)
    config = SoftCoTConfig(task_type="CAUSAL_LM", thought_source="base", num_thought_tokens=num_thoughts)
    return get_peft_model(twin(pair.base), config).eval()


def models(pair: Pair, num_thoughts: int) -> dict[str, PeftModel]:
    """Return a model of each kind, around the same weights."""
    chains = {TRAINED: "trained", FIXED: "fixed"}
    return {
        SOFTCOT: attach(pair, num_thoughts),
        OWN: own_source(pair, num_thoughts),
        **{name: attach(pair, num_thoughts, num_chains=CHAINS, chain_init=kind) for name, kind in chains.items()},
    }


def steps(pair: Pair, batch: Batch) -> dict[str, Callable[[], Tensor]]:
    """Return a training step of each kind."""
    found = {name: rivals.training(model) for name, model in models(pair, batch.num_thoughts).items()}
    found[OWN_CACHED] = rivals.cached(rivals.training(own_source(pair, batch.num_thoughts)), batch)

    def loss(model: nn.Module) -> Tensor:
        computed: Tensor = model(**batch.rows).loss
        return computed

    return {name: rivals.backward(model, partial(loss, model)) for name, model in found.items()}


def answers(pair: Pair, batch: Batch, new_tokens: int) -> dict[str, Callable[[], Tensor]]:
    """Return functions that answer a batch of prompts with exactly `new_tokens` tokens.

    With several chains, or several samples of plain SoftCoT, each prompt has `CHAINS` answers.
    """
    ids, mask, num = batch.prompt, batch.prompt_mask, batch.num_thoughts
    options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    generator = torch.Generator().manual_seed(1)
    more = torch.randint(FIRST, pair.base.config.vocab_size, (len(ids), num), generator=generator).to(ids.device)
    longer = torch.cat([ids, more], 1), torch.cat([mask, torch.ones_like(more)], 1)

    def ask(model: nn.Module, ids: Tensor, mask: Tensor, **settings: Any) -> Tensor:
        answered: Tensor = model.generate(input_ids=ids, attention_mask=mask, **options, **settings)
        return answered

    greedy = {"do_sample": False}
    found = {name: partial(ask, model, ids, mask, **greedy) for name, model in models(pair, num).items()}
    plain = attach(pair, num)
    found[SAMPLES] = partial(ask, plain, ids, mask, do_sample=True, top_k=0, num_return_sequences=CHAINS)
    return found | {name: partial(ask, as_loaded(pair.base), *longer, **greedy) for name in (LONGER, LONGER_AGAIN)}
