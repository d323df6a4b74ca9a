"""The GSM8K example: prompts, labels, and both scripts from end to end on a file made here."""

from __future__ import annotations

import copy
import json
import random
import re
import shutil
import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import reader_of
from peft import get_peft_model
from project_files import load_example
from safetensors.torch import load_file
from tiny_pair import Pair
from tokenizers import normalizers
from transformers import AutoTokenizer, DataCollatorForSeq2Seq, GenerationConfig, Trainer

from softcot_peft import SoftCoTConfig, with_thought_tokens

gsm8k = load_example("train_gsm8k")
problems = load_example("problems")
rationales = load_example("rationales")
tiny = load_example("make_tiny_pair")


def arguments(pair: Pair, *more: str) -> list[str]:
    models = ["--base", str(pair.base), "--assistant", str(pair.assistant)]
    return [*models, "--train-file", "train.jsonl", "--eval-file", "test.jsonl", "--output-dir", "out", *more]


# Exact match


@pytest.mark.parametrize(
    ("solution", "reference", "correct"),
    [
        ("The answer is $1,234.00.", "#### 1234", True),
        ("#### 72.0", "#### 72", True),
        ("#### 72", "#### -72", False),
        ("#### 720", "#### 72", False),
        ("0.1", "#### .10", True),
        ("I do not know.", "#### 0", False),
        ("I do not know.", "Nor do I.", False),
    ],
)
def test_exact_match(solution: str, reference: str, correct: bool) -> None:
    assert gsm8k.is_correct(solution, reference) is correct


# Prompts and labels

ROW = {"question": "How many legs have {seven} dogs?", "answer": "7 * 4 = <<7*4=28>>28 legs.\n#### 28"}


def test_chat_prompts_end_in_the_generation_prompt(pair: Pair) -> None:
    text = pair.tokenizer.decode(gsm8k.encode_prompt(pair.tokenizer, ROW["question"]))
    assert text.startswith("<|user|>")
    assert text.endswith("<question>\n" + ROW["question"] + "\n</question><|end|><|assistant|>")


def test_without_a_chat_template_the_prompt_is_plain_text_with_the_tokenizers_bos(pair: Pair) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pair.assistant)
    assert tokenizer.chat_template is None
    ids = gsm8k.encode_prompt(tokenizer, ROW["question"])
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.bos_token_id not in ids[1:]
    tokenizer = AutoTokenizer.from_pretrained(pair.base)
    tokenizer.chat_template = None
    assert tokenizer.decode(gsm8k.encode_prompt(tokenizer, ROW["question"])).endswith(
        "dogs?\n</question>\n\nSolution:\n"
    )


@pytest.mark.parametrize("where", ["user_turn", "generation_prompt"])
def test_thought_tokens_are_written_in_the_number_asked_for(pair: Pair, where: str) -> None:
    config = SoftCoTConfig(assistant_model_name_or_path="any", thought_token="<thought>", placement="thought_token")
    tokenizer = with_thought_tokens(pair.tokenizer, config, where)
    thought = tokenizer.convert_tokens_to_ids("<thought>")
    for number in (0, 4, 32):
        ids = gsm8k.encode_prompt(tokenizer, ROW["question"], number)
        assert ids.count(thought) == number
        assert [i for i in ids if i != thought] == gsm8k.encode_prompt(pair.tokenizer, ROW["question"])
        assert gsm8k.encode_example(tokenizer, ROW, number)["input_ids"][: len(ids)] == ids


def test_answer_and_eos_are_labels(pair: Pair) -> None:
    tokenizer = pair.tokenizer
    prompt = gsm8k.encode_prompt(tokenizer, ROW["question"])
    row = gsm8k.encode_example(tokenizer, ROW)
    assert row["input_ids"][: len(prompt)] == prompt
    assert row["labels"] == [-100] * len(prompt) + row["input_ids"][len(prompt) :]
    assert row["labels"][-1] == tokenizer.eos_token_id
    assert tokenizer.decode(row["labels"][len(prompt) : -1]) == "7 * 4 = 28 legs.\n#### 28"
    kept = gsm8k.encode_example(tokenizer, ROW, keep_marks=True)["labels"]
    assert tokenizer.decode(kept[len(prompt) : -1]) == ROW["answer"]


