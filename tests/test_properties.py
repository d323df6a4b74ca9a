"""Properties over random batches, paddings, masks with holes, placements, tokenizers, N, labels and cut points.

`make fuzz` runs many times more cases, from a random seed. The judge is written from the equations: one row at a time,
holes and padding left out, everything recomputed, on copies of the models that the package never sees.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from conftest import QUESTIONS, make_assistant_tokenizer, make_base_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from softcot_peft import SoftCoTConfig, use_assistant
from softcot_peft._compat import CACHE_NAME

# 27 tests: at least 20,000 cases in the long run and 500 in the normal one.
CASES = 750 if settings.get_current_profile_name() == "fuzz" else 19
TEMPLATE = "Think {num_thought_tokens} times: {prompt}!"
CLOSE: dict[str, Any] = {"atol": 2e-4, "rtol": 2e-4}  # logits of several hundred roundings
KINDS = ("bytes", "words", "pieces")
WORLDS = pytest.mark.parametrize("base_kind", KINDS), pytest.mark.parametrize("assistant_kind", KINDS)


# Worlds: three tokenizers and three architectures on either side


def make_pieces_tokenizer() -> PreTrainedTokenizerFast:
    """Unigram with a metaspace, as SentencePiece models are; no chat template, no BOS."""
    # Written down, since the library's trainer gives other pieces or scores every time.
    letters = [*sorted(set("".join(QUESTIONS)) - {" "}), "▁"]
    words = [word.strip("?,.") for question in QUESTIONS for word in question.split()]
    pairs = sorted({pair for word in words for pair in (f"▁{word[:1]}", word[-2:]) if len(pair) == 2})
    scores = {**dict.fromkeys(["<unk>", "<pad>", "</s>", "<think>"], 0.0), **dict.fromkeys(letters, -5.0)}
    tokenizer = Tokenizer(models.Unigram([*(scores | dict.fromkeys(pairs, -6.0)).items()], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="</s>",
        extra_special_tokens=["<think>"],
    )


@cache
def make_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    makers = {"bytes": make_base_tokenizer, "words": make_assistant_tokenizer, "pieces": make_pieces_tokenizer}
    return makers[kind]()


@cache
def make_model(kind: str, width: int) -> PreTrainedModel:
    """One or two layers without dropout, with large weights, so that everything read changes the answer."""
    vocab = len(make_tokenizer(kind))
    eos = make_tokenizer(kind).eos_token_id
    torch.manual_seed(width)
    if kind == "bytes":  # rotary positions
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocab, hidden_size=width, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                num_key_value_heads=1, max_position_embeddings=256, initializer_range=0.4, pad_token_id=0,
                bos_token_id=None, eos_token_id=eos,
            )
        ).eval()  # fmt: skip
    if kind == "words" and width == 16:  # learned positions; no pad token
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=vocab, n_embd=width, n_layer=2, n_head=2, n_positions=256, initializer_range=0.4,
                resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=2, eos_token_id=eos,
            )
        ).eval()  # fmt: skip
    if kind == "words":
        return Olmo2ForCausalLM(
            Olmo2Config(
                vocab_size=vocab, hidden_size=width, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                num_key_value_heads=1, max_position_embeddings=256, initializer_range=0.4, pad_token_id=1,
                bos_token_id=2, eos_token_id=eos,
            )
        ).eval()  # fmt: skip
    return OPTForCausalLM(  # positions made from the mask by the model itself, another width before the head
        OPTConfig(
            vocab_size=vocab, hidden_size=width, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=256, init_std=0.4, word_embed_proj_dim=8, dropout=0.0, attention_dropout=0.0,
            pad_token_id=1, bos_token_id=2, eos_token_id=eos,
        )
    ).eval()  # fmt: skip


THOUGHT_TOKENS = {"bytes": "<thought>", "words": "how", "pieces": "<think>"}


@dataclass
class World:
    """A base with an adapter, and the judge's own copies of everything."""

    model: PeftModel
    base: PreTrainedModel
    assistant: PreTrainedModel
    base_tokenizer: PreTrainedTokenizerFast
    assistant_tokenizer: PreTrainedTokenizerFast
    same_ids: bool
    template: str | None
    weight: Tensor
    bias: Tensor
    seen: list[Tensor] = field(default_factory=list)

    @property
    def thought(self) -> int:
        return self.reader.thought_token_id

    @property
    def reader(self) -> Any:
        return self.model.get_input_embeddings().softcot_reader["default"]

    def set_numbers(self, training: int, inference: int | None) -> None:
        config = self.model.peft_config["default"]
        config.num_thought_tokens, config.inference_num_thought_tokens = training, inference

    def thoughts(self, prompt: list[int], num: int) -> Tensor:
        """`s = W Assistant([prompt; thought token x N]) + b`, `(N, H_base)`."""
        ids = prompt
        if not self.same_ids:
            text = self.base_tokenizer.decode(prompt, skip_special_tokens=True)
            if self.template is not None:
                text = f"Think {num} times: {text}!"
            ids = self.assistant_tokenizer(text, split_special_tokens=True)["input_ids"]
            if self.template is not None and self.assistant_tokenizer.chat_template is not None:
                vocab = self.assistant_tokenizer.get_vocab()
                ids = [vocab["<|user|>"], *ids, vocab["<|end|>"], vocab["<|assistant|>"]]
        tokenizer = self.assistant_tokenizer
        filler = tokenizer.eos_token_id if tokenizer.unk_token_id is None else tokenizer.unk_token_id
        hidden = self.assistant(torch.tensor([ids + [filler] * num]), output_hidden_states=True).hidden_states[-1]
        return hidden[0, -num:] @ self.weight.T + self.bias

    def logits(self, before: list[int], num: int, after: list[int]) -> Tensor:
        """Of every position of `[before; s; after]`."""
        embed = self.base.get_input_embeddings()
        pieces = [embed(torch.tensor(before)), self.thoughts(before, num)]
        if after:
            pieces.append(embed(torch.tensor(after)))
        return self.base(inputs_embeds=torch.cat(pieces)[None], use_cache=False).logits[0]


