"""The numerals task: words against literals and a second reader, kinds, splits, no row twice."""

import re
from datetime import date, datetime

import pytest

from pipeline.data.prompts import gold
from pipeline.errors import UserError
from pipeline.tasks import numeral_words as words
from pipeline.tasks.numerals import KINDS, MOST, SPLIT_SHARES, SPLITS, examples, roman
from pipeline.tasks.shares import split_of

# The second reader's own lists: it adds up words and knows nothing of how they were made.
VALUES = {"zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9}
VALUES |= {"ten": 10, "eleven": 11, "twelve": 12, "thirteen": 13, "fourteen": 14, "fifteen": 15, "sixteen": 16}
VALUES |= {"seventeen": 17, "eighteen": 18, "nineteen": 19}
VALUES |= {"twenty": 20, "thirty": 30, "forty": 40, "fifty": 50, "sixty": 60, "seventy": 70, "eighty": 80, "ninety": 90}
ORDINALS = {"first": "one", "second": "two", "third": "three", "fifth": "five", "eighth": "eight", "ninth": "nine"}
ORDINALS |= {"twelfth": "twelve", "half": "two", "quarter": "four"}
DAY_PARTS = ("morning", "morning", "afternoon", "evening")  # six hours each
LETTERS = {"I": 1, "V": 5, "X": 10, "L": 50, "C": 100, "D": 500, "M": 1000}


@pytest.mark.parametrize(
    ("number", "said", "place"),
    [
        (0, "zero", "zeroth"),
        (3, "three", "third"),
        (10, "ten", "tenth"),
        (12, "twelve", "twelfth"),
        (18, "eighteen", "eighteenth"),
        (19, "nineteen", "nineteenth"),
        (20, "twenty", "twentieth"),
        (21, "twenty-one", "twenty-first"),
        (40, "forty", "fortieth"),
        (99, "ninety-nine", "ninety-ninth"),
        (100, "one hundred", "one hundredth"),
        (101, "one hundred and one", "one hundred and first"),
        (110, "one hundred and ten", "one hundred and tenth"),
        (999, "nine hundred and ninety-nine", "nine hundred and ninety-ninth"),
        (1000, "one thousand", "one thousandth"),
        (1001, "one thousand and one", "one thousand and first"),
        (1100, "one thousand one hundred", "one thousand one hundredth"),
        (12345, "twelve thousand three hundred and forty-five", "twelve thousand three hundred and forty-fifth"),
        (100000, "one hundred thousand", "one hundred thousandth"),
        (605012, "six hundred and five thousand and twelve", "six hundred and five thousand and twelfth"),
        (
            999999,
            "nine hundred and ninety-nine thousand nine hundred and ninety-nine",
            "nine hundred and ninety-nine thousand nine hundred and ninety-ninth",
        ),
    ],
)
def test_cardinals_and_ordinals(number: int, said: str, place: str):
    assert words.cardinal(number) == said
    assert words.ordinal(number) == place


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (1100, "eleven hundred"),
        (1905, "nineteen oh five"),
        (1910, "nineteen ten"),
        (1994, "nineteen ninety-four"),
        (2000, "two thousand"),
        (2009, "two thousand and nine"),
        (2010, "twenty ten"),
        (2099, "twenty ninety-nine"),
    ],
)
def test_years(number: int, said: str):
    assert words.year(number) == said


@pytest.mark.parametrize(
    ("hour", "minute", "said"),
    [
        (0, 0, "midnight"),
        (0, 30, "half past midnight"),
        (0, 31, "twenty-nine minutes to one in the morning"),
        (1, 0, "one o'clock in the morning"),
        (9, 15, "a quarter past nine in the morning"),
        (11, 59, "one minute to noon"),
        (12, 0, "noon"),
        (12, 10, "ten past noon"),
        (12, 45, "a quarter to one in the afternoon"),
        (14, 35, "twenty-five to three in the afternoon"),
        (17, 59, "one minute to six in the afternoon"),
        (18, 0, "six o'clock in the evening"),
        (23, 40, "twenty to midnight"),
    ],
)
def test_the_clock(hour: int, minute: int, said: str):
    assert words.clock(hour, minute) == said


