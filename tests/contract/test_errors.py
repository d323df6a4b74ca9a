"""Loud, early, exact errors: they name field, requirement, value found and what to do, and they change nothing."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import collate, labelled
from helpers import CACHE_NAME, break_assistants
from oracle import Oracle
from peft import PeftModel, get_peft_model
from project_files import rewrite
from safetensors.torch import load_file, save_file
from tiny_pair import QUESTIONS, Pair, make_assistant_tokenizer
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    GenerationConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from softcot_peft import SoftCoTConfig

N = 4
NEW = 5


@contextmanager
def refused(*parts: str, kind: type[Exception] = ValueError) -> Iterator[None]:
    """The block must raise exactly this kind of exception, and its message must hold all of these parts."""
    with pytest.raises(kind) as info:
        yield
    assert type(info.value) is kind
    for part in parts:
        assert part in str(info.value)


@dataclass
class Old:
    """A model and what it answered before anything went wrong."""

    model: nn.Module
    batch: dict[str, Tensor]

    def __post_init__(self) -> None:
        # PEFT freezes the base, and torch multiplies by weights that need no gradient in another order.
        self.model.requires_grad_(False)
        self.expected = self.answers()

    def answers(self) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            logits = self.model.eval()(**self.batch, logits_to_keep=1).logits
        return logits, self.model.generate(**self.batch, max_new_tokens=NEW)

    def check(self) -> None:
        assert all(torch.equal(new, old) for new, old in zip(self.answers(), self.expected, strict=True))


@pytest.fixture(scope="module")
def attached(pair: Pair) -> Old:
    model = pair.model(thought_token="<thought>")
    old = Old(model, pair.batch(QUESTIONS))
    oracle = Oracle.of(model, pair.base, pair.assistant, N)
    for row, found in zip(pair.rows(QUESTIONS), old.expected[1].tolist(), strict=True):
        expected = oracle.generate(row, NEW)
        assert found[old.batch["input_ids"].shape[1] :][: len(expected)] == expected
    return old


@pytest.fixture
def model(attached: Old) -> Iterator[PeftModel]:
    """A model that must answer the same after the test as before."""
    yield attached.model
    attached.check()


@pytest.fixture
def base(pair: Pair) -> Iterator[PreTrainedModel]:
    """A plain base that must still be one after the test."""
    model = pair.load_base()
    old, attributes, keys = Old(model, pair.batch(QUESTIONS)), set(vars(model)), list(model.state_dict())
    yield model
    assert type(model.get_input_embeddings()) is nn.Embedding
    assert (set(vars(model)), list(model.state_dict())) == (attributes, keys)
    old.check()


def call_model(model: nn.Module, call: str, inputs: dict[str, Any]) -> None:
    """`forward` for the next token, or `generate`."""
    model(**inputs, logits_to_keep=1) if call == "forward" else model.generate(**inputs, max_new_tokens=NEW)


# The config


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"num_thought_tokens": 0}, ["`num_thought_tokens`", "at least 1", "got 0"]),
        ({"num_thought_tokens": -3}, ["`num_thought_tokens`", "at least 1", "got -3"]),
        ({"inference_num_thought_tokens": 0}, ["`inference_num_thought_tokens`", "at least 1", "got 0"]),
        ({"assistant_model_name_or_path": None}, ["`assistant_model_name_or_path`", "got None", "`use_assistant`"]),
        ({"assistant_model_name_or_path": ""}, ["`assistant_model_name_or_path`", "got ''", "Hub id"]),
        ({"placement": "end"}, ["`placement`", "'prompt_end', 'thought_token'", "got 'end'"]),
        (
            {"placement": "thought_token"},
            ["`placement='thought_token'`", "`thought_token`, got None", "Name the token"],
        ),
        ({"assistant_prompt": "Think."}, ["`assistant_prompt`", "'{prompt}'", "'Think.'", "Write {prompt}"]),
        (
            {"assistant_prompt": "{prompt}", "assistant_shares_tokenizer": True},
            ["`assistant_prompt`", "`assistant_shares_tokenizer=True`", "Leave one"],
        ),
        ({"task_type": "SEQ_CLS"}, ["`task_type`", "'CAUSAL_LM' or None", "SEQ_CLS"]),
    ],
)
def test_values_that_a_field_cannot_have_are_refused(pair: Pair, changes: dict[str, Any], parts: list[str]) -> None:
    with refused(*parts):
        pair.config(**changes)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"num_thought_tokens": 2.0}, ["`num_thought_tokens`", "integer", "got 2.0"]),
        ({"num_thought_tokens": "4"}, ["`num_thought_tokens`", "integer", "got '4'"]),
        ({"num_thought_tokens": True}, ["`num_thought_tokens`", "integer", "got True"]),
        ({"num_thought_tokens": None}, ["`num_thought_tokens`", "integer", "got None"]),
        ({"inference_num_thought_tokens": 1.5}, ["`inference_num_thought_tokens`", "integer", "got 1.5"]),
        ({"thought_token": 5}, ["`thought_token`", "string", "got int"]),
        ({"assistant_prompt": ["{prompt}"]}, ["`assistant_prompt`", "string", "got list"]),
        ({"assistant_revision": 3}, ["`assistant_revision`", "string", "got int"]),
        (
            {"assistant_model_name_or_path": nn.Linear(1, 1)},
            ["`assistant_model_name_or_path`", "string", "got Linear", "`use_assistant`"],
        ),
        ({"assistant_shares_tokenizer": "yes"}, ["`assistant_shares_tokenizer`", "yes"]),
        ({"init_weights": "no"}, ["`init_weights`", "no"]),
        ({"number_of_thoughts": 4}, ["unexpected keyword argument 'number_of_thoughts'"]),
    ],
)
def test_types_that_a_field_cannot_have_are_refused(pair: Pair, changes: dict[str, Any], parts: list[str]) -> None:
    with refused(*parts, kind=TypeError):
        pair.config(**changes)


def test_no_assistant_named_is_refused() -> None:
    with refused("`assistant_model_name_or_path` must name the assistant", "got None", "`use_assistant`"):
        SoftCoTConfig()


def test_a_field_of_a_later_version_is_announced_and_ignored(pair: Pair, tmp_path: Path) -> None:
    model = pair.model()
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, thoughts_per_minute=7)
    with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['thoughts_per_minute'\] for class SoftCoT"):
        loaded = PeftModel.from_pretrained(pair.load_base(), tmp_path)
    batch = pair.batch(QUESTIONS) | {"logits_to_keep": 1}
    assert torch.equal(loaded.eval()(**batch).logits, model(**batch).logits)


# Attaching


def bert() -> PreTrainedModel:
    return BertForMaskedLM(
        BertConfig(vocab_size=150, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    )


def t5() -> PreTrainedModel:
    return T5ForConditionalGeneration(T5Config(vocab_size=150, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))


@pytest.mark.parametrize(
    ("make", "parts"),
    [(bert, ["'bert'", "an encoder:"]), (t5, ["'t5'", "an encoder-decoder."])],
    ids=["encoder", "encoder-decoder"],
)
def test_an_assistant_that_is_no_decoder_is_refused(
    pair: Pair, base: PreTrainedModel, tmp_path: Path, make: Callable[[], PreTrainedModel], parts: list[str]
) -> None:
    make().save_pretrained(tmp_path)
    make_assistant_tokenizer().save_pretrained(tmp_path)
    with refused(f"The assistant {str(tmp_path)!r} must be a decoder LM", *parts, "`use_assistant("):
        get_peft_model(base, pair.config(assistant_model_name_or_path=str(tmp_path)))


@pytest.mark.parametrize("name", ["./pair/asistant", "runs/pair/asistant", "/nowhere"])
def test_a_misspelt_folder_is_called_missing(pair: Pair, base: PreTrainedModel, name: str) -> None:
    with refused(f"got {name!r}: There is no such folder, and a Hub id has the form"):
        get_peft_model(base, pair.config(assistant_model_name_or_path=name))


@pytest.mark.parametrize("name", ["org/unheard-of", "no-such-folder", "/no/such/folder", "my-assistant"])
def test_an_assistant_that_cannot_be_found_is_refused(pair: Pair, base: PreTrainedModel, name: str) -> None:
    with refused("`assistant_model_name_or_path`", repr(name), "`use_assistant(model, tokenizer, name="):
        get_peft_model(base, pair.config(assistant_model_name_or_path=name))


def test_a_dtype_that_does_not_exist_is_refused(pair: Pair, base: PreTrainedModel) -> None:
    with refused("`assistant_dtype`", "'float99'"):
        get_peft_model(base, pair.config(assistant_dtype="float99"))


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (
            {"thought_token": "two words"},
            ["`thought_token` must be one token of the base's", "'two words'", "7 tokens"],
        ),
        ({"thought_token": "<unheard-of>"}, ["`thought_token`", "'<unheard-of>'", "Choose a token"]),
        (
            {"assistant_thought_token": "<thought>"},
            ["`assistant_thought_token` must be one token of the assistant's", "'<thought>'", "Choose a token"],
        ),
        ({"tokenizer_name_or_path": "nowhere"}, ["`tokenizer_name_or_path`", "'nowhere'", "Set it to"]),
    ],
)
def test_tokens_and_tokenizers_that_do_not_exist_are_refused(
    pair: Pair, base: PreTrainedModel, changes: dict[str, Any], parts: list[str]
) -> None:
    with refused(*parts):
        get_peft_model(base, pair.config(**changes))


def test_a_base_without_a_tokenizer_is_refused(pair: Pair) -> None:
    base = pair.load_base()
    base.config._name_or_path = base.name_or_path = ""
    with refused("`tokenizer_name_or_path` must be given", "no `name_or_path`", "`assistant_shares_tokenizer=True`"):
        get_peft_model(base, pair.config())


@pytest.mark.parametrize("way", ["get_peft_model", "add_adapter", "load_adapter"])
def test_an_adapter_that_is_refused_leaves_the_others_alone(pair: Pair, tmp_path: Path, way: str) -> None:
    pair.model().save_pretrained(tmp_path)
    if way == "get_peft_model":
        model = PeftModel.from_pretrained(pair.load_base(), tmp_path)
    else:
        model = pair.load_base()
        model.load_adapter(str(tmp_path))
    old = Old(model, pair.batch(QUESTIONS))
    rewrite(tmp_path, thought_token="<unheard-of>")
    with refused("`thought_token`", "'<unheard-of>'"):
        if way == "add_adapter":
            model.add_adapter(pair.config(thought_token="<unheard-of>"), "refused")
        else:
            model.load_adapter(str(tmp_path), adapter_name="refused")
    old.check()
    assert set(model.peft_config) == {"default"}
    rewrite(tmp_path, thought_token=None)
    model.load_adapter(str(tmp_path), adapter_name="refused")  # the name is free
    model.set_adapter("refused")
    old.check()


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (bert, ["The base must be a decoder LM", "'bert'", "an encoder:", "AutoModelForCausalLM"]),
        (t5, ["The base must be a decoder LM", "'t5'", "an encoder-decoder.", "AutoModelForCausalLM"]),
    ],
    ids=["encoder", "encoder-decoder"],
)
@pytest.mark.parametrize("task_type", ["CAUSAL_LM", None])
def test_a_base_that_is_no_decoder_is_refused(
    pair: Pair, make: Callable[[], PreTrainedModel], parts: list[str], task_type: str | None
) -> None:
    with refused(*parts):
        get_peft_model(make(), pair.config(task_type=task_type))


@pytest.mark.parametrize("kind", [LlamaModel, LlamaForSequenceClassification])
@pytest.mark.parametrize("task_type", ["CAUSAL_LM", None])
def test_a_base_without_a_language_modelling_head_is_refused(
    pair: Pair, kind: type[PreTrainedModel], task_type: str | None
) -> None:
    base = kind.from_pretrained(pair.base)
    with refused("base", kind.__name__, "AutoModelForCausalLM"):
        get_peft_model(base, pair.config(task_type=task_type))
    assert type(base.get_input_embeddings()) is nn.Embedding


def test_a_base_that_is_no_transformers_model_is_refused(pair: Pair) -> None:
    with refused("must be a transformers model", "got Sequential", kind=TypeError):
        get_peft_model(nn.Sequential(nn.Embedding(3, 4)), pair.config())


# Adapters that do not fit


@pytest.fixture(scope="module")
def fitting(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved adapter from 24 to 32."""
    folder = tmp_path_factory.mktemp("fitting")
    pair.model().save_pretrained(folder)
    return folder


