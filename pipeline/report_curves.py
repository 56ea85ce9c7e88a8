"""One stage's curves as captioned charts, and what is to be said of values outside their healthy range."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from pipeline.chart_table import REST, Chart, charts_for
from pipeline.charts import COLOURS, Curve, Picture, Point, line_chart, number
from pipeline.glossary import Range
from pipeline.page import Key, cell, figure, folded, grid, heading, table

FOLDED = ("Speed", REST)  # groups behind a line to click on
TAIL = 0.1  # share of a curve's points that stands for where it ends, or begins

Series = Mapping[str, Sequence[Point]]  # tag -> points in step order


class Shown(NamedTuple):
    """What a stage's charts come to: their HTML and every warning they carry."""

    html: str
    warnings: list[str]


def series_of(rows: Sequence[Mapping[str, float | None]]) -> dict[str, list[Point]]:
    """Rows of metrics.jsonl as points by tag, in step order; nulls are left out."""
    series: dict[str, list[Point]] = {}
    for row in sorted(rows, key=lambda row: row["step"]):
        for tag, value in row.items():
            if tag not in ("step", "time") and value is not None:
                series.setdefault(tag, []).append((row["step"], value))
    return series


def show_curves(kind: str, series: Series, results: Mapping[str, object]) -> Shown:
    """All charts of a stage of this `kind`, grouped; `results` may hold the levels that some are compared with."""
    groups: dict[str, list[str]] = {}  # group -> figures
    once, warnings = [], []
    for chart, tags in charts_for(kind, list(series)):
        levels = _levels(chart, series, results)
        said = _warnings(chart, tags, series) + _below(chart, tags, series, levels)
        warnings += [f"{chart.title}: {words}" for words in said]
        curves = {tag: series[tag] for tag in tags if len(series[tag]) > 1}
        once += [_once(chart, tag, series[tag][0][1]) for tag in tags if tag not in curves]
        if curves:
            groups.setdefault(chart.group, []).append(_figure(chart, curves, levels, said))
    html = table(["measured once", "value", "healthy"], once) if once else ""
    for group in sorted(groups, key=FOLDED.__contains__):
        pictures = grid(groups[group])
        html += folded(group, pictures) if group in FOLDED else heading(3, group) + pictures
    return Shown(html, warnings)


def _once(chart: Chart, tag: str, value: float) -> list[str]:
    """A table row for what was measured a single time and so has no curve: its meaning, value and healthy range."""
    low, high = chart.healthy.low, chart.healthy.high
    wanted = [f"at least {low:g}" if low is not None else "", f"at most {high:g}" if high is not None else ""]
    healthy = " and ".join(filter(None, wanted)) if chart.healthy.against == "value" else ""
    name = tag if chart.group == REST else f"{chart.title}, {tag}"
    return [cell(name, chart.caption), cell(number(value)), cell(healthy)]


def _levels(chart: Chart, series: Series, results: Mapping[str, object]) -> list[tuple[float, str]]:
    """The baselines of `chart` that this stage measured: (value, words)."""
    found = []
    for tag, words in chart.baselines:
        value = series[tag][-1][1] if tag in series else results.get(tag)
        if isinstance(value, (int, float)):
            found.append((float(value), words))
    return found


def bounds(healthy: Range, values: Sequence[float]) -> tuple[float | None, float | None]:
    """The healthy range in units of the curve; open where the range is relative to something not above zero."""
    anchors = {"value": 1.0, "start": head(values), "lowest": min(values)}
    anchor = anchors[healthy.against]
    if anchor <= 0:
        return None, None
    return tuple(None if bound is None else bound * anchor for bound in (healthy.low, healthy.high))


def tail(values: Sequence[float]) -> float:
    """The mean of the last tenth: where a noisy curve ends."""
    count = max(1, int(len(values) * TAIL))
    return math.fsum(values[-count:]) / count


def head(values: Sequence[float]) -> float:
    """The mean of the first tenth: where a noisy curve begins."""
    return tail(values[::-1])


