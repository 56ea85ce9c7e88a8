"""The HTML of the report: one self-contained page, no script, nothing fetched. All text is escaped here."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

CSS = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1d242b;--soft:#5b6670;--line:#dfe3e7;--pale:#f6f7f9;--blue:#0067a3;
--good:#00704f;--bad:#b34700;--grave:#b3001b;--warn:#fdf3ec;--alarm:#fdecee;--fine:#edf7f2;--band:#e4f3ea;--chip:#fbe7b5;--word:#3c7a57;
--c0:#0072b2;--c1:#d55e00;--c2:#009e73;--c3:#aa3f85;--c4:#b07d00;--c5:#3a9bd9;--c6:#444}
@media screen and (prefers-color-scheme:dark){:root{--paper:#14181c;--ink:#e6e9ec;--soft:#a3adb6;--line:#333b43;
--pale:#1f252b;--blue:#6cb8ee;--good:#4fc79a;--bad:#ff9a57;--grave:#ff7b88;--warn:#33241a;--alarm:#391d21;--fine:#17302a;
--chip:#5a4715;--band:#18332a;--word:#7fc4a0;--c0:#56b4e9;--c1:#ff8b3d;--c2:#2fcf9f;--c3:#e183bf;--c4:#e0b13a;--c5:#9ad0f5;--c6:#ccc}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
Helvetica,Arial,sans-serif;-webkit-text-size-adjust:100%}
main{max-width:1120px;margin:0 auto;padding:2.2rem 1.25rem 4rem}
h1{font-size:1.9rem;line-height:1.2;margin:0 0 .3rem}
h2{font-size:1.35rem;line-height:1.25;margin:3rem 0 .4rem;padding-top:1.1rem;border-top:2px solid var(--ink)}
h3{font-size:.8rem;letter-spacing:.06em;text-transform:uppercase;color:var(--soft);margin:1.8rem 0 .5rem}
p{margin:.4rem 0;max-width:46rem}
.soft,figcaption,.note{color:var(--soft)}
nav a{display:inline-block;margin:.2rem 1rem .2rem 0}
a{color:var(--blue)}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;width:100%}
th,td{padding:.42rem .9rem .42rem 0;text-align:right;border-bottom:1px solid var(--line);vertical-align:baseline;
white-space:nowrap}
th{font-weight:600;font-size:.85rem;color:var(--soft);border-bottom-color:var(--soft)}
th:first-child,td:first-child{text-align:left;white-space:normal;min-width:10rem}
th:last-child,td:last-child{padding-right:0}
td .note{display:block;font-size:.8rem;line-height:1.3}
.se{color:var(--soft);font-size:.82em}
.better{color:var(--good);font-weight:600}.worse{color:var(--bad);font-weight:600}.same{color:var(--soft)}
.find{list-style:none;margin:.8rem 0;padding:0}
.find li,.warn{border-left:4px solid var(--bad);background:var(--warn);padding:.5rem .8rem;margin:.45rem 0;
max-width:60rem}
.find li.trouble{border-color:var(--grave);background:var(--alarm)}
.find li.fine{border-color:var(--good);background:var(--fine)}
.find .note{font-size:.85rem}.mark{color:var(--bad)}.trouble .mark{color:var(--grave)}.fine .mark{color:var(--good)}
.more details{margin:.15rem 0}.more summary{font-size:.8rem}.more table{font-size:.8rem}
.words td{white-space:normal;text-align:left}.words td:first-child{min-width:4.5rem;width:6rem}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(310px,100%),1fr));gap:1.6rem 1.8rem}
figure{margin:0;break-inside:avoid;min-width:0}
figure b{display:block;font-size:.95rem}
figure svg{display:block;width:100%;height:auto;margin:.2rem 0 .1rem;font-family:inherit}
figcaption{font-size:.82rem;line-height:1.42}
.warn{font-size:.82rem;line-height:1.42;margin:.4rem 0 0;padding:.35rem .6rem}
.legend{display:flex;flex-wrap:wrap;gap:0 .9rem;font-size:.82rem;font-variant-numeric:tabular-nums}
.legend i{display:inline-block;width:1.1em;height:0;border-top:3px solid;margin-right:.35em;vertical-align:middle}
.legend i.dotted{border-top-style:dotted}
dl{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(165px,46%),1fr));gap:.5rem .9rem;margin:.6rem 0}
dl div{background:var(--pale);border-radius:5px;padding:.4rem .7rem;min-width:0}
dt{font-size:.76rem;color:var(--soft);overflow-wrap:anywhere;line-height:1.3}
dd{margin:0;font-size:1.08rem;font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
.sample{border:1px solid var(--line);border-radius:6px;padding:.7rem .9rem;margin:.9rem 0;break-inside:avoid}
.text{white-space:pre-wrap;overflow-wrap:anywhere;font-size:.92rem;line-height:1.45}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(290px,100%),1fr));gap:.7rem 1.4rem;
margin-top:.6rem;padding-top:.6rem;border-top:1px solid var(--line)}
.pair>div{min-width:0}
.who{font-size:.82rem;color:var(--soft);font-variant-numeric:tabular-nums;margin-bottom:.15rem}
.who b{color:var(--ink)}
mark{background:var(--chip);color:inherit;border-radius:3px;padding:0 .15em;margin:0 1px}
.told{margin-top:.7rem}.rank{margin:.2rem 0}.rank td{font-size:.88rem;line-height:1.4;padding:.25rem .8rem .25rem 0}
.rank td:nth-child(3){white-space:pre-wrap;overflow-wrap:anywhere;text-align:left;width:100%}
.rank td:first-child{text-align:right;min-width:0;white-space:nowrap}
.rank tr.greedy td{background:var(--pale)}
.said{margin:.2rem 0}.said td{font-size:.88rem;line-height:1.4;padding:.25rem .8rem .25rem 0;vertical-align:top}
.said th{font-size:.76rem;padding:.1rem .8rem .1rem 0}.said th:first-child,
.said td:first-child{text-align:right;min-width:3.6rem}
.said th:last-child,.said td:last-child{text-align:left;white-space:pre-wrap;overflow-wrap:anywhere;width:100%}
details{margin:.6rem 0}summary{cursor:pointer;color:var(--blue);font-size:.9rem}
pre{background:var(--pale);border-radius:5px;padding:.7rem .9rem;overflow-x:auto;font:12.5px/1.5 ui-monospace,
SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;margin:.5rem 0;white-space:pre-wrap;overflow-wrap:anywhere}
@media (max-width:640px){th,td{padding-right:.55rem;font-size:.9rem}th:first-child,td:first-child{min-width:6rem}
.se{display:block}td .note{display:none}td:last-child{white-space:normal}}
@media print{main{max-width:none;padding:0}h2{break-after:avoid}h3{break-after:avoid}nav{display:none}
.charts{grid-template-columns:repeat(2,1fr)}body{font-size:11pt}*{print-color-adjust:exact}}
"""


