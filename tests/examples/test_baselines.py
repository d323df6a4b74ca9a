"""The systems of examples/baselines/ on a tiny pair, against their equations written one row at a time."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import CACHE_NAME
from oracle import Oracle
from project_files import EXAMPLES
from tiny_pair import QUESTIONS, Pair
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.append(str(EXAMPLES))  # where examples/baselines is a package
import baselines
from baselines.coconut import LatentReasoner

RESPONSES = [" It is twelve.", " 28", " It went one hundred and twenty miles.", " five"]
ROWS = [{"prompt": q, "response": r} for q, r in zip(QUESTIONS, RESPONSES, strict=True)]
NEW = 6
Make = Callable[[Pair], Any]
SETTINGS = {"batch_size": 2, "max_new_tokens": NEW}
SYSTEMS: dict[str, Make] = {
    "zero_shot": lambda pair: baselines.ZeroShot(pair.base, **SETTINGS),
    "cot_unk": lambda pair: baselines.CotUnk(pair.base, 3, **SETTINGS),
    "trained_placeholders": lambda pair: baselines.TrainedPlaceholders(pair.base, 3, **SETTINGS),
    "prompt_tuning": lambda pair: baselines.PromptTuning(pair.base, 3, **SETTINGS),
    "lora": lambda pair: baselines.Lora(pair.base, **SETTINGS),
    "assist_cot": lambda pair: baselines.AssistCoT(pair.base, pair.assistant, max_hint_tokens=4, **SETTINGS),
    "coconut": lambda pair: baselines.Coconut(pair.base, (3,), **SETTINGS),
    "softcot": lambda pair: baselines.SoftCoT(pair.base, pair.assistant, 3, **SETTINGS),
}
UNTRAINED = {"zero_shot", "cot_unk", "assist_cot"}
each = pytest.mark.parametrize("name", SYSTEMS)
trained = pytest.mark.parametrize("name", [name for name in SYSTEMS if name not in UNTRAINED])


def weights(system: Any) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in system.model.named_parameters()}


def continue_from(pair: Pair, embeddings: Tensor) -> tuple[str, int]:
    """Greedy text after embeddings `(L, H)`, all recomputed for each token; and its number of tokens with EOS."""
    base, new = pair.load_base(), []
    while len(new) < NEW and pair.tokenizer.eos_token_id not in new:
        token = base(inputs_embeds=embeddings[None]).logits[0, -1].argmax()
        new.append(int(token))
        embeddings = torch.cat([embeddings, base.get_input_embeddings()(token[None])])
    return pair.tokenizer.decode(new, skip_special_tokens=True), len(new)


def embed(pair: Pair, ids: list[int]) -> Tensor:
    return pair.load_base().get_input_embeddings()(torch.tensor(ids, dtype=torch.long))


def latents(base: Any, prompt: list[int], number: int) -> Tensor:
    """Coconut's equation: embeddings of the prompt and `number` hidden states behind it, without a cache."""
    row = base.get_input_embeddings()(torch.tensor(prompt))
    for _ in range(number):
        hidden = base(inputs_embeds=row[None], output_hidden_states=True, use_cache=False).hidden_states[-1]
        row = torch.cat([row, hidden[0, -1:]])
    return row


def hint(pair: Pair, question: str, most: int = 4) -> tuple[str, int]:
    """The assistant's greedy text after a question, and its number of tokens with EOS."""
    tokenizer, assistant = (c.from_pretrained(pair.assistant) for c in (AutoTokenizer, AutoModelForCausalLM))
    read, new = tokenizer(question)["input_ids"], []
    while len(new) < most and tokenizer.eos_token_id not in new:
        new.append(int(assistant(torch.tensor([read + new])).logits[0, -1].argmax()))
    return tokenizer.decode(new, skip_special_tokens=True), len(new)


def prefix(name: str, system: Any, pair: Pair, question: str) -> Tensor:
    """What the base reads before the response, `(L, H)`, by the equations of a system that is not yet trained."""
    (ids,) = pair.rows([question])
    if name == "cot_unk":
        return embed(pair, [*ids, *[pair.tokenizer.eos_token_id] * 3])
    if name == "trained_placeholders":
        return torch.cat([embed(pair, ids), weights(system)["model.embed_tokens.vectors"]])
    if name == "prompt_tuning":
        return torch.cat([weights(system)["prompt_encoder.default.embedding.weight"], embed(pair, ids)])
    if name == "coconut":
        return latents(pair.load_base(), ids, 3)
    if name == "softcot":
        return torch.cat([embed(pair, ids), Oracle.of(system.model, pair.base, pair.assistant, 3).thoughts(ids)])
    if name == "assist_cot":
        return embed(pair, pair.rows([question + hint(pair, question)[0]])[0])
    return embed(pair, ids)


