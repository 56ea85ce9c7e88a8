"""Rows with their tokens: a sequence of Items that are made when they are asked for.

The tokens of all rows lie in one Arrow table, made once per machine in several processes and mapped; the numbers that
go with rows are arrays; the reference's log-probabilities are one array, mapped too.
"""

from __future__ import annotations

import hashlib
import inspect
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import chain, islice
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, overload

import numpy as np
import pyarrow
import pyarrow.compute as pc
import torch

from pipeline.data import cache, conversations
from pipeline.data.cache import Entry, Writer, digest
from pipeline.data.rows import Rows
from pipeline.data.stored import hash_of
from pipeline.data.tokenization import Encoder
from pipeline.errors import UserError
from pipeline.records import Example, Item, Row

NUMBERS = ("reward", "margin", "chosen_reward", "rejected_reward", "correctness")
PART = 2048  # rows that are tokenised at a time
MANY = 200_000  # rows of which it is said that they will be tokenised
LEAST = 10_000  # rows for which a process more is worth its start
IDS = pyarrow.list_(pyarrow.int32())
SCHEMA = pyarrow.schema(
    [("prompt", IDS), ("response", IDS), ("learned", pyarrow.list_(pyarrow.bool_())), ("flags", pyarrow.uint8())]
)
FLAGS = ("cut_prompt", "cut_response", "spelled", "own_end", "unfinished", "cut_text")  # fields of a Row, by bit

RowsOf = Callable[[Example, Encoder], tuple[Row, ...]]


