"""Several variants over several seeds: spreads, paired differences, the tables, and the page with its scatter plots."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from pipeline.report import figure, svg
from pipeline.report.html import render
from pipeline.report.numbers import fixed
from pipeline.report.spec import ORACLE, match

KL, X_NAME = "objective/kl", "KL from the start"
GAINED = {"oracle/mean": "oracle", "sampled/reward": "reward of samples", "reward": "reward"}  # the first that is there
SECOND = "rewards/second:*/mean"  # of the reward models of another seed
CHARTS = {  # over the KL: (title, caption)
    "reward": ("Reward", "What the policies were trained to raise. More is only better while the others follow."),
    "second/mean": (
        "Second reward models",
        "The same goal, learned from another seed and never trained against: gains that it does not see are of the "
        "first model's errors.",
    ),
    "oracle/mean": ("Oracle", "The truth, which the built-in task knows by construction."),
    "completions/mean_words": ("Words per response", "Gains that come with length alone are suspect."),
}

GAIN = "Gain over distance"
GAIN_CAPTION = (
    "Bars go from the least seed to the greatest; of one seed they hold 90 %, where the standard error is known. "
    "Also in gain.svg."
)

Metrics = Mapping[str, float]  # tag -> number, of one variant and seed
Table = Mapping[str, Mapping[str, Mapping[str, Any]]]  # {variant: {tag: spread}}


class Column(NamedTuple):
    """One column of the tables: a tag, or a pattern of tags; a '{}' in `title` is what its '*' stands for."""

    tag: str
    title: str
    digits: int
    differs: bool = False  # shown in the tables of differences too


COLUMNS = (
    Column("reward", "reward", 3, True),
    Column("second/mean", "second", 3, True),
    Column("oracle/mean", "oracle", 3, True),
    Column("rewards/*/mean", "{}", 3, True),
    Column("sampled/reward", "sampled: reward", 3, True),
    Column("sampled/rewards/*/mean", "sampled: {}", 3, True),
    Column("gain/estimate", "estimated gain", 3),
    Column("completions/mean_words", "words", 1, True),
    Column("completions/distinct_2", "distinct-2", 3, True),
    Column("completions/repetition", "repetition", 3, True),
    Column(KL, "KL", 2),
    Column("rl/kept_fraction", "kept", 2),
    Column("rl/value_r2", "value R2", 2),
    Column("rl/generated_tokens", "generated tokens", 0),
    Column("rl/tokens_saved", "saved", 2),
    Column("rl/seconds", "seconds", 0),
    Column("rl/cost", "step, in nll's", 2),
)


def with_sums(metrics: Metrics, weights: Mapping[str, float]) -> dict[str, float]:
    """The metrics with second/mean, the weighted sum of the second reward models as reward is of the first, and
    oracle/mean, the sum of the oracle's parts; neither where there is nothing to add."""
    second = [weights.get(match(tag, SECOND, "{}"), 1.0) * v for tag, v in metrics.items() if fnmatchcase(tag, SECOND)]
    oracle = [value for tag, value in metrics.items() if fnmatchcase(tag, ORACLE)]
    sums = {"second/mean": second, "oracle/mean": oracle}
    return {**metrics, **{tag: math.fsum(values) for tag, values in sums.items() if values}}


def spread(values: Mapping[int, float]) -> dict[str, Any]:
    """Of numbers by seed: mean, min, max, sd (of the sample; None for one seed), and the numbers."""
    numbers = list(values.values())
    return {
        "mean": statistics.fmean(numbers),
        "min": min(numbers),
        "max": max(numbers),
        "sd": statistics.stdev(numbers) if len(numbers) > 1 else None,
        "per_seed": dict(values),
    }


def summary(
    judged: Mapping[int, Mapping[str, Metrics]], baselines: Sequence[str]
) -> dict[str, dict[str, dict[str, Any]]]:
    """{variant: {tag: spread}} of {seed: {variant: metrics}}; `minus` holds the spread of the differences to each
    baseline, seed by seed. A number that is None or NaN for a seed is left out there."""
    first = next(iter(judged.values()))
    tags = list(dict.fromkeys(tag for metrics in first.values() for tag in metrics))
    values = {(variant, tag): _by_seed(judged, variant, tag) for variant in first for tag in tags}
    result: dict[str, dict[str, dict[str, Any]]] = {variant: {} for variant in first}
    for (variant, tag), own in values.items():
        if not own:
            continue
        minus = {}
        for baseline in baselines:
            other = values.get((baseline, tag), {})
            paired = {seed: own[seed] - other[seed] for seed in own if seed in other}
            if variant != baseline and paired:
                minus[baseline] = spread(paired)
        result[variant][tag] = {**spread(own), "minus": minus}
    return result


