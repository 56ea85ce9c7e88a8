"""The quantities that the rules of pipeline/health.py judge, taken from what a run left: curves and final numbers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase

from pipeline.charts import Point, number
from pipeline.glossary import ORACLE, metric_of
from pipeline.health import Reading

TAIL = 0.1  # share of a curve's points that stands for where it ends, or begins
SMALL_SOURCE = 30  # held-out pairs below which the accuracy on a source says nothing
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


def of_stage(kind: str, series: Series, results: Numbers, facts: Numbers) -> dict[str, Reading]:
    """What a training stage's curves and final numbers give, by quantity; what was not measured is left out.

    Args:
        results: flat, the stage's own final numbers.
        facts: counts that no curve has: non_finite, steps thrown away; rows and cut_responses of the training data.
    """
    takes = {**TRAINING, **OF_KIND.get(kind, {})}
    found = {quantity: take(series, results, facts) for quantity, take in takes.items()}
    return {quantity: reading for quantity, reading in found.items() if reading is not None}


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
        "length_correlation": _correlation(other),
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


def _correlation(values: Numbers) -> Reading | None:
    """The strongest correlation with length, of the reward or of a part that is no oracle; its size is judged."""
    tags = [t for t, v in values.items() if t.endswith("length_correlation") and v is not None and "oracle:" not in t]
    if not tags:
        return None
    tag = max(tags, key=lambda tag: abs(values[tag]))
    name = tag.removeprefix("eval/").removeprefix("rewards/").removesuffix("/length_correlation")
    return Reading(abs(values[tag]), f"correlation of {name} with words {number(values[tag])}")


# of one stage's curves: (series, results, facts) -> reading

Take = Callable[[Series, Numbers, Numbers], Reading | None]


def _values(series: Series, *tags: str) -> list[float]:
    """The values of the first of `tags` that was logged."""
    return next(([value for _, value in series[tag]] for tag in tags if tag in series), [])


def _end(*tags: str, unit: str = "", share: bool = False) -> Take:
    def take(series: Series, results: Numbers, facts: Numbers) -> Reading | None:
        values = _values(series, *tags)
        if not values:
            return None
        end = tail(values)
        return Reading(end, f"{end:.0%}" if share else f"{number(end)}{unit}")

    return take


def _drift(*tags: str) -> Take:
    """Where the curve ends, as a factor of where it began."""

    def take(series: Series, results: Numbers, facts: Numbers) -> Reading | None:
        values = _values(series, *tags)
        if len(values) < 2 or head(values) <= 0:
            return None
        return Reading(tail(values) / head(values), f"{number(head(values))} to {number(tail(values))}")

    return take


def _clip(series: Series, results: Numbers, facts: Numbers) -> Reading | None:
    """The share at either bound, of the rows trained on; a bound that a method has not is not logged."""
    names = {"low": "lower", "high": "upper"}
    logged = {names[side]: _values(series, f"ratio/clip_fraction_{side}") for side in names}
    ends = {name: tail(values) for name, values in logged.items() if values}
    if not ends:
        return _end("ratio/clip_fraction", share=True)(series, results, facts)
    parts = ", ".join(f"{end:.0%} at the {name} bound" for name, end in ends.items())
    return Reading(sum(ends.values()), f"{sum(ends.values()):.0%} ({parts})")


def _last_correlation(series: Series, results: Numbers, facts: Numbers) -> Reading | None:
    return _correlation({tag: points[-1][1] for tag, points in series.items() if tag.startswith("eval/")})


def _overfit(series: Series, results: Numbers, facts: Numbers) -> Reading | None:
    values = _values(series, "eval/loss")
    if len(values) < 2 or min(values) <= 0:
        return None
    return Reading(values[-1] / min(values), f"lowest {number(min(values))}, at the end {number(values[-1])}")


def _best_step(series: Series, results: Numbers, facts: Numbers) -> Reading | None:
    step = results.get("model_step")
    return None if step is None else Reading(step, f"{step:,} of {results.get('steps', step):,}")


def _grad_spike(series: Series, results: Numbers, facts: Numbers) -> Reading | None:
    """The largest logged norm after the first tenth, which is the warm-up's, over the median."""
    values = _values(series, "train/grad_norm")
    if len(values) < 5 or statistics.median(values) <= 0:
        return None
    peak, middle = max(values[math.ceil(len(values) * TAIL) :]), statistics.median(values)
    return Reading(peak / middle, f"{number(peak)}, {number(peak / middle)} times the median")


