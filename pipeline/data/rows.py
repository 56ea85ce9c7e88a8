"""Rows as a sequence of Examples that are made when they are asked for, and columns of what has to be known of all.

A file's rows lie in an Arrow file that every process maps; those of a task, or of a test, in a list. Which rows, in
which order, is an array of numbers. Prompts, texts and ids are compared by 64 bits of a hash: of ten million different
ones, two are taken for equal once in 400,000 data sets.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, overload

import numpy as np
import pyarrow

from pipeline.data.cache import Cache, Entry, Writer, digest
from pipeline.records import Chat, Example, Message

BATCH_ROWS, BATCH_BYTES = 8192, 1 << 26  # of a batch of the Arrow file, whichever is reached first
EMPTY = {"nan", "none", "null", "<na>", "#n/a"}  # what programs write into the cells of texts that are not there
PAIRED = ("chosen", "rejected", "chosen_reward", "rejected_reward", "margin", "correctness")  # fields of a pair
CHOSEN, REJECTED = "/chosen", "/rejected"  # what the ids of the two rows of a pair end with
COPY = "/copy-"
SIDE = re.compile(f"({CHOSEN}|{REJECTED})?$")  # ids of the sides of pairs still end with the side
TURNS = ("completion", "chosen", "rejected")
LACKED = ("references", "candidates", "candidate_rewards", "rewards", "source", "columns", "candidate_scores")
AS_JSON = json.JSONEncoder(ensure_ascii=False).encode
LISTS = ("references", "candidates", "candidate_rewards")


def hash_of(key: object) -> int:
    """64 bits of the sha256 of how a key is written."""
    return int.from_bytes(hashlib.sha256(repr(key).encode("utf-8", "surrogatepass")).digest()[:8], "big")


def asked(row: Example) -> object:
    """The prompt, the same for a text and for a user's message of that text alone: files may have either."""
    alone = not isinstance(row.prompt, str) and len(row.prompt) == 1 and type(row.prompt) is tuple
    return row.prompt[0].content if alone and row.prompt[0].role == "user" and not row.prompt[0].more else row.prompt


def is_pair(example: Example) -> bool:
    return example.chosen is not None and example.rejected is not None


def is_weighted(example: Example) -> bool:
    """Whether a message of the row has a weight."""
    return example.turn_weight is not None or any(turn.weight is not None for turn in _turns(example))


def copy_of(row: Example, number: int) -> Example:
    """The row itself as the first, else one with the id ID/copy-NUMBER."""
    return row if number == 1 else replace(row, id=SIDE.sub(lambda side: f"{COPY}{number}{side[0]}", row.id, count=1))


def _turns(row: Example) -> Iterable[Message]:
    return () if isinstance(row.prompt, str) else row.prompt


def empty_texts(row: Example) -> list[str]:
    """Those of its texts that stand for an empty cell."""
    texts = (row.prompt, row.completion, row.chosen, row.rejected, *row.references, *row.candidates)
    return [text for text in texts if isinstance(text, str) and text.strip().lower() in EMPTY]


def _number(value: float | None) -> float:
    return math.nan if value is None else value


# what is known of every row by column; of numbers NaN is none
FACTS: Mapping[str, tuple[str, Callable[[Example], Any]]] = {
    "prompt": ("uint64", lambda row: hash_of(row.prompt)),
    "asked": ("uint64", lambda row: hash_of(asked(row))),
    "answers": ("uint64", lambda row: hash_of((row.completion, row.chosen, row.rejected, row.candidates))),
    "id": ("uint64", lambda row: hash_of(row.id)),
    "reward": ("float64", lambda row: _number(row.reward)),
    "margin": ("float64", lambda row: _number(row.margin)),
    "chosen_reward": ("float64", lambda row: _number(row.chosen_reward)),
    "rejected_reward": ("float64", lambda row: _number(row.rejected_reward)),
    "correctness": ("float64", lambda row: _number(row.correctness)),
    "only_reward": ("float64", lambda row: next(iter(row.rewards.values())) if len(row.rewards) == 1 else math.nan),
    "is_chat": ("bool", lambda row: not isinstance(row.prompt, str)),
    "answered": ("bool", lambda row: row.completion is not None),
    "is_pair": ("bool", is_pair),
    "same_sides": ("bool", lambda row: row.chosen == row.rejected),
    "holds_pair": ("bool", lambda row: any(getattr(row, name) is not None for name in PAIRED)),
    "scored_candidates": ("bool", lambda row: bool(row.candidate_rewards or row.candidate_scores)),
    "weighted": ("bool", is_weighted),
    "rewarded_turns": ("bool", lambda row: any(turn.reward is not None for turn in _turns(row))),
    "unlearned": ("bool", lambda row: row.turn_weight == 0),
    "by_name": ("bool", lambda row: bool(row.rewards)),
    "empty_texts": ("uint16", lambda row: len(empty_texts(row))),
}
SCHEMA = pyarrow.schema(
    [
        ("row", pyarrow.binary()),
        *((name, getattr(pyarrow, kind.replace("bool", "bool_"))()) for name, (kind, _) in FACTS.items()),
    ]
)


