"""Whether a number is healthy: the rules of the files rules_*.py applied to readings of a run.

A rule judges one quantity, a number that pipeline/report/readings.py takes from a run. The charts draw the same limits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from pipeline.report.rules import TRAINING
from pipeline.report.rules_masking import MASKING
from pipeline.report.rules_responses import RESPONSES
from pipeline.report.rules_sampling import SAMPLING
from pipeline.report.spec import FINE, LOOK, TROUBLE, Limit, Rule

# by quantity, in the order in which they are told
RULES: Mapping[str, Rule] = {**RESPONSES, **TRAINING, **MASKING, **SAMPLING}
LEVELS = (TROUBLE, LOOK, FINE)  # gravest first


class Reading(NamedTuple):
    """A quantity as found in a run: the number that is judged, and how to say it."""

    value: float
    text: str


class Verdict(NamedTuple):
    """What a rule says of a reading. `why` is empty where all is fine."""

    quantity: str  # its key in RULES
    level: str
    text: str  # the reading in words
    words: str
    why: str

    @property
    def name(self) -> str:
        return RULES[self.quantity].name


def judge(quantity: str, reading: Reading) -> Verdict:
    """What the rule of `quantity` says of `reading`: the first limit it breaks, or that it is fine."""
    rule = RULES[quantity]
    for limit in rule.limits:
        if broken(limit, reading.value):
            return Verdict(quantity, limit.level, reading.text, limit.words, limit.why)
    return Verdict(quantity, FINE, reading.text, rule.fine, "")


def broken(limit: Limit, value: float) -> bool:
    return value < limit.low if limit.low is not None else value > limit.high


def band(quantity: str) -> tuple[float | None, float | None]:
    """The healthy range of a quantity: its tightest limits; None is open."""
    lows = [limit.low for limit in RULES[quantity].limits if limit.low is not None]
    highs = [limit.high for limit in RULES[quantity].limits if limit.high is not None]
    return max(lows, default=None), min(highs, default=None)


def wanted(quantity: str) -> str:
    """The healthy range in words: 'healthy from 0.2 to 0.8'."""
    low, high = band(quantity)
    unit = f" {RULES[quantity].unit}" if RULES[quantity].unit else ""
    if low is not None and high is not None:
        return f"healthy from {low:g} to {high:g}{unit}"
    return f"healthy from {low:g}{unit}" if low is not None else f"healthy up to {high:g}{unit}"
