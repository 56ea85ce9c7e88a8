"""What passes a signal on to the ranks of a launch on one of its hosts. Standard library only: it begins at once.

`python -m pipeline.launch.on_host NUMBER PORT WORD` is run there over pdsh. A launch is known by its master port and
the packed words of its stage. It prints `told`, and the exit codes of the ranks that SIGINT ended; nothing where no
process of the launch is found.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Sequence

from pipeline.launch import proc

LAUNCH = [b"-m", b"deepspeed.launcher.launch"]
BEGINNING_SECONDS = 30.0  # that a launcher may take until it has begun its ranks


def launchers(port: str, word: str) -> list[int]:
    """DeepSpeed's launchers of a launch on this host: one, where each host has processes of its own."""
    wanted = {f"--master_port={port}".encode(), word.encode()}
    found = []
    for pid in proc.everyone():
        said = proc.words(pid)
        if said[2:4] == LAUNCH and wanted <= set(said):  # python -u -m deepspeed.launcher.launch ...
            found.append(pid)
    return found


def tell(number: int, found: Sequence[int]) -> list[int]:
    """Send `number` to the ranks below the launchers `found`; the exit codes of those that SIGINT ended.

    SIGINT and SIGKILL end the launchers too. What saves waits until there are ranks to tell.
    """
    if number == signal.SIGINT:
        return [code for one in found for code in proc.end_ranks(one)]
    until = time.monotonic() + BEGINNING_SECONDS
    while True:
        family = [one for launcher in found for one in proc.descendants(launcher)]
        ranks = [one for one in family if proc.is_stage(one)]
        ended = all(proc.state(one) in "ZX" for one in found)
        if ranks or ended or number == signal.SIGKILL or time.monotonic() > until:
            break
        time.sleep(proc.POLL_SECONDS)
    for one in [*found, *family] if number == signal.SIGKILL else ranks:
        proc.send(one, number)
    return []


if __name__ == "__main__":
    if here := launchers(*sys.argv[2:]):
        print("told", *tell(int(sys.argv[1]), here), flush=True)
