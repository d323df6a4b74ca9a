r"""Converts published SoftCoT weights to adapters and back.

    python -m softcot_peft.convert projection.bin --base Qwen/Qwen2.5-7B-Instruct \
        --assistant Qwen/Qwen2.5-1.5B-Instruct --num-thought-tokens 32 --output my-adapter
    python -m softcot_peft.convert my-adapter --back --output projection.bin

A published file is a pickled state dict: `weight` `(H_base, H_assistant)` and `bias` `(H_base,)`, mostly in bfloat16,
in SoftCoT++ also `embedding` `(K, H_embedding)`, what stands at the assistant's thought positions in each chain; or
(Self-SoftCoT) `0.weight`, `0.bias` and so on, a map for each position. It has neither N nor names of models.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from ._version import __version__
from .checkpoint.untrusted import meta_model, read_config
from .compat.models import states_width
from .config import SoftCoTConfig
from .sources.find_assistant import find_assistant


def convert(
    path: str | Path,
    output: str | Path,
    *,
    base: str,
    assistant: str | None = None,
    num_thought_tokens: int | None = None,
    **fields: Any,
) -> SoftCoTConfig:
    """Convert a published file of weights to an adapter. Reads no code from the file.

    Args:
        path: The published file.
        output: Folder of the adapter; made if needed.
        base: Hub id or folder of the base.
        assistant: Hub id or folder of the assistant. `None`: the base reads for itself (Self-SoftCoT).
        num_thought_tokens: N, which the file does not say. `None`: the number of its maps.
        **fields: Further fields of [`SoftCoTConfig`], such as `thought_token` and `placement`.

    Returns:
        The adapter's config, as saved. Weights are float32, with the values of the file.

    Raises:
        ValueError: The file holds other tensors or sizes than those of the pair, or something is missing.

    Example:
        ```python
        import torch
        from softcot_peft.convert import convert

        torch.save({"weight": torch.zeros(32, 24), "bias": torch.zeros(32)}, "path/to/projection.bin")
        convert(
            "path/to/projection.bin",
            "path/to/adapter",
            base="path/to/base",
            assistant="path/to/assistant",
            num_thought_tokens=4,
        )
        ```
    """
    tensors, maps = _read(path)
    chains = tensors.pop("embedding", None)
    if maps and num_thought_tokens not in (None, maps):
        raise ValueError(
            f"`num_thought_tokens` must be the number of maps in {str(path)!r}, {maps}, got {num_thought_tokens}."
        )
    if not maps and num_thought_tokens is None:
        raise ValueError(
            f"`num_thought_tokens` must be given: {str(path)!r} does not say how many thoughts it was trained with."
        )
    place, sizes = _inspect(base, assistant)
    if chains is not None:
        fields = _chain_fields(chains, assistant) | fields
    if tuple(tensors["weight"].shape[-2:]) != sizes:
        found = tuple(tensors["weight"].shape[-2:])
        raise ValueError(
            f"`base` and `assistant` must be those of the file, whose maps go from {found[1]} to {found[0]}, got "
            f"models with {sizes[1]} and {sizes[0]}. Name the pair that the weights were trained for."
        )
    source = {"thought_source": "base"} if assistant is None else {"assistant_model_name_or_path": assistant}
    projection = {"projection": "per_position"} if maps else {}
    config = SoftCoTConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        num_thought_tokens=maps or int(num_thought_tokens or 0),
        base_hidden_size=sizes[0],
        assistant_hidden_size=None if assistant is None else sizes[1],
        softcot_peft_version=__version__,
        inference_mode=True,
        **(source | projection | fields),
    )
    Path(output).mkdir(parents=True, exist_ok=True)
    weights = {f"base_model.model.{place}.softcot_projection.{name}": tensor for name, tensor in tensors.items()}
    if chains is not None:
        weights[f"base_model.model.{place}.softcot_chains.weight"] = chains
    save_file(weights, Path(output, SAFETENSORS_WEIGHTS_NAME), metadata={"format": "pt"})
    config.save_pretrained(str(output))
    return config


def convert_back(adapter: str | Path, path: str | Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write an adapter's projection, and its chains if it has any, in the published form.

    Args:
        adapter: Folder of the adapter, with a projection `"linear"` or `"per_position"`.
        path: The file to write.
        dtype: Of the tensors written; bfloat16 is usual there.

    Raises:
        ValueError: The adapter has another projection.
    """
    stored = load_file(Path(adapter, SAFETENSORS_WEIGHTS_NAME))
    tensors = {name.rpartition(".softcot_projection.")[2]: tensor.to(dtype) for name, tensor in stored.items()}
    chains = [tensors.pop(name) for name in list(tensors) if name.endswith(".softcot_chains.weight")]
    config: Any = SoftCoTConfig.from_pretrained(str(adapter))
    if config.chain_init == "fixed" and config.chain_token_ids:  # not in the file: they are the assistant's
        assistant = find_assistant(str(config.assistant_model_name_or_path), config.assistant_revision)
        chains = [assistant.embeddings(torch.tensor(config.chain_token_ids), torch.device("cpu")).to(dtype)]
    if set(tensors) != {"weight", "bias"}:
        raise ValueError(
            f"`adapter` must have a linear projection, or one for each position, got the tensors {sorted(tensors)}. "
            "The published form has no others."
        )
    if tensors["weight"].dim() == 3:
        pairs = enumerate(zip(tensors["weight"], tensors["bias"], strict=True))
        tensors = {f"{i}.{n}": t.clone() for i, pair in pairs for n, t in zip(("weight", "bias"), pair, strict=True)}
    if chains:
        tensors["embedding"] = chains[0]
    torch.save(tensors, path)


