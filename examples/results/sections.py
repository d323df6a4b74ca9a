"""The sections of `docs/results.md`: every number in them, and every sentence that depends on one, comes from runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean

from small_pair import make_model, make_tokenizers

from softcot_peft.analysis import CONTROLS

from .figures import Draw, bars, heat, lines, maps, scatter
from .jobs import ASKED_BY_SAMPLING, NUMBERS, PLACES, RATES, UNTRAINED, WIDTHS, Making, tuning
from .results import Results
from .statistics import Share
from .work import SAMPLES

SYSTEMS = (*UNTRAINED, *RATES)
KINDS = ("words", "names", "strangers")
VOTERS = (1, 2, 3, 5, SAMPLES)


@dataclass
class Section:
    """A heading, text, and figures by file name, each with its drawing, its size in inches and what it shows."""

    title: str
    text: str
    figures: dict[str, tuple[Draw, tuple[float, float], str]] = field(default_factory=dict)


def table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A table of Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def better(shares: Mapping[str, Share], than: str) -> list[str]:
    """Names, with their shares, whose whole interval lies above the other's."""
    return [f"{name} ({each})" for name, each in shares.items() if each.low > shares[than].high]


def summary(results: Results) -> str:
    """The README's table."""
    rows = [
        ["base alone", results.share(system="zero-shot"), results.share("digits", "right", system="zero-shot")],
        ["SoftCoT", results.share(system="SoftCoT"), results.share("digits", "right", system="SoftCoT")],
    ]
    for control in ("zero", "other_question"):
        rows.append(
            [f"SoftCoT, {CONTROLS[control]} as thoughts", results.share("controls", control, system="SoftCoT"), ""]
        )
    for system in ("Assist-CoT", "prompt tuning", "LoRA"):
        rows.append([system, results.share(system=system), results.share("digits", "right", system=system)])
    same, asked = disabled(results)
    head = ["right answers, % [95 % interval]", "new skill: number words", "own skill, system on"]
    return f"""{table(head, rows)}
{len(results.sizes.seeds)} seeds, {results.sizes.asked} held-out problems each, {results.sizes.steps} training steps.
With SoftCoT's adapter disabled, {same:,} of {asked:,} answers in the base's own skill are the base's own, to the last
character."""


def disabled(results: Results) -> tuple[int, int]:
    """How many answers with the adapter disabled are the base's own, and how many were asked for."""
    runs = [results.found("digits", "same_when_disabled", system="SoftCoT", kind=kind) for kind in KINDS]
    same = [answer for seeds in runs for answers in seeds for answer in answers]
    return sum(same), len(same)


def accuracy(results: Results) -> Section:
    """Every system on every kind of problems."""
    found = {kind: {system: results.share(system=system, kind=kind) for system in SYSTEMS} for kind in KINDS}
    rows = [
        [
            system,
            *(found[kind][system] for kind in KINDS),
            f"{results.median('trained_parameters', system=system):,}",
            f"{results.median('seconds', system=system):.0f}" if system in RATES else "0",
            f"{results.rates[system]:g}" if system in RATES else "",
            f"{results.median('tokens', system=system):.1f}",
        ]
        for system in SYSTEMS
    ]
    losses = [f"- {kind}: {', '.join(better(found[kind], 'SoftCoT')) or 'nothing'}." for kind in KINDS]
    head = ["system", *KINDS, "trained parameters", "training, s", "learning rate", "tokens written"]
    text = f"""{table(head, rows)}
Right to the last character, %, and the 95 % interval: mean over {len(results.sizes.seeds)} seeds with
{results.sizes.asked} held-out problems each. Every trained system has {results.sizes.steps} steps of
{results.sizes.batch} problems. Tokens written for an answer, the assistant's hint among them; training time with one
thread; medians over seeds.

**Where SoftCoT loses** here, with the other's whole interval above its own:

{chr(10).join(losses)}

The assistant can read words and names; what strangers stand for, nobody knows before training. Systems that train the
base itself can learn it; a projection can pass on only what the assistant's hidden states hold. Assist-CoT writes out
what the assistant knows and needs no training, because this base was trained to use hints in digits.
"""
    return Section("Accuracy by system", text, {"accuracy": (bars(found), (9, 3), "Right answers by system")})


