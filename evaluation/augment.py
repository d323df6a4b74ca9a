"""ASDiv's problems with other numbers: what the SoftCoT paper calls ASDiv-Aug, made anew by a rule of our own.

A problem qualifies when its formula is plain arithmetic and the numbers of the text are exactly the operands of the
formula, each once: then new numbers can be put in, and the formula tells the answer.
"""

from __future__ import annotations

import ast
import operator
import random
import re
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction

VARIANTS = 5
UNITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
UNITS += ["thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
WORDS = {word: value for value, word in enumerate(UNITS)} | {word: 20 + 10 * i for i, word in enumerate(TENS)}
# Digits with commas, or a word such as "eighty-seven"; and what a text must not hold, since it is no plain number.
NUMBER = re.compile(
    rf"\d+(?:,\d{{3}})*|\b(?:(?:{'|'.join(TENS)})(?:[- ](?:{'|'.join(UNITS[1:10])}))?|{'|'.join(UNITS)})\b", re.I
)
OTHER = re.compile(
    r"\d[./:%a-z]\S|\d%|hundred|thousand|million|dozen|=|half|halves|twice|double|triple|quarter|\b\w+(?:fi|gh|n|r|v|x)th\b",
    re.I,
)
OPERATIONS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def value_of(text: str) -> int:
    """The number of a match of `NUMBER`."""
    digits = text.replace(",", "")
    return int(digits) if digits.isdecimal() else sum(WORDS[word] for word in re.split("[- ]", text.lower()))


def evaluate(expression: str) -> Fraction | None:
    """The value of plain arithmetic; None where a step leaves the whole numbers from 1 on, or it is none."""

    def step(node: ast.expr) -> Fraction:
        if isinstance(node, ast.BinOp):
            result = OPERATIONS[type(node.op)](step(node.left), step(node.right))
        elif isinstance(node, ast.Constant):
            result = Fraction(str(node.value))
        else:
            raise KeyError(node)
        if result.denominator != 1 or result < 1:
            raise ArithmeticError(result)
        return result

    try:
        return step(ast.parse(expression, mode="eval").body)
    except (SyntaxError, KeyError, ValueError, ArithmeticError):
        return None


def replaced(pattern: re.Pattern[str], text: str, numbers: Sequence[int]) -> str:
    """A text with numbers in the place of the matches of a pattern, one after the other."""
    pieces = map(str, numbers)
    return pattern.sub(lambda _: next(pieces), text)


def variants(text: str, formula: str, seed: int, count: int = VARIANTS) -> Iterator[tuple[str, str]]:
    """A problem with other numbers, and its answer; nothing if it does not qualify.

    Args:
        text: The problem.
        formula: Of ASDiv, such as "7+2=9".
        seed: Of the new numbers: from half to twice an old one, at least 2.
        count: Most variants of a problem.
    """
    expression, equals, result = formula.replace(" ", "").partition("=")
    found = list(NUMBER.finditer(text))
    numbers = [value_of(match[0]) for match in found]
    operands = [int(digits) for digits in re.findall(r"\d+", expression)]
    plain = equals and re.fullmatch(r"[\d+*/()-]+", expression) and not OTHER.search(text)
    if not plain or sorted(numbers) != sorted(operands) or len(set(operands)) < len(operands):
        return
    if min(operands, default=0) < 2 or str(evaluate(expression)) != result:
        return
    rng, seen = random.Random(seed), {tuple(numbers)}
    for _ in range(200):
        new = [rng.randint(max(2, old // 2), 2 * old) for old in numbers]
        answer = evaluate(replaced(re.compile(r"\d+"), expression, [new[numbers.index(old)] for old in operands]))
        if answer is None or tuple(new) in seen:
            continue
        seen.add(tuple(new))
        yield replaced(NUMBER, text, new), str(answer)
        if len(seen) > count:
            return
