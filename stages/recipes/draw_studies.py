"""The figures of RESULTS.md from its own tables: `python stages/recipes/draw_studies.py`.

A line `![what one sees](figures/NAME.svg)` stands above a table of gains: the first one below it in the same section is
what it shows. Drawn is the gain by the oracle where a column has that name, else that of the first column with signs;
its brackets are the whiskers. It is drawn over the KL; where the section has none, over what the table says was
generated, or the seconds. A KL may also stand in another table of the section that has lines of the same names.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pipeline.errors import UserError
from pipeline.report.figure import Gained, Reach, picture

HERE = Path(__file__).resolve().parent
IMAGE = re.compile(r"!\[[^\]]*\]\((figures/[\w.-]+\.svg)\)")
NUMBER = r"[+-]?\d+(?:\.\d+)?"
REACH = re.compile(rf"({NUMBER})(?: \(({NUMBER}) \.\. ({NUMBER})\))?")  # '+0.36 (+0.34 .. +0.38)', words may follow
DISTANCES = {  # words of a column's title: what the axis is called; None: as the column
    "KL": "KL from the start, nats per response",
    "generated tokens": None,
    "seconds": None,
}


class Published(NamedTuple):
    """A table of a document: `lines` are {name of the policy: its cells}, `head` and cells without the names."""

    line: int  # its first, from 1
    head: Sequence[str]
    lines: Mapping[str, Sequence[str]]


def main() -> None:
    try:
        found = figures((HERE / "RESULTS.md").read_text(encoding="utf-8"))
    except UserError as error:
        sys.exit(str(error))
    for name, svg in found.items():
        (HERE / name).parent.mkdir(exist_ok=True)
        (HERE / name).write_text(svg, encoding="utf-8")
        print(name)


def figures(text: str) -> dict[str, str]:
    """{figures/NAME.svg: the picture} of all that the document shows."""
    found = {}
    for start, section in sections(text):
        tables = tables_of(section, start)
        for number, line in enumerate(section, start):
            for image in IMAGE.findall(line):
                below = [table for table in tables if table.line > number and gain_column(table) is not None]
                if not below:
                    raise UserError(f"RESULTS.md:{number}: no table of gains (+0.12) below {image} in its section")
                if image in found:
                    raise UserError(f"RESULTS.md:{number}: {image} is shown above too, wanted a name for each figure")
                found[image] = drawn(below[0], tables)
    return found


def sections(text: str) -> Iterator[tuple[int, list[str]]]:
    """(number of the first line, the lines) from one heading to the next."""
    lines = text.splitlines()
    starts = [0, *(i for i, line in enumerate(lines) if line.startswith("#")), len(lines)]
    yield from ((a + 1, lines[a:b]) for a, b in pairwise(starts))


def tables_of(section: Sequence[str], start: int) -> list[Published]:
    found = []
    for i, line in enumerate(section):
        if re.fullmatch(r"\|( ?:?-+:? ?\|)+", line) and i:
            (_, *head), *rows = [cells(one) for one in (section[i - 1], *section[i + 1 : _end(section, i)])]
            lines = {plain(name): row for name, *row in rows}
            if len(lines) < len(rows):
                raise UserError(f"RESULTS.md:{start + i - 1}: two lines of this table have one name")
            if odd := [name for name, row in lines.items() if len(row) != len(head)]:
                raise UserError(f"RESULTS.md:{start + i - 1}: {odd[0]} has not as many cells as the head of this table")
            found.append(Published(start + i - 1, head, lines))
    return found


def gain_column(table: Published) -> int | None:
    """The oracle's where there is one, else the first that has signs; None in a table without a plus: levels may be
    negative, and are no gains."""
    rows = table.lines.values()
    if not any(cell.startswith("+") for row in rows for cell in row):
        return None
    signed = [i for i in range(len(table.head)) if any(is_gain(row[i]) for row in rows)]
    return next((i for i in signed if "oracle" in table.head[i]), signed[0] if signed else None)


def is_gain(cell: str) -> bool:
    return cell.startswith(("+", "-")) and reach(cell) is not None


def drawn(table: Published, of_section: Sequence[Published]) -> str:
    """The picture of a table; the start, whose number has no sign or whose KL is a bare 0, is not in it."""
    column = gain_column(table)
    assert column is not None
    policies = {name: row for name, row in table.lines.items() if not is_start(row, table.head)}
    gains = {name: reach(row[column]) for name, row in policies.items() if is_gain(row[column])}
    if unsigned := [name for name, row in policies.items() if name not in gains and ".." in row[column]]:
        raise UserError(f"RESULTS.md:{table.line}: the gain of {unsigned[0]} has no sign, wanted + or -")
    axis, far = distances_of(table, of_section, gains)
    missing = [name for name in gains if name not in far]
    found = [Gained(i, name, far[name], gain) for i, (name, gain) in enumerate(gains.items()) if name in far]
    bars = "bars: brackets of the table" if any(gain.low < gain.high for gain in gains.values()) else "no intervals"
    left_out = f"; no distance is known of {', '.join(missing)}" if missing else ""
    return picture(found, f"gain, {plain(table.head[column])} ({bars}){left_out}", axis)


def is_start(row: Sequence[str], head: Sequence[str]) -> bool:
    return any(cell == "0" for cell, title in zip(row, head, strict=True) if "KL" in title)


def distances_of(
    table: Published, of_section: Sequence[Published], names: Iterable[str]
) -> tuple[str, dict[str, Reach]]:
    """What the horizontal axis is called, and where on it those of `names` lie that have a number."""
    for words, axis in DISTANCES.items():
        for one in (table, *of_section):
            column = next((i for i, title in enumerate(one.head) if words in title), None)
            if column is None:
                continue
            told = {name: reach(one.lines[name][column]) for name in names if name in one.lines}
            if far := {name: value for name, value in told.items() if value is not None}:
                return axis or plain(one.head[column]), far
    raise UserError(f"RESULTS.md:{table.line}: no column of the section is named by one of {', '.join(DISTANCES)}")


def reach(cell: str) -> Reach | None:
    """'+0.36 (+0.34 .. +0.38)'; a number without brackets has no interval; None of other words."""
    match = REACH.match(cell)
    if match is None:
        return None
    mean, low, high = (None if one is None else float(one) for one in match.groups())
    return Reach(mean, mean if low is None else low, mean if high is None else high)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.replace("\N{MINUS SIGN}", "-").strip()[1:-1].split("|")]


def plain(cell: str) -> str:
    """Without the signs of Markdown: of code, of emphasis, of links."""
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", cell).replace("`", "").replace("**", "")


def _end(section: Sequence[str], i: int) -> int:
    return next((j for j in range(i + 1, len(section)) if not section[j].startswith("|")), len(section))


if __name__ == "__main__":
    main()