@cache
def make_world(base_kind: str, assistant_kind: str, way: str, folder: str) -> World:
    base, assistant = make_model(base_kind, 16), make_model(assistant_kind, 12)
    base_tokenizer, assistant_tokenizer = make_tokenizer(base_kind), make_tokenizer(assistant_kind)
    base_tokenizer.save_pretrained(f"{folder}/{base_kind}")
    name = use_assistant(copy.deepcopy(assistant), copy.deepcopy(assistant_tokenizer), f"properties-{assistant_kind}")
    config = SoftCoTConfig(
        task_type="CAUSAL_LM",
        assistant_model_name_or_path=name,
        thought_token=THOUGHT_TOKENS[base_kind],
        tokenizer_name_or_path=f"{folder}/{base_kind}",
        assistant_prompt=TEMPLATE if way == "template" else None,
        assistant_shares_tokenizer=False if way == "text" else None,
        init_weights=False,
    )
    torch.manual_seed(1)
    model = get_peft_model(copy.deepcopy(base), config).eval()
    state = model.state_dict()
    weight, bias = (
        next(v.clone() for k, v in state.items() if k.endswith(f"softcot_projection.default.{name}"))
        for name in ("weight", "bias")
    )
    same = way == "ids" and base_kind == assistant_kind
    template = TEMPLATE if way == "template" else None
    world = World(model, base, assistant, base_tokenizer, assistant_tokenizer, same, template, weight, bias)
    projection = model.get_input_embeddings().softcot_projection["default"]
    projection.register_forward_hook(lambda *args: world.seen.append(args[2].detach()))
    return world


# Cases


