"""One picture of a comparison: what each policy gained over how far it went from its start, with intervals.

A file by itself, with the colours of the pages in it: for documents as for the page.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from pipeline.report import svg

HEIGHT = 300.0  # at least: more where there are many names
HEAD = 14.0  # above the plot, for what the vertical axis shows
LINE, SIZE, LETTER = 10.0, 8.5, 5.2  # of the names: from one to the next, their letters' height, a wide letter's width
TITLE_LETTER = 6.0  # a wide letter's width, of the words along the axes
GAP, SIGN = 16.0, 9.0  # from the plot to the mark that stands before a name, and from there to the name
CROWDED = 6  # where half of the policies lie in the first sixth of the way, the horizontal axis is logarithmic
DEEPEST = 1000  # from the greatest distance to the least that a logarithmic axis tells apart from 0
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
    least = _least(found)
    if least is not None:
        found, distance = [_logarithmic(one, least) for one in found], f"{distance} (logarithmic)"
    xs = [x for one in found for x in one.distance] + [0.0]
    ys = [y for one in found for y in one.gain] + [0.0]
    height = max(HEIGHT, svg.TOP + svg.BOTTOM + LINE * len(found))
    frame = svg.Frame(svg.range_of(xs), svg.range_of(ys), height)
    columns = None if least is None else _powers(least, frame)
    parts = [svg.axes(frame, distance, columns), _level(frame)]
    parts += [_whiskers(one, frame) for one in found]
    parts += [_name(one, frame, y) for one, y in zip(found, _heights(found, frame), strict=True)]
    parts += [_mark(one, frame.px(one.distance.mean), frame.py(one.gain.mean)) for one in found]
    width = max(svg.WIDTH + GAP + SIGN + LETTER * max(len(one.name) for one in found), TITLE_LETTER * len(gain))
    drawn = (
        f'<style>{_colours()}</style><rect width="100%" height="100%" fill="{svg.PAPER}"/>'
        f'<text x="4" y="12" fill="{svg.QUIET}">{escape(gain)}</text>'
        f'<g transform="translate(0 {HEAD:g})">{"".join(parts)}</g>'
    )
    drawn = svg.element(drawn, f"{gain}, over {distance}", height + HEAD + 14, width)
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


def _least(found: Sequence[Gained]) -> float | None:
    """From where on the horizontal axis is logarithmic, below it linear to 0; None where all of it is to be linear."""
    far = sorted(one.distance.mean for one in found)
    if far[-1] <= CROWDED * max(far[(len(far) - 1) // 2], 0.0):
        return None
    return max(min(x for x in far if x > 0), far[-1] / DEEPEST) if far[-1] > 0 else None


def _logarithmic(one: Gained, least: float) -> Gained:
    """Where it lies on an axis that is linear about 0 and logarithmic far from it: asinh, which knows 0 and less."""
    return one._replace(distance=Reach(*(math.asinh(x / least) for x in one.distance)))


def _powers(least: float, frame: svg.Frame) -> dict[float, str]:
    """0 and 1, 2 and 5 of every power of ten, of many powers only 1; {where: what is written there}."""
    first, last = math.floor(math.log10(least)), math.ceil(math.log10(least * math.sinh(frame.x[1])))
    factors = (1, 2, 5) if last - first <= 3 else (1,)
    values = [0.0] + [f * 10.0**power for power in range(first, last + 1) for f in factors]
    places = {math.asinh(value / least): f"{value:g}" for value in values if value == 0 or value >= least}
    return {x: text for x, text in places.items() if x <= frame.x[1]}


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


def _mark(one: Gained, x: float, y: float) -> str:
    words = f"{one.name}: {one.gain.mean:+.3g} ({one.gain.low:+.3g} .. {one.gain.high:+.3g})"
    return svg.mark(one.place, words, x, y)


def _name(one: Gained, frame: svg.Frame, y: float) -> str:
    """To the right of the plot behind its mark, at the height that is free; a thin line leads to it from the other."""
    x, own, to = frame.px(one.distance.mean), frame.py(one.gain.mean), svg.WIDTH + GAP
    style = f'stroke="{svg.COLOURS[one.place % len(svg.COLOURS)]}" stroke-width=".4"'
    lead = f'<line x1="{x:.1f}" y1="{own:.1f}" x2="{to:.1f}" y2="{y - 3:.1f}" {style}/>'
    text = f'<text x="{to + SIGN:.1f}" y="{y:.1f}" font-size="{SIZE}" fill="{svg.INK}">{escape(one.name)}</text>'
    return lead + _mark(one, to, y - 3) + text


def _heights(found: Sequence[Gained], frame: svg.Frame) -> list[float]:
    """Where the names stand: as near to their marks as they can be without touching one another.

    Names that would touch are a block, about the middle of where its names would stand alone.
    """
    order = sorted(range(len(found)), key=lambda i: frame.py(found[i].gain.mean))
    blocks: list[list[float]] = []  # where the first name of all would stand for each of a block's names to be its own
    for rank, i in enumerate(order):
        blocks.append([frame.py(found[i].gain.mean) + 3 - rank * LINE])
        while len(blocks) > 1 and fmean(blocks[-2]) > fmean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    lowest = frame.height - svg.BOTTOM - LINE * (len(found) - 1)
    firsts = [min(max(fmean(block), svg.TOP + 3), lowest) for block in blocks for _ in block]
    heights = {i: first + rank * LINE for rank, (i, first) in enumerate(zip(order, firsts, strict=True))}
    return [heights[i] for i in range(len(found))]