@pytest.fixture
def unfitting(fitting: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(fitting, tmp_path / "unfitting"))


def load_with(way: str, base: PreTrainedModel, folder: Path) -> object:
    return PeftModel.from_pretrained(base, folder) if way == "peft" else base.load_adapter(str(folder))


def misfit(trained_assistant: int, trained_base: int, assistant: int, base: int) -> list[str]:
    return [
        f"assistant hidden size {trained_assistant}",
        f"base hidden size {trained_base}",
        f"this assistant has {assistant}",
        f"this base {base}",
        "`base_model_name_or_path`",
        "`assistant_model_name_or_path`",
    ]


@pytest.mark.parametrize("way", ["peft", "transformers"])
def test_an_adapter_for_another_assistant_is_refused(
    pair: Pair, base: PreTrainedModel, unfitting: Path, way: str
) -> None:
    rewrite(unfitting, assistant_model_name_or_path=str(pair.twin))
    with refused(*misfit(24, 32, 20, 32)):
        load_with(way, base, unfitting)


@pytest.mark.parametrize("way", ["peft", "transformers"])
def test_an_adapter_for_another_base_is_refused(pair: Pair, fitting: Path, tmp_path: Path, way: str) -> None:
    config = pair.load_base().config
    config.hidden_size = 48
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    pair.tokenizer.save_pretrained(tmp_path)
    wider = AutoModelForCausalLM.from_pretrained(tmp_path)
    old = Old(wider, pair.batch(QUESTIONS))
    with refused(*misfit(24, 32, 24, 48)):
        load_with(way, wider, fitting)
    old.check()
    assert type(wider.get_input_embeddings()) is nn.Embedding


