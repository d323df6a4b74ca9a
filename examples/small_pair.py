"""Create a tiny pair of language models to try soft thoughts offline.

The task is two-step arithmetic, evaluated from left to right::

    Q: twelve plus thirty four times five? A: 12+34=046;046*5=0230

A problem can be written in four ways: in digits (``Q: 12+34*5?``), in words, with names that stand for numbers
(``Q: anna plus cora times five?``), and with strangers, names whose numbers neither model knows.

* The **base** solves problems in digits, given as the question or as a hint between question and answer. It can read
  neither number words nor names.
* The **assistant** reads a question in words or with names and writes the problem in digits, ``... five? A: 12+34*5``,
  also if unk tokens replace its own previous output. Its hidden states at unk tokens after a question therefore
  encode the digits, one per position. It cannot calculate, and knows no strangers.

SoftCoT trains the missing part: a linear layer from these hidden states to the base's embeddings. The models have
different tokenizers and different hidden sizes.

    python small_pair.py --out DIR [--seed 0]
"""

from __future__ import annotations

import argparse
import random
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

UNITS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TEENS = [f"{stem}teen" for stem in ("thir", "four", "fif", "six", "seven", "eigh", "nine")]
SMALL = [*UNITS, "ten", "eleven", "twelve", *TEENS]
TENS = [f"{stem}ty" for stem in ("twen", "thir", "for", "fif", "six", "seven", "eigh", "nine")]
OPERATORS = {"+": "plus", "-": "minus", "*": "times"}
MARK = " A: "  # one token in both vocabularies; every response begins with it
NAMES = {
    kind: [start + end for start in starts for end in ("na", "lo", "mi", "ra")]
    for kind, starts in {"names": ("an", "be", "co", "da", "ed"), "strangers": ("fi", "go", "ha", "ju", "ka")}.items()
}
# The number of each name. All kinds of questions use numbers from the same range, so none is easier to calculate.
NUMBERS = {kind: random.Random(kind).sample(range(10, 100), len(names)) for kind, names in NAMES.items()}
KINDS = ("digits", "words", *NAMES)

Rows = list[list[int]]


def number_word(n: int) -> str:
    """Convert 34 to ``thirty four``."""
    if n < 20:
        return SMALL[n - 1]
    return TENS[n // 10 - 2] + (f" {SMALL[n % 10 - 1]}" if n % 10 else "")


def put(expression: str, kind: str = "words") -> str:
    """Convert ``12+34*5`` to ``Q: twelve plus thirty four times five?``, or the same with names or in digits."""
    if kind == "digits":
        return f"Q: {expression}?"
    a, b, c = int(expression[:2]), int(expression[3:5]), number_word(int(expression[6]))
    named = dict(zip(NUMBERS[kind], NAMES[kind], strict=True)) if kind in NAMES else {}
    a, b = (named[n] if named else number_word(n) for n in (a, b))
    return f"Q: {a} {OPERATORS[expression[2]]} {b} {OPERATORS[expression[5]]} {c}?"


def work_out(expression: str) -> str:
    """Convert ``12+34*5`` to ``12+34=046;046*5=0230``."""
    a, b, c = int(expression[:2]), int(expression[3:5]), int(expression[6])
    first = a + b if expression[2] == "+" else a - b
    second = {"+": first + c, "-": first - c, "*": first * c}[expression[5]]
    return f"{expression[:5]}={first:03d};{first:03d}{expression[5:]}={second:04d}"


def draw(rng: random.Random, kind: str = "words", held_out: bool = False) -> str:
    """Draw a problem of seven characters, such as ``12+34*5``. No result is negative; half of the problems multiply.

    With names, only numbers that have a name occur. A hash of the problem selects the tenth of all problems that is
    held out from training.
    """
    numbers = NUMBERS.get(kind, range(10, 100))
    while True:
        a, b, c = rng.choice(numbers), rng.choice(numbers), rng.randint(2, 9)
        first, second = rng.choice("+-"), rng.choice("+-**")
        expression = f"{a}{first}{b}{second}{c}"
        negative = first == "-" and a - b < (c if second == "-" else 0)
        if not negative and (zlib.crc32(expression.encode()) % 10 == 0) == held_out:
            return expression


def problems(count: int, seed: int, kind: str = "words", *, held_out: bool = False) -> list[dict[str, str]]:
    """Draw problems of one of `KINDS` as dicts with ``prompt``, ``response`` and ``expression`` (the digits)."""
    rng = random.Random(seed)
    drawn = [draw(rng, kind, held_out) for _ in range(count)]
    return [{"prompt": put(item, kind), "response": MARK + work_out(item), "expression": item} for item in drawn]


def make_tokenizer(vocabulary: list[str], pad: str, unk: str, eos: str, others: list[str]) -> PreTrainedTokenizerFast:
    """Create a tokenizer for whole words, each with the preceding space, and single characters."""
    ids = {token: i for i, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=unk))
    pieces = Regex(f"{MARK}|Q:| ?[a-z]+|.")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pieces, behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        unk_token=unk,
        eos_token=eos,
        additional_special_tokens=others,
        padding_side="left",
        model_max_length=128,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def make_tokenizers() -> tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast]:
    """Create the tokenizers of base and assistant. The base has an unused ``<thought>`` token."""
    words = [f" {word}" for word in [*SMALL, *TENS, *OPERATORS.values(), *NAMES["names"], *NAMES["strangers"]]]
    shared = ["Q:", "?", MARK, " ", *"+-*0123456789", *words]
    special = ["<pad>", "<unk>", "</s>", "<thought>"]
    base = make_tokenizer([*special, *"=;", *shared], *special[:3], others=special[3:])
    special = ["[PAD]", "[UNK]", "[EOS]"]
    # A different order, so no token has the same id in both.
    assistant = make_tokenizer(["[EOS]", *shared[::-1], *special[:2]], *special, others=[])
    return base, assistant