def test_parts_money_and_dates():
    assert words.fraction(1, 2) == "one half"
    assert words.fraction(1, 4) == "one quarter"
    assert words.fraction(3, 4) == "three quarters"
    assert words.fraction(5, 12) == "five twelfths"
    assert words.fraction(19, 20) == "nineteen twentieths"
    assert words.decimal(0, "05") == "zero point zero five"
    assert words.money(1, 1) == "one dollar and one cent"
    assert words.money(20, 0) == "twenty dollars"
    assert words.money(0, 50) == "fifty cents"
    assert words.date(2000, 2, 29) == "the twenty-ninth of February two thousand"
    assert words.date(1999, 12, 31) == "the thirty-first of December nineteen ninety-nine"


def test_roman_numerals():
    # 1994 = 1000 + 900 + 90 + 4; 3888 is the longest
    assert [roman(n) for n in (1, 4, 9, 40, 1994, 3888, 3999)] == [
        *("I", "IV", "IX", "XL", "MCMXCIV", "MMMDCCCLXXXVIII", "MMMCMXCIX")
    ]


def test_every_number_reads_back():
    numbers = [*range(0, 3000), *range(9_900, 10_100), *range(99_000, 999_999, 997), 999_999]
    assert [read(words.cardinal(number)) for number in numbers] == numbers
    assert [read_ordinal(words.ordinal(number)) for number in numbers] == numbers
    assert len({words.year(number) for number in range(1100, 2100)}) == 1000
    assert len({words.clock(hour, minute) for hour in range(24) for minute in range(60)}) == 24 * 60


@pytest.mark.parametrize("kind", KINDS)
def test_completions_say_what_prompts_show(kind: str):
    rows = [row for row in examples("train", 3, 2200) if row.source == kind]
    assert len(rows) == 200  # 2200 rows of 11 kinds
    for row in rows:
        assert READERS[kind](row.completion) == FIGURES[kind](row.prompt), row


def test_dates_exist_and_leap_days_are_among_them():
    dates = [row.prompt for row in examples("train", 1, 33_000) if row.source == "date"]
    assert all(date.fromisoformat(prompt) for prompt in dates)
    assert any(prompt.endswith("-02-29") for prompt in dates)  # 3000 dates, one in 1,506 is one


def test_rows_are_short_plain_and_their_own_reference():
    for row in examples("train", 2, 3300):
        text = row.prompt + row.completion
        assert text.isascii() and "  " not in text and text.strip() == text
        assert len(row.prompt.split()) <= 3 and 1 <= len(row.completion.split()) <= 14
        assert row.references == () and gold(row) == (row.completion,)


def test_no_prompt_twice_not_even_in_two_splits_or_under_two_seeds():
    rows = {split: examples(split, 5, most) for split, most in MOST.items()}  # as many as there may be
    for split, members in rows.items():
        assert len(members) == MOST[split] == len({row.prompt for row in members}) == len({row.id for row in members})
        assert {split_of(row.prompt, SPLIT_SHARES) for row in members} == {split}
    assert {split_of(row.prompt, SPLIT_SHARES) for row in examples("test", 6, 440)} == {"test"}


def test_the_seed_draws_and_size_cuts():
    rows = examples("test", 1)
    assert len(rows) == SPLITS["test"] and rows == examples("test", 1)
    assert examples("test", 1, 50) == rows[:50]
    assert [row.source for row in rows[:22]] == [*KINDS] * 2
    assert examples("test", 2, 50) != rows[:50]


def test_wrong_questions_are_user_errors():
    with pytest.raises(UserError, match="found split 'tests', wanted one of train, validation, test; did you mean"):
        examples("tests", 0)
    with pytest.raises(UserError, match="found 33001, wanted at most 33000 rows for train"):
        examples("train", 0, 33_001)


def read(said: str) -> int:
    """The number of words such as "two hundred and five"."""
    total = part = 0
    for word in said.replace("-", " ").replace(" and", "").split():
        if word == "thousand":
            total, part = total + 1000 * part, 0
        else:
            part = part * 100 if word == "hundred" else part + VALUES[word]
    return total + part