def test_eos_is_a_label_even_where_it_is_also_the_padding(pair: Pair) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pair.base, pad_token="<eos>", padding_side="left")
    rows = [gsm8k.encode_example(tokenizer, row) for row in (ROW, {"question": "?", "answer": "#### 1"})]
    batch = DataCollatorForSeq2Seq(tokenizer)(rows)
    eos = batch["labels"] == tokenizer.eos_token_id
    assert eos.sum(1).tolist() == [1, 1]
    assert eos[:, -1].all()
    assert batch["attention_mask"].sum(1).tolist() == [len(row["input_ids"]) for row in rows]


def test_rows_that_are_too_long_are_dropped_and_none_is_cut(pair: Pair) -> None:
    rows = [ROW, {"question": ROW["question"] * 3, "answer": ROW["answer"]}]
    whole = gsm8k.encode_example(pair.tokenizer, ROW, 32)
    length = len(whole["input_ids"])
    most = ("--num-thoughts", "32", "--max-length")
    args = gsm8k.parse_args(arguments(pair, *most, str(length)))
    assert gsm8k.encode_rows("training", rows, pair.tokenizer, args) == [whole]
    for part in ("training", "validation"):
        args = gsm8k.parse_args(arguments(pair, *most, str(length - 1)))
        with pytest.raises(ValueError, match=rf"`--max-length` .* {part} rows, but {length - 1} drops all 2"):
            gsm8k.encode_rows(part, rows, pair.tokenizer, args)


# The paper's prompts

ODD = [
    "How many legs?", "", "\n", "<question>", "</question>", "\n</question>", "<question>\n</question>\n<QUESTION>",
    "<<question>question>", "</</question>question>", "<", "</question", "question>\n", "{question}", "{prompt} {0}",
    "{num_thought_tokens}", "\u0338", "a\u0338", "x < 4 && y > 3", "\\n\\", "  two  spaces ", "思考 😀", "{{ 1 + 1 }}",
]  # fmt: skip


def base_reads(args: Namespace, question: str, num: int) -> str:
    tokenizer = gsm8k.load_tokenizer(args, gsm8k.make_config(args))
    return tokenizer.decode(gsm8k.encode_prompt(tokenizer, question, num))


def assistant_reads(args: Namespace, question: str, num: int) -> str:
    """What the assistant reads, decoded, with its thought positions."""
    config = gsm8k.make_config(args)
    tokenizer = gsm8k.load_tokenizer(args, config)
    model = get_peft_model(gsm8k.load_base(args, tokenizer), config)
    ids = torch.tensor([gsm8k.encode_prompt(tokenizer, question, num)])
    if config.thought_token:
        ids = ids[:, : ids[0].tolist().index(tokenizer.convert_tokens_to_ids(config.thought_token))]
    reader = reader_of(model)
    found, mask = reader.read(ids, torch.ones_like(ids), num)
    return reader.assistant.tokenizer.decode(found[0][mask[0] == 1])


@pytest.mark.parametrize("question", ODD, ids=ascii)
def test_each_delimiter_occurs_once_in_every_prompt(pair: Pair, question: str) -> None:
    for normalizer in (None, normalizers.NFC(), normalizers.Lowercase()):
        tokenizer = copy.deepcopy(pair.tokenizer)
        if normalizer is not None:
            tokenizer.backend_tokenizer.normalizer = normalizer
        text = tokenizer.decode(gsm8k.encode_prompt(tokenizer, question))
        before, after = gsm8k.DELIMITERS
        assert (text.count(before), text.count(after)) == (1, 1)
        assert text.index(before) < text.index(after)
        if "question>" not in question and normalizer is None:
            assert text.partition(before)[2].partition(after)[0] == question


