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
from typing import NamedTuple

from pipeline.config.resolve import resolve
from pipeline.errors import UserError
from pipeline.files import flatten, write_text
from pipeline.report.checks import Verdict, of_policies
from pipeline.report.closing import next_words
from pipeline.report.curves import show_curves
from pipeline.report.distribution import distribution
from pipeline.report.headline import of_run
from pipeline.report.html import render
from pipeline.report.numbers import NOTHING, duration, number
from pipeline.report.samples import show_samples, show_samples_of_rl
from pipeline.report.spec import FINE, LEVELS
from pipeline.report.stage_checks import spent
from pipeline.report.stages import FILES, STAGES, Stage, stages_of, verdicts
from pipeline.report.tables import (
    EVALUATE,
    Finals,
    Table,
    anchor,
    columns_of,
    final_numbers,
    policies_table,
    side_by_side,
)
from pipeline.report.usage import model_of

WHERE = ("run", "runs_dir", "name")  # which directory it is, not what was done
LEARNING = ("sft", "reward", "rl")
Compared = Mapping[str, Mapping[str, Verdict]]  # policy -> tag -> verdict


class Found(NamedTuple):
    """A verdict with where it was found, in words and for links."""

    place: str
    anchor: str
    verdict: Verdict


def build(run_dir: Path) -> Path:
    """Write `run_dir`/report.html and return its path. Raises UserError if no stage has left anything there."""
    run_dir = Path(run_dir)
    stages = stages_of(run_dir)
    if not stages:
        raise UserError(
            f"{run_dir}: no stage has left anything to report, wanted at least one of {', '.join(STAGES)} with "
            f"{' or '.join(FILES)}; run a stage first, or name another run with run="
        )
    evaluation = next((stage for stage in stages if stage.name == EVALUATE and columns_of(stage.results)), None)
    policies = columns_of(evaluation.results) if evaluation else {}
    evaluation = evaluation_of(stages)
    policies = columns_of(evaluation.results) if evaluation else {}
    compared, judged = judgements(stages)
    ranked = findings(stages)
    name = run_dir.resolve().name
    context = {
        "title": f"Report: {name}",
        "name": name,
        "about": _about(stages),
        "wrong": [one for one in ranked if one.verdict.level != FINE],
        "fine": [one for one in ranked if one.verdict.level == FINE],
        "policies": policies_table(policies, compared) if policies else None,
        "samples": show_samples(run_dir, list(policies)),
        "distribution": distribution(run_dir, list(policies)),
        "model": model_of(stages),
        "next": _next(stages),
        "headline": of_run(stages),
        "stages": stages,
        "briefs": {stage.name: _brief(stage, judged[stage.name]) for stage in stages},
        "finals": {stage.name: _finals(stage) for stage in stages},
        "curves": {s.name: show_curves(s.kind, s.series, flatten(s.results), judged[s.name]) for s in stages},
        "of_rl": {stage.name: show_samples_of_rl(stage.folder) for stage in stages if stage.kind == "rl"},
        "facts": [[stage.title, *_facts(stage)] for stage in stages],
        "changed": {stage.name: differences(stage) for stage in stages},
        "data": {stage.name: _data(stage) for stage in stages},
    }
    path = run_dir / "report.html"
    write_text(path, render("run.html", context))
    return path


def evaluation_of(stages: Sequence[Stage]) -> Stage | None:
    """The evaluation whose policies are compared, if there is one."""
    return next((stage for stage in stages if stage.name == EVALUATE and columns_of(stage.results)), None)


def judgements(stages: Sequence[Stage]) -> tuple[Compared, Mapping[str, Mapping[str, Verdict]]]:
    """All verdicts of a page, which its tables, charts and checks share: of policies by tag, of stages by quantity."""
    evaluation = evaluation_of(stages)
    compared = _of_evaluation(evaluation) if evaluation else {}
    return compared, {stage.name: _once(stage, evaluation, compared) for stage in stages}


def findings(stages: Sequence[Stage]) -> list[Found]:
    """All verdicts, the most serious first."""
    compared, judged = judgements(stages)
    first = next(iter(columns_of(evaluation.results))) if (evaluation := evaluation_of(stages)) else ""
    every = [
        Found(f"{other} against {first}", anchor(f"{EVALUATE}/{other}", tag), verdict)
        for other, found in compared.items()
        for tag, verdict in found.items()
    ]
    every += [
        Found(stage.title, anchor(stage.name, quantity), verdict)
        for stage in stages
        for quantity, verdict in judged[stage.name].items()
    ]
    return sorted(every, key=lambda one: LEVELS.index(one.verdict.level))  # stable: within a level as above


def differences(stage: Stage) -> list[tuple[str, str, str]]:
    """(key, value, default) of the settings that are not what ships for the stage and its algorithm."""
    defaults, now = _defaults(stage), flatten(stage.settings, ".")
    return [
        (key, _setting(value), _setting(defaults[key]) if key in defaults else "no such setting now")
        for key, value in now.items()
        if defaults and key not in WHERE and (key not in defaults or defaults[key] != value)
    ]


def _of_evaluation(stage: Stage) -> Compared:
    """The verdicts on every policy beside the first: policy -> tag -> verdict."""
    policies = columns_of(stage.results)
    monitors = list(stage.settings.get("monitors") or [])  # names, or the keys of a mapping
    first, *others = policies
    return {other: of_policies(policies[first], policies[other], monitors) for other in others}


def _once(stage: Stage, evaluation: Stage | None, compared: Compared) -> dict[str, Verdict]:
    """The verdicts on a stage, without what the evaluation judges of the same policy on more prompts."""
    found = verdicts(stage)
    if evaluation is None or stage.kind != "rl":
        return found
    places = evaluation.settings.get("policies") or {}
    same = [compared[other].values() for other in compared if places.get(other, other) == stage.name]
    names = {verdict.name for each in same for verdict in each}
    return {quantity: verdict for quantity, verdict in found.items() if verdict.name not in names}


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


def _finals(stage: Stage) -> Table | Finals | None:
    columns = columns_of(stage.results)
    if columns:
        return policies_table(columns, _of_evaluation(stage)) if stage.kind == "evaluate" else side_by_side(columns)
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
    words = [f"stage={stage.kind}", *([f"algo={algo}"] if algo and not gone else [])]
    try:
        return flatten(resolve(words).settings.model_dump(), ".")
    except UserError:  # an algorithm that this version does not know: the whole configuration is shown all the same
        return {}


def _setting(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return "none" if value is None else str(value)
