"""One page about a run: runs/<run>/report.html."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.config.schema import ReportStage
from pipeline.launch import run_dir
from pipeline.launch.entry import run
from pipeline.report.run_page import build


def main(settings: ReportStage, words: Sequence[str]) -> None:
    print(f"report: {build(run_dir.run_dir(settings))}", flush=True)


if __name__ == "__main__":
    run(main, "report")
