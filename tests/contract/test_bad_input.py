"""Bad input to every public entry: a right answer or an exception in words, and the old answers afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers import CACHE_NAME, assistant_of, backbone_of, projection_of
from oracle import Oracle
from peft import PeftModel, get_peft_model
from tiny_pair import QUESTIONS, Pair
from torch import Tensor, nn
from transformers import LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from softcot_peft import SoftCoTConfig, use_assistant, with_thought_tokens

N, NEW = 4, 3


@dataclass
class Attached:
    """A model with an adapter, a batch, and what it answered at first."""

    model: PeftModel
    batch: dict[str, Tensor]

    def answers(self) -> list[Tensor]:
        self.model.requires_grad_(False)  # torch multiplies by weights that need a gradient in another order
        with torch.no_grad():
            logits = self.model.eval()(**self.batch, logits_to_keep=1).logits
            with self.model.disable_adapter():
                base = self.model(**self.batch).logits
        return [logits, self.model.generate(**self.batch, max_new_tokens=NEW), base]

    def __post_init__(self) -> None:
        self.expected = self.answers()

    def check(self) -> None:
        assert all(torch.equal(new, old) for new, old in zip(self.answers(), self.expected, strict=True))
        ids = self.batch["input_ids"]
        placed = torch.cat([ids, ids[:, :N]], 1)
        embedding = self.model.get_input_embeddings()
        for shape in (ids, placed):
            assert torch.equal(embedding(shape), embedding.base_layer(shape))


@pytest.fixture(scope="module")
def first(pair: Pair) -> Attached:
    return Attached(pair.model(thought_token="<thought>"), pair.batch(QUESTIONS))


@pytest.fixture(scope="module")
def second(pair: Pair) -> Attached:
    return Attached(pair.model(num_thought_tokens=2), pair.batch(QUESTIONS[:2]))


@pytest.fixture
def attached(first: Attached) -> Iterator[Attached]:
    yield first
    first.check()


def call(model: nn.Module, way: str, inputs: dict[str, Any]) -> Any:
    if way == "forward":
        return model(**({} if "labels" in inputs else {"logits_to_keep": 1}) | inputs)
    return model.generate(**inputs, max_new_tokens=NEW)


# Arguments of forward and generate

Change = Callable[[Tensor, Tensor], dict[str, Any]]
OWN = {"assistant_input_ids": torch.full((4, 9), 5)}
EMBEDS = {"input_ids": None, "attention_mask": None, **OWN}

REFUSED: dict[str, tuple[Change, type[Exception], str]] = {
    "float ids": (lambda i, m: {"input_ids": i.float()}, TypeError, "`input_ids` must be a tensor of torch.int64"),
    "short ids": (lambda i, m: {"input_ids": i.short()}, TypeError, "`input_ids`.*got torch.int16"),
    "bool ids": (lambda i, m: {"input_ids": i.bool()}, TypeError, "`input_ids`.*got torch.bool"),
    "list of ids": (lambda i, m: {"input_ids": i.tolist()}, TypeError, "`input_ids` must be a tensor, got list"),
    "array of ids": (lambda i, m: {"input_ids": i.numpy()}, TypeError, "`input_ids` must be a tensor, got ndarray"),
    "text": (lambda i, m: {"input_ids": "hello"}, TypeError, "`input_ids` must be a tensor, got str"),
    "negative ids": (lambda i, m: {"input_ids": i - 999}, ValueError, "`input_ids` must lie within the base's voc"),
    "ids too large": (lambda i, m: {"input_ids": i + 330}, ValueError, "vocabulary, 0 to 329, got 330"),
    "huge ids": (lambda i, m: {"input_ids": i + 2**60}, ValueError, "`input_ids` must lie within"),
    "ids on meta": (lambda i, m: {"input_ids": i.to("meta")}, ValueError, "`input_ids` must hold values"),
    "no ids": (lambda i, m: {"input_ids": None}, ValueError, "`input_ids` must be given"),
    "no rows": (lambda i, m: {"input_ids": i[:0], "attention_mask": m[:0]}, ValueError, "at least one row"),
    "no columns": (lambda i, m: {"input_ids": i[:, :0], "attention_mask": m[:, :0]}, ValueError, "hold a prompt"),
    "one dimension": (lambda i, m: {"input_ids": i[0], "attention_mask": None}, ValueError, "Add the batch"),
    "no dimension": (lambda i, m: {"input_ids": i[0, 0], "attention_mask": None}, ValueError, "Add the batch"),
    "three dimensions": (lambda i, m: {"input_ids": i[None]}, ValueError, "Add the batch"),
    "additive mask": (lambda i, m: {"attention_mask": (1 - m.float()) * -1e9}, ValueError, "0 and 1 only"),
    "NaN in the mask": (lambda i, m: {"attention_mask": m * float("nan")}, ValueError, "0 and 1 only"),
    "negative mask": (lambda i, m: {"attention_mask": -m}, ValueError, "0 and 1 only"),
    "half a mask": (lambda i, m: {"attention_mask": m * 0.5}, ValueError, "0 and 1 only"),
    "empty mask": (lambda i, m: {"attention_mask": m * 0}, ValueError, "row 0 has no attended token"),
    "list as mask": (lambda i, m: {"attention_mask": m.tolist()}, ValueError, "must be the padding mask.*got list"),
    "mask on meta": (lambda i, m: {"attention_mask": m.to("meta")}, ValueError, "`attention_mask` must hold values"),
    "short mask": (lambda i, m: {"attention_mask": m[:, 1:]}, ValueError, "`attention_mask` must have the shape"),
    "mask of one row": (lambda i, m: {"attention_mask": m[:1]}, ValueError, "`attention_mask` must have the shape"),
    "float positions": (lambda i, m: {"position_ids": m.cumsum(1).float()}, TypeError, "`position_ids`.*float32"),
    "short positions": (lambda i, m: {"position_ids": m.cumsum(1)[:, 1:]}, ValueError, "`position_ids` must have the"),
    "flat positions": (lambda i, m: {"position_ids": m.cumsum(1)[0]}, ValueError, "`position_ids` must have the"),
    "one position": (lambda i, m: {"position_ids": torch.tensor(3)}, ValueError, "`position_ids` must have the"),
    "list of positions": (lambda i, m: {"position_ids": [1]}, TypeError, "`position_ids` must be a tensor, got list"),
    "narrow embeddings": (
        lambda i, m: {**EMBEDS, "inputs_embeds": torch.zeros(4, 9, 31)}, ValueError, "base's, 32, got 31",
    ),
    "flat embeddings": (
        lambda i, m: {**EMBEDS, "inputs_embeds": torch.zeros(4, 9)}, ValueError, r"width\), got \(4, 9\)",
    ),
    "integer embeddings": (
        lambda i, m: {**EMBEDS, "inputs_embeds": torch.ones(4, 9, 32).long()}, TypeError, "`inputs_embeds`.*int64",
    ),
    "list of embeddings": (lambda i, m: {**EMBEDS, "inputs_embeds": [[1.0]]}, TypeError, "`inputs_embeds`.*got list"),
    "own ids too large": (
        lambda i, m: {"assistant_input_ids": torch.full((4, 9), 10**6)}, ValueError, "the assistant's voc",
    ),
    "negative own ids": (
        lambda i, m: {"assistant_input_ids": torch.full((4, 9), -1)}, ValueError, "the assistant's voc",
    ),
    "float own ids": (lambda i, m: {"assistant_input_ids": torch.ones(4, 9)}, TypeError, "_input_ids`.*float"),
    "list of own ids": (lambda i, m: {"assistant_input_ids": [[1] * 9] * 4}, TypeError, "`assistant_input_ids`.*list"),
    "flat own ids": (lambda i, m: {"assistant_input_ids": torch.ones(9).long()}, ValueError, "must have 4 rows"),
    "three own rows": (lambda i, m: {"assistant_input_ids": torch.ones(3, 9).long()}, ValueError, "must have 4 rows"),
    "no own ids": (lambda i, m: {"assistant_input_ids": torch.ones(4, 0).long()}, ValueError, "must have 4 rows"),
    "NaN in the own mask": (
        lambda i, m: {**OWN, "assistant_attention_mask": torch.full((4, 9), float("nan"))}, ValueError, "0 and 1 only",
    ),
    "twos in the own mask": (
        lambda i, m: {**OWN, "assistant_attention_mask": torch.full((4, 9), 2)}, ValueError, "0 and 1 only",
    ),
    "text as own mask": (lambda i, m: {**OWN, "assistant_attention_mask": "x"}, TypeError, "assistant_attention_mask"),
    "text as cache": (lambda i, m: {CACHE_NAME: "x"}, ValueError, f"`{CACHE_NAME}` must"),
    "number as cache": (lambda i, m: {CACHE_NAME: 5}, ValueError, f"`{CACHE_NAME}` must"),
    "old kind of cache": (lambda i, m: {CACHE_NAME: ((torch.zeros(1),),)}, ValueError, CACHE_NAME),
}  # fmt: skip

FORWARD_ONLY: dict[str, tuple[Change, type[Exception], str]] = {
    "float labels": (lambda i, m: {"labels": i.float()}, TypeError, "`labels` must be a tensor of torch.int64"),
    "int32 labels": (lambda i, m: {"labels": i.int()}, TypeError, "`labels` must be a tensor of torch.int64"),
    "list of labels": (lambda i, m: {"labels": i.tolist()}, TypeError, "`labels` must be a tensor, got list"),
    "labels on meta": (lambda i, m: {"labels": i.to("meta")}, ValueError, "`labels` must hold values"),
    "short labels": (lambda i, m: {"labels": i[:, 1:]}, ValueError, "`labels` must have the shape"),
    "labels too large": (lambda i, m: {"labels": last(i + 330)}, IndexError, "Target .* is out of bounds"),
    "negative labels": (lambda i, m: {"labels": last(i * 0 - 7)}, IndexError, "Target -7 is out of bounds"),
    "text to keep": (lambda i, m: {"logits_to_keep": "x"}, TypeError, "`logits_to_keep` must be an integer or a tens"),
    "half to keep": (lambda i, m: {"logits_to_keep": 1.5}, TypeError, "`logits_to_keep` must be an integer or a tens"),
    "floats to keep": (lambda i, m: {"logits_to_keep": torch.ones(1)}, TypeError, "`logits_to_keep` must be an int"),
    "mask to keep": (lambda i, m: {"logits_to_keep": m[0].bool()}, TypeError, "`logits_to_keep` must be an integer"),
}


def last(values: Tensor) -> Tensor:
    """Labels of the last column alone."""
    labels = torch.full_like(values, -100)
    labels[:, -1] = values[:, -1]
    return labels


CASES = [(way, name) for name in REFUSED for way in ("forward", "generate")] + [("forward", x) for x in FORWARD_ONLY]


@pytest.mark.filterwarnings("ignore:Without `labels`:UserWarning")
@pytest.mark.parametrize(("way", "name"), CASES)
def test_input_that_cannot_be_read_is_refused_in_words(attached: Attached, way: str, name: str) -> None:
    change, kind, message = (REFUSED | FORWARD_ONLY)[name]
    changes = change(attached.batch["input_ids"], attached.batch["attention_mask"])
    inputs = {key: value for key, value in (attached.batch | changes).items() if value is not None}
    with pytest.raises(kind, match=f"(?s){message}") as info:
        call(attached.model, way, inputs)
    assert type(info.value) is kind


@pytest.mark.parametrize("way", ["forward", "generate"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.int8, torch.float32, torch.bfloat16])
def test_masks_of_every_dtype_are_read(attached: Attached, way: str, dtype: torch.dtype) -> None:
    batch = attached.batch | {"attention_mask": attached.batch["attention_mask"].to(dtype)}
    found = call(attached.model, way, batch)
    expected = attached.expected[0] if way == "forward" else attached.expected[1]
    torch.testing.assert_close(found.logits if way == "forward" else found, expected)


@pytest.mark.parametrize("way", ["forward", "generate"])
def test_int32_ids_are_read(attached: Attached, way: str) -> None:
    found = call(attached.model, way, attached.batch | {"input_ids": attached.batch["input_ids"].int()})
    expected = attached.expected[0] if way == "forward" else attached.expected[1]
    torch.testing.assert_close(found.logits if way == "forward" else found, expected, check_dtype=False)


@pytest.mark.filterwarnings("ignore:Without `labels`:UserWarning")
@pytest.mark.parametrize("keep", [10**12, -3, torch.tensor([-1, 0, -2]), torch.tensor([5, 5])], ids=str)
def test_columns_to_keep_mean_the_callers(attached: Attached, keep: Any) -> None:
    whole = attached.model(**attached.batch).logits
    expected = whole[:, -keep:] if isinstance(keep, int) else whole[:, keep]
    torch.testing.assert_close(attached.model(**attached.batch, logits_to_keep=keep).logits, expected)


def test_not_a_number_comes_out_as_it_went_in(attached: Attached) -> None:
    embeds = torch.full((4, 9, 32), float("nan"))
    assert attached.model(inputs_embeds=embeds, **OWN, logits_to_keep=1).logits.isnan().all()


@pytest.mark.parametrize("where", ["projection", "assistant"])
def test_not_a_number_in_the_weights_is_never_hidden(pair: Pair, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = pair.model()
    if where == "projection":
        projection_of(model).weight.data.fill_(float("nan"))
    else:
        assistant = assistant_of(model)
        hidden = assistant.hidden_states
        monkeypatch.setattr(type(assistant), "hidden_states", lambda self, *a: hidden(*a) * float("nan"))
    assert model(**pair.batch(QUESTIONS), logits_to_keep=1).logits.isnan().all()


# Vocabularies


def test_shared_ids_that_the_assistant_does_not_have_are_refused(pair: Pair) -> None:
    model = pair.model(assistant_shares_tokenizer=True)  # the assistant has 138 ids, the base 330
    batch = pair.batch(QUESTIONS)
    for way in ("forward", "generate"):
        with pytest.raises(ValueError, match=r"`assistant_shares_tokenizer` feeds .* assistant, which has 138"):
            call(model, way, batch)
    ids = torch.randint(3, 100, (2, 9))
    expected = Oracle.of(model, pair.base, pair.assistant, N, same_ids=True)
    for row, logits in zip(ids.tolist(), model(ids, logits_to_keep=1).logits, strict=True):
        torch.testing.assert_close(logits[0], expected.logits(row, [])[-1], atol=1e-4, rtol=1e-4)


def test_a_shared_vocabulary_that_is_too_small_is_refused_at_once_where_it_is_known(pair: Pair) -> None:
    with pytest.raises(
        ValueError, match=r"`assistant_shares_tokenizer` must not be True: .* 330 ids .* assistant 138"
    ):
        pair.model(assistant_shares_tokenizer=True, thought_token="<thought>")


# The other entries


@pytest.mark.parametrize("model", [None, 5, "x", nn.Linear(1, 1), {}])
def test_use_assistant_takes_models_only(model: Any) -> None:
    with pytest.raises(TypeError, match="`model` must be a loaded transformers model, got"):
        use_assistant(model)


@pytest.mark.parametrize("changes", [{"name": 5}, {"name": ["x"]}, {"tokenizer": 5}, {"tokenizer": "x"}])
def test_use_assistant_takes_tokenizers_and_names_only(pair: Pair, changes: dict[str, Any]) -> None:
    (argument,) = changes
    with pytest.raises(TypeError, match=f"`{argument}` must be a "):
        use_assistant(pair.load_base(), **changes)


@pytest.mark.parametrize("tokenizer", [None, 5, "x"])
def test_with_thought_tokens_takes_tokenizers_only(pair: Pair, tokenizer: Any) -> None:
    with pytest.raises(TypeError, match="`tokenizer` must be a tokenizer"):
        with_thought_tokens(tokenizer, pair.config(thought_token="<thought>"))


@pytest.mark.parametrize("config", [None, {}, "x"])
def test_with_thought_tokens_takes_configs_only(pair: Pair, config: Any) -> None:
    with pytest.raises(TypeError, match="`config` must be a SoftCoTConfig"):
        with_thought_tokens(pair.tokenizer, config)


@pytest.mark.parametrize("where", [None, 5, ["user_turn"], "", "end"])
def test_with_thought_tokens_knows_two_places(pair: Pair, where: Any) -> None:
    with pytest.raises(ValueError, match="`where` must be"):
        with_thought_tokens(pair.tokenizer, pair.config(thought_token="<thought>"), where)


FIELDS = ["assistant_model_name_or_path", "assistant_revision", "num_thought_tokens", "inference_num_thought_tokens",
          "thought_token", "placement", "assistant_prompt", "assistant_thought_token", "assistant_shares_tokenizer",
          "tokenizer_name_or_path", "init_weights"]  # fmt: skip
VALUES = [5.5, float("nan"), b"x", [], {}, object(), -(10**30), torch.ones(1), int]


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_fields_refuse_what_they_cannot_be(pair: Pair, field: str, value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=f"`{field}` must be"):
        pair.config(**{field: value})


@pytest.mark.parametrize("config", [None, 5, "x", {}, {"peft_type": "SOFTCOT"}])
def test_a_base_takes_configs_only(pair: Pair, config: Any) -> None:
    base = pair.load_base()
    with pytest.raises((TypeError, ValueError, AttributeError, KeyError)):  # of PEFT
        get_peft_model(base, config)
    assert type(base.get_input_embeddings()) is nn.Embedding


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"{", b"\x00" * 64])
def test_broken_folders_leave_a_plain_base(pair: Pair, tmp_path: Any, file: str, content: bytes | None) -> None:
    pair.model().save_pretrained(tmp_path)
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_bytes(content)
    base = pair.load_base()
    with pytest.raises(Exception, match=r"."):  # of PEFT, json and safetensors
        PeftModel.from_pretrained(base, tmp_path)
    if file == "adapter_config.json":
        assert type(base.get_input_embeddings()) is nn.Embedding


# Interrupted anywhere


class Interruption(BaseException):
    """No Exception, as a KeyboardInterrupt is none."""


class Streamer(BaseStreamer):
    def __init__(self, fail: Callable[..., Any]) -> None:
        self.fail, self.calls = fail, 0

    def put(self, value: Tensor) -> None:
        self.calls += 1
        if self.calls == 2:
            self.fail()

    def end(self) -> None:
        pass


def place_trap(where: str, model: PeftModel, fail: Callable[..., Any]) -> tuple[Callable[[], None], dict[str, Any]]:
    """Put a failure somewhere; returns what takes it away again, and options of `generate`."""
    base: PreTrainedModel = model.get_base_model()
    layer = model.get_input_embeddings()
    modules = {
        "assistant": backbone_of(model),
        "projection": projection_of(model),
        "embedding": layer,
        "inner embedding": layer.base_layer,
        "first layer": base.model.layers[0],
        "last layer": base.model.layers[-1],
        "backbone": base.model,
        "head": base.lm_head,
    }
    name, _, when = where.partition(", ")
    if name in modules:
        hook = modules[name].register_forward_pre_hook if when == "before" else modules[name].register_forward_hook
        return hook(lambda *args: fail()).remove, {}
    if name == "head while decoding":
        passes: list[int] = []

        def third(*args: Any) -> None:
            passes.append(1)
            if len(passes) == 3:
                fail()

        return base.lm_head.register_forward_pre_hook(third).remove, {}
    options: dict[str, Any] = {
        "logits processor": {"logits_processor": LogitsProcessorList([lambda ids, scores: fail()])},
        "stopping criterion": {"stopping_criteria": StoppingCriteriaList([lambda ids, scores, **_: fail()])},
        "streamer": {"streamer": Streamer(fail)},
    }
    return (lambda: None), options[name]


MODULES = ["assistant", "projection", "embedding", "inner embedding", "first layer", "last layer", "backbone", "head"]
TRAPS = [
    (way, f"{name}, {when}") for way in ("forward", "generate") for name in MODULES for when in ("before", "after")
]
TRAPS += [("generate", name) for name in ("head while decoding", "logits processor", "stopping criterion", "streamer")]


@pytest.mark.parametrize(("way", "where"), TRAPS)
@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt, SystemExit, Interruption])
def test_whatever_is_raised_wherever_leaves_nothing_behind(
    first: Attached, second: Attached, way: str, where: str, kind: type[BaseException]
) -> None:
    def fail(*args: Any) -> None:
        raise kind("in the middle")

    remove, options = place_trap(where, first.model, fail)
    batch = dict(first.batch)
    if options.get("streamer"):
        batch = {name: value[:1] for name, value in batch.items()}
    try:
        with pytest.raises(kind, match="in the middle"):
            call(first.model, way, batch | options)
    finally:
        remove()
    second.check()
    first.check()


def test_a_default_config_still_needs_an_assistant() -> None:
    with pytest.raises(ValueError, match="`assistant_model_name_or_path` must name"):
        SoftCoTConfig(task_type="CAUSAL_LM")