@dataclass
class Row:
    """One row of a batch, column by column. `start`: of the thoughts; `run`: length of the run of thought tokens."""

    ids: list[int]
    mask: list[int]
    labels: list[int]
    start: int
    run: int

    @property
    def prompt(self) -> list[int]:
        return self.attended(0, self.start)

    def attended(self, begin: int, end: int | None = None) -> list[int]:
        return [i for i, m in zip(self.ids[begin:end], self.mask[begin:end], strict=True) if m]

    def after(self) -> list[int]:
        return self.attended(self.start + self.run)

    def placed(self, column: int, num: int) -> int | None:
        """Which position of `[prompt; thoughts; after]` predicts the token after a column; `None` for padding."""
        if not self.run and column == self.start - 1:
            return len(self.prompt) + num - 1
        if not self.mask[column]:
            return None
        if column < self.start:
            return len(self.attended(0, column))
        if column < self.start + self.run:
            return len(self.prompt) + column - self.start
        return len(self.prompt) + num + len(self.attended(self.start + self.run, column))


@dataclass
class Case:
    rows: list[Row]
    num: int
    way: str
    training: bool = False
    give_positions: bool = False
    keep: Any = 0
    options: dict[str, Any] = field(default_factory=dict)

    def batch(self, labels: bool) -> dict[str, Any]:
        batch: dict[str, Any] = {
            "input_ids": torch.tensor([row.ids for row in self.rows]),
            "attention_mask": torch.tensor([row.mask for row in self.rows]),
        }
        if labels:
            batch["labels"] = torch.tensor([row.labels for row in self.rows])
        if self.give_positions:
            batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        return batch


def cells(tokens: SearchStrategy[int], least: int, most: int, holes: bool) -> SearchStrategy[list[tuple[int, int]]]:
    """Ids, each with 1 or, in a hole of the mask, 0."""
    mask = st.sampled_from([1, 1, 1, 0]) if holes else st.just(1)
    return st.lists(st.tuples(tokens, mask), min_size=least, max_size=most)


@st.composite
def cases(draw: DrawFn, base_kind: str, assistant_kind: str, labelled: bool) -> Case:
    """Rows of different lengths, each padded left, right or on both sides, the prompt's mask with or without holes."""
    tokenizer = make_tokenizer(base_kind)
    thought, vocab = tokenizer.get_vocab()[THOUGHT_TOKENS[base_kind]], len(tokenizer)
    tokens = st.integers(0, vocab - 1).filter(lambda token: token != thought)
    run = draw(st.sampled_from([0, 0, 1, 2, 5]))
    holes, padding = draw(st.booleans()), draw(st.sampled_from(["left", "right", "mixed"]))
    drawn = []
    for _ in range(draw(st.integers(1, 3))):
        before = draw(cells(tokens, 0, 6, holes))
        before.insert(draw(st.integers(0, len(before))), (draw(tokens), 1))  # a prompt has a token
        tail = draw(cells(tokens, 0, 3, holes)) if run else []
        response = draw(st.lists(tokens, min_size=1, max_size=5)) if labelled else []
        skipped = draw(st.lists(st.booleans(), min_size=5, max_size=5))
        drawn.append((before, tail, response, skipped))
    length = max(len(b) + run + len(t) + len(r) for b, t, r, _ in drawn) + draw(st.integers(0, 2))
    rows = []
    for before, tail, response, skipped in drawn:
        free = length - len(before) - run - len(tail) - len(response)
        left = {"left": free, "right": 0}.get(padding, -1)
        left = draw(st.integers(0, free)) if left < 0 else left
        pads = [(draw(st.integers(0, vocab - 1)), 0) for _ in range(free)]
        row = [*pads[:left], *before, *[(thought, 1)] * run, *tail, *[(token, 1) for token in response], *pads[left:]]
        first = left + len(before) + run + len(tail)
        labels = [-100] * length
        for index, token in enumerate(response):
            if index == 0 or not skipped[index - 1]:
                labels[first + index] = token
        ids, mask = [token for token, _ in row], [attended for _, attended in row]
        start = left + len(before)
        if not run and not labelled:
            start = max(column for column in range(length) if mask[column]) + 1
        if labelled and run and not mask[first - 1]:
            labels[first] = -100  # nothing defines what a hole of the mask predicts
        rows.append(Row(ids, mask, labels, start, run))
    training, few = draw(st.booleans()), draw(st.none() | st.integers(1, 6))
    many = draw(st.integers(1, 6))
    case = Case(
        rows,
        run or (many if training or few is None else few),
        draw(st.sampled_from(["ids", "ids", "text", "template"])),
        training,
        draw(st.booleans()),
    )
    case.options["numbers"] = (many, few)
    if not labelled:
        columns = st.lists(st.integers(0, length - 1), min_size=1, max_size=4).map(torch.tensor)
        case.keep = draw(st.just(0) | st.integers(1, length) | columns)
    return case


