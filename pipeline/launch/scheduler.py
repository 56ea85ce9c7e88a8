"""Steps as processes, several at once: each starts when what it waits for is done, and writes to a file of its own."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from pipeline.errors import PreemptedError
from pipeline.launch import going_on
from pipeline.launch.comparison_plan import Task
from pipeline.launch.launcher import command, environment
from pipeline.launch.processes import handled, tell

POLL_SECONDS = 0.2


class Running(NamedTuple):
    process: subprocess.Popen[bytes]
    task: Task
    log: Path
    since: float


def finished(tasks: Sequence[Task]) -> set[str]:
    """The names of tasks that need no process: their results are there, and so are those of all they wait for.

    Raises UserError where a task was started with other settings.
    """
    done: set[str] = set()
    for task in tasks:
        if going_on.begun(task.directory):
            going_on.refuse_other(task.directory, task.step.settings)
            if going_on.ended(task.directory, task.step.settings) and task.after <= done:
                done.add(task.name)
    return done


def run_all(tasks: Sequence[Task], jobs: int, logs: Path) -> dict[str, int]:
    """Run what is not done, at most `jobs` at once, and return the exit codes of those that failed, by name.

    What waits for a failed task is not started; all else is.

    Raises PreemptedError after SIGTERM or SIGHUP and KeyboardInterrupt after SIGINT: the signal was passed on to the
    running steps, and they were waited for.
    """
    logs.mkdir(parents=True, exist_ok=True)
    done, failed = finished(tasks), {}
    running: list[Running] = []
    clock = Clock(len(tasks), len(done))
    with forwarded_signals(running) as received:
        while True:
            while not received and len(running) < jobs:
                task = choose(tasks, done, [one.task for one in running], failed)
                if task is None:
                    break
                running.append(start(task, jobs, logs))
            if not running:
                break
            # what ended makes room, and its followers ready
            for one in [one for one in running if one.process.poll() is not None]:
                running.remove(one)
                code = one.process.returncode if one.process.returncode >= 0 else 128 - one.process.returncode
                if code:
                    failed[one.task.name] = code
                else:
                    done.add(one.task.name)
                clock.show(one, code)
            time.sleep(POLL_SECONDS)
    if signal.SIGINT in received:
        raise KeyboardInterrupt(
            f"stage=compare: stopped by Ctrl-C, {len(done)} of {len(tasks)} steps are done; the same command goes on"
        )
    if received:
        raise PreemptedError("stage=compare: stopped; the same command goes on")
    return failed


def choose(
    tasks: Sequence[Task], done: Collection[str], running: Sequence[Task], failed: Collection[str]
) -> Task | None:
    """The next task that can start: of the lane with the fewest running, then the fewest done tasks."""
    begun = {*done, *failed, *(task.name for task in running)}
    ready = [task for task in tasks if task.name not in begun and task.after <= {*done}]
    at_work = Counter(task.lane for task in running)
    behind = Counter(task.lane for task in tasks if task.name in done)
    return min(ready, key=lambda task: (at_work[task.lane], behind[task.lane]), default=None)


def start(task: Task, jobs: int, logs: Path) -> Running:
    """The step as a process with its share of the processors; what it prints goes to a log, over all its starts."""
    launch, stage = task.step.settings.launch, task.step.stage
    env = environment(launch, stage, os.environ)
    share = max(1, len(os.sched_getaffinity(0)) // jobs)
    env["OMP_NUM_THREADS"] = str(min(int(env["OMP_NUM_THREADS"]), share))
    argv = command(launch, stage, task.step.words, os.environ)
    log = logs / f"{task.name.replace('/', '.')}.log"
    with open(log, "ab") as out:
        out.write(f"\n{shlex.join(argv)}\n".encode())
        out.flush()
        return Running(subprocess.Popen(argv, env=env, stdout=out, stderr=out), task, log, time.monotonic())


def last_line(log: Path) -> str:
    """The last line of a log that says something."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "(it printed nothing)"


@contextmanager
def forwarded_signals(running: Sequence[Running]) -> Iterator[list[int]]:
    """Pass SIGINT, SIGTERM and SIGHUP on to the processes that run; yields the list of those received."""
    received: list[int] = []

    def forward(number: int, frame: object) -> None:
        received.append(number)
        for one in list(running):
            if one.process.poll() is None:
                tell(one.process.pid, number)

    with handled(forward):
        yield received


class Clock:
    """One line per task that ended: how many are left, and for about how long."""

    def __init__(self, tasks: int, done: int) -> None:
        self.tasks, self.ended, self.since, self.before = tasks, done, time.monotonic(), done
        print(f"{tasks} steps, {done} of them done before", flush=True)

    def show(self, one: Running, code: int) -> None:
        self.ended += 1
        name, now = one.task.name, time.monotonic()
        pace = (now - self.since) / (self.ended - self.before)
        left = f", about {pace * (self.tasks - self.ended) / 60:.0f} min left" if self.ended < self.tasks else ""
        if code:
            line = f"tiffin: {name} ended with exit code {code}: {last_line(one.log)} (all of it: {one.log})"
            print(line, file=sys.stderr, flush=True)
        else:
            print(f"[{self.ended}/{self.tasks}] {name}: {now - one.since:.0f} s{left}", flush=True)
