"""Every way to run the base without passing placement carries the thoughts or says that it cannot."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import re
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import (
    CACHE_NAME,
    backbone_of,
    generated,
    given_assistants,
    loaded_assistants,
    next_logits,
    reader_of,
    wrap_encoding,
)
from oracle import Oracle
from peft import PeftModel, get_peft_model
from tiny_pair import QUESTIONS, Pair
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, GenerationConfig, StaticCache

from softcot_peft import use_assistant

N, NEW = 4, 5
CLOSE: dict[str, Any] = {"atol": 2e-4, "rtol": 2e-4}  # logits around 10, of several hundred roundings


@pytest.fixture
def model(pair: Pair) -> PeftModel:
    return pair.model(thought_token="<thought>")


@pytest.fixture
def oracle(pair: Pair, model: PeftModel) -> Oracle:
    return Oracle.of(model, pair.base, pair.assistant, N)


def new_tokens(model: nn.Module, batch: dict[str, Tensor]) -> list[list[int]]:
    return generated(model, batch, NEW, min_new_tokens=NEW)


def check_against(oracle: Oracle, model: nn.Module, pair: Pair, texts: list[str] = QUESTIONS) -> None:
    for row, logits in zip(pair.rows(texts), next_logits(model, pair.batch(texts)), strict=True):
        torch.testing.assert_close(logits, oracle.logits(row, [])[-1], **CLOSE)


# Calls of the base's parts

PARTS: dict[str, Callable[[PeftModel], Callable[..., Any]]] = {
    "backbone": lambda model: model.get_base_model().model,
    "base_model": lambda model: model.get_base_model().base_model,
    "decoder": lambda model: model.get_base_model().get_decoder(),
    "forward": lambda model: model.get_base_model().forward,
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_the_base_refuses_to_run_by_itself(pair: Pair, model: PeftModel, part: str, training: bool) -> None:
    model.train(training)
    with pytest.raises(ValueError, match=r"`LlamaModel` was called outside of a call of `LlamaForCausalLM`.*disable"):
        PARTS[part](model)(**pair.batch(QUESTIONS))


@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_the_base_runs_while_adapters_are_disabled(pair: Pair, model: PeftModel, part: str) -> None:
    batch, plain = pair.batch(QUESTIONS), pair.load_base()
    expected = plain(**batch).logits if part == "forward" else plain.model(**batch).last_hidden_state
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(PARTS[part](model)(**batch)[0], expected)
    model.unload()
    assert torch.equal(PARTS[part](model)(**batch)[0], expected)


def test_the_base_itself_carries_thoughts(pair: Pair, model: PeftModel, oracle: Oracle) -> None:
    check_against(oracle, model.get_base_model(), pair)
    check_against(oracle, model.base_model, pair)


def test_the_embedding_by_itself_looks_tokens_up(pair: Pair, model: PeftModel) -> None:
    ids = pair.batch(QUESTIONS)["input_ids"]
    assert torch.equal(model.get_input_embeddings()(ids), pair.load_base().get_input_embeddings()(ids))


# Continuous batching, copies, replaced embeddings


def test_continuous_batching_is_refused(pair: Pair, model: PeftModel) -> None:
    options = GenerationConfig(max_new_tokens=2)
    for name in ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager"):
        for door in (model, model.get_base_model()):
            with pytest.raises(ValueError, match=f"`{name}` must not be called with an active SoftCoT adapter"):
                getattr(door, name)(pair.rows(QUESTIONS), generation_config=options)
    with pytest.raises(ValueError, match="`cache_implementation` must not be 'paged'"):
        model.generate(**pair.batch(QUESTIONS), cache_implementation="paged")


def test_continuous_batching_is_the_base_s_own_while_adapters_are_disabled(model: PeftModel) -> None:
    with model.disable_adapter():
        manager = model.init_continuous_batching(GenerationConfig(eos_token_id=1, pad_token_id=0))
    assert not manager.is_running()
    assert manager.model is model.get_base_model()


def test_data_parallel_copies_are_refused(model: PeftModel) -> None:
    # `nn.DataParallel` makes its replicas so; it needs two GPUs to get there.
    with pytest.raises(RuntimeError, match=r"`nn.DataParallel` must not copy.*accelerate launch"):
        _ = [module._replicate_for_data_parallel() for module in model.modules()]


def test_a_shallow_copy_is_the_same_function(pair: Pair, model: PeftModel, oracle: Oracle) -> None:
    check_against(oracle, copy.copy(model.get_base_model()), pair)


@pytest.mark.parametrize("bare", [False, True], ids=["peft", "bare"])
def test_resizing_the_embeddings_is_refused(pair: Pair, model: PeftModel, oracle: Oracle, bare: bool) -> None:
    with pytest.raises(ValueError, match=r"`resize_token_embeddings` must be called before.*`unload\(\)`"):
        (model.get_base_model() if bare else model).resize_token_embeddings(400)
    check_against(oracle, model, pair)
    assert model.unload().resize_token_embeddings(400).num_embeddings == 400


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_an_embedding_replaced_after_attaching_is_refused(pair: Pair, model: PeftModel, call: str) -> None:
    base = model.get_base_model()
    base.set_input_embeddings(nn.Embedding.from_pretrained(model.get_input_embeddings().weight))
    batch = pair.batch(QUESTIONS)
    with pytest.raises(RuntimeError, match="must write the thoughts, but was not run"):
        model(**batch, logits_to_keep=1) if call == "forward" else model.generate(**batch, max_new_tokens=2)


# Caches


def prefilled(model: nn.Module, batch: dict[str, Tensor], **options: Any) -> Any:
    with torch.no_grad():
        return model(**batch, use_cache=True, logits_to_keep=1, **options)


def one_more(batch: dict[str, Tensor], tokens: Tensor) -> dict[str, Tensor]:
    mask = torch.cat([batch["attention_mask"], batch["attention_mask"].new_ones(tokens.shape)], dim=1)
    return {"input_ids": tokens, "attention_mask": mask}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("form", ["dict", "tuple", "own cache"])
def test_decoding_by_hand_goes_on_after_the_thoughts(
    pair: Pair, model: PeftModel, oracle: Oracle, form: str, side: str
) -> None:
    batch = pair.batch(QUESTIONS, side)
    cache = DynamicCache() if form == "own cache" else None
    output = prefilled(model, batch, return_dict=form != "tuple", **{CACHE_NAME: cache})
    if form == "tuple":
        cache = next(value for value in output if isinstance(value, DynamicCache))
    elif form == "dict":
        cache = output[CACHE_NAME]
    token = torch.tensor([[7], [8], [9], [10]])
    with torch.no_grad():
        logits = model(**one_more(batch, token), **{CACHE_NAME: cache}).logits[:, -1]
    for row, last, found in zip(pair.rows(QUESTIONS), token.tolist(), logits, strict=True):
        torch.testing.assert_close(found, oracle.logits(row, last, prompt=row)[-1], **CLOSE)


@pytest.mark.parametrize("way", ["forward", "generate", "training"])
def test_caches_are_gone_as_soon_as_nobody_holds_them(way: str, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch, made = pair.model(), pair.batch(QUESTIONS), []
    init = DynamicCache.__init__

    def note(cache: DynamicCache, *args: Any, **kwargs: Any) -> None:
        init(cache, *args, **kwargs)
        made.append(weakref.ref(cache))

    monkeypatch.setattr(DynamicCache, "__init__", note)
    gc.collect()
    gc.disable()  # cycles would hide in memory until Python looks for them
    try:
        if way == "training":
            labels = batch["input_ids"].index_fill(1, torch.arange(batch["input_ids"].shape[1] - 2), -100)
            model.train()(**batch, labels=labels).loss.backward()
        elif way == "generate":
            model.generate(**batch, max_new_tokens=2)
        else:
            prefilled(model, batch)
        assert made
        assert not any(cache() for cache in made)
    finally:
        gc.enable()


@pytest.mark.parametrize("method", ["reorder_cache", "batch_select_indices"])
def test_rows_picked_from_a_cache_keep_their_own_thoughts(
    pair: Pair, model: PeftModel, oracle: Oracle, method: str
) -> None:
    batch, rows = pair.batch(QUESTIONS, "right"), torch.tensor([2, 0, 0, 3])
    cache = copy.deepcopy(prefilled(model, batch)[CACHE_NAME])
    getattr(cache, method)(rows)
    picked = {name: value[rows] for name, value in batch.items()}
    token = torch.tensor([[7], [8], [9], [10]])
    with torch.no_grad():
        logits = model(**one_more(picked, token), **{CACHE_NAME: cache}).logits[:, -1]
    prompts = pair.rows(QUESTIONS)
    for index, last, found in zip(rows.tolist(), token.tolist(), logits, strict=True):
        expected = oracle.logits(prompts[index], last, prompt=prompts[index])[-1]
        torch.testing.assert_close(found, expected, **CLOSE)


def check_next(
    oracle: Oracle, model: PeftModel, prompts: list[list[int]], step: dict[str, Tensor], cache: Any
) -> None:
    """The next token of every row after a cache."""
    with torch.no_grad():
        logits = model(**step, **{CACHE_NAME: cache}).logits[:, -1]
    for prompt, last, found in zip(prompts, step["input_ids"].tolist(), logits, strict=True):
        torch.testing.assert_close(found, oracle.logits(prompt, last, prompt=prompt)[-1], **CLOSE)


PICKS: dict[str, tuple[Callable[[Any], Any], list[int]]] = {
    "reordered": (lambda cache: cache.reorder_cache(torch.tensor([3, 2, 2, 0])), [3, 2, 2, 0]),
    "fewer": (lambda cache: cache.batch_select_indices(torch.tensor([1, 2])), [1, 2]),
    "more": (lambda cache: cache.batch_select_indices(torch.tensor([1, 1, 0, 2, 3, 3])), [1, 1, 0, 2, 3, 3]),
    "repeated": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2, 3, 3]),
    "twice": (lambda cache: (cache.batch_repeat_interleave(2), cache.batch_select_indices([0, 3, 7])), [0, 1, 3]),
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("way", PICKS)
def test_rows_picked_repeated_and_dropped_go_on_from_their_thoughts(
    pair: Pair, model: PeftModel, oracle: Oracle, way: str, side: str
) -> None:
    batch, (pick, rows) = pair.batch(QUESTIONS, side), PICKS[way]
    cache = prefilled(model, batch)[CACHE_NAME]
    pick(cache)
    prompts = [pair.rows(QUESTIONS)[row] for row in rows]
    step = one_more({name: value[rows] for name, value in batch.items()}, torch.arange(7, 7 + len(rows))[:, None])
    check_next(oracle, model, prompts, step, cache)


def saved(value: Any) -> Any:
    torch.save(value, file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
@pytest.mark.parametrize(
    "copied",
    [saved, copy.deepcopy, copy.copy, lambda c: pickle.loads(pickle.dumps(c))],
    ids=["saved", "deep", "shallow", "pickled"],
)
def test_saved_and_copied_caches_go_on_from_the_thoughts(
    pair: Pair, model: PeftModel, oracle: Oracle, copied: Callable[[Any], Any], kind: Any, side: str
) -> None:
    batch, size = pair.batch(QUESTIONS, side), {"max_cache_len": 99} if kind is StaticCache else {}
    cache = prefilled(model, batch, **{CACHE_NAME: kind(config=model.get_base_model().config, **size)})[CACHE_NAME]
    assert type(cache) is kind
    check_next(oracle, model, pair.rows(QUESTIONS), one_more(batch, torch.full((4, 1), 9)), copied(cache))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_prompts_go_on_with_their_mask(pair: Pair, model: PeftModel, side: str) -> None:
    batch = pair.batch(QUESTIONS, side)
    cache, token = prefilled(model, batch)[CACHE_NAME], torch.full((4, 1), 7)
    length = batch["input_ids"].shape[1]
    for mask, found in ((None, "none"), (torch.ones(4, 1), "(4, 1)"), (torch.ones(4, 1, 1, 60), "(4, 1, 1, 60)")):
        words = (
            f"`attention_mask` must be the padding mask of all tokens so far, (batch, {length} and more), got {found}."
        )
        with pytest.raises(ValueError, match=re.escape(words)):
            model(token, attention_mask=mask, **{CACHE_NAME: cache})


@pytest.mark.parametrize("kind", ["one column", "several columns", "a run"])
def test_going_on_from_labelled_rows(pair: Pair, model: PeftModel, oracle: Oracle, kind: str) -> None:
    texts = QUESTIONS if kind != "a run" else [text + "<thought>" * N for text in QUESTIONS]
    batch = pair.batch(texts, "left" if kind == "one column" else "right")
    ends = batch["attention_mask"].shape[1] - batch["attention_mask"].flip(1).argmax(1)  # of the rows
    answers = torch.full((4, 2), 11)
    full = {
        "input_ids": torch.cat([batch["input_ids"], answers], 1),
        "attention_mask": torch.cat([batch["attention_mask"], torch.ones(4, 2).long()], 1),
    }
    labels = torch.full_like(full["input_ids"], -100)
    labels[:, -2:] = 11
    if kind == "several columns":
        labels[torch.arange(labels.shape[1]) >= ends[:, None] - 1] = 11
    with torch.no_grad():
        cache = model(**full, labels=labels, use_cache=True)[CACHE_NAME]
    step = one_more(full, torch.full((4, 1), 9))
    if kind == "several columns":
        with pytest.raises(ValueError, match=f"`{CACHE_NAME}` must come from prompts without labels.*one by one"):
            model(**step, **{CACHE_NAME: cache})
        return
    if kind == "one column":
        step["input_ids"] = torch.cat([answers, step["input_ids"]], 1)
        cache.crop(-2)
    with torch.no_grad():
        found = model(**step, **{CACHE_NAME: cache}).logits[:, -1]
    for row, logits in zip(pair.rows(QUESTIONS), found, strict=True):
        torch.testing.assert_close(logits, oracle.logits(row, [11, 11, 9], prompt=row)[-1], **CLOSE)


def test_a_cache_that_was_emptied_forgets_its_thoughts(pair: Pair, model: PeftModel) -> None:
    config, batch = model.get_base_model().config, pair.batch(QUESTIONS[:1])
    cache = prefilled(model, batch, **{CACHE_NAME: StaticCache(config=config, max_cache_len=99)})[CACHE_NAME]
    cache.reset()
    with model.disable_adapter():
        model(**batch, **{CACHE_NAME: cache})
    cache.reset()
    prefilled(model, batch, **{CACHE_NAME: cache})
    cache.reset()
    model.generate(**pair.batch(QUESTIONS[1:2]), **{CACHE_NAME: cache}, max_new_tokens=2)
    with pytest.raises(ValueError, match=f"`{CACHE_NAME}` must come from a call of the model with thoughts"):
        model(torch.tensor([[7]]), **{CACHE_NAME: cache})


def test_a_cache_can_be_cropped_back_to_the_thoughts_and_no_further(
    pair: Pair, model: PeftModel, oracle: Oracle
) -> None:
    (prompt,) = pair.rows(QUESTIONS[:1])
    batch = pair.batch(QUESTIONS[:1])
    cache = prefilled(model, batch)[CACHE_NAME]
    with torch.no_grad():
        model(input_ids=torch.tensor([[7, 8]]), **{CACHE_NAME: cache})
        cache.crop(-2)
        logits = model(input_ids=torch.tensor([[9]]), **{CACHE_NAME: cache}).logits[0, -1]
    torch.testing.assert_close(logits, oracle.logits(prompt, [9], prompt=prompt)[-1], **CLOSE)
    cache.crop(-2)
    with pytest.raises(ValueError, match=rf"`{CACHE_NAME}` must hold all thoughts, but was cropped to \d+"):
        model(input_ids=torch.tensor([[9]]), **{CACHE_NAME: cache})


def test_a_cache_that_was_reset_starts_anew(pair: Pair, model: PeftModel, oracle: Oracle) -> None:
    cache = prefilled(model, pair.batch(QUESTIONS[:1]))[CACHE_NAME]
    cache.crop(-cache.get_seq_length())
    (prompt,) = pair.rows(QUESTIONS[1:2])
    found = prefilled(model, pair.batch(QUESTIONS[1:2]), **{CACHE_NAME: cache}).logits[0, -1]
    torch.testing.assert_close(found, oracle.logits(prompt, [])[-1], **CLOSE)


def test_a_cache_with_thoughts_is_refused_while_adapters_are_disabled(pair: Pair, model: PeftModel) -> None:
    batch = pair.batch(QUESTIONS)
    cache = prefilled(model, batch)[CACHE_NAME]
    token = one_more(batch, torch.tensor([[7], [8], [9], [10]]))
    with model.disable_adapter(), pytest.raises(ValueError, match=rf"`{CACHE_NAME}`.*'default'.*disabled now"):
        model(**token, **{CACHE_NAME: cache})
    with model.disable_adapter(), torch.no_grad():  # and one of its own goes on
        plain = pair.load_base()
        expected = plain(**token, **{CACHE_NAME: plain(**batch, use_cache=True)[CACHE_NAME]}).logits
        own = model(**batch, use_cache=True)[CACHE_NAME]
        assert torch.equal(model(**token, **{CACHE_NAME: own}).logits, expected)


def test_a_cache_of_another_adapter_is_refused(pair: Pair, model: PeftModel) -> None:
    model.add_adapter("other", pair.config(num_thought_tokens=2))
    batch = pair.batch(QUESTIONS)
    cache = prefilled(model, batch)[CACHE_NAME]
    model.set_adapter("other")
    with pytest.raises(ValueError, match=rf"`{CACHE_NAME}`.*'default'.*'other' is active now"):
        model(**one_more(batch, torch.tensor([[7], [8], [9], [10]])), **{CACHE_NAME: cache})


def test_a_second_turn_with_a_run_is_refused_on_an_old_cache(pair: Pair, model: PeftModel) -> None:
    first = pair.batch([f"{QUESTIONS[1]}{'<thought>' * N}"])
    second = pair.batch([f"{QUESTIONS[3]}{'<thought>' * N}"])
    cache = prefilled(model, first)[CACHE_NAME]
    with pytest.raises(ValueError, match=f"`{CACHE_NAME}` must not stand before a run of `thought_token`"):
        model(input_ids=second["input_ids"], **{CACHE_NAME: cache})
    with pytest.raises(ValueError, match=f"`{CACHE_NAME}` must be empty"):
        model.generate(**first, **{CACHE_NAME: cache}, max_new_tokens=2)


def test_a_prompt_read_in_chunks_by_hand_warns_and_places_after_the_first(
    pair: Pair, model: PeftModel, oracle: Oracle
) -> None:
    (prompt,) = pair.rows(QUESTIONS[:1])
    with pytest.warns(UserWarning, match="thoughts stand after the last token of each row"), torch.no_grad():
        cache = model(input_ids=torch.tensor([prompt[:6]]), use_cache=True)[CACHE_NAME]
    with torch.no_grad():
        found = model(input_ids=torch.tensor([prompt[6:]]), **{CACHE_NAME: cache}).logits[0]
    expected = oracle.logits(prompt[:6], prompt[6:], prompt=prompt[:6])[6 + N :]
    torch.testing.assert_close(found, expected, **CLOSE)


def test_a_logits_processor_may_run_the_model(pair: Pair, model: PeftModel) -> None:
    batch = pair.batch(QUESTIONS)
    expected, seen = new_tokens(model, batch), []

    def look(ids: Tensor, scores: Tensor) -> Tensor:
        mask = one_more(batch, ids[:, batch["input_ids"].shape[1] :])["attention_mask"]
        seen.append(model(input_ids=ids, attention_mask=mask, **{CACHE_NAME: DynamicCache()}).logits[:, -1])
        torch.testing.assert_close(seen[-1], scores, atol=1e-4, rtol=1e-4)
        return scores

    found = model.generate(**batch, max_new_tokens=NEW, logits_processor=[look])
    assert found[:, batch["input_ids"].shape[1] :].tolist() == expected
    assert len(seen) == NEW


# Compiled copies

COMPILED: dict[str, Callable[[PeftModel], nn.Module]] = {
    "torch.compile(model)": lambda model: torch.compile(model, backend="eager"),
    "torch.compile(base)": lambda model: torch.compile(model.get_base_model(), backend="eager"),
    "model.compile()": lambda model: model.compile(backend="eager") or model,
    "base.compile()": lambda model: model.get_base_model().compile(backend="eager") or model,
}


@pytest.fixture
def _fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")  # of the compiler: graph breaks, and what it finds in torch's own code
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("way", COMPILED)
def test_a_compiled_model_reads_each_batch_s_own_thoughts(
    pair: Pair, model: PeftModel, oracle: Oracle, way: str
) -> None:
    expected = new_tokens(model, pair.batch(QUESTIONS))
    compiled = COMPILED[way](model)
    prompts = [row[:9] for row in pair.rows(QUESTIONS)]
    for first in range(3):  # the same shapes, other prompts: nothing of the first call may stay
        rows = prompts[first : first + 2]
        found = next_logits(compiled, {"input_ids": torch.tensor(rows)})
        for row, logits in zip(rows, found, strict=True):
            torch.testing.assert_close(logits, oracle.logits(row, [])[-1], **CLOSE)
    assert new_tokens(compiled, pair.batch(QUESTIONS)) == expected
    with model.disable_adapter():
        plain = next_logits(pair.load_base(), {"input_ids": torch.tensor(prompts)})
        torch.testing.assert_close(next_logits(compiled, {"input_ids": torch.tensor(prompts)}), plain)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("_fresh_compiler")
def test_a_compiled_model_trains(pair: Pair, model: PeftModel) -> None:
    batch = pair.batch(QUESTIONS, "right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, :6] = -100
    results = []
    for call in (model, torch.compile(model, backend="aot_eager")):
        model.zero_grad()
        loss = call(**batch, labels=labels).loss
        loss.backward()
        gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]
        results.append([loss.detach(), *gradients])
    torch.testing.assert_close(results[1], results[0], **CLOSE)


# Threads, processes, and a base that is its own assistant


@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
def test_threads_can_share_a_model(pair: Pair, monkeypatch: pytest.MonkeyPatch, chat: bool) -> None:
    changes: dict[str, Any] = {}
    if chat:
        changes = {"assistant_model_name_or_path": str(pair.chat_assistant), "assistant_prompt": "{prompt} Think."}
    model = pair.model(**changes)
    texts = [*QUESTIONS, "[BOS] two [EOS] legs?"]  # the last one takes the way of prompts that spell special tokens
    batches = [pair.batch([text]) for text in texts]
    expected = [new_tokens(model, batch) for batch in batches]
    loaded_assistants().clear()
    fresh = pair.model(**changes)  # its assistant is loaded by the first thread to need it
    fresh.load_state_dict(model.state_dict())
    found: dict[int, list[Any]] = {}
    start, inside, most = threading.Barrier(len(batches)), [], []

    def watched(encode: Callable[..., Any]) -> Callable[..., Any]:
        def watch(*args: Any) -> Any:
            inside.append(1)
            time.sleep(0.005)  # time for another thread to come in, were it let
            most.append(len(inside))
            result = encode(*args)
            inside.pop()
            return result

        return watch

    # Options of a tokenizer (whether it splits special tokens) are set in it while it encodes.
    wrap_encoding(monkeypatch, watched)

    def answer(index: int) -> None:
        start.wait()
        found[index] = [new_tokens(fresh, batches[index]) for _ in range(6)]

    threads = [threading.Thread(target=answer, args=(index,)) for index in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {index: [tokens] * 6 for index, tokens in enumerate(expected)}
    assert set(most) == {1}


def read_again(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("read", [lambda m: pickle.loads(pickle.dumps(m)), read_again], ids=["pickle", "torch.save"])
@pytest.mark.parametrize("bare", [False, True], ids=["peft", "bare"])
def test_a_pickled_model_answers_the_same(
    pair: Pair, model: PeftModel, oracle: Oracle, read: Callable[[nn.Module], Any], bare: bool
) -> None:
    original = model.get_base_model() if bare else model
    again = read(original)
    check_against(oracle, again, pair)
    assert new_tokens(again, pair.batch(QUESTIONS)) == new_tokens(model, pair.batch(QUESTIONS))
    with pytest.raises(ValueError, match="was called outside of a call"):
        (again if bare else again.get_base_model()).model(**pair.batch(QUESTIONS))
    if not bare:
        assert type(again.unload()) is type(model.get_base_model())


def test_a_pickled_model_holds_no_copy_of_the_assistant(pair: Pair, model: PeftModel) -> None:
    next_logits(model, pair.batch(QUESTIONS))  # the assistant is loaded
    weights = sum(parameter.nbytes for parameter in model.parameters())
    tokenizer = len(pickle.dumps(reader_of(model).base_tokenizer))
    assert len(pickle.dumps(backbone_of(model))) > 30_000
    assert len(pickle.dumps(model)) - weights - tokenizer < 30_000


def test_a_pickled_model_asks_for_the_assistant_it_was_given(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, model: PeftModel
) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(pair.assistant)
    name = use_assistant(loaded, AutoTokenizer.from_pretrained(pair.assistant), name="given")
    given = pair.model(assistant_model_name_or_path=name)
    pickled = pickle.dumps(given)
    assert new_tokens(pickle.loads(pickled), pair.batch(QUESTIONS)) == new_tokens(given, pair.batch(QUESTIONS))
    monkeypatch.delitem(given_assistants(), name)
    with pytest.raises(ValueError, match=r"'given' of a pickled model .* must be given again"):
        pickle.loads(pickled)


def test_a_base_can_be_its_own_assistant(pair: Pair) -> None:
    base = pair.load_base()
    name = use_assistant(base, pair.tokenizer, name="itself")
    model = get_peft_model(base, pair.config(assistant_model_name_or_path=name))
    oracle = Oracle.of(model, pair.base, pair.base, N, same_ids=True)
    check_against(oracle, model, pair)
    for row, found in zip(pair.rows(QUESTIONS), new_tokens(model, pair.batch(QUESTIONS)), strict=True):
        expected = oracle.generate(row, NEW)
        assert found[: len(expected)] == expected
