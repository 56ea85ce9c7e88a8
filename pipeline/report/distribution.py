"""How the rewards of the held-out responses are spread, policy by policy: who gained, and whether all did or a few.

Read from the rewards.jsonl of an evaluation, which has every response's reward.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from pipeline.errors import UserError
from pipeline.report.numbers import alike, number
from pipeline.report.stages import json_object
from pipeline.report.svg import Ridge, ridges, ticks

BINS = 26  # of the whole range, about: their width is a round number
FEWEST = 8  # responses of a policy below which there is nothing to draw
Rewards = Mapping[str, Mapping[str, float]]  # policy -> prompt's id -> reward


class Distribution(NamedTuple):
    """The picture, and what it shows in words."""

    svg: str
    words: list[str]


def distribution(folder: Path, policies: Sequence[str]) -> Distribution | None:
    """Of the policies in this order, the first of which the others are compared with; None where too few are known."""
    rewards = _rewards(folder / "rewards.jsonl")
    known = {name: rewards[name] for name in policies if len(rewards.get(name, ())) >= FEWEST}
    if not known:
        return None
    words = [_prompt_by_prompt(known, other) for other in list(known)[1:]]
    return Distribution(_picture(known), words)


def _rewards(path: Path) -> dict[str, dict[str, float]]:
    rewards: dict[str, dict[str, float]] = {}
    for place, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.is_file() else [], 1):
        row = json_object(line, f"{path}:{place}")
        missing = [key for key in ("policy", "id", "reward") if key not in row]
        if missing:
            raise UserError(f"{path}:{place}: no '{missing[0]}' in the row; run the stage again")
        if row["reward"] is not None and math.isfinite(row["reward"]):
            rewards.setdefault(row["policy"], {})[str(row["id"])] = row["reward"]
    return rewards


def _prompt_by_prompt(known: Rewards, other: str) -> str:
    first = next(iter(known))
    pairs = [(known[first][name], value) for name, value in known[other].items() if name in known[first]]
    moved = [after > before for before, after in pairs if not alike(before, after)]
    up, down, same = sum(moved), len(moved) - sum(moved), len(pairs) - len(moved)
    parts = [f"{up:,} of {len(pairs):,} prompts are answered better by {other} than by {first}", f"{down:,} worse"]
    return ", ".join([*parts, *([f"{same:,} the same"] if same else [])]) + "."


def _picture(known: Rewards) -> str:
    edges = edges_of([value for rewards in known.values() for value in rewards.values()])
    rows = [
        Ridge(
            f"{name}, mean {number(fmean(rewards.values()))}",
            fmean(rewards.values()),
            shares_of(rewards.values(), edges),
        )
        for name, rewards in known.items()
    ]
    words = "; ".join(row.name for row in rows)
    return ridges(rows, edges, "reward of a response", f"Distribution of rewards: {words}")


def edges_of(values: Sequence[float]) -> list[float]:
    """The borders of the bins, equally wide and at round numbers, with all values between the first and the last."""
    low, high = min(values), max(values)
    room = (high - low) or abs(high) or 1.0
    inner = ticks(low, low + room, BINS)
    width = inner[1] - inner[0]
    first = math.floor(low / width + 1e-9)
    count = max(1, math.ceil(high / width - 1e-9) - first)
    return [round((first + i) * width, 12) for i in range(count + 1)]


def shares_of(values: Collection[float], edges: Sequence[float]) -> list[float]:
    """The share of the rewards in each bin; one at a border is in the upper bin, at the last in the last."""
    width, counts = edges[1] - edges[0], [0] * (len(edges) - 1)
    for value in values:
        counts[min(max(0, math.floor((value - edges[0]) / width + 1e-9)), len(counts) - 1)] += 1
    return [count / len(values) for count in counts]
