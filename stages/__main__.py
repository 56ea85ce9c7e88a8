"""The command line, `python -m stages key=value ...` or `tiffin`: checks all steps, runs each as its own process."""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import NoReturn

from pipeline.config.help import help_text
from pipeline.config.resolve import Resolved, resolve_steps
from pipeline.config.yaml_layers import ROOT, Layer, parse_overrides
from pipeline.errors import UserError
from pipeline.launch import going_on, machine, run_dir, stopping
from pipeline.launch.entry import leave
from pipeline.launch.launcher import DISTRIBUTED, command, environment, is_rank
from pipeline.launch.processes import handled, run
from pipeline.report.closing import closing
from stages import dry_run, faults, inputs

HELP = ("stage=help", "--help", "-h")
TEST, GPU = "stage=test", "gpu"
GATE = 9 * 60  # seconds that the checks on a GPU may take
WORKERS = 4  # processes of tests at most: some tests start several more
ALONE = ("-n", "--numprocesses", "--dist", "-s", "--capture", "--pdb", "--trace", "--collect-only", "--co", "-p")

logger = logging.getLogger("tiffin")


def main(words: Sequence[str]) -> int:
    """Exit code of the first step that fails, 0 if none does. Raises UserError before any step starts."""
    if any(one in HELP for one in words):
        print(help_text())
        if more := [one for one in words if one not in HELP]:
            print(f"tiffin: stage=help explains all at once, {' '.join(more)} makes no difference", file=sys.stderr)
        return 0
    if TEST in words:
        return test([one for one in words if one != TEST])
    dry = _dry_run(parse_overrides(words))
    steps = resolve_steps(words)
    if dry:
        return dry_run.show(steps)
    faults.refuse(steps, os.environ)
    for line in faults.notes(steps, os.environ):
        logger.warning(line)
    for number, step in enumerate(steps, 1):
        if len(steps) > 1:
            print(f"[{number}/{len(steps)}] {step.title}", flush=True)
        code = start(step, last=number == len(steps))
        if code != 0:
            rest = f"{len(steps) - number} later steps not started" if number < len(steps) else ""
            ended = "" if code == stopping.INTERRUPTED else f"{step.title} ended with exit code {code}"
            if len(steps) > 1 and (ended or rest):
                print(f"tiffin: {'; '.join(filter(None, [ended, rest]))}", file=sys.stderr)
            return code
    return 0


def start(step: Resolved, last: bool) -> int:
    """Run one step to its end, unless it is done, say what it left, and return its exit code.

    Where this is one rank of many, rank 0 alone runs the steps that do not share their work; of the others the ranks
    find out together whether they are done. Raises UserError where the step was started with other settings.
    """
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    idle = step.stage not in DISTRIBUTED and rank != "0"
    if idle or (not is_rank(os.environ) and inputs.done(step.stage, step.settings)):
        return 0
    launch = step.settings.launch
    directory = run_dir.stage_dir(step.settings, step.stage)
    new = not going_on.ended(directory, step.settings)

    def say_stopped() -> None:
        if rank == "0":
            logger.error(stopping.line(directory, step.settings))

    argv = command(launch, step.stage, step.words, os.environ)
    code = run(argv, environment(launch, step.stage, os.environ), untold=say_stopped)
    if code == 0 and new and rank == "0":
        for line in closing(step, last):
            print(line, flush=True)
    return code


def test(arguments: Sequence[str]) -> int:
    """pytest on tests/ of the checkout, with its own arguments."""
    if not (ROOT / "tests").is_dir() or importlib.util.find_spec("pytest") is None:
        raise UserError("stage=test: needs the checkout and pytest; run `bash run.sh stage=test` there")
    limit = None
    if GPU in arguments:
        if not gpu_here():
            print("stage=test gpu: no GPU here, so that none of its checks is made")
            return 0
        arguments, limit = [*(one for one in arguments if one != GPU), "tests/test_gpu.py", "-rs"], GATE
    argv, env = [sys.executable, "-m", "pytest", *arguments], dict(os.environ)
    if together := side_by_side(arguments, len(os.sched_getaffinity(0))):
        argv += together
        env.setdefault("OMP_NUM_THREADS", "1")
    with handled(lambda number, frame: None, [signal.SIGINT]):  # pytest sums up what it has done
        try:
            return subprocess.call(argv, cwd=ROOT, env=env, timeout=limit)
        except subprocess.TimeoutExpired:
            raise UserError(f"stage=test gpu: not at its end after {GATE // 60} minutes, and stopped there") from None


def side_by_side(arguments: Sequence[str], cores: int) -> list[str]:
    """Options of pytest-xdist, where it is installed and all tests are asked for: files of tests on several cores."""
    chosen = any(not one.startswith("-") or one.startswith(ALONE) for one in arguments)
    if chosen or cores < 2 or importlib.util.find_spec("xdist") is None:
        return []
    # in their order: those that fork come before those that leave a process large
    return ["-n", str(min(cores, WORKERS)), "--dist", "loadfile", "--no-loadscope-reorder"]


def gpu_here() -> bool:
    """Whether there is a GPU. Raises UserError where torch cannot use the one there is."""
    if not machine.has_gpu():
        return False
    import torch

    if not torch.cuda.is_available():
        problem = f"this machine has a GPU, but torch {torch.__version__} cannot use it"
        raise UserError(f"stage=test gpu: {problem}, wanted a torch that can: PYTHON= chooses an environment")
    return True


def _dry_run(overrides: Layer) -> bool:
    value = overrides[("dry_run",)].value if ("dry_run",) in overrides else False
    if not isinstance(value, bool):
        raise UserError(f"command line: dry_run={value!r}, wanted true or false")
    return value


def tiffin() -> NoReturn:
    """What the installed command `tiffin` calls."""
    os.environ["PYTHONSAFEPATH"] = "1"  # as run.sh: folders called stages or pipeline where you are do not hide ours
    leave(lambda: main(sys.argv[1:]))


if __name__ == "__main__":
    leave(lambda: main(sys.argv[1:]))
