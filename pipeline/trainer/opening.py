"""How the ranks of a stage open its directory: rank 0 does, and all others must see it."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.config.schema import Common
from pipeline.errors import UserError
from pipeline.launch import run_dir
from pipeline.launch.going_on import CONFIG
from pipeline.trainer.group import Ranks

PATIENCE = 30.0  # seconds that a network's file system may take to show a new file


def open_stage(
    ranks: Ranks, directory: Path, settings: Common, words: Sequence[str], inputs: Mapping[str, str]
) -> bool:
    """What `run_dir.open_stage` says, on every rank. Raises UserError as it does, and where a rank is blind there."""
    begins = ranks.on_main(lambda: run_dir.open_stage(directory, settings, words, inputs))
    if begins:
        written = ranks.from_main((directory / CONFIG).read_text(encoding="utf-8") if ranks.main else None)
        ranks.agreed(lambda: check_seen(ranks, directory, written))
    return begins


def check_seen(ranks: Ranks, directory: Path, written: str) -> None:
    """Raises UserError where this rank does not find what rank 0 wrote."""
    until = time.monotonic() + PATIENCE
    while not (file := directory / CONFIG).is_file() or file.read_text(encoding="utf-8") != written:
        if time.monotonic() > until:
            raise UserError(
                f"runs_dir: rank {ranks.rank} on {socket.gethostname()} does not see what rank 0 writes to "
                f"{directory}, wanted one directory for all hosts: put runs_dir= on a file system that they share"
            )
        time.sleep(0.2)
