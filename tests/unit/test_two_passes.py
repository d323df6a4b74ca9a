"""Training steps in two passes: the same step as in one, less work, and one pass where two are not the same."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import collate, gradients, labelled
from conformance.families import build
from conformance.holding import attach, make_judge
from conformance.holding import make_assistant as make_family_assistant
from conformance.holding import make_batch as judged_batch
from helpers import CACHE_NAME, rotary_switch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_pair import Pair, make_base
from torch import Tensor, nn
from transformers import LlamaForCausalLM, MistralConfig, MistralForCausalLM
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast

TEXTS = [
    ("What is two plus two?", " four, it is"),
    ("One?", " 1"),
    ("How many apples are in the basket?", " seven or so"),
]
THOUGHT = "<thought>"
N = 4


def make_batch(
    pair: Pair, side: str = "right", run: bool = False, rows: tuple[int, ...] = (0, 1, 2)
) -> dict[str, Tensor]:
    """Prompts and labelled responses; with a run, thought tokens and a mark stand between the two."""
    between = pair.tokenizer(THOUGHT * N + "A:")["input_ids"] if run else []
    parts = [[pair.tokenizer(text)["input_ids"] for text in TEXTS[row]] for row in rows]
    return collate(labelled(*zip(*parts, strict=True), between), side)


def check_same(model: PeftModel, batch: dict[str, Tensor], two: bool = True, atol: float = 1e-6) -> None:
    """A step as in one pass; `two`: whether two are expected to be made."""
    model.train()
    output, found = gradients(model, batch)
    assert (output.logits is None) == two
    model.peft_config["default"].two_pass_training = False
    plain, expected = gradients(model, batch)
    model.peft_config["default"].two_pass_training = True
    torch.testing.assert_close(output.loss, plain.loss, atol=atol, rtol=atol)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= 2 * atol * max(1, float(other.abs().max()))


@contextmanager
def passes(model: PeftModel) -> Iterator[list[tuple[bool, int]]]:
    """Whether each pass of the base's layers has a gradient, and its columns."""
    seen: list[tuple[bool, int]] = []
    layer = model.get_base_model().model.layers[-1]
    handle = layer.register_forward_hook(lambda module, args, out: seen.append((out.requires_grad, out.shape[1])))
    try:
        yield seen
    finally:
        handle.remove()


