"""Tables of final numbers: policies side by side, splits side by side, accuracy by source."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pipeline.report import gains
from pipeline.report.checks import Verdict, error_names, error_of, is_copy, noise
from pipeline.report.numbers import NOTHING, fixed, number
from pipeline.report.spec import FINAL, FINE, METRICS, match, metric_of

Columns = Mapping[str, Mapping[str, float | None]]  # policy or split -> metric -> value
OF_SOURCES = ("eval/pairs", "eval/accuracy", "eval/length_accuracy")


class Cell(NamedTuple):
    """More than a text: a remark below it, a class for its colour, a standard error behind it, its check's level."""

    text: str
    note: str = ""
    kind: str = "plain"
    error: str = ""
    level: str = ""
    anchor: str = ""  # where the check stands


class Table(NamedTuple):
    """`more` are rows behind a line to click on."""

    head: list[str]
    rows: list[list[Cell]]
    more: list[list[Cell]]


class Finals(NamedTuple):
    """A training stage's final numbers: those that FINAL names, those of sources, the rest."""

    tiles: list[tuple[str, str]]
    sources: list[list[str]]
    more: list[tuple[str, str]]


def columns_of(results: Mapping[str, object]) -> dict[str, Mapping[str, float | None]]:
    """The parts of a results.json that are tables of their own, by name."""
    return {name: values for name, values in results.items() if isinstance(values, Mapping)}


def anchor(*names: str) -> str:
    """Where the check of what has these names stands on the page, for links."""
    return "-".join(["check", *(re.sub(r"\W+", "-", name) for name in names)])


def policies_table(evaluation: str, policies: Columns, verdicts: Mapping[str, Mapping[str, Verdict]]) -> Table:
    """An evaluation's table, each policy against the first; `verdicts` are the checks': policy -> tag -> verdict."""
    first, *others = policies
    head = ["on held-out prompts", first, *(name for other in others for name in (other, "difference"))]
    known, more = _tags(policies)
    copies = [tag for tag in known if is_copy(tag, list(policies.values()))]
    known, more = [tag for tag in known if tag not in copies], [*copies, *more]
    return Table(head, *([_compared(evaluation, tag, policies, verdicts) for tag in tags] for tags in (known, more)))


def side_by_side(columns: Columns) -> Table:
    """The columns without a comparison: the splits of a scored data set."""

    def row(tag: str) -> list[Cell]:
        return [Cell(metric_of(tag)[1]), *(_value(v, tag, _decimals(tag, columns)) for v in columns.values())]

    return Table(["", *columns], *([row(tag) for tag in tags] for tags in _tags(columns)))


def final_numbers(results: Mapping[str, object]) -> Finals:
    """The final numbers of a training stage, flat."""
    labels = {tag: next(filter(None, (match(tag, p, words) for p, words in FINAL.items())), "") for tag in results}
    sources = [tag.removeprefix("eval/accuracy/") for tag in results if tag.startswith("eval/accuracy/")]
    shown = {f"{key}/{source}" for source in sources for key in OF_SOURCES}
    return Finals(
        [(label, _plain(results[tag])) for tag, label in labels.items() if label],
        [[source, *(_plain(results.get(f"{key}/{source}")) for key in OF_SOURCES)] for source in sources],
        [(tag, _plain(results[tag])) for tag, label in labels.items() if not label and tag not in shown],
    )


def _tags(columns: Columns) -> tuple[list[str], list[str]]:
    """The metrics that METRICS describes, in its order, and the others; standard errors belong to their metric."""
    tags = list(dict.fromkeys(tag for values in columns.values() for tag in values))
    places = {tag: next((i for i, m in enumerate(METRICS) if match(tag, m.tag, m.label)), None) for tag in tags}
    known = sorted((tag for tag in tags if places[tag] is not None), key=places.__getitem__)
    errors = {name for tag in tags for name in error_names(tag)}
    return known, [tag for tag in tags if places[tag] is None and tag not in errors]


def _plain(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return NOTHING if value is None else str(value)
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) >= 1 else number(value)


def _decimals(tag: str, columns: Columns) -> int:
    """So many that a row can be compared at a glance; none for counts."""
    numbers = [values[tag] for values in columns.values() if values.get(tag) is not None]
    if all(isinstance(value, int) for value in numbers):
        return 0
    largest = max(abs(value) for value in numbers)
    return 3 if largest < 10 else 1 if largest < 1000 else 0


def _compared(
    evaluation: str, tag: str, policies: Columns, verdicts: Mapping[str, Mapping[str, Verdict]]
) -> list[Cell]:
    """A row: the label, then each policy's value and its change against the first."""
    metric, label = metric_of(tag)
    (_, base), *others = policies.items()
    decimals = _decimals(tag, policies)
    cells = [Cell(label, metric.note), _value(base, tag, decimals)]
    for name, other in others:
        if metric.check == "estimated_gain":  # of each policy over the first: a difference by itself
            cells += [Cell(""), Cell(gains.short(other, tag))]
        else:
            cells += [_value(other, tag, decimals), _difference(metric.better, tag, (base, other), decimals)]
        verdict = verdicts.get(name, {}).get(tag)
        if verdict is not None:
            cells[-1] = _judged(cells[-1], verdict)._replace(anchor=anchor(evaluation, name, tag))
    return cells


def _judged(cell: Cell, verdict: Verdict) -> Cell:
    """A difference with its check's level: what is worse and yet healthy raises no alarm."""
    healthy = cell.kind == "worse" and verdict.level == FINE
    return cell._replace(
        level=verdict.level, **({"kind": "same", "note": "within the healthy range"} if healthy else {})
    )


def _value(values: Mapping[str, float | None], tag: str, decimals: int) -> Cell:
    value, error = values.get(tag), error_of(values, tag)
    shown = NOTHING if value is None else fixed(value, decimals)
    return Cell(shown, error="" if error is None else fixed(error, decimals))


def _difference(better: int, tag: str, pair: Sequence[Mapping[str, float | None]], decimals: int) -> Cell:
    """The change from the first to the second, and its direction where the metric has a better one."""
    base, other = pair
    if base.get(tag) is None or other.get(tag) is None:
        return Cell(NOTHING)
    change = other[tag] - base[tag]
    text = ("+" if change > 0 else "") + fixed(change, decimals)
    if not better:
        return Cell(text)
    if abs(change) <= noise(tag, base, other):
        return Cell(f"{text} ≈ same", kind="same")
    return Cell(f"{text} ▲ better", kind="better") if change * better > 0 else Cell(f"{text} ▼ worse", kind="worse")
