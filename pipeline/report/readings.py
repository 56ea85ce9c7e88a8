"""Quantities that the rules judge: of two policies side by side; and what all readings share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from pipeline.report.checks import Reading
from pipeline.report.spec import ORACLE, metric_of
from pipeline.report.svg import Point, number

TAIL = 0.1  # share of a curve's points that stands for where it ends, or begins
MINOR = (0.02, 0.005)  # a change within this share, or this much, says nothing where no standard error is known

Series = Mapping[str, Sequence[Point]]  # tag -> points in step order
Numbers = Mapping[str, float | None]  # tag -> final number


def series_of(rows: Sequence[Mapping[str, float | None]]) -> dict[str, list[Point]]:
    """Rows of metrics.jsonl as points by tag, in step order; nulls are left out."""
    series: dict[str, list[Point]] = {}
    for row in sorted(rows, key=lambda row: row["step"]):
        for tag, value in row.items():
            if tag not in ("step", "time") and value is not None:
                series.setdefault(tag, []).append((row["step"], value))
    return series


def tail(values: Sequence[float]) -> float:
    """The mean of the last tenth: where a noisy curve ends."""
    count = max(1, int(len(values) * TAIL))
    return math.fsum(values[-count:]) / count


def head(values: Sequence[float]) -> float:
    """The mean of the first tenth: where a noisy curve begins."""
    return tail(values[::-1])


def total(points: Sequence[Point]) -> float:
    """The sum over all steps of what is logged as the mean per step since the point before."""
    starts = [0.0, *(step for step, _ in points)]
    return math.fsum(value * (step - start) for start, (step, value) in zip(starts, points, strict=False))


def of_policies(base: Numbers, other: Numbers, monitors: Sequence[str] = ()) -> dict[str, Reading]:
    """What an evaluation gives for one policy beside the first, by quantity.

    Args:
        monitors: the rewards that nothing was trained on.
    """
    both = [tag for tag in other if other[tag] is not None and base.get(tag) is not None]
    found = {
        "gain": _least_change(base, other, [tag for tag in both if tag == "reward/mean"]),
        "length": _factor(base, other, "completions/mean_length", " words"),
        "variety": _factor(base, other, "completions/distinct_2"),
        "repetition": _share(base, other, "completions/repetition"),
        "cut": _share(base, other, "completions/clipped_fraction"),
        "length_correlation": correlation(other),
        "kl": _final(other, "objective/kl", " nats per response"),
    }
    rose = "reward/mean" in both and other["reward/mean"] > base["reward/mean"]
    watching = {f"rewards/{name}/mean" for name in monitors}
    unseen = [tag for tag in both if fnmatchcase(tag, ORACLE) or tag in watching]
    parts = [tag for tag in both if fnmatchcase(tag, "rewards/*/mean") and tag not in unseen]
    if rose:
        found["unseen"] = _least_change(base, other, unseen)
        found["parts"] = _least_change(base, other, parts)
    return {quantity: reading for quantity, reading in found.items() if reading is not None}


def noise(tag: str, base: Numbers, other: Numbers) -> float:
    """The change that says nothing: two standard errors of a difference, or MINOR where no error is known."""
    errors = [error_of(values, tag) for values in (base, other)]
    return max(MINOR[0] * abs(base[tag]), MINOR[1]) if None in errors else 2 * math.hypot(*errors)


def error_names(tag: str) -> list[str]:
    """Where the standard error of `tag` may be: x_se beside x, or x/se beside x/mean."""
    return [f"{tag}_se", *([tag.removesuffix("mean") + "se"] if tag.endswith("/mean") else [])]


def error_of(values: Numbers, tag: str) -> float | None:
    return next((values[name] for name in error_names(tag) if values.get(name) is not None), None)


# of two policies


def _least_change(base: Numbers, other: Numbers, tags: Sequence[str]) -> Reading | None:
    """The change, in standard errors, of the tag that gained least."""
    changes = {tag: (other[tag] - base[tag]) / (noise(tag, base, other) / 2 or 1.0) for tag in tags}
    if not changes:
        return None
    tag = min(changes, key=changes.__getitem__)
    label = "" if tag == "reward/mean" else f"{metric_of(tag)[1]} "
    errors = [error_of(values, tag) for values in (base, other)]
    behind = "" if None in errors else f", {number(changes[tag])} standard errors"
    return Reading(changes[tag], f"{label}{number(base[tag])} to {number(other[tag])}{behind}")


def _factor(base: Numbers, other: Numbers, tag: str, unit: str = "") -> Reading | None:
    before, after = base.get(tag), other.get(tag)
    if before is None or after is None or before <= 0:
        return None
    return Reading(after / before, f"{number(before)} to {number(after)}{unit}")


def _final(values: Numbers, tag: str, unit: str = "") -> Reading | None:
    value = values.get(tag)
    return None if value is None else Reading(value, f"{number(value)}{unit}")


def _share(base: Numbers, other: Numbers, tag: str) -> Reading | None:
    """The other policy's share is judged; the first's stands beside it."""
    before, after = base.get(tag), other.get(tag)
    if after is None:
        return None
    return Reading(after, f"{after:.0%}" if before is None else f"{before:.0%} to {after:.0%}")


def correlation(values: Numbers) -> Reading | None:
    """The strongest correlation with length, of the reward or of a part that is no oracle; its size is judged."""
    tags = [t for t, v in values.items() if t.endswith("length_correlation") and v is not None and "oracle:" not in t]
    if not tags:
        return None
    tag = max(tags, key=lambda tag: abs(values[tag]))
    name = tag.removeprefix("eval/").removeprefix("rewards/").removesuffix("/length_correlation")
    return Reading(abs(values[tag]), f"correlation of {name} with words {number(values[tag])}")
