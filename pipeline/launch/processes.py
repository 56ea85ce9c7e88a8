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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from pipeline.launch import other_hosts, proc
from pipeline.launch.stopping import BEGUN, INTERRUPTED

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run(argv: Sequence[str], env: Mapping[str, str], untold: Callable[[], None] = lambda: None) -> int:
    """Run `argv` to its end and return its exit code (128 + N when signal N killed it).

    SIGTERM and SIGHUP go to the ranks, who may save and choose the exit code. SIGINT ends them: the code is then 130,
    and `untold` is called if none of them said what that leaves. A second SIGINT kills all that still run.
    At a terminal the children get a session of their own, else Ctrl-C would reach the launchers too; those of several
    hosts always do, for pdsh would end at a signal to the process group and leave the ranks.
    """
    launch, local = other_hosts.launch_of(argv), argv[0] != "srun"
    # until it can be handled, here as there: stages/__init__.py lets it through
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT] if local else [])
    told = {**env, BEGUN: str(os.getpid())}
    process = subprocess.Popen(argv, env=told, start_new_session=sys.stdin.isatty() or launch is not None)
    received: list[int] = []
    codes: list[int] = []  # of ranks that SIGINT ended

    def forward(number: int, frame: Any) -> None:
        received.append(number)
        if received.count(signal.SIGINT) > 1:
            if launch is not None:
                other_hosts.kill(launch)
            proc.kill(process.pid)
        elif launch is not None and number == signal.SIGINT:
            codes.extend(other_hosts.end(launch, process.pid))
        elif launch is not None:
            other_hosts.tell(launch, number, process.pid)
        elif number == signal.SIGINT and local:
            codes.extend(proc.end_ranks(process.pid))
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
    ranks = [one for one in proc.descendants(pid) if proc.is_stage(one)]
    itself = proc.words(pid)[1:3]  # a comparison is a stage that starts stages; a launcher has other words first
    stage = len(itself) == 2 and itself[0] == b"-m" and itself[1].startswith(b"stages.")
    for one in [pid, *ranks] if stage or not ranks else ranks:
        proc.send(one, number)
