"""One writer at a time: advisory locks on files, freed by the system when their process ends, however it ends.

POSIX record locks: they hold across the machines of a shared file system, and no child process inherits them.
"""

from __future__ import annotations

import errno
import fcntl
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from pipeline.errors import UserError

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # a file system that knows none

_held: dict[Path, TextIO] = {}  # closing a file would free its lock


def claim(directory: Path) -> None:
    """Hold `directory` until this process ends; a second claim by the same process changes nothing.

    Raises:
        UserError: another process holds it.
    """
    path = (directory / ".lock").resolve()
    if path in _held:
        return
    file = open(path, "a", encoding="utf-8")  # noqa: SIM115
    try:
        _lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        raise UserError(
            f"{directory}: another process is at work there, wanted one at a time: wait for it, or choose another "
            "run= or name="
        ) from None
    _held[path] = file


@contextmanager
def waiting(directory: Path) -> Iterator[None]:
    """Hold `directory` for a while, once whoever holds it lets go."""
    with open(directory / ".lock", "a", encoding="utf-8") as file:
        _lock(file, fcntl.LOCK_EX)
        yield


def _lock(file: TextIO, how: int) -> None:
    try:
        fcntl.lockf(file, how)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        print(f"{file.name}: this file system has no locks: start one process at a time", file=sys.stderr, flush=True)