@dataclass(frozen=True, eq=False)
class Items(Sequence[Item]):
    """Items of equally many rows each. The table holds all rows, those of an item one after the other."""

    examples: Sequence[Example]
    table: pyarrow.Table
    per: int  # rows of an item
    numbers: Mapping[str, np.ndarray] = field(default_factory=dict)  # (n,) float64 each
    ref_logp: np.ndarray | None = None  # (response tokens,) float32, of all rows one after the other
    bare: bool = False  # the prompt of the first row alone

    def __len__(self) -> int:
        return len(self.examples)

    @overload
    def __getitem__(self, place: int) -> Item: ...
    @overload
    def __getitem__(self, place: slice) -> Items: ...
    def __getitem__(self, place: int | slice) -> Item | Items:
        if isinstance(place, slice):
            return self._part(*place.indices(len(self)))
        place = range(len(self))[place]
        first = place * self.per
        known = {name: float(column[place]) for name, column in self.numbers.items()}
        rows = tuple(self._row(at) for at in range(first, first + self.rows_each))
        logps = () if self.ref_logp is None else tuple(self._logp(first + i) for i in range(self.per))
        return Item(self.examples[place], rows, known, logps)

    def __iter__(self) -> Iterator[Item]:
        return (self[i] for i in range(len(self)))

    def _part(self, start: int, stop: int, step: int) -> Items:
        assert step == 1, step
        stop = max(start, stop)
        logps = None
        if self.ref_logp is not None:
            logps = self.ref_logp[self.ends[start * self.per] : self.ends[stop * self.per]]
        return replace(
            self,
            examples=self.examples[start:stop],
            table=self.table.slice(start * self.per, (stop - start) * self.per),
            numbers={name: column[start:stop] for name, column in self.numbers.items()},
            ref_logp=logps,
        )

    def _row(self, at: int) -> Row:
        flags = self._columns["flags"][at].as_py()
        prompt = tuple(self._columns["prompt"][at].values.to_numpy().tolist())
        response = () if self.bare else tuple(self._columns["response"][at].values.to_numpy().tolist())
        learned = () if self.bare else tuple(self._columns["learned"][at].as_py())
        return Row(
            prompt, response, learned=learned, **{name: bool(flags >> bit & 1) for bit, name in enumerate(FLAGS)}
        )

    def _logp(self, at: int) -> torch.Tensor:
        return torch.from_numpy(np.array(self.ref_logp[self.ends[at] : self.ends[at + 1]]))

    @cached_property
    def _columns(self) -> dict[str, pyarrow.ChunkedArray]:
        return {name: self.table[name] for name in SCHEMA.names}

    @cached_property
    def prompts(self) -> np.ndarray:
        """(rows,) int32, tokens of the prompt of each row."""
        return pc.list_value_length(self.table["prompt"]).to_numpy()

    @cached_property
    def responses(self) -> np.ndarray:
        """(rows,) int32, tokens of the response of each row."""
        lengths = pc.list_value_length(self.table["response"]).to_numpy()
        return np.zeros_like(lengths) if self.bare else lengths

    @cached_property
    def ends(self) -> np.ndarray:
        """(rows + 1,) where the responses' tokens begin, one after the other, and the last one's end."""
        return np.concatenate([[0], np.cumsum(self.responses, dtype=np.int64)])

    @cached_property
    def prompt_keys(self) -> np.ndarray:
        """(items,) a number for each prompt, whatever its tokens."""
        return examples_of(self).column("prompt")

    @property
    def rows_each(self) -> int:
        """How many rows of an item are read."""
        return 1 if self.bare else self.per

    def sizes(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Of each of these items, (places,) int64: the longest prompt, response, and both together, of its rows; and
        all its tokens, a prompt that its rows share once."""
        rows = places[:, None] * self.per + np.arange(self.rows_each)  # (places, rows of an item)
        prompts, responses = self.prompts[rows].astype(np.int64), self.responses[rows].astype(np.int64)
        # rows of an item have one prompt, unless it was cut in one of them
        again = (prompts[:, 1:] * (prompts[:, 1:] == prompts[:, :1])).sum(1)
        whole = prompts + responses
        return prompts.max(1), responses.max(1), whole.max(1), whole.sum(1) - again

    def with_numbers(self, **numbers: Sequence[float]) -> Items:
        """The same with further numbers, one per item in each sequence."""
        return replace(
            self, numbers={**self.numbers, **{name: np.asarray(one, np.float64) for name, one in numbers.items()}}
        )

    def flagged(self, name: str) -> int:
        """How many rows have a flag."""
        return int((self.table["flags"].to_numpy() >> FLAGS.index(name) & 1).sum(dtype=np.int64))


def column(items: Sequence[Item], name: str) -> np.ndarray:
    """(n,) float64 of a number that all items have."""
    if isinstance(items, Items):
        return items.numbers[name]
    return np.array([item.numbers[name] for item in items], dtype=np.float64)


def prompt_keys(items: Sequence[Item], places: Sequence[int]) -> list[int]:
    """Of each of these items a number that those have in common which have one prompt."""
    if isinstance(items, Items):
        return items.prompt_keys[np.asarray(places, np.int64)].tolist()
    known: dict[tuple[int, ...], int] = {}
    return [known.setdefault(items[place].rows[0].prompt_ids, len(known)) for place in places]


def examples_of(items: Sequence[Item]) -> Rows:
    return Rows.of(items.examples if isinstance(items, Items) else [item.example for item in items])


def content(items: Items) -> list[object]:
    """What names the rows, the same in all that learn from the same rows; of those in memory their number."""
    rows = examples_of(items)
    return [len(rows), rows.key if rows.cache is not None else ""]


def has_prompts(items: Sequence[Item]) -> bool:
    """Whether any row has a prompt; plain text has none."""
    if not isinstance(items, Items):
        return any(len(item.example.prompt) > 0 for item in items)
    return bool((~np.isin(examples_of(items).column("prompt"), [hash_of(""), hash_of(())])).any())


def numbers_of(examples: Sequence[Example]) -> dict[str, np.ndarray]:
    """The numbers that rows bring along: those which every row has, so that any of them make a micro-batch."""
    rows = Rows.of(examples)
    found = {name: rows.column(name) for name in NUMBERS}
    return {name: values for name, values in found.items() if not np.isnan(values).any()}


def with_numbers(items: Sequence[Item], **numbers: Sequence[float]) -> Sequence[Item]:
    """The items with further numbers, one per item in each sequence."""
    if isinstance(items, Items):
        return items.with_numbers(**numbers)
    return [
        replace(item, numbers={**item.numbers, **{name: float(values[i]) for name, values in numbers.items()}})
        for i, item in enumerate(items)
    ]


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
        found = conversations.joined(items._row(place) for place in range(len(items)))
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


def counts(items: Items) -> dict[str, int]:
    """What data.json says of a split: rows, responses (two in a pair), tokens, how many were cut, what they spell."""
    prompts, responses = (int(lengths.sum(dtype=np.int64)) for lengths in (items.prompts, items.responses))
    return {
        "rows": len(items),
        "responses": len(items) * items.per,
        "tokens": prompts + responses,
        "response_tokens": responses,
        "cut_prompts": items.flagged("cut_prompt"),
        "cut_responses": items.flagged("cut_response"),
        "spelled_special_tokens": items.flagged("spelled"),
        "own_ends": items.flagged("own_end"),
        "unfinished_responses": items.flagged("unfinished"),
    }


def tokens_digest(items: Sequence[Item]) -> str:
    """sha256 of all token ids: it changes with data, template, tokenizer and truncation."""
    if not isinstance(items, Items):
        return digest([[[row.prompt_ids, row.response_ids] for row in item.rows] for item in items])
    parts = [items.prompts, items.responses]
    for name in ("prompt", "response"):
        found = hashlib.sha256()  # of one token after the other, wherever the table's chunks begin
        for chunk in items.table[name].chunks:
            found.update(np.ascontiguousarray(chunk.flatten().to_numpy()).data)
        parts.append(found.hexdigest())
    return digest(items.per, items.bare, *parts)
