"""Readings of one stage, from its curves and final numbers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import NamedTuple

from pipeline.report import gains
from pipeline.report.checks import Numbers, Reading, in_errors
from pipeline.report.numbers import number
from pipeline.report.spec import Rule, rules
from pipeline.report.svg import Point

TAIL = 0.1  # share of a curve's points that stands for where it ends, or begins
SMALL_SOURCE = 30  # held-out pairs below which the accuracy on a source says nothing
GENERATED, SAVED = "rollout/generated_tokens", "esrl/tokens_saved"
ROUNDING = 1e-4  # of a mean that is 0 by construction, in standard deviations
DECODED = ("eval/reward", "eval/reward_se")
CHOOSERS = {
    "eval/reward": "eval/reward",
    "eval/gain/dr": "eval/gain/ess",
}  # what to raise: logged where it counts

Series = Mapping[str, Sequence[Point]]  # tag -> points in step order


class Left(NamedTuple):
    """What a stage left."""

    series: Series
    results: Numbers
    facts: Numbers

    def values(self, *tags: str) -> list[float]:
        """The values of the first of `tags` that was logged."""
        return next(([value for _, value in self.series[tag]] for tag in tags if tag in self.series), [])


Take = Callable[[Left], Reading | None]


def of_stage(kind: str, series: Series, results: Numbers, facts: Numbers) -> dict[str, Reading]:
    """What a training stage's curves and final numbers give, by quantity; what was not measured is left out.

    Args:
        results: flat, the stage's own final numbers.
        facts: counts that no curve has: non_finite, steps skipped; rows and cut_responses of the training data.
    """
    left = Left(series, results, facts)
    readings = {quantity: take(left) for quantity, take in {**TRAINING, **OF_KIND.get(kind, {})}.items()}
    if kind == "rl":
        readings |= {quantity: _of_curve(rule, left) for quantity, rule in rules().items() if rule.reads}
    return {quantity: readings[quantity] for quantity in rules() if readings.get(quantity) is not None}


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
    return statistics.fmean(values[-max(1, int(len(values) * TAIL)) :])


def head(values: Sequence[float]) -> float:
    """The mean of the first tenth: where a noisy curve begins."""
    return tail(values[::-1])


def total(points: Sequence[Point]) -> float:
    """The sum over all steps of what is logged as the mean per step since the point before."""
    starts = [0.0, *(step for step, _ in points)]
    return math.fsum(value * (step - start) for start, (step, value) in zip(starts, points, strict=False))


def spent(series: Series) -> dict[str, float]:
    """Tokens that a stage generated; and the share of tokens saved against k_max responses for all prompts."""
    if GENERATED not in series:
        return {}
    cost = {"generated_tokens": round(total(series[GENERATED]))}
    saved = dict(series.get(SAVED, ()))
    full = total([(step, tokens / (1.0 - saved.get(step, 0.0))) for step, tokens in series[GENERATED]])
    return cost | ({"tokens_saved": 1.0 - total(series[GENERATED]) / full} if saved and full else {})


def _of_curve(rule: Rule, left: Left) -> Reading | None:
    """What the rule itself says is to be read."""
    values = left.values(*rule.tags)
    if rule.where and rule.where not in left.series:
        return None
    if rule.reads != "drift":
        return _end(values, rule.reads == "share", rule.unit)
    if len(values) < 2 or head(values) <= 0:
        return None
    return Reading(tail(values) / head(values), f"{number(head(values))} to {number(tail(values))}")


def _end(values: Sequence[float], share: bool = False, unit: str = "") -> Reading | None:
    if not values:
        return None
    end = tail(values)
    return Reading(end, f"{end:.0%}" if share else f"{number(end)} {unit}".strip())


# of learning


def _overfit(left: Left) -> Reading | None:
    values = left.values("eval/loss")
    if len(values) < 2 or min(values) <= 0:
        return None
    return Reading(values[-1] / min(values), f"lowest {number(min(values))}, at the end {number(values[-1])}")


def _best_step(left: Left) -> Reading | None:
    """The first of the best evaluations: of highest reward where responses were judged, of highest estimated gain where
    logged ones told of one, else of lowest loss."""
    judged = next((tag for tag, marks in CHOOSERS.items() if marks in left.series), None)
    points = left.series.get(judged or "eval/loss", ())
    if len(points) < 2:
        return None
    step, _ = (max if judged else min)(points, key=itemgetter(1))
    return Reading(step, f"{step:,} of {points[-1][0]:,}")


def _grad_spike(left: Left) -> Reading | None:
    """The largest logged norm after the first tenth, which is the warm-up's, over the median."""
    values = left.values("train/grad_norm")
    if len(values) < 5 or statistics.median(values) <= 0:
        return None
    peak, middle = max(values[math.ceil(len(values) * TAIL) :]), statistics.median(values)
    return Reading(peak / middle, f"{number(peak)}, {number(peak / middle)} times the median")


