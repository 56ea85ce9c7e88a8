"""A run's directory -> report.html: one page that a person can read and send.

Read are, per stage directory, config.yaml, command.txt, metrics.jsonl and results.json; and of evaluate also
samples/*.jsonl with rows {"policy", "id", "prompt", "response", "reward", "rewards"}. What is missing is left out.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from pipeline import page
from pipeline.charts import MINUS, NOTHING, number
from pipeline.glossary import Metric, metric_of
from pipeline.metrics import flatten, read_metrics
from pipeline.records import UserError
from pipeline.report_curves import bounds, series_of, show_curves

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
    comparison, remarks = _comparison(stages)
    sections = ""
    for stage in stages:
        html, warnings = _section(stage)
        sections += html
        remarks += [f"{stage.title}. {warning}" for warning in warnings]
    body = _top(run_dir, stages) + comparison + page.heading(2, "What to look at", "look")
    body += page.findings(remarks, "Every curve ended in its healthy range.")
    body += _samples(run_dir / "evaluate" / "samples", list(_policies(stages))) + sections + _commands(stages)
    path = run_dir / "report.html"
    draft = path.with_name("report.html.tmp")
    draft.write_text(page.document(f"Report: {run_dir.resolve().name}", body), encoding="utf-8")
    os.replace(draft, path)
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
    if not path.is_file():
        return {}
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON ({error.msg}); run the stage again") from error
    if not isinstance(results, dict):
        raise UserError(f"{path}: found {type(results).__name__}, wanted a JSON object; run the stage again")
    return results


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
    return {name: values for name, values in (found[0] if found else {}).items() if isinstance(values, Mapping)}


def _comparison(stages: Sequence[Stage]) -> tuple[str, list[str]]:
    """The headline table, and what must be said about it."""
    policies = _policies(stages)
    if not policies:
        return "", []
    first, *others = policies
    tags = [t for t in dict.fromkeys(t for v in policies.values() for t in v) if not t.endswith("_se")]
    head = ["on held-out prompts", first]
    for other in others:
        head += [other, "difference"]
    rows = [_row(tag, policies) for tag in tags]
    remarks = [r for other in others for r in _remarks(other, policies[first], policies[other], tags)]
    words = (
        f"Differences are against {first}. ± is one standard error over prompts. A change within two standard errors "
        "of the difference counts as the same; where no error is known, one within 2 % or 0.005."
    )
    return page.heading(2, "Results", "results") + page.table(head, rows) + page.paragraph(words, "soft"), remarks


def _row(tag: str, policies: Mapping[str, Mapping[str, float]]) -> list[str]:
    metric, label = metric_of(tag)
    base, *others = policies.values()
    largest = max(abs(values.get(tag) or 0.0) for values in policies.values())
    decimals = 3 if largest < 10 else 1 if largest < 1000 else 0
    cells = [page.cell(label, metric.note), _value(base, tag, decimals)]
    for other in others:
        cells += [_value(other, tag, decimals), _difference(metric, tag, base, other, decimals)]
    return cells


def _value(values: Mapping[str, float], tag: str, decimals: int) -> str:
    value, error = values.get(tag), values.get(f"{tag}_se")
    return page.cell(_fixed(value, decimals), error="" if error is None else _fixed(error, decimals))


def _fixed(value: float | None, decimals: int) -> str:
    return NOTHING if value is None else f"{value:,.{decimals}f}".replace("-", MINUS)


def _difference(metric: Metric, tag: str, base: Mapping[str, float], other: Mapping[str, float], decimals: int) -> str:
    """The change against the first policy, with a verdict where the metric has a better direction."""
    if base.get(tag) is None or other.get(tag) is None:
        return page.cell(NOTHING)
    change = other[tag] - base[tag]
    text = ("+" if change > 0 else "") + _fixed(change, decimals)
    if not metric.better:
        return page.cell(text)
    if abs(change) <= _noise(tag, base, other):
        return page.cell(f"{text} ≈ same", kind="same")
    better = change * metric.better > 0
    return page.cell(f"{text} {'▲ better' if better else '▼ worse'}", kind="better" if better else "worse")


def _noise(tag: str, base: Mapping[str, float], other: Mapping[str, float]) -> float:
    """The change that says nothing: two standard errors of a difference, or 2 % or 0.005 where no error is known."""
    errors = [values.get(f"{tag}_se") for values in (base, other)]
    return max(0.02 * abs(base[tag]), 0.005) if None in errors else 2 * math.hypot(*errors)


def _remarks(name: str, base: Mapping[str, float], other: Mapping[str, float], tags: Sequence[str]) -> list[str]:
    remarks = []
    for tag in tags:
        metric, label = metric_of(tag)
        if base.get(tag) is None or other.get(tag) is None:
            continue
        low, high = bounds(metric.healthy, [base[tag]])
        words = f"Results. {label} went from {number(base[tag])} to {number(other[tag])} with {name}"
        if low is not None and other[tag] < low:
            remarks.append(f"{words}: {metric.healthy.below}.")
        if high is not None and other[tag] > high:
            remarks.append(f"{words}: {metric.healthy.above}.")
        if tag.startswith("oracle:") and other[tag] < base[tag] and _rose("reward/mean", base, other):
            remarks.append(f"{words} although the reward rose: the policy exploits the reward models.")
    return remarks


def _rose(tag: str, base: Mapping[str, float], other: Mapping[str, float]) -> bool:
    return base.get(tag) is not None and other.get(tag) is not None and other[tag] > base[tag]


def _section(stage: Stage) -> tuple[str, list[str]]:
    html = page.heading(2, stage.title, stage.anchor)
    if stage.kind in STAGES:
        html += page.paragraph(STAGES[stage.kind][1])
    if stage.rows:
        steps, seconds = stage.rows[-1]["step"], stage.rows[-1].get("time") or 0.0
        html += page.paragraph(f"{steps:,} steps in {_duration(seconds)}", "soft")
    flat = flatten(stage.results)
    if stage.kind != "evaluate":
        html += page.tiles([(tag, _plain(value)) for tag, value in flat.items()]) if flat else ""
    if stage.config:
        html += page.fold("Settings", stage.config)
    shown = show_curves(stage.kind, series_of(stage.rows), flat)
    return html + shown.html, shown.warnings


def _plain(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return NOTHING if value is None else str(value)
    return f"{value:,}" if isinstance(value, int) else number(value)


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
    for number_, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        row = json.loads(line)
        missing = [key for key in ("policy", "id", "prompt", "response") if key not in row]
        if missing:
            raise UserError(f"{path}:{number_}: no '{missing[0]}' in the row; run stage=evaluate again")
        rows.append(row)
    return rows


def _gain(by_policy: Mapping[str, Mapping]) -> float:
    rewards = [row.get("reward") or 0.0 for row in by_policy.values()]
    return rewards[-1] - rewards[0]


def _prompt(by_policy: Mapping[str, Mapping]) -> str:
    return str(next(iter(by_policy.values()))["prompt"])


def _response(row: Mapping) -> tuple[str, str, str]:
    scores = {"reward": row.get("reward"), **(row.get("rewards") or {})}
    text = ", ".join(f"{name} {number(value)}" for name, value in scores.items() if value is not None)
    return str(row["policy"]), text, str(row["response"])


def _commands(stages: Sequence[Stage]) -> str:
    lines = [f"# {stage.name}\n{stage.command.strip()}" for stage in stages if stage.command.strip()]
    return page.heading(2, "What was run", "commands") + page.literal("\n".join(lines)) if lines else ""
