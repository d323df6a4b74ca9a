"""Whether a family holds: trained one step, generated, saved, reloaded and disabled, against the judge."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import gradients
from helpers import PROJECTION, key_of, source_of
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from conformance.families import VOCAB
from conformance.judge import IGNORED, Judge, padded
from softcot_peft import SoftCoTConfig, use_assistant

ASSISTANT = "an assistant for every family"
PROMPTS = [[5, 9, 30, 12, 41, 8, 22], [17, 4, 33]]
RESPONSES = [[11, 26, 3], [40, 6, 19, 28]]
NEW, N, THOUGHT_ID = 4, 3, 1

READS_IDS = "reads ids beside embeddings"
OWN_COLUMN = "its loss compares each label with its own column, not with the next"
OTHER_LOSS = "its loss is not the NLL of the response"
NO_LOSS = "its loss cannot be computed from text alone"
RIGHT = "right padding changes its own rows"
LEFT = "left padding changes its own rows"
ONE_PASS = "trains in one pass"
CACHE = "its own cached decoding differs from computing every token again"


def make_assistant() -> PreTrainedModel:
    """A tiny Llama that reads the ids of every base, given to `use_assistant`."""
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=20,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        initializer_range=0.4,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
    )
    words = {f"w{index}": index for index in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=f"w{THOUGHT_ID}"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", unk_token=f"w{THOUGHT_ID}")
    model = LlamaForCausalLM(config).eval()
    use_assistant(model, fast, name=ASSISTANT)
    return model


OF_ASSISTANT = {"assistant_model_name_or_path": ASSISTANT, "assistant_shares_tokenizer": True}
OF_BASE = {"thought_source": "base"}


def attach(base: PreTrainedModel, source: dict[str, Any] = OF_ASSISTANT) -> PeftModel:
    """The base with an adapter whose thoughts are large enough to change tokens."""
    torch.manual_seed(3)
    config = SoftCoTConfig(task_type="CAUSAL_LM", num_thought_tokens=N, init_weights=False, **source)
    return get_peft_model(base, config).eval()


def make_judge(model: PeftModel, base: PreTrainedModel, assistant: PreTrainedModel, filler: int = THOUGHT_ID) -> Judge:
    """The judge of an attached adapter and a copy of its base."""
    (weight,) = (value for name, value in model.named_parameters() if name.endswith(key_of("weight")))
    (bias,) = (value for name, value in model.named_parameters() if name.endswith(key_of("bias")))
    base.requires_grad_(False)  # as under an adapter; some compute in another order with gradient
    return Judge(base, assistant, filler, N, weight, bias)


def write(model: torch.nn.Module, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy new tokens of a batch, padded on the left."""
    ids, mask = padded(prompts, "left")
    out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    assert out[:, : ids.shape[1]].tolist() == ids.tolist()
    return out[:, ids.shape[1] :].tolist()


def make_batch(rows: list[int], judge: Judge) -> dict[str, Any]:
    """Prompts and responses of some rows, padded on the right, with labels on the responses."""
    ids, mask = padded([PROMPTS[row] + RESPONSES[row] for row in rows], "right")
    labels = ids.masked_fill(mask == 0, IGNORED)
    for place, row in enumerate(rows):
        labels[place, : len(PROMPTS[row])] = IGNORED
    # As the Trainer has it; with a cache, some models change it in place and cannot be differentiated.
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, **judge.uncached}


