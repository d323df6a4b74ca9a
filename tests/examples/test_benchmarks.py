"""The benchmarks: rivals do the same work, turns and ratios are right, and all of it runs. No time is asserted."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_data import DATA, needs_data
from tiny_pair import make_pair as folders
from torch import Tensor

pytest.importorskip("matplotlib")
pytest.importorskip("scipy")
from benchmarks import __main__ as command
from benchmarks import answering, arithmetic, beyond, pretrained, rivals, rows, serving_page, starting
from benchmarks.goals import Goal, compared, goals
from benchmarks.models import EOS, Batch, Pair, attach, lengths, make_batch, make_pair, projection_of, twin
from benchmarks.sections import Bench
from benchmarks.sizes import SIZES, Case
from benchmarks.timing import Spread, interleave, multiplications, profiled, ratio

pytestmark = pytest.mark.usefixtures("nothing_given")

SMOKE = SIZES["smoke"]
CASES = [*SMOKE.cases, Case(batch=3, prompt=9, thoughts=1, response=1), Case(4, 14, 5, 11, ragged=True)]


@pytest.fixture(scope="module")
def pair() -> Pair:
    """A tiny pair with large weights, so that losses and tokens depend on everything before them."""
    wide = {"initializer_range": 0.4}
    return make_pair(replace(SMOKE, base=SMOKE.base | wide, assistant=SMOKE.assistant | wide), "cpu")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_package_the_equations_and_the_floor_have_one_loss_and_one_gradient(pair: Pair, case: Case) -> None:
    batch = make_batch(case, SMOKE.vocabulary, pair.device)
    model = rivals.training(attach(pair, case.thoughts))
    base, projection = twin(pair.base), projection_of(model)
    cached = rivals.cached(rivals.training(attach(pair, case.thoughts)), batch)
    ways: dict[str, tuple[torch.nn.Module, Callable[[], Tensor]]] = {
        rivals.SOFTCOT: (model, lambda: model(**batch.rows).loss),
        rivals.CACHED: (cached, lambda: cached(**batch.rows).loss),
        rivals.PLAIN: (projection, lambda: rivals.plain_loss(pair, base, projection, batch)),
        rivals.FLOOR: (projection, lambda: rivals.floor_loss(pair, projection, batch)),
        rivals.NO_ASSISTANT: (projection, lambda: rivals.floor_loss(pair, projection, batch, states(pair, batch))),
    }
    losses, gradients = [], []
    for trained, loss in ways.values():
        losses.append(rivals.backward(trained, loss)())
        gradients.append([weight.grad.clone() for weight in trained.parameters() if weight.requires_grad])
    for name, found, gradient in zip(ways, losses, gradients, strict=True):
        torch.testing.assert_close(found, losses[0], atol=1e-5, rtol=1e-5, msg=name)
        assert len(gradient) == 2
        for one, other in zip(gradient, gradients[0], strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    assert gradients[0][0].abs().max() > 1e-3


def states(pair: Pair, batch: Batch) -> Tensor:
    return rivals.assistant_states(pair, batch.assistant_ids, batch.assistant_mask, batch.num_thoughts)


def test_bfloat16_has_nearly_the_same_loss() -> None:
    pair = make_pair(replace(SMOKE, dtype="bfloat16"), "cpu")
    batch = make_batch(SMOKE.case, SMOKE.vocabulary, pair.device)
    losses = [
        step().item() for step in rivals.steps(pair, batch, (rivals.SOFTCOT, rivals.PLAIN, rivals.FLOOR)).values()
    ]
    assert losses == pytest.approx([losses[0]] * 3, abs=0.02)


def test_the_losses_depend_on_the_thoughts(pair: Pair) -> None:
    batch = make_batch(SMOKE.case, SMOKE.vocabulary, pair.device)
    projection = projection_of(attach(pair, SMOKE.case.thoughts))
    zero = torch.zeros_like(states(pair, batch))
    found = [rivals.floor_loss(pair, projection, batch, hidden).item() for hidden in (None, zero)]
    assert abs(found[0] - found[1]) > 1e-3


def test_every_step_runs_anew_with_the_same_loss_and_leaves_the_pair_as_it_was(pair: Pair) -> None:
    before = [weight.clone() for weight in pair.base.parameters()]
    batch = make_batch(SMOKE.case, SMOKE.vocabulary, pair.device)
    for name, step in rivals.steps(pair, batch).items():
        first = step()
        assert torch.equal(step(), first), name
        assert torch.isfinite(first), name
    assert all(map(torch.equal, pair.base.parameters(), before))
    assert not any(weight.requires_grad for weight in pair.base.parameters())
    assert not pair.base._forward_pre_hooks


def test_counted_multiplications_are_the_computed_ones(pair: Pair) -> None:
    case = Case(batch=3, prompt=11, thoughts=4, response=6)
    steps = rivals.steps(pair, make_batch(case, SMOKE.vocabulary, pair.device))
    for step in steps.values():
        step()  # the package tries its two passes once
    plain, floor = arithmetic.of_step(pair, case)
    assert multiplications(steps[rivals.PLAIN]) == case.batch * plain
    assert multiplications(steps[rivals.FLOOR]) == case.batch * floor
    more = 2 * case.batch * arithmetic.Model.of(pair.base).body
    assert multiplications(steps[rivals.SOFTCOT]) == case.batch * floor + more  # one column, which predicts nothing


def test_the_floor_s_parts_are_all_of_it(pair: Pair) -> None:
    batch = make_batch(SMOKE.case, SMOKE.vocabulary, pair.device)
    parts = rivals.floor_parts(pair, projection_of(attach(pair, SMOKE.case.thoughts)), batch)
    assert list(parts) == [
        "assistant",
        "prompt",
        "thoughts and response, forward",
        "thoughts and response, backward",
    ]
    assert all(seconds > 0 for seconds in parts.values())


def test_a_twin_has_its_own_modules_and_the_same_weights(pair: Pair) -> None:
    other = twin(pair.base)
    assert not set(other.modules()) & set(pair.base.modules())
    assert all(one is two for one, two in zip(other.parameters(), pair.base.parameters(), strict=True))


def test_generation_is_that_of_the_bare_operations_and_disabled_that_of_the_base(pair: Pair) -> None:
    questions, num = answering.make_questions(5, 6, SMOKE.vocabulary), SMOKE.case.thoughts
    models = attach(pair, num), answering.disabled(pair, num), pair.base
    asks = [answering.bare(pair, twin(pair.base), num), *map(answering.called, models)]
    bare, with_thoughts, off, base = (answering.answer(ask, questions, pair.device) for ask in asks)
    assert torch.equal(with_thoughts, bare)
    assert torch.equal(off, base)
    assert not torch.equal(with_thoughts, base)


def test_extensions_do_what_they_are_measured_for(pair: Pair) -> None:
    batch = make_batch(SMOKE.case, SMOKE.vocabulary, pair.device)
    losses = {name: step() for name, step in beyond.steps(pair, batch).items()}
    torch.testing.assert_close(losses[beyond.OWN], losses[beyond.OWN_CACHED], atol=1e-5, rtol=1e-5)
    assert len({round(float(loss), 4) for loss in losses.values()}) == len(losses) - 1
    rows, width = batch.prompt.shape
    for name, ask in beyond.answers(pair, batch, 3).items():
        several = name in (beyond.TRAINED, beyond.FIXED, beyond.SAMPLES)
        longer = batch.num_thoughts * (name in (beyond.LONGER, beyond.LONGER_AGAIN))
        assert ask().shape == (rows * (beyond.CHAINS if several else 1), width + longer + 3)


@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_every_question_is_answered_as_long_as_it_is_told(pair: Pair, at_once: int) -> None:
    questions = [(torch.arange(3, 3 + length), end) for length, end in ((9, 2), (4, 5), (7, 1), (5, 3), (6, 4))]
    ask = answering.called(pair.base)
    answers = answering.evaluate(ask, questions, at_once, pair.device)
    live = answering.evaluate(ask, questions, at_once, pair.device, pair.base)
    assert all(map(torch.equal, answers, live))
    ends = [int((row == EOS).nonzero()[0, 0]) + 1 for batch in answers for row in batch]
    assert ends == [5, 3, 4, 1, 2]  # by the lengths of the prompts
    assert max(len(batch) for batch in answers) == at_once
    rows = {1: 15, 2: 2 * 5 + 2 * 4 + 2, 5: 5 * 5}[at_once]
    assert answering.busy(questions, at_once) == 15 / rows
    assert answering.step_seconds(answering.called(pair.base), questions, 3, pair.device) > 0


def test_questions_and_answers_are_as_long_as_those_of_gsm8k() -> None:
    questions = answering.make_questions(4, 60, SMOKE.vocabulary)
    assert [(len(ids), answer) for ids, answer in questions] == [(34, 31), (48, 43), (37, 60), (45, 54)]


@needs_data
def test_lengths_are_those_of_the_training_file() -> None:
    rows = [json.loads(line) for line in (DATA / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    pairs = [(row["question"], re.sub(r"<<.*?>>", "", row["answer"])) for row in rows[::116][:64]]
    words = re.compile(r"\d{1,3}|[^\W\d]+|[^\w\s]")
    assert [tuple(len(words.findall(text)) for text in pair) for pair in pairs] == list(answering.LENGTHS)


def test_rows_of_unequal_length_go_down_to_half_the_longest() -> None:
    assert lengths(10, 3, ragged=True) == [10, 8, 5]
    assert lengths(10, 3, ragged=False) == [10] * 3
    assert lengths(10, 1, ragged=True) == [10]


def test_rivals_come_once_in_every_round_in_changing_order_and_warm_up_uncounted() -> None:
    order: list[str] = []

    def timed(action: Callable[[], None]) -> float:
        action()
        return len(order)

    actions = {name: lambda name=name: order.append(name) for name in "ABC"}
    times = interleave(actions, 19, "letters", clock=timed, warmup=1)
    rounds = ["".join(order[at : at + 3]) for at in range(0, 60, 3)]
    assert {"".join(sorted(found)) for found in rounds} == {"ABC"}
    assert {found[0] for found in rounds} == set("ABC")
    assert times == {name: [3 * at + rounds[at].index(name) + 1 for at in range(1, 20)] for name in "ABC"}


def test_ratios_are_those_of_each_round() -> None:
    times = {"one": [1.0, 20.0, 3.0], "other": [2.0, 10.0, 12.0]}
    assert ratio(times, "one", "other") == Spread(0.5, 0.375, 1.25)
    assert Spread.of([2.0]) == Spread(2.0, 2.0, 2.0)


def test_near_rivals_are_compared_in_the_rounds_of_these_alone() -> None:
    seconds = {"SoftCoT": [4.0], "floor": [1.0], "LoRA": [2.0]}
    case = {"seconds": seconds, "near_seconds": {"SoftCoT": [3.0], "floor": [2.0]}}
    assert compared(case, "SoftCoT", "floor").median == 1.5
    assert compared(case, "SoftCoT", "LoRA").median == 2
    assert compared(case, "LoRA", "floor").median == 2


def test_multiplications_are_those_of_linear_layers_forward_and_backward() -> None:
    layer, rows = torch.nn.Linear(5, 7), torch.ones(3, 5)
    assert multiplications(lambda: layer(rows)) == 3 * 5 * 7
    assert multiplications(lambda: layer(rows).sum().backward()) == 2 * 3 * 5 * 7  # and the weights' gradient
    assert multiplications(lambda: rows + 1) == 0


@pytest.mark.parametrize(
    ("found", "at_least", "met"), [(1.02, False, "yes"), (1.03, False, "no"), (1.02, True, "yes"), (1.01, True, "no")]
)
def test_a_goal_is_kept_by_its_median(found: float, at_least: bool, met: str) -> None:
    assert Goal("a / b", 1.02, Spread(found, 0.5, 2.0), "", at_least).met == met


def test_loading_an_adapter_reads_its_own_file_and_no_weights_of_the_assistant() -> None:
    found = starting.files_read()
    if found is None:
        pytest.skip("the file system keeps no times of access")
    assert found["loading"]["adapter"] == ["adapter_config.json", "adapter_model.safetensors"]
    assert "model.safetensors" not in found["loading"]["assistant"]
    assert found["first use"]["adapter"] == []
    assert "model.safetensors" in found["first use"]["assistant"]


def test_imports_are_timed_in_fresh_processes() -> None:
    times, slowest = starting.import_seconds(0), starting.slowest_imports(3)
    assert list(times) == ["import peft", "import softcot_peft"]
    assert len(slowest) == 3
    assert any(name.startswith("softcot_peft") for name in slowest)
    assert not any(name.startswith(("torch.", "peft.")) for name in slowest)


def test_the_smallest_run_writes_results_page_and_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--size", "smoke", "--device", "cpu", "--docs", str(tmp_path), "--repeats", "1", "--only"]
    command.main([*arguments, "generation", "training", "evaluation", "growth"])
    file = tmp_path / "performance" / "smoke-cpu.json"
    results = json.loads(file.read_text(encoding="utf-8"))
    measured = {goal.what.partition(";")[0] for goal in goals(results["sections"])}
    assert {"training step / plain", "training step / floor", "`generate` / base + assistant"} <= measured
    page = (tmp_path / "performance.md").read_text(encoding="utf-8")
    printed = capsys.readouterr().out
    for goal in goals(results["sections"]):
        assert goal.row() in page
        assert "; ".join(goal.columns) in printed
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        f"performance-smoke-cpu-{kind}-{theme}.png"
        for kind in ("seconds", "peak_bytes")
        for theme in ("light", "dark")
    }
    for case in results["sections"]["training"]["found"]:
        assert set(case["near_seconds"]) == set(rivals.NEAR)
        assert {len(times) for times in case["near_seconds"].values()} == {2}
    ran = results["sections"]["training"]["environment"]
    assert {"torch", "transformers", "peft", "softcot-peft"} == set(ran["libraries"])
    assert ran["repeats"] == 1
    assert ran["threads"] == torch.get_num_threads()

    other = tmp_path / "performance" / "small-cpu.json"
    other.write_text(json.dumps(results | {"format": 0, "size": "small"}), encoding="utf-8")
    command.main([*arguments[:-2], "2", "--only", "generation"])  # the other sections stay as they were
    again = json.loads(file.read_text(encoding="utf-8"))["sections"]
    assert again["training"] == results["sections"]["training"]
    assert "Size `small`" not in (tmp_path / "performance.md").read_text(encoding="utf-8")  # of another format
    assert len(again["generation"]["found"]["generate"][rivals.SOFTCOT]) == 2


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pair as the pretrained one, and rows of a data set."""
    folder = tmp_path_factory.mktemp("pretrained")
    tiny = folders(folder / "tiny")
    shutil.copytree(tiny.base, folder / "models" / "qwen2.5-coder-0.5b")
    shutil.copytree(tiny.chat_assistant, folder / "models" / "smollm2-135m")
    (folder / "data" / "gsm8k").mkdir(parents=True)
    problems = [
        {
            "question": f"Tom has {n * n} apples{' and buys more' * (n % 4)}?",
            "answer": f"{'1 ' * (7 * n % 50)}#### {n}",
        }
        for n in range(25)
    ]
    text = "\n".join(map(json.dumps, problems)) + "\n"
    (folder / "data" / "gsm8k" / "train.jsonl").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def bench(local: Path) -> Bench:
    """The pretrained size with the tiny pair, in float32."""
    size = replace(SIZES["real"], dtype="float32", case=replace(SIZES["real"].case, batch=3, thoughts=4))
    return Bench(size, "cpu", 1, local / "models", str(local / "data"))


