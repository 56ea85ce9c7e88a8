"""The page of a comparison: each reward over the distance from the start, a mark per seed and variant; the tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from pipeline.report import html as page
from pipeline.report.comparison import columns_of, rows
from pipeline.report.svg import BOTTOM, COLOURS, GRID, HEIGHT, INK, LEFT, QUIET, RIGHT, TOP, WIDTH, Frame, number, ticks

X = "objective/kl"
CHARTS = {
    "reward/mean": ("Reward", "What the policies were trained to raise. More is only better while the others follow."),
    "second/mean": (
        "Second reward models",
        "The same goal, learned from another seed and never trained against: gains that it does not see are of the "
        "first model's errors.",
    ),
    "oracle/mean": ("Oracle", "The truth, which the embedded task knows by construction."),
    "completions/mean_length": ("Words per response", "Gains that come with length alone are suspect."),
}
RADIUS = 3.6
SHAPES = ("circle", "square", "triangle")  # of the first, second, third round of colours

Table = Mapping[str, Mapping[str, Mapping[str, Any]]]  # {variant: {tag: spread}}


def document(title: str, table: Table, baselines: Sequence[str], seeds: Sequence[int]) -> str:
    """The whole page."""
    columns = columns_of(table)
    words = f"{len(table)} policies, seeds {', '.join(map(str, seeds))}"
    body = page.heading(1, title) + page.paragraph(words, "soft") + _legend(table)
    body += page.grid([_figure(tag, table) for tag in CHARTS if any(tag in metrics for metrics in table.values())])
    body += page.heading(2, "Numbers") + page.paragraph("Means over seeds; in brackets the least and the greatest.")
    body += page.table(["variant", *(c.title for c in columns)], _cells(rows(table, columns)))
    differing = [column for column in columns if column.differs]
    for baseline in baselines:
        lines = rows(table, differing, baseline)
        if lines:
            body += page.heading(2, f"Differences to {baseline}, seed by seed")
            body += page.table(["variant", *(c.title for c in differing)], _cells(lines))
    return page.document(title, body)


def scatter(tag: str, table: Table, description: str) -> str:
    """An <svg> of `tag` over the KL, a mark for each variant and seed that has both."""
    points = [
        (place, variant, seed, metrics[X]["per_seed"][seed], value)
        for place, (variant, metrics) in enumerate(table.items())
        if tag in metrics and X in metrics
        for seed, value in metrics[tag]["per_seed"].items()
        if seed in metrics[X]["per_seed"]
    ]
    frame = Frame(_range([x for *_, x, _ in points]), _range([y for *_, y in points]))
    marks = [_mark(place, f"{name}, seed {seed}", frame.px(x), frame.py(y)) for place, name, seed, x, y in points]
    return (
        f'<svg viewBox="0 0 {WIDTH:g} {HEIGHT + 14:g}" role="img" aria-label="{escape(description)}" font-size="11">'
        f"{_axes(frame)}{''.join(marks)}</svg>"
    )


def _figure(tag: str, table: Table) -> str:
    title, caption = CHARTS[tag]
    picture = scatter(tag, table, f"{title} over KL from the start")
    return f"<figure><b>{escape(title)}</b>{picture}<figcaption>{escape(caption)}</figcaption></figure>\n"


def _legend(table: Table) -> str:
    box = '<svg width="12" height="12" viewBox="0 0 12 12">'
    marks = [f"<span>{box}{_mark(i, name, 6, 6)}</svg> {escape(name)}</span>" for i, name in enumerate(table)]
    return f'<div class="legend">{"".join(marks)}</div>\n'


def _cells(lines: Sequence[Sequence[str]]) -> list[list[str]]:
    return [[page.cell(text) for text in line] for line in lines]


def _range(values: Sequence[float]) -> tuple[float, float]:
    room = (max(values) - min(values)) * 0.06 or abs(max(values)) * 0.06 or 1.0
    return min(values) - room, max(values) + room


def _axes(frame: Frame) -> str:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    lines = [
        f'<line x1="{LEFT:g}" x2="{right:g}" y1="{frame.py(y):.1f}" y2="{frame.py(y):.1f}" stroke="{GRID}"/>'
        f'<text x="{LEFT - 6:g}" y="{frame.py(y) + 4:.1f}" text-anchor="end" fill="{QUIET}">{number(y)}</text>'
        for y in ticks(*frame.y, 4)
    ]
    lines += [
        f'<line x1="{frame.px(x):.1f}" x2="{frame.px(x):.1f}" y1="{TOP:g}" y2="{bottom:g}" stroke="{GRID}"/>'
        f'<text x="{frame.px(x):.1f}" y="{bottom + 15:g}" text-anchor="middle" fill="{QUIET}">{number(x)}</text>'
        for x in ticks(*frame.x, 4)
    ]
    place = f'x="{right:g}" y="{bottom + 30:g}" text-anchor="end" fill="{QUIET}"'
    return "".join(lines) + f"<text {place}>KL from the start, nats per response</text>"


def _mark(place: int, words: str, x: float, y: float) -> str:
    """The mark of the variant at `place` of the table; its colour and shape are its own."""
    style = f'fill="{COLOURS[place % len(COLOURS)]}" fill-opacity=".8" stroke="{INK}" stroke-width=".5"'
    shape = SHAPES[min(place // len(COLOURS), len(SHAPES) - 1)]
    r = RADIUS
    drawn = {
        "circle": f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r}" {style}>',
        "square": f'<rect x="{x - r:.1f}" y="{y - r:.1f}" width="{2 * r}" height="{2 * r}" {style}>',
        "triangle": f'<polygon points="{x:.1f},{y - r:.1f} {x + r:.1f},{y + r:.1f} {x - r:.1f},{y + r:.1f}" {style}>',
    }[shape]
    closing = {"circle": "circle", "square": "rect", "triangle": "polygon"}[shape]
    return f"{drawn}<title>{escape(words)}</title></{closing}>"