def _non_finite(series: Series, results: Numbers, facts: Numbers) -> Reading | None:
    steps = max((points[-1][0] for points in series.values()), default=0)
    lost = facts.get("non_finite")
    return Reading(lost / steps, f"{lost:,} of {steps:,}") if lost is not None and steps else None


def _data_cut(series: Series, results: Numbers, facts: Numbers) -> Reading | None:
    cut, rows = facts.get("cut_responses"), facts.get("responses")
    return Reading(cut / rows, f"{cut:,} of {rows:,}") if cut is not None and rows else None


def _pair_lead(series: Series, results: Numbers, facts: Numbers) -> Reading | None:
    """By how many standard errors the accuracy exceeds that of length alone."""
    accuracy, alone, pairs = (results.get(f"eval/{name}") for name in ("accuracy", "length_accuracy", "pairs"))
    if None in (accuracy, alone, pairs):
        return None
    error = math.sqrt(max(accuracy * (1 - accuracy), 0.25 / pairs) / pairs)
    lead = (accuracy - alone) / error
    text = f"{number(accuracy)} against {number(alone)} on {pairs:,.0f} pairs, {number(lead)} standard errors"
    return Reading(lead, text)


def _pair_accuracy(series: Series, results: Numbers, facts: Numbers) -> Reading | None:
    """That of the weights kept; while training, the last."""
    kept = results.get("eval/accuracy")
    return Reading(kept, number(kept)) if kept is not None else _end("eval/accuracy")(series, results, facts)


def _source_accuracy(series: Series, results: Numbers, facts: Numbers) -> Reading | None:
    sources = [tag.removeprefix("eval/accuracy/") for tag in results if tag.startswith("eval/accuracy/")]
    large = [s for s in sources if (results.get(f"eval/pairs/{s}") or 0) >= SMALL_SOURCE]
    if not large:
        return None
    worst = min(large, key=lambda s: results[f"eval/accuracy/{s}"])
    value, pairs = results[f"eval/accuracy/{worst}"], results[f"eval/pairs/{worst}"]
    return Reading(value, f"{worst} {number(value)} on {pairs:,.0f} pairs")


def _pair_gap(series: Series, results: Numbers, facts: Numbers) -> Reading | None:
    trained, held_out = _values(series, "train/accuracy"), _values(series, "eval/accuracy")
    if not trained or not held_out:
        return None
    return Reading(tail(trained) - held_out[-1], f"{number(tail(trained))} against {number(held_out[-1])}")


TRAINING: Mapping[str, Take] = {
    "non_finite": _non_finite,
    "grad_spike": _grad_spike,
    "best_step": _best_step,
    "data_cut": _data_cut,
}
OF_KIND: Mapping[str, Mapping[str, Take]] = {
    "sft": {"overfit": _overfit},
    "reward": {
        "overfit": _overfit,
        "pair_lead": _pair_lead,
        "pair_accuracy": _pair_accuracy,
        "source_accuracy": _source_accuracy,
        "pair_gap": _pair_gap,
    },
    "rl": {
        "length": _drift("eval/completions/mean_length", "completions/mean_length"),
        "length_correlation": _last_correlation,
        "variety": _drift("eval/completions/distinct_2", "completions/distinct_2"),
        "repetition": _end("eval/completions/repetition", "completions/repetition", share=True),
        "cut": _end("eval/completions/clipped_fraction", "completions/clipped_fraction", share=True),
        "kl": _end("eval/objective/kl", "objective/kl", unit=" nats per response"),
        "kept": _end("advantage/kept_fraction", share=True),
        "value_r2": _end("value/r2"),
        "clip": _clip,
        "ess": _end("ratio/ess"),
        "entropy": _drift("objective/entropy"),
    },
}
