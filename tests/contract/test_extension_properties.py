"""Properties over random configs of what goes beyond the paper, in float32: sources, projections, chains, prompts.

As test_properties.py, which draws batches and masks for the paper's own config; `make fuzz` runs many more cases.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import collate, gradients, labelled, responses_of, up_to_eos
from helpers import source_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from oracle import Oracle
from peft import PeftModel, get_peft_model
from tiny_pair import ANSWERS, QUESTIONS, RUN, Pair
from torch import Tensor
from torch.nn.functional import gelu
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from softcot_peft import SoftCoTConfig

CASES = 600 if settings.get_current_profile_name() == "fuzz" else 24
PREFIX, BEFORE, AFTER = "In {num_thought_tokens} steps:", "Ask: ", " (end)"


@dataclass
class Case:
    """A config, and rows by their questions."""

    fields: dict[str, Any]
    rows: list[int]
    side: str
    run: bool
    two_passes: bool
    new: int
    chains: int = field(default=1)

    @property
    def number(self) -> int:
        return int(self.fields["num_thought_tokens"])


@st.composite
def cases(draw: DrawFn) -> Case:
    number = draw(st.integers(1, 5))
    projection = draw(st.sampled_from(["linear", "mlp", "per_position"]))
    fields: dict[str, Any] = {"num_thought_tokens": number, "projection": projection}
    chains = 1
    if draw(st.integers(0, 2)) == 0:
        fields["thought_source"] = "base"
        if draw(st.booleans()) and projection != "mlp":
            fields |= {"projection_init": "identity", "init_weights": True}
    else:
        chains = draw(st.integers(1, 3))
        fields["num_chains"] = chains
        fields["chain_init"] = draw(st.sampled_from(["trained", "fixed"]))
        if draw(st.booleans()):
            fields["chain_token_ids"] = draw(st.permutations(range(1, 30)))[:chains]
        if draw(st.booleans()):
            fields["assistant_prefix"] = PREFIX
        if draw(st.booleans()):
            fields["assistant_prompt_between"] = [BEFORE, AFTER]
    if "projection_init" not in fields and draw(st.integers(0, 3)) == 0:
        fields |= {"projection_init": "matched", "init_weights": True}
    run = draw(st.booleans())
    return Case(
        fields | (RUN if run else {}),
        draw(st.lists(st.integers(0, len(QUESTIONS) - 1), min_size=1, max_size=3)),
        draw(st.sampled_from(["left", "right"])),
        run,
        draw(st.booleans()),
        draw(st.integers(1, 4)),
        chains,
    )


@cache
def loaded(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model of the judges, which the package never sees."""
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@dataclass
class Reading(Oracle):
    """An oracle whose assistant reads what stands between two texts, and begins its turn itself."""

    fields: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.base, self.base_tokenizer = loaded(self.base_folder)
        self.assistant, self.assistant_tokenizer = loaded(self.assistant_folder)

    def assistant_ids(self, prompt: list[int]) -> list[int]:
        if self.same_ids:
            return prompt
        text = self.base_tokenizer.decode(prompt, skip_special_tokens=True)
        if "assistant_prompt_between" in self.fields:
            text = text.split(BEFORE)[1].split(AFTER)[0]
        if "assistant_prefix" in self.fields:
            text += PREFIX.replace("{num_thought_tokens}", str(self.num))
        return list(self.assistant_tokenizer(text)["input_ids"])


def projection_of(model: PeftModel, kind: str) -> Callable[[Tensor], Tensor]:
    """The equations of each projection, on the adapter's own values."""
    state = {name.rpartition("softcot_projection.default.")[2]: value for name, value in model.state_dict().items()}
    if kind == "linear":
        return lambda hidden: hidden @ state["weight"].T + state["bias"]
    if kind == "mlp":
        return lambda hidden: (
            gelu(hidden @ state["inner.weight"].T + state["inner.bias"]) @ state["outer.weight"].T
            + state["outer.bias"]
        )
    return lambda hidden: torch.stack(
        [state["weight"][place] @ one + state["bias"][place] for place, one in enumerate(hidden)]
    )


def judges(model: PeftModel, pair: Pair, case: Case) -> list[Reading]:
    """An oracle for each chain."""
    source, own = source_of(model), case.fields.get("thought_source") == "base"
    assistant, nothing = pair.base if own else pair.assistant, torch.empty(0)
    found = []
    for chain in range(case.chains):
        oracle = Reading(pair.base, assistant, nothing, nothing, case.number, same_ids=own, fields=case.fields)
        oracle.project = projection_of(model, case.fields["projection"])
        if own:
            oracle.filler = source.position_token_id
        elif source.chains is None:
            oracle.filler = source.chain_token_ids[chain]
        else:
            oracle.vector = source.chains.weight[chain].detach()
        found.append(oracle)
    return found


def check(pair: Pair, case: Case) -> None:
    torch.manual_seed(case.number)
    options = {"init_weights": False, "contrastive_weight": 0.0, "two_pass_training": case.two_passes}
    if "thought_source" not in case.fields:
        options["assistant_model_name_or_path"] = str(pair.assistant)
    config = SoftCoTConfig(task_type="CAUSAL_LM", **(options | case.fields))
    model = get_peft_model(pair.load_base(), config).eval()
    oracles = judges(model, pair, case)
    texts = [BEFORE + QUESTIONS[row] + AFTER for row in case.rows]
    prompts, responses = pair.rows(texts), responses_of(pair, [ANSWERS[row] for row in case.rows])
    run = RUN["thought_token"] * case.number * case.run

    batch = pair.batch([text + run for text in texts], case.side)
    output = model.generate(**batch, max_new_tokens=case.new, do_sample=False)
    wanted = [oracle.generate(row, case.new) for row in prompts for oracle in oracles]
    assert up_to_eos(output[:, batch["input_ids"].shape[1] :].tolist()) == wanted

    rows = list(zip(prompts, responses, strict=True))
    with torch.no_grad():
        loss = torch.stack([oracle.mean_loss(rows) for oracle in oracles]).mean()
    batch = collate(labelled(prompts, responses, pair.rows([run])[0] if case.run else ()), case.side)
    for _ in range(2):  # the first step is tried
        found, trained = gradients(model.train(), batch)
        torch.testing.assert_close(found.loss, loss, atol=2e-5, rtol=2e-5)
    assert all(gradient.abs().max() > 0 for gradient in trained)
    assert len(trained) == len([weight for weight in model.parameters() if weight.requires_grad])


@pytest.mark.usefixtures("nothing_given")
def test_every_combination_is_the_equations(pair: Pair, record_property: Callable[..., None]) -> None:
    checked = 0

    @settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck))
    @given(case=cases())
    def run(case: Case) -> None:
        nonlocal checked
        check(pair, case)
        checked += 1

    run()
    record_property("cases", checked)