def outside(healthy: Range, low: float | None, high: float | None, value: float) -> tuple[str, str]:
    """What was wanted of `value` and why it matters; both empty inside the bounds."""
    if low is not None and value < low:
        return f"at least {number(low)}", healthy.below
    if high is not None and value > high:
        return f"at most {number(high)}", healthy.above
    return "", ""


def _warnings(chart: Chart, tags: Sequence[str], series: Series) -> list[str]:
    """One sentence for all curves of a chart that leave its range in the same way."""
    found: dict[str, list[str]] = {}  # reason -> facts
    for tag in tags:
        values = [value for _, value in series[tag]]
        wanted, reason = outside(chart.healthy, *bounds(chart.healthy, values), tail(values))
        if reason and fnmatchcase(tag, chart.healthy.judged):
            verb = "ends at" if len(values) > 1 else "is"
            found.setdefault(reason, []).append(f"{tag} {verb} {number(tail(values))} (healthy: {wanted})")
    return [f"{', '.join(facts)}: {reason}." for reason, facts in found.items()]


def _below(chart: Chart, tags: Sequence[str], series: Series, levels: Sequence[tuple[float, str]]) -> list[str]:
    """Held-out curves that end below a baseline."""
    ends = {tag: tail([value for _, value in series[tag]]) for tag in tags if tag.startswith("eval/")}
    return [
        f"{tag} ends at {number(end)}, no better than {words} ({number(level)})."
        for tag, end in ends.items()
        for level, words in levels
        if end <= level
    ]


def _figure(chart: Chart, series: Series, levels: Sequence[tuple[float, str]], warnings: Sequence[str]) -> str:
    names = _names(list(series))
    bases = list(dict.fromkeys(_base(tag) for tag in series))
    curves = []
    for tag, points in series.items():
        dotted = tag.startswith("eval/") and len(series) > 1
        colour = COLOURS[(bases.index(_base(tag)) + (dotted and len(bases) == 1)) % len(COLOURS)]
        curves.append(Curve(names[tag], colour, points, dotted))
    # A range that the first curve is not judged by, or against a curve's lowest point, is no band of the picture.
    drawable = fnmatchcase(next(iter(series)), chart.healthy.judged) and chart.healthy.against != "lowest"
    low, high = bounds(chart.healthy, [v for _, v in curves[0].points]) if drawable else (None, None)
    picture = Picture(curves, low, high, (*chart.marks, *levels), chart.axis)
    keys = [Key(c.name, c.colour, number(c.points[-1][1]), c.dotted) for c in curves]
    words = "; ".join(f"{c.name} from {number(c.points[0][1])} to {number(c.points[-1][1])}" for c in curves)
    return figure(chart.title, keys, line_chart(picture, f"{chart.title}: {words}"), chart.caption, warnings)


def _base(tag: str) -> str:
    """The quantity behind a tag, whether of training or of held-out data."""
    return tag.removeprefix("eval/").removeprefix("train/")


def _names(tags: Sequence[str]) -> dict[str, str]:
    """Short names for a legend: the parts in which the tags differ, and whether they are of held-out data."""
    paths = {tag: re.split("[/:]", _base(tag)) for tag in tags}
    common = 0  # parts that all tags end with, as in rewards/*/std
    while len({tuple(path[len(path) - common - 1 :]) for path in paths.values()}) == 1 and common < len(paths[tags[0]]):
        common += 1
    heads = {tag: path[: len(path) - common] for tag, path in paths.items()}
    shared = 0  # parts that all begin with
    while len({tuple(head[: shared + 1]) for head in heads.values()}) == 1 and shared < len(heads[tags[0]]):
        shared += 1
    names = {}
    for tag, parts in heads.items():
        name = "/".join(parts[shared:]).replace("_", " ")
        alone = "last" if len(tags) == 1 else "training"
        kind = "held-out" if tag.startswith("eval/") else "" if name else alone
        names[tag] = ", ".join(filter(None, [name, kind]))
    return names