def _non_finite(left: Left) -> Reading | None:
    steps = max((points[-1][0] for points in left.series.values()), default=0)
    return _part_of(left.facts.get("non_finite"), steps)


def _part_of(part: float | None, whole: float | None) -> Reading | None:
    return Reading(part / whole, f"{part:,} of {whole:,}") if part is not None and whole else None


# of reward models


def _pair_lead(left: Left) -> Reading | None:
    """By how many standard errors the accuracy exceeds that of length alone."""
    accuracy, alone, pairs = (left.results.get(f"eval/{name}") for name in ("accuracy", "length_accuracy", "pairs"))
    if None in (accuracy, alone, pairs):
        return None
    lead = (accuracy - alone) / math.sqrt(max(accuracy * (1 - accuracy), 0.25 / pairs) / pairs)
    text = f"{number(accuracy)} against {number(alone)} on {pairs:,.0f} pairs, {number(lead)} standard errors"
    return Reading(lead, text)


def _pair_accuracy(left: Left) -> Reading | None:
    """That of the weights kept; while training, the last."""
    kept = left.results.get("eval/accuracy")
    return Reading(kept, number(kept)) if kept is not None else _end(left.values("eval/accuracy"))


def _source_accuracy(left: Left) -> Reading | None:
    sources = [tag.removeprefix("eval/accuracy/") for tag in left.results if tag.startswith("eval/accuracy/")]
    pairs = {source: left.results.get(f"eval/pairs/{source}") or 0 for source in sources}
    accuracies = [(left.results[f"eval/accuracy/{s}"], s) for s in sources if pairs[s] >= SMALL_SOURCE]
    if not accuracies:
        return None
    accuracy, worst = min(accuracies)
    return Reading(accuracy, f"{worst} {number(accuracy)} on {pairs[worst]:,.0f} pairs")


def _pair_gap(left: Left) -> Reading | None:
    trained, held_out = left.values("train/accuracy"), left.values("eval/accuracy")
    if not trained or not held_out:
        return None
    return Reading(tail(trained) - held_out[-1], f"{number(tail(trained))} against {number(held_out[-1])}")


# of RL


def _clip(left: Left) -> Reading | None:
    """The share at either bound, of the rows trained on; a bound that a method has not is not logged."""
    logged = {name: left.values(f"ratio/clip_fraction_{tag}") for name, tag in (("lower", "low"), ("upper", "high"))}
    ends = {name: tail(values) for name, values in logged.items() if values}
    if not ends:
        return _end(left.values("ratio/clip_fraction"), share=True)
    parts = ", ".join(f"{end:.0%} at the {name} bound" for name, end in ends.items())
    return Reading(sum(ends.values()), f"{sum(ends.values()):.0%} ({parts})")


def _kept(left: Left) -> Reading | None:
    """The share of the rows that is learned from, of methods that choose by the advantage; others learn from all."""
    chooses = "advantage/mean" in left.series or "value/r2" in left.series
    if not chooses or "advantage/raised_fraction" in left.series:
        return None
    return _end(left.values("advantage/kept_fraction"), share=True)


