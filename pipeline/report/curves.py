"""One stage's curves as captioned charts, each with its limits, its verdict and its numbers as a table."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from pipeline.report.charts import REST, charts_for
from pipeline.report.checks import RULES, Verdict, band, wanted
from pipeline.report.html import Figure, Key, cell, figure, folded, grid, heading, headless_table, table
from pipeline.report.readings import Series, head
from pipeline.report.spec import FINE, START, Chart
from pipeline.report.svg import COLOURS, Curve, Picture, line_chart, number, thin

FOLDED = ("Speed", REST)  # groups behind a line to click on
# judged against the curve's own shape, or against another curve: no range of the axis
UNDRAWN = ("overfit", "grad_spike", "best_step", "carried_over", "baseline", "sampling_time")
UNDRAWN += ("masked_start", "masked_end")
TWIN_ROWS = 8  # of a chart's numbers as a table


def show_curves(
    kind: str, series: Series, results: Mapping[str, object], verdicts: Mapping[str, Verdict] | None = None
) -> str:
    """All charts of a stage of this `kind`, grouped.

    Args:
        results: may hold the levels that some charts are compared with.
        verdicts: what was found about the stage, by quantity; each stands below the chart of its rule.
    """
    groups: dict[str, list[str]] = {}  # group -> figures
    once, told = [], dict(verdicts or {})
    for chart, tags in charts_for(kind, list(series)):
        verdict = told.get(chart.rule)
        curves = {tag: series[tag] for tag in tags if len(series[tag]) > 1}
        once += [_once(chart, tag, series[tag][0][1], verdict) for tag in tags if tag not in curves]
        if curves:
            groups.setdefault(chart.group, []).append(_figure(chart, curves, _levels(chart, series, results), verdict))
    html = table(["measured once", "value", "healthy"], once) if once else ""
    for group in sorted(groups, key=FOLDED.__contains__):
        pictures = grid(groups[group])
        html += folded(group, pictures) if group in FOLDED else heading(3, group) + pictures
    return html


def _once(chart: Chart, tag: str, value: float, verdict: Verdict | None) -> list[str]:
    """A table row for what was measured a single time and so has no curve: its meaning, value and healthy range."""
    name = tag if chart.group == REST else f"{chart.title}, {tag}"
    healthy = wanted(chart.rule).removeprefix("healthy ") if chart.rule and chart.rule not in UNDRAWN else ""
    said = "" if verdict is None or verdict.level == FINE else f" {verdict.level}: {verdict.words}."
    return [cell(name, chart.caption + said), cell(number(value)), cell(healthy)]


def _levels(chart: Chart, series: Series, results: Mapping[str, object]) -> list[tuple[float, str]]:
    """The baselines of `chart` that this stage measured: (value, words)."""
    found = []
    for tag, words in chart.baselines:
        value = series[tag][-1][1] if tag in series else results.get(tag)
        if isinstance(value, (int, float)):
            found.append((float(value), words))
    return found


def bounds(quantity: str, values: Sequence[float]) -> tuple[float | None, float | None]:
    """The healthy range in units of the curve; open where it is relative to a start that is not above zero."""
    if not quantity or quantity in UNDRAWN:
        return None, None
    low, high = band(quantity)
    if quantity == "length_correlation":  # its size is judged, so the range has two sides
        low = -high
    if RULES[quantity].unit != START:
        return low, high
    if head(values) <= 0:
        return None, None
    return tuple(None if bound is None else bound * head(values) for bound in (low, high))


def _figure(chart: Chart, series: Series, levels: Sequence[tuple[float, str]], verdict: Verdict | None) -> str:
    names = _names(list(series))
    bases = list(dict.fromkeys(_base(tag) for tag in series))
    curves = []
    for tag, points in series.items():
        dotted = tag.startswith("eval/") and len(series) > 1
        colour = COLOURS[(bases.index(_base(tag)) + (dotted and len(bases) == 1)) % len(COLOURS)]
        curves.append(Curve(names[tag], colour, points, dotted))
    low, high = bounds(chart.rule, [v for _, v in curves[-1].points])
    picture = Picture(curves, low, high, (*chart.marks, *levels), chart.axis)
    keys = [Key(c.name, c.colour, number(c.points[-1][1]), c.dotted) for c in curves]
    words = "; ".join(f"{c.name} from {number(c.points[0][1])} to {number(c.points[-1][1])}" for c in curves)
    svg = line_chart(picture, f"{chart.title}: {words}")
    said = "" if verdict is None or verdict.level == FINE else f"{verdict.level}. {verdict.text}: {verdict.words}."
    return figure(Figure(chart.title, keys, svg, chart.caption, said, _outside(chart.rule), _twin(curves)))


def _outside(quantity: str) -> str:
    """What a reader should do where the curve leaves its range, whether it does or not."""
    if not quantity:
        return ""
    lines = [
        (f"below {limit.low:g}" if limit.low is not None else f"above {limit.high:g}", limit.words, limit.why)
        for limit in RULES[quantity].limits
    ]
    rows = [[cell(f"{where} {RULES[quantity].unit}"), cell(f"{words}.", why)] for where, words, why in lines]
    return folded(wanted(quantity) + ": what if not", headless_table(rows))


def _twin(curves: Sequence[Curve]) -> str:
    """The chart's numbers as a table: means of neighbouring points, a row per stretch of steps."""
    longest = max(curves, key=lambda curve: len(curve.points)).points
    columns = [{round(s): v for s, v, _, _ in thin(c.points, TWIN_ROWS)} for c in curves]
    steps = sorted({step for column in columns for step in column})
    rows = [
        [cell(f"{step:,}"), *(cell(number(column[step]) if step in column else "") for column in columns)]
        for step in steps
    ]
    name = "numbers" if len(longest) <= TWIN_ROWS else "numbers, thinned"
    return folded(name, table(["step", *(c.name for c in curves)], rows))


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
