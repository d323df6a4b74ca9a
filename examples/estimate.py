r"""Estimate the parameters, memory, operations and hours to train and evaluate a pair, without loading it.

    python examples/estimate.py --gpu-tflops 989 --gpu-bandwidth 3350
    python examples/estimate.py --base my/base --assistant my/assistant --batch-size 8

The models are built from their configs on torch's meta device, which holds shapes but no values, and run there, so
multiplications and tensors saved for the backward pass are counted, not guessed. Without `--base`, the script uses the
three pairs of the recipes, whose shapes are defined here. `--write` updates the table in `docs/recipes.md`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from blocks import write_block
from sources import check_source
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

PAGE = Path(__file__).parents[1] / "docs" / "recipes.md"
ROWS, TEST_ROWS = 7473, 1319  # of GSM8K
GB = 1e9


def llama(hidden: int, ffn: int, layers: int, kv: int, head: int, tied: bool) -> LlamaConfig:
    """Return a Llama 3 config with 32 heads and a vocabulary of 128,256."""
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=kv,
        head_dim=head,
        vocab_size=128256,
        tie_word_embeddings=tied,
    )


def qwen(hidden: int, ffn: int, layers: int, heads: int, kv: int, vocabulary: int, tied: bool) -> Qwen2Config:
    """Return a Qwen2.5 config."""
    return Qwen2Config(
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
    )


def qwen3(hidden: int, ffn: int, layers: int, heads: int, tied: bool) -> Qwen3Config:
    """Return a Qwen3 config with 8 heads of keys and values, each 128 wide."""
    return Qwen3Config(
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        tie_word_embeddings=tied,
    )


# Base and assistant, with the values of the published configs.
PAIRS: dict[str, tuple[PretrainedConfig, PretrainedConfig]] = {
    "Llama-3.1-8B + Llama-3.2-1B": (llama(4096, 14336, 32, 8, 128, False), llama(2048, 8192, 16, 8, 64, True)),
    "Qwen2.5-7B + Qwen2.5-1.5B": (
        qwen(3584, 18944, 28, 28, 4, 152064, False),
        qwen(1536, 8960, 28, 12, 2, 151936, True),
    ),
    "Qwen3-8B + Qwen3-0.6B": (qwen3(4096, 12288, 36, 32, False), qwen3(1024, 3072, 28, 16, True)),
}


def on_meta(config: PretrainedConfig) -> PreTrainedModel:
    """Return a frozen bfloat16 model on the meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).requires_grad_(False).eval()


@dataclass(frozen=True)
class Pass:
    """Cost of one run of a model.

    Args:
        forward: Floating-point operations; a multiply-add counts as two.
        backward: Floating-point operations of the backward pass through frozen weights.
        saved: Bytes saved for the backward pass.
    """

    forward: int
    backward: int
    saved: int


def counted(work: Callable[[], Any]) -> tuple[Any, int]:
    """Return the result of a function and its floating-point operations."""
    with FlopCounterMode(display=False) as counter:
        result = work()
    return result, counter.get_total_flops()