def make_model(tokenizer: PreTrainedTokenizerFast, width: int) -> LlamaForCausalLM:
    """Create a Llama model with four layers and random weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=128,
        initializer_range=0.05,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def collate(sources: Rows, targets: Rows, pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Join sources and targets to right-padded input ids, with labels on the targets."""
    size = max(len(source) + len(target) for source, target in zip(sources, targets, strict=True))
    ids = torch.full((len(sources), size), pad)
    labels = torch.full((len(sources), size), -100)
    for row, (source, target) in enumerate(zip(sources, targets, strict=True)):
        here = slice(len(source), len(source) + len(target))
        ids[row, : here.start] = torch.tensor(source)
        ids[row, here] = labels[row, here] = torch.tensor(target)
    return ids, labels


def base_batch(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rng: random.Random, hinted: float, size: int = 32
) -> dict[str, torch.Tensor]:
    """Create training examples for the base: problems in digits, and a share `hinted` of examples with hints.

    A hint in digits stands in the place of the soft thoughts: after a question in words or with names or, in one of
    three examples, after the marker that follows the question. The question is a *different problem* from the hint and
    the answer, so reading it does not help, and the base never learns to.

    Soft thoughts only resemble embeddings of digits, and those of an untrained linear layer are much larger. Hints
    therefore get noise (up to 4 times the standard deviation of the embeddings) and are scaled (by 0.5 to 8). One in
    ten of their vectors is pure noise, and so are vectors that often follow them: mostly none or one, sometimes up to
    25, as with N = 32.
    """
    unk, eos = tokenizer.unk_token_id, tokenizer.eos_token_id
    sources, targets, hints = [], [], []
    for _ in range(size):
        expression = draw(rng)
        prompt, hint, response = put(expression, "digits"), [], MARK + work_out(expression)
        if rng.random() < hinted:
            kind = rng.choice(KINDS[1:])
            prompt = put(draw(rng, kind), kind)
            if rng.random() < 1 / 3:
                prompt, response = prompt + MARK, response.removeprefix(MARK)
            hint = [unk if rng.random() < 0.1 else token for token in tokenizer.encode(expression)]
            hint += [unk] * rng.choice([0, 0, 1, 1, rng.randint(0, 25)])
        source = tokenizer.encode(prompt)
        sources.append(source + hint)
        targets.append([*tokenizer.encode(response), eos])
        hints.append([0] * len(source) + [1] * len(hint))
    ids, labels = collate(sources, targets, tokenizer.pad_token_id)
    is_hint, _ = collate(hints, [[0] * len(target) for target in targets], 0)
    embeddings = model.get_input_embeddings()(ids)
    noise = torch.randn(embeddings.shape) * model.get_input_embeddings().weight.detach().std()
    level = 4 * torch.rand(size, 1, 1)
    noisy = torch.where((ids == unk)[..., None], noise, embeddings + level * noise)
    scale = 2 ** (4 * torch.rand(size, 1, 1) - 1)
    embeddings = torch.where(is_hint[..., None] == 1, scale * noisy, embeddings)
    return {"inputs_embeds": embeddings, "labels": labels}


