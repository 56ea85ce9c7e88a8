"""Errors that only the user can fix, each in one line; the system's own, explained; hints for misspelt names."""

from __future__ import annotations

import difflib
import errno
import os
import shutil
from collections.abc import Iterable

ROOM = "wanted room: free some, or raise the quota; the same command goes on from what is whole"
RIGHT = "wanted a place that may be read and written: fix its permissions, or choose another runs_dir="
OCCUPIED = "wanted a directory: a file stands in its place; move it, or choose another runs_dir= or run="
CURES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), ROOM),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), RIGHT),
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST), OCCUPIED),
    errno.EISDIR: "wanted a file: a directory stands in its place; move it",
    errno.EMFILE: "wanted more open files: raise `ulimit -n`",
    errno.EADDRINUSE: "wanted a free port: leave master_port out, or give another",
    errno.EIO: "wanted a disk that works: see the system's log",
}
TORCH_MARKS = ("PytorchStreamWriter failed", "iostream error", "unexpected pos")  # torch.save on a full disk

# of gloo, NCCL and torch's store, where a process is gone or late
LOST_MARKS = ("Connection reset by peer", "Connection closed by peer", "Timed out waiting", "Broken pipe")
LOST_MARKS += ("remote process exited", "Watchdog caught collective operation timeout", "Socket Timeout")


class UserError(Exception):
    """Something only the user can fix: one line with the place, what was found, what was wanted, the cure."""


class LostError(Exception):
    """Another process of the launch has ended or hangs: one line that says so."""


class PreemptedError(Exception):
    """SIGTERM came, and what a resume needs is saved: one line that says so."""


def as_user_error(error: OSError | RuntimeError) -> UserError | None:
    """The line for an error that only the user can fix, None where the error is of another kind."""
    if isinstance(error, shutil.Error):  # copytree's: a list of (source, target, reason)
        source, target, reason = error.args[0][0]
        return UserError(f"{target}: cannot be copied from {source} ({reason}), {ROOM}")
    if isinstance(error, OSError) and error.errno in CURES:
        place = error.filename or "disk"
        return UserError(f"{place}: {os.strerror(error.errno)}, {CURES[error.errno]}")
    message = " ".join(str(error).split())
    if isinstance(error, RuntimeError) and any(mark in message for mark in TORCH_MARKS):
        return UserError(f"disk: weights cannot be written ({message[:120]}), {ROOM}")
    return None


def as_lost_error(error: RuntimeError) -> LostError | None:
    """The line for a collective that another process does not take part in any more, None for any other error."""
    message = " ".join(str(error).split())
    if not any(mark in message for mark in LOST_MARKS):
        return None
    said = message.split(". This is typically caused")[0][-160:]
    return LostError(
        f"another process has ended, or did not answer within launch.ddp_timeout seconds ({said}): its own lines say "
        "why; the same command goes on from the last checkpoint"
    )


def did_you_mean(wrong: str, known: Iterable[str]) -> str:
    """ "; did you mean 'x'?" for the known name nearest to `wrong`, or nothing where none is near."""
    names = {name.lower(): name for name in known}
    near = difflib.get_close_matches(wrong.lower(), names, n=1)
    return f"; did you mean {names[near[0]]!r}?" if near else ""
