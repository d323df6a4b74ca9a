"""The sections of `docs/results.md`. Every number, and every sentence that depends on one, is computed from runs."""

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
    """A heading, text, and figures by file name, each with its drawing function, size in inches and alt text."""

    title: str
    text: str
    figures: dict[str, tuple[Draw, tuple[float, float], str]] = field(default_factory=dict)


def table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def better(shares: Mapping[str, Share], than: str) -> list[str]:
    """Return the names and shares whose whole interval lies above that of `than`."""
    return [f"{name} ({each})" for name, each in shares.items() if each.low > shares[than].high]


def worse(shares: Mapping[str, Share], than: str) -> list[str]:
    """Return the names and shares whose whole interval lies below that of `than`."""
    return [f"{name} ({each})" for name, each in shares.items() if each.high < shares[than].low]


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
    for system in ("Assist-CoT", "LoRA"):
        rows.append([system, results.share(system=system), results.share("digits", "right", system=system)])
    same, asked = disabled(results)
    head = ["accuracy, % [95 % interval]", "new task: number words", "base's own task, system enabled"]
    return f"""{table(head, rows)}
{len(results.sizes.seeds)} seeds, {results.sizes.asked} held-out problems each, {results.sizes.steps} training steps.
With the SoftCoT adapter disabled, {same:,} of {asked:,} answers on the base's own task match the base's, character for
character."""


def disabled(results: Results) -> tuple[int, int]:
    """Count the answers with the adapter disabled that match the base's, and all answers."""
    runs = [results.found("digits", "same_when_disabled", system="SoftCoT", kind=kind) for kind in KINDS]
    same = [answer for seeds in runs for answers in seeds for answer in answers]
    return sum(same), len(same)


def accuracy(results: Results) -> Section:
    """Accuracy of every system on every kind of problem."""
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
    losses = [f"- {kind}: {', '.join(better(found[kind], 'SoftCoT')) or 'none'}." for kind in KINDS]
    head = ["system", *KINDS, "trained parameters", "training, s", "learning rate", "tokens written"]
    text = f"""{table(head, rows)}
Exact match, %, with the 95 % interval: mean over {len(results.sizes.seeds)} seeds with {results.sizes.asked} held-out
problems each. Every trained system takes {results.sizes.steps} steps of {results.sizes.batch} problems. "Tokens
written" counts the tokens of an answer and of the assistant's hint. Training time is with one thread. Time and
tokens are medians over seeds.

**Where SoftCoT is worse**: systems whose whole interval lies above SoftCoT's:

{chr(10).join(losses)}

The assistant can read words and names; before training, neither model knows the numbers of strangers. Systems that
train the base itself can learn them; a projection can only pass on what the assistant's hidden states contain.
Assist-CoT writes out what the assistant knows, and needs no training because this base was trained to use hints in
digits.
"""
    return Section("Accuracy by system", text, {"accuracy": (bars(found), (9, 3), "Accuracy by system")})


def forgetting(results: Results) -> Section:
    """Accuracy on the base's own task after training on others."""
    before = results.share("digits", "right", system="zero-shot")
    after = {s: {k: results.share("digits", "right", system=s, kind=k) for k in KINDS} for s in RATES}
    same, asked = disabled(results)
    points = {s: (results.share(system=s), after[s]["words"]) for s in RATES}
    points["base alone"] = (results.share(system="zero-shot"), before)
    rows = [["base alone", before, before, before], *([s, *after[s].values()] for s in RATES)]
    text = f"""Accuracy on problems in digits, which the base solves alone, with a system that was trained on other
problems enabled:

{table(["system, enabled", *(f"after {kind}" for kind in KINDS)], rows)}
With the SoftCoT adapter **disabled**, {same:,} of {asked:,} answers match the base's, character for
character. With the adapter enabled, the base reads thoughts of an assistant that never saw such a problem.
"""
    drawn = scatter(points, "new skill: number words, %", "own skill with the system on: digits, %")
    return Section(
        "Effect on the base's own task",
        text,
        {"forgetting": (drawn, (6.5, 3.6), "Accuracy on the new task and on the base's own task")},
    )


def controls(results: Results) -> Section:
    """SoftCoT with changed thoughts."""
    found = {
        kind: {
            label: results.share("controls", control, system="SoftCoT", kind=kind)
            for control, label in CONTROLS.items()
        }
        for kind in KINDS
    }
    rows = [[label, *(found[kind][label] for kind in KINDS)] for label in CONTROLS.values()]
    text = f"""The same trained adapters; only the vectors that the base reads are changed:

{table(["thoughts", *KINDS], rows)}
*No thoughts*: the adapter is disabled. *Another question's*: the thoughts of the next problem. *Random projection*:
the assistant's hidden states, projected by a newly initialized layer. *Average*: the mean over
{results.sizes.sampled} training problems.
"""
    return Section("Controls", text, {"controls": (bars(found), (9, 2.6), "Accuracy with changed thoughts")})


