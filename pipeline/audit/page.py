"""The page of an audit: the verdict, what to look at, every number with what it means, how rewards are spread."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from pipeline.audit.findings import Finding
from pipeline.audit.log import Log, Numbers
from pipeline.audit.oddities import Oddity
from pipeline.files import write_text
from pipeline.report.distribution import edges_of, shares_of
from pipeline.report.html import render
from pipeline.report.numbers import number
from pipeline.report.svg import Ridge, ridges
from pipeline.report.tables import Cell

FEWEST = 8  # rewards that are drawn
MEANS = {  # number -> what it is called, and what it says
    "prompts/rows": ("rows with a reward", ""),
    "prompts/without_reward": ("rows without a reward", "left out"),
    "prompts/prompts": ("prompts", ""),
    "prompts/rows_per_prompt": ("rows per prompt", "several let rewards be compared within a prompt"),
    "prompts/prompts_with/1": ("prompts with one row", "what to expect of them is told by other prompts alone"),
    "prompts/prompts_with/2": ("with two", ""),
    "prompts/prompts_with/3-4": ("with three or four", ""),
    "prompts/prompts_with/5+": ("with five or more", ""),
    "rewards/mean": ("mean reward", ""),
    "rewards/std": ("standard deviation", ""),
    "rewards/min": ("lowest", ""),
    "rewards/q10": ("a tenth lies below", ""),
    "rewards/q50": ("median", ""),
    "rewards/q90": ("a tenth lies above", ""),
    "rewards/max": ("highest", ""),
    "rewards/levels": ("different rewards", "few: stars or labels"),
    "rewards/outliers": ("far out", "further from the median than 8 times the median distance of those not at it"),
    "rewards/within": ("share of the variance within prompts", "the rest is which prompt it is, and teaches nothing"),
    "learning/value_r2": (
        "R2 of V",
        "how far the prompt's words tell the reward, which is no merit of an answer",
    ),
    "learning/advantage_r2": ("R2 of the advantage", "how far the answer's words tell what is left; 0: not at all"),
    "learning/kept": ("share that A-LOL would keep", "rows that did better than expected"),
    "learning/effective": ("effective share", "how many rows drawing in proportion to the advantage amounts to"),
    "learning/gain/estimate": ("predicted gain", "in units of the reward, of a tilt that half of the rows can carry"),
    "learning/gain/low": ("its 90 % interval, from", ""),
    "learning/gain/high": ("to", ""),
    "learning/length/correlation": ("reward against words", "correlation"),
    "learning/length/gain": ("gain of following length alone", "to compare with the predicted gain"),
    "duplicates/repeated": ("rows that repeat another, reward and all", ""),
    "duplicates/conflicting": ("rows rated otherwise elsewhere", "same prompt, same answer, another reward"),
    "duplicates/conflict_spread": ("by how much", "mean distance of the highest and the lowest"),
    "duplicates/stock": ("rows with a stock answer", "given to three prompts or more"),
    "prompts/held_out_too": ("held-out prompts that stand in train", ""),
    "lengths/words": ("words per answer", ""),
    "lengths/long_prompts": ("prompts that are too long, about", "1.4 tokens a word, against data.max_prompt_length"),
    "lengths/long_answers": ("answers that are too long, about", "against data.max_response_length"),
}
TITLES = {
    "prompts": "Rows",
    "rewards": "Rewards",
    "learning": "What can be learned",
    "duplicates": "Repetition",
    "lengths": "Length",
}


class Audited(NamedTuple):
    """All that the page shows."""

    name: str  # of the run
    headline: Finding
    findings: Sequence[Finding]
    numbers: Mapping[str, float]
    fitted: Log
    advantage: Numbers  # of the fitted rows
    odd: Sequence[Oddity]
    named: Sequence[Sequence[str]]  # a table of named rewards, its head first


def build(path: Path, audited: Audited) -> None:
    """Write the page to `path`."""
    rows = audited.numbers["prompts/rows"]
    context = {
        "title": f"Audit: {audited.name}",
        "name": audited.name,
        "headline": audited.headline,
        "found": audited.findings,
        "tables": {title: found for part, title in TITLES.items() if (found := _table(part, audited.numbers))},
        "picture": _picture(audited.fitted.rewards, audited.advantage),
        "odd": [(one.name, f"{one.count:,}", f"{one.count / rows:.1%}", one.first) for one in audited.odd],
        "named": audited.named,
    }
    write_text(path, render("audit.html", context))


def _table(part: str, numbers: Mapping[str, float]) -> list[tuple[Cell, str]]:
    """What a number is called, and what it says; the number."""
    return [
        (Cell(called, note=means), _shown(key, numbers[key]))
        for key, (called, means) in MEANS.items()
        if key.startswith(f"{part}/") and key in numbers
    ]


def _shown(key: str, value: float) -> str:
    if key in ("rewards/within", "learning/kept", "learning/effective"):
        return f"{value:.0%}"
    return f"{value:,.0f}" if value == int(value) and abs(value) >= 1 else number(value)


def _picture(rewards: Numbers, advantage: Numbers) -> str:
    if len(rewards) < FEWEST or rewards.min() == rewards.max():
        return ""
    edges = edges_of(rewards.tolist())
    rows = [("all rows", rewards), ("rows that A-LOL would keep", rewards[advantage > 0])]
    drawn = [
        Ridge(f"{name}, mean {number(float(values.mean()))}", float(values.mean()), shares_of(values.tolist(), edges))
        for name, values in rows
        if len(values)
    ]
    return ridges(drawn, edges, "reward", f"Distribution of rewards: {'; '.join(one.name for one in drawn)}")
