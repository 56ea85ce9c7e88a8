"""Semi-offline RL's sample tables for the report: what was hidden, the texts made of it with their rewards, the credit.

Read are the rows of pipeline/masked_table.py in a stage's samples/step-N.jsonl, of its first and of its last look.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.records import UserError
from pipeline.report import html as page
from pipeline.report import html_samples as page_samples
from pipeline.report.stages import json_object
from pipeline.report.svg import MINUS, number

OPEN = 3  # rows that stand there without a click
KEYS = ("id", "prompt", "reference", "static", "samples", "mean", "greedy", "compositions", "praised", "blamed")


def show_compositions(run_dir: Path) -> str:
    """The compositions of RL, and behind a line to click on those of each RL stage with a name of its own."""
    named = {folder.name: _last_look(folder) for folder in sorted((run_dir / "rl").glob("*"))}
    html = _last_look(run_dir / "rl")
    html += "".join(page.folded(f"Compositions of {name}", shown) for name, shown in named.items() if shown)
    return page.heading(3, "Compositions") + html if html else ""


def _last_look(folder: Path) -> str:
    """The rows of the last look of the stage in `folder`, each beside its numbers at the first; nothing without any."""
    looks = [(path, compositions(path)) for path in sorted((folder / "samples").glob("step-*.jsonl"))]
    looks = [(path, rows) for path, rows in looks if rows]
    if not looks:
        return ""
    (first, before), (last, rows) = looks[0], looks[-1]
    known = {row["id"]: row for row in before} if last != first else {}
    words = (
        f"Static responses of {len(rows)} rows trained on, at {_step(last)}: marked tokens are hidden from the policy, "
        "which draws others in their places. All texts of a row come from one forward; the greedy one is for "
        "comparison, and nothing is learned from it. A token's credit is the advantage of the texts that have it in "
        "that place."
    )
    shown = [page_samples.composed(_composed(row, known.get(row["id"]), _step(first))) for row in rows]
    rest = page.folded(f"{len(shown) - OPEN} more rows", "".join(shown[OPEN:])) if len(shown) > OPEN else ""
    return page.paragraph(words) + "".join(shown[:OPEN]) + rest


def compositions(path: Path) -> list[dict[str, Any]]:
    """The rows of a samples file that are compositions. Raises UserError where one lacks something."""
    found = []
    for place, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], 1):
        row = json_object(line, f"{path}:{place}")
        missing = [key for key in KEYS if key not in row]
        if "compositions" in row and missing:
            raise UserError(f"{path}:{place}: no '{missing[0]}' in the row; run the stage again")
        found += [row] if "compositions" in row else []
    return found


def _composed(row: Mapping[str, Any], before: Mapping[str, Any] | None, when: str) -> page_samples.Composed:
    count = sum(flag for _, flag in row["static"]["parts"])
    texts = [("greedy", row["greedy"]), *(("", one) for one in row["compositions"])]
    texts.sort(key=lambda one: -one[1]["reward"])  # stable: the greedy one stands above equals
    words = f"{row['samples']} texts, mean reward {number(row['mean'])}"
    if len(row["compositions"]) < row["samples"]:
        words += f"; the best and the worst {len(row['compositions'])}"
    if before is not None:
        words += f". At {when}: mean {number(before['mean'])}, greedy {number(before['greedy']['reward'])}"
    return page_samples.Composed(
        prompt=row["prompt"].strip(),
        reference=row["reference"],
        static=row["static"]["parts"],
        hidden=f"{count} tokens hidden",
        words=f"{words}.",
        texts=[page_samples.Ranked(number(one["reward"]), name, one["parts"]) for name, one in texts],
        credit=[(name, _tokens(row[key])) for name, key in (("most credit", "praised"), ("least credit", "blamed"))],
    )


def _tokens(found: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    return [(one["token"], one["instead_of"], _signed(one["credit"])) for one in found]


def _signed(value: float) -> str:
    return ("+" if value > 0 else MINUS) + number(abs(value))


def _step(path: Path) -> str:
    return f"step {int(path.stem.removeprefix('step-')):,}"