def _lowered(left: Left) -> Reading | None:
    """How many times the nats of the start model the responses are now that are to become less likely."""
    now, start = left.values("eval/logps/lowered"), left.values("eval/logps/ref_lowered")
    if not now or not start or start[-1] >= 0:
        return None
    factor = now[-1] / start[-1]
    return Reading(factor, f"{number(start[-1])} to {number(now[-1])} nats, {number(factor)} times as many")


def _masked_gap(place: int) -> Take:
    """By how much masked inputs raise the held-out loss, at the first evaluation (0) or at the last (-1), in nats."""

    def take(left: Left) -> Reading | None:
        plain, masked = left.values("eval/loss"), left.values("eval/masked_loss")
        if not plain or not masked:
            return None
        text = f"{number(plain[place])} on whole inputs, {number(masked[place])} on masked ones"
        return Reading(masked[place] - plain[place], text)

    return take


def _carried_over(left: Left) -> Reading | None:
    """The change of the decoded responses' reward, in standard errors, where that of the greedy composition rose."""
    greedy, decoded = left.values("semi_offline/greedy_reward"), left.values(DECODED[0])
    if len(greedy) < 2 or len(decoded) < 2 or tail(greedy) <= head(greedy):
        return None
    first, last = ({tag: left.values(tag)[place] for tag in DECODED if tag in left.series} for place in (0, -1))
    parts = (f"{number(a)} to {number(b)}" for a, b in ((head(greedy), tail(greedy)), (decoded[0], decoded[-1])))
    text = "greedy compositions {}, decoded responses {}".format(*parts)
    return Reading(in_errors(DECODED[0], first, last), text)


def _estimated_gain(left: Left) -> Reading | None:
    """That of the weights kept, where nothing judged the policy's own responses."""
    found = {} if DECODED[0] in left.results else gains.of_training(left.results)
    return Reading(gains.above(found), gains.said(found)) if found else None


def _sampling_time(left: Left) -> Reading | None:
    made, whole = (left.series.get(f"perf/{name}_seconds", []) for name in ("sampling", "step"))
    if GENERATED not in left.series or not made or not total(whole):
        return None
    share, tokens = total(made) / total(whole), total(left.series[GENERATED])
    text = f"{tokens / left.series[GENERATED][-1][0]:,.0f} a step, {tokens:,.0f} in all, in {share:.0%} of the time"
    return Reading(share, text)


def _tokens_saved(left: Left) -> Reading | None:
    cost = spent(left.series)
    if "tokens_saved" not in cost:
        return None
    share, tokens = cost["tokens_saved"], cost["generated_tokens"]
    return Reading(share, f"{share:.0%}, {tokens:,} tokens in place of {tokens / (1.0 - share):,.0f}")


def _baseline(left: Left) -> Reading | None:
    """How far the mean advantage lies from 0, which it is where responses are compared with one another."""
    mean, spread = left.values("advantage/mean"), left.values("advantage/std")
    if GENERATED not in left.series or not mean or not spread or tail(spread) <= 0:
        return None
    distance = abs(tail(mean)) / tail(spread)
    text = f"mean advantage {number(tail(mean))}, {number(distance)} standard deviations"
    return Reading(distance, text) if distance > ROUNDING else None


TRAINING: Mapping[str, Take] = {
    "non_finite": _non_finite,
    "grad_spike": _grad_spike,
    "best_step": _best_step,
    "data_cut": lambda left: _part_of(left.facts.get("cut_responses"), left.facts.get("responses")),
}
OF_KIND: Mapping[str, Mapping[str, Take]] = {
    "sft": {"overfit": _overfit, "masked_end": _masked_gap(-1)},
    "reward": {
        "overfit": _overfit,
        "pair_lead": _pair_lead,
        "pair_accuracy": _pair_accuracy,
        "source_accuracy": _source_accuracy,
        "pair_gap": _pair_gap,
    },
    "rl": {
        "clip": _clip,
        "kept": _kept,
        "lowered": _lowered,
        "masked_start": _masked_gap(0),
        "carried_over": _carried_over,
        "estimated_gain": _estimated_gain,
        "baseline": _baseline,
        "tokens_saved": _tokens_saved,
        "sampling_time": _sampling_time,
    },
}
