"""Line charts as inline SVG text: a few curves over steps, the healthy band, marked levels. No library, no script."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

COLOURS = tuple(f"var(--c{i})" for i in range(7))  # the page gives them, for light and dark; after Okabe and Ito
BAND, GRID, INK, QUIET = "var(--band)", "var(--line)", "var(--ink)", "var(--soft)"
PAPER, WORD = "var(--paper)", "var(--word)"
WIDTH, HEIGHT = 380.0, 200.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 12.0, 10.0, 26.0  # margins around the plot
MINUS, NOTHING = "\N{MINUS SIGN}", "\N{EN DASH}"
POINTS = 90  # of one curve in the picture; more are drawn as means with the span around them

Point = tuple[float, float]  # (step, value)


class Curve(NamedTuple):
    """One curve. `dotted` marks held-out numbers: dots on a dashed line."""

    name: str
    colour: str
    points: Sequence[Point]
    dotted: bool = False


class Picture(NamedTuple):
    """What one chart shows besides its words."""

    curves: Sequence[Curve]
    low: float | None = None  # the healthy band begins here; None: it is open below
    high: float | None = None
    marks: Sequence[tuple[float, str]] = ()  # horizontal lines: (value, words)
    axis: tuple[float | None, float | None] = (None, None)  # where the vertical axis ends at least; None: by the curves


class Frame(NamedTuple):
    """The visible ranges, and where a value lies in the picture."""

    x: tuple[float, float]
    y: tuple[float, float]

    def px(self, step: float) -> float:
        return LEFT + (step - self.x[0]) / (self.x[1] - self.x[0]) * (WIDTH - LEFT - RIGHT)

    def py(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y[0]) / (self.y[1] - self.y[0]) * (HEIGHT - TOP - BOTTOM)


def line_chart(picture: Picture, description: str) -> str:
    """An <svg> element that scales with its container; `description` is read out in its place."""
    frame = _frame(picture)
    parts = [_band(picture, frame), _grid(frame)]
    parts += [_curve(curve, frame) for curve in picture.curves]
    parts += [_mark(value, words, frame) for value, words in picture.marks]
    return (
        f'<svg viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" aria-label="{escape(description)}" font-size="11">'
        f"{''.join(parts)}</svg>"
    )


def number(value: float) -> str:
    """A number for people: three significant digits behind whole numbers, thousands separated, a real minus sign."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else NOTHING
    size = abs(value)
    if size >= 1e7 or size < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}".replace("-", MINUS)
    before = math.floor(math.log10(size)) + 1  # digits before the point; negative for leading zeros behind it
    return f"{value:,.{min(max(0, 3 - before), 5)}f}".replace("-", MINUS)


