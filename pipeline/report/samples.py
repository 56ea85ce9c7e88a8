"""Prompts with every policy's response side by side; what RL made of static responses, and what it sampled.

Three kinds of rows lie in samples/*.jsonl: responses, those of kind "rollout", and those with "compositions".
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.errors import UserError
from pipeline.report.html import render
from pipeline.report.numbers import alike, number, signed
from pipeline.report.stages import Stage, json_object
from pipeline.words import between_blanks

SAMPLES = 8  # prompts with responses side by side
ROLLOUT, COMPOSITIONS, RESPONSE = KINDS = ("rollout", "compositions", "response")
KEYS = {  # what a row of each kind must have
    ROLLOUT: ("prompt", "response", "reward", "advantage", "capability", "temperature", "tokens"),
    COMPOSITIONS: (
        *("id", "prompt", "reference", "static", "samples", "mean", "greedy", "compositions", "praised", "blamed"),
    ),
    RESPONSE: ("policy", "id", "prompt", "response"),
}
Row = Mapping[str, Any]


class Answer(NamedTuple):
    """One policy's response, with its reward and the parts of it as text."""

    policy: str
    reward: str
    parts: str
    text: str


class Shown(NamedTuple):
    """A prompt's row, the line about its texts, and the texts, the best first."""

    row: Row
    about: str
    texts: list[Any]


class LastSamples(NamedTuple):
    """The last samples of one kind that an RL stage took."""

    step: str
    shown: list[Shown]


def show_samples(run_dir: Path, evaluation: Stage | None) -> str:
    """Responses to a few prompts side by side; nothing where there are none."""
    prompts, count, source = responses(run_dir, evaluation)
    return render("samples.html", {"prompts": prompts, "count": count, "source": source}).strip()


def show_samples_of_rl(folder: Path) -> str:
    """What an RL stage made of some static responses, and what it sampled, at last; nothing where there is nothing."""
    shown = {"compositions_of_rl": _last_samples(folder, COMPOSITIONS), "sampled_in_rl": _last_samples(folder, ROLLOUT)}
    return render("samples_of_rl.html", shown).strip()


def responses(run_dir: Path, evaluation: Stage | None) -> tuple[list[tuple[str, list[Answer]]], int, str]:
    """A few prompts with their answers, evenly spaced from the largest gain in reward to the largest loss; these two
    and the one in the middle come before the others.

    The evaluation's samples, in the order of its policies; before there are any, the first and the last that RL took.
    Second, of how many prompts; third, where they are from.
    """
    names, source = list(evaluation.results) if evaluation else [], "held-out prompts of the evaluation"
    files = sorted((evaluation.folder / "samples").glob("*.jsonl")) if evaluation else []
    rows = [row for path in files for row in _rows(path, RESPONSE)]
    if not rows:
        taken = {_step(path): path for path in sorted((run_dir / "rl" / "samples").glob("step-*.jsonl"))}
        names, source = list(taken), "held-out prompts, before RL and at its last evaluation"
        ends = (names[0], names[-1]) if len(names) > 1 else ()
        rows = [row for name in ends for row in _rows(taken[name], RESPONSE, {"policy": name})]
    ranked = _ranked(rows, names)
    count = min(SAMPLES, len(ranked))
    chosen = [ranked[round(i * (len(ranked) - 1) / max(1, count - 1))] for i in range(count)]
    ends = {0, len(chosen) // 2, len(chosen) - 1}  # stand before the others
    chosen = [one for first in (True, False) for i, one in enumerate(chosen) if (i in ends) is first]
    return [_answers(rows) for rows in chosen], len(ranked), source


def _rows(path: Path, kind: str, more: Row | None = None) -> list[Row]:
    """The rows of one kind in a samples file, each with `more`. Raises UserError where one lacks something."""
    answers = []
    for place, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], 1):
        row = {**json_object(line, f"{path}:{place}"), **(more or {})}
        if kind != (ROLLOUT if row.get("kind") == ROLLOUT else COMPOSITIONS if COMPOSITIONS in row else RESPONSE):
            continue
        missing = [key for key in KEYS[kind] if key not in row]
        if missing:
            raise UserError(f"{path}:{place}: no '{missing[0]}' in the row; run the stage again")
        answers.append(row)
    return answers


