"""On-policy RL's sample tables for the report: a prompt, then the responses sampled for it, the best first.

Read are the rows of kind "rollout", which pipeline/rollout/groups.py makes, in a stage's samples/step-N.jsonl of its
last look.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from pipeline import page, page_samples
from pipeline.charts import MINUS, number
from pipeline.errors import UserError
from pipeline.report_stages import json_object

ROLLOUT = "rollout"  # the kind of these rows
OPEN = 3  # prompts that stand there without a click
ENDS = 4  # responses shown of the best, and of the worst; those between are a click away
KEYS = ("prompt", "response", "reward", "advantage", "capability", "temperature", "tokens")


def show_rollouts(run_dir: Path) -> str:
    """What RL sampled, and behind a line to click on what each RL stage with a name of its own did."""
    named = {folder.name: _last_look(folder) for folder in sorted((run_dir / "rl").glob("*"))}
    html = _last_look(run_dir / "rl")
    html += "".join(page.folded(f"Sampled responses of {name}", shown) for name, shown in named.items() if shown)
    return page.heading(3, "Sampled responses") + html if html else ""


def _last_look(folder: Path) -> str:
    """The prompts of the last look of the stage in `folder`; nothing without any."""
    looks = [(path, rollouts(path)) for path in sorted((folder / "samples").glob("step-*.jsonl"))]
    looks = [(path, groups) for path, groups in looks if groups]
    if not looks:
        return ""
    path, groups = looks[-1]
    words = (
        f"{len(groups)} prompts trained on, with all responses sampled at step "
        f"{int(path.stem.removeprefix('step-')):,}, the best first. Those of positive advantage become likelier, those "
        "of negative advantage less likely."
    )
    shown = [_group(rows) for rows in groups]
    rest = page.folded(f"{len(shown) - OPEN} more prompts", "".join(shown[OPEN:])) if len(shown) > OPEN else ""
    return page.paragraph(words) + "".join(shown[:OPEN]) + rest


def rollouts(path: Path) -> list[list[dict[str, Any]]]:
    """The sampled responses in a samples file, prompt by prompt. Raises UserError where a row lacks something."""
    found = []
    for place, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], 1):
        row = json_object(line, f"{path}:{place}")
        missing = [key for key in KEYS if key not in row]
        if row.get("kind") == ROLLOUT and missing:
            raise UserError(f"{path}:{place}: no '{missing[0]}' in the row; run the stage again")
        found += [row] if row.get("kind") == ROLLOUT else []
    return [list(group) for _, group in groupby(found, key=lambda row: row["prompt"])]


def _group(rows: Sequence[Mapping[str, Any]]) -> str:
    ranked = [_said(row) for row in sorted(rows, key=lambda row: -row["reward"])]
    if len(ranked) <= 2 * ENDS:
        return page_samples.said(rows[0]["prompt"].strip(), _about(rows), ranked, [], [])
    return page_samples.said(rows[0]["prompt"].strip(), _about(rows), ranked[:ENDS], ranked[ENDS:-ENDS], ranked[-ENDS:])


def _about(rows: Sequence[Mapping[str, Any]]) -> str:
    rewards = [row["reward"] for row in rows]
    mean, spread = math.fsum(rewards) / len(rows), max(rewards) - min(rewards)
    from pipeline.algorithms.functional import EQUAL_REWARDS  # here: a page without rollouts needs no torch

    known, many = rows[0]["capability"], "1 response" if len(rows) == 1 else f"{len(rows)} responses"
    sure = "unknown" if known is None else number(known)
    words = f"{many} at temperature {number(rows[0]['temperature'])}, mean reward {number(mean)}"
    equal = " All earn the same." if len(rows) > 1 and spread <= EQUAL_REWARDS else ""
    return f"{words}. Capability before the step: {sure}.{equal}"


def _said(row: Mapping[str, Any]) -> page_samples.Said:
    return page_samples.Said(
        number(row["reward"]), _signed(row["advantage"]), f"{row['tokens']:,}", str(row["response"])
    )


def _signed(value: float) -> str:
    return number(0) if value == 0 else ("+" if value > 0 else MINUS) + number(abs(value))