def thin(points: Sequence[Point], limit: int = POINTS) -> list[tuple[float, float, float, float]]:
    """(step, mean, lowest, highest) of at most `limit` runs of neighbouring points."""
    width = -(-len(points) // limit)
    runs = [points[i : i + width] for i in range(0, len(points), width)]
    return [(_mean([s for s, _ in r]), _mean([v for _, v in r]), *_span([v for _, v in r])) for r in runs]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _span(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)


def _frame(picture: Picture) -> Frame:
    steps = [step for curve in picture.curves for step, _ in curve.points]
    values = [v for curve in picture.curves for _, *rest in thin(curve.points) for v in rest]
    low, high = _span(values + [value for value, _ in picture.marks])
    room = (high - low) or abs(high) or 1.0
    # A bound of the healthy range is shown when it is crossed or near; a far one would flatten the curve.
    if picture.low is not None and (low < picture.low or picture.low > low - room):
        low, high = min(low, picture.low), max(high, picture.low)
    if picture.high is not None and (high > picture.high or picture.high < high + room):
        low, high = min(low, picture.high), max(high, picture.high)
    # No slope of less than a thousandth of the level fills the picture: its ticks would need more digits than fit.
    pad = max(0.06 * ((high - low) or abs(high) or 1.0), 5e-4 * max(abs(low), abs(high)))
    bottom = low - pad if picture.axis[0] is None else min(picture.axis[0], low)
    top = high + pad if picture.axis[1] is None else max(picture.axis[1], high)
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
    step = rows[1] - rows[0] if len(rows) > 1 else 1.0
    top = max(map(abs, frame.y))
    left, right, bottom = LEFT, WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = [
        f'<line x1="{left:g}" x2="{right:g}" y1="{frame.py(y):.1f}" y2="{frame.py(y):.1f}" stroke="{GRID}"/>'
        f'<text x="{left - 6:g}" y="{frame.py(y) + 4:.1f}" text-anchor="end" fill="{QUIET}">'
        f"{_tick_text(y, step, top)}</text>"
        for y in rows
    ]
    width = columns[1] - columns[0] if len(columns) > 1 else 1.0
    parts += [
        f'<text x="{frame.px(x):.1f}" y="{bottom + 17:g}" text-anchor="{_anchor(frame, x)}" fill="{QUIET}">'
        f"{'step ' if x == columns[0] else ''}{_tick_text(x, width, frame.x[1])}</text>"
        for x in columns
    ]
    axis = f'<line x1="{left:g}" x2="{right:g}" y1="{bottom:g}" y2="{bottom:g}" stroke="{QUIET}" stroke-width=".8"/>'
    return "".join(parts) + axis


def _anchor(frame: Frame, x: float) -> str:
    share = (x - frame.x[0]) / (frame.x[1] - frame.x[0])
    return "start" if share < 0.06 else "end" if share > 0.94 else "middle"


def _band(picture: Picture, frame: Frame) -> str:
    """The healthy range as a pale area, named where there is room; none if everything in sight is healthy."""
    if not any(bound is not None and frame.y[0] <= bound <= frame.y[1] for bound in (picture.low, picture.high)):
        return ""
    low = frame.y[0] if picture.low is None else min(max(picture.low, frame.y[0]), frame.y[1])
    high = frame.y[1] if picture.high is None else min(max(picture.high, frame.y[0]), frame.y[1])
    top, height = frame.py(high), frame.py(low) - frame.py(high)
    area = f'<rect x="{LEFT:g}" y="{top:.1f}" width="{WIDTH - LEFT - RIGHT:g}" height="{height:.1f}" fill="{BAND}"/>'
    word = f'<text x="{WIDTH - RIGHT - 5:g}" y="{top + 13:.1f}" text-anchor="end" fill="{WORD}">healthy</text>'
    return area + (word if height > 18 else "")


def _mark(value: float, words: str, frame: Frame) -> str:
    y = frame.py(value)
    return (
        f'<line x1="{LEFT:g}" x2="{WIDTH - RIGHT:g}" y1="{y:.1f}" y2="{y:.1f}" stroke="{INK}" stroke-dasharray="2 3"/>'
        f'<text x="{LEFT + 5:g}" y="{y - 4:.1f}" fill="{INK}" stroke="{PAPER}" stroke-width="3" paint-order="stroke">'
        f"{escape(words)}</text>"
    )


def _curve(curve: Curve, frame: Frame) -> str:
    runs = thin(curve.points)
    at = [(frame.px(step), frame.py(mean)) for step, mean, _, _ in runs]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
    dash = ' stroke-dasharray="5 3"' if curve.dotted else ""
    line = (
        f'<polyline points="{path}" fill="none" stroke="{curve.colour}" stroke-width="1.8"{dash} '
        'stroke-linejoin="round" stroke-linecap="round"/>'
    )
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.4" fill="{curve.colour}"/>' for x, y in at)
    shown = dots if (curve.dotted and len(at) <= 40) or len(at) == 1 else ""
    return _envelope(curve, frame) + line + shown


def _envelope(curve: Curve, frame: Frame) -> str:
    """The span of the values behind each drawn point, where points stand for several."""
    runs = thin(curve.points)
    if len(runs) == len(curve.points):
        return ""
    upper = [f"{frame.px(step):.1f},{frame.py(high):.1f}" for step, _, _, high in runs]
    lower = [f"{frame.px(step):.1f},{frame.py(low):.1f}" for step, _, low, _ in reversed(runs)]
    return f'<polygon points="{" ".join(upper + lower)}" fill="{curve.colour}" opacity=".16"/>'
