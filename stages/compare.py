"""Methods side by side: a recipe once per seed, RL once per variant, one evaluation, then tables and a page.

Leaves in runs/<run>/compare/: results.json, {variant: {metric: spread over seeds}}; table.md; compare.html; gain.svg;
logs/.
"""

from __future__ import annotations

import json
import shlex
import statistics
from collections.abc import Sequence
from pathlib import Path

from pipeline.config.schema import CompareStage
from pipeline.config.yaml_text import dump_yaml
from pipeline.files import read_metrics, write_json, write_text
from pipeline.launch import comparison_plan, run_dir, scheduler
from pipeline.launch.comparison_plan import Results, Study
from pipeline.launch.entry import run
from pipeline.report import comparison
from pipeline.report.stage_checks import series_of, spent

PLAIN = "nll"  # the method that is fine-tuning and no more
OF_RL = {"advantage/kept_fraction": "rl/kept_fraction", "value/r2": "rl/value_r2"}  # known before the first step


def main(settings: CompareStage, words: Sequence[str]) -> None:
    directory = run_dir.stage_dir(settings, "compare")
    plan = comparison_plan.plan(settings, words)
    directory.mkdir(parents=True, exist_ok=True)
    write_text(directory / "command.txt", "bash run.sh " + shlex.join(words) + "\n")
    write_text(directory / "config.yaml", dump_yaml(settings.model_dump()))

    failed = scheduler.run_all(plan.tasks, settings.jobs, directory / "logs")
    if failed:
        raise SystemExit(next(iter(failed.values())))  # each has had its line
    write(directory, plan)


def write(directory: Path, plan: Study) -> None:
    """The comparison from what the steps left."""
    by_seed = {seed: numbers(results, plan) for seed, results in plan.results.items()}
    baselines = (plan.start, PLAIN)
    table, seeds = comparison.summary(by_seed, baselines), list(plan.results)
    text = comparison.markdown(table, baselines, seeds)
    write_json(directory / "results.json", table)
    title = f"Comparison: {directory.parent.resolve().name}"
    files = {"table.md": text, "compare.html": comparison.document(title, table, baselines, seeds)}
    if drawn := comparison.gain_picture(table, plan.start):
        files["gain.svg"] = drawn
    for name, content in files.items():
        write_text(directory / name, content)
    print(f"{text}\n{', '.join(str(directory / name) for name in [*files, 'results.json'])}", flush=True)


def numbers(results: Results, plan: Study) -> dict[str, dict[str, float]]:
    """One seed's metrics by variant: what the evaluation found, and what the rl stage knew and took."""
    judged = json.loads((results.evaluation / "results.json").read_text(encoding="utf-8"))
    by_variant = {variant: comparison.with_sums(metrics, plan.weights) for variant, metrics in judged.items()}
    for variant, directory in results.variants.items():
        rows = read_metrics(directory / "metrics.jsonl")
        first = rows[0]
        by_variant[variant] |= {tag: first[name] for name, tag in OF_RL.items() if name in first}
        left = json.loads((directory / "results.json").read_text(encoding="utf-8"))
        by_variant[variant] |= {f"rl/{name}": value for name, value in spent(series_of(rows)).items()}
        by_variant[variant]["rl/seconds"] = left["seconds"]
        if steps := [row["perf/step_seconds"] for row in rows if "perf/step_seconds" in row]:
            by_variant[variant]["rl/step_seconds"] = statistics.fmean(steps)
    plain = by_variant.get(PLAIN, {}).get("rl/step_seconds")
    for variant in results.variants:
        if plain and "rl/step_seconds" in by_variant[variant]:
            by_variant[variant]["rl/cost"] = by_variant[variant]["rl/step_seconds"] / plain
    return by_variant


if __name__ == "__main__":
    run(main, "compare")
