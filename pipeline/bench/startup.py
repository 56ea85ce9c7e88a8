"""Where the time goes between `python -m stages stage=sft ...` and the first step.

Three new processes: the real command, until metrics.jsonl has the row of step 1; first_step.py, which does what the
stage does until then and times each part; and the stage's imports under `-X importtime`, by library. The first and the
last are always in wall time.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pipeline.bench.bed import Bed, environment
from pipeline.bench.measure import Result
from pipeline.errors import UserError

SHOWN = 6  # libraries
ONE_STEP = ("max_steps=1", "train.logging_steps=1", "train.eval_steps=null", "eval.max_rows=8", "eval.num_samples=0")
IMPORT_LINE = re.compile(r"import time:\s+(\d+) \|\s+\d+ \|\s+([\w.]+)")


def measure(bed: Bed) -> list[Result]:
    words = stage_words(bed)
    results = [Result("start-up: command to first step", "s", to_first_step(bed.folder, words))]
    program = [sys.executable, "-m", "pipeline.bench.first_step", bed.settings.clock, *words]
    parts = json.loads(output_of(program).stdout.splitlines()[-1])
    results += [Result(f"start-up: {name}", "s", seconds) for name, seconds in parts.items()]
    imported = output_of([sys.executable, "-X", "importtime", "-c", "import stages.sft"]).stderr
    return [*results, *(Result(f"import: {name}", "s", seconds) for name, seconds in by_library(imported)[:SHOWN])]


def stage_words(bed: Bed) -> list[str]:
    """A fine-tuning of one step on the bed's small model and rows."""
    settings = bed.settings
    sizes = [f"model.scratch.{name}={value}" for name, value in settings.model.scratch.model_dump().items()]
    rows = [f"task={settings.data.task}", f"data.task_size={settings.data.task_size}"]
    batch = [f"batch_size={settings.train.batch_size}", f"train.max_tokens={settings.train.max_tokens}"]
    return ["stage=sft", *ONE_STEP, *sizes, *rows, *batch]


def to_first_step(folder: Path, words: Sequence[str]) -> float:
    """Seconds from the command until its first step is on record."""
    written = folder / "startup" / "sft" / "metrics.jsonl"
    argv = [sys.executable, "-m", "stages", *words, f"runs_dir={folder.absolute()}", "run=startup"]
    started = time.perf_counter()
    with subprocess.Popen(argv, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not (written.is_file() and '"step": 1' in written.read_text(encoding="utf-8")):
            if process.poll() is not None:
                raise UserError(f"bench: {' '.join(argv)} ended with exit code {process.returncode}, wanted one step")
            time.sleep(0.02)
        seconds = time.perf_counter() - started
        process.wait()
    return seconds


def output_of(argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(argv, check=False, env=environment(), capture_output=True, text=True)
    if done.returncode != 0:
        raise UserError(f"bench: {' '.join(argv)}: {done.stderr.strip().splitlines()[-1]}")
    return done


def by_library(report: str) -> list[tuple[str, float]]:
    """(library, seconds) from what `-X importtime` writes: each module's own time, the longest first."""
    totals: dict[str, int] = {}
    for microseconds, module in IMPORT_LINE.findall(report):
        library = module.split(".")[0]
        totals[library] = totals.get(library, 0) + int(microseconds)
    return sorted(((name, total / 1e6) for name, total in totals.items()), key=lambda pair: -pair[1])
