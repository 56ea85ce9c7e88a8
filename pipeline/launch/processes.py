"""A stage as processes: run to its end, and signals to its ranks, whatever launcher is between.

What the launchers do with signals (DeepSpeed 0.19.8, torch 2.13, two gloo ranks on CPU):
- SIGTERM to DeepSpeed's outer launcher orphans its children; to the inner one it costs the ranks' exit code (it
  exits 1). A signal to the ranks alone leaves their code intact, so that is what `run` does.
- torchrun starts each rank in a session of its own: a signal to the process group misses them.
- Both print the end of a rank, torchrun with a traceback: for SIGINT they sleep until all ranks have ended.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from pipeline.launch.stopping import BEGUN, INTERRUPTED

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
POLL_SECONDS = 0.05


def run(argv: Sequence[str], env: Mapping[str, str], untold: Callable[[], None] = lambda: None) -> int:
    """Run `argv` to its end and return its exit code (128 + N when signal N killed it).

    SIGTERM and SIGHUP go to the ranks, who may save and choose the exit code. SIGINT ends them: the code is then 130,
    and `untold` is called if none of them said what that leaves. A second SIGINT kills all that still run.
    At a terminal the children get a session of their own, else Ctrl-C would reach the launchers too.
    """
    # until it can be handled, here as there: stages/__init__.py lets it through
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT] if _is_local(argv) else [])
    told = {**env, BEGUN: str(os.getpid())}
    process = subprocess.Popen(argv, env=told, start_new_session=sys.stdin.isatty())
    received: list[int] = []
    codes: list[int] = []  # of ranks that SIGINT ended

    def forward(number: int, frame: Any) -> None:
        received.append(number)
        if received.count(signal.SIGINT) > 1:
            for pid in [*_descendants(process.pid), process.pid]:
                _signal(pid, signal.SIGKILL)
        elif number == signal.SIGINT and _is_local(argv):
            codes.extend(_end_ranks(process.pid))
        else:
            tell(process.pid, number)

    with handled(forward):
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        code = process.wait()
    if signal.SIGINT in received:
        if INTERRUPTED not in (code, *codes):
            untold()
        return INTERRUPTED
    return code if code >= 0 else 128 - code


@contextmanager
def handled(handler: Callable[[int, Any], None], numbers: Sequence[int] = ENDING) -> Iterator[None]:
    """Have `handler` called, with the number and the frame, where one of these signals comes."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def tell(pid: int, number: int) -> None:
    """Send a signal to the ranks below the process `pid`; to `pid` too, unless it is their launcher, and first."""
    ranks = [one for one in _descendants(pid) if _is_stage(one)]
    itself = _words(pid)[1:3]  # a comparison is a stage that starts stages; a launcher has other words first
    stage = len(itself) == 2 and itself[0] == b"-m" and itself[1].startswith(b"stages.")
    for one in [pid, *ranks] if stage or not ranks else ranks:
        _signal(one, number)


def _is_local(argv: Sequence[str]) -> bool:
    """Whether all ranks are processes of this machine, below the launcher or the launcher itself."""
    return argv[0] != "srun" and "--hostfile" not in argv


def _end_ranks(pid: int) -> list[int]:
    """SIGINT to the ranks below the launcher `pid`, which is then killed; their exit codes. A rank is only told."""
    if _is_stage(pid):
        _signal(pid, signal.SIGINT)
        return []
    while True:
        family = _descendants(pid)
        ranks = [one for one in family if _is_stage(one)]
        below = {one for rank in ranks for one in _descendants(rank)}
        launchers = [pid, *(one for one in family if one not in {*ranks, *below})]
        awake = [one for one in launchers if _state(one) not in "TZX"]
        if not awake:  # nobody starts another rank
            break
        for one in awake:
            _signal(one, signal.SIGSTOP)
        time.sleep(POLL_SECONDS)
    for rank in ranks:
        _signal(rank, signal.SIGINT)
    while any(_state(rank) not in "ZX" for rank in ranks):
        time.sleep(POLL_SECONDS)
    codes = [_exit_code(rank) for rank in ranks]
    for one in launchers:
        _signal(one, signal.SIGKILL)
    return codes


def _stat(pid: int) -> list[str]:
    """The fields of /proc/<pid>/stat behind the name, the state first; X (dead) alone for a process that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ["X"]


def _state(pid: int) -> str:
    return _stat(pid)[0]


def _exit_code(pid: int) -> int:
    """Of a process that has ended and that its parent has not waited for; -N for signal N, -1 for one that is gone."""
    fields = _stat(pid)
    return os.waitstatus_to_exitcode(int(fields[-1])) if fields[0] == "Z" else -1


def _descendants(pid: int) -> list[int]:
    """The processes below `pid`, from /proc; those that end meanwhile are left out."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    family = [pid]
    for one in family:  # grows while it is walked
        family += [child for child, parent in parents.items() if parent == one]
    return family[1:]


def _is_stage(pid: int) -> bool:
    """Whether a process is a rank: python -m stages.<stage>, not a launcher with that among its options."""
    return any(one == b"-m" and two.startswith(b"stages.") for one, two in pairwise(_words(pid)))


def _words(pid: int) -> list[bytes]:
    """The command line of a process; empty for one that has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return []


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:  # it ended by itself
        return
