"""A run's directory -> report.html: one page that a person can read and send.

Read are, per stage directory, config.yaml, command.txt, metrics.jsonl and results.json; and of evaluate also
samples/*.jsonl with rows {"policy", "id", "prompt", "response", "reward", "rewards"}. What is missing is left out.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from pipeline import page
from pipeline.charts import number
from pipeline.metrics import flatten, read_metrics, write_text
from pipeline.records import UserError
from pipeline.report_curves import series_of, show_curves
from pipeline.report_results import columns_of, comparison, final_numbers, side_by_side

FILES = ("config.yaml", "metrics.jsonl", "results.json")  # a directory with one of these is a stage's
SAMPLES = 8
STAGES = {
    "sft": ("Supervised fine-tuning", "The model learns to imitate good responses. What comes out is the start of RL."),
    "reward": ("Reward model", "A model learns from pairs which of two responses people prefer, and gives it a score."),
    "score": ("Scoring", "Logged responses get the reward models' scores."),
    "rl": ("Reinforcement learning", "The policy is moved towards responses with a higher reward."),
    "generate": ("Generation", "A policy answers prompts."),
    "evaluate": ("Evaluation", "All policies answer the same held-out prompts, and the same rewards judge them."),
}


class Stage(NamedTuple):
    """What one stage left: its path within the run, its kind, and the content of its files."""

    name: str
    kind: str
    config: str
    command: str
    rows: list[dict[str, float | None]]
    results: dict[str, object]

    @property
    def title(self) -> str:
        words = STAGES[self.kind][0] if self.kind in STAGES else self.kind
        return f"{words}: {self.name.split('/', 1)[1]}" if "/" in self.name else words

    @property
    def anchor(self) -> str:
        return self.name.replace("/", "-")


def build(run_dir: Path) -> Path:
    """Write `run_dir`/report.html and return its path. Raises UserError if no stage has left anything there."""
    run_dir = Path(run_dir)
    stages = _stages(run_dir)
    if not stages:
        raise UserError(
            f"{run_dir}: no stage has left anything to report, wanted at least one of {', '.join(STAGES)} with "
            f"{' or '.join(FILES)}; run a stage first, or name another run with run="
        )
    policies = _policies(stages)
    table, remarks = comparison(policies) if policies else ("", [])
    table = page.heading(2, "Results", "results") + table if policies else ""
    sections = ""
    for stage in stages:
        html, warnings = _section(stage)
        sections += html
        remarks += [f"{stage.title}. {warning}" for warning in warnings]
    body = _top(run_dir, stages) + table + page.heading(2, "What to look at", "look")
    body += page.findings(remarks, "Every curve ended in its healthy range.")
    body += _samples(run_dir / "evaluate" / "samples", list(policies)) + sections + _commands(stages)
    path = run_dir / "report.html"
    write_text(path, page.document(f"Report: {run_dir.resolve().name}", body))
    return path


def _stages(run_dir: Path) -> list[Stage]:
    folders = [p for pattern in ("*", "*/*") for p in run_dir.glob(pattern) if any((p / f).is_file() for f in FILES)]
    order = list(STAGES)
    names = [str(folder.relative_to(run_dir)).replace(os.sep, "/") for folder in folders]
    kinds = {name: name.split("/")[0] for name in names}
    names.sort(key=lambda name: (order.index(kinds[name]) if kinds[name] in order else len(order), name))
    return [_stage(run_dir / name, name, kinds[name]) for name in names]


def _stage(folder: Path, name: str, kind: str) -> Stage:
    return Stage(
        name,
        kind,
        _text(folder / "config.yaml"),
        _text(folder / "command.txt"),
        read_metrics(folder / "metrics.jsonl"),
        _results(folder / "results.json"),
    )


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _results(path: Path) -> dict[str, object]:
    return _parsed(path.read_text(encoding="utf-8"), str(path)) if path.is_file() else {}


def _parsed(text: str, place: str) -> dict:
    """The JSON object that `text` is. Raises UserError naming `place` if it is none."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: not JSON ({error.msg}); run the stage again") from error
    if not isinstance(value, dict):
        raise UserError(f"{place}: found {type(value).__name__}, wanted a JSON object; run the stage again")
    return value