@pytest.mark.parametrize("where", ["user_turn", "generation_prompt"])
def test_the_thoughts_stand_between_markers(pair: Pair, where: str) -> None:
    more = ("--where", where, "--thought-token", "<thought>", "--begin-marker", "<|system|>", "--end-marker", "<pad>")
    text = base_reads(gsm8k.parse_args(arguments(pair, *more)), "How many legs?", 3)
    run = "<|system|><thought><thought><thought><pad>"
    question, end = "<question>\nHow many legs?\n</question>", "<|end|><|assistant|>"
    introduced = f"{question}\n\n{gsm8k.INTRODUCTION}\n{run}{end}"
    assert text.endswith(introduced if where == "user_turn" else question + end + run)
    assert base_reads(gsm8k.parse_args(arguments(pair, *more)), "How many legs?", 0).endswith(question + end)
    bare = base_reads(gsm8k.parse_args(arguments(pair, *more, "--introduction", "")), "How many legs?", 3)
    assert bare.endswith(question + (run + end if where == "user_turn" else end + run))


def test_markers_need_thought_tokens(pair: Pair) -> None:
    args = gsm8k.parse_args(arguments(pair, "--begin-marker", "<pad>"))
    with pytest.raises(ValueError, match="`--begin-marker` and `--end-marker` need thought tokens"):
        gsm8k.make_config(args)


def test_the_assistant_reads_the_question_alone_and_begins_its_own_turn(pair: Pair) -> None:
    base = ("--base", str(pair.base), "--assistant", str(pair.base), "--no-bf16")  # which chats, and reads any text
    for place in ((), ("--where", "user_turn", "--thought-token", "<thought>")):
        options = ("--assistant-thought-token", "<pad>", *place)
        args = gsm8k.parse_args(arguments(pair, *base, *options))
        for num in (2, 5):
            task, lead = (
                text.replace("{num_thought_tokens}", str(num)).replace("{prompt}", "Why {not}?")
                for text in (gsm8k.ASSISTANT_PROMPT, gsm8k.ASSISTANT_PREFIX)
            )
            expected = f"<|user|>{task}<|end|><|assistant|>{lead}" + "<pad>" * num
            assert assistant_reads(args, "Why {not}?", num) == expected
            assert str(num) in task
            assert str(num) in lead
    args = gsm8k.parse_args(arguments(pair, *base, "--assistant-reads", "prompt", "--assistant-prefix", ""))
    text = assistant_reads(args, "Why?", 2)
    assert "step by step" in text
    assert "<question>" in text