def test_a_pretrained_pair_has_one_loss_and_one_gradient_on_rows_of_a_data_set(bench: Bench) -> None:
    prompts, responses = map(list, zip(*bench.rows[:3], strict=True))
    batch = Batch(prompts, responses, 4, bench.pair.device, bench.pair.reading)
    assert not torch.equal(batch.assistant_ids[:, : batch.prompt.shape[1]], batch.prompt)  # another tokenizer
    ways = rivals.ways(bench.pair, batch, (rivals.SOFTCOT, rivals.PLAIN_PATH, rivals.PLAIN, rivals.FLOOR))
    found = rows.agreement(ways)
    assert list(found["loss"].values()) == pytest.approx([found["loss"][rivals.SOFTCOT]] * 4, abs=1e-5)
    assert max(found["gradient"].values()) < 1e-4
    trained, _ = ways[rivals.FLOOR]
    with torch.no_grad():
        next(trained.parameters()).add_(0.1)
    with pytest.raises(RuntimeError, match="one loss and one gradient"):
        rows.agreement(ways)


def test_a_pretrained_pair_answers_as_long_as_it_is_told(bench: Bench) -> None:
    questions, pair = bench.questions(5), bench.pair
    assert [length for _, length in questions] == [min(32, len(response)) for _, response in bench.rows[:5]]
    asks = answering.called(attach(pair, 4)), answering.bare(pair, twin(pair.base), 4)
    one, other = (answering.evaluate(ask, questions, 2, pair.device, eos=pair.eos) for ask in asks)
    assert all(map(torch.equal, one, other))
    ends = [int((row == pair.eos).nonzero()[0, 0]) + 1 for batch in one for row in batch]
    assert sorted(ends) == sorted(length for _, length in questions)


