"""The built-in `numerals` task: figures -> words, a translation with one right answer, for BLEU.

A task module offers `examples(split, seed, size) -> list[Example]`. Here the prompt is a number, date or time in
figures, the completion what English says for it, and the only reference. `source` is the kind of row; kinds come in
turn, so that a part of the rows is a mixture like the whole. They differ in difficulty, which is their purpose: a
small model is soon sure of some and stays unsure of others.

    source    prompt            completion
    small     7 and 42          seven and forty-two
    hundreds  407               four hundred and seven
    money     $4.50             four dollars and fifty cents
    ordinal   213th             two hundred and thirteenth
    fraction  2 3/8             two and three eighths
    decimal   -3.14             minus three point one four
    range     340-512           from three hundred and forty to five hundred and twelve
    time      Mon 14:35         Monday at twenty-five to three in the afternoon
    date      1994-03-17        the seventeenth of March nineteen ninety-four
    large     345,678           three hundred and forty-five thousand six hundred and seventy-eight
    roman     MCMXCIV           one thousand nine hundred and ninety-four

A word per figure is enough for some; elsewhere words depend on their neighbours (teens, plurals), change places (dates)
or follow from a calculation (14:35), and a vocabulary of pieces hides the place of a figure in a long number.

A prompt belongs to one split, by its hash, and no prompt comes twice. The rows depend on (split, seed, index) alone,
on any machine: only `Random.random()` of a string-seeded generator is drawn from, which Python keeps stable.
"""

from __future__ import annotations

from calendar import monthrange
from collections.abc import Callable, Iterator
from random import Random

from pipeline.errors import UserError
from pipeline.records import Example
from pipeline.tasks import numeral_words as words
from pipeline.tasks.shares import check_split, split_of

TASK = "numerals"
SPLITS = {"train": 11_000, "validation": 440, "test": 440}  # default numbers of rows
SPLIT_SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}  # of all prompts
MOST = {"train": 33_000, "validation": 3_300, "test": 3_300}  # there are 3,999 Roman numerals, the fewest of a kind

MINUS_SHARE = 0.3  # of the decimals
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
ROMAN = (("M", 1000), ("CM", 900), ("D", 500), ("CD", 400), ("C", 100), ("XC", 90), ("L", 50), ("XL", 40))
ROMAN += (("X", 10), ("IX", 9), ("V", 5), ("IV", 4), ("I", 1))

Pair = tuple[str, str]  # prompt, completion


def examples(split: str, seed: int, size: int | None = None) -> list[Example]:
    """`size` rows (default SPLITS[split]); a smaller size is a prefix of a larger one.

    Raises UserError for an unknown split, and for more rows than there are.
    """
    check_split(TASK, split, SPLITS)
    count = SPLITS[split] if size is None else size
    if count > MOST[split]:
        raise UserError(f"data.task_size: numerals: found {count}, wanted at most {MOST[split]} rows for {split}")
    streams = [(kind, _distinct(kind, split, seed)) for kind in KINDS]
    return [_row(split, index, *streams[index % len(streams)]) for index in range(count)]


def roman(number: int) -> str:
    """1 ... 3999."""
    letters = ""
    for numeral, value in ROMAN:
        count, number = divmod(number, value)
        letters += numeral * count
    return letters


def _row(split: str, index: int, kind: str, stream: Iterator[Pair]) -> Example:
    prompt, completion = next(stream)
    name = f"{TASK}/{split}/{index:06d}"
    return Example(name, prompt, completion=completion, source=kind)


def _distinct(kind: str, split: str, seed: int) -> Iterator[Pair]:
    """The split's rows of one kind in the order of their draws, each once."""
    rng = Random(f"{TASK}-{seed}-{split}-{kind}")
    seen: set[str] = set()
    while True:
        prompt, completion = KINDS[kind](rng)
        if split_of(prompt, SPLIT_SHARES) == split and prompt not in seen:
            seen.add(prompt)
            yield prompt, completion


def _whole(rng: Random, first: int, last: int) -> int:
    """Uniform in first ... last, both included."""
    return first + int(rng.random() * (last - first + 1))


def _small(rng: Random) -> Pair:
    one, other = _whole(rng, 0, 99), _whole(rng, 0, 99)
    return f"{one} and {other}", f"{words.cardinal(one)} and {words.cardinal(other)}"


def _hundreds(rng: Random) -> Pair:
    number = _whole(rng, 100, 9999)
    return str(number), words.cardinal(number)


def _money(rng: Random) -> Pair:
    sum_in_cents = _whole(rng, 1, 99_999)
    dollars, cents = divmod(sum_in_cents, 100)
    return f"${dollars}.{cents:02d}", words.money(dollars, cents)


def _ordinal(rng: Random) -> Pair:
    number = _whole(rng, 1, 9999)
    teen = number % 100 in (11, 12, 13)
    ending = "th" if teen else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}", words.ordinal(number)


def _fraction(rng: Random) -> Pair:
    whole, denominator = _whole(rng, 0, 99), _whole(rng, 2, 20)
    numerator = _whole(rng, 1, denominator - 1)
    figures, said = f"{numerator}/{denominator}", words.fraction(numerator, denominator)
    return (f"{whole} {figures}", f"{words.cardinal(whole)} and {said}") if whole else (figures, said)


def _decimal(rng: Random) -> Pair:
    minus = rng.random() < MINUS_SHARE
    whole, places = _whole(rng, 0, 99), _whole(rng, 1, 3)
    decimals = f"{_whole(rng, 0, 10**places - 1):0{places}d}"
    figures, said = f"{whole}.{decimals}", words.decimal(whole, decimals)
    return (f"-{figures}", f"minus {said}") if minus else (figures, said)


def _range(rng: Random) -> Pair:
    first = _whole(rng, 1, 998)
    last = _whole(rng, first + 1, 999)
    return f"{first}-{last}", f"from {words.cardinal(first)} to {words.cardinal(last)}"


def _time(rng: Random) -> Pair:
    day, hour, minute = WEEKDAYS[_whole(rng, 0, 6)], _whole(rng, 0, 23), _whole(rng, 0, 59)
    return f"{day[:3]} {hour:02d}:{minute:02d}", f"{day} at {words.clock(hour, minute)}"


def _date(rng: Random) -> Pair:
    year, month = _whole(rng, 1100, 2099), _whole(rng, 1, 12)
    day = _whole(rng, 1, monthrange(year, month)[1])  # by the Gregorian calendar
    return f"{year}-{month:02d}-{day:02d}", words.date(year, month, day)


def _large(rng: Random) -> Pair:
    number = _whole(rng, 10_000, 999_999)
    return f"{number:,}", words.cardinal(number)


def _roman(rng: Random) -> Pair:
    number = _whole(rng, 1, 3999)
    return roman(number), words.cardinal(number)


KINDS: dict[str, Callable[[Random], Pair]] = {
    "small": _small,
    "hundreds": _hundreds,
    "money": _money,
    "ordinal": _ordinal,
    "fraction": _fraction,
    "decimal": _decimal,
    "range": _range,
    "time": _time,
    "date": _date,
    "large": _large,
    "roman": _roman,
}
