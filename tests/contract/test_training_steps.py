"""Habits of real users that once gave a wrong answer, loss or gradient without a word; a section for each.

Loading (wrapped parts of a base), placing (several turns, rows without labels, sampled thought tokens), scoring in
both modes, and training steps whose shortcuts must be the plain step.
"""

from __future__ import annotations

import copy
import functools
import logging
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import cache_length, find_cache, generated, gradients, head_is_last
from oracle import Oracle
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_pair import Pair, make_base
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM, LlamaForCausalLM

from softcot_peft import SoftCoTConfig

PROMPT, ANSWER, LATER = "What is nine less four?", " five", " five, as I said"
THOUGHT = "<thought>"


@pytest.fixture
def saved(pair: Pair, tmp_path: Path) -> tuple[Path, list[int]]:
    """A saved adapter, and the oracle's tokens."""
    model = pair.model()
    model.save_pretrained(tmp_path / "adapter")
    (prompt,) = pair.rows([PROMPT])
    return tmp_path / "adapter", Oracle.of(model, pair.base, pair.assistant, 4).generate(prompt, 6)


def answer(model: nn.Module, pair: Pair, **options: Any) -> list[int]:
    (found,) = generated(model.eval(), pair.batch([PROMPT]), 6, do_sample=False, **options)
    return found


# 1. Adapters on bases with a wrapped part


def compile_backbone(base: Any) -> None:
    base.model = torch.compile(base.model, backend="eager")


def compile_layers(base: Any) -> None:
    base.model.layers = nn.ModuleList(torch.compile(layer, backend="eager") for layer in base.model.layers)


def compile_embedding(base: Any) -> None:
    base.set_input_embeddings(torch.compile(base.get_input_embeddings(), backend="eager"))


WRAPPED = [compile_backbone, compile_layers, compile_embedding]
LOADED: dict[str, Callable[[Any, Path], nn.Module]] = {
    "PeftModel": lambda base, folder: PeftModel.from_pretrained(base, folder),
    "low memory": lambda base, folder: PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=True),
    "trainable": lambda base, folder: PeftModel.from_pretrained(base, folder, is_trainable=True),
    "load_adapter": lambda base, folder: (base.load_adapter(str(folder)), base)[1],
}


@pytest.mark.parametrize("load", LOADED.values(), ids=LOADED)
@pytest.mark.parametrize("wrap", WRAPPED)
def test_an_adapter_is_loaded_into_a_compiled_part(
    pair: Pair, saved: tuple[Path, list[int]], wrap: Callable[[Any], None], load: Callable[[Any, Path], nn.Module]
) -> None:
    folder, tokens = saved
    base = pair.load_base()
    wrap(base)
    assert answer(load(base, folder), pair) == tokens
    torch.compiler.reset()


@pytest.mark.parametrize("how", ["PeftModel", "base"])
@pytest.mark.parametrize("wrap", WRAPPED)
def test_an_adapter_saved_from_a_compiled_part_is_as_any_other(
    pair: Pair, saved: tuple[Path, list[int]], tmp_path: Path, wrap: Callable[[Any], None], how: str
) -> None:
    folder, tokens = saved
    base = pair.load_base()
    wrap(base)
    model: Any = (
        PeftModel.from_pretrained(base, folder) if how == "PeftModel" else LOADED["load_adapter"](base, folder)
    )
    model.save_pretrained(tmp_path / "again")
    names = [set(load_file(each / "adapter_model.safetensors")) for each in (folder, tmp_path / "again")]
    assert names[0] == names[1]
    assert answer(PeftModel.from_pretrained(pair.load_base(), tmp_path / "again"), pair) == tokens


def test_a_second_adapter_is_loaded_into_a_compiled_part(pair: Pair, saved: tuple[Path, list[int]]) -> None:
    folder, tokens = saved
    base = pair.load_base()
    compile_backbone(base)
    model = get_peft_model(base, pair.config(num_thought_tokens=2))
    model.load_adapter(folder, "second")
    model.set_adapter("second")
    assert answer(model, pair) == tokens
    torch.compiler.reset()