def test_orders_differ_in_padding_alone(bench: Bench) -> None:
    grouped = pretrained.batches(bench.rows, 3)
    assert {len(batches) for batches in grouped.values()} == {8}
    found = {order: pretrained.padding(batches, 4) for order, batches in grouped.items()}
    assert found[pretrained.RESPONSES]["second_padding"] < found[pretrained.RANDOM]["second_padding"]
    one, two = (torch.zeros(3), torch.zeros(2)), (torch.zeros(9), torch.zeros(5))  # prompts and responses
    assert pretrained.columns([one, two], 4) == (9, 9)
    assert pretrained.padding([[one, two]], 4) == {
        "first_columns": 9,
        "first_padding": 6 / 18,
        "second_columns": 9,
        "second_padding": 3 / 18,
        "second_prompts": 0,
    }
    assert pretrained.typical([[two], [one], [one, two]]) == [two]
    alike = [(torch.zeros(9), torch.zeros(1)), (torch.zeros(8), torch.zeros(2))]  # divided at the earlier response
    assert pretrained.columns(alike, 4) == (8, 6)
    found = pretrained.padding([alike], 4)
    assert (found["second_padding"], found["second_prompts"]) == (0, 1 / 12)


def test_a_profile_has_the_time_of_attention_and_of_a_backward_pass() -> None:
    rows = torch.ones(1, 2, 64, 8, requires_grad=True)
    attention = torch.nn.functional.scaled_dot_product_attention
    found = profiled(
        lambda: attention(rows, rows, rows).sum().backward(), {"a": "aten::_scaled_dot_product"}, rows.device
    )
    assert set(found) == {"whole", "a", "a backward"}
    assert all(seconds > 0 for seconds in found.values())
    assert found["a"] + found["a backward"] < found["whole"]


