"""Any causal LM can be the assistant: its thoughts are the oracle's, alone or in a batch, given or loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from assistant_families import FAMILIES, make_family
from batches import collate, gradients, labelled, responses_of
from helpers import Assistant, assistant_passes, find_assistant, reader_of, soft_thoughts, source_of
from oracle import Oracle
from peft import PeftModel
from project_files import rewrite
from tiny_pair import ANSWERS, ASSISTANT_TEMPLATE, QUESTIONS, Pair, make_assistant_tokenizer
from tokenizers import processors
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from softcot_peft import use_assistant

pytestmark = pytest.mark.usefixtures("nothing_given")

NUM = 4
# Their states depend on padding, so that rows of one length are read together.
READ_PADDING = {"bart", "rwkv", "recurrent_gemma", "xlstm"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders of assistants by family, each made when first asked for."""
    root = tmp_path_factory.mktemp("families")

    def folder(name: str) -> Path:
        if not (root / name).exists():
            tokenizer = make_assistant_tokenizer()
            make_family(name, len(tokenizer)).save_pretrained(root / name)
            save_tokenizer(tokenizer, root / name)
        return root / name

    return folder


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save a tokenizer under its own class, lest `AutoTokenizer` make the model family's own of it."""
    tokenizer.save_pretrained(folder)
    rewrite(folder, "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")


class TextOracle(Oracle):
    """The oracle whose assistant's prompt is the text alone, with BOS before it and no EOS after it."""

    def assistant_ids(self, prompt: list[int]) -> list[int]:
        tokenizer = self.assistant_tokenizer
        ids = super().assistant_ids(prompt)
        return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids

    @torch.no_grad()
    def hidden(self, prompt: list[int]) -> Tensor:
        """`t`, `(N, H_assistant)`: what the head reads, which is `hidden_states[-1]` in all but one family."""
        tokenizer = self.assistant_tokenizer
        known = (tokenizer.unk_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        filler = next(token_id for token_id in known if token_id is not None)
        ids = torch.tensor([self.assistant_ids(prompt) + [filler] * self.num])
        read: list[Tensor] = []
        handle = self.assistant.get_output_embeddings().register_forward_pre_hook(lambda _, args: read.append(args[0]))
        output = self.assistant(ids, output_hidden_states=True)
        handle.remove()
        last = output.hidden_states[-1]
        if last.dim() == 3:  # Gemma3n's are a stack of four, merged for the head
            torch.testing.assert_close(last, read[0])
        return read[0][0, -self.num :]

    def thoughts(self, prompt: list[int]) -> Tensor:
        return self.hidden(prompt) @ self.weight.T + self.bias


def attach(pair: Pair, name: str, **changes: Any) -> PeftModel:
    return pair.model(assistant_model_name_or_path=name, num_thought_tokens=NUM, **changes)


def expected_thoughts(model: PeftModel, pair: Pair, folder: Path) -> Tensor:
    oracle = TextOracle.of(model, pair.base, folder, NUM)
    return torch.stack([oracle.thoughts(row) for row in pair.rows(QUESTIONS)]).detach()


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)  # of values near 10


