"""One page about a run: runs/<run>/report.html; and what on it asks for a look."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.config.schema import ReportStage
from pipeline.launch import run_dir
from pipeline.launch.entry import run
from pipeline.report.findings import findings, judge_run
from pipeline.report.headline import of_run
from pipeline.report.run_page import build
from pipeline.report.spec import FINE
from pipeline.report.stages import stages_of

SHOWN = 8  # findings that are printed; the page has all


def main(settings: ReportStage, words: Sequence[str]) -> None:
    directory = run_dir.run_dir(settings)
    path, stages = build(directory), stages_of(directory)
    found = [one for one in findings(stages, judge_run(stages)) if one.verdict.level != FINE]
    for place, _, verdict in found[:SHOWN]:
        print(f"{verdict.level}: {place}: {verdict.name}: {verdict.text}: {verdict.means}. What to do: {verdict.do}")
    if len(found) > SHOWN:
        print(f"... and {len(found) - SHOWN} more on the page")
    said = of_run(stages)
    print(f"{path}: {said.text if said else 'no stage has ended yet'}", flush=True)


if __name__ == "__main__":
    run(main, "report")
