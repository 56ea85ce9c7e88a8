"""Whether a number is healthy: a reading taken from a run, judged by its rule. Here: readings of two policies.

Those of a stage's curves are in stage_checks.py; the rules in measures/*.yaml. The table of an evaluation shows the
verdicts made here, and no others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from pipeline.config.reward_spec import possible_labels
from pipeline.report import gains
from pipeline.report.numbers import number
from pipeline.report.spec import FINE, metric_of, rules, wanted

MINOR = (0.02, 0.005)  # a change within this share, or this much, says nothing where no standard error is known
REWARD = "reward"
Numbers = Mapping[str, float | None]  # tag -> final number


class Reading(NamedTuple):
    """A quantity as found in a run: the number that is judged, and how to say it."""

    value: float
    text: str


class Verdict(NamedTuple):
    """What a rule says of a reading."""

    name: str  # of the quantity
    level: str
    text: str  # the reading in words
    means: str
    do: str  # empty where all is fine
    why: str  # why the limit lies there; empty where all is fine

    @property
    def warning(self) -> str:
        """For below a chart; empty where all is fine."""
        return "" if self.level == FINE else f"{self.level}. {self.text}: {self.means}. What to do: {self.do}."


def judge(quantity: str, reading: Reading) -> Verdict:
    """What the rule of `quantity` says of `reading`: the first limit it breaks, or that it is fine."""
    rule = rules()[quantity]
    for limit in rule.limits:
        if limit.broken(reading.value):
            return Verdict(rule.name, limit.level, reading.text, limit.means, limit.do, limit.why)
    return Verdict(rule.name, FINE, reading.text, wanted(quantity), "", "")


def of_policies(base: Numbers, other: Numbers, monitors: Sequence[str] = ()) -> dict[str, Verdict]:
    """What an evaluation says of one policy beside the first, by tag: one verdict for each number that has a rule.

    `monitors` are the rewards that nothing was trained on.
    """
    readings = readings_of(base, other, monitors)
    return {tag: judge(quantity, reading) for tag, (quantity, reading) in readings.items()}


def _tag_of(name: str, numbers: Numbers) -> str:
    """The tag of a reward's mean, whatever it is called for short."""
    tags = [f"rewards/{label}/mean" for label in possible_labels(name)]
    return next((tag for tag in tags if tag in numbers), tags[0])


def readings_of(base: Numbers, other: Numbers, monitors: Sequence[str] = ()) -> dict[str, tuple[str, Reading]]:
    """By tag: under which rule it falls, and what is read. Parts of the reward are read where the reward itself rose,
    and are more than its copy."""
    watched = {_tag_of(name, other) for name in monitors}
    rose = None not in (base.get(REWARD), other.get(REWARD)) and other[REWARD] > base[REWARD]
    readings = {}
    for tag, value in other.items():
        quantity = "unseen" if tag in watched else metric_of(tag)[0].check
        if not quantity or value is None:
            continue
        if quantity in ("unseen", "parts") and (not rose or is_copy(tag, (base, other))):
            continue
        reading = TAKES[quantity](base, other, tag)
        if reading is not None:
            readings[tag] = (quantity, reading)
    return readings


def is_copy(tag: str, policies: Sequence[Numbers]) -> bool:
    """Whether a part of the reward is all of it: the same number as the reward for every policy."""
    return tag != REWARD and all(values.get(tag) == values.get(REWARD) for values in policies)


def noise(tag: str, base: Numbers, other: Numbers) -> float:
    """The change that says nothing: two standard errors of a difference, or MINOR where no error is measured.

    Where one is and is not finite, as of a single response, every change says nothing.
    """
    errors = [error_of(values, tag) for values in (base, other)]
    if None not in errors:
        return 2 * math.hypot(*errors)
    measured = any(name in values for name in error_names(tag) for values in (base, other))
    return math.inf if measured else max(MINOR[0] * abs(base[tag]), MINOR[1])


def in_errors(tag: str, base: Numbers, other: Numbers) -> float:
    """The change in standard errors; infinite where there is one and no noise, as between two constants."""
    change, one = other[tag] - base[tag], noise(tag, base, other) / 2
    return change / one if one else math.copysign(math.inf, change) if change else 0.0


def error_names(tag: str) -> list[str]:
    """Where the standard error of `tag` may be: x_se beside x, or x/se beside x/mean."""
    return [f"{tag}_se", *([tag.removesuffix("mean") + "se"] if tag.endswith("/mean") else [])]


def error_of(values: Numbers, tag: str) -> float | None:
    return next((values[name] for name in error_names(tag) if values.get(name) is not None), None)


def _change(base: Numbers, other: Numbers, tag: str) -> Reading | None:
    """The change in standard errors."""
    if base.get(tag) is None:
        return None
    change = in_errors(tag, base, other)
    label = "" if tag == REWARD else f"{metric_of(tag)[1]} "
    unknown = None in [error_of(values, tag) for values in (base, other)]
    behind = "" if unknown or math.isinf(change) else f", {number(change)} standard errors"
    return Reading(change, f"{label}{number(base[tag])} to {number(other[tag])}{behind}")


def _factor(base: Numbers, other: Numbers, tag: str, unit: str = "") -> Reading | None:
    before, after = base.get(tag), other[tag]
    if before is None or before <= 0:
        return None
    return Reading(after / before, f"{number(before)} to {number(after)}{unit}")


def _share(base: Numbers, other: Numbers, tag: str) -> Reading:
    """The other policy's share is judged; the first's stands beside it."""
    before, after = base.get(tag), other[tag]
    return Reading(after, f"{after:.0%}" if before is None else f"{before:.0%} to {after:.0%}")


def _plain(base: Numbers, other: Numbers, tag: str, unit: str = "") -> Reading:
    """The other policy's number is judged; the first's stands beside it."""
    before, after = base.get(tag), other[tag]
    return Reading(after, ("" if before is None else f"{number(before)} to ") + number(after) + unit)


TAKES: Mapping[str, Callable[[Numbers, Numbers, str], Reading | None]] = {
    "gain": _change,
    "unseen": _change,
    "parts": _change,
    "length": lambda base, other, tag: _factor(base, other, tag, " words"),
    "variety": _factor,
    "repetition": _share,
    "cut": _share,
    "length_correlation": _plain,
    "kl": lambda base, other, tag: _plain({}, other, tag, " nats per response"),
    "estimated_gain": lambda base, other, tag: Reading(gains.above(other, tag), gains.said(other, tag)),
}