@pytest.mark.parametrize("rows", [(0,), (0, 0), (0, 1, 2)], ids=["one row", "equal rows", "ragged rows"])
@pytest.mark.parametrize("run", [False, True], ids=["prompt's end", "run"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_loss_and_gradients_are_those_of_one_pass(pair: Pair, side: str, run: bool, rows: tuple[int, ...]) -> None:
    model = pair.model(thought_token=THOUGHT)
    check_same(model, make_batch(pair, side, run, rows))


def test_prompts_have_no_gradient_and_are_run_once(pair: Pair) -> None:
    model, batch = pair.model().train(), make_batch(pair)
    starts = (batch["labels"] != -100).int().argmax(1)
    lengths = batch["attention_mask"].sum(1)
    gradients(model, batch)  # the first step is tried both ways
    with passes(model) as seen:
        gradients(model, batch)
    assert seen == [(False, int(starts.max())), (True, N + int((lengths - starts).max()))]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("run", [False, True], ids=["prompt's end", "run"])
@pytest.mark.parametrize(
    ("prompts", "responses", "moved"),
    [((9, 40, 20), (30, 5, 12), False), ((9, 40, 20), (12, 11, 6), True), ((20, 20, 20), (30, 5, 12), True)],
)
def test_rows_are_cut_where_it_is_less_work(
    pair: Pair, prompts: tuple[int, ...], responses: tuple[int, ...], moved: bool, run: bool, side: str
) -> None:
    rows, model = [], pair.model(thought_token=THOUGHT)
    length = max(map(sum, zip(prompts, responses, strict=True))) + N * run
    thought = pair.tokenizer.convert_tokens_to_ids(THOUGHT)
    for prompt, response in zip(prompts, responses, strict=True):
        ids = [*torch.randint(10, 200, (prompt,)), *[thought] * (N * run), *torch.randint(10, 200, (response,))]
        labels, padding = [-100] * (len(ids) - response) + ids[-response:], length - len(ids)
        before, after = (padding, 0) if side == "left" else (0, padding)
        rows.append(([0] * before + ids + [0] * after, [-100] * before + labels + [-100] * after))
    ids, labels = (torch.tensor(column) for column in zip(*rows, strict=True))
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}
    check_same(model, batch)
    with passes(model) as seen:
        gradients(model, batch)
    own = (labels != -100).int().argmax(1) - N * run  # where thoughts begin
    last = (length - (batch["attention_mask"].flip(1).argmax(1))) - own
    cut = (int(own.max()), N * (not run) + int(last.max()))
    together = (int(own.min()), N * (not run) + length - int(own.min()))
    columns_run = [width for _, width in seen]
    assert columns_run == list(min(cut, together, key=lambda widths: widths[0] + 4 * widths[1]))
    if side == "right":
        assert columns_run == list(cut if moved else together)


@contextmanager
def head_rows(model: PeftModel) -> Iterator[list[tuple[int, int]]]:
    """Shape of what the head reads, without the width."""
    seen: list[tuple[int, int]] = []
    handle = model.get_output_embeddings().register_forward_pre_hook(
        lambda module, args: seen.append(tuple(args[0].shape[:2]))
    )
    try:
        yield seen
    finally:
        handle.remove()


@pytest.mark.parametrize("run", [False, True], ids=["prompt's end", "run"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rows", [(0, 0), (0, 1, 2)], ids=["equal rows", "ragged rows"])
def test_the_head_reads_what_predicts_a_label(pair: Pair, rows: tuple[int, ...], side: str, run: bool) -> None:
    model, batch = pair.model(thought_token=THOUGHT).train(), make_batch(pair, side, run, rows)
    if run:  # which marks the place, so that a token within a response may be left out
        batch["labels"][0, (batch["labels"][0] != -100).int().argmax() + 1] = -100
    gradients(model, batch)  # the first step is tried both ways
    with head_rows(model) as seen:
        gradients(model, batch)
    assert seen == [(len(rows), 0), (1, int((batch["labels"] != -100).sum())), (len(rows), 0)]
    assert not model.unload().lm_head._forward_pre_hooks


def test_the_loss_of_an_accumulated_batch_is_divided_as_trainer_says(pair: Pair) -> None:
    model, losses = pair.model().train(), []
    for number in (None, 7, torch.tensor(7)):
        output = model(**make_batch(pair), num_items_in_batch=number)
        assert output.logits is None
        losses.append(output.loss)
    assert losses[1] == losses[2]
    torch.testing.assert_close(losses[1] * 7, losses[0] * (make_batch(pair)["labels"] != -100).sum())


def test_a_loss_of_the_trainers_own_is_computed_by_the_base(pair: Pair) -> None:
    model, batch = pair.model().train(), make_batch(pair)
    usual = gradients(model, batch)[0].loss
    model.get_base_model().loss_function = lambda logits, labels, vocab_size, **kwargs: (
        2 * ForCausalLMLoss(logits, labels, vocab_size)
    )
    output = gradients(model, batch)[0]
    assert output.logits is None
    torch.testing.assert_close(output.loss, 2 * usual)


@pytest.mark.parametrize("model_type", ["gemma2", "cohere"])
def test_a_base_that_does_more_with_its_logits_calls_its_own_head(model_type: str) -> None:
    assistant, base = make_family_assistant(), build(model_type)
    plain = copy.deepcopy(base)
    model = attach(base)
    judge = make_judge(model, plain, assistant)
    base.training = True
    assert model(**judged_batch([0, 1], judge)).logits is None
    with head_rows(model) as seen:
        model(**judged_batch([0, 1], judge))
    assert seen[0][1] == 0
    assert seen[1][1] > 0


def test_tokens_that_are_not_attended_within_a_row_are_read_as_in_one_pass(pair: Pair) -> None:
    model, batch = pair.model(), make_batch(pair)
    last = int(batch["attention_mask"][0].sum()) - 1
    batch["attention_mask"][0, last - 1] = 0
    batch["attention_mask"][2, last] = 0
    check_same(model, batch)


class ByWeight(LlamaForCausalLM):
    """A base that does not call its head."""

    @functools.wraps(LlamaForCausalLM.forward)
    def forward(self, labels: Tensor | None = None, logits_to_keep: Any = 0, **inputs: Any) -> Any:
        output = self.model(**inputs)
        columns = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = nn.functional.linear(output.last_hidden_state[:, columns], self.lm_head.weight)
        loss = None if labels is None else self.loss_function(logits, labels, self.vocab_size)
        return CausalLMOutputWithPast(loss, logits, **{CACHE_NAME: output.get(CACHE_NAME)})


def test_a_base_that_does_not_call_its_head(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "softcot_peft")
    base = ByWeight(pair.load_base().config)
    base.load_state_dict(pair.load_base().state_dict())
    torch.manual_seed(0)
    model = get_peft_model(base, pair.config(tokenizer_name_or_path=str(pair.base)))
    check_same(model, make_batch(pair))
    check_same(model, make_batch(pair, "left"))
    assert "run in one pass" not in caplog.text


def test_a_head_that_is_wrapped_later_is_called(pair: Pair) -> None:
    model, batch = pair.model(), make_batch(pair)
    check_same(model, batch)
    base = model.get_base_model()
    base.lm_head = nn.Sequential(base.lm_head)
    check_same(model, batch)
    with head_rows(model) as seen:
        gradients(model, batch)
    assert seen[-1][1] > 0


def test_ddp_makes_no_logits(pair: Pair, tmp_path: Path) -> None:
    model, batch = pair.model().train(), make_batch(pair)
    gradients(model, batch)
    file = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=file, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)  # as `Trainer` has it
        with passes(model) as seen:
            output = wrapped(**batch)
            output.loss.backward()
            assert len(seen) == 2
    finally:
        torch.distributed.destroy_process_group()


def test_outputs_per_token_other_than_logits_are_zero_before_the_thoughts(pair: Pair) -> None:
    trl = pytest.importorskip("trl.trainer.utils", reason="trl is not installed")
    base, found = pair.load_base(), []
    trl.add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))
    torch.manual_seed(0)
    model, batch = get_peft_model(base, pair.config()).train(), make_batch(pair)
    for model.peft_config["default"].two_pass_training in (True, False):
        with passes(model) as seen:
            output = model(**batch, fused_lm_head=True)
        found.append((output, len(seen)))
    (two, more), (one, once) = found
    assert more > once == 1
    assert two.logits is None if hasattr(two, "logits") else True
    torch.testing.assert_close(two.loss, one.loss, atol=1e-6, rtol=1e-6)
    for name in ("log_probs", "entropy", "is_top1", "label_mask"):
        torch.testing.assert_close(two[name], one[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("given", ["use_cache", "output_hidden_states", "output_attentions", "position_ids", "tuple"])
def test_what_two_passes_cannot_give_is_given_by_one(pair: Pair, given: str) -> None:
    model, batch = pair.model().train(), make_batch(pair)
    where = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    option = {"position_ids": {"position_ids": where}, "tuple": {"return_dict": False}}.get(given, {given: True})
    output = model(**batch, **option)
    logits = output[1] if given == "tuple" else output.logits
    assert type(logits) is Tensor
    if given == "use_cache":
        assert output[CACHE_NAME] is not None
    if given == "output_hidden_states":
        assert all(state.shape[1] == batch["input_ids"].shape[1] for state in output.hidden_states)


def test_steps_that_need_one_pass_take_it_and_say_so_once(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    model, batch = pair.model(), make_batch(pair)
    model.get_base_model().lm_head.weight.requires_grad_()
    caplog.set_level(logging.INFO, "softcot_peft")
    check_same(model, batch, two=False)
    gradients(model, batch)
    (record,) = [record for record in caplog.records if record.name.startswith("softcot_peft")]
    assert record.levelno == logging.INFO
    assert "are trained" in record.getMessage()


def test_gradient_checkpointing_takes_one_pass_and_warns_once_of_what_it_costs(pair: Pair) -> None:
    model, batch = pair.model(), make_batch(pair)
    base = model.get_base_model()  # its method has another name since transformers 5.23
    getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)()
    base.enable_input_require_grads()
    with pytest.warns(UserWarning, match="twice the time.*`gradient_checkpointing=False`"):
        check_same(model, batch, two=False)
    gradients(model, batch)


# peft's own, whenever a base that carries an adapter gets another one
@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time:UserWarning")
def test_a_lora_that_is_trained_beside_gets_its_gradients_from_prompts_too(pair: Pair) -> None:
    base = pair.load_base()
    base.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), "lora")
    torch.manual_seed(0)
    model = get_peft_model(base, pair.config())
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.requires_grad_()
    check_same(model, make_batch(pair), two=False)