def numbers(results: Results) -> Section:
    """Accuracy by N in training and N at inference."""
    grid = [
        [results.share("numbers", str(n), system="SoftCoT", thoughts=trained) for n in NUMBERS] for trained in NUMBERS
    ]
    rows = [[f"**{trained}**", *line] for trained, line in zip(NUMBERS, grid, strict=True)]
    text = f"""{table(["training N (rows), inference N (columns)", *NUMBERS], rows)}
A problem has seven digits and signs, and each position of the assistant encodes one of them, so fewer thoughts cannot
carry them all. Adapters are trained and evaluated with every N; the same trained layer works with any N.
"""
    drawn = heat([[100 * s.mean for s in line] for line in grid], NUMBERS, NUMBERS, "N in training", "N in inference")
    return Section("Number of thoughts", text, {"numbers": (drawn, (5.5, 3.6), "Accuracy by N")})


def self_consistency(results: Results) -> Section:
    """Majority vote over one to ten sampled answers."""
    found = {s: {k: results.vote(k, system=s) for k in range(1, SAMPLES + 1)} for s in ASKED_BY_SAMPLING}
    rows = [[system, *(found[system][k] for k in VOTERS)] for system in ASKED_BY_SAMPLING]
    text = f"""{results.sizes.sampled} problems in number words per seed, sampled at temperature 1. The answer is
the most frequent final result of the first k samples:

{table(["system", *(f"k = {k}" for k in VOTERS)], rows)}"""
    sampled = {system: shares for system, shares in found.items() if system != "zero-shot"}
    drawn = lines(sampled, "samples that vote")
    return Section("Self-consistency", text, {"self_consistency": (drawn, (7, 3.2), "Accuracy by number of samples")})


def placement(results: Results) -> Section:
    """Thoughts at the end of the user turn, or after the generation prompt."""
    rows: list[Sequence[object]] = []
    found: dict[str, dict[str, Share]] = {"number words": {}, "digits, adapter enabled": {}}
    for place, name in zip(PLACES, ("end of the user turn", "behind the generation prompt"), strict=True):
        wanted = {"system": "SoftCoT", "place": place}
        read = [answer for run in results.found("characters", **wanted) for answer in run]
        characters = ", ".join(f"{mean(column):.0%}" for column in zip(*read, strict=True))
        words, digits = results.share(**wanted), results.share("digits", "right", **wanted)
        rows.append([name, words, characters, digits])
        found["number words"][name], found["digits, adapter enabled"][name] = words, digits
    head = ["placement of the thoughts", "number words", "its first five characters", "digits, adapter enabled"]
    text = f"""The same problems as chats, whose generation prompt is the marker ` A: `:

{table(head, rows)}
In training, the base saw hints in both places, twice as often in the first. A thought position encodes what the
assistant would write next: after a question the marker, then the digits; after the marker the digits directly. After
the generation prompt, the first digit therefore belongs to the position of the marker, which is not a thought.
"""
    return Section("Placement", text, {"placement": (bars(found), (8, 1.4), "Accuracy by placement of the thoughts")})


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
    return Section("Assistant size", text, {"assistant_size": (drawn, (7, 3.2), "Accuracy by assistant size")})


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
    head = [
        "system",
        "words, base with hints",
        "words, base without hints",
        "digits, base without hints, system enabled",
    ]
    text = f"""The same systems on a base that was trained without anything between question and answer. Alone, it
solves {alone["digits"]:.1%} of the problems in digits.

{table(head, rows)}
Soft thoughts, like a hint in text, steer what a base can already use."""
    return Section("A base trained without hints", text)


def thoughts(results: Results) -> Section:
    """Statistics of the thoughts."""
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
    head = [
        "trained on",
        "cosine across questions",
        "norm, relative to token embeddings",
        "nearest token matches the problem",
    ]
    text = f"""{table(head, rows)}
Cosine: similarity of thoughts at the same position for two questions, averaged over {results.sizes.seen} problems; 1
would be a collapse. Norm: the median norm of the thoughts, divided by that of the base's token embeddings. Last
column: how often the token with the most similar embedding (cosine) is the digit or sign at that place of the problem.

Nearest tokens of the thoughts for the first problems, seed {results.sizes.seeds[0]}:

{table(["question", "nearest tokens"], shown[:5])}
Fraction of an answer token's attention that goes to the thoughts, from the first to the last layer:
{", ".join(f"{each:.0%}" for each in layers)}.
"""
    drawn = maps({kind: found[0]["similarity"] for kind, found in seen.items()}, "cosine", "question", "question")
    return Section("Statistics of the thoughts", text, {"similarity": (drawn, (9, 3.2), "Similarity of thoughts")})


def mean_off_diagonal(matrix: Sequence[Sequence[float]]) -> float:
    """Return the mean of a square matrix without its diagonal."""
    return mean(value for i, row in enumerate(matrix) for j, value in enumerate(row) if i != j)


def learning_rates(results: Results) -> Section:
    """Results of the learning-rate search."""
    tried = [(job, results.store[job]) for job in tuning()]
    rows = [
        [
            job.label,
            f"{job.learning_rate:g}" + (" **chosen**" if results.rates[job.label] == job.learning_rate else ""),
            f"{100 * mean(result['right']):.1f}",
            f"{result['loss']:.3f}",
        ]
        for job, result in tried
    ]
    text = f"""Selected by accuracy, then by loss, on {results.sizes.asked} held-out problems in number
words, with a seed that is used for nothing else:

{table(["system", "learning rate", "accuracy, %", "loss per token"], rows)}"""
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
)
