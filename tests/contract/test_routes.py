"""Every route from a saved adapter to a model is the same function: same tokens, same loss."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from batches import up_to_eos
from helpers import assistant_passes, in_training, projection_of
from oracle import Oracle
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model
from saved_adapters import (
    CHATS,
    NEW,
    PAD,
    PROMPTS,
    N,
    Saved,
    SavedChat,
    check_projection_alone,
    projection_in,
    written,
)
from tiny_pair import Pair
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

# Routes from a saved folder to a model


def from_peft(pair: Pair, folder: Path) -> nn.Module:
    return PeftModel.from_pretrained(pair.load_base(), folder).eval()


def from_peft_low_memory(pair: Pair, folder: Path) -> nn.Module:
    return PeftModel.from_pretrained(pair.load_base(), folder, low_cpu_mem_usage=True).eval()


def from_auto_peft(pair: Pair, folder: Path) -> nn.Module:
    return AutoPeftModelForCausalLM.from_pretrained(folder).eval()


def from_load_adapter(pair: Pair, folder: Path) -> nn.Module:
    base = pair.load_base()
    base.load_adapter(str(folder))
    return base


def from_auto_model(pair: Pair, folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder)


def from_second_adapter(pair: Pair, folder: Path) -> nn.Module:
    torch.manual_seed(7)
    model = get_peft_model(pair.load_base(), pair.config(num_thought_tokens=2))
    model.load_adapter(folder, adapter_name="second")
    model.set_adapter("second")
    return model.eval()


def from_injection(pair: Pair, folder: Path) -> nn.Module:
    base = inject_adapter_in_model(PeftConfig.from_pretrained(folder), pair.load_base())
    weights = {f"model.embed_tokens.{name}": value for name, value in projection_in(folder).items()}
    renamed = {name.replace("projection.", "projection.default."): value for name, value in weights.items()}
    assert not base.load_state_dict(renamed, strict=False).unexpected_keys
    return base


Route = Callable[[Pair, Path], nn.Module]
ROUTES: list[Route] = [
    from_peft,
    from_peft_low_memory,
    from_auto_peft,
    from_load_adapter,
    from_auto_model,
    from_second_adapter,
    from_injection,
]
PIPELINE_ROUTES: list[Route] = [from_peft, from_load_adapter]


def name_of(route: object) -> str:
    return getattr(route, "__name__", str(route))


@pytest.mark.parametrize("route", ROUTES, ids=name_of)
def test_route_generates_the_oracles_tokens(route: Route, pair: Pair, saved: Saved) -> None:
    model = route(pair, saved.folder)
    with assistant_passes(model, in_training, adapter=None) as passes:
        singles = [written(model, pair.batch([text]))[0] for text in PROMPTS]
        assert singles == saved.plain
        for side in ("left", "right"):
            assert written(model, pair.batch(PROMPTS, side)) == saved.plain
    assert passes == [False] * (len(PROMPTS) + 2)  # one per call of `generate`, none while decoding


@pytest.mark.parametrize("route", ROUTES, ids=name_of)
def test_route_gives_the_oracles_loss_and_logits(route: Route, pair: Pair, saved: Saved) -> None:
    model = route(pair, saved.folder)
    [prompt, response] = pair.rows([PROMPTS[0], " Twenty eight."])
    ids = torch.tensor([prompt + response])
    labels = torch.tensor([[-100] * len(prompt) + response])
    with torch.no_grad():
        output = model(input_ids=ids, labels=labels)
        rows = saved.oracle.logits(prompt, response)
        loss = saved.oracle.loss(prompt, response)
    torch.testing.assert_close(output.loss, loss, atol=1e-5, rtol=0)
    users = torch.cat([rows[: len(prompt) - 1], rows[len(prompt) - 1 + N :]])
    torch.testing.assert_close(output.logits[0], users, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("route", ROUTES, ids=name_of)
def test_route_to_chat_prompts_generates_the_oracles_tokens(route: Route, pair: Pair, chat: SavedChat) -> None:
    model = route(pair, chat.folder)
    tokenizer = AutoTokenizer.from_pretrained(chat.folder)
    arguments = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
    for messages, expected, prompt in zip(CHATS, chat.expected, chat.prompts, strict=True):
        inputs = dict(tokenizer.apply_chat_template(messages, **arguments))
        assert inputs["input_ids"].tolist() == [prompt]
        assert written(model, inputs) == [expected]
    batch = dict(tokenizer.apply_chat_template(CHATS, padding=True, **arguments))
    assert written(model, batch) == chat.expected


@pytest.fixture(scope="module")
def half(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> tuple[Pair, Path, list[list[int]]]:
    """The pair with a bfloat16 base, an adapter saved from it, and the tokens it generated before that."""
    root = tmp_path_factory.mktemp("half")
    pair.load_base().to(torch.bfloat16).save_pretrained(root / "base")
    pair.tokenizer.save_pretrained(root / "base")
    half = replace(pair, base=root / "base")
    model = half.model()
    model.save_pretrained(root / "adapter")
    return half, root / "adapter", written(model, pair.batch(PROMPTS))


@pytest.mark.parametrize(
    "route",
    ROUTES,
    ids=[name_of(route) for route in ROUTES],
)
def test_route_to_a_bfloat16_base_keeps_the_saved_bits(route: Route, half: tuple[Pair, Path, list[list[int]]]) -> None:
    pair, folder, expected = half
    model = route(pair, folder)
    layer = model.get_input_embeddings()
    assert layer.weight.dtype == torch.bfloat16
    loaded = projection_of(model, layer.active_adapters[0]).state_dict()
    for name, tensor in projection_in(folder).items():
        assert tensor.dtype == torch.float32
        assert torch.equal(loaded[name.split(".")[-1]], tensor)
    assert written(model, pair.batch(PROMPTS)) == expected


# Pipelines


def pipeline_tokens(outputs: list[list[dict[str, list[int]]]], prompts: list[list[int]]) -> list[list[int]]:
    """New ids from a pipeline's `return_tensors=True`, its prompts checked."""
    rows = []
    for [output], prompt in zip(outputs, prompts, strict=True):
        ids = output["generated_token_ids"]
        padding = next(column for column, token in enumerate(ids) if token != PAD)
        assert ids[padding : padding + len(prompt)] == prompt
        rows += up_to_eos([ids[padding + len(prompt) :]])
    return rows


