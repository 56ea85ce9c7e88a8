"""Columns that judge the response of a row, as numbers by name: labels, thumbs, stars, attributes.

true, "up", a thumb up, "positive"  -> 1          4, "4", "4 stars", "★★★★☆"  -> 4
false, "down", a thumb down, "bad"  -> 0          "4/5", "4 out of 5"          -> 4, of 5
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pipeline.data import fields
from pipeline.data.fields import Columns, RowError

TRUTH, THUMB, NUMBER = "true or false", "thumbs up or down", "numbers"  # kinds of judgement, beside "of 5"
# column -> the kinds that it may hold; a `label` may as well be the class of a prompt
NAMES: Mapping[str, tuple[str, ...]] = {
    "label": (TRUTH,),
    "kto_tag": (TRUTH,),
    "thumbs": (TRUTH, THUMB, NUMBER),
    "feedback": (TRUTH, THUMB, NUMBER, "of"),
    "rating": (TRUTH, THUMB, NUMBER, "of"),
    "stars": (NUMBER, "of"),
}
WANTED = {TRUTH: "true or false", THUMB: "up or down", NUMBER: "a number of stars", "of": "as many of as many: 4/5"}
ATTRIBUTES = (  # of one response, as HelpSteer and UltraFeedback call them; the first must be there
    "helpfulness",
    "correctness",
    "coherence",
    "complexity",
    "verbosity",
    "honesty",
    "truthfulness",
    "instruction_following",
    "harmlessness",
)
TRUTHS = {"true": 1.0, "yes": 1.0, "false": 0.0, "no": 0.0}
THUMBS = {
    **dict.fromkeys(("up", "thumbs up", "thumb up", "thumbsup", "upvote", "👍", "positive", "good", "like"), 1.0),
    **dict.fromkeys(("down", "thumbs down", "thumb down", "thumbsdown", "downvote", "👎"), 0.0),
    **dict.fromkeys(("negative", "bad", "dislike"), 0.0),
}
SHADES = re.compile("[\ufe0f\U0001f3fb-\U0001f3ff]")  # the colour of a thumb
STARS = re.compile(r"([★⭐🌟]*)[☆✩]*")
WITH_UNIT = re.compile(r"(\d+(?:\.\d+)?) ?stars?")
OF = re.compile(r"(\d+(?:\.\d+)?) ?(?:/|out of|of) ?(\d+)(?: stars?)?")


class Judging(NamedTuple):
    """The columns of a file that judge its responses."""

    kinds: Mapping[str, str]  # column -> what it holds in every row
    unread: Mapping[str, str]  # column of that name -> why it is no judgement
    attributes: tuple[str, ...] = ()


def number(value: object, name: str) -> tuple[float, str]:
    """(the number that a judgement in column `name` stands for, its kind: TRUTH, THUMB, NUMBER or "of N").

    Raises RowError for what is none, or none that the column may hold.
    """
    kinds = NAMES.get(name, tuple(WANTED))
    found = _number(value)
    if found is not None and name in NAMES and kinds == (TRUTH,) and found[1] == NUMBER and found[0] in (0, 1):
        found = found[0], TRUTH
    if found is None or found[1].split()[0] not in {kind.split()[0] for kind in kinds}:
        wanted = " or ".join(WANTED[kind] for kind in kinds)
        raise RowError(f"{name}: {fields.described(value)}, wanted {wanted}")
    return found


def find(rows: Sequence[Columns], names: Sequence[str]) -> Judging:
    """The columns among `names` that judge in every one of `rows` that has a value there, all in one way."""
    kinds: dict[str, str] = {}
    unread: dict[str, str] = {}
    for name in names:
        values = [row[name] for row in rows if fields.has(row, name)]
        try:
            held = sorted({number(value, name)[1] for value in values})
        except RowError as error:
            unread[name] = str(error).removeprefix(f"{name}: ")
            continue
        if len(held) > 1:
            unread[name] = f"some {', some '.join(held)}"
        elif held:
            kinds[name] = held[0]
    return Judging(kinds, unread)


def attributes(rows: Sequence[Columns]) -> tuple[str, ...]:
    """The columns that score a response by aspects, numbers all; () unless helpfulness is one of two or more."""
    found = [name for name in ATTRIBUTES if any(fields.has(row, name) for row in rows)]
    numeric = [name for name in found if all(_is_number(row[name]) for row in rows if fields.has(row, name))]
    return tuple(numeric) if ATTRIBUTES[0] in numeric and len(numeric) > 1 else ()


def named(row: Columns, judged: Judging) -> Columns:
    """`row` with its judgements as `rewards` by name, and as its `reward` where one column alone judges.

    Raises RowError for a judgement that is missing, or of another kind than in the rows before.
    """
    if not judged.kinds and not judged.attributes:
        return row
    numbers = {name: _of_kind(row, name, kind) for name, kind in judged.kinds.items()}
    scores = {name: row[name] for name in judged.attributes if fields.has(row, name)}
    kept = {name: value for name, value in row.items() if name not in numbers and name not in judged.attributes}
    if "reward" in numbers:  # a column of another name that was said to be the reward
        kept["reward"] = numbers.pop("reward")
    elif len(numbers) == 1 and not judged.attributes:
        kept["reward"] = next(iter(numbers.values()))
    given, found = fields.mapping(row, "rewards"), numbers | scores
    if twice := [name for name, value in found.items() if given.get(name) not in (None, value)]:
        raise RowError(f"rewards: {twice[0]} is also a column, of another value, wanted each name once")
    rewards = {**given, **found}
    return {**kept, "rewards": rewards} if rewards else kept


def _of_kind(row: Columns, name: str, kind: str) -> float:
    if not fields.has(row, name):
        raise RowError(f"{name}: {'null' if name in row else 'missing'}, wanted {WANTED.get(kind, kind)}")
    value, found = number(row[name], name)
    if found != kind:
        raise RowError(f"{name}: {fields.described(row[name])}, wanted {WANTED.get(kind, kind)} as in other rows")
    return value


def _number(value: object) -> tuple[float, str] | None:
    if isinstance(value, bool):
        return float(value), TRUTH
    if isinstance(value, str) and (found := _spoken(value)):
        return found
    return (float(value), NUMBER) if _is_number(value) else None


def _spoken(value: str) -> tuple[float, str] | None:
    """A judgement in words or signs."""
    text = SHADES.sub("", value).strip().casefold()
    if text in TRUTHS:
        return TRUTHS[text], TRUTH
    if (words := text.replace("_", " ").replace("-", " ")) in THUMBS:
        return THUMBS[words], THUMB
    if text and (stars := STARS.fullmatch(text)):
        return float(len(stars[1])), NUMBER
    if unit := WITH_UNIT.fullmatch(text):
        return float(unit[1]), NUMBER
    if of := OF.fullmatch(text):
        return float(of[1]), f"of {of[2]}"
    return None


def _is_number(value: object) -> bool:
    try:
        fields.checked_number(value, "")
    except RowError:
        return False
    return True