def forgetting(results: Results) -> Section:
    """What became of the base's own skill."""
    before = results.share("digits", "right", system="zero-shot")
    after = {s: {k: results.share("digits", "right", system=s, kind=k) for k in KINDS} for s in RATES}
    same, asked = disabled(results)
    points = {s: (results.share(system=s), after[s]["words"]) for s in RATES}
    points["base alone"] = (results.share(system="zero-shot"), before)
    rows = [["base alone", before, before, before], *([s, *after[s].values()] for s in RATES)]
    text = f"""Problems in digits, which the base solves alone, with the system on that was trained on others:

{table(["system, enabled", *(f"after {kind}" for kind in KINDS)], rows)}
With SoftCoT's adapter **disabled**, {same:,} of {asked:,} answers are the base's own, to the last
character. With the adapter enabled the base reads thoughts of an assistant that never saw such a problem.
"""
    drawn = scatter(points, "new skill: number words, %", "own skill with the system on: digits, %")
    return Section(
        "What happens to the base's own skill",
        text,
        {"forgetting": (drawn, (6.5, 3.6), "New skill against own skill")},
    )


def controls(results: Results) -> Section:
    """SoftCoT with its thoughts changed."""
    found = {
        kind: {
            label: results.share("controls", control, system="SoftCoT", kind=kind)
            for control, label in CONTROLS.items()
        }
        for kind in KINDS
    }
    rows = [[label, *(found[kind][label] for kind in KINDS)] for label in CONTROLS.values()]
    text = f"""The trained adapters again, with nothing changed but the vectors that the base reads:

{table(["thoughts", *KINDS], rows)}
*No thoughts*: the adapter disabled. *Another question's*: those of the next problem. *Random projection*: of the
assistant's hidden states by a fresh layer. *Average*: the mean over {results.sizes.sampled} training problems.
"""
    return Section("Controls", text, {"controls": (bars(found), (9, 2.6), "Right answers with thoughts changed")})


def numbers(results: Results) -> Section:
    """Training N against inference N."""
    grid = [
        [results.share("numbers", str(n), system="SoftCoT", thoughts=trained) for n in NUMBERS] for trained in NUMBERS
    ]
    rows = [[f"**{trained}**", *line] for trained, line in zip(NUMBERS, grid, strict=True)]
    text = f"""{table(["N in training, down; N in inference, across", *NUMBERS], rows)}
A problem has seven digits and signs, and the assistant holds one at each position: fewer thoughts cannot carry all.
Adapters are trained and asked with every N; a single trained layer serves any number.
"""
    drawn = heat([[100 * s.mean for s in line] for line in grid], NUMBERS, NUMBERS, "N in training", "N in inference")
    return Section("Number of thoughts", text, {"numbers": (drawn, (5.5, 3.6), "Right answers by N")})


def self_consistency(results: Results) -> Section:
    """One to ten sampled answers and a vote."""
    found = {s: {k: results.vote(k, system=s) for k in range(1, SAMPLES + 1)} for s in ASKED_BY_SAMPLING}
    rows = [[system, *(found[system][k] for k in VOTERS)] for system in ASKED_BY_SAMPLING]
    text = f"""{results.sizes.sampled} problems in number words for each seed, sampled at temperature 1. The
most frequent final result of the first k samples counts:

{table(["system", *(f"k = {k}" for k in VOTERS)], rows)}"""
    sampled = {system: shares for system, shares in found.items() if system != "zero-shot"}
    drawn = lines(sampled, "samples that vote")
    return Section(
        "Self-consistency", text, {"self_consistency": (drawn, (7, 3.2), "Right answers by number of samples")}
    )


def placement(results: Results) -> Section:
    """Thoughts at the end of the user turn, or behind the generation prompt."""
    rows: list[Sequence[object]] = []
    found: dict[str, dict[str, Share]] = {"number words": {}, "digits, adapter enabled": {}}
    for place, name in zip(PLACES, ("end of the user turn", "behind the generation prompt"), strict=True):
        wanted = {"system": "SoftCoT", "place": place}
        read = [answer for run in results.found("characters", **wanted) for answer in run]
        characters = ", ".join(f"{mean(column):.0%}" for column in zip(*read, strict=True))
        words, digits = results.share(**wanted), results.share("digits", "right", **wanted)
        rows.append([name, words, characters, digits])
        found["number words"][name], found["digits, adapter enabled"][name] = words, digits
    head = ["thoughts stand", "number words", "its first five characters", "digits, adapter enabled"]
    text = f"""The same problems as chats, whose generation prompt is the mark ` A: `:

{table(head, rows)}
The base has seen hints in both places, twice as often in the first. A thought position holds what the assistant would
write next: behind a question the mark, then the digits; behind the mark the digits at once. So behind the generation
prompt the first digit belongs to the mark's own position, which is no thought.
"""
    return Section("Placement", text, {"placement": (bars(found), (8, 1.4), "Right answers by place of the thoughts")})


