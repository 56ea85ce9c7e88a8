"""Tables of final numbers: policies side by side, splits side by side, accuracy by source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipeline.report import html as page
from pipeline.report.readings import error_names, error_of, noise
from pipeline.report.spec import FINAL, METRICS, Metric, match, metric_of
from pipeline.report.svg import MINUS, NOTHING, number

Columns = Mapping[str, Mapping[str, float | None]]  # policy or split -> metric -> value


def columns_of(results: Mapping[str, object]) -> dict[str, Mapping[str, float | None]]:
    """The parts of a results.json that are tables of their own, by name."""
    return {name: values for name, values in results.items() if isinstance(values, Mapping)}


def comparison(policies: Columns) -> str:
    """The headline table, each policy against the first."""
    first, *others = policies
    head = ["on held-out prompts", first]
    for other in others:
        head += [other, "difference"]
    known, rest = _tags(policies)
    words = (
        f"Differences are against {first}. ± is one standard error over prompts. A change within two standard errors "
        "of the difference counts as the same; where no error is known, one within 2% or 0.005."
    )
    html = page.table(head, [_row(tag, policies) for tag in known]) + page.paragraph(words, "soft")
    if rest:
        html += page.folded("More numbers", page.table(head, [_row(tag, policies) for tag in rest]))
    return html


def side_by_side(columns: Columns) -> str:
    """The columns without a comparison: the splits of a scored data set."""
    known, rest = _tags(columns)

    def rows(tags: Sequence[str]) -> list[list[str]]:
        return [
            [page.cell(metric_of(t)[1])] + [_value(v, t, _decimals(t, columns)) for v in columns.values()] for t in tags
        ]

    html = page.table(["", *columns], rows(known))
    return html + (page.folded("More numbers", page.table(["", *columns], rows(rest))) if rest else "")


def final_numbers(results: Mapping[str, object]) -> str:
    """The numbers that FINAL names as boxes, those of sources as a table, the rest behind a line to click on."""
    labels = {tag: next(filter(None, (match(tag, p, words) for p, words in FINAL.items())), "") for tag in results}
    sources = [tag.removeprefix("eval/accuracy/") for tag in results if tag.startswith("eval/accuracy/")]
    html = page.tiles([(label, _plain(results[tag])) for tag, label in labels.items() if label])
    if sources:
        keys = ("eval/pairs", "eval/accuracy", "eval/length_accuracy")
        rows = [[page.cell(s), *(page.cell(_plain(results.get(f"{key}/{s}"))) for key in keys)] for s in sources]
        html += page.table(["source", "held-out pairs", "accuracy", "accuracy of length alone"], rows)
    shown = {f"{key}/{s}" for s in sources for key in ("eval/pairs", "eval/accuracy", "eval/length_accuracy")}
    rest = [(tag, _plain(results[tag])) for tag, label in labels.items() if not label and tag not in shown]
    return html + (page.folded("All final numbers", page.tiles(rest)) if rest else "")


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


def _fixed(value: float | None, decimals: int) -> str:
    return NOTHING if value is None else f"{value:,.{decimals}f}".replace("-", MINUS)


def _decimals(tag: str, columns: Columns) -> int:
    """So many that a row can be compared at a glance; none for counts."""
    found = [values[tag] for values in columns.values() if values.get(tag) is not None]
    if all(isinstance(value, int) for value in found):
        return 0
    largest = max(abs(value) for value in found)
    return 3 if largest < 10 else 1 if largest < 1000 else 0


def _row(tag: str, policies: Columns) -> list[str]:
    metric, label = metric_of(tag)
    base, *others = policies.values()
    decimals = _decimals(tag, policies)
    cells = [page.cell(label, metric.note), _value(base, tag, decimals)]
    for other in others:
        cells += [_value(other, tag, decimals), _difference(metric, tag, base, other, decimals)]
    return cells


def _value(values: Mapping[str, float | None], tag: str, decimals: int) -> str:
    error = error_of(values, tag)
    return page.cell(_fixed(values.get(tag), decimals), error="" if error is None else _fixed(error, decimals))


def _difference(
    metric: Metric, tag: str, base: Mapping[str, float | None], other: Mapping[str, float | None], decimals: int
) -> str:
    """The change against the first policy, with a verdict where the metric has a better direction."""
    if base.get(tag) is None or other.get(tag) is None:
        return page.cell(NOTHING)
    change = other[tag] - base[tag]
    text = ("+" if change > 0 else "") + _fixed(change, decimals)
    if not metric.better:
        return page.cell(text)
    if abs(change) <= noise(tag, base, other):
        return page.cell(f"{text} ≈ same", kind="same")
    better = change * metric.better > 0
    return page.cell(f"{text} {'▲ better' if better else '▼ worse'}", kind="better" if better else "worse")