@pytest.mark.parametrize("name", FAMILIES)
def test_thoughts_are_the_oracle_s_alone_and_in_a_batch(pair: Pair, folders: Callable[[str], Path], name: str) -> None:
    model = attach(pair, str(folders(name)))
    expected = expected_thoughts(model, pair, folders(name))
    assert len({tuple(row.flatten().tolist()) for row in expected}) == len(QUESTIONS)  # the prompts are read
    close(torch.cat([soft_thoughts(model, pair.batch([text])) for text in QUESTIONS]), expected)
    for side in ("left", "right"):
        close(soft_thoughts(model, pair.batch(QUESTIONS, side)), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_given_a_loaded_and_a_reloaded_assistant_write_the_same(
    pair: Pair, folders: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    loaded = attach(pair, str(folders(name)))
    batch = pair.batch(QUESTIONS)
    tokens = loaded.generate(**batch, max_new_tokens=4)
    given = AutoModelForCausalLM.from_pretrained(folders(name))
    use_assistant(given, AutoTokenizer.from_pretrained(folders(name)), name="mine")
    torch.testing.assert_close(
        soft_thoughts(attach(pair, "mine"), batch), soft_thoughts(loaded, batch), atol=0, rtol=0
    )
    loaded.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(pair.load_base(), tmp_path).eval()
    assert torch.equal(reloaded.generate(**batch, max_new_tokens=4), tokens)
    oracle = TextOracle.of(loaded, pair.base, folders(name), NUM)
    expected = [oracle.generate(row, 4) for row in pair.rows(QUESTIONS)]
    found = tokens[:, batch["input_ids"].shape[1] :].tolist()
    assert [row[: len(written)] for row, written in zip(found, expected, strict=True)] == expected


EOS, TOKEN = 3, {"assistant_thought_token": "[EOS]"}  # no padding, whose row has no gradient


class ChainOracle(TextOracle):
    """The oracle of one chain: its vector is what the assistant's table holds for EOS, which is at its positions."""

    def of_vector(self, vector: Tensor) -> ChainOracle:
        table = self.assistant.get_input_embeddings()
        with torch.no_grad():
            self.scale = (table(torch.tensor([[EOS]]))[0, 0] / table.weight[EOS]).median()
            table.weight[EOS] = vector / self.scale
        return self

    def thoughts(self, prompt: list[int]) -> Tensor:
        ids = torch.tensor([self.assistant_ids(prompt) + [EOS] * self.num])
        read: list[Tensor] = []
        handle = self.assistant.get_output_embeddings().register_forward_pre_hook(lambda _, args: read.append(args[0]))
        self.assistant(ids, use_cache=False)
        handle.remove()
        return read[0][0, -self.num :] @ self.weight.T + self.bias

    @property
    def gradient(self) -> Tensor:
        return self.assistant.get_input_embeddings().weight.grad[EOS] / self.scale


@pytest.mark.parametrize("name", FAMILIES)
def test_chains_are_trained_through_any_assistant(pair: Pair, folders: Callable[[str], Path], name: str) -> None:
    """Thoughts, loss and the gradient of each chain's embedding are the oracle's; the assistant has none."""
    chains = 2
    model = attach(pair, str(folders(name)), num_chains=chains, contrastive_weight=0.0, **TOKEN)
    source = source_of(model)
    vectors = source.chains.weight.detach()
    oracles = [ChainOracle.of(model, pair.base, folders(name), NUM).of_vector(vector) for vector in vectors]
    prompts, responses = pair.rows(QUESTIONS), responses_of(pair, ANSWERS)
    for chain, oracle in enumerate(oracles):
        expected = torch.stack([oracle.thoughts(row) for row in prompts]).detach()
        for side in ("left", "right"):
            close(soft_thoughts(model, pair.batch(QUESTIONS, side), chains=(chain,)), expected)
        (oracle.mean_loss(zip(prompts, responses, strict=True)) / chains).backward()
    loss = sum(oracle.mean_loss(zip(prompts, responses, strict=True)) for oracle in oracles) / chains
    output, _ = gradients(model.train(), collate(labelled(prompts, responses)))
    torch.testing.assert_close(output.loss, loss, atol=2e-5, rtol=2e-5)
    wanted = torch.stack([oracle.gradient for oracle in oracles])
    torch.testing.assert_close(source.chains.weight.grad, wanted, atol=1e-3 * float(wanted.abs().max()), rtol=1e-2)
    assert all(weight.grad is None for weight in source.assistant.backbone(torch.device("cpu")).parameters())


@pytest.mark.parametrize("name", FAMILIES)
def test_the_width_is_known_before_the_weights_are_loaded(folders: Callable[[str], Path], name: str) -> None:
    config = AutoModelForCausalLM.from_pretrained(folders(name)).config
    assistant = Assistant(str(folders(name)), config, find_assistant)
    states = assistant.backbone(torch.device("cpu"))(input_ids=torch.tensor([[5, 6]])).last_hidden_state
    assert assistant.hidden_size == states.shape[-1]


# Padding


@pytest.mark.parametrize("name", ["bart", "rwkv", "recurrent_gemma", "xlstm", "llama", "mamba", "qwen3_next"])
def test_rows_are_read_by_length_only_where_padding_would_change_them(
    pair: Pair, folders: Callable[[str], Path], name: str
) -> None:
    model = attach(pair, str(folders(name)))
    with assistant_passes(model) as passes:
        soft_thoughts(model, pair.batch([QUESTIONS[0]] * 3))
        assert passes == [3]
        passes.clear()
        soft_thoughts(model, pair.batch([QUESTIONS[0], QUESTIONS[1], QUESTIONS[0]]))
        assert sorted(passes) == ([1, 2] if name in READ_PADDING else [3])


# Tokenizers


def with_bos_and_eos(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=[("[BOS]", 2), ("[EOS]", 3)]
    )


def without_bos(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])


def setting(name: str, value: Any) -> Callable[[PreTrainedTokenizerFast], None]:
    return lambda tokenizer: setattr(tokenizer, name, value)


TOKENIZERS: dict[str, Callable[[PreTrainedTokenizerFast], None]] = {
    "adds BOS": lambda tokenizer: None,
    "adds BOS and EOS": with_bos_and_eos,
    "adds nothing": without_bos,
    "no unk token": setting("unk_token", None),
    "no pad token": setting("pad_token", None),
    "pads on the left": setting("padding_side", "left"),
    "pads on the right": setting("padding_side", "right"),
    "truncates to few tokens": setting("model_max_length", 3),
    "a chat template": setting("chat_template", ASSISTANT_TEMPLATE),
}


@pytest.mark.parametrize("family", ["llama", "mamba", "rwkv"])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_thoughts_are_the_oracle_s_whatever_the_tokenizer_does(
    pair: Pair, tmp_path: Path, kind: str, family: str
) -> None:
    tokenizer = make_assistant_tokenizer()
    TOKENIZERS[kind](tokenizer)
    make_family(family, len(tokenizer)).save_pretrained(tmp_path)
    save_tokenizer(tokenizer, tmp_path)
    model = attach(pair, str(tmp_path))
    expected = expected_thoughts(model, pair, tmp_path)
    for side in ("left", "right"):
        close(soft_thoughts(model, pair.batch(QUESTIONS, side)), expected)


@pytest.mark.parametrize("kind", ["adds BOS", "adds BOS and EOS", "adds nothing"])
def test_the_assistant_s_prompt_begins_with_bos_and_never_ends_in_eos(pair: Pair, tmp_path: Path, kind: str) -> None:
    tokenizer = make_assistant_tokenizer()
    TOKENIZERS[kind](tokenizer)
    make_family("llama", len(tokenizer)).save_pretrained(tmp_path)
    save_tokenizer(tokenizer, tmp_path)
    model = attach(pair, str(tmp_path))
    reader = reader_of(model, None)
    for text in (QUESTIONS[1], ""):
        ids = torch.tensor([[*pair.rows([text])[0], pair.tokenizer.eos_token_id]])  # decoded to the text alone
        read = reader.read(ids, torch.ones_like(ids), NUM)[0][0].tolist()
        bos = [] if kind == "adds nothing" else [tokenizer.bos_token_id]
        words = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert read == bos + words + [tokenizer.unk_token_id] * NUM


# Refused


def test_a_base_on_the_meta_device_does_not_take_the_assistant_there(folders: Callable[[str], Path]) -> None:
    config = AutoModelForCausalLM.from_pretrained(folders("llama")).config
    assistant = Assistant(str(folders("llama")), config, find_assistant)
    backbone = assistant.backbone(torch.device("cpu"))
    with pytest.raises(ValueError, match=r"must be on a device with values.*got 'meta'\. Load the base's weights"):
        assistant.backbone(torch.device("meta"))
    assert backbone.device.type == "cpu"


class AllHead(LlamaForCausalLM):
    """A causal LM that transformers finds no backbone in."""

    base_model_prefix = "nothing"

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model = nn.Sequential()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head


def test_a_causal_lm_without_a_backbone_is_refused() -> None:
    whole = AllHead(
        LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(ValueError, match=r"must be a causal LM with a backbone of its own, got AllHead\. Choose"):
        use_assistant(whole, name="mine")