def test_the_field_turns_it_off_and_evaluation_is_as_it_was(pair: Pair) -> None:
    batch = make_batch(pair)
    assert type(pair.model(two_pass_training=False).train()(**batch).logits) is Tensor
    assert type(pair.model()(**batch).logits) is Tensor
    with torch.no_grad():
        assert type(pair.model().train()(**batch).logits) is Tensor


def test_a_window_shorter_than_the_prompt(pair: Pair) -> None:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=len(pair.tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=5,
        initializer_range=0.4,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    config_of_adapter = pair.config(tokenizer_name_or_path=str(pair.base))
    check_same(get_peft_model(MistralForCausalLM(config), config_of_adapter), make_batch(pair))


def test_rotary_frequencies_that_change_with_the_length(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "softcot_peft")
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    torch.manual_seed(0)
    base = make_base(len(pair.tokenizer), rope_parameters=rope)
    assert rotary_switch(base.config) == 512
    assert rotary_switch(pair.load_base().config) is None
    batch = make_batch(pair)
    model = get_peft_model(base, pair.config(tokenizer_name_or_path=str(pair.base)))
    check_same(model, batch)
    base.config.max_position_embeddings = batch["input_ids"].shape[1]
    check_same(model, batch, two=False)
    assert "rotary frequencies change" in caplog.text


def test_dropout_is_on_in_both_passes_and_off_while_they_are_tried(pair: Pair) -> None:
    base = pair.load_base()
    torch.manual_seed(0)
    model, batch = get_peft_model(base, pair.config()).train(), make_batch(pair)
    base.model.layers[0].eval()  # a caller's own choice
    before = [module.training for module in model.modules()]
    gradients(model, batch)
    assert [module.training for module in model.modules()] == before
    modes: list[bool] = []
    base.model.layers[1].register_forward_pre_hook(lambda module, args: modes.append(module.training))
    gradients(model, batch)
    assert modes == [True, True]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("at", [1, 2], ids=["prompts", "thoughts"])
def test_a_step_that_is_broken_off_leaves_nothing(pair: Pair, error: type[BaseException], at: int) -> None:
    model, batch = pair.model().train(), make_batch(pair)
    expected = gradients(model, batch)[0].loss
    count = 0

    def fail(module: torch.nn.Module, args: Any) -> None:
        nonlocal count
        count += 1
        if count == at:
            raise error("broken off")

    handle = model.get_base_model().model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(error, match="broken off"):
        model(**batch)
    handle.remove()
    assert torch.equal(gradients(model, batch)[0].loss, expected)
    with pytest.raises(ValueError, match="outside of a call"):
        model.get_base_model().model(batch["input_ids"])


def test_a_base_in_bfloat16(pair: Pair) -> None:
    torch.manual_seed(0)
    model = get_peft_model(pair.load_base().bfloat16(), pair.config())
    check_same(model, make_batch(pair), atol=2e-2)


def test_under_autocast(pair: Pair) -> None:
    model, batch, losses = pair.model().train(), make_batch(pair), []
    for model.peft_config["default"].two_pass_training in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            output = model(**batch)
        losses.append(output.loss)
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=2e-2)