def tensors(output: Any) -> Iterator[Tensor]:
    """The tensors of an output, without those in caches."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict | tuple | list):
        for value in output.values() if isinstance(output, dict) else output:
            yield from tensors(value)


def check_loss(model: PeftModel, judge: Judge, rounding: float = 1e-5) -> list[str]:
    """Loss as the base's own of the placed rows, and as the equation has it; outputs in the caller's columns."""
    remarks = []
    for rows in ([0], [1], [0, 1]):
        prompts, responses = [PROMPTS[row] for row in rows], [RESPONSES[row] for row in rows]
        batch, tokens = make_batch(rows, judge), sum(map(len, responses))
        output, own = model(**batch, output_hidden_states=True), judge.own_loss(prompts, responses)
        length = batch["input_ids"].shape[1]
        assert output.logits.shape[:2] == (len(rows), length)
        assert all(length + N not in tensor.shape for tensor in tensors(output))
        torch.testing.assert_close(output.loss, own, atol=rounding, rtol=rounding)
        next_one, same = (
            sum(judge.nll(*pair, shifted) for pair in zip(prompts, responses, strict=True)) / tokens
            for shifted in (True, False)
        )
        if torch.allclose(own, same, atol=1e-5, rtol=1e-5):
            remarks.append(OWN_COLUMN)
        elif not torch.allclose(own, next_one, atol=1e-5, rtol=1e-5):
            remarks.append(RIGHT if len(rows) > 1 and OTHER_LOSS not in remarks else OTHER_LOSS)
    return remarks


def check_step(model: PeftModel, judge: Judge, loss: Tensor) -> None:
    """A step on a loss changes the projection alone."""
    parameters = dict(model.named_parameters())
    trained = {name: value for name, value in parameters.items() if value.requires_grad}
    assert {name.rsplit(".", 1)[-1] for name in trained} == {"weight", "bias"}
    assert all(PROJECTION in name for name in trained)
    before = {name: value.detach().clone() for name, value in trained.items()}
    optimizer = torch.optim.SGD(trained.values(), lr=0.01)
    loss.backward()
    assert all(value.grad is None for name, value in parameters.items() if name not in trained)
    assert all(torch.isfinite(value.grad).all() and value.grad.abs().max() > 0 for value in trained.values())
    optimizer.step()
    assert not any(torch.equal(value, before[name]) for name, value in trained.items())
    after = {name.replace(".base_layer", ""): value for name, value in model.get_base_model().state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in judge.base.state_dict().items())


def check_training(model: PeftModel, judge: Judge) -> list[str]:
    """One step of training; returns remarks."""
    try:
        judge.own_loss(PROMPTS[:1], RESPONSES[:1])
    except ValueError:  # the plain base has no loss for text; the next token's has to do
        with pytest.raises(ValueError, match="batch_size"):
            model(**make_batch([0], judge))
        model.train()
        logits = model(input_ids=torch.tensor(PROMPTS[:1]), logits_to_keep=1).logits[0, -1]
        check_step(model, judge, -logits.log_softmax(0)[RESPONSES[0][0]])
        model.eval()
        return [NO_LOSS]
    remarks = check_loss(model, judge)
    model.train()
    check_step(model, judge, model(**make_batch([0], judge)).loss)
    model.eval()
    divided = check_two_passes(model, judge)
    assert not divided or divides_in_bfloat16(judge)
    return remarks if divided else [*remarks, ONE_PASS]


def check_two_passes(model: PeftModel, judge: Judge, rounding: float = 5e-6) -> bool:
    """Loss and gradients of steps in two passes are those of one; returns whether there were any."""
    base, config = model.get_base_model(), model.peft_config["default"]
    base.training = True  # without the dropout of its layers
    divided = False
    for rows in ([0], [1], [0, 1]):
        batch, found = make_batch(rows, judge), []
        for config.two_pass_training in (True, False):
            found.append(gradients(model, batch))
        (two, own), (one, expected) = found
        torch.testing.assert_close(two.loss, one.loss, atol=rounding / 5, rtol=rounding / 5)
        for gradient, other in zip(own, expected, strict=True):
            assert (gradient - other).abs().max() <= rounding * max(1, float(other.abs().max()))
        divided = divided or two.logits is None
    base.training = False
    config.two_pass_training = True
    return divided


def divides_in_bfloat16(judge: Judge) -> bool:
    """Whether the base in bfloat16 is trained in two passes."""
    base = copy.deepcopy(judge.base).bfloat16()
    model = attach(base)
    base.training = True
    return any(model(**make_batch(rows, judge)).logits is None for rows in ([0], [1], [0, 1]))


def check_generation(model: PeftModel, judge: Judge) -> tuple[list[list[int]], list[str]]:
    """Single rows and a padded batch as the judge's; returns the batch's tokens and remarks.

    The judge computes every token from scratch, each row alone. Where the base itself, with a cache or beside padding,
    writes something else for the placed rows, that is what the adapter has to write, and a remark says so.
    """
    remarks = []
    expected = judge.generate(PROMPTS, NEW)
    for prompt, tokens in zip(PROMPTS, expected, strict=True):
        own = judge.own_generate([prompt], NEW)
        assert write(model, [prompt]) == own
        if own != [tokens]:
            remarks.append(CACHE)
    batch, own = write(model, PROMPTS), judge.own_generate(PROMPTS, NEW)
    assert batch == own
    if own != expected and not remarks:
        remarks.append(LEFT)
    assert batch != write(judge.base, PROMPTS), "the thoughts change no token, so this proves little"
    return batch, remarks


def check_saving(model: PeftModel, fresh: PreTrainedModel, folder: Path, tokens: list[list[int]]) -> None:
    """The saved adapter on a fresh base writes the same tokens."""
    model.save_pretrained(folder)
    assert write(PeftModel.from_pretrained(fresh, folder).eval(), PROMPTS) == tokens


def check_disabling(model: PeftModel, judge: Judge) -> None:
    """With the adapter disabled the base is what it was, bit for bit."""
    ids, mask = padded(PROMPTS, "left")
    with torch.no_grad(), model.disable_adapter():
        plain = judge.base(input_ids=ids, attention_mask=mask).logits
        assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, plain)
        assert write(model, PROMPTS) == write(judge.base, PROMPTS)


def check_base_as_source(base: PreTrainedModel) -> None:
    """Tokens and losses of a base that is its own source are the judge's, which reads with a copy of it."""
    plain = copy.deepcopy(base)
    model = attach(base, OF_BASE)
    judge = make_judge(model, plain, copy.deepcopy(plain), source_of(model).position_token_id)
    check_generation(model, judge)
    try:
        judge.own_loss(PROMPTS[:1], RESPONSES[:1])
    except ValueError:  # the plain base has no loss for text
        return
    check_loss(model, judge, rounding=5e-5)
    for _ in range(2):  # once two passes have been tried, the source shares their prompts
        check_two_passes(model, judge, rounding=1e-4)


def check_family(base: PreTrainedModel, assistant: PreTrainedModel, folder: Path) -> list[str]:
    """Everything of the above; returns remarks about the base itself."""
    plain, fresh = copy.deepcopy(base), copy.deepcopy(base)
    model = attach(base)
    judge = make_judge(model, plain, assistant)
    remarks = [] if judge.takes_embeds else [READS_IDS]
    remarks += check_training(model, judge)
    tokens, more = check_generation(model, judge)
    check_saving(model, fresh, folder, tokens)
    check_disabling(model, judge)
    return list(dict.fromkeys(remarks + more))