def check_pipeline(generator: Callable[..., object], inputs: list, prompts: list, expected: list, pair: Pair) -> None:
    """One by one, as a list, in batches; tokens and text."""
    arguments = {"max_new_tokens": NEW, "do_sample": False}
    for batch_size in (1, 2):
        tokens = generator(inputs, return_tensors=True, batch_size=batch_size, **arguments)
        assert pipeline_tokens(tokens, prompts) == expected
    texts = generator(inputs, return_full_text=False, batch_size=2, **arguments)
    expected_texts = [pair.tokenizer.decode(row, skip_special_tokens=True) for row in expected]
    assert [output["generated_text"] for [output] in texts] == expected_texts
    [single] = generator(inputs[0], return_full_text=False, **arguments)
    assert single["generated_text"] == expected_texts[0]


@pytest.mark.parametrize("route", PIPELINE_ROUTES, ids=name_of)
def test_pipeline_over_a_model_generates_the_oracles_tokens(route: Route, pair: Pair, saved: Saved) -> None:
    generator = pipeline("text-generation", model=route(pair, saved.folder), tokenizer=pair.tokenizer)
    check_pipeline(generator, PROMPTS, pair.rows(PROMPTS), saved.plain, pair)


def test_pipeline_over_the_adapters_folder_generates_the_oracles_tokens(pair: Pair, saved: Saved) -> None:
    generator = pipeline("text-generation", model=str(saved.folder), tokenizer=pair.tokenizer)
    check_pipeline(generator, PROMPTS, pair.rows(PROMPTS), saved.plain, pair)


@pytest.mark.parametrize("route", PIPELINE_ROUTES, ids=name_of)
def test_pipeline_over_a_model_places_thoughts_in_chats(route: Route, pair: Pair, chat: SavedChat) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chat.folder)
    generator = pipeline("text-generation", model=route(pair, chat.folder), tokenizer=tokenizer)
    check_pipeline(generator, CHATS, chat.prompts, chat.expected, pair)


