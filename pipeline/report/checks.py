"""Whether a number is healthy: a reading taken from a run, judged by its rule. Here: readings of two policies.

Those of a stage's curves are in stage_checks.py; the rules in measures/*.yaml.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from pipeline.report.numbers import number
from pipeline.report.spec import FINE, ORACLE, metric_of, rules, wanted

MINOR = (0.02, 0.005)  # a change within this share, or this much, says nothing where no standard error is known
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
    words: str  # what it means, and what to do
    why: str  # why the limit lies there; empty where all is fine

    @property
    def warning(self) -> str:
        """For below a chart; empty where all is fine."""
        return "" if self.level == FINE else f"{self.level}. {self.text}: {self.words}."


def judge(quantity: str, reading: Reading) -> Verdict:
    """What the rule of `quantity` says of `reading`: the first limit it breaks, or that it is fine."""
    rule = rules()[quantity]
    for limit in rule.limits:
        if limit.broken(reading.value):
            return Verdict(rule.name, limit.level, reading.text, limit.words, limit.why)
    return Verdict(rule.name, FINE, reading.text, wanted(quantity), "")


def of_policies(base: Numbers, other: Numbers, monitors: Sequence[str] = ()) -> dict[str, Reading]:
    """What an evaluation gives for one policy beside the first, by quantity.

    `monitors` are the rewards that nothing was trained on.
    """
    both = [tag for tag in other if other[tag] is not None and base.get(tag) is not None]
    kl = other.get("objective/kl")
    readings = {
        "gain": _least_change(base, other, [tag for tag in both if tag == "reward"]),
        "length": _factor(base, other, "completions/mean_words", " words"),
        "variety": _factor(base, other, "completions/distinct_2"),
        "repetition": _share(base, other, "completions/repetition"),
        "cut": _share(base, other, "completions/clipped_ratio"),
        "length_correlation": correlation(other),
        "kl": None if kl is None else Reading(kl, f"{number(kl)} nats per response"),
    }
    if "reward" in both and other["reward"] > base["reward"]:
        watching = {f"rewards/{name}/mean" for name in monitors}
        unseen = [tag for tag in both if fnmatchcase(tag, ORACLE) or tag in watching]
        parts = [tag for tag in both if fnmatchcase(tag, "rewards/*/mean") and tag not in unseen]
        readings |= {"unseen": _least_change(base, other, unseen), "parts": _least_change(base, other, parts)}
    return {quantity: reading for quantity, reading in readings.items() if reading is not None}


def noise(tag: str, base: Numbers, other: Numbers) -> float:
    """The change that says nothing: two standard errors of a difference, or MINOR where no error is known."""
    errors = [error_of(values, tag) for values in (base, other)]
    return max(MINOR[0] * abs(base[tag]), MINOR[1]) if None in errors else 2 * math.hypot(*errors)


def in_errors(tag: str, base: Numbers, other: Numbers) -> float:
    """The change in standard errors."""
    return (other[tag] - base[tag]) / (noise(tag, base, other) / 2 or 1.0)


def error_names(tag: str) -> list[str]:
    """Where the standard error of `tag` may be: x_se beside x, or x/se beside x/mean."""
    return [f"{tag}_se", *([tag.removesuffix("mean") + "se"] if tag.endswith("/mean") else [])]


def error_of(values: Numbers, tag: str) -> float | None:
    return next((values[name] for name in error_names(tag) if values.get(name) is not None), None)


def correlation(values: Numbers) -> Reading | None:
    """The strongest correlation with length, of the reward or of a part that is no oracle; its size is judged."""
    tags = [t for t, v in values.items() if t.endswith("length_correlation") and v is not None and "oracle:" not in t]
    if not tags:
        return None
    tag = max(tags, key=lambda tag: abs(values[tag]))
    name = tag.removeprefix("eval/").removeprefix("rewards/")[: -len("/length_correlation")]
    return Reading(abs(values[tag]), f"correlation of {name} with words {number(values[tag])}")


def _least_change(base: Numbers, other: Numbers, tags: Sequence[str]) -> Reading | None:
    """The change, in standard errors, of the tag that gained least."""
    if not tags:
        return None
    change, tag = min((in_errors(tag, base, other), tag) for tag in tags)
    label = "" if tag == "reward" else f"{metric_of(tag)[1]} "
    unknown = None in [error_of(values, tag) for values in (base, other)]
    behind = "" if unknown else f", {number(change)} standard errors"
    return Reading(change, f"{label}{number(base[tag])} to {number(other[tag])}{behind}")


def _factor(base: Numbers, other: Numbers, tag: str, unit: str = "") -> Reading | None:
    before, after = base.get(tag), other.get(tag)
    if before is None or after is None or before <= 0:
        return None
    return Reading(after / before, f"{number(before)} to {number(after)}{unit}")


def _share(base: Numbers, other: Numbers, tag: str) -> Reading | None:
    """The other policy's share is judged; the first's stands beside it."""
    before, after = base.get(tag), other.get(tag)
    if after is None:
        return None
    return Reading(after, f"{after:.0%}" if before is None else f"{before:.0%} to {after:.0%}")