def run(model: PreTrainedModel, batch: int, length: int, trained: bool) -> Pass:
    """Run a model on meta tensors, with loss and gradient, or the backbone only.

    Attention is counted in full, without the savings of the causal mask. Its saved tensors are those of fused kernels:
    queries, keys, values and output. The meta device itself computes attention in steps, whose products no GPU saves.

    Args:
        model: Model on the meta device.
        batch: Number of rows.
        length: Number of tokens per row.
        trained: Whether to compute a loss and its gradient with respect to the input embeddings.
    """
    config, kept = model.config, {}
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    own = {weight.untyped_storage()._cdata for weight in model.parameters()}
    inputs = torch.empty(batch, length, config.hidden_size, dtype=model.dtype, device="meta", requires_grad=trained)
    # With a mask, models do not read values, which the meta device does not have.
    mask = torch.zeros(1, 1, length, length, dtype=model.dtype, device="meta")

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        of_attention = tensor.shape[:1] == (batch * config.num_attention_heads,)  # shape of the products of attention
        _, _, before = kept.get(storage._cdata, (0, tensor, storage._cdata in own))
        # Keep a reference, so no other tensor reuses the storage.
        kept[storage._cdata] = (storage.nbytes(), tensor, before or of_attention)
        return tensor

    if not trained:
        _, forward = counted(lambda: model.base_model(inputs_embeds=inputs, attention_mask=mask, use_cache=False))
        return Pass(forward, 0, 0)
    labels = torch.zeros(batch, length, dtype=torch.long, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output, forward = counted(
            lambda: model(inputs_embeds=inputs, attention_mask=mask, labels=labels, use_cache=False)
        )
    _, backward = counted(output.loss.backward)
    widths = 2 * (config.num_attention_heads + config.num_key_value_heads) * head
    attention = 2 * batch * length * widths * config.num_hidden_layers
    return Pass(forward, backward, sum(size for size, _, elsewhere in kept.values() if not elsewhere) + attention)


def estimate(base: PretrainedConfig, assistant: PretrainedConfig, args: argparse.Namespace) -> dict[str, str]:
    """Return the estimates of one pair by name."""
    models = [on_meta(config) for config in (base, assistant)]
    sizes = [model.num_parameters() for model in models]
    weights = 2 * sum(sizes)
    projection = (assistant.hidden_size + 1) * base.hidden_size
    length = args.prompt + args.num_thoughts + args.response
    step = run(models[0], args.batch_size, length, trained=True)
    reading = run(models[1], args.batch_size, args.prompt + args.num_thoughts, trained=False)
    logits = args.batch_size * length * base.vocab_size * 8  # logits in bfloat16, gradient in float32 and bfloat16
    flops = step.forward + step.backward + reading.forward
    seconds = flops / (args.gpu_tflops * 1e12 * args.gpu_share)
    steps = args.epochs * ROWS / args.batch_size
    head = getattr(base, "head_dim", None) or base.hidden_size // base.num_attention_heads
    cache = 4 * base.num_hidden_layers * base.num_key_value_heads * head  # bytes per token: keys and values
    whole = args.eval_batch_size * (args.prompt + args.inference_thoughts + args.new_tokens) * cache
    tokens = args.new_tokens * -(-TEST_ROWS // args.eval_batch_size)
    reads = (2 * sizes[0] + whole / 2) / (args.gpu_bandwidth * GB * args.gpu_share)
    return {
        "parameters, base + assistant": f"{sizes[0] / GB:.2f} B + {sizes[1] / GB:.2f} B",
        "trained": f"{projection / 1e6:.1f} M",
        "adapter file, float32": f"{4 * projection / 1e6:.0f} MB",
        "weights in bfloat16": f"{weights / GB:.1f} GB",
        "saved for the backward pass": f"{step.saved / GB:.1f} GB",
        "logits and their gradient": f"{logits / GB:.1f} GB",
        "training, total": f"{(weights + step.saved + logits + 16 * projection) / GB:.0f} GB",
        "operations per step": f"{flops / 1e12:.0f} TFLOP",
        "training": f"{steps:,.0f} steps, {seconds * steps / 3600:.1f} h",
        "evaluation, KV cache": f"{whole / GB:.1f} GB",
        "evaluation, total": f"{(weights + whole) / GB:.0f} GB",
        "evaluation": f"{TEST_ROWS:,} problems, {tokens * reads / 60:.0f} min",
    }


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line. The defaults are those of the recipes and of an H100."""
    parser = argparse.ArgumentParser(description="Estimate the cost of training and evaluating a pair.")
    add = parser.add_argument
    add("--base", help="Hub id or folder of a config; without it, the pairs of the recipes")
    add("--assistant", help="Hub id or folder of a config")
    add("--num-thoughts", type=int, default=32)
    add("--inference-thoughts", type=int, default=4)
    add("--batch-size", type=int, default=4)
    add("--eval-batch-size", type=int, default=32)
    add("--prompt", type=int, default=130, help="tokens of a prompt")
    add("--response", type=int, default=130, help="tokens of a response in training")
    add("--new-tokens", type=int, default=1024, help="maximum number of tokens of an answer in evaluation")
    add("--epochs", type=float, default=10)
    add("--gpu-tflops", type=float, default=989.0, help="dense bfloat16, from the data sheet; default: H100 SXM")
    add(
        "--gpu-bandwidth",
        type=float,
        default=3350.0,
        help="memory bandwidth in GB/s, from the data sheet; default: H100 SXM",
    )
    add("--gpu-share", type=float, default=0.4, help="assumed utilization of both")
    add("--write", action="store_true", help="update the table in docs/recipes.md")
    args = parser.parse_args(argv)
    if (args.base is None) != (args.assistant is None):
        raise ValueError(f"`--base` and `--assistant` go together, got {args.base!r} and {args.assistant!r}.")
    if args.base is not None:
        check_source("--base", args.base)
        check_source("--assistant", args.assistant)
    return args


def table(args: argparse.Namespace) -> str:
    """Return the estimates of each pair as a Markdown table."""
    pairs = PAIRS
    if args.base is not None:
        names = (args.base, args.assistant)
        pairs = {" + ".join(names): tuple(AutoConfig.from_pretrained(name) for name in names)}
    columns = {name: estimate(*configs, args) for name, configs in pairs.items()}
    lines = [["", *columns], ["---"] * (len(columns) + 1)]
    lines += [[row, *(column[row] for column in columns.values())] for row in next(iter(columns.values()))]
    assumed = (
        f"Batches of {args.batch_size} rows with {args.prompt} tokens of prompt, {args.num_thoughts} thoughts and "
        f"{args.response} tokens of response; evaluation in batches of {args.eval_batch_size} with {args.new_tokens} "
        f"new tokens. One GPU of {args.gpu_tflops:g} TFLOP/s and {args.gpu_bandwidth:g} GB/s at "
        f"{args.gpu_share:.0%} utilization."
    )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{assumed}"


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table, and update the page with `--write`."""
    args = parse_args(argv)
    text = table(args)
    print(text)
    if args.write:
        write_block(PAGE, "estimates", text)


if __name__ == "__main__":
    main()