def assistant_size(results: Results) -> Section:
    """Assistants of three widths."""
    tokenizer = make_tokenizers()[1]
    parameters = {width: make_model(tokenizer, width).num_parameters() for width in WIDTHS}
    found = {
        f"{system}, {kind}": {
            parameters[width]: results.share(system=system, kind=kind, width=width) for width in WIDTHS
        }
        for kind in ("words", "names")
        for system in ("SoftCoT", "Assist-CoT")
    }
    head = ["", *(f"{parameters[width]:,} parameters, width {width}" for width in WIDTHS)]
    text = table(head, [[name, *shares.values()] for name, shares in found.items()])
    drawn = lines(found, "parameters of the assistant", logarithmic=True)
    return Section("Assistant size", text, {"assistant_size": (drawn, (7, 3.2), "Right answers by assistant size")})


def without_hints(results: Results) -> Section:
    """A base that was never trained to use a hint."""
    alone = results.store[Making("base")]["alone"]
    systems = ("zero-shot", "Assist-CoT", "prompt tuning", "LoRA", "SoftCoT")
    rows = [
        [
            system,
            results.share(system=system),
            results.share(system=system, hinted=False),
            results.share("digits", "right", system=system, hinted=False),
        ]
        for system in systems
    ]
    text = f"""The same on a base that has never seen anything between question and answer, and solves
{alone["digits"]:.1%} of the problems in digits alone.

{table(["system", "words, base with hints", "words, base without", "digits, base without, system on"], rows)}
Soft thoughts, like a hint in text, steer what a base can already use."""
    return Section("A base that never saw a hint", text)


def thoughts(results: Results) -> Section:
    """What the vectors are like."""
    seen = {kind: results.found("diagnostics", system="SoftCoT", kind=kind) for kind in KINDS}
    rows = []
    for kind, found in seen.items():
        alike = [mean_off_diagonal(each["similarity"]) for each in found]
        ratios = [each["norms"]["ratio"] for each in found]
        pairs = [pair for each in found for pair in zip(each["nearest"], each["wanted"], strict=True)]
        read = [token == digit for tokens, digits in pairs for token, digit in zip(tokens, digits, strict=False)]
        rows.append([kind, f"{mean(alike):.2f}", f"{mean(ratios):.1f}", f"{mean(read):.1%}"])
    first = seen["words"][0]
    shown = [
        [question, " ".join(tokens)] for question, tokens in zip(first["questions"], first["nearest"], strict=True)
    ]
    paid = results.found("attention", system="SoftCoT", place="user_turn")
    layers = [mean(share for each in paid for share in each["share"][layer]) for layer in range(len(paid[0]["share"]))]
    head = ["trained on", "cosine across questions", "length, in token embeddings", "nearest token is the problem's"]
    text = f"""{table(head, rows)}
Cosine: of thoughts at the same position for two questions, the mean over {results.sizes.seen} problems; 1 would be
a collapse. Length: the median of the thoughts' norms over that of the base's token embeddings. Last: how often the
token whose embedding points most nearly the way of a thought is the digit or sign that the problem has there.

The nearest tokens of the first problems' thoughts, seed {results.sizes.seeds[0]}:

{table(["question", "nearest tokens"], shown[:5])}
Of its attention a token of the answer pays the thoughts {", ".join(f"{each:.0%}" for each in layers)}, from the first
layer to the last.
"""
    drawn = maps({kind: found[0]["similarity"] for kind, found in seen.items()}, "cosine", "question", "question")
    return Section("What the thoughts are like", text, {"similarity": (drawn, (9, 3.2), "Similarity of thoughts")})


def mean_off_diagonal(matrix: Sequence[Sequence[float]]) -> float:
    """The mean of a square matrix without its diagonal."""
    return mean(value for i, row in enumerate(matrix) for j, value in enumerate(row) if i != j)


def rates(results: Results) -> Section:
    """Which learning rates were tried."""
    tried = [(job, results.store[job]) for job in tuning()]
    rows = [
        [
            job.system,
            f"{job.learning_rate:g}" + (" **chosen**" if results.rates[job.system] == job.learning_rate else ""),
            f"{100 * mean(result['right']):.1f}",
            f"{result['loss']:.3f}",
        ]
        for job, result in tried
    ]
    text = f"""Chosen by right answers, then by loss, on {results.sizes.asked} held-out problems in number
words of a seed that is used for nothing else:

{table(["system", "learning rate", "right, %", "loss per token"], rows)}"""
    return Section("Learning rates", text)


SECTIONS = (
    accuracy,
    forgetting,
    controls,
    thoughts,
    numbers,
    self_consistency,
    placement,
    assistant_size,
    without_hints,
    rates,
)