def _top(run_dir: Path, stages: Sequence[Stage]) -> str:
    files = [run_dir / stage.name / name for stage in stages for name in FILES]
    newest = max(path.stat().st_mtime for path in files if path.is_file())
    when = time.strftime("%d %B %Y, %H:%M", time.localtime(newest))
    entries = [("samples", "Samples")] if (run_dir / "evaluate" / "samples").is_dir() else []
    entries += [(stage.anchor, stage.title) for stage in stages]
    return (
        page.heading(1, run_dir.resolve().name)
        + page.paragraph(f"{len(stages)} stages, last changed {when}", "soft")
        + page.links(entries)
    )


def _policies(stages: Sequence[Stage]) -> dict[str, Mapping[str, float]]:
    """Policy -> metric -> value, of the evaluation; the first policy is what the others are compared with."""
    found = [stage.results for stage in stages if stage.name == "evaluate"]
    return columns_of(found[0]) if found else {}


def _section(stage: Stage) -> tuple[str, list[str]]:
    html = page.heading(2, stage.title, stage.anchor)
    if stage.kind in STAGES:
        html += page.paragraph(STAGES[stage.kind][1])
    if stage.rows:
        steps, seconds = stage.rows[-1]["step"], stage.rows[-1].get("time") or 0.0
        html += page.paragraph(f"{steps:,} steps in {_duration(seconds)}", "soft")
    flat = flatten(stage.results)
    if stage.kind != "evaluate" and stage.results:
        columns = columns_of(stage.results)
        html += side_by_side(columns) if columns else final_numbers(flat)
    if stage.config:
        html += page.fold("Settings", stage.config)
    shown = show_curves(stage.kind, series_of(stage.rows), flat)
    return html + shown.html, shown.warnings


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _samples(folder: Path, policies: Sequence[str]) -> str:
    """A few prompts with every policy's response, evenly spaced from the largest gain in reward to the largest loss."""
    rows = [row for path in sorted(folder.glob("*.jsonl")) for row in _sample_rows(path)]
    rows.sort(key=lambda row: policies.index(row["policy"]) if row["policy"] in policies else len(policies))
    prompts: dict[str, dict[str, dict]] = {}  # id -> policy -> row
    for row in rows:
        prompts.setdefault(str(row["id"]), {})[row["policy"]] = row
    ranked = sorted(prompts.values(), key=_gain, reverse=True)
    if not ranked:
        return ""
    count = min(SAMPLES, len(ranked))
    chosen = [ranked[round(i * (len(ranked) - 1) / max(1, count - 1))] for i in range(count)]
    words = f"{count} of {len(ranked)} prompts, evenly spaced from the largest gain in reward to the largest loss."
    shown = "".join(page.sample(_prompt(s), [_response(row) for row in s.values()]) for s in chosen)
    return page.heading(2, "Samples", "samples") + page.paragraph(words) + shown


def _sample_rows(path: Path) -> list[dict]:
    rows = []
    for place, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], 1):
        row = _parsed(line, f"{path}:{place}")
        missing = [key for key in ("policy", "id", "prompt", "response") if key not in row]
        if missing:
            raise UserError(f"{path}:{place}: no '{missing[0]}' in the row; run the stage again")
        rows.append(row)
    return rows


def _gain(by_policy: Mapping[str, Mapping]) -> float:
    rewards = [row.get("reward") or 0.0 for row in by_policy.values()]
    return rewards[-1] - rewards[0]


def _prompt(by_policy: Mapping[str, Mapping]) -> str:
    return str(next(iter(by_policy.values()))["prompt"]).strip()


def _response(row: Mapping) -> tuple[str, str, str]:
    scores = {"reward": row.get("reward"), **(row.get("rewards") or {})}
    text = ", ".join(f"{name} {number(value)}" for name, value in scores.items() if value is not None)
    return str(row["policy"]), text, str(row["response"])


def _commands(stages: Sequence[Stage]) -> str:
    lines = [f"# {stage.name}\n{stage.command.strip()}" for stage in stages if stage.command.strip()]
    return page.heading(2, "What was run", "commands") + page.literal("\n".join(lines)) if lines else ""
