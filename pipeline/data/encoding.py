"""Tokenise rows: once per machine, many of them in several processes.

Which rows of tokens an example gives, a stage says by a function: its completion, both responses of its pair, or its
prompt alone.
"""

from __future__ import annotations

import inspect
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
import pyarrow

from pipeline.data import cache, conversations
from pipeline.data.cache import Entry, Writer
from pipeline.data.encoded import FLAGS, SCHEMA, Items, examples_of, numbers_of, tokens_digest
from pipeline.data.rows import Rows
from pipeline.data.tokenization import Encoder
from pipeline.errors import UserError
from pipeline.records import Answer, Example, Row, text_of

PART = 2048  # rows that are tokenised at a time
MANY = 200_000  # rows of which it is said that they will be tokenised
LEAST = 10_000  # rows for which a process more is worth its start

RowsOf = Callable[[Example, Encoder], tuple[Row, ...]]


def completion_rows(example: Example, encoder: Encoder) -> tuple[Row, ...]:
    return (row_of(example, example.completion, encoder),)


def pair_rows(example: Example, encoder: Encoder) -> tuple[Row, ...]:
    return (row_of(example, example.chosen, encoder), row_of(example, example.rejected, encoder))


def row_of(example: Example, answer: Answer | None, encoder: Encoder) -> Row:
    """The prompt with one of the example's responses, without an end where that was cut off when it was written."""
    unfinished = bool(example.unfinished) and answer is not None and text_of(answer) in example.unfinished
    return encoder.encode(example.prompt, answer, unfinished)


def prompt_rows(example: Example, encoder: Encoder) -> tuple[Row, ...]:
    return (encoder.encode(example.prompt, None),)


