"""Steps as processes, several at once: each starts when what it waits for is done, and writes to a file of its own."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import PreemptedError
from pipeline.launch import run_dir
from pipeline.launch.comparison_plan import Task
from pipeline.launch.launcher import command, environment, tell

POLL_SECONDS = 0.2


def finished(tasks: Sequence[Task]) -> set[str]:
    """The names of tasks that need no process: their results are there, and so are those of all they wait for.

    Raises:
        UserError: a task was started with other settings.
    """
    done: set[str] = set()
    for task in tasks:
        if (task.directory / run_dir.CONFIG).is_file():
            run_dir.refuse_other(task.directory, task.step.settings)
            if run_dir.finished(task.directory) and task.after <= done:
                done.add(task.name)
    return done


def run_all(tasks: Sequence[Task], jobs: int, logs: Path) -> dict[str, int]:
    """Run what is not done, at most `jobs` at once, and return the exit codes of those that failed, by name.

    What waits for a failed task is not started; all else is.

    Raises:
        PreemptedError: SIGTERM or SIGHUP came; the running steps were told, and waited for.
        KeyboardInterrupt: SIGINT came; the same.
    """
    logs.mkdir(parents=True, exist_ok=True)
    done, failed, running = finished(tasks), {}, {}
    clock = Clock(len(tasks), len(done))
    with forwarded_signals(running) as received:
        while True:
            free = jobs - len(running) if not received else 0
            task = choose(tasks, done, [one for _, one, _ in running.values()], failed) if free > 0 else None
            if task is not None:
                process = start(task, jobs, log_of(logs, task))
                running[process.pid] = (process, task, time.monotonic())
                continue
            if not running:
                break
            for process, task, since in [one for one in running.values() if one[0].poll() is not None]:
                del running[process.pid]
                code = process.returncode if process.returncode >= 0 else 128 - process.returncode
                if code:
                    failed[task.name] = code
                else:
                    done.add(task.name)
                clock.show(task, code, time.monotonic() - since, log_of(logs, task))
            time.sleep(POLL_SECONDS)
    if signal.SIGINT in received:
        raise KeyboardInterrupt
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


def start(task: Task, jobs: int, log: Path) -> subprocess.Popen[bytes]:
    """The step as a process with its share of the processors."""
    launch, stage = task.step.settings.launch, task.step.stage
    env = environment(launch, stage, os.environ)
    share = max(1, len(os.sched_getaffinity(0)) // jobs)
    env["OMP_NUM_THREADS"] = str(min(int(env["OMP_NUM_THREADS"]), share))
    argv = command(launch, stage, task.step.words, os.environ)
    with open(log, "ab") as out:
        out.write(f"\n{shlex.join(argv)}\n".encode())
        out.flush()
        return subprocess.Popen(argv, env=env, stdout=out, stderr=out)


def log_of(logs: Path, task: Task) -> Path:
    """What a task's process printed, over all its starts."""
    return logs / f"{task.name.replace('/', '.')}.log"


def last_line(log: Path) -> str:
    """The last line of a log that says something."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "(it printed nothing)"


@contextmanager
def forwarded_signals(running: Mapping[int, tuple[subprocess.Popen, Task, float]]) -> Iterator[list[int]]:
    """Pass SIGINT, SIGTERM and SIGHUP on to the processes that run; yields the list of those received."""
    received: list[int] = []

    def forward(number: int, frame: object) -> None:
        received.append(number)
        for process, _, _ in list(running.values()):
            if process.poll() is None:
                tell(process.pid, number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, forward) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Clock:
    """One line per task that ended: how many are left, and for about how long."""

    def __init__(self, tasks: int, done: int) -> None:
        self.tasks, self.ended, self.since, self.before = tasks, done, time.monotonic(), done
        print(f"{tasks} steps, {done} of them done before", flush=True)

    def show(self, task: Task, code: int, seconds: float, log: Path) -> None:
        self.ended += 1
        pace = (time.monotonic() - self.since) / (self.ended - self.before)
        left = f", about {pace * (self.tasks - self.ended) / 60:.0f} min left" if self.ended < self.tasks else ""
        if code:
            line = f"tiffin: {task.name} ended with exit code {code}: {last_line(log)} (all of it: {log})"
            print(line, file=sys.stderr, flush=True)
        else:
            print(f"[{self.ended}/{self.tasks}] {task.name}: {seconds:.0f} s{left}", flush=True)
