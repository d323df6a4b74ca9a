"""The recipes parse to the paper's values, and the estimates are what models really multiply and keep."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from project_files import EXAMPLES, load_example
from tiny_pair import Pair, make_base
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

estimate = load_example("estimate")
gsm8k = load_example("train_gsm8k")
problems = load_example("problems")
RECIPES = sorted((EXAMPLES / "recipes").glob("*.txt"))
FAMILIES = {  # assistant, thought token and markers
    "llama": ("Llama-3.2-1B", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"),
    "qwen2": ("Qwen2.5-1.5B", "<|endoftext|>", "<|box_start|>", "<|box_end|>"),
    "qwen3": ("Qwen3-0.6B", "<|endoftext|>", "<think>", "</think>"),
}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_the_papers(recipe: Path) -> None:
    args = gsm8k.parse_args([f"@{recipe}"])
    assert (args.num_thoughts, args.inference_thoughts, args.where) == (32, 4, "user_turn")
    assert (args.learning_rate, args.epochs, args.batch_size, args.bf16) == (2e-5, 10, 4, True)
    assert (args.warmup, args.schedule, args.max_steps, args.group_by_length) == (0, "linear", -1, False)
    assert (args.own_rationales, args.max_train_samples, args.validation_samples) == (False, None, 0)
    assert (args.temperature, args.top_p, args.max_new_tokens, args.seed) == (1, 1, 1024, 41)
    assistant, token, *_ = FAMILIES[recipe.stem[:5]]
    assert assistant in args.assistant
    assert args.thought_token == token
    assert args.assistant_thought_token == token
    assert args.assistant_reads == "question"
    assert args.no_thinking == (recipe.stem[:5] == "qwen3")


def test_there_are_three_recipes() -> None:
    assert [path.stem for path in RECIPES] == ["llama-3.1-8b", "qwen2.5-7b", "qwen3-8b"]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_thoughts_stand_between_the_family_s_markers(recipe: Path, pair: Pair, tmp_path: Path) -> None:
    """With a tokenizer that has the family's tokens."""
    _, token, begin, end = FAMILIES[recipe.stem[:5]]
    tokenizer = copy.deepcopy(pair.tokenizer)
    tokenizer.add_tokens([token, begin, end], special_tokens=True)
    tokenizer.save_pretrained(tmp_path)
    args = gsm8k.parse_args([f"@{recipe}", "--base", str(tmp_path)])
    config = gsm8k.make_config(args)
    written = gsm8k.load_tokenizer(args, config)
    ids = gsm8k.encode_prompt(written, "How many legs?", args.inference_thoughts)
    run = begin + token * args.inference_thoughts + end
    assert written.decode(ids) == (
        f"<|user|>{problems.prompt_text('How many legs?')}\n\n{gsm8k.INTRODUCTION}\n{run}<|end|><|assistant|>"
    )
    start = ids.index(written.convert_tokens_to_ids(begin))
    assert ids[start : start + 6] == written.convert_tokens_to_ids([begin, *[token] * 4, end])
    block = gsm8k.EMPTY_THINK_BLOCK if args.no_thinking else ""
    assert config.assistant_prefix == block + gsm8k.ASSISTANT_PREFIX
    assert "{num_thought_tokens}" in config.assistant_prompt
    assert config.assistant_prompt_between == list(gsm8k.DELIMITERS)


def test_later_options_win_and_unknown_ones_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gsm8k.parse_args([f"@{RECIPES[1]}", "--epochs", "1"]).epochs == 1
    bad = tmp_path / "bad.txt"
    bad.write_text("--base x\n--assistant y  # a comment\n--epoch-s 3\n")
    with pytest.raises(SystemExit):
        gsm8k.parse_args([f"@{bad}"])
    assert "--epoch-s" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("Llama-3.1-8B + Llama-3.2-1B", (8.03, 1.24)),
        ("Qwen2.5-7B + Qwen2.5-1.5B", (7.62, 1.54)),
        ("Qwen3-8B + Qwen3-0.6B", (8.19, 0.60)),
    ],
)
def test_parameters_are_the_published_ones(name: str, published: tuple[float, float]) -> None:
    found = [estimate.on_meta(config).num_parameters() / 1e9 for config in estimate.PAIRS[name]]
    assert found == pytest.approx(published, abs=0.006)


def config(**changes: int) -> LlamaConfig:
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "vocab_size": 500}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    return LlamaConfig(**(sizes | heads | changes))


def test_operations_are_those_of_a_model_with_weights() -> None:
    # The kernels of torch's own fused attention on CPUs are not counted.
    model = LlamaForCausalLM._from_config(config(), attn_implementation="eager").requires_grad_(False)
    inputs = torch.randn(2, 24, 64, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        output = model(inputs_embeds=inputs, labels=torch.zeros(2, 24, dtype=torch.long), use_cache=False)
    forward = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        output.loss.backward()
    found = estimate.run(estimate.on_meta(config()), 2, 24, trained=True)
    assert found.forward == pytest.approx(forward, rel=0.01)
    # fused attention computes its products once more in the backward pass
    assert found.backward == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_what_is_kept_is_what_a_model_with_weights_keeps() -> None:
    model = LlamaForCausalLM(config()).to(torch.bfloat16).requires_grad_(False)
    own, kept = {weight.untyped_storage().data_ptr() for weight in model.parameters()}, {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    inputs = torch.randn(2, 48, 64, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(inputs_embeds=inputs, labels=torch.zeros(2, 48, dtype=torch.long), use_cache=False)
    found = estimate.run(estimate.on_meta(config()), 2, 48, trained=True)
    assert found.saved == pytest.approx(sum(size for size, _ in kept.values()), rel=0.02)


def test_more_rows_take_more_in_proportion() -> None:
    model = estimate.on_meta(config())
    one, two = (estimate.run(model, batch, 24, trained=True) for batch in (1, 2))
    assert two.forward == 2 * one.forward
    assert two.saved == pytest.approx(2 * one.saved, rel=0.01)


def test_the_page_has_what_the_script_writes() -> None:
    assert estimate.table(estimate.parse_args([])) in estimate.PAGE.read_text(encoding="utf-8")


def test_configs_of_other_pairs_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_base(100).config.save_pretrained(tmp_path)
    estimate.main(["--base", str(tmp_path), "--assistant", str(tmp_path)])
    assert f"{tmp_path} + {tmp_path}" in capsys.readouterr().out
    with pytest.raises(ValueError, match="go together"):
        estimate.parse_args(["--base", "x"])


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_spell_out_what_differs_from_the_scripts_defaults(recipe: Path) -> None:
    """The script's defaults may change without changing a recipe."""
    text = recipe.read_text(encoding="utf-8")
    names = "num-thoughts inference-thoughts learning-rate warmup schedule epochs batch-size validation-samples"
    for name in (*names.split(), "no-own-rationales", "no-group-by-length", "max-new-tokens", "temperature", "seed"):
        assert re.search(rf"^--{name}\b", text, re.MULTILINE), name