# torch's compiler looks at the gradients of what enters its graphs
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_base(pair: Pair) -> None:
    model, batch = pair.model().train(), make_batch(pair)
    expected, found = gradients(model, batch)
    compiled = torch.compile(model, backend="eager")
    model.zero_grad()
    output = compiled(**batch)
    output.loss.backward()
    torch.testing.assert_close(output.loss, expected.loss, atol=1e-6, rtol=1e-6)
    for weight, gradient in zip((w for w in model.parameters() if w.grad is not None), found, strict=True):
        torch.testing.assert_close(weight.grad, gradient, atol=1e-5, rtol=1e-5)
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("model_type", "two"),
    [
        ("llama", (True, True)),
        ("bart", (True, False)),  # counts positions by column
        ("jamba", (False, False)),  # has recurrent states
        ("prophetnet", (False, False)),  # raises where a cache is followed by more than one token
    ],
)
def test_families_that_cannot_go_on_from_padded_or_cached_prompts_are_found_out(
    model_type: str, two: tuple[bool, bool], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "softcot_peft")
    assistant, base = make_family_assistant(), build(model_type)
    plain = copy.deepcopy(base)
    model = attach(base)
    judge = make_judge(model, plain, assistant)
    base.training = True
    for rows, divided in zip(([0], [0, 1]), two, strict=True):
        assert (model(**judged_batch(rows, judge)).logits is None) == divided
    assert ("run in one pass" in caplog.text) == (two != (True, True))
