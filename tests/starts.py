"""Starts of a stage that can be killed: by fork without its imports, or fresh through the command line.

A fork costs no imports, so that killing often is cheap. It is safe as long as the parent has one thread and no process
group; what the child then does is what `python -m stages.<stage>` does.
"""

from __future__ import annotations

import atexit
import faulthandler
import importlib
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

import psutil

from pipeline.config.resolve import resolve
from pipeline.config.yaml_layers import ROOT
from pipeline.launch.entry import run
from pipeline.launch.launcher import free_port

GRACE_SECONDS = 1.0  # between the end of one rank and SIGTERM to the others, as DeepSpeed's launcher waits
PATIENCE_SECONDS = 90.0  # for processes that were signalled to end
RUN_SECONDS = 900.0  # for a run, on a busy machine
STACK_SECONDS, FACTS_SECONDS = 0.02, 0.03  # how long a stack is waited for, and what Python itself can tell


class Forked:
    """A stage as forks of this process, one per rank, in the folder `place`."""

    def __init__(self, place: Path, words: Sequence[str], world: int):
        threads = len(list(Path("/proc/self/task").iterdir()))
        assert threads == 1, f"forking a process of {threads} threads"
        self.place = place
        for old in place.glob("stack-*"):
            old.unlink()
        resolved = resolve(words)
        self.codes: dict[int, int | None] = {}  # process -> exit code
        port = free_port()
        sys.stdout.flush()
        for rank in range(world):
            pid = os.fork()
            if pid == 0:
                _child(place, resolved.stage, resolved.words, rank, world, port)
            self.codes[pid] = None
        self.ranks = list(self.codes)

    def code(self) -> int | None:
        """None while a rank runs and none has failed, else the first failure's code (-N for signal N), or 0."""
        for pid, code in self.codes.items():
            if code is None:
                ended, status = os.waitpid(pid, os.WNOHANG)
                self.codes[pid] = os.waitstatus_to_exitcode(status) if ended else None
        failed = [code for code in self.codes.values() if code]
        return failed[0] if failed else (None if None in self.codes.values() else 0)

    def where(self, rank: int, exactly: bool) -> str:
        """The stack of a rank now; `exactly`: the step and micro-batch too, which waits for C code to return."""
        stack, facts = self.place / f"stack-{rank}", self.place / f"stack-{rank}-facts"
        _send(self.ranks[rank], signal.SIGUSR1)
        for file, seconds in ((stack, STACK_SECONDS), (facts, FACTS_SECONDS if exactly else 0.0)):
            _wait(lambda file=file: file.is_file() and file.stat().st_size > 0, seconds)
        return "".join(file.read_text(encoding="utf-8") for file in (stack, facts) if file.is_file())

    def signal(self, number: int, rank: int | None) -> None:
        """To all ranks, or to one."""
        for pid in self.ranks if rank is None else [self.ranks[rank]]:
            if self.codes[pid] is None:
                _send(pid, number)

    def end(self) -> tuple[int, str]:
        """Wait for the end of all ranks as a launcher does; the exit code, and what was wrong with the end."""
        trouble = ""
        _wait(lambda: self.code() is not None, RUN_SECONDS)
        first = self.code()
        if not _wait(self._all_ended, GRACE_SECONDS):
            self.signal(signal.SIGTERM, None)
        if not _wait(self._all_ended, PATIENCE_SECONDS):
            trouble = f"ranks went on for {PATIENCE_SECONDS:.0f} s after one had ended and they were signalled to"
            self.signal(signal.SIGKILL, None)
            _wait(self._all_ended, PATIENCE_SECONDS)
        code = self.code() if first is None else first
        assert code is not None, f"{self.place}: a process survived SIGKILL"
        return code, trouble

    def _all_ended(self) -> bool:
        self.code()
        return None not in self.codes.values()


class Fresh:
    """A stage as a user starts it: `python -m stages ...`, with DeepSpeed's launcher for several ranks."""

    def __init__(self, place: Path, words: Sequence[str], world: int):
        self.stage, self.world = resolve(words).stage, world
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        with open(place / "log", "a", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "stages", *words],
                cwd=place,
                env=environment,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self._family: set[psutil.Process] = set()

    def code(self) -> int | None:
        """None while the command runs, else its exit code."""
        return self._process.poll()

    def where(self, rank: int, exactly: bool) -> str:
        """A fresh process does not tell."""
        return ""

    def signal(self, number: int, rank: int | None) -> None:
        """To the command alone if it can forward it, else to all that it started; SIGKILL perhaps to one rank only."""
        self._family |= set(psutil.Process(self._process.pid).children(recursive=True))
        ranks = [one for one in self._family if is_rank(one)]
        if number in (signal.SIGTERM, signal.SIGINT):
            _send(self._process.pid, number)
        elif rank is not None and len(ranks) == self.world:
            _send(ranks[rank].pid, number)
        else:
            os.killpg(self._process.pid, number)

    def end(self) -> tuple[int, str]:
        """Wait for the end of everything; the exit code, and what was wrong with the end."""
        try:
            code = self._process.wait(RUN_SECONDS)
            trouble = ""
        except subprocess.TimeoutExpired:
            trouble = f"the command had not ended after {RUN_SECONDS:.0f} s"
            os.killpg(self._process.pid, signal.SIGKILL)
            code = self._process.wait()
        left = psutil.wait_procs(list(self._family), timeout=GRACE_SECONDS * 10)[1]
        if left:
            trouble = f"left running: {[' '.join(one.cmdline())[:60] for one in left]}"
            for one in left:
                one.kill()
        return code, trouble


def is_rank(process: psutil.Process) -> bool:
    """Whether a launcher set which rank this process is."""
    try:
        return "LOCAL_RANK" in process.environ()
    except psutil.NoSuchProcess:
        return False


def _child(place: Path, stage: str, words: Sequence[str], rank: int, world: int, port: int) -> NoReturn:
    """What a rank does with its life; it never returns into the parent's code."""
    code = 1
    try:
        os.chdir(place)
        log = os.open("log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if world > 1:
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        _tell_on_demand(Path(f"stack-{rank}"))
        sys.argv = [f"stages/{stage}.py", *words]
        code = _interpreter(stage)
    finally:
        os._exit(code)


def _interpreter(stage: str) -> int:
    """The exit code of `python -m stages.<stage>`, with all that an interpreter does at its end."""
    code = 1
    try:
        run(importlib.import_module(f"stages.{stage}").main, stage)
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    except BaseException:
        traceback.print_exc()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _tell_on_demand(file: Path) -> None:
    """At SIGUSR1: the stack into `file`, at once, even within C; then the loop's position into <file>-facts."""

    def tell(number: int, frame: FrameType | None) -> None:
        while frame is not None and frame.f_code.co_name != "one_step":
            frame = frame.f_back
        known = {} if frame is None else frame.f_locals
        facts = [f"{name}={known[name]}" for name in ("step", "place") if name in known]
        facts += [f"micro_batches={len(known['window'])}"] if "window" in known else []
        file.with_name(f"{file.name}-facts").write_text(" ".join(facts) + "\n", encoding="utf-8")

    signal.signal(signal.SIGUSR1, tell)
    stream = open(file, "w", encoding="utf-8")  # noqa: SIM115  (it stays open for the handler)
    faulthandler.register(signal.SIGUSR1, stream, all_threads=False, chain=True)


def _send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:  # it ended by itself
        return


def _wait(done, seconds: float) -> bool:
    """Whether `done()` came true within `seconds`."""
    limit = time.monotonic() + seconds
    while not done():
        if time.monotonic() > limit:
            return False
        time.sleep(0.0005)
    return True