def write_weights(folder: Path, **shapes: tuple[int, ...]) -> None:
    """Replace tensors of a saved adapter by others of these shapes."""
    file = folder / "adapter_model.safetensors"
    weights = {
        key: torch.ones(shapes.get(key.rpartition(".")[2], tuple(value.shape)))
        for key, value in load_file(file).items()
    }
    save_file(weights, file)


@pytest.mark.parametrize(("shape", "parts"), [((32, 20), misfit(20, 32, 24, 32)), ((48, 24), misfit(24, 48, 24, 32))])
def test_weights_of_another_shape_are_refused(
    base: PreTrainedModel, unfitting: Path, shape: tuple[int, int], parts: list[str]
) -> None:
    write_weights(unfitting, weight=shape)  # and the config says otherwise
    with refused(*parts):
        PeftModel.from_pretrained(base, unfitting)


def test_weights_of_another_shape_do_not_join_the_adapters_of_a_model(
    pair: Pair, fitting: Path, unfitting: Path
) -> None:
    model = PeftModel.from_pretrained(pair.load_base(), fitting)
    old = Old(model, pair.batch(QUESTIONS))
    write_weights(unfitting, weight=(32, 20))
    with refused(*misfit(20, 32, 24, 32)):
        model.load_adapter(unfitting, "refused")
    old.check()
    assert set(model.peft_config) == {"default"}
    assert not any(".refused." in name for name in model.state_dict())


