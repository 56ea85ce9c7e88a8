"""What the machine refuses - room, permission, a place that is something else - as one line for the user."""

from __future__ import annotations

import errno
import os
import shutil

from pipeline.records import UserError

ROOM = "wanted room: free some, or raise the quota; the same command goes on from what is whole"
RIGHT = "wanted a place that may be read and written: mend its rights, or choose another runs_dir="
CURES = {
    errno.ENOSPC: ROOM,
    errno.EDQUOT: ROOM,
    errno.EFBIG: ROOM,
    errno.EACCES: RIGHT,
    errno.EPERM: RIGHT,
    errno.EROFS: RIGHT,
    errno.ENOTDIR: "wanted a directory: a file stands in its place; move it, or choose another runs_dir= or run=",
    errno.EEXIST: "wanted a directory: a file stands in its place; move it, or choose another runs_dir= or run=",
    errno.EISDIR: "wanted a file: a directory stands in its place; move it",
    errno.EMFILE: "wanted more open files: raise `ulimit -n`",
    errno.EADDRINUSE: "wanted a free port: leave master_port out, or give another",
    errno.EIO: "wanted a disk that works: see the system's log",
}
TORCH_MARKS = ("PytorchStreamWriter failed", "iostream error", "unexpected pos")  # torch.save on a full disk


def told(error: OSError | RuntimeError) -> UserError | None:
    """The line for an error that only the user can mend, None where the error is of another kind."""
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