def world_of(case: Case, base_kind: str, assistant_kind: str, folder: str) -> World:
    world = make_world(base_kind, assistant_kind, case.way, folder)
    world.set_numbers(*case.options["numbers"])
    world.model.train(case.training)
    world.seen.clear()
    return world


# Properties


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("properties"))


def property_of(strategy: Callable[..., SearchStrategy[Any]]) -> Callable[..., Any]:
    """Run a check in every world: `check(world, case, data)`."""

    def decorate(check: Callable[[World, Case, st.DataObject], None]) -> Callable[..., None]:
        @pytest.mark.filterwarnings("ignore:Without `labels`:UserWarning")
        @WORLDS[0]
        @WORLDS[1]
        def test(base_kind: str, assistant_kind: str, folder: str, record_property: Callable[..., None]) -> None:
            checked = 0

            @settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck))
            @given(case=strategy(base_kind, assistant_kind), data=st.data())
            def run(case: Case, data: st.DataObject) -> None:
                nonlocal checked
                with torch.no_grad():
                    check(world_of(case, base_kind, assistant_kind, folder), case, data)
                checked += 1

            run()
            record_property("cases", checked)

        test.__name__ = check.__name__
        return test

    return decorate


def kept_columns(keep: Any, length: int) -> list[int]:
    if isinstance(keep, int):
        return list(range(length - keep if keep else 0, length))
    return list(keep.tolist())


def check_logits(world: World, case: Case, found: Tensor) -> list[Tensor]:
    """Every row of the logits that stands for a token of the caller's; returns the judge's logits by row."""
    length = len(case.rows[0].ids)
    columns = kept_columns(case.keep, length)
    assert found.shape == (len(case.rows), len(columns), world.base.config.vocab_size)
    judged = []
    for index, row in enumerate(case.rows):
        expected = world.logits(row.prompt, case.num, row.after())
        judged.append(expected)
        pairs = [(at, row.placed(column, case.num)) for at, column in enumerate(columns)]
        pairs = [(at, position) for at, position in pairs if position is not None]
        ours, theirs = ([pair[side] for pair in pairs] for side in (0, 1))
        torch.testing.assert_close(found[index, ours], expected[theirs], **CLOSE)
    return judged


def check_no_leak(world: World, case: Case, batch: dict[str, Any], data: st.DataObject) -> None:
    """Other tokens after the cut, and under the mask, change no thought."""
    (thoughts,) = world.seen
    world.seen.clear()
    ids, vocab = batch["input_ids"].clone(), world.base.config.vocab_size
    shift = data.draw(st.integers(1, vocab - 2), label="shift")
    for index, row in enumerate(case.rows):
        for column, attended in enumerate(row.mask):
            if column >= row.start + row.run or not attended:
                other = int(ids[index, column] + shift) % vocab
                if other == world.thought:
                    other = (other + 1) % vocab
                ids[index, column] = other
    labels = {"labels": torch.where(batch["labels"] == -100, -100, ids)} if "labels" in batch else {}
    world.model(**batch | {"input_ids": ids} | labels)
    assert torch.equal(world.seen[0], thoughts)