def test_weights_of_another_shape_are_refused_by_transformers_too(base: PreTrainedModel, unfitting: Path) -> None:
    write_weights(unfitting, weight=(32, 20))
    with refused(*misfit(20, 32, 24, 32)):
        base.load_adapter(str(unfitting))


# Merging


@pytest.mark.parametrize(
    "merge",
    [
        lambda model: model.merge_and_unload(),
        lambda model: model.merge_and_unload(safe_merge=True),
        lambda model: model.merge_adapter(),
        lambda model: model.get_input_embeddings().merge(),
    ],
    ids=["merge_and_unload", "safe_merge", "merge_adapter", "layer"],
)
def test_merging_is_refused(model: PeftModel, merge: Callable[[PeftModel], object]) -> None:
    with refused("SoftCoT adapter cannot be merged", "`unload()`"):
        merge(model)


# Inputs that cannot carry thoughts, in `forward` and in `generate`


def texts(*rows: str) -> Callable[[Pair], dict[str, Any]]:
    return lambda pair: pair.batch(list(rows))


def with_ids(**more: Any) -> Callable[[Pair], dict[str, Any]]:
    """Two rows of seven tokens, and more."""
    return lambda pair: {"input_ids": torch.arange(20, 34).view(2, 7), **more}


def own_input(*shape: int, mask: Tensor | None = None) -> dict[str, Tensor]:
    own = {"assistant_input_ids": torch.ones(shape, dtype=torch.long)}
    return own if mask is None else own | {"assistant_attention_mask": mask}


