"""What users of `generate` do: labels among the inputs, arguments by prompt, little room, drafts, a whole encoding."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import CLOSE, base_passes, generated
from helpers import CACHE_NAME, break_assistants
from oracle import Oracle
from peft import PeftModel, get_peft_model
from tiny_pair import QUESTIONS, Pair
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GenerationConfig,
    GPT2Config,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    RobertaConfig,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    StaticCache,
    pipeline,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

N, NEW = 4, 5
SIDES = pytest.mark.parametrize("side", ["left", "right"])


@pytest.fixture(scope="module")
def answers(pair: Pair, oracle: Oracle) -> list[list[int]]:
    return [oracle.generate(row, NEW) for row in pair.rows(QUESTIONS)]


def answered(model: nn.Module, batch: dict[str, Tensor], **options: Any) -> list[list[int]]:
    return generated(model, batch, NEW, do_sample=False, **options)


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is refused is refused before the assistant reads."""
    break_assistants(monkeypatch, AssertionError("the assistant was run"))


# Labels: trainers that evaluate with `generate` pass them


@SIDES
@pytest.mark.parametrize("name", ["labels", "shift_labels"])
@pytest.mark.parametrize("kind", ["first column", "last column", "none", "another shape", "a list"])
def test_generate_does_not_look_at_labels(
    pair: Pair, model: PeftModel, answers: list[list[int]], name: str, kind: str, side: str
) -> None:
    batch = pair.batch(QUESTIONS, side)
    labels: Any = torch.full_like(batch["input_ids"], -100)
    if "column" in kind:
        labels[:, 2 if kind == "first column" else -1 :] = 7
    elif kind != "none":
        labels = labels.new_full((4, 3), 9) if kind == "another shape" else [[5], [6], [7], [8]]
    assert answered(model, batch, **{name: labels}) == answers
    assert answered(model, batch, **{name: labels}, num_beams=2) == answered(model, batch, num_beams=2)


def test_labels_do_not_keep_equal_rows_apart(pair: Pair, model: PeftModel) -> None:
    batch = pair.batch(QUESTIONS[:1] * 3)
    with base_passes(model) as rows:
        answered(model, batch, labels=torch.tensor([[5], [6], [7]]))
    assert rows[0] == 1


def test_seq2seq_trainer_predicts_with_generate(
    pair: Pair, model: PeftModel, answers: list[list[int]], tmp_path: Path
) -> None:
    rows = [{"input_ids": row, "labels": [-100] * (len(row) - 2) + row[-2:]} for row in pair.rows(QUESTIONS)]

    def collate(features: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        batch = pair.batch([QUESTIONS[rows.index(row)] for row in features])
        width = batch["input_ids"].shape[1]
        labels = [[-100] * (width - len(row["labels"])) + row["labels"] for row in features]
        return {**batch, "labels": torch.tensor(labels)}

    trainer = Seq2SeqTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(
            output_dir=str(tmp_path),
            predict_with_generate=True,
            generation_config=GenerationConfig(max_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=1),
            per_device_eval_batch_size=2,
            remove_unused_columns=False,
            report_to=[],
            dataloader_pin_memory=False,
        ),
        data_collator=collate,
    )
    found = trainer.predict(rows)
    assert found.metrics["test_loss"] > 0
    assert len(found.predictions) == len(answers)
    for row, answer in zip(found.predictions.tolist(), answers, strict=True):
        assert answer in [row[at : at + len(answer)] for at in range(len(row))]


# Arguments with one entry per prompt, where samples, beams or equal rows could share a prefill


def numbers(value: Any) -> Iterator[int]:
    """All numbers in a nested argument."""
    if isinstance(value, (dict, list)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from numbers(part)
    else:
        yield from torch.as_tensor(value).flatten().tolist()


class Hinted(LlamaForCausalLM):
    """A base that writes what it is told beside each prompt, as multimodal wrappers write of images."""

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, hints: Any = None, **kwargs: Any
    ) -> CausalLMOutputWithPast:
        output = super().forward(input_ids, attention_mask, **kwargs)
        if hints is not None:
            told = torch.tensor(list(numbers(hints)))
            told = told.repeat_interleave(
                len(output.logits) // len(told)
            )  # `generate` repeats tensors for beams alone
            output.logits = output.logits + 90 * nn.functional.one_hot(told, output.logits.shape[-1])[:, None]
        return output


