"""From `python -m stages stage=sft ...` to the first step, and what its imports take of that; always in wall time."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from pipeline.bench.measure import Result, timed
from pipeline.bench.setup import Setup, environment
from pipeline.errors import UserError

ONE_STEP = ("max_steps=1", "train.logging_steps=1", "train.eval_steps=null", "eval.max_rows=8", "eval.num_samples=0")


def measure(setup: Setup) -> list[Result]:
    imports = [sys.executable, "-c", "import stages.sft"]
    alone = timed(lambda: subprocess.run(imports, check=True, env=environment(), capture_output=True), "wall")
    words = ["stage=sft", f"task={setup.settings.data.task}", f"data.task_size={setup.settings.data.task_size}"]
    whole = to_first_step(setup.folder, [*words, *ONE_STEP])
    return [Result("start-up: command to first step", "s", whole), Result("start-up: imports alone", "s", alone)]


def to_first_step(folder: Path, words: list[str]) -> float:
    """Seconds from the command until its first step is on record."""
    metrics = folder / "startup" / "sft" / "metrics.jsonl"
    argv = [sys.executable, "-m", "stages", *words, f"runs_dir={folder.absolute()}", "run=startup"]
    started = time.perf_counter()
    with subprocess.Popen(argv, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not (metrics.is_file() and '"step": 1' in metrics.read_text(encoding="utf-8")):
            if process.poll() is not None:
                raise UserError(f"bench: {' '.join(argv)} ended with exit code {process.returncode}, wanted one step")
            time.sleep(0.02)
        seconds = time.perf_counter() - started
        process.wait()
    return seconds
