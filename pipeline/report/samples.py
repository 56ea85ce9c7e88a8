"""Prompts with every policy's response side by side, and what the rewards gave them; below, what RL learned from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.records import UserError
from pipeline.report import html as page
from pipeline.report import html_samples as page_samples
from pipeline.report.compositions import show_compositions
from pipeline.report.rollouts import ROLLOUT, show_rollouts
from pipeline.report.stages import json_object
from pipeline.report.svg import MINUS, number

SAMPLES = 8
Answers = Mapping[str, Mapping]  # policy -> row of a samples file


def show_samples(run_dir: Path, policies: Sequence[str]) -> str:
    """Responses to a few prompts, what RL made of some static ones, what it sampled; nothing where there is nothing."""
    shown = show_responses(run_dir, policies) + show_compositions(run_dir) + show_rollouts(run_dir)
    return page.heading(2, "Samples", "samples") + shown if shown else ""


def show_responses(run_dir: Path, policies: Sequence[str]) -> str:
    """A few prompts, evenly spaced from the largest gain in reward to the largest loss; nothing where there are none.

    The evaluation's samples, in the order of `policies`; before there are any, those that RL took at its first and at
    its last look.
    """
    rows = [row for path in sorted((run_dir / "evaluate" / "samples").glob("*.jsonl")) for row in _rows(path, {})]
    names, source = list(policies), "held-out prompts of the evaluation"
    if not rows:
        looks = sorted((run_dir / "rl" / "samples").glob("step-*.jsonl"))
        names = [f"step {int(path.stem.removeprefix('step-')):,}" for path in looks]
        shown = {names[i]: looks[i] for i in (0, -1)} if len(looks) > 1 else {}
        rows = [row for name, path in shown.items() for row in _rows(path, {"policy": name})]
        source = "held-out prompts, before RL and at its last look"
    ranked = _ranked(rows, names)
    if not ranked:
        return ""
    count = min(SAMPLES, len(ranked))
    chosen = [ranked[round(i * (len(ranked) - 1) / max(1, count - 1))] for i in range(count)]
    words = f"{count} of {len(ranked)} {source}, evenly spaced from the largest gain in reward to the largest loss."
    shown = "".join(page_samples.sample(_prompt(answers), _responses(answers)) for answers in chosen)
    return page.paragraph(words) + shown


def _ranked(rows: Sequence[Mapping], names: Sequence[str]) -> list[Answers]:
    """Per prompt the rows of all policies in the order of `names`; the largest gain first."""
    ordered = sorted(rows, key=lambda row: names.index(row["policy"]) if row["policy"] in names else len(names))
    prompts: dict[str, dict[str, Mapping]] = {}  # id -> policy -> row
    for row in ordered:
        prompts.setdefault(str(row["id"]), {})[row["policy"]] = row
    return sorted(prompts.values(), key=_gain, reverse=True)


def _rows(path: Path, more: Mapping[str, str]) -> list[dict]:
    """The responses in a samples file, each with `more`."""
    rows = []
    for place, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], 1):
        row = {**json_object(line, f"{path}:{place}"), **more}
        if "compositions" in row or row.get("kind") == ROLLOUT:
            continue
        missing = [key for key in ("policy", "id", "prompt", "response") if key not in row]
        if missing:
            raise UserError(f"{path}:{place}: no '{missing[0]}' in the row; run the stage again")
        rows.append(row)
    return rows


def _gain(answers: Answers) -> float:
    rewards = [row.get("reward") or 0.0 for row in answers.values()]
    return rewards[-1] - rewards[0]


def _prompt(answers: Answers) -> str:
    return str(next(iter(answers.values()))["prompt"]).strip()


def _responses(answers: Answers) -> list[page_samples.Answer]:
    first = next(iter(answers.values())).get("reward")
    return [_response(policy, row, first) for policy, row in answers.items()]


def _response(policy: str, row: Mapping, first: float | None) -> page_samples.Answer:
    reward, text = row.get("reward"), ""
    if reward is not None:
        gain = 0.0 if first is None else reward - first
        change = f" ({'+' if gain > 0 else MINUS}{number(abs(gain))})" if gain else ""
        text = f"reward {number(reward)}{change}"
    parts = [f"{name} {number(value)}" for name, value in (row.get("rewards") or {}).items() if value is not None]
    words = len(str(row["response"]).split())
    return page_samples.Answer(policy, text, ", ".join([*parts, f"{words} words"]), str(row["response"]))