class Renamed(nn.Module):
    """What a user's own wrapper does to the names of what it holds."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize("load", LOADED.values(), ids=LOADED)
def test_a_wrapper_that_nobody_knows_is_refused_before_anything_runs(
    pair: Pair, saved: tuple[Path, list[int]], load: Callable[[Any, Path], nn.Module]
) -> None:
    base = pair.load_base()
    base.model.embed_tokens, embedding = Renamed(base.model.embed_tokens), base.model.embed_tokens
    base.get_input_embeddings = lambda: base.model.embed_tokens.inner
    assert base.get_input_embeddings() is embedding
    with pytest.raises(ValueError, match=r"must hold model\.embed_tokens\.inner\.softcot_projection"):
        load(base, saved[0])


def test_what_hides_the_names_of_a_part_is_refused(pair: Pair, saved: tuple[Path, list[int]], tmp_path: Path) -> None:
    base = pair.load_base()
    base.model = checkpoint_wrapper(base.model)  # a state without the wrapper's name, and modules with it
    with pytest.raises(ValueError, match=r"must hold model\._checkpoint_wrapped_module\.embed_tokens\.softcot_proj"):
        PeftModel.from_pretrained(base, saved[0])
    base = pair.load_base()
    base.model = checkpoint_wrapper(base.model)
    with pytest.raises(ValueError, match="something that renames modules is wrapped"):
        get_peft_model(base, pair.config()).save_pretrained(tmp_path / "never")


def test_a_base_that_fsdp_has_wrapped_is_refused(pair: Pair) -> None:
    base = pair.load_base()
    base.model._fsdp_wrapped_module = nn.Module()  # the name that FSDP1 gives what it wraps
    base.model._fsdp_wrapped_module.embed_tokens = base.model.embed_tokens
    del base.model.embed_tokens
    base.get_input_embeddings = lambda: base.model._fsdp_wrapped_module.embed_tokens
    with pytest.raises(ValueError, match="must not be wrapped by FSDP yet"):
        get_peft_model(base, pair.config())


@pytest.mark.parametrize("run", [answer, lambda model, pair: model.eval()(**pair.batch([PROMPT]), logits_to_keep=1)])
def test_a_config_without_its_weights_never_answers(
    pair: Pair, saved: tuple[Path, list[int]], run: Callable[..., Any]
) -> None:
    folder, tokens = saved
    model = get_peft_model(pair.load_base(), SoftCoTConfig.from_pretrained(str(folder)))
    with pytest.raises(ValueError, match=r"'default' must be loaded.*`inference_mode=True`.*from_pretrained"):
        run(model, pair)
    weights = PeftModel.from_pretrained(pair.load_base(), folder).state_dict()
    model.load_state_dict({name: value for name, value in weights.items() if "softcot_" in name}, strict=False)
    assert answer(model, pair) == tokens


# 2. Conversations with several supervised turns


def turns(pair: Pair, run: bool) -> dict[str, Tensor]:
    """Two questions, both answers labelled; with a run of thought tokens before the second answer."""
    parts = [(PROMPT, False), (ANSWER, True), ("Again? " + PROMPT, False), (LATER, True)]
    ids, labels = list[int](), list[int]()
    for text, supervised in parts:
        piece = pair.tokenizer(text)["input_ids"]
        if run and text == LATER:
            thoughts = [pair.tokenizer.convert_tokens_to_ids(THOUGHT)] * 4
            ids, labels = ids + thoughts, labels + [-100] * 4
        ids, labels = ids + piece, labels + (piece if supervised else [-100] * len(piece))
    return {"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels])}


def shifted(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    labels = nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    return batch | {"shift_labels": labels}  # beside the labels, as trainers that divide rows between devices have it


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("form", [dict, shifted], ids=["labels", "shift_labels"])
def test_several_supervised_turns_are_refused(pair: Pair, train: bool, form: Callable[..., Any]) -> None:
    batch, model = turns(pair, run=False), pair.model().train(train)
    first, second = (len(pair.tokenizer(text)["input_ids"]) for text in (PROMPT, PROMPT + ANSWER + "Again? " + PROMPT))
    with pytest.raises(
        ValueError, match=rf"row 0 form several, which begin in columns \[{first}, {second}\].*split_conv"
    ):
        model(**form(batch))


@pytest.mark.parametrize("two", [True, False], ids=["two passes", "one pass"])
@pytest.mark.parametrize("form", [dict, shifted], ids=["labels", "shift_labels"])
def test_labels_before_an_explicit_run_are_left_out_of_the_loss_and_said_once(
    pair: Pair, form: Callable[..., Any], two: bool
) -> None:
    model = pair.model(thought_token=THOUGHT, placement="thought_token", two_pass_training=two).train()
    batch = turns(pair, run=True)
    later = batch | {"labels": batch["labels"].clone()}
    later["labels"][:, : batch["input_ids"].shape[1] - len(pair.tokenizer(LATER)["input_ids"])] = -100
    expected = model(**form(later)).loss
    with pytest.warns(UserWarning, match="Labels before the runs.*split_conversations"):
        found = model(**form(batch)).loss
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    model(**form(batch))  # warnings are errors
    oracle = Oracle.of(model, pair.base, pair.assistant, 4)
    ids = batch["input_ids"][0].tolist()
    at = ids.index(pair.tokenizer.convert_tokens_to_ids(THOUGHT))
    torch.testing.assert_close(found, oracle.loss(ids[:at], ids[at + 4 :]), atol=1e-5, rtol=1e-5)


# 5. Scoring and writing, in training and evaluation


@pytest.mark.parametrize("dropout", [0.0])
def test_a_text_s_log_probabilities_do_not_depend_on_the_mode(pair: Pair, dropout: float) -> None:
    model = pair.model(inference_num_thought_tokens=2, two_pass_training=False)
    ids = pair.tokenizer([PROMPT + ANSWER], return_tensors="pt")["input_ids"]
    labels = ids.where(torch.arange(ids.shape[1]) >= len(pair.tokenizer(PROMPT)["input_ids"]), -100)
    scored = [model.train(train)(ids, labels=labels) for train in (True, False)]
    assert torch.equal(scored[0].logits, scored[1].logits)
    before, response = ids[0][labels[0] == -100].tolist(), ids[0][labels[0] != -100].tolist()
    oracle = Oracle.of(model, pair.base, pair.assistant, 4)
    torch.testing.assert_close(scored[0].loss, oracle.loss(before, response), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("train", [True, False])
def test_a_text_is_written_with_its_own_number_in_both_modes(pair: Pair, train: bool) -> None:
    model = pair.model(inference_num_thought_tokens=2).train(train)
    (prompt,) = pair.rows([PROMPT])
    oracle = Oracle.of(model, pair.base, pair.assistant, 2)
    expected = oracle.generate(prompt, 6)
    ids = torch.tensor([prompt])
    assert model.generate(ids, max_new_tokens=6, do_sample=False)[0, len(prompt) :].tolist() == expected
    assert int(model(ids, logits_to_keep=1).logits[0, -1].argmax()) == expected[0]


# 6. Bases that do something with their logits, and what half precision hides


def soft_capped(vocabulary: int) -> Gemma2ForCausalLM:
    """Small logits: in bfloat16, its cap changes none of them."""
    config = Gemma2Config(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, pad_token_id=0, bos_token_id=None, eos_token_id=1,
        tie_word_embeddings=False, query_pre_attn_scalar=8, final_logit_softcapping=30.0,
    )  # fmt: skip
    return Gemma2ForCausalLM(config)


def scaled(vocabulary: int) -> GraniteForCausalLM:
    config = GraniteConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=None, eos_token_id=1, logits_scaling=1.01,
    )  # fmt: skip
    return GraniteForCausalLM(config)


def plain(vocabulary: int) -> LlamaForCausalLM:
    return make_base(vocabulary)


def response_batch(pair: Pair) -> dict[str, Tensor]:
    ids = pair.tokenizer([PROMPT + LATER] * 2, return_tensors="pt")["input_ids"]
    labels = ids.where(torch.arange(ids.shape[1]) >= len(pair.tokenizer(PROMPT)["input_ids"]), -100)
    return {"input_ids": ids, "labels": labels}


def step(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Any, Tensor]:
    output, found = gradients(model, batch)
    return output, torch.cat([gradient.flatten() for gradient in found])


@pytest.mark.parametrize("loud", [False, True], ids=["small logits", "large logits"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("make", "alone"), [(soft_capped, False), (scaled, False), (plain, True)])
def test_the_head_is_passed_by_only_where_it_is_the_last_thing(
    pair: Pair, make: Callable[[int], Any], alone: bool, dtype: torch.dtype, loud: bool
) -> None:
    base, batch = make(len(pair.tokenizer)), response_batch(pair)
    if loud:
        base.lm_head.weight.data.mul_(20)
    steps = []
    for two in (True, False):
        torch.manual_seed(0)
        config = pair.config(two_pass_training=two, tokenizer_name_or_path=str(pair.base))
        model = get_peft_model(copy.deepcopy(base).to(dtype), config).train()
        steps.append(step(model, batch))
        if two:
            assert head_is_last(model) == alone
    (two_passes, found), (one_pass, expected) = steps
    assert two_passes.logits is None
    rounding = {torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 0.005}[dtype]
    torch.testing.assert_close(two_passes.loss, one_pass.loss, rtol=rounding, atol=rounding)
    assert (found - expected).norm() <= 3 * rounding * expected.norm()


class OneFurther(LlamaForCausalLM):
    """Counts positions after a cache one too far: less than what bfloat16 rounds by."""

    @functools.wraps(LlamaForCausalLM.forward)
    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, **inputs: Any) -> Any:
        seen = cache_length(find_cache(inputs))
        if seen:
            position_ids = torch.arange(seen + 1, seen + 1 + input_ids.shape[1])[None]
        return super().forward(input_ids=input_ids, position_ids=position_ids, **inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_difference_as_small_as_rounding_is_found(
    pair: Pair, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "softcot_peft")
    small = pair.load_base()
    base = OneFurther(small.config)
    base.load_state_dict(small.state_dict())
    config = pair.config(tokenizer_name_or_path=str(pair.base))
    output, _ = step(get_peft_model(base.to(dtype), config).train(), response_batch(pair))
    assert output.logits is not None
    assert "not those of whole rows" in caplog.text


def test_trying_two_passes_leaves_the_weights_as_they_were(pair: Pair) -> None:
    base = pair.load_base().bfloat16()
    before = {name: (weight.data_ptr(), weight.clone()) for name, weight in base.named_parameters()}
    model = get_peft_model(base, pair.config()).train()
    assert step(model, response_batch(pair))[0].logits is None
    for name, weight in base.named_parameters():
        if name in before:
            assert weight.data_ptr() == before[name][0]
            assert torch.equal(weight, before[name][1])
    assert not any(module._forward_hooks for module in base.model.modules())


@pytest.mark.parametrize(
    "message", ["CUDA out of memory. Tried to allocate", "DefaultCPUAllocator: can't allocate memory"]
)
def test_want_of_memory_in_the_trial_decides_nothing(pair: Pair, message: str) -> None:
    model, batch = pair.model().train(), response_batch(pair)
    base, failed = model.get_base_model(), []

    def fail(module: nn.Module, args: Any) -> None:
        if not failed and not torch.is_grad_enabled():  # the trial has no gradients
            failed.append(True)
            raise RuntimeError(message)

    handle = base.model.layers[1].register_forward_pre_hook(fail)
    assert step(model, batch)[0].logits is not None
    assert failed
    handle.remove()
    assert step(model, batch)[0].logits is None


def test_other_errors_in_the_trial_decide(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "softcot_peft")
    model, batch = pair.model().train(), response_batch(pair)

    def fail(module: nn.Module, args: Any) -> None:
        if not torch.is_grad_enabled():
            raise RuntimeError("no cache here")

    model.get_base_model().model.layers[1].register_forward_pre_hook(fail)
    for _ in range(2):
        assert step(model, batch)[0].logits is not None
    assert caplog.text.count("it cannot go on from a cached prompt (no cache here)") == 1


# 9. What depends on the length of a pass


@pytest.mark.parametrize("at", ["the wrapped embedding", "the embedding itself"])
def test_noise_on_embeddings_is_as_loud_as_in_one_pass(pair: Pair, at: str) -> None:
    batch, bounds = response_batch(pair), []
    for two in (True, False):
        model, heard = pair.model(two_pass_training=two).train(), list[int]()
        embedding = model.get_input_embeddings()
        hooked = embedding if at == "the wrapped embedding" else embedding.base_layer
        hooked.register_forward_hook(lambda module, args, out: heard.append(out.shape[1]))  # noqa: B023
        step(model, batch)
        bounds.append(heard)
    assert bounds[0] == bounds[1] == [batch["input_ids"].shape[1] + 4]


# 10. Logits in training


@pytest.mark.parametrize("two", [True, False])
def test_logits_of_a_training_step_are_none_or_an_ordinary_tensor(pair: Pair, two: bool) -> None:
    output = pair.model(two_pass_training=two).train()(**response_batch(pair))
    assert (output.logits is None) == two
    assert two or type(output.logits) is Tensor
    assert output[0] is output.loss
    assert output.to_tuple()[0] is output.loss


# 11. Rows without labels, and sampled thought tokens


@pytest.mark.parametrize("two", [True, False], ids=["two passes", "one pass"])
@pytest.mark.parametrize("run", [False, True], ids=["prompt's end", "run"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("silent", [0, 1, 2])
def test_a_row_without_labels_adds_nothing(pair: Pair, side: str, run: bool, two: bool, silent: int) -> None:
    mark = THOUGHT * 4 if run else ""
    texts = [PROMPT + mark + LATER, "One?" + mark + ANSWER, PROMPT + " Or three?" + mark + ANSWER]
    model = pair.model(thought_token=THOUGHT, two_pass_training=two).train()

    def batch(texts: list[str], unlabelled: int | None) -> dict[str, Tensor]:
        rows = dict(pair.tokenizer(texts, return_tensors="pt", padding=True, padding_side=side))
        labels = rows["input_ids"].masked_fill(rows["attention_mask"] == 0, -100)
        for row, text in enumerate(texts):
            prompt = len(pair.tokenizer(text[: text.rindex("?") + 1] + mark)["input_ids"])
            begin = int(rows["attention_mask"][row].argmax())
            labels[row, : begin + prompt] = -100
            if row == unlabelled:
                labels[row] = -100
        return rows | {"labels": labels}

    others = [text for row, text in enumerate(texts) if row != silent]
    expected, wanted = step(model, batch(others, None))
    found, gradient = step(model, batch(texts, silent))
    torch.testing.assert_close(found.loss, expected.loss, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(gradient, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("two", [True, False], ids=["two passes", "one pass"])
def test_a_batch_without_labels_has_the_base_s_loss(pair: Pair, two: bool) -> None:
    model, batch = pair.model(two_pass_training=two).train(), response_batch(pair)
    none = batch | {"labels": torch.full_like(batch["labels"], -100)}
    for _ in range(2):  # before and after two passes are tried
        assert model(**none).loss.isnan()
        assert model(**none, num_items_in_batch=7).loss == 0
        model(**batch)


@pytest.mark.parametrize("placement", ["prompt_end", "thought_token"])
@pytest.mark.parametrize("sampled", [(0, 0), (1, 0), (1, 1), (3, 1)])
def test_sampled_thought_tokens_are_text(pair: Pair, placement: Any, sampled: tuple[int, int]) -> None:
    model = pair.model(thought_token=THOUGHT, placement=placement)
    thought, run = pair.tokenizer.convert_tokens_to_ids(THOUGHT), [] if placement == "prompt_end" else [1] * 4
    (prompt,), (answer,) = pair.rows([PROMPT]), pair.rows([" five, it is"])
    ids, labels, expected = [], [], []
    oracle = Oracle.of(model, pair.base, pair.assistant, 4)
    for number in sampled:
        response = answer[:3] + [thought] * number + answer[3 : 5 + 3 - number]
        before = prompt + [thought] * len(run)
        ids.append(before + response)
        labels.append([-100] * len(before) + response)
        with torch.no_grad():
            expected.append(oracle.loss(prompt, response))
    found = model(torch.tensor(ids), labels=torch.tensor(labels)).loss
    torch.testing.assert_close(found, torch.stack(expected).mean(), atol=1e-5, rtol=1e-5)


def test_a_run_that_is_labelled_itself_is_named(pair: Pair) -> None:
    ids = torch.tensor(pair.rows([PROMPT + THOUGHT * 4 + ANSWER]))
    labels = ids.where((ids == pair.tokenizer.convert_tokens_to_ids(THOUGHT)).cumsum(1) > 0, -100)
    model = pair.model(thought_token=THOUGHT, placement="thought_token")
    with pytest.raises(ValueError, match="`labels` must be -100 on the run of `thought_token`"):
        model(ids, labels=labels)


def test_a_run_behind_all_labels_is_refused(pair: Pair) -> None:
    ids = torch.tensor(pair.rows([PROMPT + ANSWER + THOUGHT * 4]))
    labels = torch.full_like(ids, -100)
    labels[0, -6] = ids[0, -6]
    with pytest.raises(ValueError, match=r"must stand after the thought tokens, but row 0 has its last one in column"):
        pair.model(thought_token=THOUGHT)(ids, labels=labels)


# 13. Embeddings whose storage is not their width


class Packed(nn.Embedding):
    """Holds two numbers in one, as packed formats do."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(*weight.shape, device="meta")
        halves = weight.detach().to(torch.bfloat16).view(torch.uint8)
        self.weight = nn.Parameter(halves, requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # torch's own name
        return nn.functional.embedding(input, self.weight).view(torch.bfloat16).float()


@pytest.mark.parametrize("autocast", [True, False])
def test_a_packed_embedding_carries_thoughts_of_the_model_s_width(
    pair: Pair, saved: tuple[Path, list[int]], autocast: bool
) -> None:
    answers = []
    for pack in (True, False):
        base = pair.load_base()
        weight = base.get_input_embeddings().weight
        weight.data = weight.data.bfloat16().float()
        if pack:
            base.set_input_embeddings(Packed(weight))
        model = PeftModel.from_pretrained(base, saved[0], autocast_adapter_dtype=autocast)
        answers.append(answer(model, pair))
        assert model.get_input_embeddings().base_hidden_size == 32
        if pack:
            fresh = get_peft_model(model.unload(), pair.config())
            output, gradient = step(fresh.train(), response_batch(pair))
            assert output.loss.isfinite()
            assert gradient.norm() > 0
    assert answers[0] == answers[1]


# 18. Words


@pytest.mark.parametrize("field", ["assistant_model_name_or_path", "tokenizer_name_or_path"])
def test_a_path_is_taken_for_a_folder(pair: Pair, field: str, tmp_path: Path) -> None:
    folder = pair.assistant if field.startswith("assistant") else pair.base
    config = pair.config(**{field: folder})
    assert getattr(config, field) == str(folder)
    config.save_pretrained(str(tmp_path))
    assert getattr(SoftCoTConfig.from_pretrained(str(tmp_path)), field) == str(folder)


@pytest.mark.parametrize(
    "load",
    [
        lambda pair, folder, **o: PeftModel.from_pretrained(pair.load_base(), folder, **o),
        lambda pair, folder, **o: SoftCoTConfig.from_pretrained(folder, **o),
    ],
)
@pytest.mark.parametrize("field", ["num_thought_tokens", "inference_num_thought_tokens", "thought_token"])
def test_overrides_that_peft_would_ignore_are_refused(
    pair: Pair, saved: tuple[Path, list[int]], load: Callable[..., Any], field: str
) -> None:
    with pytest.raises(
        ValueError, match=rf"got \['{field}'\], which PEFT ignores.*set `config\.{field}`.*config=config"
    ):
        load(pair, str(saved[0]), **{field: 2})
    config = SoftCoTConfig.from_pretrained(str(saved[0]))
    config.inference_num_thought_tokens = 2
    model = PeftModel.from_pretrained(pair.load_base(), saved[0], config=config)
    (prompt,) = pair.rows([PROMPT])
    assert answer(model, pair) == Oracle.of(model, pair.base, pair.assistant, 2).generate(prompt, 6)


# Contract line 9

_IMPORT = """
import sys, types
import peft, peft.peft_model, transformers, transformers.modeling_utils, transformers.integrations.peft
import accelerate, torch, huggingface_hub, safetensors.torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, Cache
OURS = "softcot_peft"
def snapshot():
    found = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in ("peft", "transformers", "accelerate", "torch", "huggingface_hub", "safetensors"):
            for key, value in list(vars(module).items()):
                found[name, key] = value
                if isinstance(value, type):
                    found.update({(name, key, inner): v for inner, v in list(vars(value).items())})
    return found
before = snapshot()
import softcot_peft
after = snapshot()
changed = [k for k in before if k[-1] not in ("__abstractmethods__", "_abc_impl") and after.get(k) is not before[k]]
added = [k for k, v in after.items() if k not in before and (getattr(v, "__module__", "") or "").startswith(OURS)]
print(sorted(map(str, changed + added)))
"""


def test_importing_the_package_changes_nothing_in_other_libraries() -> None:
    found = subprocess.run([sys.executable, "-c", _IMPORT], capture_output=True, text=True, check=True).stdout
    assert found.splitlines()[-1] == "[]"


def test_the_enum_and_the_registries_alone_know_the_method() -> None:
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.SOFTCOT] is SoftCoTConfig


def test_a_save_that_version_0_1_was_killed_in_is_named(pair: Pair, saved: tuple[Path, list[int]]) -> None:
    config = saved[0] / "adapter_config.json"
    config.write_text(config.read_text().replace("{", '{"interrupted_save": true,', 1))
    with warnings.catch_warnings(), pytest.raises(ValueError, match=r"0\.1\.0 that was killed.*`\.softcot-staged`"):
        PeftModel.from_pretrained(pair.load_base(), saved[0])