def markdown(table: Table, baselines: Sequence[str], seeds: Sequence[int]) -> str:
    """The tables of a comparison: the numbers, and the differences to each baseline that is there."""
    parts = [f"Means over the seeds {', '.join(map(str, seeds))}; in brackets the least and the greatest.", ""]
    for title, head, lines in tables(table, baselines):
        parts += ["", f"{title}:", ""] if title else []
        parts += ["| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines]]
    return "\n".join(parts) + "\n"


def document(title: str, table: Table, baselines: Sequence[str], seeds: Sequence[int]) -> str:
    """The whole page."""
    pictures = [(GAIN, drawn, GAIN_CAPTION)] if (drawn := gain_picture(table, baselines[0])) else []
    shown = [(tag, *words) for tag, words in CHARTS.items() if any(tag in metrics for metrics in table.values())]
    context = {
        "title": title,
        "seeds": seeds,
        "marks": [(name, svg.mark(place, name, 6, 6)) for place, name in enumerate(table)],
        "pictures": pictures
        + [(name, scatter(tag, table, f"{name} over {X_NAME}"), caption) for tag, name, caption in shown],
        "tables": tables(table, baselines),
    }
    return render("comparison.html", context)


def tables(table: Table, baselines: Sequence[str]) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, head, a line per variant): the numbers, without a title, then the differences to each baseline."""
    columns = _columns(table)
    parts = [("", columns, _lines(table, columns))]
    differing = [column for column in columns if column.differs]
    parts += [(f"Differences to {b}, seed by seed", differing, _lines(table, differing, b)) for b in baselines]
    return [(title, ["variant", *(one.title for one in own)], lines) for title, own, lines in parts if lines]


def gain_picture(table: Table, start: str) -> str | None:
    """What each policy gained over how far it went, an <svg> that can be a file; None where nothing was judged.

    By the oracle where there is one, else by the reward: that of plain samples, as the distance is, where it is known.
    """
    tag = next((one for one in GAINED if one in table[start]), None)
    found = [] if tag is None else figure.gained(table, tag, start, KL)
    if not found:
        return None
    return figure.picture(found, f"{GAINED[tag]}, over {start}", f"{X_NAME}, nats per response")


def scatter(tag: str, table: Table, description: str) -> str:
    """An <svg> of `tag` over the KL, a mark for each variant and seed that has both."""
    marks = [
        svg.Mark(place, f"{variant}, seed {seed}", metrics[KL]["per_seed"][seed], value)
        for place, (variant, metrics) in enumerate(table.items())
        if tag in metrics and KL in metrics
        for seed, value in metrics[tag]["per_seed"].items()
        if seed in metrics[KL]["per_seed"]
    ]
    return svg.scatter(marks, f"{X_NAME}, nats per response", description)


def _by_seed(judged: Mapping[int, Mapping[str, Metrics]], variant: str, tag: str) -> dict[int, float]:
    numbers = {seed: variants[variant].get(tag) for seed, variants in judged.items()}
    return {seed: value for seed, value in numbers.items() if value is not None and math.isfinite(value)}


def _columns(table: Table) -> list[Column]:
    """The columns that some variant has a number for; of the second reward models only their sum."""
    tags = dict.fromkeys(tag for metrics in table.values() for tag in metrics if not fnmatchcase(tag, SECOND))
    matched: dict[str, Column] = {}
    for column in COLUMNS:
        titles = {tag: match(tag, column.tag, column.title) for tag in tags if tag not in matched}
        matched |= {tag: column._replace(tag=tag, title=title) for tag, title in titles.items() if title}
    return list(matched.values())


def _lines(table: Table, columns: Sequence[Column], minus: str = "") -> list[list[str]]:
    """One line per variant, its name and its numbers; with `minus`, of the differences to that baseline."""
    lines = []
    for variant, metrics in table.items():
        spreads = [metrics.get(column.tag) for column in columns]
        if minus:
            spreads = [one["minus"].get(minus) if one else None for one in spreads]
        if any(spreads):
            shown = zip(spreads, columns, strict=True)
            lines.append([variant, *(_text(one, column.digits, "+" if minus else "") for one, column in shown)])
    return lines


def _text(value: Mapping[str, Any] | None, digits: int, sign: str) -> str:
    """'1.454 (1.421 .. 1.480)', the mean, the least and the greatest; without brackets for one seed."""
    if value is None:
        return ""
    mean, low, high = (fixed(value[key], digits, sign).replace(",", "") for key in ("mean", "min", "max"))
    return mean if len(value["per_seed"]) == 1 else f"{mean} ({low} .. {high})"