@property_of(lambda *kinds: cases(*kinds, labelled=True))
def test_a_labelled_batch_is_the_equations(world: World, case: Case, data: st.DataObject) -> None:
    batch = case.batch(labels=True)
    if not case.rows[0].run:
        assert all(any(label != -100 for label in row.labels) for row in case.rows)
    if all(all(row.mask) for row in case.rows) and data.draw(st.booleans(), label="no mask"):
        del batch["attention_mask"]
    output = world.model(**batch, output_hidden_states=True)
    judged = check_logits(world, case, output.logits)
    assert all(hidden.shape[:2] == batch["input_ids"].shape for hidden in output.hidden_states)
    assert world.seen[0].shape[:2] == (len(case.rows), case.num)
    predicting, targets = [], []
    for row, logits in zip(case.rows, judged, strict=True):
        for column, label in enumerate(row.labels):
            if label != -100:
                position = row.placed(column - 1, case.num)
                assert position is not None
                predicting.append(logits[position])
                targets.append(label)
    if targets:
        expected = cross_entropy(torch.stack(predicting), torch.tensor(targets))
        torch.testing.assert_close(output.loss, expected, atol=1e-5, rtol=1e-5)
    check_no_leak(world, case, batch, data)


@property_of(lambda *kinds: cases(*kinds, labelled=False))
def test_prompts_and_cached_responses_are_the_equations(world: World, case: Case, data: st.DataObject) -> None:
    batch = case.batch(labels=False)
    output = world.model(**batch, logits_to_keep=case.keep, use_cache=True)
    check_logits(world, case, output.logits)
    check_no_leak(world, case, batch, data)
    # A response, cut anywhere into chunks that are read after the cache.
    vocab = world.base.config.vocab_size
    tokens = st.integers(0, vocab - 1).filter(lambda token: token != world.thought)
    chunks = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=3), label="chunks")
    mask, past, response = batch["attention_mask"], output[CACHE_NAME], batch["input_ids"][:, :0]
    for size in chunks:
        row = st.lists(tokens, min_size=size, max_size=size)
        more = torch.tensor(data.draw(st.lists(row, min_size=len(mask), max_size=len(mask)), label="response"))
        mask, response = torch.cat([mask, torch.ones_like(more)], 1), torch.cat([response, more], 1)
        output = world.model(input_ids=more, attention_mask=mask, **{CACHE_NAME: past}, use_cache=True)
        past = output[CACHE_NAME]
        assert output.logits.shape == (*more.shape, vocab)
        for index, row in enumerate(case.rows):
            expected = world.logits(row.prompt, case.num, row.after() + response[index].tolist())
            torch.testing.assert_close(output.logits[index], expected[-size:], **CLOSE)


@property_of(lambda *kinds: cases(*kinds, labelled=False))
def test_generate_is_the_equations(world: World, case: Case, data: st.DataObject) -> None:
    batch = case.batch(labels=False)
    batch.pop("position_ids", None)
    pad = world.model.generation_config.pad_token_id or 0
    if all(all(row.mask) and pad not in row.ids for row in case.rows) and data.draw(st.booleans(), label="no mask"):
        del batch["attention_mask"]
    new, length = data.draw(st.integers(1, 4), label="new"), batch["input_ids"].shape[1]
    use_cache = data.draw(st.booleans(), label="cache")
    eos = world.base.config.eos_token_id
    output = world.model.generate(**batch, max_new_tokens=new, do_sample=False, use_cache=use_cache, pad_token_id=pad)
    assert torch.equal(output[:, :length], batch["input_ids"])
    assert output.shape[1] <= length + new
    assert all(torch.equal(thoughts, world.seen[0]) for thoughts in world.seen)
    ended = []
    for row, tokens in zip(case.rows, output[:, length:].tolist(), strict=True):
        if eos in tokens:
            tokens = tokens[: tokens.index(eos) + 1]
        ended.append(tokens[-1] == eos)
        logits = world.logits(row.prompt, case.num, row.after() + tokens)
        scores = logits[-len(tokens) - 1 : -1]
        best = scores.amax(-1)
        torch.testing.assert_close(scores.gather(1, torch.tensor(tokens)[:, None])[:, 0], best, **CLOSE)  # ties apart
    assert all(ended) or output.shape[1] == length + new