def packed(row: Example) -> bytes:
    """An Example as JSON text, without what it lacks."""
    given = {name: value for name, value in vars(row).items() if value is not None and (value or name not in LACKED)}
    if isinstance(row.prompt, Chat):
        given["prompt"] = {"turns": row.prompt.turns, "tools": row.prompt.tools, "arguments": row.prompt.arguments}
    return AS_JSON(given).encode("utf-8", "surrogatepass")


def unpacked(text: bytes) -> Example:
    """The Example that was `packed`."""
    given = json.loads(text.decode("utf-8", "surrogatepass"))
    prompt = given["prompt"]
    if isinstance(prompt, list):
        given["prompt"] = _messages(prompt)
    elif isinstance(prompt, dict):
        given["prompt"] = Chat(_messages(prompt["turns"]), prompt["tools"], prompt["arguments"])
    for name in TURNS:
        if isinstance(given.get(name), list):
            given[name] = Message(*given[name])
    for name in LISTS:
        if name in given:
            given[name] = tuple(given[name])
    if "candidate_scores" in given:
        given["candidate_scores"] = {name: tuple(some) for name, some in given["candidate_scores"].items()}
    return Example(**given)


def _messages(turns: Sequence[Sequence[Any]]) -> tuple[Message, ...]:
    return tuple(Message(*turn) for turn in turns)


class Sink:
    """Examples one after the other into an Arrow file."""

    def __init__(self, writer: Writer):
        self.writer, self._count = writer, 0
        self._rows: list[Example] = []
        self._texts: list[bytes] = []
        self._bytes = 0

    def __len__(self) -> int:
        return self._count

    def append(self, row: Example) -> None:
        text = packed(row)
        self._rows.append(row)
        self._texts.append(text)
        self._bytes += len(text)
        self._count += 1
        if len(self._rows) >= BATCH_ROWS or self._bytes >= BATCH_BYTES:
            self.flush()

    def flush(self) -> None:
        if self._rows:
            facts = {name: fact_column(name, self._rows) for name in FACTS}
            self.writer.batch({"row": self._texts} | facts)
        self._rows, self._texts, self._bytes = [], [], 0


@dataclass
class Names:
    """The further columns of rows that come one by one."""

    seen: dict[tuple[str, ...], None] = field(default_factory=dict)

    def see(self, row: Example) -> None:
        self.seen.setdefault(tuple(row.columns))

    def facts(self) -> dict[str, Any]:
        names = dict.fromkeys(name for some in self.seen for name in some)
        return {"names": [*names], "uniform": all(len(some) == len(names) for some in self.seen)}


def fact_column(name: str, rows: Sequence[Example]) -> np.ndarray:
    kind, of = FACTS[name]
    return np.fromiter((of(row) for row in rows), dtype=kind, count=len(rows))


@dataclass(frozen=True)
class Fix:
    """What all rows of a file are given or lose once the last one is read."""

    without: tuple[str, ...] = ()  # further columns that one of them cannot carry
    reward: str = ""  # the only one of `rewards`, which is the reward
    source: str | None = None  # of a hub set's folder

    def of(self, row: Example) -> Example:
        if self.without and any(name in row.columns for name in self.without):
            row = replace(row, columns={name: one for name, one in row.columns.items() if name not in self.without})
        if self.reward:
            row = replace(row, reward=row.rewards[self.reward])
        return row if self.source is None else replace(row, source=self.source)


@dataclass(frozen=True, eq=False)
class Store:
    """All rows of one file: mapped, or as a list. `file` is what it is called, `names` its further columns."""

    content: Entry | Sequence[Example]
    file: str = ""
    key: str = ""  # names the content; "" for a list
    user: str = ""  # who asked for it: the settings of the key
    fix: Fix = Fix()
    cache: Cache | None = None

    def __len__(self) -> int:
        return self.content.table.num_rows if isinstance(self.content, Entry) else len(self.content)

    def row(self, place: int) -> Example:
        if not isinstance(self.content, Entry):
            return self.fix.of(self.content[place])
        return self.fix.of(unpacked(self._texts[place].as_py()))

    @cached_property
    def _texts(self) -> pyarrow.ChunkedArray:
        return self.content.table["row"]

    def column(self, name: str) -> np.ndarray:
        name = "only_reward" if name == "reward" and self.fix.reward else name
        if isinstance(self.content, Entry):
            return self.content.table[name].to_numpy()
        return fact_column(name, self.content)

    def names(self) -> tuple[dict[str, None], bool]:
        """The further columns of its rows, and whether every row has them all."""
        if isinstance(self.content, Entry):
            facts = self.content.facts
        else:
            known = Names()
            for row in self.content:
                known.see(row)
            facts = known.facts()
        return {name: None for name in facts["names"] if name not in self.fix.without}, facts["uniform"]


