"""Signals to the ranks that DeepSpeed's launcher started on several hosts, this one perhaps among them.

They are no children of the command. What DeepSpeed 0.19.8 does with a signal there saves nothing: it interrupts pdsh,
and kills its launchers on all hosts by a pattern that fits other trainings too. So a second pdsh tells the ranks.
"""

from __future__ import annotations

import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pipeline.launch import launcher, proc

PATIENCE_SECONDS = 60.0  # for hosts that do not answer, or have not begun
AGAIN_SECONDS = 3.0

logger = logging.getLogger("tiffin")


class Launch(NamedTuple):
    """What makes a launch known on its hosts."""

    hosts: tuple[str, ...]
    port: str
    word: str


def launch_of(argv: Sequence[str]) -> Launch | None:
    """That of a command of `launcher.command`; None where its ranks are on this machine, or Slurm's."""
    if "--hostfile" not in argv or (file := argv[argv.index("--hostfile") + 1]) == launcher.NO_HOSTFILE:
        return None
    return Launch(tuple(launcher.hosts(Path(file))), argv[argv.index("--master_port") + 1], argv[-1])


def tell(launch: Launch, number: int, pid: int) -> list[int]:
    """Send `number` to the ranks on all hosts, each when it has begun, while the launcher `pid` runs; see `on_host`.

    Says so in one line where a host could not be told.
    """
    waiting, codes, until = set(launch.hosts), [], time.monotonic() + PATIENCE_SECONDS
    while waiting and time.monotonic() < until and proc.state(pid) not in "ZX":
        for host, said in _ask(launch, number, sorted(waiting)):
            waiting.discard(host)
            codes += said
        if waiting:
            time.sleep(AGAIN_SECONDS / 3)
    if waiting and proc.state(pid) not in "ZX":
        name = signal.Signals(number).name
        logger.error(f"launch.hostfile: {name} reached no rank on {', '.join(sorted(waiting))}: see what runs there")
    return codes


def end(launch: Launch, pid: int) -> list[int]:
    """Have all ranks end as Ctrl-C ends them, with what started them from here on; the exit codes of the ranks.

    pdsh is left until they have spoken. It may be told twice: a connection that was being made has begun its rank late.
    """
    proc.send(pid, signal.SIGSTOP)  # DeepSpeed's launcher, so that it begins nothing more
    codes: list[int] = []
    until = time.monotonic() + PATIENCE_SECONDS
    while _below(pid) and time.monotonic() < until:
        codes += [code for _, said in _ask(launch, signal.SIGINT, launch.hosts) for code in said]
        again = time.monotonic() + AGAIN_SECONDS
        while _below(pid) and time.monotonic() < again:
            time.sleep(proc.POLL_SECONDS)
    proc.kill(pid)
    return codes


def kill(launch: Launch) -> None:
    """SIGKILL on all hosts that can be reached."""
    _ask(launch, signal.SIGKILL, launch.hosts)


def _below(pid: int) -> list[int]:
    return [one for one in proc.descendants(pid) if proc.state(one) not in "ZX"]


def _ask(launch: Launch, number: int, hosts: Sequence[str]) -> list[tuple[str, list[int]]]:
    """Run `on_host` on all of `hosts`: (host, exit codes that it tells of) for each that found processes."""
    path = os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))  # as DeepSpeed sets it there
    asked = [sys.executable, "-m", "pipeline.launch.on_host", str(int(number)), launch.port, launch.word]
    line = f"cd {shlex.quote(os.getcwd())} && PYTHONPATH={shlex.quote(path)} {shlex.join(asked)}"
    argv = ["pdsh", "-R", "ssh", "-f", str(len(hosts)), "-w", ",".join(hosts), line]
    unseen = {"stdin": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    done = subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=False, **unseen)
    answers = []
    for answer in done.stdout.splitlines():  # 'host: told 130 130'
        host, _, said = answer.partition(": ")
        if host in hosts and said.startswith("told"):
            answers.append((host, [int(code) for code in said.split()[1:]]))
    return answers