def without_thoughts(pair: Pair) -> dict[str, Any]:
    batch = pair.batch(QUESTIONS)
    return batch | {CACHE_NAME: pair.load_base()(**pair.batch(QUESTIONS), use_cache=True)[CACHE_NAME]}


CUMULATED = torch.tensor([0, 3, 7], dtype=torch.int32)
BAD_INPUTS: dict[str, tuple[Callable[[Pair], dict[str, Any]], list[str]]] = {
    "runs of different lengths": (
        texts("How<thought><thought> many", "How<thought> many"),
        ["Every row must hold the same number of thought tokens", "[2, 1]", "Write the same run"],
    ),
    "a row without a run": (texts("How<thought> many", "How many"), ["same number of thought tokens", "[1, 0]"]),
    "a broken run": (
        texts("How<thought><thought> many", "How<thought> many<thought>"),
        ["next to each other", "row 1 has 2", "unbroken run", "`thought_token`"],
    ),
    "nothing before the run": (
        texts("How<thought> many", "<thought> How many"),
        ["Every row needs a prompt before its thoughts", "row 1"],
    ),
    "a row that is all padding": (
        with_ids(attention_mask=torch.tensor([[1] * 7, [0] * 7])),
        ["Every row needs a prompt before its thoughts", "row 1"],
    ),
    "no tokens": (lambda pair: {"input_ids": torch.zeros(1, 0, dtype=torch.long)}, ["prompt"]),
    "nothing": (lambda pair: {}, ["`input_ids` must be given", "got none"]),
    "one dimension": (lambda pair: {"input_ids": torch.arange(20, 27)}, ["`input_ids`", "(7,)"]),
    "embeddings alone": (
        lambda pair: {"inputs_embeds": torch.randn(2, 7, 32)},
        ["`inputs_embeds`", "Pass `input_ids`", "`assistant_input_ids`"],
    ),
    "positions that start again": (
        with_ids(position_ids=torch.tensor([[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 0, 1, 2, 3]])),
        ["`position_ids` must rise", "start again", "Turn `packing`"],
    ),
    "positions that start again after a run": (
        lambda pair: pair.batch(["How<thought> many"]) | {"position_ids": torch.tensor([[0, 1, 0]])},
        ["`position_ids` must rise", "Turn `packing`"],
    ),
    "a mask that numbers sequences": (
        with_ids(attention_mask=torch.tensor([[1] * 7, [1, 1, 1, 2, 2, 2, 2]])),
        ["`attention_mask` must hold 0 and 1 only", "got 2 in row 1", "turn packing off"],
    ),
    **{
        name: (with_ids(**{name: CUMULATED}), [f"`{name}`", "packed or padding-free batch", "Turn `packing`"])
        for name in ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "seq_idx", "block_table")
    },
    "a mask of four dimensions": (
        with_ids(attention_mask=torch.ones(2, 1, 7, 7)),
        ["`attention_mask` must be the padding mask", "got 4 dimensions", "tokenizer's mask"],
    ),
    "masks by layer": (
        with_ids(attention_mask={"full_attention": None}),
        ["`attention_mask` must be the padding mask", "got dict"],
    ),
    "a mask of another shape": (
        with_ids(attention_mask=torch.ones(2, 6, dtype=torch.long)),
        ["`attention_mask`", "(2, 6)", "(2, 7)"],
    ),
    "an assistant's input with too few rows": (
        with_ids(**own_input(1, 9)),
        ["`assistant_input_ids` must have 2 rows", "4 thought positions", "(1, 9)", "one row per prompt"],
    ),
    "an assistant's input without a batch": (with_ids(**own_input(9)), ["`assistant_input_ids`", "(9,)"]),
    "an assistant's input shorter than the thoughts": (
        with_ids(**own_input(2, 3)),
        ["`assistant_input_ids`", "(2, 3)"],
    ),
    "an assistant's mask of another shape": (
        with_ids(**own_input(2, 9, mask=torch.ones(2, 8, dtype=torch.long))),
        ["`assistant_input_ids`", "(2, 9) and (2, 8)"],
    ),
    "an assistant's input padded on the right": (
        with_ids(**own_input(2, 9, mask=torch.tensor([[1] * 9, [1] * 7 + [0] * 2]))),
        ["`assistant_attention_mask`", "thought positions", "left"],
    ),
    "an assistant's mask alone": (
        with_ids(assistant_attention_mask=torch.ones(2, 9, dtype=torch.long)),
        ["`assistant_attention_mask`", "`assistant_input_ids`"],
    ),
    "a cache that was read without thoughts": (without_thoughts, [f"`{CACHE_NAME}`", "empty", "`input_ids`"]),
    "adapters by row": (
        with_ids(adapter_names=["default"] * 2),
        ["`adapter_names` is not supported", "`set_adapter`"],
    ),
}