@each
@torch.no_grad()
def test_answers_are_those_of_the_equations_row_by_row(name: str, pair: Pair) -> None:
    system = SYSTEMS[name](pair)
    told = [continue_from(pair, prefix(name, system, pair, question)) for question in QUESTIONS]
    hints = sum(hint(pair, question)[1] for question in QUESTIONS) if name == "assist_cot" else 0
    assert len({text for text, _ in told}) > 1
    assert system.answer(QUESTIONS) == [text for text, _ in told]
    assert system.generated_tokens == sum(tokens for _, tokens in told) + hints


# Coconut has its own below: the pair's large weights amplify rounding by every latent step.
@pytest.mark.parametrize("name", [name for name in SYSTEMS if name != "coconut"])
@torch.no_grad()
def test_losses_are_those_of_the_equations_row_by_row(name: str, pair: Pair) -> None:
    system, base, losses = SYSTEMS[name](pair), pair.load_base(), []
    for question, text in zip(QUESTIONS, RESPONSES, strict=True):
        response = [*pair.rows([text])[0], pair.tokenizer.eos_token_id]
        row = torch.cat([prefix(name, system, pair, question), embed(pair, response[:-1])])
        logits = base(inputs_embeds=row[None]).logits[0, -len(response) :]
        losses.append(cross_entropy(logits, torch.tensor(response), reduction="none"))
    batch = system.collate(system.rows(ROWS))
    torch.testing.assert_close(system.model(**batch)["loss"], torch.cat(losses).mean(), atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.skipif(
    CACHE_NAME == "cache", reason="peft 0.21 puts its prompt before every token: it looks for the old name"
)
def test_prompt_tuning_generates_as_peft_does_where_nothing_is_padded(pair: Pair) -> None:
    system = SYSTEMS["prompt_tuning"](pair)
    for question, mine in zip(QUESTIONS, system.answer(QUESTIONS), strict=True):
        ids = torch.tensor(pair.rows([question]))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Position ids are not supported")  # PEFT's own
            theirs = system.model.generate(input_ids=ids, max_new_tokens=NEW, do_sample=False)
        assert pair.tokenizer.decode(theirs[0, ids.shape[1] :], skip_special_tokens=True) == mine


def test_the_first_chain_answers_and_all_do_when_asked(pair: Pair) -> None:
    config = {"num_chains": 3, "init_weights": False}
    system = baselines.SoftCoT(pair.base, pair.assistant, 3, config, **SETTINGS)
    by_chain = [system.answer(QUESTIONS, chains=chain) for chain in range(3)]
    assert system.answer(QUESTIONS) == by_chain[0] != by_chain[1]
    assert system.answer(QUESTIONS, chains=None) == [text for texts in zip(*by_chain, strict=True) for text in texts]


@pytest.mark.parametrize("padding", [0, 1])  # the tokenizer's pad token, and its EOS
def test_written_tokens_are_counted_to_the_first_eos(padding: int, pair: Pair) -> None:
    new = torch.tensor([[5, 1, padding, padding], [5, 6, 7, 8], [1, padding, padding, padding]])
    assert baselines.ZeroShot(pair.base).count(new) == 2 + 4 + 1


@each
def test_answers_in_a_batch_are_those_given_alone_after_training(name: str, pair: Pair) -> None:
    system = SYSTEMS[name](pair)
    system.fit(ROWS, 2, seed=0)
    assert system.answer(QUESTIONS) == [system.answer([question])[0] for question in QUESTIONS]


@trained
def test_fit_changes_what_it_counts_and_nothing_else_and_repeats_itself(name: str, pair: Pair) -> None:
    system = SYSTEMS[name](pair)
    trainable = {name for name, weight in system.model.named_parameters() if weight.requires_grad}
    before = weights(system)
    system.fit(ROWS, 2, seed=0)
    first = weights(system)
    changed = {name for name in first if not torch.equal(first[name], before[name])}
    assert changed <= trainable
    assert changed
    assert system.trained_parameters == sum(before[name].numel() for name in trainable)
    assert not system.model.training
    system.fit(ROWS, 2, seed=0)
    assert all(torch.equal(weight, first[name]) for name, weight in weights(system).items())
    system.fit(ROWS, 2, seed=1)
    assert any(not torch.equal(weight, first[name]) for name, weight in weights(system).items())


@pytest.mark.parametrize("name", sorted(UNTRAINED))
def test_an_untrained_system_stays_as_it_is(name: str, pair: Pair) -> None:
    system = SYSTEMS[name](pair)
    before = weights(system)
    system.fit(ROWS, 2, seed=0)
    assert system.trained_parameters == 0
    assert all(torch.equal(weight, before[name]) for name, weight in weights(system).items())


def test_trained_parameters_are_those_of_the_method(pair: Pair) -> None:
    counts = {name: make(pair).trained_parameters for name, make in SYSTEMS.items()}
    base = AutoModelForCausalLM.from_pretrained(pair.base)
    width = base.config.hidden_size
    assert counts["prompt_tuning"] == counts["trained_placeholders"] == 3 * width
    assert counts["coconut"] == sum(weight.numel() for weight in base.parameters())
    assert counts["softcot"] == 24 * width + width
    linear = [m for n, m in base.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    assert counts["lora"] == sum(4 * (m.in_features + m.out_features) for m in linear)


@pytest.mark.parametrize("number", [1, 2, 5])
def test_coconut_loss_and_gradient_are_those_of_the_equations(number: int, pair: Pair) -> None:
    system, base = baselines.Coconut(pair.base, (number,)), pair.load_base()
    # So that rounding does not grow by every latent step.
    for model in (system.model.base, base):
        for weight in model.parameters():
            weight.data *= 0.5
    prompts = pair.rows(QUESTIONS)
    responses = [[*ids, pair.tokenizer.eos_token_id] for ids in pair.rows(RESPONSES)]
    output = system.model(**system.collate(system.rows(ROWS)))
    output["loss"].backward()

    losses = []
    for prompt, response in zip(prompts, responses, strict=True):
        row = torch.cat([latents(base, prompt, number), base.get_input_embeddings()(torch.tensor(response[:-1]))])
        logits = base(inputs_embeds=row[None], use_cache=False).logits[0, -len(response) :]
        losses.append(cross_entropy(logits, torch.tensor(response), reduction="none"))
    expected = torch.cat(losses).mean()
    expected.backward()
    torch.testing.assert_close(output["loss"], expected, atol=1e-5, rtol=0)
    for (name, weight), (_, wanted) in zip(system.model.base.named_parameters(), base.named_parameters(), strict=True):
        torch.testing.assert_close(weight.grad, wanted.grad, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_coconut_goes_through_its_stages(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    think = LatentReasoner.think
    monkeypatch.setattr(LatentReasoner, "think", lambda self, *a: (seen.append(self.steps), think(self, *a))[1])
    system = baselines.Coconut(pair.base, (1, 2), batch_size=2)
    system.fit(ROWS, 2, seed=0)
    assert seen == [1, 2]
    assert system.model.steps == 2


@pytest.mark.parametrize("stages", [(), (2, 0)])
def test_coconut_without_latent_steps_is_refused(stages: tuple[int, ...], pair: Pair) -> None:
    with pytest.raises(ValueError, match=r"`stages` must hold numbers of latent steps, each at least 1, got \("):
        baselines.Coconut(pair.base, stages)


def test_a_placeholder_that_the_base_does_not_know_is_refused(pair: Pair) -> None:
    with pytest.raises(ValueError, match=r"`placeholder` must be a token of the base's vocabulary, got '<nil>'"):
        baselines.CotUnk(pair.base, placeholder="<nil>")


def test_training_lowers_the_loss_on_the_rows_it_saw(pair: Pair) -> None:
    system = baselines.Coconut(pair.base, (2,), batch_size=4, learning_rate=1e-3)
    rows = system.rows(ROWS)
    with torch.no_grad():
        before = system.model(**system.collate(rows))["loss"]
    system.fit(ROWS, 3, seed=0)
    with torch.no_grad():
        assert system.model(**system.collate(rows))["loss"] < before