def read_ordinal(said: str) -> int:
    start, last = re.fullmatch(r"(.*?)([a-z]+)", said).groups()
    plain = ORDINALS.get(last) or re.sub("ie$", "y", last.removesuffix("th"))
    return read(start + plain)


def read_money(said: str) -> int:
    """In cents."""
    dollars, _, cents = said.rpartition(" and " if " dollar" in said and " cent" in said else "\0")
    if dollars:
        return read_money(dollars) + read_money(cents)
    number, unit = said.rsplit(" ", 1)
    assert unit.endswith("s") == (number != "one")
    return read(number) * {"dollar": 100, "cent": 1}[unit.removesuffix("s")]


def read_fraction(said: str) -> tuple[int, int, int]:
    """(whole, numerator, denominator)."""
    whole, _, part = said.rpartition(" and ")
    numerator, denominator = part.split()
    plain = denominator if numerator == "one" else denominator.removesuffix("s")
    return read(whole), read(numerator), read_ordinal(plain)


def read_decimal(said: str) -> str:
    whole, _, digits = said.removeprefix("minus ").partition(" point ")
    return f"{'-' * said.startswith('minus')}{read(whole)}.{''.join(str(VALUES[digit]) for digit in digits.split())}"


def read_time(said: str) -> tuple[str, int]:
    """(weekday, minutes since midnight). The part of the day must be that of the time itself."""
    day, _, clock = said.partition(" at ")
    clock, _, part = clock.partition(" in the ")
    distance, direction, at = re.fullmatch(r"(?:(.*) (past|to) )?(.*?)(?: o'clock)?", clock).groups()
    hour = read({"midnight": "zero", "noon": "twelve"}.get(at, at)) + (12 if part in ("afternoon", "evening") else 0)
    spelt = {"a quarter": "fifteen", "half": "thirty"}.get(distance, distance) or "zero"
    minutes = read(re.sub(" minutes?$", "", spelt))
    time = (hour * 60 + (-minutes if direction == "to" else minutes)) % 1440
    assert part == ("" if hour in (0, 12) else DAY_PARTS[time // 360]), said
    return day[:3], time


def read_date(said: str) -> str:
    day, month, year = re.fullmatch(r"the (.*) of (\w+) (.*)", said).groups()
    number = datetime.strptime(month, "%B").month
    return f"{read_year(year)}-{number:02d}-{read_ordinal(day):02d}"


def read_year(said: str) -> int:
    if "hundred" in said or "thousand" in said:
        return read(said)
    century, rest = said.split(" ", 1)
    return 100 * read(century) + read(rest.removeprefix("oh "))


def read_roman(letters: str) -> int:
    values = [LETTERS[letter] for letter in letters]
    return sum(-v if v < max(values[i:]) else v for i, v in enumerate(values))


def read_clock_figures(prompt: str) -> tuple[str, int]:
    day, hour, minute = re.split("[ :]", prompt)
    return day, 60 * int(hour) + int(minute)


def read_fraction_figures(prompt: str) -> tuple[int, int, int]:
    whole, _, part = prompt.rpartition(" ")
    numerator, denominator = part.split("/")
    return int(whole or 0), int(numerator), int(denominator)


READERS = {  # of completions
    "small": lambda said: [read(one) for one in said.split(" and ")],
    "hundreds": read,
    "money": read_money,
    "ordinal": read_ordinal,
    "fraction": read_fraction,
    "decimal": read_decimal,
    "range": lambda said: [read(one) for one in said.removeprefix("from ").split(" to ")],
    "time": read_time,
    "date": read_date,
    "large": read,
    "roman": read,
}
FIGURES = {  # of prompts
    "small": lambda prompt: [int(one) for one in prompt.split(" and ")],
    "hundreds": int,
    "money": lambda prompt: int(prompt.removeprefix("$").replace(".", "")),
    "ordinal": lambda prompt: int(prompt[:-2]),
    "fraction": read_fraction_figures,
    "decimal": str,
    "range": lambda prompt: [int(one) for one in prompt.split("-")],
    "time": read_clock_figures,
    "date": str,
    "large": lambda prompt: int(prompt.replace(",", "")),
    "roman": read_roman,
}