@pytest.mark.parametrize("call", ["forward", "generate"])
@pytest.mark.parametrize("name", BAD_INPUTS)
def test_inputs_that_cannot_carry_thoughts_are_refused(pair: Pair, model: PeftModel, name: str, call: str) -> None:
    make, parts = BAD_INPUTS[name]
    inputs = make(pair)
    with refused(*parts):
        call_model(model, call, inputs)


@pytest.fixture(scope="module")
def tabled(pair: Pair) -> PeftModel:
    """A GPT-2 with a table of 256 positions, as base and as its own assistant."""
    config = pair.config(assistant_model_name_or_path=str(pair.twin), thought_token="<thought>")
    return get_peft_model(AutoModelForCausalLM.from_pretrained(pair.twin), config).eval()


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_rows_longer_than_a_table_of_positions_are_refused(tabled: PeftModel, call: str) -> None:
    with refused("assistant's 256 positions", f"got 253 + {N} tokens", "Shorten the prompt"):
        call_model(tabled, call, {"input_ids": torch.full((1, 240), 30), **own_input(1, 257)})
    with refused("base's 256 positions", f"got 253 + {N}", "Shorten the input", "`num_thought_tokens`"):
        call_model(tabled, call, {"input_ids": torch.full((1, 253), 30), **own_input(1, 9)})


def test_rows_that_just_fit_a_table_of_positions_are_accepted(tabled: PeftModel) -> None:
    own = own_input(1, 256)
    assert tabled(input_ids=torch.full((1, 252), 30), **own, logits_to_keep=1).logits.isfinite().all()
    ids = torch.full((1, 256), 30)
    ids[0, 100:104] = 2  # <thought>: no positions are added to these
    assert tabled(input_ids=ids, **own, logits_to_keep=1).logits.isfinite().all()


def test_rotary_positions_have_no_end(model: PeftModel) -> None:
    long = {"input_ids": torch.full((1, 600), 30), **own_input(1, 300)}  # of 512 and 256
    assert model(**long, logits_to_keep=1).logits.isfinite().all()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("rows", "responses", "parts"),
    [
        (
            ["How<thought><thought>", "How many"],
            ["many", "seven<thought><thought>"],
            ["Every row must hold the same number of thought tokens", "[2, 0]"],  # a labelled one is text
        ),
        (
            ["How many", ""],
            ["legs", "How many legs"],
            ["Every row needs a prompt before its thoughts", "row 1", "Set the labels of the prompt to -100"],
        ),
    ],
    ids=["run in a response", "label without a prompt"],
)
def test_labels_that_leave_no_place_for_thoughts_are_refused(
    pair: Pair, model: PeftModel, rows: list[str], responses: list[str], parts: list[str], training: bool
) -> None:
    batch = collate(labelled(pair.rows(rows), pair.rows(responses)))
    with refused(*parts):
        model.train(training)(**batch)


