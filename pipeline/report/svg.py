"""Line charts, scatter plots and ridges of histograms as inline SVG text. No library, no script."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from statistics import fmean
from typing import NamedTuple

from pipeline.report.numbers import MINUS

COLOURS = tuple(f"var(--c{i})" for i in range(7))  # the page gives them, for light and dark; after Okabe and Ito
BAND, GRID, INK, QUIET = "var(--band)", "var(--line)", "var(--ink)", "var(--soft)"
PAPER, WORD = "var(--paper)", "var(--word)"
WIDTH, HEIGHT = 380.0, 200.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 12.0, 10.0, 26.0  # margins around the plot
RADIUS = 3.6  # of a mark
CORNERS = (  # in radii from the middle: of a square, a triangle, a diamond, a triangle on its tip
    ((-1, -1), (1, -1), (1, 1), (-1, 1)),
    ((0, -1), (1, 1), (-1, 1)),
    ((0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)),
    ((-1, -1), (1, -1), (0, 1)),
)
RIDGE, ROOM = 60.0, 20.0  # height of one histogram, and of its words above
POINTS = 90  # of one curve in the picture; more are drawn as means with the span around them

Point = tuple[float, float]  # (step, value)


class Curve(NamedTuple):
    """One curve. `dotted` marks held-out numbers: dots on a dashed line."""

    name: str
    colour: str
    points: Sequence[Point]
    dotted: bool = False


class Plot(NamedTuple):
    """What one chart shows besides its words."""

    curves: Sequence[Curve]
    low: float | None = None  # the healthy band begins here; None: it is open below
    high: float | None = None
    marks: Sequence[tuple[float, str]] = ()  # horizontal lines: (value, words)
    axis: tuple[float | None, float | None] = (None, None)  # where the vertical axis ends at least; None: by the curves


class Mark(NamedTuple):
    """One point of a scatter plot; `place` among all that look different gives its colour and shape."""

    place: int
    words: str
    x: float
    y: float


class Ridge(NamedTuple):
    """One histogram among several that share their bins."""

    name: str
    mean: float
    shares: Sequence[float]  # of all its values, a bin


class Frame(NamedTuple):
    """The visible ranges, and where a value lies in the plot."""

    x: tuple[float, float]
    y: tuple[float, float]
    height: float = HEIGHT

    def px(self, step: float) -> float:
        return LEFT + (step - self.x[0]) / (self.x[1] - self.x[0]) * (WIDTH - LEFT - RIGHT)

    def py(self, value: float) -> float:
        return self.height - BOTTOM - (value - self.y[0]) / (self.y[1] - self.y[0]) * (self.height - TOP - BOTTOM)


def line_chart(plot: Plot, description: str) -> str:
    """An <svg> element that scales with its container; `description` is read out in its place."""
    frame = _frame(plot)
    parts = [_band(plot, frame), _grid(frame)]
    parts += [_curve(curve, frame) for curve in plot.curves]
    parts += [_marked_level(value, words, frame) for value, words in plot.marks]
    return element("".join(parts), description, HEIGHT)


def scatter(marks: Sequence[Mark], name: str, description: str) -> str:
    """An <svg> with a mark for each; `name` stands below the horizontal axis."""
    frame = Frame(range_of([mark.x for mark in marks]), range_of([mark.y for mark in marks]))
    drawn = "".join(mark(one.place, one.words, frame.px(one.x), frame.py(one.y)) for one in marks)
    return element(axes(frame, name) + drawn, description, HEIGHT + 14)


def axes(frame: Frame, name: str, columns: Mapping[float, str] | None = None) -> str:
    """Lines at round numbers both ways, with their values, and `name` below the horizontal axis.

    `columns`: {place on the horizontal axis: what stands there}, where that axis is not linear.
    """
    bottom, rows = frame.height - BOTTOM, ticks(*frame.y, 4)
    if columns is None:
        places = ticks(*frame.x, 4)
        columns = dict(zip(places, _tick_texts(places, frame.x), strict=True))
    parts = [_levels(frame, rows, _tick_texts(rows, frame.y))]
    parts += [
        _upright(frame.px(x), TOP, bottom, f'stroke="{GRID}"')
        + f'<text x="{frame.px(x):.1f}" y="{bottom + 15:g}" text-anchor="middle" fill="{QUIET}">{text}</text>'
        for x, text in columns.items()
    ]
    place = f'x="{WIDTH - RIGHT:g}" y="{bottom + 30:g}" text-anchor="end" fill="{QUIET}"'
    return "".join(parts) + f"<text {place}>{escape(name)}</text>"


def ridges(rows: Sequence[Ridge], edges: Sequence[float], name: str, description: str) -> str:
    """An <svg> with a histogram for each row below the other and their means; the first one's goes through all.

    Args:
        edges: the borders of the bins, one more than there are bins.
        name: of what stands along the horizontal axis.
    """
    frame = Frame((edges[0], edges[-1]), (0.0, max(share for row in rows for share in row.shares)))
    bottom, columns = TOP + RIDGE * len(rows), ticks(*frame.x, 6)
    parts = [_ridge(row, edges, frame, place) for place, row in enumerate(rows)]
    parts += [
        f'<text x="{frame.px(x):.1f}" y="{bottom + 15:g}" text-anchor="middle" fill="{QUIET}">{text}</text>'
        for x, text in zip(columns, _tick_texts(columns, frame.x), strict=True)
    ]
    parts += [_upright(frame.px(rows[0].mean), TOP + ROOM, bottom, f'stroke="{INK}" stroke-dasharray="2 3"')]
    place = f'x="{WIDTH - RIGHT:g}" y="{bottom + 30:g}" text-anchor="end" fill="{QUIET}"'
    return element("".join(parts) + f"<text {place}>{escape(name)}</text>", description, bottom + 36)


def _ridge(row: Ridge, edges: Sequence[float], frame: Frame, place: int) -> str:
    base, colour = TOP + RIDGE * (place + 1), COLOURS[place % len(COLOURS)]
    parts = [f'<text x="{LEFT:g}" y="{base - RIDGE + 15:g}" fill="{INK}">{escape(row.name)}</text>']
    for low, high, share in zip(edges, edges[1:], row.shares, strict=False):
        x, width, height = frame.px(low), frame.px(high) - frame.px(low) - 0.6, share / frame.y[1] * (RIDGE - ROOM)
        area = f'x="{x:.1f}" y="{base - height:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{colour}"'
        parts += [f"<rect {area}><title>{low:g} to {high:g}: {share:.1%}</title></rect>"] if share else []
    parts += [_level(base, f'stroke="{QUIET}" stroke-width=".6"')]
    return "".join(parts) + _upright(frame.px(row.mean), base - RIDGE + ROOM, base, f'stroke="{INK}"')


def mark(place: int, words: str, x: float, y: float) -> str:
    """The first round of colours are circles, then come squares, triangles, diamonds, and triangles on their tips."""
    style = f'fill="{COLOURS[place % len(COLOURS)]}" fill-opacity=".8" stroke="{INK}" stroke-width=".5"'
    r, title = RADIUS, f"<title>{escape(words)}</title>"
    shape = place // len(COLOURS)
    if shape == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r}" {style}>{title}</circle>'
    corners = CORNERS[min(shape, len(CORNERS)) - 1]
    return f'<polygon points="{_points([(x + dx * r, y + dy * r) for dx, dy in corners])}" {style}>{title}</polygon>'


def range_of(values: Sequence[float]) -> tuple[float, float]:
    room = (max(values) - min(values)) * 0.06 or abs(max(values)) * 0.06 or 1.0
    return min(values) - room, max(values) + room


def element(content: str, description: str, height: float, width: float = WIDTH) -> str:
    """The <svg> element around `content`."""
    box = f'viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(description)}" font-size="11"'
    return f"<svg {box}>{content}</svg>"


def thin(points: Sequence[Point], limit: int = POINTS) -> list[tuple[float, float, float, float]]:
    """(step, mean, lowest, highest) of at most `limit` runs of neighbouring points."""
    width = -(-len(points) // limit)
    runs = [points[i : i + width] for i in range(0, len(points), width)]
    return [(fmean([s for s, _ in r]), fmean([v for _, v in r]), *_span([v for _, v in r])) for r in runs]


def _span(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)


def _frame(plot: Plot) -> Frame:
    steps = [step for curve in plot.curves for step, _ in curve.points]
    values = [v for curve in plot.curves for _, *rest in thin(curve.points) for v in rest]
    low, high = _span(values + [value for value, _ in plot.marks])
    room = (high - low) or abs(high) or 1.0
    # A bound of the healthy range is shown when it is crossed or near; a far one would flatten the curve.
    if plot.low is not None and (low < plot.low or plot.low > low - room):
        low, high = min(low, plot.low), max(high, plot.low)
    if plot.high is not None and (high > plot.high or plot.high < high + room):
        low, high = min(low, plot.high), max(high, plot.high)
    # No slope of less than a thousandth of the level fills the picture: its ticks would need more digits than fit.
    pad = max(0.06 * ((high - low) or abs(high) or 1.0), 5e-4 * max(abs(low), abs(high)))
    bottom = low - pad if plot.axis[0] is None else min(plot.axis[0], low)
    top = high + pad if plot.axis[1] is None else max(plot.axis[1], high)
    first, last = _span(steps)
    first = 0 if 0 < first <= 0.1 * last else first
    return Frame((first, last if last > first else first + 1), (bottom, top if top > bottom else bottom + 1))


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers between `low` and `high`, steps of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _tick_texts(values: Sequence[float], ends: tuple[float, float]) -> list[str]:
    """The ticks of an axis, with as many digits as neighbours need to differ."""
    step = values[1] - values[0] if len(values) > 1 else 1.0
    return [_tick_text(value, step, max(map(abs, ends))) for value in values]


def _tick_text(value: float, step: float, largest: float) -> str:
    if value == 0:
        return "0"
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if largest >= 10 * unit or (letter != "k" and largest >= unit):
            return f"{value / unit:g}{letter}".replace("-", MINUS)
    if step < 1e-3 and largest < 0.1:
        return f"{value:.1e}".replace(".0e-0", "e-").replace("e-0", "e-").replace("-", MINUS)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value:.{digits}f}".replace("-", MINUS)


def _grid(frame: Frame) -> str:
    rows, columns = ticks(*frame.y, 4), [x for x in ticks(*frame.x, 4) if x == int(x)]
    texts, words = _tick_texts(rows, frame.y), _tick_texts(columns, frame.x)
    parts = [
        f'<text x="{frame.px(x):.1f}" y="{HEIGHT - BOTTOM + 17:g}" text-anchor="{_anchor(frame, x)}" fill="{QUIET}">'
        f"{'step ' if x == columns[0] else ''}{word}</text>"
        for x, word in zip(columns, words, strict=True)
    ]
    axis = _level(HEIGHT - BOTTOM, f'stroke="{QUIET}" stroke-width=".8"')
    return _levels(frame, rows, texts) + "".join(parts) + axis


def _levels(frame: Frame, values: Sequence[float], texts: Sequence[str]) -> str:
    """Horizontal lines with their values at the left."""
    return "".join(
        _level(frame.py(value), f'stroke="{GRID}"')
        + f'<text x="{LEFT - 6:g}" y="{frame.py(value) + 4:.1f}" text-anchor="end" fill="{QUIET}">{text}</text>'
        for value, text in zip(values, texts, strict=True)
    )


def _level(y: float, style: str) -> str:
    return f'<line x1="{LEFT:g}" x2="{WIDTH - RIGHT:g}" y1="{y:.1f}" y2="{y:.1f}" {style}/>'


def _upright(x: float, top: float, bottom: float, style: str) -> str:
    return f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top:g}" y2="{bottom:g}" {style}/>'


def _anchor(frame: Frame, x: float) -> str:
    share = (x - frame.x[0]) / (frame.x[1] - frame.x[0])
    return "start" if share < 0.06 else "end" if share > 0.94 else "middle"


def _band(plot: Plot, frame: Frame) -> str:
    """The healthy range as a pale area, named where there is room; none if everything in sight is healthy."""
    if not any(bound is not None and frame.y[0] <= bound <= frame.y[1] for bound in (plot.low, plot.high)):
        return ""
    ends = zip((plot.low, plot.high), frame.y, strict=True)
    low, high = (open_end if bound is None else min(max(bound, frame.y[0]), frame.y[1]) for bound, open_end in ends)
    top, height = frame.py(high), frame.py(low) - frame.py(high)
    area = f'<rect x="{LEFT:g}" y="{top:.1f}" width="{WIDTH - LEFT - RIGHT:g}" height="{height:.1f}" fill="{BAND}"/>'
    word = f'<text x="{WIDTH - RIGHT - 5:g}" y="{top + 13:.1f}" text-anchor="end" fill="{WORD}">healthy</text>'
    return area + (word if height > 18 else "")


def _marked_level(value: float, words: str, frame: Frame) -> str:
    y = frame.py(value)
    style = f'fill="{INK}" stroke="{PAPER}" stroke-width="3" paint-order="stroke"'
    text = f'<text x="{LEFT + 5:g}" y="{y - 4:.1f}" {style}>{escape(words)}</text>'
    return _level(y, f'stroke="{INK}" stroke-dasharray="2 3"') + text


def _curve(curve: Curve, frame: Frame) -> str:
    """The line; the span of the values behind each of its points, where points stand for several; dots."""
    runs = thin(curve.points)
    at = [(frame.px(step), frame.py(mean)) for step, mean, _, _ in runs]
    dash = ' stroke-dasharray="5 3"' if curve.dotted else ""
    line = (
        f'<polyline points="{_points(at)}" fill="none" stroke="{curve.colour}" stroke-width="1.8"{dash} '
        'stroke-linejoin="round" stroke-linecap="round"/>'
    )
    span = ""
    if len(runs) < len(curve.points):
        upper = [(frame.px(step), frame.py(high)) for step, _, _, high in runs]
        lower = [(frame.px(step), frame.py(low)) for step, _, low, _ in reversed(runs)]
        span = f'<polygon points="{_points(upper + lower)}" fill="{curve.colour}" opacity=".16"/>'
    dotted = (curve.dotted and len(at) <= 40) or len(at) == 1
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.4" fill="{curve.colour}"/>' for x, y in at if dotted)
    return span + line + dots


def _points(at: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
