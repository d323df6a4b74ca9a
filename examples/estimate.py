r"""Estimate what training and evaluating a pair takes, without loading it: parameters, memory, arithmetic, hours.

    python examples/estimate.py --gpu-tflops 989 --gpu-bandwidth 3350
    python examples/estimate.py --base my/base --assistant my/assistant --batch-size 8

The models are built from their configs on torch's meta device, which holds shapes and no numbers, and run there: what
they multiply and what they keep for the backward pass is counted, not guessed. Without `--base` the two pairs of the
SoftCoT paper are taken, whose shapes are written here. `--write` puts the table into `docs/recipes.md`.
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
)

PAGE = Path(__file__).parents[1] / "docs" / "recipes.md"
ROWS, TEST_ROWS = 7473, 1319  # of GSM8K
GB = 1e9


def llama(hidden: int, ffn: int, layers: int, kv: int, head: int, tied: bool) -> LlamaConfig:
    """A Llama 3 of some size: 32 heads, a vocabulary of 128,256."""
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
    """A Qwen2.5 of some size."""
    return Qwen2Config(
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
    )


# Base and assistant; the numbers are those of the published configs.
PAIRS: dict[str, tuple[PretrainedConfig, PretrainedConfig]] = {
    "Llama-3.1-8B + Llama-3.2-1B": (llama(4096, 14336, 32, 8, 128, False), llama(2048, 8192, 16, 8, 64, True)),
    "Qwen2.5-7B + Qwen2.5-1.5B": (
        qwen(3584, 18944, 28, 28, 4, 152064, False),
        qwen(1536, 8960, 28, 12, 2, 151936, True),
    ),
}


def on_meta(config: PretrainedConfig) -> PreTrainedModel:
    """A frozen model without weights, in bfloat16."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).requires_grad_(False).eval()


@dataclass(frozen=True)
class Pass:
    """What one run of a model takes.

    Args:
        forward: Floating-point operations; a multiplication with its addition counts as two.
        backward: The same, of the backward pass through frozen weights.
        saved: Bytes that are kept for the backward pass.
    """

    forward: int
    backward: int
    saved: int


def counted(work: Callable[[], Any]) -> tuple[Any, int]:
    """What a function gives, and its floating-point operations."""
    with FlopCounterMode(display=False) as counter:
        result = work()
    return result, counter.get_total_flops()