@dataclass(frozen=True, eq=False)
class Rows(Sequence[Example]):
    """Some rows of some stores, in an order. Equal to any sequence of equal Examples."""

    stores: tuple[Store, ...]
    order: np.ndarray  # (n,) where each row lies, the stores one after the other
    copies: np.ndarray | None = None  # (n,) number of the copy, from 1; None: all are the first
    filled: tuple[str, ...] = ()  # further columns that every row has, None where it brings none
    tag: str = ""  # which part of its files this is

    @classmethod
    def of(cls, rows: Sequence[Example]) -> Rows:
        """The same as Rows."""
        return rows if isinstance(rows, Rows) else cls.whole([Store(rows)])

    @classmethod
    def whole(cls, stores: Sequence[Store]) -> Rows:
        """All rows of the stores."""
        total = sum(map(len, stores))
        return cls(tuple(stores), np.arange(total, dtype=np.int32 if total < 2**31 else np.int64))

    @cached_property
    def starts(self) -> np.ndarray:
        """(stores + 1,) where each store begins."""
        return np.cumsum([0, *map(len, self.stores)])

    @property
    def store_numbers(self) -> np.ndarray:
        """(n,) in which of the stores each row lies."""
        return np.searchsorted(self.starts, self.order, side="right") - 1

    def __len__(self) -> int:
        return len(self.order)

    @overload
    def __getitem__(self, place: int) -> Example: ...
    @overload
    def __getitem__(self, place: slice) -> Rows: ...
    def __getitem__(self, place: int | slice) -> Example | Rows:
        if isinstance(place, slice):
            return self.take(place)
        at = int(self.order[place])
        number = int(np.searchsorted(self.starts, at, side="right")) - 1 if len(self.stores) > 1 else 0
        row = self.stores[number].row(at - int(self.starts[number]))
        if len(row.columns) < len(self.filled):
            row = replace(row, columns={**dict.fromkeys(self.filled), **row.columns})
        return row if self.copies is None else copy_of(row, int(self.copies[place]))

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or len(self) != len(other):
            return False
        return all(one == two for one, two in zip(self, other, strict=True))

    __hash__ = None

    def take(self, places: slice | np.ndarray, tag: str = "") -> Rows:
        """Some of the rows: a slice, their places, or a mask."""
        copies = None if self.copies is None else self.copies[places]
        return replace(self, order=self.order[places], copies=copies, tag=f"{self.tag}{tag}")

    def repeated(self, counts: np.ndarray) -> Rows:
        """Each row so many times (n,), copies behind it."""
        ends = np.cumsum(counts)
        numbers = np.arange(1, (ends[-1] if len(ends) else 0) + 1) - np.repeat(ends - counts, counts)
        return replace(self, order=np.repeat(self.order, counts), copies=numbers.astype(np.int32))

    def __add__(self, other: Rows) -> Rows:
        """Both, one after the other."""
        if self.stores == other.stores:
            stores, shift = self.stores, 0
        else:
            stores, shift = (*self.stores, *other.stores), int(self.starts[-1])
        copies = None
        if self.copies is not None or other.copies is not None:
            copies = np.concatenate(
                [np.ones(len(one), np.int32) if one.copies is None else one.copies for one in (self, other)]
            )
        filled = tuple(dict.fromkeys((*self.filled, *other.filled)))  # rows made of filled ones have them for good
        order = np.concatenate([self.order, other.order + other.order.dtype.type(shift)])
        return Rows(stores, order, copies, filled, f"{self.tag}+{other.tag}")

    def column(self, name: str) -> np.ndarray:
        """(n,) of a fact that is known of every row."""
        parts = [store.column(name) for store in self.stores]
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts) if parts else np.empty(0)
        return whole[self.order]

    def all(self, name: str) -> bool:
        return bool(self.column(name).all())

    def any(self, name: str) -> bool:
        return bool(self.column(name).any())

    @cached_property
    def key(self) -> str:
        """What names the content, wherever it lies."""
        stores = [one.key + repr(one.fix) for one in self.stores]
        assert self.cache is not None, "rows in a list have no key"
        copies = self.order[:0] if self.copies is None else self.copies
        return digest(stores, self.order, copies, self.filled)

    @property
    def user(self) -> str:
        """Who asks for what is made of these rows, whatever they are by now: the settings, and which part it is."""
        return digest([one.user for one in self.stores], self.tag)

    @property
    def cache(self) -> Cache | None:
        """Where what is made of the rows is kept: with them; None where some lie in a list."""
        return next((one.cache for one in self.stores), None) if all(one.cache for one in self.stores) else None

    def made(self, name: str, make: Callable[[Rows], Iterable[Example]]) -> Rows:
        """The rows that `make` makes of these; beside them, once per machine. `name` says what it does, in full."""
        if self.cache is None:
            return Rows.of([*make(self)])

        def write(writer: Writer) -> Mapping[str, Any]:
            sink, known = Sink(writer), Names()
            for row in make(self):
                known.see(row)
                sink.append(row)
            sink.flush()
            return known.facts()

        user, key = [name, self.user], [name, self.key]
        entry = self.cache.entry("rows", user, key, SCHEMA, write)
        return Rows.whole([Store(entry, name, digest(key), digest(user), cache=self.cache)])