def test_a_run_with_a_pretrained_pair_writes_a_section_of_its_own(
    local: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = ["--models", str(local / "models"), "--data-dir", str(local / "data")]
    command.main(["--size", "real", "--device", "cpu", "--docs", str(tmp_path), "--repeats", "1", *folders])
    text = (tmp_path / "performance" / "real-cpu.json").read_text(encoding="utf-8")
    page = (tmp_path / "performance.md").read_text(encoding="utf-8")
    assert str(local) not in text + page
    sections = json.loads(text)["sections"]
    assert list(sections) == ["rows", "evaluation"]
    assert [goal.limit for goal in goals(sections)] == [0.5, 1.05] * 2
    assert "## Size `real` on CPU" in page
    assert "--size real" in page
    assert "--models FOLDER --data-dir FOLDER" in page
    for goal in goals(sections):
        assert goal.row() in page
    for case in sections["rows"]["found"]["cases"]:
        assert case["profile"]["loss"] > 0
        assert case["profile"]["attention backward"] > 0
        assert 0 < case["multiplications"][rivals.FLOOR] < case["multiplications"][rivals.PLAIN_PATH]
        assert set(case["agreement"]["gradient"]) == {rivals.SOFTCOT, rivals.PLAIN_PATH, rivals.FLOOR}
    assert "Tokens per second" in page
    assert "one at a time" not in page[page.index("## Size `real`") :]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "real", "--only", "growth"], "`--only` must be among rows, evaluation"),
        (["--size", "smoke", "--only", "rows"], r"got ['rows']"),
        (["--size", "smoke", "--models", "models"], "need `--size real`, got smoke"),
        (["--size", "7b", "--device", "cpu"], "needs `--device cuda`"),
        (["--repeats", "0"], "must be at least 1, got 0"),
    ],
)
def test_what_cannot_run_is_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.parse_args(arguments)
    assert message in capsys.readouterr().err


