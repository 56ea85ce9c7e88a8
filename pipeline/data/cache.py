"""Arrow files that are made once per machine and mapped into memory by every process: rows, and their tokens.

An entry is a folder NAME-KEY of the run's cache/. The key holds all that its content depends on, our own code included.
Who comes first makes it, under a lock; the others wait. It is written beside its place and renamed: complete or absent.
Who uses it is noted (a file under its settings, a split of a stage): an entry that its last user has done with goes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache as once_only
from importlib.metadata import version
from pathlib import Path
from socket import gethostname
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow
from filelock import FileLock, SoftFileLock, Timeout

from pipeline.errors import UserError
from pipeline.files import write_json

FORMAT = 1  # raise it where what is stored changes and no code below pipeline/data does
DATA, META, USES = "data.arrow", "meta.json", "uses.json"
TOLD = 1 << 30  # bytes of a cache from which its size is said
LIBRARIES = ("pyarrow", "datasets", "transformers", "tokenizers", "jinja2")  # that read, write templates out, tokenise
PART = ".part"
ABANDONED = 3600.0  # seconds without a byte after which another machine's part is nobody's any more
PATIENCE = 30.0  # seconds of waiting for a lock that a dead process may hold, after which it is said

logger = logging.getLogger("tiffin")

Lines = list[tuple[int, str]]  # level and text


@dataclass(frozen=True)
class Entry:
    """What was stored: a table, mapped; what its maker said of it; and the lines that were logged meanwhile."""

    table: pyarrow.Table
    facts: Mapping[str, Any]
    lines: Sequence[tuple[int, str]]


class Writer:
    """Batches of rows, written one after the other."""

    def __init__(self, sink: pyarrow.NativeFile, schema: pyarrow.Schema):
        self.schema, self._file = schema, pyarrow.ipc.new_file(sink, schema)

    def batch(self, columns: Mapping[str, Any]) -> None:
        given = [columns[one.name] for one in self.schema]
        arrays = [
            one if isinstance(one, pyarrow.Array) else pyarrow.array(one, type=kind.type)
            for one, kind in zip(given, self.schema, strict=True)
        ]
        self._file.write_batch(pyarrow.record_batch(arrays, schema=self.schema))

    def close(self) -> None:
        self._file.close()


Make = Callable[[Writer], Mapping[str, Any]]  # writes all rows; what is to be known of them, for JSON


@dataclass(frozen=True)
class Cache:
    """The cache of a run."""

    folder: Path
    workers: int | None = None  # processes that tokenise; None: one per core

    def entry(
        self, name: str, user: object, key: object, schema: pyarrow.Schema, make: Make, before: str = ""
    ) -> Entry:
        """The entry; made here where nobody did so far. Raises UserError as `make`, and leaves nothing then.

        `user` used it before, maybe with another key: of the same settings and changed rows, say. `before` is said
        before it is made, where that takes long.
        """
        place, who = self.folder / f"{name}-{digest(code(), key)[:24]}", digest(name, user)[:16]
        if not place.is_dir() or self._uses().get(who) != place.name:
            with self.locked() as alone:
                if made := not place.is_dir():
                    if before:
                        logger.info(before)
                    self._make(place, schema, make)
                if alone:
                    self._note(who, place.name)
                if made:
                    self._tell_size()
        return opened(place)

    def _uses(self) -> dict[str, str]:
        """User -> the name of the entry that it used last."""
        try:
            return json.loads((self.folder / USES).read_text("utf-8"))
        except FileNotFoundError:
            return {}

    def _note(self, user: str, name: str) -> None:
        """Note who uses an entry, and remove those that nobody uses any more: whoever has one mapped keeps it."""
        uses = self._uses() | {user: name}
        write_json(self.folder / USES, uses)
        for other in self.folder.iterdir():
            if other.is_dir() and other.suffix != PART and other.name not in uses.values():
                shutil.rmtree(other, ignore_errors=True)
        sweep((place for place in self.folder.glob(f"*{PART}") if place.is_dir()), alone=True)

    def _tell_size(self) -> None:
        size = sum(file.stat().st_size for file in self.folder.rglob("*") if file.is_file())
        if size > TOLD:
            logger.info(f"{self.folder}: rows, tokens and log-probabilities take {size / 1e9:.1f} GB there")

    @contextmanager
    def locked(self) -> Iterator[bool]:
        """Hold the cache; whether it is held.

        On a file system without locks each process makes its own, and the first one's stays. Where there are none but
        files that say who holds it, a dead process of this machine loses it; one of another machine is named.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / ".rows.lock")
        try:
            _acquire(lock)
        except (OSError, NotImplementedError) as error:
            logger.warning(f"{self.folder}: this file system has no locks ({error}): rows may be read several times")
            yield False
            return
        try:
            yield not isinstance(lock, SoftFileLock)
        finally:
            lock.release()

    def _make(self, place: Path, schema: pyarrow.Schema, make: Make) -> None:
        part = part_of(place)
        part.mkdir()
        try:
            with open(part / DATA, "wb") as file:
                writer = Writer(pyarrow.PythonFile(file), schema)
                with recorded() as lines:
                    facts = make(writer)
                writer.close()
                file.flush()
                os.fsync(file.fileno())
            write_json(part / META, {"facts": facts, "lines": lines})
            try:
                part.rename(place)
            except OSError:
                if not place.is_dir():  # else another process without a lock was faster, with the same content
                    raise
        finally:
            shutil.rmtree(part, ignore_errors=True)


