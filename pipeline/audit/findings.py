"""What an audit found, in words that one can act on: the most serious first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from pipeline.audit.learnable import FEW, FEWEST_PROMPTS, FEWEST_ROWS, LEARN
from pipeline.report.numbers import number, signed
from pipeline.report.spec import FINE, LEVELS, LOOK, TROUBLE

MOST = 5  # lines beside the headline
CUTS = 0.1  # share of texts that are too long
LENGTH_SHARE = 0.8  # of the gain, that following the length alone would bring
FOLLOWS_LENGTH = 0.3  # a correlation
MANY = 0.05  # share of rows that are odd, or repeat others
TORN = 0.1  # share of rows that are rated in two ways
FEW_KEPT = 0.2  # share of rows

Numbers = Mapping[str, float]  # "<part>/<name>" -> value, as in results.json


class Finding(NamedTuple):
    """One line: how serious it is, what was found, what to do."""

    level: str  # of report.spec.LEVELS
    text: str
    do: str


def headline(verdict: str, n: Numbers) -> Finding:
    """The verdict on the whole log, and what to do with it."""
    of = f"{n['prompts/rows']:,.0f} rows of {n['prompts/prompts']:,.0f} prompts"
    if n["rewards/levels"] == 1:
        same = f"nothing to learn: all {n['prompts/rows']:,.0f} rewards are {number(n['rewards/mean'])}"
        return Finding(TROUBLE, same, "give rewards that tell good answers from bad ones")
    if verdict == FEW:
        wanted = f"{FEW}: {of}, wanted {FEWEST_ROWS} of {FEWEST_PROMPTS} prompts or more"
        return Finding(LOOK, wanted, "collect more; one can train on these, and nothing will tell whether it helped")
    low, high = (signed(n[f"learning/gain/{end}"]) for end in ("low", "high"))
    gain = f"{signed(n['learning/gain/estimate'])} (90 % interval {low} .. {high})"
    if verdict == LEARN:
        spread = number(n["learning/gain/estimate"] / n["rewards/std"])
        told = f"something to learn: by what words tell of {of}, a gain of {gain}, {spread} standard deviations"
        return Finding(FINE, told, "train on it")
    nothing = f"nothing to learn: words do not tell which of {of} are better, predicted gain {gain}"
    return Finding(TROUBLE, nothing, "look whether rewards stand beside the right answers, before you train")


def of_numbers(n: Numbers) -> list[Finding]:
    """At most MOST lines beside the headline, by how much they matter."""
    found = [*_of_rewards(n), *_of_rows(n), *_of_texts(n)]
    return sorted(found, key=lambda one: LEVELS.index(one.level))[:MOST]


def _of_rewards(n: Numbers) -> Iterator[Finding]:
    gain, length, follows = (n[f"learning/{name}"] for name in ("gain/estimate", "length/gain", "length/correlation"))
    if abs(follows) > FOLLOWS_LENGTH and length > LENGTH_SHARE * gain > 0:
        which = "longer" if follows > 0 else "shorter"
        told = f"{which} answers earn more (correlation {number(follows)}): that alone would gain {signed(length)}"
        yield Finding(TROUBLE, told, "check that length is what you want; else balance the rewards for it")
    if n["rewards/outliers"]:
        ends = f"{number(n['rewards/min'])} .. {number(n['rewards/max'])}, the middle is {number(n['rewards/q50'])}"
        told = f"{n['rewards/outliers']:,.0f} rewards lie far out ({ends})"
        yield Finding(LOOK, told, "check them: a single one can weigh as much as hundreds of rows")
    if n["learning/kept"] < FEW_KEPT and n["rewards/levels"] > 1:
        told = f"A-LOL would keep {n['learning/kept']:.0%} of the rows, as few do better than expected"
        yield Finding(LOOK, told, "more good answers would help")


def _of_rows(n: Numbers) -> Iterator[Finding]:
    rows, torn = n["prompts/rows"], n["duplicates/conflicting"]
    if torn:
        apart = f"by {number(n['duplicates/conflict_spread'])} on average"
        told = f"{torn:,.0f} rows ({torn / rows:.1%}) have a prompt and an answer that are rated otherwise too, {apart}"
        yield Finding(
            TROUBLE if torn > TORN * rows else LOOK, told, "average their rewards, or find out which is right"
        )
    if n["duplicates/repeated"] > MANY * rows:
        told = f"{n['duplicates/repeated']:,.0f} rows repeat an earlier one"
        yield Finding(LOOK, told, "drop them, unless they are to count twice")
    if n["prompts/held_out_too"]:
        told = f"{n['prompts/held_out_too']:,.0f} held-out prompts stand in train too"
        yield Finding(LOOK, told, "take them out of one of the two: known prompts flatter")


def _of_texts(n: Numbers) -> Iterator[Finding]:
    rows = n["prompts/rows"]
    for what, setting in (("prompts", "max_prompt_length"), ("answers", "max_response_length")):
        if (share := n[f"lengths/long_{what}"] / rows) > CUTS:
            limit = f"data.{setting}={n[f'lengths/{setting}']:,.0f}"
            yield Finding(
                LOOK, f"about {share:.0%} of the {what} are longer than {limit}, and cut", f"raise data.{setting}"
            )
    for key, count in n.items():
        part, _, name = key.partition("/")
        if part == "oddities" and count > MANY * rows and name != "refusals":
            yield Finding(LOOK, f"{count:,.0f} rows: {name}", "look at the first of them, which the page names")