def test_the_page_of_serving_compares_the_systems_of_each_round(tmp_path: Path) -> None:
    def run(system: str, at_once: int, seconds: float, first: float | None) -> dict[str, object]:
        times = [] if first is None else [first] * at_once
        return {
            "system": system,
            "at_once": at_once,
            "requests": at_once,
            "tokens": 10 * at_once,
            "seconds": seconds,
        } | {"first": times}

    runs = []
    for at_once in (1, 16):
        for slow in (1.0, 3.0):  # a round in which the machine was busy
            runs += [
                run(serving_page.BASE, at_once, 4 * slow, 0.25),
                run(serving_page.SOFTCOT, at_once, 5 * slow, 0.35),
                run(serving_page.TRANSFORMERS, at_once, 8 * slow, None),
            ]
    settings = {"base": "b", "assistant": "a", "thoughts": 32, "new_tokens": 10, "dtype": "float32"}
    settings |= {"rounds_of": 1, "repeats": 2}
    environment = {"libraries": {"vllm": "0.32.0"}, "accelerator": None, "processor": "p", "cores": 2, "load": 0.1}
    results = {"settings": settings, "environment": environment, "runs": runs, "reading": [0.2, 0.2]}
    results["sizes"] = {"layers": 4.0, "head": 2.0, "assistant": 1.0, "prompt": 30.0}
    (tmp_path / "serving-performance.json").write_text(json.dumps(results))
    serving_page.write(tmp_path)
    page = (tmp_path / "serving-performance.md").read_text()
    assert "| 16 | 2.67, 27 | 2.13, 21 | 1.33, 13 | 0.80 [0.80, 0.80] |" in page
    assert "| 1 | 0.250 | 0.350 | 0.100 |" in page
    assert "| throughput with 16 requests at once at least 0.90 of the base's | 0.80 [0.80, 0.80] | no |" in page
    assert "throughput is at most\n**0.49** of the base's" in page  # 180 of 180 + 128 + 62
    assert "at most the reading's own (0.200 s) | 0.100 s | yes |" in page
