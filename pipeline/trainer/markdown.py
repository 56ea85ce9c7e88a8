"""Sample rows as Markdown, for TensorBoard: a table of responses, a section per composed row or prompt. Pure.

Rows are flat: keys within keys are joined by '/'.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

TABLE_ROWS, TABLE_CHARACTERS = 16, 600  # of a table, and of a cell; the file of the samples keeps everything
SECTIONS = 8  # of compositions, of prompts
ROLLOUT_COLUMNS = ("reward", "advantage", "tokens", "response")  # of a sampled response

Row = Mapping[str, Any]


def pages(rows: Sequence[Row]) -> dict[str, str]:
    """The Markdown of a sample table's first rows, by the name under which it is shown."""
    composed = [row for row in rows if "compositions" in row]
    sampled = [row for row in rows if row.get("kind") == "rollout"]
    others = [row for row in rows if "compositions" not in row and row.get("kind") != "rollout"]
    groups = [list(group) for _, group in groupby(sampled, key=lambda row: row["prompt"])]
    texts = {
        "samples": table(others[:TABLE_ROWS]) if others else "",
        "compositions": "\n\n".join(section(row) for row in composed[:SECTIONS]),
        "rollouts": "\n\n".join(rollout(group) for group in groups[:SECTIONS]),
    }
    return {name: text for name, text in texts.items() if text}


def table(rows: Sequence[Row]) -> str:
    """One line per row, one column per key."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return lines(names, [[plain(row.get(name, "")) for name in names] for row in rows])


def side_by_side(rows: Sequence[Row]) -> str:
    """The responses of several policies, a section per prompt: the first prompts of all policies are the same."""
    by_prompt: dict[Any, list[Row]] = {}
    for row in rows:
        by_prompt.setdefault(row["id"], []).append(row)
    names = [name for name in ("policy", "reward", "response") if all(name in row for row in rows)]
    return "\n\n".join(
        f"**prompt:** {plain(group[0]['prompt'])}\n\n"
        + lines(names, [[plain(row[name]) for name in names] for row in group])
        for group in [*by_prompt.values()][:SECTIONS]
    )


def numbers(columns: Mapping[str, Mapping[str, Any]]) -> str:
    """{title: {name: number}} as one line per name and one column per title; what is missing, null or NaN is a dash."""
    names = dict.fromkeys(name for column in columns.values() for name in column)
    cells = [[_number(column.get(name)) for column in columns.values()] for name in names]
    return lines(["tag", *columns], [[plain(name), *row] for name, row in zip(names, cells, strict=True)])


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else plain(value)


def section(row: Row) -> str:
    """A row of pipeline/rl/composition_samples.py: masked and drawn tokens stand out as code."""
    count = sum(masked for _, masked in row["static/parts"])
    greedy = [plain(row["greedy/reward"]), "greedy", chips(row["greedy/parts"])]
    drawn = [[plain(one["reward"]), "", chips(one["parts"])] for one in row["compositions"]]
    credit = [
        [name, plain(one["credit"]), chips([[one["token"], True]]), chips([[one["instead_of"], True]])]
        for name in ("praised", "blamed")
        for one in row[name]
    ]
    parts = [
        f"### {plain(row['id'])}",
        f"**prompt:** {plain(row['prompt'])}",
        f"**reference:** {plain(row['reference'])}",
        f"**static response, {count} tokens masked:** {chips(row['static/parts'])}",
        f"**{row['samples']} compositions, mean reward {plain(row['mean'])}:** the best and the worst",
        lines(["reward", "", "text"], [greedy, *drawn]),
    ]
    return "\n\n".join([*parts, *([lines(["", "credit", "token", "instead of"], credit)] if credit else [])])


def rollout(group: Sequence[Row]) -> str:
    """The responses that one step sampled for one prompt (pipeline/rollout/groups.py), the best first."""
    ranked = sorted(group, key=lambda row: -row["reward"])
    first, count = ranked[0], len(ranked)
    about = f"{count} response{'s' if count > 1 else ''}, temperature {plain(first['temperature'])}"
    about += "" if first["capability"] is None else f", capability {plain(first['capability'])}"
    body = [[plain(row[name]) for name in ROLLOUT_COLUMNS] for row in ranked[:TABLE_ROWS]]
    return "\n\n".join([f"**prompt:** {plain(first['prompt'])}", about, lines(ROLLOUT_COLUMNS, body)])


def chips(parts: Sequence[Sequence[Any]]) -> str:
    """A text in pieces, the masked ones as code."""
    return "".join(f"<code>{plain(text) or ' '}</code>" if masked else plain(text) for text, masked in parts)


def lines(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *body])


def plain(value: object) -> str:
    """One piece of text on one line, whatever marks it holds."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    text = text if len(text) <= TABLE_CHARACTERS else text[:TABLE_CHARACTERS] + " ..."
    text = re.sub(r"([\\`*_{}\[\]~])", r"\\\1", text)
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("|", "&#124;")
    return text.replace("\r", "").replace("\n", "<br>")