def test_labels_of_another_shape_are_refused(model: PeftModel) -> None:
    ids = torch.arange(20, 34).view(2, 7)
    with refused("`labels`", "(2, 6)", "(2, 7)"):
        model(input_ids=ids, labels=ids[:, :6])


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_an_adapter_of_the_run_refuses_prompts_without_one(pair: Pair, call: str) -> None:
    model = pair.model(thought_token="<thought>", placement="thought_token")
    old = Old(model, pair.batch([text + "<thought>" * N for text in QUESTIONS]))
    embeds = {"inputs_embeds": torch.randn(2, 7, 32), **own_input(2, 9)}
    for batch in (pair.batch(QUESTIONS), embeds):
        with refused("`placement='thought_token'`", "a run of `thought_token`", "found none", "`with_thought_tokens`"):
            call_model(model, call, batch)
    old.check()


def test_a_loaded_adapter_of_the_run_refuses_prompts_without_one(pair: Pair, tmp_path: Path) -> None:
    pair.model(thought_token="<thought>", placement="thought_token").save_pretrained(tmp_path)
    base = pair.load_base()
    base.load_adapter(str(tmp_path))
    with refused("`placement='thought_token'`", "found none"):
        base.generate(**pair.batch(QUESTIONS), max_new_tokens=2)


# Options of `generate`


@pytest.mark.parametrize("where", ["argument", "config", "model's config"])
@pytest.mark.parametrize(
    ("name", "value"), [("guidance_scale", 2.0), ("token_healing", True), ("assistant_early_exit", 1)]
)
def test_options_that_run_the_base_without_thoughts_are_refused(
    pair: Pair, model: PeftModel, monkeypatch: pytest.MonkeyPatch, name: str, value: Any, where: str
) -> None:
    options: dict[str, Any] = {"max_new_tokens": 2}
    if where == "argument":
        options[name] = value
    elif where == "config":
        options = {"generation_config": GenerationConfig(**options, **{name: value})}
    else:
        monkeypatch.setattr(model.get_base_model().generation_config, name, value)
    with refused(f"`{name}`", repr(value), "Leave it out, or disable the adapter"):
        model.generate(**pair.batch(QUESTIONS), **options, tokenizer=pair.tokenizer)
    monkeypatch.undo()


@pytest.mark.parametrize("value", [None, 1, 1.0])
def test_options_at_their_neutral_values_are_accepted(pair: Pair, attached: Old, value: Any) -> None:
    options = {"guidance_scale": value, "token_healing": False, "assistant_early_exit": None}
    found = attached.model.generate(**attached.batch, max_new_tokens=NEW, **options)
    assert torch.equal(found, attached.expected[1])


# Several adapters at once


@pytest.mark.parametrize("bare", [False, True])
def test_two_active_adapters_are_refused(pair: Pair, bare: bool) -> None:
    model = pair.model()
    model.add_adapter("other", pair.config(num_thought_tokens=2))
    old = Old(model, pair.batch(QUESTIONS))
    answering = model.get_base_model() if bare else model
    model.base_model.set_adapter(["default", "other"])
    for call in (answering, answering.generate):
        with refused("One SoftCoT adapter can be active at a time", "['default', 'other']", "`set_adapter`"):
            call(**pair.batch(QUESTIONS))
    model.set_adapter("default")
    old.check()


# Errors of others, in the middle of things


@pytest.mark.parametrize("call", ["forward", "generate", "decoding"])
def test_an_error_inside_the_base_leaves_nothing_behind(pair: Pair, model: PeftModel, call: str) -> None:
    passes = []

    def fail(module: nn.Module, args: Any) -> None:
        passes.append(module)
        if len(passes) == (3 if call == "decoding" else 1):
            raise RuntimeError("out of luck")

    handle = model.get_base_model().lm_head.register_forward_pre_hook(fail)
    batch = pair.batch(QUESTIONS)
    try:
        with refused("out of luck", kind=RuntimeError):
            call_model(model, call, batch)
    finally:
        handle.remove()
    # What the failed pass would have written is not written into ids of the same shape.
    ids = pair.batch(QUESTIONS)["input_ids"]
    ids = torch.cat([ids, ids[:, :N]], dim=1)
    embedding = model.get_input_embeddings()
    assert torch.equal(embedding(ids), embedding.base_layer(ids))


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_an_error_inside_the_assistant_leaves_nothing_behind(
    pair: Pair, model: PeftModel, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    break_assistants(monkeypatch, RuntimeError("out of luck"))
    with refused("out of luck", kind=RuntimeError):
        call_model(model, call, pair.batch(QUESTIONS))
    monkeypatch.undo()
