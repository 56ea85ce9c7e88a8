"""One page about a run: runs/<run>/report.html."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline import report, runs
from pipeline.config.schema import Report
from pipeline.entry import run


def main(settings: Report, words: Sequence[str]) -> None:
    print(f"report: {report.build(runs.run_dir(settings))}", flush=True)


if __name__ == "__main__":
    run(main, "report")