def encode(examples: Sequence[Example], encoder: Encoder, rows_of: RowsOf, user: str = "") -> Items:
    """Items of `examples`, each with the rows that `rows_of` makes of it.

    Where the examples lie in a run's cache, so do their tokens. `user` names who needs them, a stage and a split: what
    that one had of other rows, or under other settings, goes then.
    """
    rows = Rows.of(examples)
    most = 1 if rows.cache is None else rows.cache.workers or len(os.sched_getaffinity(0))
    workers = max(1, min(most, len(rows) // LEAST))
    make = partial(_encode, rows, encoder, rows_of, workers)
    if rows.cache is None:
        entry = cache.in_memory(SCHEMA, make)
    else:
        many = len(rows) >= MANY
        before = f"{len(rows):,} rows to tokenise, once per machine, in {workers} processes" if many else ""
        key = [rows.key, encoder.key, rows_of.__qualname__, inspect.getsource(rows_of)]
        entry = rows.cache.entry("tokens", user or [rows.user, rows_of.__qualname__], key, SCHEMA, make, before)
    say_once(entry, encoder)
    return Items(rows, entry.table, entry.facts["per"], numbers_of(rows))


def say_once(entry: Entry, encoder: Encoder) -> None:
    """Log what was logged while the rows were tokenised, but for what was said of earlier ones."""
    cache.say([line for line in dict.fromkeys(entry.lines) if line[1] not in encoder.said])
    encoder.said.update(line for _, line in entry.lines)
    encoder.unread.known.update(entry.facts["known"])


def joined(items: Items, user: str = "") -> Items:
    """Items of one row each, neighbours in one where `conversations.joined` finds that it changes nothing.

    Each is the item of its last row otherwise. Kept as the tokens of `encode`, for `user`.
    """
    rows = examples_of(items)
    schema = SCHEMA.append(pyarrow.field("place", pyarrow.int64()))

    def make(writer: Writer) -> Mapping[str, Any]:
        found = conversations.joined(items.row(place) for place in range(len(items)))
        while some := [*islice(found, PART)]:
            places, whole = zip(*some, strict=True)
            writer.batch(_columns(whole) | {"place": np.array(places)})
        return {}

    if rows.cache is None:
        entry = cache.in_memory(schema, make)
    else:
        entry = rows.cache.entry("tokens", [user, "joined"], ["joined", tokens_digest(items)], schema, make)
    places = entry.table["place"].to_numpy()
    numbers = {name: values[places] for name, values in items.numbers.items()}
    return Items(rows.take(places, "joined"), entry.table, 1, numbers)


@dataclass(frozen=True)
class Part:
    """The tokens of some rows, flat, with what was said of them."""

    columns: dict[str, pyarrow.Array]  # those of SCHEMA
    per: set[int]  # rows of an item
    lines: cache.Lines
    known: set[str]
    error: str = ""  # a user's mistake in the row behind these


def _encode(rows: Rows, encoder: Encoder, rows_of: RowsOf, workers: int, writer: Writer) -> Mapping[str, Any]:
    """Tokenise all rows into `writer`, many in several processes. Raises the UserError of the first bad one."""
    per, known = set[int](), set[str]()
    for part in _parts(partial(_tokenised, rows, encoder.anew(), rows_of), len(rows), workers):
        writer.batch(part.columns)
        per |= part.per
        known |= part.known
        cache.say(part.lines)
        if part.error:
            raise UserError(part.error)
    assert len(per) <= 1, f"items of {per} rows"
    return {"per": next(iter(per), 1), "known": sorted(known)}


def _parts(work: Callable[[int], Part], count: int, workers: int) -> Iterable[Part]:
    """`work` of each part, in their order."""
    starts = range(0, count, PART)
    if workers < 2:
        yield from map(work, starts)
        return
    # forked, as what they read is mapped already; they run no tensor and no thread of this process
    fork, begun = multiprocessing.get_context("fork"), []
    try:
        for number in range(workers):
            mine, theirs = fork.Pipe(duplex=False)
            process = fork.Process(target=_work, args=(work, starts[number::workers], mine, theirs), daemon=True)
            process.start()
            theirs.close()  # so that the pipe ends where the process does, however it does
            begun.append((process, mine))
        for place in range(len(starts)):
            yield _received(*begun[place % workers])
    finally:
        for process, pipe in begun:
            process.terminate()
            pipe.close()
            process.join()


def _received(process: BaseProcess, pipe: Connection) -> Part:
    """The next part of a process. Raises RuntimeError where it failed, and UserError where it was killed."""
    try:
        return pipe.recv()
    except EOFError:
        process.join()
        if process.exitcode > 0:  # an error of this program, not a user's
            raise RuntimeError("a process that tokenises rows failed: its own traceback stands above") from None
        raise UserError(
            f"data.workers: a process that tokenises rows died (exit code {process.exitcode}), wanted all its rows: "
            "did memory run out? data.workers=1 takes least"
        ) from None


def _work(work: Callable[[int], Part], starts: Sequence[int], parents: Connection, pipe: Connection) -> None:
    """A process of its own: it ends when it is told to, or nobody reads it any more; Ctrl-C is its parent's."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parents.close()  # so that writing fails once the parent is gone, however it went
    with suppress(BrokenPipeError):
        for start in starts:
            pipe.send(work(start))


def _tokenised(rows: Rows, encoder: Encoder, rows_of: RowsOf, start: int) -> Part:
    """The tokens of the rows from `start`; up to the first that is a user's mistake."""
    made: list[tuple[Row, ...]] = []
    error = ""
    with cache.recorded() as lines:
        try:
            for place in range(start, min(start + PART, len(rows))):
                made.append(rows_of(rows[place], encoder))
        except UserError as mistake:
            error = str(mistake)
    columns = _columns([*chain.from_iterable(made)])
    return Part(columns, {*map(len, made)}, lines, encoder.unread.known, error)


def _columns(rows: Sequence[Row]) -> dict[str, pyarrow.Array]:
    """Those of SCHEMA."""
    flags = [sum(getattr(row, name) << bit for bit, name in enumerate(FLAGS)) for row in rows]
    return {
        "prompt": _flat([row.prompt_ids for row in rows]),
        "response": _flat([row.response_ids for row in rows]),
        "learned": pyarrow.array([row.learned for row in rows], SCHEMA.field("learned").type),
        "flags": pyarrow.array(flags, pyarrow.uint8()),
    }


def _flat(rows: Sequence[Sequence[int]]) -> pyarrow.ListArray:
    ends = np.cumsum([0, *map(len, rows)], dtype=np.int32)
    return pyarrow.ListArray.from_arrays(ends, np.fromiter(chain.from_iterable(rows), np.int32, count=int(ends[-1])))