def _step(path: Path) -> str:
    return f"step {int(path.stem.removeprefix('step-')):,}"


# responses of several policies


def _ranked(rows: Sequence[Row], names: Sequence[str]) -> list[Sequence[Row]]:
    """Per prompt the rows of all policies in the order of `names`; the largest gain first."""
    ordered = sorted(rows, key=lambda row: names.index(row["policy"]) if row["policy"] in names else len(names))
    prompts: dict[str, dict[str, Row]] = {}  # id -> policy -> row
    for row in ordered:
        prompts.setdefault(str(row["id"]), {})[row["policy"]] = row
    return sorted((list(found.values()) for found in prompts.values()), key=_gain, reverse=True)


def _gain(rows: Sequence[Row]) -> float:
    return (rows[-1].get("reward") or 0.0) - (rows[0].get("reward") or 0.0)


def _answers(rows: Sequence[Row]) -> tuple[str, list[Answer]]:
    """The prompt, and what each policy says to it."""
    first = rows[0].get("reward")
    return str(rows[0]["prompt"]).strip(), [_answer(row, first) for row in rows]


def _answer(row: Row, first: float | None) -> Answer:
    reward, text = row.get("reward"), ""
    if reward is not None:
        change = "" if first is None or alike(reward, first) else f" ({signed(reward - first)})"
        text = f"reward {number(reward)}{change}"
    parts = [f"{name} {number(value)}" for name, value in (row.get("rewards") or {}).items() if value is not None]
    response = str(row["response"])
    count = len(between_blanks(response))  # as the evaluation counts
    return Answer(row["policy"], text, ", ".join([*parts, f"{count} word{'s' * (count != 1)}"]), response)


# samples of RL


def _last_samples(folder: Path, kind: str) -> LastSamples | None:
    """The last samples of this kind that an RL stage took, if any."""
    taken = [(_step(path), _rows(path, kind)) for path in sorted((folder / "samples").glob("step-*.jsonl"))]
    taken = [(step, rows) for step, rows in taken if rows]
    if not taken:
        return None
    return LastSamples(taken[-1][0], _compositions(taken) if kind == COMPOSITIONS else _rollouts(taken[-1][1]))


def _compositions(taken: Sequence[tuple[str, list[Row]]]) -> list[Shown]:
    """The last compositions, each beside its numbers among the first."""
    when, first = taken[0]
    before = {row["id"]: row for row in first} if len(taken) > 1 else {}
    shown = []
    for row in taken[-1][1]:
        texts = [("greedy", row["greedy"]), *(("", one) for one in row["compositions"])]
        texts.sort(key=lambda one: -one[1]["reward"])  # stable: the greedy one stands above equals
        words = f"{row['samples']} texts, mean reward {number(row['mean'])}"
        if len(row["compositions"]) < row["samples"]:
            words += f"; the best and the worst {len(row['compositions'])}"
        if row["id"] in before:
            old = before[row["id"]]
            words += f". At {when}: mean {number(old['mean'])}, greedy {number(old['greedy']['reward'])}"
        shown.append(Shown(row, f"{words}.", texts))
    return shown


def _rollouts(rows: Sequence[Row]) -> list[Shown]:
    """The responses prompt by prompt."""
    shown = []
    for _, group in groupby(rows, key=lambda row: row["prompt"]):
        texts = sorted(group, key=lambda row: -row["reward"])
        row, rewards = texts[0], [text["reward"] for text in texts]
        many = "1 response" if len(texts) == 1 else f"{len(texts)} responses"
        words = f"{many} at temperature {number(row['temperature'])}, mean reward {number(statistics.fmean(rewards))}"
        known = "unknown" if row["capability"] is None else number(row["capability"])
        equal = " All earn the same." if len(texts) > 1 and len({*rewards}) == 1 else ""
        shown.append(Shown(row, f"{words}. Capability before the step: {known}.{equal}", texts))
    return shown
