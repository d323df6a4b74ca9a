"""Finds bases that cannot be fed by embeddings, since they read the ids of tokens in another place as well.

Some look up a second table (embeddings for each layer), some take the ids apart (bytes, hashes), and some search the
table for the ids of the embeddings they get, which soft thoughts have none of. No config tells, so it is tried, once
for each base.
"""

from __future__ import annotations

import warnings
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..compat.eval_mode import evaluating
from ..compat.models import embedding_width, ordinary_token
from ..embedding import Writing
from ..passes.host import Host
from ..passes.interface import Pass

_COLUMNS = 16  # tokens before the thoughts in the row that is tried
_DIFFERENCE = 1e-2  # relative; the two ways make the same tensors, so that most bases agree to the bit

_tried: WeakSet[nn.Module] = WeakSet()  # bases that can be fed


@torch.no_grad()
def check_feeding(host: Host, input_ids: Tensor, embeds: Tensor, start: int, states: Tensor) -> None:
    """Run a row of the base on ids, where its wrapped embedding writes the thoughts, and on embeddings, once.

    Args:
        host: The host of the base.
        input_ids: A row `(1, L)` with any ids at thought positions.
        embeds: Its embeddings, `(1, L, H)`.
        start: Column of its first thought.
        states: The source's states for it, `(1, 1, N, H_source)`.

    Raises:
        ValueError: The results differ, or the base does not run on embeddings.
    """
    if host.model in _tried:
        return
    source, first, end = host.layer.active_source(), max(start - _COLUMNS, 0), start + states.shape[2]
    if source is None:
        return
    by_ids, by_embeds = Pass(host, source), Pass(host, source)
    ids = input_ids[:, first:end]
    by_ids.writing = Writing(host.layer, states, torch.tensor([start - first], device=ids.device), ids.shape)
    with evaluating(host.model):
        expected = _logits(by_ids, {"input_ids": ids})
        by_ids.check_written()
        try:
            found = _logits(by_embeds, {"inputs_embeds": embeds[:, first:end]})
        except Exception as error:  # models fail in many ways without ids
            raise ValueError(_message(host.model, f"it fails without ids: {error}")) from error
    if ((found - expected).norm(dim=-1) > _DIFFERENCE * expected.norm(dim=-1)).any():
        raise ValueError(_message(host.model, "its logits differ"))
    _tried.add(host.model)


def _logits(by: Pass, inputs: dict[str, Any]) -> Tensor:
    logits: Tensor = by.run({**inputs, "use_cache": False, "return_dict": True}).logits
    return logits.float()


@torch.no_grad()
def check_structure(model: PreTrainedModel, embedding: nn.Module) -> None:
    """The same for a base on the meta device, whose layers have no values: which modules run must be the same.

    Args:
        model: The base, without an adapter, all of it on the meta device.
        embedding: Its input embedding.

    Warns:
        UserWarning: The base does not run on the meta device.

    Raises:
        ValueError: Modules beside the input embedding run only if there are ids, or the base does not run on
            embeddings.
    """
    ids = torch.full((1, _COLUMNS), ordinary_token(model), device="meta")
    try:
        by_ids = _modules_run(model, {"input_ids": ids})
    except Exception:  # an operation needs values, such as a search for padding
        warnings.warn(
            f"Whether {type(model).__name__} computes the same from embeddings as from ids cannot be tried without "
            "its weights. Load it once and call `prompt_embeds` with it, which tries it.",
            stacklevel=2,
        )
        _tried.add(model)
        return
    embeds = torch.empty(1, _COLUMNS, embedding_width(embedding), dtype=model.dtype, device="meta")
    try:
        by_embeds = _modules_run(model, {"inputs_embeds": embeds})
    except Exception as error:  # models fail in many ways without ids
        raise ValueError(_message(model, f"it fails without ids: {error}")) from error
    own = set(embedding.modules())
    others = [name for name, module in model.named_modules() if module in by_ids - by_embeds - own]
    if others:
        raise ValueError(_message(model, f"only ids reach its {others[-1]!r}"))
    _tried.add(model)


def _modules_run(model: PreTrainedModel, inputs: dict[str, Tensor]) -> set[nn.Module]:
    """Return the modules that run in a pass. With a cache, as packed rows are looked for by value without one."""
    found: set[nn.Module] = set()
    handles = [module.register_forward_pre_hook(lambda module, args: found.add(module)) for module in model.modules()]
    try:
        with evaluating(model):
            model(**inputs, use_cache=True)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _message(model: PreTrainedModel, reason: str) -> str:
    return (
        f"The base must compute the same from embeddings as from ids to be run by another engine, but "
        f"{type(model).__name__} reads ids as well: {reason}. Use `generate` for this base, or choose another one."
    )