class Key(NamedTuple):
    """One entry of a legend."""

    name: str
    colour: str
    last: str  # the last value, as text
    dotted: bool


class Figure(NamedTuple):
    """One chart and its words; `svg`, `outside` and `twin` are finished HTML, `warning` may be empty."""

    title: str
    keys: Sequence[Key]
    svg: str
    caption: str
    warning: str
    outside: str  # what to do where the curve leaves its range
    twin: str  # the numbers as a table


class Finding(NamedTuple):
    """One line of a verdict list."""

    level: str  # Trouble | Look | Fine
    place: str  # the stage, or the policy
    name: str  # of the quantity
    text: str  # what was found
    words: str  # what it means, and what to do
    why: str  # why the limit lies there; empty where all is fine


def document(title: str, body: str) -> str:
    """The whole page around `body`."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head>\n<body><main>\n{body}\n</main></body></html>\n"
    )


def heading(level: int, text: str, anchor: str = "") -> str:
    name = f' id="{escape(anchor)}"' if anchor else ""
    return f"<h{level}{name}>{escape(text)}</h{level}>\n"


def paragraph(text: str, kind: str = "") -> str:
    return f'<p class="{kind}">{escape(text)}</p>\n' if kind else f"<p>{escape(text)}</p>\n"


def cell(text: str, note: str = "", kind: str = "", error: str = "") -> str:
    """A table cell: text, a remark below it, a class for its colour, a standard error behind it."""
    behind = f' <span class="se">± {escape(error)}</span>' if error else ""
    below = f'<span class="note">{escape(note)}</span>' if note else ""
    return f'<td class="{kind or "plain"}">{escape(text)}{behind}{below}</td>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """`head` is text; the cells of `rows` come from `cell`. Scrolls sideways on narrow screens."""
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(f"<tr>{''.join(row)}</tr>\n" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>\n{body}</tbody></table></div>\n'


def findings(found: Sequence[Finding]) -> str:
    """A verdict list, one line each."""
    lines = "".join(_finding(one) for one in found)
    return f'<ul class="find">{lines}</ul>\n'


def _finding(one: Finding) -> str:
    """The mark as a word, what was found, what to do; the reason of the limit behind it."""
    why = f' <span class="note">Why there: {escape(one.why)}.</span>' if one.why else ""
    sign = {"Trouble": "\N{MULTIPLICATION X}", "Look": "!", "Fine": "\N{CHECK MARK}"}[one.level]
    return (
        f'<li class="{one.level.lower()}"><b class="mark">{sign} {escape(one.level)}</b> '
        f"<b>{escape(one.place)}: {escape(one.name)}, {escape(one.text)}.</b> "
        f"{escape(one.words[:1].upper() + one.words[1:])}.{why}</li>"
    )


def links(entries: Sequence[tuple[str, str]]) -> str:
    """Links within the page; entries are (anchor, text)."""
    return "<nav>" + "".join(f'<a href="#{escape(a)}">{escape(text)}</a> ' for a, text in entries) + "</nav>\n"


def figure(shown: Figure) -> str:
    """One chart with its words."""
    legend = "".join(
        f'<span><i class="{"dotted" if key.dotted else "solid"}" style="border-color:{key.colour}"></i>'
        f"{escape(key.name)} {escape(key.last)}</span>"
        for key in shown.keys
    )
    below = f'<div class="warn">{escape(shown.warning)}</div>' if shown.warning else ""
    return (
        f'<figure><b>{escape(shown.title)}</b><div class="legend">{legend}</div>{shown.svg}'
        f'<figcaption>{escape(shown.caption)}</figcaption>{below}<div class="more">{shown.outside}{shown.twin}</div>'
        "</figure>\n"
    )


def headless_table(rows: Sequence[Sequence[str]]) -> str:
    """A table without a head whose cells may be long text; they come from `cell`."""
    body = "".join(f"<tr>{''.join(row)}</tr>\n" for row in rows)
    return f'<table class="words"><tbody>\n{body}</tbody></table>\n'


def grid(figures: Sequence[str]) -> str:
    return f'<div class="charts">\n{"".join(figures)}</div>\n'


def folded(summary: str, html: str) -> str:
    """Finished HTML behind a line to click on."""
    return f"<details><summary>{escape(summary)}</summary>{html}</details>\n"


def tiles(figures: Sequence[tuple[str, str]]) -> str:
    """Name and value pairs as a grid of small boxes."""
    boxes = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in figures)
    return f"<dl>{boxes}</dl>\n"


def literal(text: str) -> str:
    return f"<pre>{escape(text)}</pre>\n"
