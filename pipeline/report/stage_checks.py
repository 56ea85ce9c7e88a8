"""Quantities that the rules judge: those of one stage, from its curves and final numbers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping

from pipeline.report.checks import Reading
from pipeline.report.readings import TAIL, Numbers, Series, correlation, head, noise, tail, total
from pipeline.report.svg import number

SMALL_SOURCE = 30  # held-out pairs below which the accuracy on a source says nothing
GENERATED, SAVED = "rollout/generated_tokens", "esrl/tokens_saved"
ROUNDING = 1e-4  # of a mean that is 0 by construction, in standard deviations
DECODED = ("eval/reward/mean", "eval/reward/se")

Take = Callable[[Series, Numbers, Numbers], Reading | None]  # (curves, final numbers, facts) -> reading


def of_stage(kind: str, series: Series, results: Numbers, facts: Numbers) -> dict[str, Reading]:
    """What a training stage's curves and final numbers give, by quantity; what was not measured is left out.

    Args:
        results: flat, the stage's own final numbers.
        facts: counts that no curve has: non_finite, steps thrown away; rows and cut_responses of the training data.
    """
    takes = {**TRAINING, **OF_KIND.get(kind, {})}
    found = {quantity: take(series, results, facts) for quantity, take in takes.items()}
    return {quantity: reading for quantity, reading in found.items() if reading is not None}


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
    return correlation({tag: points[-1][1] for tag, points in series.items() if tag.startswith("eval/")})


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


def _masked_gap(place: int) -> Take:
    """By how much masked inputs raise the held-out loss, at the first look (0) or at the last (-1), in nats."""

    def take(series: Series, results: Numbers, facts: Numbers) -> Reading | None:
        plain, masked = _values(series, "eval/loss"), _values(series, "eval/masked_loss")
        if not plain or not masked:
            return None
        text = f"{number(plain[place])} on whole inputs, {number(masked[place])} on masked ones"
        return Reading(masked[place] - plain[place], text)

    return take


def _carried_over(series: Series, results: Numbers, facts: Numbers) -> Reading | None:
    """The change of the decoded responses' reward, in standard errors, where that of the greedy composition rose."""
    greedy, decoded = _values(series, "semi_offline/greedy_reward"), series.get(DECODED[0], [])
    if len(greedy) < 2 or len(decoded) < 2 or tail(greedy) <= head(greedy):
        return None
    first, last = ({tag: series[tag][place][1] for tag in DECODED if tag in series} for place in (0, -1))
    change = (last[DECODED[0]] - first[DECODED[0]]) / (noise(DECODED[0], first, last) / 2 or 1.0)
    parts = (f"{number(a)} to {number(b)}" for a, b in ((head(greedy), tail(greedy)), (decoded[0][1], decoded[-1][1])))
    return Reading(change, "greedy compositions {}, decoded responses {}".format(*parts))


def spent(series: Series) -> dict[str, float]:
    """Tokens that a stage generated; and the share of tokens saved against k_max responses for all prompts."""
    if GENERATED not in series:
        return {}
    found = {"generated_tokens": round(total(series[GENERATED]))}
    saved = dict(series.get(SAVED, ()))
    full = total([(step, tokens / (1.0 - saved.get(step, 0.0))) for step, tokens in series[GENERATED]])
    return found | ({"tokens_saved": 1.0 - total(series[GENERATED]) / full} if saved and full else {})


def _sampling_time(series: Series, results: Numbers, facts: Numbers) -> Reading | None:
    made, all_of_it = (series.get(f"perf/{name}_seconds", []) for name in ("sampling", "step"))
    if GENERATED not in series or not made or not total(all_of_it):
        return None
    share, tokens = total(made) / total(all_of_it), total(series[GENERATED])
    text = f"{tokens / series[GENERATED][-1][0]:,.0f} a step, {tokens:,.0f} in all, in {share:.0%} of the time"
    return Reading(share, text)


def _tokens_saved(series: Series, results: Numbers, facts: Numbers) -> Reading | None:
    found = spent(series)
    if "tokens_saved" not in found:
        return None
    share, tokens = found["tokens_saved"], found["generated_tokens"]
    return Reading(share, f"{share:.0%}, {tokens:,} tokens in place of {tokens / (1.0 - share):,.0f}")


def _where_shared_out(tag: str) -> Take:
    """The end of a share that says something only where prompts differ in how many responses they get."""

    def take(series: Series, results: Numbers, facts: Numbers) -> Reading | None:
        return _end(tag, share=True)(series, results, facts) if SAVED in series else None

    return take


def _baseline(series: Series, results: Numbers, facts: Numbers) -> Reading | None:
    """How far the mean advantage lies from 0, which it is where responses are compared with one another."""
    mean, spread = (_values(series, f"advantage/{name}") for name in ("mean", "std"))
    if GENERATED not in series or not mean or not spread or tail(spread) <= 0:
        return None
    distance = abs(tail(mean)) / tail(spread)
    text = f"mean advantage {number(tail(mean))}, {number(distance)} standard deviations"
    return Reading(distance, text) if distance > ROUNDING else None


TRAINING: Mapping[str, Take] = {
    "non_finite": _non_finite,
    "grad_spike": _grad_spike,
    "best_step": _best_step,
    "data_cut": _data_cut,
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
        "masked_start": _masked_gap(0),
        "mask_rate": _end("semi_offline/mask_rate", share=True),
        "nothing_hidden": _end("semi_offline/nothing_hidden", share=True),
        "equal_rewards": _end("semi_offline/equal_rewards", share=True),
        "different_texts": _end("semi_offline/different_texts", share=True),
        "carried_over": _carried_over,
        "logp_gap": _end("rollout/logp_gap", unit=" nats per token"),
        "equal_groups": _end("rollout/equal_groups", share=True),
        "at_k_min": _end("esrl/at_k_min", share=True),
        "known": _where_shared_out("esrl/known"),
        "left_out": _where_shared_out("esrl/left_out"),
        "baseline": _baseline,
        "tokens_saved": _tokens_saved,
        "sampling_time": _sampling_time,
    },
}
