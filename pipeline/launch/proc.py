"""Processes as /proc shows them: who descends from whom, who is a rank, and signals to them. Standard library only."""

from __future__ import annotations

import os
import signal
import time
from itertools import pairwise
from pathlib import Path

POLL_SECONDS = 0.05


def end_ranks(pid: int) -> list[int]:
    """SIGINT to the ranks below the launcher `pid`, which is then killed; their exit codes. A rank is only told."""
    if is_stage(pid):
        send(pid, signal.SIGINT)
        return []
    while True:
        family = descendants(pid)
        ranks = [one for one in family if is_stage(one)]
        below = {one for rank in ranks for one in descendants(rank)}
        launchers = [pid, *(one for one in family if one not in {*ranks, *below})]
        awake = [one for one in launchers if state(one) not in "TZX"]
        if not awake:  # nobody starts another rank
            break
        for one in awake:
            send(one, signal.SIGSTOP)
        time.sleep(POLL_SECONDS)
    for rank in ranks:
        send(rank, signal.SIGINT)
    while any(state(rank) not in "ZX" for rank in ranks):
        time.sleep(POLL_SECONDS)
    codes = [exit_code(rank) for rank in ranks]
    for one in launchers:
        send(one, signal.SIGKILL)
    return codes


def kill(pid: int) -> None:
    """SIGKILL to a process and to all below it."""
    for one in [*descendants(pid), pid]:
        send(one, signal.SIGKILL)


def state(pid: int) -> str:
    """One letter: T stopped, Z ended and not waited for, X gone, ..."""
    return _stat(pid)[0]


def exit_code(pid: int) -> int:
    """Of a process that has ended and that its parent has not waited for; -N for signal N, -1 for one that is gone."""
    fields = _stat(pid)
    return os.waitstatus_to_exitcode(int(fields[-1])) if fields[0] == "Z" else -1


def everyone() -> list[int]:
    return [int(folder.name) for folder in Path("/proc").glob("[0-9]*")]


def descendants(pid: int) -> list[int]:
    """The processes below `pid`; those that end meanwhile are left out."""
    parents: dict[int, int] = {}
    for one in everyone():
        fields = _stat(one)
        if fields[0] != "X":
            parents[one] = int(fields[1])
    family = [pid]
    for one in family:  # grows while it is walked
        family += [child for child, parent in parents.items() if parent == one]
    return family[1:]


def is_stage(pid: int) -> bool:
    """Whether a process is a rank: python -m stages.<stage>, not a launcher with that among its options."""
    return any(one == b"-m" and two.startswith(b"stages.") for one, two in pairwise(words(pid)))


def words(pid: int) -> list[bytes]:
    """The command line of a process; empty for one that has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return []


def send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:  # it ended by itself
        return


def _stat(pid: int) -> list[str]:
    """The fields of /proc/<pid>/stat behind the name, the state first; X (dead) alone for a process that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ["X"]