def _acquire(lock: FileLock) -> None:
    """Wait for the lock; a file that a process of another machine left is told of, once. Raises OSError, as it does."""
    try:
        lock.acquire(PATIENCE)
    except Timeout:
        if isinstance(lock, SoftFileLock):  # of any other its holder's death frees it
            with suppress(FileNotFoundError):  # free by now
                holder = " on ".join(Path(lock.lock_file).read_text("utf-8", "replace").split("\n")[:2])
                logger.warning(
                    f"{lock.lock_file}: waiting for process {holder or '(unknown)'}, which reads rows: if it runs no "
                    "more, remove the file"
                )
        lock.acquire()


def part_of(place: Path) -> Path:
    """Where what becomes `place` is written: a name that no other process has, of this machine or another."""
    return place.with_name(f"{place.name}.{host()}.{uuid4().hex[:12]}{PART}")


def host() -> str:
    """This machine's name without dots, at which names of parts are cut."""
    return gethostname().replace(".", "-")


def sweep(parts: Iterable[Path], alone: bool) -> None:
    """Remove those of `parts` that killed processes left: nobody has written to them for long.

    This machine's are nobody's at once for one who is `alone`, as who holds the lock under which they are written;
    another machine may not see it.
    """
    for part in parts:
        try:
            last = max(one.stat().st_mtime for one in (part, *part.glob("*")))
        except FileNotFoundError:  # complete by now
            continue
        if (alone and part.name.split(".")[-3:-2] == [host()]) or time.time() - last > ABANDONED:
            shutil.rmtree(part, ignore_errors=True) if part.is_dir() else part.unlink(missing_ok=True)


def opened(place: Path) -> Entry:
    """The entry at `place`, mapped. Raises UserError where it is damaged."""
    try:
        meta = json.loads((place / META).read_text("utf-8"))
        table = pyarrow.ipc.open_file(pyarrow.memory_map(str(place / DATA))).read_all()
        return Entry(table, meta["facts"], [(level, line) for level, line in meta["lines"]])
    except (OSError, ValueError, KeyError, pyarrow.ArrowException) as error:
        raise UserError(f"{place}: cannot be read ({error}), wanted what an earlier start left: remove it") from error


def in_memory(schema: pyarrow.Schema, make: Make) -> Entry:
    """The same without a file, for this process alone."""
    sink = pyarrow.BufferOutputStream()
    writer = Writer(sink, schema)
    with recorded() as lines:
        facts = make(writer)
    writer.close()
    return Entry(pyarrow.ipc.open_file(sink.getvalue()).read_all(), facts, lines)


class _Recorder(logging.Handler):
    def __init__(self, lines: Lines):
        super().__init__()
        self.lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append((record.levelno, record.getMessage()))


@contextmanager
def recorded() -> Iterator[Lines]:
    """What is logged meanwhile, instead of logging it; on ranks that log nothing, too. A failure has it logged."""
    lines: Lines = []
    before = logger.handlers, logger.level, logger.propagate
    logger.handlers, logger.propagate = [_Recorder(lines)], False
    logger.setLevel(logging.INFO)
    failed = True
    try:
        yield lines
        failed = False
    finally:
        logger.handlers, logger.propagate = before[0], before[2]
        logger.setLevel(before[1])
        if failed:
            say(lines)


def say(lines: Sequence[tuple[int, str]]) -> None:
    """Log what was recorded."""
    for level, line in lines:
        logger.log(level, line)


def digest(*parts: object) -> str:
    """sha256 of `parts`: text, numbers, and what JSON holds of them; bytes and arrays by their bytes."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            found.update(f"{part.dtype} {part.shape}".encode())
            content = np.ascontiguousarray(part).data
        else:
            content = part if isinstance(part, bytes) else json.dumps(part, sort_keys=True).encode()
        found.update(hashlib.sha256(content).digest())
    return found.hexdigest()


@once_only
def code() -> str:
    """What of the program decides what is stored: our code that reads rows and tokenises them, and the libraries'."""
    ours = Path(__file__).resolve().parent
    files = [*sorted(ours.glob("*.py")), ours.parent / "records.py"]
    versions = [FORMAT, sys.version, *map(version, LIBRARIES)]
    return digest(versions, *(file.read_bytes() for file in files))
