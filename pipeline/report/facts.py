"""What was run, for whoever must trust it or do it again: commands, data, time, memory, starts, settings."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.layers import resolve
from pipeline.records import UserError
from pipeline.report import html as page
from pipeline.report.stages import Stage
from pipeline.report.svg import NOTHING, number
from pipeline.runs import dotted

WHERE = ("run", "runs_dir", "name")  # which directory it is, not what was done


def what_was_run(stages: Sequence[Stage]) -> str:
    """A table of all stages, and each one's command, versions and settings behind a line to click on."""
    head = ["stage", "rows", "responses cut", "steps", "time", "tokens/s", "peak memory", "starts"]
    rows = [[page.cell(stage.title), *(page.cell(text) for text in _facts(stage))] for stage in stages]
    words = (
        "Rows are those learned from; cut are responses beyond the token limit; time is that of training, over all "
        "starts; tokens/s is the median of the logged steps, prompt tokens included; peak memory is rank 0's."
    )
    html = page.heading(2, "What was run", "commands") + page.table(head, rows) + page.paragraph(words, "soft")
    return html + "".join(_details(stage) for stage in stages)


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def differences(stage: Stage) -> list[tuple[str, str, str]]:
    """(key, value, default) of the settings that are not what ships for the stage and its algorithm."""
    defaults, now = _defaults(stage), dotted(stage.settings)
    if not defaults:
        return []
    return [
        (key, _said(value), _said(defaults[key]) if key in defaults else "no such setting now")
        for key, value in now.items()
        if key not in WHERE and (key not in defaults or defaults[key] != value)
    ]


def _defaults(stage: Stage) -> Mapping[str, object]:
    """What ships for the stage; without its algorithm's part where that is a file of the user's that is gone."""
    algo = stage.settings.get("algo")
    gone = isinstance(algo, str) and algo.endswith((".yaml", ".yml")) and not Path(algo).is_file()
    words = [f"stage={stage.kind}", *([f"algo={algo}"] if algo and not gone else [])]
    try:
        return dotted(resolve(words).settings.model_dump())
    except UserError:  # an algorithm that this version does not know: the whole configuration is shown all the same
        return {}


def _said(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return "none" if value is None else str(value)


def _facts(stage: Stage) -> list[str]:
    train = stage.data.get("train", {})
    rates = [value for _, value in stage.series.get("perf/tokens_per_second", [])]
    memory = [value for _, value in stage.series.get("perf/peak_memory_gb", [])]
    return [
        f"{train['rows']:,}" if "rows" in train else NOTHING,
        f"{train['cut_responses']:,}" if "cut_responses" in train else NOTHING,
        f"{stage.steps:,}" if stage.steps else NOTHING,
        duration(stage.seconds) if stage.seconds else NOTHING,
        f"{statistics.median(rates):,.0f}" if rates else NOTHING,
        f"{number(max(memory))} GB" if memory else NOTHING,
        _starts(stage),
    ]


def _starts(stage: Stage) -> str:
    """How often it was started, and from which steps it went on."""
    if not stage.starts:
        return NOTHING
    again = [f"{start['step']:,}" for start in stage.starts[1:]]
    return f"{len(stage.starts)}" + (f", again from step {', '.join(again)}" if again else "")


def _details(stage: Stage) -> str:
    html = page.literal(stage.command.strip()) if stage.command.strip() else ""
    if stage.starts:
        last = stage.starts[-1]
        versions = ", ".join(f"{name} {version}" for name, version in last["versions"].items())
        html += page.paragraph(f"Last start {last['when']} (UTC) on {last['device']}. {versions}.")
    changed = [[page.cell(text) for text in row] for row in differences(stage)]
    if changed:
        html += page.table(["setting that is not the default", "here", "default"], changed)
    if stage.data:
        html += page.table(["data", *next(iter(stage.data.values()))], _data(stage.data))
    if stage.config:
        html += page.folded("all settings", page.literal(stage.config))
    return page.folded(stage.title, html) if html else ""


def _data(data: Mapping[str, Mapping[str, int]]) -> list[list[str]]:
    return [
        [page.cell(split), *(page.cell(f"{count:,}") for count in counts.values())] for split, counts in data.items()
    ]