def test_a_thinking_model_gets_an_empty_think_block(pair: Pair, tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(pair.tokenizer)
    tokenizer.chat_template += (
        "{% if add_generation_prompt and enable_thinking is defined and enable_thinking is false %}"
        "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    )  # as Qwen3's
    pair.load_base().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    args = gsm8k.parse_args(arguments(pair, "--base", str(tmp_path), "--assistant", str(tmp_path)))
    assert base_reads(args, "Why?", 0).endswith("<|assistant|>")
    assert "<think>" not in assistant_reads(args, "Why?", 2)
    args.no_thinking = True
    assert base_reads(args, "Why?", 0).endswith("<|assistant|>" + gsm8k.EMPTY_THINK_BLOCK)
    assert "<|assistant|>" + gsm8k.EMPTY_THINK_BLOCK + "Here is" in assistant_reads(args, "Why?", 2)


# Decoding


def test_the_bases_own_decoding_options_are_replaced_but_its_stop_tokens_kept(pair: Pair, tmp_path: Path) -> None:
    base = pair.load_base()
    base.generation_config = GenerationConfig(eos_token_id=[5], do_sample=True, top_k=20, repetition_penalty=1.1)
    base.save_pretrained(tmp_path)
    greedy = gsm8k.load_base(gsm8k.parse_args(arguments(pair, "--base", str(tmp_path))), pair.tokenizer)
    options = greedy.generation_config
    assert (options.do_sample, options.max_new_tokens, options.pad_token_id) == (False, 1024, 0)
    assert options.eos_token_id == [1, 5]
    assert options.top_k is None
    assert options.repetition_penalty is None
    more = ("--temperature", "1", "--max-new-tokens", "7")
    options = gsm8k.load_base(gsm8k.parse_args(arguments(pair, *more)), pair.tokenizer).generation_config
    assert (options.do_sample, options.temperature, options.top_p, options.top_k) == (True, 1.0, 1.0, 0)
    assert options.max_new_tokens == 7


def test_solutions_come_back_in_order(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    rows = [{"question": "?", "answer": f"#### {number}"} for number in range(7)]
    monkeypatch.setattr(gsm8k, "solve", lambda model, tokenizer, rows, *others: [row["answer"] for row in rows])
    args = gsm8k.parse_args(arguments(pair, "--eval-batch-size", "3"))
    assert gsm8k.evaluate("name", None, None, rows, 4, args) == [row["answer"] for row in rows]
    assert "Exact match, name: 100.00% (7 of 7)" in capsys.readouterr().out


def test_defaults_are_the_studys(pair: Pair) -> None:
    from study import work  # imported by the scripts' names, as they are found by `load_example`
    from study.plan import FULL, tries

    args, chosen = gsm8k.parse_args(arguments(pair)), tries(1e-3, FULL)["plain"]
    assert (args.learning_rate, args.warmup, args.schedule) == (chosen.learning_rate, chosen.warmup, "linear")
    assert (args.max_steps, args.batch_size) == (chosen.steps, chosen.batch)
    assert args.num_thoughts == args.inference_thoughts == chosen.thoughts
    assert args.own_rationales == (chosen.rationales == "own")
    assert ("medium", args.max_train_samples) in FULL.written
    assert (args.rationale_samples, args.rationale_temperature) == (1, work.SAMPLING["temperature"])
    assert args.validation_samples == FULL.validated
    assert (args.temperature, args.patience, args.where) == (0, None, "prompt_end")


def test_steps_and_questions_have_defaults_only_where_nothing_else_says_how_many(pair: Pair) -> None:
    args = gsm8k.parse_args(arguments(pair, "--epochs", "3", "--no-own-rationales"))
    assert (args.epochs, args.max_steps, args.max_train_samples) == (3, -1, None)
    args = gsm8k.parse_args(arguments(pair, "--epochs", "3", "--max-steps", "5", "--max-train-samples", "7"))
    assert (args.max_steps, args.max_train_samples) == (5, 7)


# Precision


@pytest.mark.parametrize(
    ("capabilities", "fast"),
    [
        ({"avx512_f": True, "avx512_bf16": False}, False),
        ({"avx512_bf16": True}, True),
        ({"neon": True, "bf16": True}, True),
        ({}, False),
        (None, False),  # a torch that does not tell
    ],
    ids=str,
)
def test_bfloat16_is_the_default_on_cpus_with_its_instructions(
    capabilities: dict[str, bool] | None, fast: bool, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    if capabilities is not None:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert gsm8k.parse_args(arguments(pair)).bf16 is fast
    assert gsm8k.parse_args(arguments(pair, "--bf16")).bf16
    assert not gsm8k.parse_args(arguments(pair, "--no-bf16")).bf16


@pytest.mark.parametrize("native", [True, False])
def test_bfloat16_is_the_default_on_gpus_that_do_not_emulate_it(
    native: bool, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation
    )
    assert gsm8k.parse_args(arguments(pair)).bf16 is native


# End to end


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty problems."""
    rng, rows = random.Random(0), []
    for _ in range(40):
        many, more = rng.randrange(2, 99), rng.randrange(2, 99)
        question = (
            f"Ann has {many} pens and gets {more}" + rng.choice(["", " of them from a friend"]) + ". How many now?"
        )
        total = many + more
        answer = f"Ann has {many}+{more}=<<{many}+{more}={total}>>{total} pens.\n#### {total}"
        rows.append({"question": question, "answer": answer})
    path = tmp_path_factory.mktemp("data") / "problems.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tiny_pair(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny.main(["--train-file", str(file), "--out", str(folder), "--steps", "12", "--vocab-size", "600"])
    return folder


def command(file: Path, tiny_pair: Path, out: Path, *more: str) -> list[str]:
    sizes = "--num-thoughts 6 --inference-thoughts 3 --max-eval-samples 6 --eval-batch-size 4 --max-new-tokens 8"
    return [
        *("--base", str(tiny_pair / "base"), "--assistant", str(tiny_pair / "assistant")),
        *("--train-file", str(file), "--eval-file", str(file), "--output-dir", str(out)),
        *(*sizes.split(), "--no-bf16", "--no-own-rationales", "--validation-samples", "0"),
        *("--learning-rate", "1e-2", *more),
    ]


def test_the_tiny_pair_has_two_tokenizers(tiny_pair: Path, file: Path) -> None:
    base, assistant = (AutoTokenizer.from_pretrained(tiny_pair / name) for name in ("base", "assistant"))
    assert len(base) > len(assistant)
    assert base.decode(base("Ann has 12 pens.\n")["input_ids"]) == "Ann has 12 pens.\n"
    assert assistant.decode(assistant("Ann has 12 pens.\n")["input_ids"]) == "Ann has 12 pens.\n"
    assert base("<thought><eos>")["input_ids"] == base.convert_tokens_to_ids(["<thought>", "<eos>"])
    assert base.decode(gsm8k.encode_prompt(base, "Why?")).endswith("Why?\n</question><end>\n<assistant>\n")
    assert assistant.unk_token_id is not None


@pytest.mark.parametrize("precision", ["--bf16", "--no-bf16"])
def test_training_lowers_the_loss_and_the_saved_adapter_answers_the_same(
    precision: str, file: Path, tiny_pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    gsm8k.main(command(file, tiny_pair, tmp_path, "--max-steps", "6", precision))
    printed = capsys.readouterr().out
    start, end = map(float, re.search(r"rows: ([\d.]+) at the start, ([\d.]+) at the end", printed).groups())
    assert end < start - 0.05
    assert "Training rows: 40; dropped, too long: 0" in printed
    assert re.search(r"Exact match, base: .* of 6\)", printed)
    assert re.search(r"Exact match, SoftCoT: .* of 6\)", printed)
    assert "4 of 4 solutions of the first batch are the same" in printed
    saved = {path.name for path in tmp_path.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "checkpoint-6"} <= saved

    gsm8k.main(command(file, tiny_pair, tmp_path, "--max-steps", "8", "--resume", precision))
    printed = capsys.readouterr().out
    again, end = map(float, re.search(r"rows: ([\d.]+) at the start, ([\d.]+) at the end", printed).groups())
    assert again == start  # before the checkpoint is read
    steps = json.loads((tmp_path / "checkpoint-8" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in steps if "loss" in entry] == list(range(1, 9))

    args = gsm8k.parse_args(command(file, tiny_pair, tmp_path, precision))
    with pytest.raises(RuntimeError, match="does not solve problems as the trained one did"):
        gsm8k.check_saved(args, AutoTokenizer.from_pretrained(tmp_path), [ROW], ["something else"])


def test_cached_thoughts_train_the_same_and_a_resumed_run_finds_them(
    file: Path, tiny_pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    losses = []
    for name, more in (("plain", []), ("cached", ["--cache-thoughts"])):
        more += ["--where", "user_turn", "--thought-token", "<thought>"]
        gsm8k.main(command(file, tiny_pair, tmp_path / name, "--max-steps", "3", *more))
        losses.append(re.search(r"rows: ([\d.]+) at the start, ([\d.]+) at the end", capsys.readouterr().out).groups())
    assert losses[0] == losses[1]
    (thoughts,) = (tmp_path / "cached" / "thoughts").iterdir()
    written = thoughts.stat().st_mtime_ns
    gsm8k.main(command(file, tiny_pair, tmp_path / "cached", "--max-steps", "4", "--resume", *more))
    assert list(thoughts.parent.iterdir()) == [thoughts]
    assert thoughts.stat().st_mtime_ns == written


def test_thoughts_in_the_user_turn_with_sampling(
    file: Path, tiny_pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    more = ["--where", "user_turn", "--thought-token", "<thought>", "--temperature", "1"]
    more += ["--max-steps", "2", "--max-train-samples", "8", "--controls"]
    gsm8k.main(command(file, tiny_pair, tmp_path, *more))
    printed = capsys.readouterr().out
    for control in ("zero vectors", "another question's", "random projection"):
        assert re.search(rf"Exact match, {control}: .* of 6\)", printed)
    assert "Training rows: 8" in printed
    assert "4 of 4 solutions of the first batch are the same" in printed
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Why?"}], tokenize=False)
    assert "Why?\n\n" + gsm8k.INTRODUCTION + "\n" + "<thought>" * 6 + "<end>" in prompt
    assert json.loads((tmp_path / "adapter_config.json").read_text())["placement"] == "thought_token"


def test_controls_need_another_question_in_every_batch(file: Path, tiny_pair: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="leave one alone"):
        gsm8k.main(command(file, tiny_pair, tmp_path, "--controls", "--eval-batch-size", "5"))


def test_without_a_thought_token_the_user_turn_is_refused(file: Path, tiny_pair: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs `thought_token`"):
        gsm8k.main(command(file, tiny_pair, tmp_path, "--where", "user_turn"))


# Own rationales, validation and batches

OWN = "I know it. #### {}"


@dataclass
class Run:
    """A training without the evaluation of the problems."""

    args: Namespace
    printed: str
    trainer: Trainer
    sampled: list[str]  # questions that the base was asked for own rationales

    @property
    def history(self) -> list[dict[str, Any]]:
        return self.trainer.state.log_history

    def asked(self, rows: list[dict[str, list[int]]]) -> list[str]:
        """The questions of rows."""
        texts = self.trainer.processing_class.batch_decode([row["input_ids"] for row in rows])
        return [text.partition("<question>\n")[2].partition("\n</question>")[0] for text in texts]


def run_training(*argv: str) -> Run:
    """Train a base that gives the right answer in its own words, if the answer is an odd number."""
    sampled, printed = [], []

    def solve(
        model: Any, tokenizer: Any, rows: list[dict[str, str]], num: int, seed: int, **options: Any
    ) -> list[str]:
        assert num == 0
        assert options == {"whole": True, "do_sample": True, "temperature": 0.7, "top_p": 1.0, "top_k": 0}
        assert model.get_model_status().enabled is False
        sampled.extend(row["question"] for row in rows)
        right = [int(row["answer"].split()[-1]) for row in rows]
        return [OWN.format(number if number % 2 else -1) for number in right]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gsm8k, "solve", solve)
        patch.setattr("builtins.print", lambda *texts, **options: printed.append(" ".join(map(str, texts))))
        args = gsm8k.parse_args(list(argv))
        gsm8k.set_seed(args.seed)
        config = gsm8k.make_config(args)
        tokenizer = gsm8k.load_tokenizer(args, config)
        trainer = gsm8k.train(get_peft_model(gsm8k.load_base(args, tokenizer), config), tokenizer, args)
    return Run(args, "\n".join(printed), trainer, sampled)


OWN_OPTIONS = ("--own-rationales", "--rationale-samples", "2", "--validation-samples", "10", "--cache-thoughts")


@pytest.fixture(scope="module")
def own(file: Path, tiny_pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Ten steps on own rationales, with ten rows held out."""
    out = tmp_path_factory.mktemp("own")
    return run_training(*command(file, tiny_pair, out, *OWN_OPTIONS, "--max-steps", "10"))


def problems_of(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_the_base_trains_on_its_own_right_answers_but_not_on_those_held_out(own: Run, file: Path) -> None:
    rows = problems_of(file)
    odd = [row["question"] for row in rows if int(row["answer"].split()[-1]) % 2]
    first, last = ([row["question"] for row in part] for part in (rows[:30], rows[30:]))
    assert sorted(own.sampled) == sorted(2 * (first + last))
    trained, held_out = own.asked(own.trainer.train_dataset), own.asked(own.trainer.eval_dataset)
    assert trained == [question for question in first if question in odd]  # equal answers are one row
    assert held_out == [question for question in last if question in odd]
    assert not set(trained) & set(held_out)
    texts = own.trainer.processing_class.batch_decode([row["input_ids"] for row in own.trainer.train_dataset])
    assert all("I know it. ####" in text for text in texts)
    assert f"training: {len(trained)} of 60 answers are right and different" in own.printed
    assert f"for {len(held_out)} of 10 questions" in own.printed
    assert f"Training rows: {len(trained)}; dropped, too long: 0" in own.printed


def test_a_resumed_run_reads_its_rationales_and_thoughts(
    own: Run, file: Path, tiny_pair: Path, tmp_path: Path
) -> None:
    shutil.copytree(own.args.output_dir, tmp_path, dirs_exist_ok=True)
    files = sorted(path for kind in ("rationales", "thoughts") for path in (tmp_path / kind).iterdir())
    written = [path.stat().st_mtime_ns for path in files]
    more = ("--max-steps", "11", "--resume")
    again = run_training(*command(file, tiny_pair, tmp_path, *OWN_OPTIONS, *more))
    assert again.sampled == []
    assert again.printed.count("; read from ") == 2
    assert again.trainer.train_dataset == own.trainer.train_dataset
    assert sorted(path for kind in ("rationales", "thoughts") for path in (tmp_path / kind).iterdir()) == files
    assert [path.stat().st_mtime_ns for path in files] == written
    assert [entry["step"] for entry in again.history if "eval_loss" in entry] == list(range(1, 12))


def test_rationales_are_reused_for_nothing_else(own: Run, file: Path, tiny_pair: Path) -> None:
    def found(*more: str, template: str = "", factor: float = 1.0) -> Path:
        args = gsm8k.parse_args(command(file, tiny_pair, Path(own.args.output_dir), *OWN_OPTIONS, *more))
        config = gsm8k.make_config(args)
        tokenizer = gsm8k.load_tokenizer(args, config)
        tokenizer.chat_template = template + tokenizer.chat_template
        model = get_peft_model(gsm8k.load_base(args, tokenizer), config)
        with torch.no_grad():
            model.get_base_model().model.norm.weight.mul_(factor)
        return rationales.rationales_file(gsm8k.split_rows(args)["training"], model, tokenizer, args)

    assert found().is_file()
    assert found("--learning-rate", "1", "--num-thoughts", "2", "--eval-batch-size", "2") == found()
    others = [
        found("--rationale-temperature", "0.8"),
        found("--rationale-samples", "3"),
        found("--max-new-tokens", "9"),
        found("--seed", "1"),
        found("--bf16"),
        found("--max-train-samples", "29"),
        found(template="Think. "),
        found(factor=1.01),
    ]
    assert len({found(), *others}) == len(others) + 1


def test_answers_that_are_cut_or_wrong_are_no_rationales(
    file: Path, tiny_pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A base that has hardly been trained is never right, and the error says what to do."""
    more = ("--own-rationales", "--max-train-samples", "3", "--rationale-samples", "2")
    with pytest.raises(ValueError, match=r"`--own-rationales` .* none of 6 to the training .*`--no-own-rationales`"):
        gsm8k.main(command(file, tiny_pair, tmp_path, *more))
    assert "0 of 6 answers are right and different (0%), for 0 of 3 questions" in capsys.readouterr().out
    assert not (tmp_path / "rationales").exists()


def test_a_cut_solution_is_empty_where_whole_ones_are_wanted(own: Run) -> None:
    model, tokenizer, rows = own.trainer.model, own.trainer.processing_class, [ROW, ROW | {"question": "Why?"}]
    options = {"max_new_tokens": 4}
    texts = gsm8k.solve(model, tokenizer, rows, 3, 0, **options)
    assert all(texts)
    assert gsm8k.solve(model, tokenizer, rows, 3, 0, whole=True, **options) == ["", ""]
    last = tokenizer(texts[0], add_special_tokens=False)["input_ids"][-1]
    generation = model.get_base_model().generation_config
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "eos_token_id", [tokenizer.eos_token_id, last])
        assert gsm8k.solve(model, tokenizer, rows[:1], 3, 0, whole=True, **options) != [""]


def test_the_validation_loss_is_that_of_the_logits_and_no_logits_are_gathered(
    file: Path, tiny_pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_training(*command(file, tiny_pair, tmp_path, "--max-steps", "1", "--validation-samples", "7"))
    trainer, rows = run.trainer, run.trainer.eval_dataset
    assert len(rows) == 7 < run.args.batch_size  # one batch, so that the mean is over all tokens
    total = tokens = 0.0
    for row in rows:
        ids, labels = (torch.tensor([row[name]]) for name in ("input_ids", "labels"))
        with torch.no_grad():
            logits = trainer.model.eval()(input_ids=ids, labels=labels).logits.float()
        known = labels[:, 1:] != -100
        scores = logits[:, :-1].log_softmax(-1).gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
        total, tokens = total - float(scores[known].sum()), tokens + int(known.sum())
    returned, step = [], trainer.prediction_step
    monkeypatch.setattr(
        trainer, "prediction_step", lambda *given, **more: returned.append(step(*given, **more)) or returned[-1]
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert [(logits, labels) for _, logits, labels in returned] == [(None, None)]
    single = sum(gsm8k.training_loss(trainer.model, trainer.data_collator, [row]) for row in rows) / len(rows)
    trainer.args.per_device_eval_batch_size = 1
    assert trainer.evaluate()["eval_loss"] == pytest.approx(single, rel=1e-5)  # as in training, in two passes


def test_the_weights_with_the_lowest_validation_loss_are_saved(own: Run) -> None:
    losses = {entry["step"]: entry["eval_loss"] for entry in own.history if "eval_loss" in entry}
    assert list(losses) == list(range(1, 11))
    best = min(losses, key=losses.get)
    out = Path(own.args.output_dir)
    saved, kept = (load_file(folder / "adapter_model.safetensors") for folder in (out, out / f"checkpoint-{best}"))
    assert all(torch.equal(saved[name], kept[name]) for name in saved)
    assert (out / "checkpoint-10").is_dir()


def test_losses_are_plotted_if_matplotlib_is_there(own: Run, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = Path(own.args.output_dir, "loss.png")
    assert file.read_bytes().startswith(b"\x89PNG")
    assert f"Losses: {file}" in own.printed
    plot = load_example("loss_plot").save_loss_plot
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        plot(own.history, tmp_path / "loss.png")
    assert "No loss.png: matplotlib is not installed" in capsys.readouterr().out
    assert not (tmp_path / "loss.png").exists()
    plot([entry for entry in own.history if "eval_loss" not in entry], tmp_path / "loss.png")  # no validation
    assert (tmp_path / "loss.png").exists()


def test_training_stops_early_without_a_lower_validation_loss(file: Path, tiny_pair: Path, tmp_path: Path) -> None:
    options = ("--validation-samples", "4", "--max-steps", "10", "--learning-rate", "0")
    assert (
        run_training(*command(file, tiny_pair, tmp_path, *options, "--patience", "2")).trainer.state.global_step == 3
    )


def test_the_rate_rises_and_falls_as_set(file: Path, tiny_pair: Path, tmp_path: Path) -> None:
    options = ("--max-steps", "4", "--warmup", "0.5", "--schedule")
    for schedule, rates in (("linear", [0, 0.5, 1, 0.5]), ("constant_with_warmup", [0, 0.5, 1, 1])):
        run = run_training(*command(file, tiny_pair, tmp_path, *options, schedule))
        found = [entry["learning_rate"] for entry in run.history if "loss" in entry]
        assert found == pytest.approx([1e-2 * rate for rate in rates])


def test_batches_have_rows_of_similar_length_and_a_resumed_run_has_the_same(
    file: Path, tiny_pair: Path, tmp_path: Path
) -> None:
    padding = []
    options = ("--max-steps", "30", "--batch-size", "2")  # one and a half epochs
    for more in ("--no-group-by-length", "--group-by-length"):
        run = run_training(*command(file, tiny_pair, tmp_path, *options, more))
        batches = run.trainer.get_train_dataloader()
        padding.append(sum(int((batch["attention_mask"] == 0).sum()) for batch in batches))
    assert padding[1] < padding[0] / 2
    whole = load_file(tmp_path / "adapter_model.safetensors")
    shutil.rmtree(tmp_path / "checkpoint-30")  # as if the run had been killed after step 27
    again = run_training(*command(file, tiny_pair, tmp_path, *options, "--resume"))
    assert [entry["step"] for entry in again.history if "loss" in entry] == list(range(2, 31, 2))
    resumed = load_file(tmp_path / "adapter_model.safetensors")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--validation-samples", "40"), r"`--validation-samples` .* leave some of the 40 rows .*, got 40"),
        (("--validation-samples", "-1"), r"`--validation-samples` must be at least 0 .*, got -1"),
        (("--patience", "1"), "`--patience` needs a validation loss"),
        (("--resume",), "`--resume` needs a complete checkpoint"),
    ],
    ids=str,
)
def test_options_without_effect_are_refused_before_anything_is_sampled(
    options: tuple[str, ...], message: str, file: Path, tiny_pair: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        run_training(*command(file, tiny_pair, tmp_path, "--own-rationales", *options))
    assert not (tmp_path / "rationales").exists()