class Axes(LlamaForCausalLM):
    """A base whose positions have three axes, as those of multimodal wrappers."""

    def forward(
        self, input_ids: Tensor, attention_mask: Any = None, position_ids: Tensor | None = None, **kwargs: Any
    ) -> CausalLMOutputWithPast:
        assert position_ids is not None
        assert position_ids.shape == (3, *input_ids.shape)
        return super().forward(input_ids, attention_mask, position_ids=position_ids[0], **kwargs)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        positions = inputs["position_ids"]
        return inputs | {"position_ids": positions.expand(3, *positions.shape) if positions.dim() == 2 else positions}


HINTS: dict[str, Any] = {
    "rows of one": lambda values: torch.tensor(values),
    "rows of columns": lambda values: torch.tensor(values)[:, None],
    "rows of images": lambda values: torch.tensor(values)[:, None, None, None],
    "list": lambda values: values,
    "dict": lambda values: {"pixels": torch.tensor(values)},
    "list of dicts of lists": lambda values: [{"pixels": [torch.tensor(values)]}],
}


@pytest.fixture(scope="module")
def hinted(pair: Pair) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(Hinted.from_pretrained(pair.base).eval(), pair.config()).eval()


@pytest.mark.parametrize("kind", HINTS)
def test_equal_prompts_with_other_arguments_by_row_are_read_apart(pair: Pair, hinted: PeftModel, kind: str) -> None:
    batch = pair.batch([QUESTIONS[0], QUESTIONS[0], QUESTIONS[1], QUESTIONS[1]])
    values = [20, 31, 42, 53]
    assert answered(hinted, batch, hints=HINTS[kind](values)) == [[value] * NEW for value in values]


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"num_beams": 3, "num_return_sequences": 3}], ids=str)
@pytest.mark.parametrize("kind", ["rows of one", "rows of columns", "rows of images", "list"])
def test_beams_have_the_arguments_of_their_prompt(
    pair: Pair, hinted: PeftModel, kind: str, options: dict[str, int]
) -> None:
    values = [20, 31, 42]
    found = answered(hinted, pair.batch(QUESTIONS[:3]), hints=HINTS[kind](values), **options)
    best = found[:: options.get("num_return_sequences", 1)]
    assert best == [[value] * NEW for value in values]


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_positions_with_as_many_axes_as_there_are_rows(pair: Pair, model: PeftModel, rows: int) -> None:
    torch.manual_seed(0)
    axes = get_peft_model(Axes.from_pretrained(pair.base).eval(), pair.config()).eval()
    batch = {name: value.repeat_interleave(3 // rows, 0) for name, value in pair.batch(QUESTIONS[:rows]).items()}
    for options in ({}, {"num_beams": 3}):
        assert answered(axes, batch, **options) == answered(model, batch, **options)


@pytest.mark.parametrize("name", ["token_type_ids", "position_ids"])
def test_right_padded_prompts_keep_their_arguments_by_token(pair: Pair, tmp_path: Path, name: str) -> None:
    model = made(pair, tmp_path, CONFIGS["gpt2"](len(pair.tokenizer)))
    texts = [text[:30] for text in QUESTIONS]
    found = []
    for side in ("left", "right"):
        batch = pair.batch(texts, side)
        mask = batch["attention_mask"]
        values = (mask.cumsum(1) - 1).clamp(min=0) + 3
        found.append(answered(model, {**batch, name: values * mask}))
    assert found[0] == found[1]
    assert found[0] != answered(model, batch)


def test_right_padded_prompts_keep_positions_with_axes(pair: Pair, model: PeftModel) -> None:
    torch.manual_seed(0)
    axes = get_peft_model(Axes.from_pretrained(pair.base).eval(), pair.config()).eval()
    batch = pair.batch(QUESTIONS, "right")
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    assert answered(axes, batch | {"position_ids": positions.expand(3, -1, -1)}) == answered(model, batch)


# Room for N more positions


CONFIGS = {
    "gpt2": lambda size: GPT2Config(
        vocab_size=size, n_embd=32, n_layer=2, n_head=4, n_positions=32, initializer_range=0.4, bos_token_id=1,
        eos_token_id=1,
    ),
    "opt": lambda size: OPTConfig(
        vocab_size=size, hidden_size=32, ffn_dim=32, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32, init_std=0.4, word_embed_proj_dim=32, pad_token_id=0, bos_token_id=1,
        eos_token_id=1,
    ),
    "roberta": lambda size: RobertaConfig(
        vocab_size=size, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=33, initializer_range=0.4, pad_token_id=0, is_decoder=True, bos_token_id=1,
        eos_token_id=1,
    ),
}  # fmt: skip


def made(pair: Pair, folder: Path, config: Any) -> PeftModel:
    """An adapter on a base made from a config."""
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    pair.tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    return get_peft_model(AutoModelForCausalLM.from_pretrained(folder).eval(), pair.config()).eval()


@pytest.fixture(params=["gpt2", "opt"])
def tabled(request: pytest.FixtureRequest, pair: Pair, tmp_path: Path) -> PeftModel:
    """A base with learned positions for 32 tokens."""
    return made(pair, tmp_path, CONFIGS[request.param](len(pair.tokenizer)))


def prompt_of(length: int) -> dict[str, Tensor]:
    return {"input_ids": torch.arange(20, 20 + length)[None], "attention_mask": torch.ones(1, length).long()}


WORDS = r"Tokens and thoughts must fit into .*`max_new_tokens`, `num_thought_tokens`"
FITS: dict[str, dict[str, Any]] = {
    "max_new_tokens": {"max_new_tokens": 9},
    "max_length": {"max_length": 29},
    "config": {"generation_config": GenerationConfig(max_new_tokens=9)},
    "beams": {"max_new_tokens": 9, "num_beams": 2},
    "uncached": {"max_new_tokens": 9, "use_cache": False},
}


@pytest.mark.parametrize("way", FITS)
def test_new_tokens_that_just_fit_learned_positions_are_written(tabled: PeftModel, way: str) -> None:
    output = tabled.generate(**prompt_of(20), **FITS[way], min_new_tokens=9)  # the ninth is never read
    assert output.shape == (1, 29)


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize("way", [*FITS, "default"])
def test_thoughts_that_leave_no_positions_for_new_tokens_are_refused(tabled: PeftModel, way: str) -> None:
    options = {"default": {}} | FITS
    with pytest.raises(ValueError, match=WORDS) as info:
        tabled.generate(**prompt_of(21), **{key: 30 if key == "max_length" else v for key, v in options[way].items()})
    new = 11 if way == "default" else 9
    assert f"the base's 32 positions, got 21 + 4, which leaves room for 8 new tokens, not {new}." in str(info.value)


@pytest.mark.usefixtures("nothing_runs")
def test_prompts_that_fill_the_learned_positions_are_refused(tabled: PeftModel) -> None:
    with pytest.raises(ValueError, match="must fit into the base's 32 positions, got 29 \\+ 4"):
        tabled.generate(**prompt_of(29), max_new_tokens=2)


def test_padding_takes_no_learned_positions(tabled: PeftModel) -> None:
    batch = prompt_of(30)
    batch["attention_mask"][:, :15] = 0
    assert tabled.generate(**batch, max_new_tokens=9, min_new_tokens=9).shape == (1, 39)


@pytest.mark.parametrize("use_cache", [True, False])
def test_more_new_tokens_than_the_base_has_positions_for_are_cut_in_words(tabled: PeftModel, use_cache: bool) -> None:
    """Who asks for so many counts on answers that end early: these are written, others are told."""
    batch = prompt_of(20)
    with pytest.raises(ValueError, match=r"the base's 32 positions, got 33\. Shorten the input, lower"):
        tabled.generate(**batch, max_new_tokens=100, min_new_tokens=50, use_cache=use_cache)
    (first,) = answered(tabled, batch)
    ended = tabled.generate(**batch, max_new_tokens=100, eos_token_id=first[1], use_cache=use_cache)
    assert ended[0, 20:].tolist() == first[:2]


def test_decoding_by_hand_beyond_the_learned_positions_is_refused_in_words(tabled: PeftModel) -> None:
    cache = tabled(**prompt_of(26), logits_to_keep=1)[CACHE_NAME]
    tabled(torch.tensor([[7, 8]]), **{CACHE_NAME: cache})
    with pytest.raises(ValueError, match=r"the base's 32 positions, got 33\."):
        tabled(torch.tensor([[9]]), **{CACHE_NAME: cache})


def test_rows_that_count_their_own_positions_are_measured_without_padding(pair: Pair, tmp_path: Path) -> None:
    """RoBERTa and its kin are told no positions; the first of theirs is padding's."""
    model = made(pair, tmp_path, CONFIGS["roberta"](len(pair.tokenizer)))
    batch = prompt_of(30)
    batch["attention_mask"][:, :15] = batch["input_ids"][:, :15] = 0
    output = model(**batch, logits_to_keep=1)
    step = {"attention_mask": torch.cat([batch["attention_mask"], torch.ones(1, 1).long()], 1)}
    with pytest.raises(ValueError, match=r"the base's 33 positions, got 35\."):  # it counts padding in a cache
        model(torch.tensor([[7]]), **step, **{CACHE_NAME: output[CACHE_NAME]})


# Caches of a fixed size that the caller made

GEMMA = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16,
    "num_key_value_heads": 1, "initializer_range": 0.4, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None,
}  # fmt: skip


@pytest.fixture(params=["llama", "hybrid", "sliding"])
def windowed(request: pytest.FixtureRequest, pair: Pair, tmp_path: Path) -> tuple[PeftModel, Oracle]:
    """Bases with all layers full, one of two with a window of 12 tokens, and both so."""
    if request.param == "llama":
        model, folder = pair.model(), pair.base
    else:
        kind = {"hybrid": Gemma2Config, "sliding": MistralConfig}[request.param]
        folder = tmp_path
        model = made(pair, folder, kind(vocab_size=len(pair.tokenizer), sliding_window=12, **GEMMA))
    return model, Oracle.of(model, folder, pair.assistant, N)


def static(model: PeftModel, length: int) -> StaticCache:
    return StaticCache(config=model.get_base_model().config, max_cache_len=length)


def test_a_fixed_cache_with_room_is_used(pair: Pair, windowed: tuple[PeftModel, Oracle]) -> None:
    model, oracle = windowed
    for text in QUESTIONS:
        (row,) = pair.rows([text])
        cache = static(model, len(row) + N + NEW - 1)
        assert answered(model, pair.batch([text]), **{CACHE_NAME: cache}) == [oracle.generate(row, NEW)]


def test_a_fixed_cache_is_decoded_by_hand(pair: Pair, windowed: tuple[PeftModel, Oracle]) -> None:
    model, oracle = windowed
    (row,), cache = pair.rows(QUESTIONS[:1]), static(model, 100)
    with torch.no_grad():
        model(torch.tensor([row]), logits_to_keep=1, **{CACHE_NAME: cache})
        for token, seen in ((7, [7]), (8, [7, 8])):
            logits = model(torch.tensor([[token]]), **{CACHE_NAME: cache}).logits[0, -1]
            torch.testing.assert_close(logits, oracle.logits(row, seen)[-1], **CLOSE)


def room_words(model: PeftModel, length: int, got: str) -> str:
    return rf"the {length} columns of `{CACHE_NAME}`, got {got}.*, or make the cache longer\."


@pytest.mark.usefixtures("nothing_runs")
def test_a_fixed_cache_without_room_for_thoughts_is_refused(
    pair: Pair, windowed: tuple[PeftModel, Oracle], request: pytest.FixtureRequest
) -> None:
    model, batch = windowed[0], pair.batch(QUESTIONS)
    length = batch["input_ids"].shape[1]
    sliding = isinstance(model.get_base_model(), MistralForCausalLM)
    for room, new in ((length + NEW - 1, NEW), (length + N + NEW - 2, NEW), (length + N - 1, 50)):
        cache = static(model, room)
        if sliding:  # nothing is missing: the window is smaller
            assert cache.layers[0].max_cache_len == 12
            continue
        with pytest.raises(ValueError, match=room_words(model, room, rf"{length} \+ {N}")):
            model.generate(**batch, max_new_tokens=new, **{CACHE_NAME: cache})
        if room < length + N:
            with pytest.raises(ValueError, match=room_words(model, room, rf"{length} \+ {N}")):
                model(**batch, logits_to_keep=1, **{CACHE_NAME: cache})


@pytest.mark.usefixtures("nothing_runs")
def test_a_fixed_cache_smaller_than_the_window_is_refused(pair: Pair, windowed: tuple[PeftModel, Oracle]) -> None:
    """It would slide too early."""
    model, batch = windowed[0], prompt_of(5)
    with pytest.raises(ValueError, match=room_words(model, 9, r"5 \+ 4, which leaves room for 1 new tokens, not 3")):
        model.generate(**batch, max_new_tokens=3, **{CACHE_NAME: static(model, 9)})
    with pytest.raises(ValueError, match=room_words(model, 8, r"5 \+ 4")):
        model(**batch, logits_to_keep=1, **{CACHE_NAME: static(model, 8)})


def test_decoding_by_hand_beyond_a_fixed_cache_is_refused_in_words(pair: Pair) -> None:
    model = pair.model()
    cache = static(model, 10)
    model(**prompt_of(5), logits_to_keep=1, **{CACHE_NAME: cache})
    model(torch.tensor([[7]]), **{CACHE_NAME: cache})
    with pytest.raises(ValueError, match=room_words(model, 10, "11")):
        model(torch.tensor([[8]]), **{CACHE_NAME: cache})
    cache = static(model, 10)
    with pytest.raises(ValueError, match=room_words(model, 10, "11")):
        model.generate(**prompt_of(5), max_new_tokens=20, min_new_tokens=20, **{CACHE_NAME: cache})


# Drafts


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize("bare", [False, True], ids=["peft", "bare"])
@pytest.mark.parametrize("do_sample", [False, True])
def test_a_draft_with_an_adapter_is_refused(pair: Pair, model: PeftModel, bare: bool, do_sample: bool) -> None:
    draft = model.get_base_model() if bare else model
    passes: list[int] = []
    base = pair.load_base()
    base.register_forward_pre_hook(lambda *args: passes.append(1))
    with pytest.raises(ValueError, match=r"`assistant_model` must not have an active SoftCoT adapter.*plain base"):
        base.generate(**pair.batch(QUESTIONS[:1]), assistant_model=draft, max_new_tokens=NEW, do_sample=do_sample)
    assert not passes


def test_a_draft_whose_adapter_is_disabled_and_a_plain_draft_are_used(
    pair: Pair, model: PeftModel, answers: list[list[int]]
) -> None:
    batch, base = pair.batch(QUESTIONS[:1]), pair.load_base()
    with model.disable_adapter():
        found = answered(base, batch, assistant_model=model)
    assert found == answered(base, batch)
    assert answered(model, batch, assistant_model=base) == answers[:1]


# Words


def test_an_encoding_that_was_not_unpacked_is_named(pair: Pair, model: PeftModel) -> None:
    encoding = pair.tokenizer(QUESTIONS, return_tensors="pt", padding=True)
    words = r"`input_ids` must be a tensor, got (BatchEncoding|dict)\. Unpack it: `model\(\*\*inputs\)` or `generate"
    for given in (encoding, dict(encoding)):
        with pytest.raises(TypeError, match=words):
            model.generate(given)
        with pytest.raises(TypeError, match=words):
            model.generate(input_ids=given)
        with pytest.raises(TypeError, match=words):
            model(given)


def test_an_empty_text_in_a_pipeline_is_named(pair: Pair, model: PeftModel) -> None:
    generator = pipeline("text-generation", model=model, tokenizer=pair.tokenizer)
    with pytest.raises(ValueError, match=r"`input_ids` must be given, got none\..* an empty text .* a prompt before"):
        generator("", max_new_tokens=2)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers 5.23 has renamed the method
@pytest.mark.usefixtures("nothing_runs")
def test_generate_in_training_mode_with_checkpointing_is_refused(pair: Pair) -> None:
    model = pair.model()
    model.get_base_model().gradient_checkpointing_enable()
    with pytest.raises(
        ValueError, match=r"`use_cache` must be False while gradient checkpointing is on .*`model.eval"
    ):
        model.train().generate(**pair.batch(QUESTIONS), max_new_tokens=2)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers 5.23 has renamed the method
def test_generate_with_checkpointing_goes_on_in_the_ways_that_the_error_names(pair: Pair) -> None:
    model = pair.model()
    batch, base = pair.batch(QUESTIONS), model.get_base_model()
    expected = answered(model, batch)
    base.gradient_checkpointing_enable()
    assert answered(model.eval(), batch) == expected
    assert answered(model.train(), batch, use_cache=False) == expected
    base.gradient_checkpointing_disable()
    assert answered(model.train(), batch) == expected


def test_a_prompt_of_padding_alone_is_a_text_of_it(pair: Pair) -> None:
    """PEFT's own tests have such a prompt: there is a mask to infer, but not for every row."""
    model, ids = pair.model(), torch.tensor([[0, 0, 0], [0, 40, 41]])
    options = {"max_new_tokens": 3, "do_sample": False}
    expected = model.generate(ids, attention_mask=torch.tensor([[1, 1, 1], [0, 1, 1]]), **options)
    assert torch.equal(model.generate(ids, **options), expected)
