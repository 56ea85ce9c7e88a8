"""One page about a run: runs/<run>/report.html."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline import runs
from pipeline.entry import run
from pipeline.report.run_page import build
from pipeline.settings import Report


def main(settings: Report, words: Sequence[str]) -> None:
    print(f"report: {build(runs.run_dir(settings))}", flush=True)


if __name__ == "__main__":
    run(main, "report")
