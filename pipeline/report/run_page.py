"""A run's directory -> report.html: one page that a person can read and send.

Read are, per stage directory, config.yaml, command.txt, data.json (counts), starts.jsonl, metrics.jsonl,
non_finite/ and results.json; and of evaluate and rl also samples/*.jsonl. What is missing is left out.
"""

from __future__ import annotations

import shlex
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.config.resolve import resolve
from pipeline.config.shipped import shipped
from pipeline.errors import UserError
from pipeline.files import flatten, write_text
from pipeline.report.checks import Verdict
from pipeline.report.closing import next_words
from pipeline.report.curves import show_curves
from pipeline.report.distribution import distribution
from pipeline.report.findings import EVALUATE, Verdicts, evaluations, findings, judge_run
from pipeline.report.headline import of_run
from pipeline.report.html import render
from pipeline.report.numbers import NOTHING, duration, number
from pipeline.report.samples import show_samples, show_samples_of_rl
from pipeline.report.spec import FINE
from pipeline.report.stage_checks import spent
from pipeline.report.stages import FILES, STAGES, Stage, stages_of
from pipeline.report.tables import Finals, Table, columns_of, final_numbers, policies_table, side_by_side
from pipeline.report.usage import model_of

WHERE = ("run", "runs_dir", "name")  # which directory it is, not what was done
LEARNING = ("sft", "reward", "rl")


def build(run_dir: Path) -> Path:
    """Write `run_dir`/report.html and return its path. Raises UserError if no stage has left anything there."""
    run_dir = Path(run_dir)
    stages = stages_of(run_dir)
    if not stages:
        raise UserError(
            f"{run_dir}: no stage has left anything to report, wanted at least one of {', '.join(STAGES)} with "
            f"{' or '.join(FILES)}; run a stage first, or name another run with run="
        )
    judged = judge_run(stages)
    ranked = findings(stages, judged)
    evaluation = (evaluations(stages) or [None])[-1]
    policies = columns_of(evaluation.results) if evaluation else {}
    name = run_dir.resolve().name
    context = {
        "title": f"Report: {name}",
        "name": name,
        "about": _about(stages),
        "wrong": [one for one in ranked if one.verdict.level != FINE],
        "fine": [one for one in ranked if one.verdict.level == FINE],
        "evaluation": evaluation,
        "samples": show_samples(run_dir, evaluation),
        "distribution": distribution(evaluation.folder, list(policies)) if evaluation else None,
        "model": model_of(stages),
        "next": _next(stages),
        "headline": of_run(stages),
        "stages": stages,
        "briefs": {stage.name: _brief(stage, judged.stages[stage.name]) for stage in stages},
        "finals": {stage.name: _finals(stage, judged) for stage in stages},
        "curves": {s.name: show_curves(s.kind, s.series, flatten(s.results), judged.stages[s.name]) for s in stages},
        "of_rl": {stage.name: show_samples_of_rl(stage.folder) for stage in stages if stage.kind == "rl"},
        "facts": [[stage.title, *_facts(stage)] for stage in stages],
        "changed": {stage.name: differences(stage) for stage in stages},
        "data": {stage.name: _data(stage) for stage in stages},
    }
    path = run_dir / "report.html"
    write_text(path, render("run.html", context))
    return path


def differences(stage: Stage) -> list[tuple[str, str, str]]:
    """(key, value, default) of the settings that are not what ships for the stage and its algorithm."""
    defaults, now = _defaults(stage), flatten(stage.settings, ".")
    return [
        (key, _setting(value), _setting(defaults[key]) if key in defaults else "no such setting now")
        for key, value in now.items()
        if defaults and key not in WHERE and (key not in defaults or defaults[key] != value)
    ]


def _brief(stage: Stage, found: Mapping[str, Verdict]) -> str:
    """What stands beside a stage's name while it is folded."""
    if not stage.series and not stage.results:
        return "started, nothing learned yet" if stage.kind in LEARNING else "started, nothing finished yet"
    wrong = sum(verdict.level != FINE for verdict in found.values())
    steps = (
        f"{stage.steps:,} steps in {duration(stage.seconds)}" if stage.steps else ", ".join(columns_of(stage.results))
    )
    return "; ".join(filter(None, [steps, f"{wrong} to look at" if wrong else ""]))


def _next(stages: Sequence[Stage]) -> str:
    """The command that usually follows the last stage that ended; empty after an evaluation and where it is unknown."""
    ended = [stage for stage in stages if stage.results]
    if not ended or ended[-1].kind == EVALUATE or not ended[-1].command:
        return ""
    try:
        step = resolve(shlex.split(ended[-1].command)[2:])  # behind `bash run.sh`
    except UserError:  # its settings, or a file that it names, are gone
        return ""
    return shlex.join(["bash", "run.sh", *next_words(step)])


def _about(stages: Sequence[Stage]) -> str:
    files = [stage.folder / name for stage in stages for name in FILES]
    newest = max(path.stat().st_mtime for path in files if path.is_file())
    when = time.strftime("%d %B %Y, %H:%M", time.localtime(newest))
    count = f"{len(stages)} stage" + ("s" if len(stages) > 1 else "")
    return f"{count}, {duration(sum(stage.seconds for stage in stages))} of training, last changed {when}"


def _finals(stage: Stage, judged: Verdicts) -> Table | Finals | None:
    columns = columns_of(stage.results)
    if columns and stage.kind == EVALUATE:
        return policies_table(stage.name, columns, judged.policies[stage.name])
    if columns:
        return side_by_side(columns)
    return final_numbers({**flatten(stage.results), **spent(stage.series)}) if stage.results else None


def _facts(stage: Stage) -> list[str]:
    """Rows, responses cut, steps, time, tokens per second, peak memory, starts."""
    train = stage.data.get("train", {})
    rates, memory = (
        [value for _, value in stage.series.get(f"perf/{name}", [])] for name in ("tokens_per_second", "peak_memory_gb")
    )
    again = ", ".join(f"{start['step']:,}" for start in stage.starts[1:])
    return [
        f"{train['rows']:,}" if "rows" in train else NOTHING,
        f"{train['cut_responses']:,}" if "cut_responses" in train else NOTHING,
        f"{stage.steps:,}" if stage.steps else NOTHING,
        duration(stage.seconds) if stage.seconds else NOTHING,
        f"{statistics.median(rates):,.0f}" if rates else NOTHING,
        f"{number(max(memory))} GB" if memory else NOTHING,
        (f"{len(stage.starts)}" + (f", again from step {again}" if again else "")) if stage.starts else NOTHING,
    ]


def _data(stage: Stage) -> list[list[str]]:
    """What encoding counted, a row per split."""
    return [[split, *(f"{count:,}" for count in counts.values())] for split, counts in stage.data.items()]


def _defaults(stage: Stage) -> Mapping[str, object]:
    """What ships for the stage; without its algorithm's part where that is a file of the user's that is gone."""
    algo = stage.settings.get("algo")
    gone = isinstance(algo, str) and algo.endswith((".yaml", ".yml")) and not Path(algo).is_file()
    now = flatten(stage.settings, ".")
    try:
        return shipped(stage.kind, {key: value for key, value in now.items() if not (gone and key == "algo")})
    except UserError:  # an algorithm that this version does not know: the whole configuration is shown all the same
        return {}


def _setting(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return "none" if value is None else str(value)
