"""One picture of a comparison: what each policy gained over how far it went from its start, with intervals.

A file by itself, with the colours of the pages in it: for documents as for the page.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.report import svg

HEIGHT = 300.0
LINE, SIZE = 9.5, 8.5  # of the names beside the marks: from one to the next, and their letters
TO_EITHER_SIDE = 1.645  # standard errors, of 90 %
STYLE = Path(__file__).with_name("templates") / "style.css"


class Reach(NamedTuple):
    """A number with the interval around it."""

    mean: float
    low: float
    high: float


class Gained(NamedTuple):
    """A policy: its gain and its distance; `place` gives colour and shape, as `svg.Mark`."""

    place: int
    name: str
    distance: Reach
    gain: Reach


def picture(found: Sequence[Gained], gain: str, distance: str) -> str:
    """An <svg> that can be a file; `gain` and `distance` name the axes."""
    xs = [x for one in found for x in one.distance] + [0.0]
    ys = [y for one in found for y in one.gain] + [0.0]
    low, high = svg.range_of(xs)
    frame = svg.Frame((low, high + 0.28 * (high - low)), svg.range_of(ys), HEIGHT)  # names stand to the right
    parts = [svg.axes(frame, distance), f'<text x="4" y="8" fill="{svg.QUIET}">{escape(gain)}</text>']
    parts += [_level(frame)]
    parts += [_whiskers(one, frame) for one in found]
    parts += [_mark(one, frame) for one in found]
    parts += [_name(one, frame, y) for one, y in zip(found, _heights(found, frame), strict=True)]
    drawn = svg.element(f"<style>{_colours()}</style>" + "".join(parts), f"{gain} over {distance}", HEIGHT + 14)
    return drawn.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" font-family="system-ui, sans-serif" ', 1)


def gained(table: Mapping[str, Mapping[str, Mapping[str, Any]]], tag: str, start: str, distance: str) -> list[Gained]:
    """Of a comparison's `{variant: {tag: spread}}` all that have a difference to `start` and a distance from it.

    The intervals are from the least seed to the greatest; of one seed 90 % by the standard errors of both policies, as
    if their responses were to other prompts. Without standard errors they are the numbers themselves.
    """
    found = []
    for place, (name, metrics) in enumerate(table.items()):
        difference = metrics[tag]["minus"].get(start) if tag in metrics else None
        if difference is not None and distance in metrics:
            errors = [one.get(f"{tag}_se", {}).get("mean", 0.0) for one in (metrics, table[start])]
            gain = _reach(difference, math.hypot(*errors))
            far = _reach(metrics[distance], metrics.get(f"{distance}_se", {}).get("mean", 0.0))
            found.append(Gained(place, name, far, gain))
    return found


def _reach(spread: Mapping[str, Any], error: float) -> Reach:
    mean = spread["mean"]
    if len(spread["per_seed"]) > 1:
        return Reach(mean, spread["min"], spread["max"])
    return Reach(mean, mean - TO_EITHER_SIDE * error, mean + TO_EITHER_SIDE * error)


def _colours() -> str:
    """What the pages say of colours, light and dark: the style's first lines, up to what is laid out."""
    return STYLE.read_text(encoding="utf-8").split("*{", 1)[0].replace("\n", "")


def _level(frame: svg.Frame) -> str:
    y = frame.py(0.0)
    return f'<line x1="{svg.LEFT:g}" x2="{svg.WIDTH - svg.RIGHT:g}" y1="{y:.1f}" y2="{y:.1f}" stroke="{svg.QUIET}"/>'


def _whiskers(one: Gained, frame: svg.Frame) -> str:
    x, y = frame.px(one.distance.mean), frame.py(one.gain.mean)
    left, right, low, high = *map(frame.px, one.distance[1:]), *map(frame.py, one.gain[1:])
    style = f'stroke="{svg.COLOURS[one.place % len(svg.COLOURS)]}" stroke-width="1.1"'
    return (
        f'<line x1="{left:.1f}" x2="{right:.1f}" y1="{y:.1f}" y2="{y:.1f}" {style}/>'
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}" {style}/>'
    )


def _mark(one: Gained, frame: svg.Frame) -> str:
    words = f"{one.name}: {one.gain.mean:+.3g} ({one.gain.low:+.3g} .. {one.gain.high:+.3g})"
    return svg.mark(one.place, words, frame.px(one.distance.mean), frame.py(one.gain.mean))


def _name(one: Gained, frame: svg.Frame, y: float) -> str:
    """Beside the mark, at the height that is free; a thin line leads to it where that is another."""
    x, own = frame.px(one.distance.mean), frame.py(one.gain.mean)
    to = svg.WIDTH - svg.RIGHT - 0.2 * (svg.WIDTH - svg.LEFT)
    style = f'stroke="{svg.COLOURS[one.place % len(svg.COLOURS)]}" stroke-width=".4"'
    lead = f'<line x1="{x + 5:.1f}" y1="{own:.1f}" x2="{to - 3:.1f}" y2="{y - 3:.1f}" {style}/>'
    return f'{lead}<text x="{to:.1f}" y="{y:.1f}" font-size="{SIZE}" fill="{svg.INK}">{escape(one.name)}</text>'


def _heights(found: Sequence[Gained], frame: svg.Frame) -> list[float]:
    """Where the names stand: as near to their marks as they can be without touching one another."""
    order = sorted(range(len(found)), key=lambda i: frame.py(found[i].gain.mean))
    heights: dict[int, float] = {}
    y = svg.TOP
    for rank, i in enumerate(order):
        room = HEIGHT - svg.BOTTOM - LINE * (len(order) - 1 - rank)  # for those below
        y = max(y, min(frame.py(found[i].gain.mean) + 3, room))
        heights[i], y = y, y + LINE
    return [heights[i] for i in range(len(found))]