def test_pipeline_over_the_adapters_folder_and_its_tokenizer_places_thoughts_in_chats(
    pair: Pair, chat: SavedChat
) -> None:
    generator = pipeline("text-generation", model=str(chat.folder), tokenizer=str(chat.folder))
    check_pipeline(generator, CHATS, chat.prompts, chat.expected, pair)
    [conversation] = generator(CHATS[1], max_new_tokens=NEW, do_sample=False)
    answer = pair.tokenizer.decode(chat.expected[1], skip_special_tokens=True)
    assert conversation["generated_text"] == [*CHATS[1], {"role": "assistant", "content": answer}]


def test_pipeline_without_the_adapters_tokenizer_never_answers_without_thoughts(chat: SavedChat) -> None:
    generator = pipeline("text-generation", model=str(chat.folder))  # transformers 5.23 takes the base's tokenizer
    with pytest.raises(ValueError, match="every prompt must hold a run of `thought_token`"):
        generator(CHATS[0], max_new_tokens=NEW, do_sample=False)


def test_pipeline_places_thoughts_after_the_generation_prompt_without_a_run(pair: Pair, saved: Saved) -> None:
    prompts = pair.rows([f"<|user|>{text}<|end|><|assistant|>" for text in PROMPTS])
    expected = [saved.oracle.generate(row, NEW) for row in prompts]
    chats = [[{"role": "user", "content": text}] for text in PROMPTS]
    generator = pipeline("text-generation", model=str(saved.folder), tokenizer=pair.tokenizer)
    check_pipeline(generator, chats, prompts, expected, pair)


# Other ways to attach and to save


def test_adapter_added_and_saved_with_transformers_is_the_same(pair: Pair, saved: Saved, tmp_path: Path) -> None:
    base = pair.load_base()
    torch.manual_seed(0)  # the fixture's weights
    base.add_adapter(pair.config())
    assert written(base, pair.batch(PROMPTS)) == saved.plain
    base.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.glob("*.safetensors")} == {"adapter_model.safetensors"}
    check_projection_alone(tmp_path)
    for route in (from_peft, from_load_adapter, from_auto_model):
        assert written(route(pair, tmp_path), pair.batch(PROMPTS)) == saved.plain


def test_named_adapters_live_in_subfolders(pair: Pair, saved: Saved, tmp_path: Path) -> None:
    model = pair.model()
    torch.manual_seed(1)
    model.add_adapter("other", pair.config(num_thought_tokens=3))
    model.set_adapter("other")
    projection = projection_of(model, "other")
    other = Oracle(pair.base, pair.assistant, projection.weight.detach(), projection.bias.detach(), 3)
    expected = [other.generate(row, NEW) for row in pair.rows(PROMPTS)]
    assert expected != saved.plain
    assert written(model, pair.batch(PROMPTS)) == expected
    model.save_pretrained(tmp_path)
    check_projection_alone(tmp_path)
    check_projection_alone(tmp_path / "other")

    loaded = PeftModel.from_pretrained(pair.load_base(), tmp_path, subfolder="other").eval()
    assert written(loaded, pair.batch(PROMPTS)) == expected
    base = pair.load_base()
    base.load_adapter(str(tmp_path))
    base.load_adapter(str(tmp_path), adapter_name="other", adapter_kwargs={"subfolder": "other"})
    base.set_adapter("other")
    assert written(base, pair.batch(PROMPTS)) == expected
    base.set_adapter("default")
    assert written(base, pair.batch(PROMPTS)) == saved.plain
    assert written(from_auto_model(pair, tmp_path / "other"), pair.batch(PROMPTS)) == expected


def test_saving_what_was_loaded_writes_the_same_adapter(pair: Pair, saved: Saved, tmp_path: Path) -> None:
    for route in (from_peft, from_auto_peft, from_load_adapter):
        folder = tmp_path / name_of(route)
        route(pair, saved.folder).save_pretrained(folder)
        again, first = projection_in(folder), projection_in(saved.folder)
        assert again.keys() == first.keys()
        assert all(torch.equal(again[name], first[name]) for name in first)
        configs = [json.loads((path / "adapter_config.json").read_text()) for path in (folder, saved.folder)]
        assert configs[0] == configs[1]


# What is saved
