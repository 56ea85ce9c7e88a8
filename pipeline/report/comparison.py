"""Numbers of several variants over several seeds: spreads, paired differences, the table. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from pipeline.report.spec import ORACLE, match
from pipeline.report.svg import MINUS

Metrics = Mapping[str, float]  # tag -> number, of one variant and seed
PerSeed = Mapping[int, float]


class Column(NamedTuple):
    """One column of the tables: a tag, or a pattern of tags; a '{}' in `title` is what its '*' stands for."""

    tag: str
    title: str
    digits: int
    differs: bool  # shown in the tables of differences too


COLUMNS = (
    Column("reward/mean", "reward", 3, True),
    Column("second/mean", "second", 3, True),
    Column("oracle/mean", "oracle", 3, True),
    Column("rewards/*/mean", "{}", 3, True),
    Column("completions/mean_length", "words", 1, True),
    Column("completions/distinct_2", "distinct-2", 3, True),
    Column("completions/repetition", "repetition", 3, True),
    Column("objective/kl", "KL", 2, False),
    Column("rl/kept_fraction", "kept", 2, False),
    Column("rl/value_r2", "value R2", 2, False),
    Column("rl/generated_tokens", "generated tokens", 0, False),
    Column("rl/tokens_saved", "saved", 2, False),
    Column("rl/seconds", "seconds", 0, False),
)


def with_sums(metrics: Metrics, weights: Mapping[str, float]) -> dict[str, float]:
    """The metrics with second/mean, the weighted sum of the second reward models as reward/mean is of the first, and
    oracle/mean, the sum of the oracle's parts; neither where there is nothing to add."""
    second = {tag: tag.removeprefix("rewards/second:").removesuffix("/mean") for tag in metrics if _is_second(tag)}
    oracle = [metrics[tag] for tag in metrics if fnmatchcase(tag, ORACLE)]
    found = dict(metrics)
    if second:
        weighted = [weights.get(name, 1.0) * metrics[tag] for tag, name in second.items()]
        found["second/mean"] = math.fsum(weighted)
    if oracle:
        found["oracle/mean"] = math.fsum(oracle)
    return found


def spread(values: PerSeed) -> dict[str, Any]:
    """mean, min, max, sd (of the sample; None for one seed), and the values by seed."""
    numbers = list(values.values())
    return {
        "mean": statistics.fmean(numbers),
        "min": min(numbers),
        "max": max(numbers),
        "sd": statistics.stdev(numbers) if len(numbers) > 1 else None,
        "per_seed": dict(values),
    }


def summary(
    found: Mapping[int, Mapping[str, Metrics]], baselines: Sequence[str]
) -> dict[str, dict[str, dict[str, Any]]]:
    """{variant: {tag: spread}} of {seed: {variant: metrics}}; `minus` holds the spread of the differences to each
    baseline, seed by seed. A number that is None or NaN for a seed is left out there."""
    first = next(iter(found.values()))
    variants = list(first)
    tags = list(dict.fromkeys(tag for metrics in first.values() for tag in metrics))
    values = {(v, tag): _by_seed(found, v, tag) for v in variants for tag in tags}
    result: dict[str, dict[str, dict[str, Any]]] = {variant: {} for variant in variants}
    for (variant, tag), own in values.items():
        if not own:
            continue
        minus = {}
        for baseline in baselines:
            other = values[baseline, tag] if baseline in variants else {}
            paired = {seed: own[seed] - other[seed] for seed in own if seed in other}
            if variant != baseline and paired:
                minus[baseline] = spread(paired)
        result[variant][tag] = {**spread(own), "minus": minus}
    return result


def columns_of(table: Mapping[str, Mapping[str, Any]]) -> list[Column]:
    """The columns that some variant has a number for; of the second reward models only their sum."""
    tags = list(dict.fromkeys(tag for metrics in table.values() for tag in metrics))
    found: dict[str, Column] = {}
    for column in COLUMNS:
        for tag in tags:
            title = match(tag, column.tag, column.title)
            if title and tag not in found and not _is_second(tag):
                found[tag] = column._replace(tag=tag, title=title)
    return list(found.values())


def text(value: Mapping[str, Any] | None, digits: int, sign: bool = False) -> str:
    """'1.454 (1.421 .. 1.480)', the mean, the least and the greatest; without brackets for one seed."""
    if value is None:
        return ""
    form = f"{{:{'+' if sign else ''}.{digits}f}}"
    mean, low, high = (form.format(value[key]).replace("-", MINUS) for key in ("mean", "min", "max"))
    return mean if len(value["per_seed"]) == 1 else f"{mean} ({low} .. {high})"


def rows(table: Mapping[str, Mapping[str, Any]], columns: Sequence[Column], minus: str = "") -> list[list[str]]:
    """One row per variant, its name and its cells; with `minus`, of the differences to that baseline."""
    found = []
    for variant, metrics in table.items():
        cells = [metrics.get(column.tag) for column in columns]
        if minus:
            cells = [cell["minus"].get(minus) if cell else None for cell in cells]
        if any(cells):
            shown = zip(cells, columns, strict=True)
            found.append([variant, *(text(cell, column.digits, bool(minus)) for cell, column in shown)])
    return found


def markdown(table: Mapping[str, Mapping[str, Any]], baselines: Sequence[str], seeds: Sequence[int]) -> str:
    """The tables of a comparison: the numbers, and the differences to each baseline that is there."""
    columns = columns_of(table)
    parts = [f"Means over the seeds {', '.join(map(str, seeds))}; in brackets the least and the greatest.", ""]
    parts += _table(["variant", *(column.title for column in columns)], rows(table, columns))
    differing = [column for column in columns if column.differs]
    for baseline in baselines:
        lines = rows(table, differing, baseline)
        if lines:
            parts += ["", f"Differences to {baseline}, seed by seed:", ""]
            parts += _table(["variant", *(column.title for column in differing)], lines)
    return "\n".join(parts) + "\n"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines]]


def _by_seed(found: Mapping[int, Mapping[str, Metrics]], variant: str, tag: str) -> dict[int, float]:
    numbers = {seed: variants[variant].get(tag) for seed, variants in found.items()}
    return {seed: value for seed, value in numbers.items() if value is not None and math.isfinite(value)}


def _is_second(tag: str) -> bool:
    return tag.startswith("rewards/second:") and tag.endswith("/mean")
