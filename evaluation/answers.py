r"""Extraction of answers from generated text: numbers, option letters, yes or no, and dates.

Each function returns a canonical string, equal for equal answers, or None. It searches in this order:

1. The last *statement* that can be parsed ("Answer: X", "the answer is X", "#### X", "\boxed{X}"), even if text
   follows. A formal statement ("Answer: unclear") that cannot be parsed and ends the text means that there is no
   answer.
2. An answer at the start of the text ("Yes. Pears float.", "B because ..."); not for numbers and dates.
3. The last number or date, the last letter that looks like an option, or the last yes or no that is not a determiner.

lm-evaluation-harness loads this file by its path, so it imports nothing from the project. The filters are at the end:
`extract_*`, then `take_first_k` for a vote over k samples, then `answered`, `majority_vote`, `take_first`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import date as calendar
from fractions import Fraction
from itertools import pairwise
from typing import Any, TypeVar

INVALID = "[invalid]"  # result of a filter for a text without an answer; never a gold answer
LETTERS = "ABCDE"
T = TypeVar("T")
Reader = Callable[[str], "str | None"]

# Statements. Repetitions in patterns are bounded or disjoint, so any text takes linear time.

CLEANING = [
    (r"\*\*|__|`|\\[()\[\]]", " "),  # emphasis and the delimiters of formulas
    (r"\\[,!]|\{(?=,\})|(?<=\{,)\}", ""),  # thin spaces, and the braces of 1{,}234
    (r"\\([$%])", r"\1"),
    (r"\s?\\[dt]?frac(?:\s?\{([^{}]*)\}\s?\{([^{}]*)\}|(\d)(\d))", r" \1\3/\2\4"),
    ("\u00bd", " 1/2"),
    (r"\\(?:text|math)[a-z]*\s?\{([^{}]*)\}", r"\1"),
]
# The group `formal` matches if an answer must follow; "the answer is clear from the text" need not contain one.
STATED = r"""
    (?P<formal> (?<!\#)\#{4} (?!\#) | \\boxed\s?\{
              | \bans(?:wer)?s?\b (?:\s?\([^()\n]{0,40}\))? [\s*]{0,4} [:=])
  | (?<!to\s)\banswer\b [^.\n:]{0,60}? \b(?:is|are|(?:would|must|should|will)\sbe)\b :?
  | \bfinal\sanswer\s{0,4}\n"""
SENTENCE_END = re.compile(r"[.!?](?=\s+[^\d\s])|[}\n]")
FILLERS = r"""(?:\W{0,4}\b(?:the|option|choice|letter|answer|correct|right|best|most|likely|probably|definitely|clearly
    |simply|therefore|thus|hence|then|so|that|its?|it['\u2019]s|is|(?:must|would)\sbe)\b){0,6} \W{0,6}?"""


def compiled(pattern: str) -> re.Pattern[str]:
    """Compile a verbose, case-insensitive, multiline pattern."""
    return re.compile(pattern, re.VERBOSE | re.IGNORECASE | re.MULTILINE)


def stated(text: str, marks: re.Pattern[str], read: Reader) -> str | None:
    """Return the last parsable statement; `INVALID` if the text ends with a formal one that cannot be parsed."""
    answer, last_word = None, len(text)
    while last_word and not text[last_word - 1].isalnum():
        last_word -= 1
    for mark in marks.finditer(text):
        start = mark.end()
        while start < len(text) and text[start].isspace():
            start += 1
        end = SENTENCE_END.search(text, start, start + 300)
        stop = end.start() if end else min(start + 300, len(text))
        answer = read(text[start:stop]) or (INVALID if mark["formal"] and stop >= last_word else answer)
    return answer


def answer_in(text: str, marks: re.Pattern[str], read: Reader, otherwise: Reader) -> str | None:
    """Return the result of `read` for the last statement, else the result of `otherwise` for the text."""
    for pattern, new in CLEANING:
        text = re.sub(pattern, new, text)
    found = stated(text, marks, read)
    return None if found == INVALID else found or otherwise(text)


def first(found: Iterable[T | None]) -> T | None:
    """Return the first true value, or None."""
    return next(filter(None, found), None)


def last(found: Iterable[T | None]) -> T | None:
    """Return the last true value, or None."""
    return first(reversed(list(found)))


# Dates, and patterns shared with numbers

# "Answer: Ann had 5 eggs. She ..." states no number yet: reasoning starts with two words and continues.
REASONING = r"\W{0,9} (?: step\b | not\W{1,3}\d | [^\W\d]{1,30} \W{1,3} [^\W\d] [^\n]{0,300}? [.!?\n] \W{0,9}\w )"
MARKS = compiled(rf"(?:{STATED}) (?!{REASONING})")
MONTHS = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"]
MONTH = rf"\b(?:{'|'.join(MONTHS)})[a-z]{{0,6}}\.?"
DATE = compiled(rf"""(?<![^\W_])(?<![/.-])(?:
    (?P<m1>\d{{1,2}}) (?P<by>[/-]) (?P<d1>\d{{1,2}}) (?P=by) (?P<y1>\d{{4}})
  | (?P<y2>\d{{4}}) [/-] (?P<m2>\d{{1,2}}) [/-] (?P<d2>\d{{1,2}})
  | (?P<m3>{MONTH}) \s? (?P<d3>\d{{1,2}}) (?:st|nd|rd|th)? ,? \s? (?P<y3>\d{{4}})
  | (?P<d4>\d{{1,2}}) (?:st|nd|rd|th)? \s (?:of\s)? (?P<m4>{MONTH}) ,? \s? (?P<y4>\d{{4}})
  )(?![^\W_]|/|-\d)""")


def dates(text: str) -> Iterator[str | None]:
    """Yield all dates as MM/DD/YYYY; None for an impossible date."""
    for match in DATE.finditer(text):
        year, month, day = ("".join(match[f"{part}{form}"] or "" for form in (1, 2, 3, 4)) for part in "ymd")
        try:
            found = calendar(
                int(year), int(month) if month.isdigit() else MONTHS.index(month[:3].lower()) + 1, int(day)
            )
            yield f"{found.month:02}/{found.day:02}/{found.year:04}"
        except ValueError:
            yield None


def date(text: str) -> str | None:
    """Return a date as MM/DD/YYYY. Parses 05/01/2021 (month first), May 1, 2021, 1 May 2021 and 2021-05-01."""
    return answer_in(text, MARKS, lambda part: first(dates(part)), lambda whole: last(dates(whole)))


# Numbers

AMOUNT = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
# The first line matches times, ratios, versions, telephone numbers, etc., which are not numbers.
# A minus is a sign only if nothing before it could be a minuend.
NUMBER = compiled(rf"""
    (?P<other> \d+(?::\d+)+ | \d+(?:\.\d+){{2,}} | \d+(?:[/-]\d+){{2,}}(?!\.?\d) )
  | (?P<sign> (?<![\w).%])[-\u2212] )? \(? (?:[$€£¥₹]\s?)?
    (?: (?P<whole>\d+)\s(?=\d+/\d) )? (?P<over>{AMOUNT})
    (?: \s?/\s?(?P<under>{AMOUNT}) | (?P<exponent>e[+-]?\d{{1,2}})\b )?""")
JOINED = compiled(r"[^,;(]{0,80}? (?:[=+*/^\u00d7\u00f7>\u2212-]|\sx) \s? [(<]{0,3} $")
ONE_NUMBER = compiled(rf"(?:{NUMBER.pattern})\)? (?:\s*\([^()]*\))?")


def value(match: re.Match[str]) -> str | None:
    """Return the canonical string of a match of `NUMBER`."""
    if match["other"] or match.end() - match.start() > 60:  # numbers this long are garbage and slow to convert
        return None
    over, under = (Fraction((match[part] or "1").replace(",", "")) for part in ("over", "under"))
    if under == 0:
        return None
    size = int(match["whole"] or 0) + over / under * Fraction("1" + (match["exponent"] or ""))
    return str(-size if match["sign"] else size)


def stated_number(part: str) -> str | None:
    """Return the first number of a statement, or its calculated result: 8 for "5 + 3 = 8 eggs (2 more than 6)"."""
    numbers = list(NUMBER.finditer(part))
    ends = [m for m, after in pairwise(numbers) if not JOINED.match(part[m.end() : after.start()])]
    return first(map(value, ends + numbers[-1:]))


def last_number(text: str) -> str | None:
    """Return the last number of a text."""
    return last(map(value, NUMBER.finditer(text)))


def number(text: str) -> str | None:
    """Return a number as an integer or a reduced fraction: "1234", "-3", "1/2".

    Commas, currencies and units are dropped, as well as "%" and "million", as in GSM8K's own answers. "1 1/2" and
    "1e6" are parsed. In "3-5", the last number counts, as in "10-4". Not numbers: 3:30, 2:3, 2.5.3, 05/01/2021, seven.
    """
    return answer_in(DATE.sub(" ", text), MARKS, stated_number, last_number)


def asdiv_gold(answer: str) -> str | None:
    """Return the gold answer of a row of ASDiv if it is one number, "9 (apples)"; None for rows to omit.

    2,093 of the 2,305 rows have one number. The others would need separate rules: 90 several values (8; 40), 57
    names, yes or no, or other words, 43 ratios (5:6), 18 times of day, 3 ordinals (1st), 1 day of a year.
    """
    match = ONE_NUMBER.fullmatch(answer.strip())
    return value(match) if match else None


# Yes or no. "Chanel No. 5", "no one", "yes-men" and "know" contain neither.

YES_NO = r"""(?<!not\s)(?<![\w'\u2019-]) (?P<word>yes|no)\b
    (?! [-'\u2019]\w | \s(?:one|longer|more)\b )"""
YES_NO_MARKS = compiled(STATED + r"| \b(?:so|thus|hence|therefore)\b")
YES_NO_STATED = compiled(FILLERS + YES_NO)
YES_NO_OPENING = compiled(rf"\s{{0,9}}\W{{0,4}} {YES_NO} (?=\s{{0,3}}(?:[^\w\s]|$|(?:because|since|as)\b))")
YES_NO_ALONE = compiled(rf"{YES_NO} (?!\.\s?\d) (?=\s{{0,3}}(?:[^\w\s]|$))")


def word_reader(opening: re.Pattern[str]) -> Reader:
    """Return a reader of the yes or no at the start of a text, else of its last one."""

    def read(text: str) -> str | None:
        match = opening.match(text) or last(YES_NO_ALONE.finditer(text))
        return match["word"].lower() if match else None

    return read


def yes_no(text: str) -> str | None:
    """Return "yes", "no" or None."""
    return answer_in(text, YES_NO_MARKS, word_reader(YES_NO_STATED), word_reader(YES_NO_OPENING))


# Option letters. "vitamin C.", "A dog", "not (B)" and a list of all options contain none.

LETTER = r"""(?: \((?P<bracketed>[a-e])\) | (?P<bare>[a-e])\b (?![-'\u2019]\w|\.\w)
    (?! (?<=a)\s+(?!(?:because|since|as|is|for)\b)\w ) )"""  # "A because", but not "a dog"
LETTER_MARKS = compiled(rf"""{STATED}
  | \bans(?:wer)?\b [\s.\u2013-]{{1,4}} (?=[a-e]\b)
  | \b(?:correct|right|best)\s(?:option|choice|letter)\b (?:[^.\n:]{{0,60}}?\bis\b)? :?
  | (?<![\w'\u2019-])(?<!nor\s) (?={LETTER} \s(?:is|would\sbe)\s(?:the\s)?(?:most\s)?(?:correct|right|best|answer)\b)
  | ^ (?=\s? (?:(?:option|choice)\b\s?:?\s?)? [(\[]?[a-e]\b [\s)\].:]{{0,4}} $)
  | \b(?:so|thus|hence|therefore|but|choose|pick|select|go\swith|it['\u2019]s|it\sis)\b
    (?={FILLERS} \(?(?-i:[A-E])\b [\s).:]{{0,4}} $)""")
LETTER_STATED = compiled(FILLERS + LETTER)
TWO_LETTERS = compiled(FILLERS + LETTER + r"\s?(?:,|/|&|\band\b|\bor\b)\s?\(?(?-i:[A-E])\b")
LETTER_OPENING = compiled(rf"\s{{0,9}} {LETTER} (?=[).:,;] | \s(?:because|since|as)\b)")
LETTER_MARKED = compiled(
    r"(?<!not\s) (?:\((?P<bracketed>(?-i:[A-E]))\) | \b(?:option|choice)\s(?P<bare>(?-i:[A-E]))\b)"
)
LISTED = compiled(r"(?:(?<=[\s(])|^) ([a-e]) (?:\)|[.:](?!\w))")
WORDS = re.compile(r"\d+(?:[.,]\d+)*|\w+|[^\w\s.,;:!?\"'()$]")


def unlisted(text: str) -> str:
    """Return the text with the letters of restated options, (A) ... (B) ..., blanked."""
    marks, characters = list(LISTED.finditer(text)), list(text)
    for run in re.finditer("ABC?D?E?", "".join(mark[1].upper() for mark in marks)):
        for mark in marks[run.start() : run.end()]:
            characters[mark.start(1)] = " "
    return "".join(characters)


def words(text: str) -> list[str]:
    """Split a text into words, numbers and symbols for comparison, without a leading article."""
    return WORDS.findall(re.sub(r"^\s*(?:an?|the)\s", "", text.lower()))


def option_of(part: str, options: Sequence[str]) -> str | None:
    """Return the letter of the only option that starts the statement, or starts with it (36 for "36 km")."""
    said, texts = words(part), [words(option) for option in options]
    whole = [len(text) * (said[: len(text)] == text) for text in texts]
    lengths = whole if any(whole) else [len(said) * (text[: len(said)] == said) for text in texts]
    return LETTERS[lengths.index(max(lengths))] if any(lengths) and lengths.count(max(lengths)) == 1 else None


def letter(text: str, options: Sequence[str] = LETTERS) -> str | None:
    """Return a letter from A to E. With the texts of the options, a statement of an option's text also counts."""

    def picked(match: re.Match[str] | None) -> str | None:
        found = (match["bracketed"] or match["bare"]).upper() if match else ""
        return found if found and found in LETTERS[: len(options)] else None

    def read(part: str) -> str | None:
        if TWO_LETTERS.match(part):
            return None
        found = picked(LETTER_STATED.match(part)) or picked(LETTER_MARKED.search(part))
        return found or (None if options == LETTERS else option_of(part, options))

    def opening_or_last(whole: str) -> str | None:
        rest = unlisted(whole)
        return picked(LETTER_OPENING.match(rest)) or last(map(picked, LETTER_MARKED.finditer(rest)))

    return answer_in(text, LETTER_MARKS, read, opening_or_last)


# Filters of lm-evaluation-harness. They map the generated texts of each document (`resps`) to answers.

Texts = Iterable[Iterable[str]]
Docs = Sequence[Mapping[str, Any]]


def extractor(read: Reader) -> Callable[[Texts, Docs], list[list[str]]]:
    """Return a filter that applies `read` to every text."""
    return lambda resps, docs: [[read(text) or INVALID for text in texts] for texts in resps]


extract_numbers, extract_yes_no, extract_dates = map(extractor, (number, yes_no, date))


def option_texts(doc: Mapping[str, Any]) -> Sequence[str]:
    """Return a document's options (`options: ["A)36", ...]` or `choices: {"text": ["bank", ...]}`) without letters."""
    texts = doc.get("options") or doc.get("choices", {}).get("text") or LETTERS
    return texts if texts == LETTERS else [re.sub(r"^\(?[A-E]\)\s*", "", text) for text in texts]


def extract_letters(resps: Texts, docs: Docs) -> list[list[str]]:
    """Extract option letters, using the texts of the document's options."""
    pairs = zip(resps, map(option_texts, docs), strict=True)
    return [[letter(text, options) or INVALID for text in texts] for texts, options in pairs]


def answered(resps: Texts, docs: Docs) -> list[list[str]]:
    """Drop invalid answers before a vote, so they do not outvote valid ones; keep one if all are invalid.

    Lists get shorter, so `take_first_k` must come first. `majority_vote` resolves ties in favour of the first answer.
    """
    return [[answer for answer in answers if answer != INVALID] or [INVALID] for answers in resps]