def assistant_batch(tokenizer: PreTrainedTokenizerFast, rng: random.Random, size: int = 64) -> dict[str, torch.Tensor]:
    """Create training examples for the assistant, in words and with names; unk replaces three of four outputs."""
    drawn = [(draw(rng, kind), kind) for kind in rng.choices(("words", "names"), k=size)]
    sources = [tokenizer.encode(put(expression, kind)) for expression, kind in drawn]
    targets = [[*tokenizer.encode(MARK + expression), tokenizer.eos_token_id] for expression, _ in drawn]
    ids, labels = collate(sources, targets, tokenizer.pad_token_id)
    hide = (torch.rand(size, 1) < 0.75) & (labels != -100)
    return {"input_ids": ids.masked_fill(hide, tokenizer.unk_token_id), "labels": labels}


def fit(
    model: PreTrainedModel,
    batch: Callable[[], dict[str, torch.Tensor]],
    steps: int,
    rate: float,
    name: str,
) -> None:
    """Train all weights with AdamW. The learning rate warms up for 5 % of the steps, then decays to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, steps, pct_start=0.05, anneal_strategy="linear", cycle_momentum=False
    )
    model.train()
    for _ in tqdm(range(steps), desc=f"training the {name}"):
        optimizer.zero_grad()
        model(**batch(), use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save in the Hugging Face format. Weights are stored in float16 and loaded in float32."""
    model.save_pretrained(folder, state_dict={k: v.half() for k, v in model.state_dict().items()})
    tokenizer.save_pretrained(folder)


def load_or_make_assistant(folder: Path, width: int = 64, seed: int = 0, steps: int = 1500) -> Path:
    """Return the folder of an assistant; train it if it does not exist."""
    if not (folder / "config.json").exists():
        rng, tokenizer = random.Random(seed), make_tokenizers()[1]
        torch.manual_seed(seed)
        model = make_model(tokenizer, width)
        fit(model, lambda: assistant_batch(tokenizer, rng), steps, 3e-3, "assistant")
        save(model, tokenizer, folder)
    return folder


def load_or_make_base(folder: Path, hinted: float = 0.75, seed: int = 0, steps: int = 3500) -> Path:
    """Return the folder of a base; train it if it does not exist, with hints in a share `hinted` of the examples."""
    if not (folder / "config.json").exists():
        rng, tokenizer = random.Random(seed), make_tokenizers()[0]
        torch.manual_seed(seed)
        model = make_model(tokenizer, width=128)
        fit(model, lambda: base_batch(model, tokenizer, rng, hinted), steps, 3e-3, "base")
        save(model, tokenizer, folder)
    return folder


def load_or_make(folder: str | Path, seed: int = 0) -> tuple[Path, Path]:
    """Return the folders of base and assistant; train the pair if it does not exist."""
    assistant = load_or_make_assistant(Path(folder) / "assistant", seed=seed)
    return load_or_make_base(Path(folder) / "base", seed=seed), assistant


@torch.no_grad()
def share_solved(folder: Path, examples: list[dict[str, str]], answer: str = "response") -> float:
    """Return the share of a saved model's greedy answers that match exactly."""
    model, tokenizer = (c.from_pretrained(folder) for c in (AutoModelForCausalLM, AutoTokenizer))
    inputs = tokenizer([example["prompt"] for example in examples], padding=True, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    written = tokenizer.batch_decode(ids[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    pairs = zip(written, examples, strict=True)
    return sum(text.removeprefix(MARK) == example[answer].removeprefix(MARK) for text, example in pairs) / len(
        examples
    )


def main() -> None:
    """Create the pair, and print the share of problems that the base solves and that the assistant reads."""
    parser = argparse.ArgumentParser(description="Create the small pair of models.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    base, assistant = load_or_make(args.out, args.seed)
    for kind in KINDS:
        examples = problems(400, seed=1, kind=kind, held_out=True)
        solved, read = share_solved(base, examples), share_solved(assistant, examples, "expression")
        print(f"{kind}: base alone solves {solved:.1%}, assistant reads {read:.1%}")


if __name__ == "__main__":
    main()
