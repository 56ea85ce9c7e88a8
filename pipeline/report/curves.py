"""One stage's curves as captioned charts, each with its limits, its verdict and its numbers as a table."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pipeline.report.checks import Verdict
from pipeline.report.html import render
from pipeline.report.numbers import number
from pipeline.report.spec import REST, START, Chart, Rule, band, charts_for, rules, wanted
from pipeline.report.stage_checks import Series, head
from pipeline.report.svg import COLOURS, Curve, Plot, line_chart, thin
from pipeline.report.tables import Cell

FOLDED = ("Speed", REST)  # groups behind a line to click on
TWIN_ROWS = 8  # of a chart's numbers as a table


class Figure(NamedTuple):
    """One chart with what stands around it."""

    chart: Chart
    curves: Sequence[Curve]
    svg: str
    warning: str  # may be empty
    rule: Rule | None
    wanted: str  # the healthy range in words
    rows: list[list[str]]  # the numbers as a table
    thinned: bool  # of these, fewer than there are


def show_curves(
    kind: str, series: Series, results: Mapping[str, object], verdicts: Mapping[str, Verdict] | None = None
) -> str:
    """All charts of a stage of this `kind`, grouped.

    Args:
        results: may hold the levels that some charts are compared with.
        verdicts: what was found about the stage, by quantity; each stands below the chart of its rule.
    """
    groups: dict[str, list[Figure]] = {}
    once, found = [], verdicts or {}
    for chart, tags in charts_for(kind, list(series)):
        verdict = found.get(chart.check)
        curves = {tag: series[tag] for tag in tags if len(series[tag]) > 1}
        once += [_once(chart, tag, series[tag][0][1], verdict) for tag in tags if tag not in curves]
        if curves:
            groups.setdefault(chart.group, []).append(_figure(chart, curves, _levels(chart, series, results), verdict))
    return render("curves.html", {"once": once, "groups": groups, "folded": FOLDED})


def bounds(quantity: str, values: Sequence[float]) -> tuple[float | None, float | None]:
    """The healthy range in units of the curve; open where it is relative to a start that is not above zero."""
    if not quantity or not rules()[quantity].drawn:
        return None, None
    low, high = band(quantity)
    if rules()[quantity].unit != START:
        return low, high
    if head(values) <= 0:
        return None, None
    return tuple(None if bound is None else bound * head(values) for bound in (low, high))


def _once(chart: Chart, tag: str, value: float, verdict: Verdict | None) -> list[str | Cell]:
    """A table row for what was measured a single time and so has no curve: its meaning, value and healthy range."""
    name = tag if chart.group == REST else f"{chart.title}, {tag}"
    healthy = wanted(chart.check).removeprefix("healthy ") if chart.check and rules()[chart.check].drawn else ""
    warning = "" if verdict is None else verdict.warning
    return [Cell(name, f"{chart.caption} {warning}".strip()), number(value), healthy]


def _levels(chart: Chart, series: Series, results: Mapping[str, object]) -> list[tuple[float, str]]:
    """The baselines of `chart` that this stage measured: (value, words)."""
    values = {tag: series[tag][-1][1] if tag in series else results.get(tag) for tag in chart.baselines}
    return [(float(v), chart.baselines[tag]) for tag, v in values.items() if isinstance(v, (int, float))]


def _figure(chart: Chart, series: Series, levels: Sequence[tuple[float, str]], verdict: Verdict | None) -> Figure:
    names = _names(list(series))
    bases = list(dict.fromkeys(_base(tag) for tag in series))
    curves = []
    for tag, points in series.items():
        dotted = tag.startswith("eval/") and len(series) > 1
        # held-out numbers have the colour of the trained ones, unless these two are all there is
        colour = COLOURS[(bases.index(_base(tag)) + (dotted and len(bases) == 1)) % len(COLOURS)]
        curves.append(Curve(names[tag], colour, points, dotted))
    low, high = bounds(chart.check, [v for _, v in curves[-1].points])
    plot = Plot(curves, low, high, (*chart.marks.items(), *levels), chart.axis)
    words = "; ".join(f"{c.name} from {number(c.points[0][1])} to {number(c.points[-1][1])}" for c in curves)
    return Figure(
        chart,
        curves,
        line_chart(plot, f"{chart.title}: {words}"),
        "" if verdict is None else verdict.warning,
        rules().get(chart.check),
        wanted(chart.check) if chart.check else "",
        _twin(curves),
        max(len(curve.points) for curve in curves) > TWIN_ROWS,
    )


def _twin(curves: Sequence[Curve]) -> list[list[str]]:
    """The chart's numbers as a table: means of neighbouring points, a row per stretch of steps."""
    columns = [{round(s): v for s, v, _, _ in thin(c.points, TWIN_ROWS)} for c in curves]
    steps = sorted({step for column in columns for step in column})
    return [[f"{s:,}", *(number(column[s]) if s in column else "" for column in columns)] for s in steps]


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
