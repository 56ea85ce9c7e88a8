"""Where DeepSpeed's operators are compiled, by whom, and what a process that was killed meanwhile left. Needs no torch.

torch compiles into one folder for the whole account, and marks a compile under way by a file `lock`, for whose end
others wait for ever; a process that is killed leaves it. Here each environment has a folder of its own, and processes
compile in turn, under a lock that ends with whoever holds it (flock). Who has the turn and still finds torch's file
knows that its maker has ended, or is no process of ours.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

PLACE = "TORCH_EXTENSIONS_DIR"  # torch's own variable: a user's setting counts
BATON, TURN = "lock", ".turn"  # torch's file, and ours beside it
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # a file system that knows none
POLL_SECONDS = 0.2
QUIET_SECONDS = 900.0  # nobody's compiler takes so long for one file, where its process cannot be seen

logger = logging.getLogger("tiffin")


def directory(environ: Mapping[str, str]) -> Path:
    """Where operators are compiled: what the user set, else a folder of this environment, said if it is elsewhere.

    Its name says what the code is compiled for: versions, and a processor of this kind (DeepSpeed uses all that the
    processor has, and machines of several kinds may share an environment).
    """
    if environ.get(PLACE):
        return Path(environ[PLACE])
    versions = [f"{name}{metadata.version(name)}" for name in ("torch", "deepspeed")]
    name = "-".join([*versions, f"py{sys.version_info.major}{sys.version_info.minor}", _processor()])
    own = Path(sys.prefix) / "torch_extensions"
    try:
        own.mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=own):
            return own / name
    except OSError as error:
        cache = Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tiffin"
        other = cache / hashlib.sha256(sys.prefix.encode()).hexdigest()[:8] / name
        logger.info(f"{own}: cannot be written ({error.strerror}): operators are compiled into {other}")
        return other


def _processor(system: Path = Path("/")) -> str:
    """A name for processors with the same instructions."""
    file = system / "proc/cpuinfo"
    flags = re.search(r"^(flags|Features)\s*:(.*)$", file.read_text(), re.MULTILINE) if file.is_file() else None
    return f"{platform.machine()}-{hashlib.sha256(flags[2].encode() if flags else b'').hexdigest()[:8]}"


@contextmanager
def turn(folder: Path, ours: bool, patience: float = QUIET_SECONDS) -> Iterator[None]:
    """Hold `folder`, in which an operator is compiled, once it is free of others; with waiting said once.

    `ours`: no program but this one compiles there. Of a file that torch's lock leaves, its end is waited for as long
    as its maker may live: a process here that has the file open, or works in the folder. Else it is removed; but where
    others compile, of another machine perhaps, only when nothing changed in the folder for `patience` seconds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    told = False
    with open(folder / TURN, "a", encoding="utf-8") as file:
        alone = _locked(file.fileno(), wait=False)
        if alone is False:
            told = _tell_of_waiting(folder)
            alone = _locked(file.fileno(), wait=True)
        while (baton := folder / BATON).exists():
            if not at_work(folder) and ((ours and alone) or _quiet(folder) > patience):
                baton.unlink(missing_ok=True)
                logger.warning(f"{baton}: left by a process that was killed while it compiled: removed")
                break
            told = told or _tell_of_waiting(folder)
            time.sleep(POLL_SECONDS)
        yield


def at_work(folder: Path) -> list[int]:
    """The processes of this machine, but this one, that work in `folder` or have its `lock` open, as torch's do."""
    places = {os.path.realpath(folder), os.path.realpath(folder / BATON)}
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        if int(process.name) == os.getpid():
            continue
        try:
            links = [process / "cwd", *(process / "fd").iterdir()]
            if places & {os.readlink(link) for link in links if link.is_symlink()}:
                found.append(int(process.name))
        except OSError:  # it ended, or is another user's
            continue
    return found


def _locked(descriptor: int, wait: bool) -> bool | None:
    """Whether the lock was taken; None where the file system has none."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return True
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return None


def _quiet(folder: Path) -> float:
    """Seconds since a file of the folder, but ours, was written."""
    times = [path.stat().st_mtime for path in folder.iterdir() if path.name != TURN]
    return time.time() - max(times, default=0.0)


def _tell_of_waiting(folder: Path) -> bool:
    logger.info(f"waiting for another process that compiles in {folder}")
    return True
