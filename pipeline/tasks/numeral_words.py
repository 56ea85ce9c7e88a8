"""Numbers, dates and times as English says them in words; British usage: "one hundred and one"."""

from __future__ import annotations

BELOW_20 = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    *("ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
TENS = ("", "ten", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
IRREGULAR_ORDINALS = {"one": "first", "two": "second", "three": "third", "five": "fifth", "eight": "eighth"}
IRREGULAR_ORDINALS |= {"nine": "ninth", "twelve": "twelfth"}
MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)


def cardinal(number: int) -> str:
    """0 ... 999,999: "six hundred and five thousand and twelve"."""
    assert 0 <= number < 1_000_000, number
    if number < 1000:
        return _below_1000(number)
    thousands, rest = divmod(number, 1000)
    head = f"{_below_1000(thousands)} thousand"
    if rest == 0:
        return head
    return f"{head} and {_below_1000(rest)}" if rest < 100 else f"{head} {_below_1000(rest)}"


def ordinal(number: int) -> str:
    """The last word of the cardinal changes: "twenty-first", "one hundred and twelfth"."""
    words = cardinal(number)
    start = max(words.rfind(" "), words.rfind("-")) + 1
    last = words[start:]
    if last in IRREGULAR_ORDINALS:
        return words[:start] + IRREGULAR_ORDINALS[last]
    return words[:start] + (last[:-1] + "ieth" if last.endswith("y") else last + "th")


def decimal(whole: int, decimals: str) -> str:
    """The digits after the point one by one: (3, "14") is "three point one four"."""
    return " ".join([cardinal(whole), "point", *(BELOW_20[int(digit)] for digit in decimals)])


def fraction(numerator: int, denominator: int) -> str:
    """A proper fraction, not reduced: "one half", "three quarters", "two tenths"."""
    if denominator == 2:
        return "one half"
    part = "quarter" if denominator == 4 else ordinal(denominator)
    return f"{cardinal(numerator)} {part}" + ("s" if numerator > 1 else "")


def money(dollars: int, cents: int) -> str:
    """Dollars and cents, of which one may be 0: "one dollar and five cents"."""
    parts = [_counted(dollars, "dollar")] if dollars else []
    parts += [_counted(cents, "cent")] if cents else []
    return " and ".join(parts)


def year(number: int) -> str:
    """1100 ... 2099, as years are said: "nineteen oh five", "two thousand and nine", "twenty ten"."""
    assert 1100 <= number <= 2099, number
    century, rest = divmod(number, 100)
    if 2000 <= number < 2010:
        return cardinal(number)
    if rest == 0:
        return f"{cardinal(century)} hundred"
    return f"{cardinal(century)} {'oh ' if rest < 10 else ''}{cardinal(rest)}"


def date(number: int, month: int, day: int) -> str:
    """Year `number`, month 1 ... 12 and day 1 ... 31: "the first of May nineteen ninety"."""
    return f"the {ordinal(day)} of {MONTHS[month - 1]} {year(number)}"


def clock(hour: int, minute: int) -> str:
    """Hour 0 ... 23, minute 0 ... 59: "half past nine in the morning", "one minute to three ...", "ten to midnight"."""
    after = minute <= 30
    named = (hour if after else hour + 1) % 24
    at = {0: "midnight", 12: "noon"}.get(named) or cardinal(named % 12)
    if minute:
        at = f"{_minutes(minute if after else 60 - minute)} {'past' if after else 'to'} {at}"
    elif named % 12:
        at = f"{at} o'clock"
    return f"{at} {_part_of_day(hour)}" if named % 12 else at


def _below_1000(number: int) -> str:
    hundreds, rest = divmod(number, 100)
    if hundreds:
        return f"{BELOW_20[hundreds]} hundred" + (f" and {_below_100(rest)}" if rest else "")
    return _below_100(rest)


def _below_100(number: int) -> str:
    if number < 20:
        return BELOW_20[number]
    tens, ones = divmod(number, 10)
    return f"{TENS[tens]}-{BELOW_20[ones]}" if ones else TENS[tens]


def _counted(number: int, thing: str) -> str:
    return f"{cardinal(number)} {thing}" + ("s" if number > 1 else "")


def _minutes(number: int) -> str:
    """What stands before "past" or "to"; minutes that are no multiple of five are called minutes."""
    if number in (15, 30):
        return "a quarter" if number == 15 else "half"
    return cardinal(number) if number % 5 == 0 else _counted(number, "minute")


def _part_of_day(hour: int) -> str:
    if hour < 12:
        return "in the morning"
    return "in the afternoon" if hour < 18 else "in the evening"