def _chain_fields(chains: Tensor, assistant: str | None) -> dict[str, Any]:
    """Return the fields of an adapter with the chains of a published file, `(K, H_embedding)`.

    Raises:
        ValueError: There is no assistant, or its embeddings have another width.
    """
    width = None if assistant is None else find_assistant(assistant).embedding_size
    if chains.shape[1] != width:
        raise ValueError(
            f"`assistant` must be that of the file, whose `embedding` is {chains.shape[1]} wide, got "
            + ("none" if width is None else f"one with embeddings of {width}")
            + ". Name the assistant that the weights were trained with."
        )
    return {"num_chains": len(chains), "chain_init": "trained"}


def _inspect(base: str, assistant: str | None) -> tuple[str, tuple[int, int]]:
    """Return the name of the base's input embedding, and H_base and H_source, without loading weights."""
    with meta_model():
        model = AutoModelForCausalLM.from_config(read_config(base, None), trust_remote_code=False)
    embedding: Any = model.get_input_embeddings()
    place = next(name for name, module in model.named_modules() if module is embedding)
    width = states_width(model) if assistant is None else find_assistant(assistant).hidden_size
    return place, (int(embedding.embedding_dim), width)


def _read(path: str | Path) -> tuple[dict[str, Tensor], int]:
    """Return weight `(..., H_base, H_source)` and bias `(..., H_base)` in float32, and the number of maps; 0: one."""
    found: Mapping[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    names = set(found) if isinstance(found, Mapping) else set()
    if names in ({"weight", "bias"}, {"weight", "bias", "embedding"}):
        tensors, maps = dict(found), 0
    else:
        maps = len(names) // 2
        if not maps or names != {f"{i}.{name}" for i in range(maps) for name in ("weight", "bias")}:
            raise ValueError(
                f"{str(path)!r} must hold `weight` and `bias`, with `embedding` in SoftCoT++, or `0.weight`, `0.bias` "
                f"and so on, got {sorted(names)[:6]}."
            )
        tensors = {name: torch.stack([found[f"{i}.{name}"] for i in range(maps)]) for name in ("weight", "bias")}
    weight, bias = tensors["weight"], tensors["bias"]
    if weight.dim() != 2 + bool(maps) or weight.shape[:-1] != bias.shape or not weight.is_floating_point():
        raise ValueError(
            f"{str(path)!r} must hold matrices with a bias for each row, got {tuple(weight.shape)} and "
            f"{tuple(bias.shape)}, {weight.dtype}."
        )
    chains = tensors.get("embedding")
    if chains is not None and (chains.dim() != 2 or not chains.is_floating_point()):
        raise ValueError(
            f"{str(path)!r} must hold `embedding` with a vector for each chain, got {tuple(chains.shape)}, "
            f"{chains.dtype}."
        )
    return {name: tensor.float().contiguous() for name, tensor in tensors.items()}, maps


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, and convert."""
    parser = argparse.ArgumentParser(prog="python -m softcot_peft.convert", description="Convert published weights.")
    add = parser.add_argument
    add("source", help="published file, or with --back the folder of an adapter")
    add("--output", required=True, help="folder of the adapter, or with --back the file to write")
    add("--back", action="store_true", help="from an adapter to the published form")
    add("--base", help="Hub id or folder of the base")
    add("--assistant", help="Hub id or folder of the assistant; without it, the base reads for itself")
    add("--num-thought-tokens", type=int, help="N, which the file does not say")
    add("--thought-token", help="token that marks thought positions in prompts")
    add("--placement", choices=("prompt_end", "thought_token"), default="prompt_end")
    args = parser.parse_args(argv)
    if args.back:
        convert_back(args.source, args.output)
        return
    if args.base is None:
        parser.error("`--base` must be given: the file does not name it.")
    options = {"thought_token": args.thought_token, "placement": args.placement}
    pair = {"base": args.base, "assistant": args.assistant, "num_thought_tokens": args.num_thought_tokens}
    convert(args.source, args.output, **pair, **options)


if __name__ == "__main__":
    main()
