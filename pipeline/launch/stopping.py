"""Ctrl-C: the stage ends at once, as with kill -9, and says what is saved and how to go on.

It does not save first: who stops a run to change a setting may then start it otherwise. SIGTERM saves.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

from pipeline.config.schema import Common, Training
from pipeline.launch import going_on

INTERRUPTED = 130
BEGUN = "TIFFIN_COMMAND"  # set for the processes that the command line started, which speaks where they cannot
_reached = {"when": ""}  # how far the stage of this process is, in words


def reached(step: int, last: int) -> None:
    """Note that `step` steps of `last` are taken, for what Ctrl-C then says."""
    _reached["when"] = f" after step {step:,} of {last:,}"


def listen(directory: Path, settings: Common) -> None:
    """From now on have Ctrl-C end this process with a line; where it is ignored, as in background jobs, it stays so."""
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda number, frame: leave(line(directory, settings, _reached["when"])))


def line(directory: Path, settings: Common, when: str = "") -> str:
    """What to say of a stage that Ctrl-C stopped."""
    stopped = f"stopped by Ctrl-C{when}: "
    if going_on.begun(directory):
        if going_on.ended(directory, settings):
            return f"{stopped}{directory} is done"
        if (newest := going_on.checkpoint(directory)) is not None:
            return f"{stopped}{newest} is saved; the same command goes on from there"
    if isinstance(settings, Training):
        every = "null" if settings.train.save_steps is None else settings.train.save_steps
        return f"{stopped}nothing is saved yet (save_steps={every}): the same command starts again"
    if kept := going_on.evaluated(directory, settings):
        return f"{stopped}{kept}, which is saved; the same command goes on from there"
    return f"{stopped}nothing is saved: the same command starts again"


def leave(text: str) -> NoReturn:
    """Say `text`, on the first rank, and end at once; safe within a signal handler, whatever it has interrupted."""
    if os.environ.get("RANK", "0") == "0":
        below = "\n" if sys.stderr.isatty() else ""  # of a progress bar
        os.write(2, f"{below}tiffin: {text}\n".encode())
    os._exit(INTERRUPTED)