def run(model: PreTrainedModel, batch: int, length: int, trained: bool) -> Pass:
    """Run a model on meta tensors: with a loss and its gradient, or its backbone alone.

    Attention is counted in full, without what causality spares, and kept as fused kernels keep it: queries, keys,
    values and output; the meta device itself computes it in steps, whose products no GPU keeps.

    Args:
        model: On the meta device.
        batch: Rows.
        length: Tokens of a row.
        trained: With labels and gradient with respect to the input embeddings.
    """
    config, kept = model.config, {}
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    own = {weight.untyped_storage()._cdata for weight in model.parameters()}
    inputs = torch.empty(batch, length, config.hidden_size, dtype=model.dtype, device="meta", requires_grad=trained)
    # With a mask given, models look at no values, which the meta device does not have.
    mask = torch.zeros(1, 1, length, length, dtype=model.dtype, device="meta")

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        of_attention = tensor.shape[:1] == (batch * config.num_attention_heads,)  # as its products have them
        _, _, before = kept.get(storage._cdata, (0, tensor, storage._cdata in own))
        # The tensor is held, so that no other takes its place.
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
    """The figures of one pair, by what they are."""
    models = [on_meta(config) for config in (base, assistant)]
    sizes = [model.num_parameters() for model in models]
    weights = 2 * sum(sizes)
    projection = (assistant.hidden_size + 1) * base.hidden_size
    length = args.prompt + args.num_thoughts + args.response
    step = run(models[0], args.batch_size, length, trained=True)
    reading = run(models[1], args.batch_size, args.prompt + args.num_thoughts, trained=False)
    logits = args.batch_size * length * base.vocab_size * 8  # their bfloat16, and the gradient in float32 and bfloat16
    flops = step.forward + step.backward + reading.forward
    seconds = flops / (args.gpu_tflops * 1e12 * args.gpu_share)
    steps = args.epochs * ROWS / args.batch_size
    head = getattr(base, "head_dim", None) or base.hidden_size // base.num_attention_heads
    cache = 4 * base.num_hidden_layers * base.num_key_value_heads * head  # bytes of a token: keys and values
    whole = args.eval_batch_size * (args.prompt + args.inference_thoughts + args.new_tokens) * cache
    tokens = args.new_tokens * -(-TEST_ROWS // args.eval_batch_size)
    reads = (2 * sizes[0] + whole / 2) / (args.gpu_bandwidth * GB * args.gpu_share)
    return {
        "parameters, base + assistant": f"{sizes[0] / GB:.2f} B + {sizes[1] / GB:.2f} B",
        "trained": f"{projection / 1e6:.1f} M",
        "adapter file, float32": f"{4 * projection / 1e6:.0f} MB",
        "weights in bfloat16": f"{weights / GB:.1f} GB",
        "kept for the backward pass": f"{step.saved / GB:.1f} GB",
        "logits and their gradient": f"{logits / GB:.1f} GB",
        "training, in all": f"{(weights + step.saved + logits + 16 * projection) / GB:.0f} GB",
        "operations of a step": f"{flops / 1e12:.0f} TFLOP",
        "training": f"{steps:,.0f} steps, {seconds * steps / 3600:.1f} h",
        "evaluation, keys and values": f"{whole / GB:.1f} GB",
        "evaluation, in all": f"{(weights + whole) / GB:.0f} GB",
        "evaluation": f"{TEST_ROWS:,} problems, {tokens * reads / 60:.0f} min",
    }


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line. The defaults are the recipes' and an H100's."""
    parser = argparse.ArgumentParser(description="Estimate what a pair takes.")
    add = parser.add_argument
    add("--base", help="Hub id or folder of a config; without it, the pairs of the paper")
    add("--assistant", help="Hub id or folder of a config")
    add("--num-thoughts", type=int, default=32)
    add("--inference-thoughts", type=int, default=4)
    add("--batch-size", type=int, default=4)
    add("--eval-batch-size", type=int, default=32)
    add("--prompt", type=int, default=130, help="tokens of a prompt")
    add("--response", type=int, default=130, help="tokens of a response in training")
    add("--new-tokens", type=int, default=1024, help="tokens of an answer in evaluation, the most there can be")
    add("--epochs", type=float, default=10)
    add("--gpu-tflops", type=float, default=989.0, help="dense bfloat16, by the data sheet; default: H100 SXM")
    add("--gpu-bandwidth", type=float, default=3350.0, help="GB/s of memory, by the data sheet; default: H100 SXM")
    add("--gpu-share", type=float, default=0.4, help="how much of both is reached; an assumption")
    add("--write", action="store_true", help="put the table into docs/recipes.md")
    args = parser.parse_args(argv)
    if (args.base is None) != (args.assistant is None):
        raise ValueError(f"`--base` and `--assistant` go together, got {args.base!r} and {args.assistant!r}.")
    if args.base is not None:
        check_source("--base", args.base)
        check_source("--assistant", args.assistant)
    return args


def table(args: argparse.Namespace) -> str:
    """The figures of each pair, as Markdown."""
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
        f"new tokens. One GPU of {args.gpu_tflops:g} TFLOP/s and {args.gpu_bandwidth:g} GB/s, of which "
        f"{args.gpu_share:.0%} are reached."
    )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{assumed}"


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    args = parse_args(argv)
    text = table(args)
    print(text)
    if args.write:
        write_block(PAGE, "estimates", text)


if __name__ == "__main__":
    main()
