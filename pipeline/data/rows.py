"""Rows as a sequence of Examples that are made when they are asked for.

A file's rows lie in an Arrow file that every process maps; those of a task, or of a test, in a list. Which rows, in
which order, is an array of numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, overload

import numpy as np
import pyarrow

from pipeline.data.cache import Cache, Entry, Writer, digest, say
from pipeline.data.stored import SCHEMA, Names, Sink, copy_of, fact_column, unpacked
from pipeline.records import Example


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


def place_type(stores: Sequence[Store]) -> type[np.integer]:
    """What holds the place of each of their rows."""
    return np.int32 if sum(map(len, stores)) < 2**31 else np.int64


@dataclass(frozen=True, eq=False)
class Rows(Sequence[Example]):
    """Some rows of some stores, in an order. Equal to any sequence of equal Examples."""

    stores: tuple[Store, ...]
    order: np.ndarray  # (n,) where each row lies, the stores one after the other
    copies: np.ndarray | None = None  # (n,) number of the copy, from 1; None: all are the first
    filled: tuple[str, ...] = ()  # further columns that every row has, None where it brings none
    tag: str = ""  # which part of its files this is
    rewards: np.ndarray | None = None  # (n,) float64, each row's `reward` from now on, NaN for none; None: its own

    @classmethod
    def of(cls, rows: Sequence[Example]) -> Rows:
        """The same as Rows."""
        return rows if isinstance(rows, Rows) else cls.whole([Store(rows)])

    @classmethod
    def whole(cls, stores: Sequence[Store]) -> Rows:
        """All rows of the stores."""
        return cls(tuple(stores), np.arange(sum(map(len, stores)), dtype=place_type(stores)))

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
        if self.rewards is not None:
            given = float(self.rewards[place])
            row = replace(row, reward=None if math.isnan(given) else given)
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
        copies, rewards = (None if one is None else one[places] for one in (self.copies, self.rewards))
        return replace(self, order=self.order[places], copies=copies, rewards=rewards, tag=f"{self.tag}{tag}")

    def with_rewards(self, values: Sequence[float] | np.ndarray) -> Rows:
        """The rows, each with the reward that is given (n,), NaN for none."""
        assert len(values) == len(self), (len(values), len(self))
        return replace(self, rewards=np.asarray(values, np.float64))

    def repeated(self, counts: np.ndarray) -> Rows:
        """Each row so many times (n,), copies behind it."""
        ends = np.cumsum(counts)
        numbers = np.arange(1, (ends[-1] if len(ends) else 0) + 1) - np.repeat(ends - counts, counts)
        rewards = None if self.rewards is None else np.repeat(self.rewards, counts)
        return replace(self, order=np.repeat(self.order, counts), copies=numbers.astype(np.int32), rewards=rewards)

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
        order = np.concatenate([self.order.astype(np.int64), other.order.astype(np.int64) + shift])
        rewards = None
        if self.rewards is not None or other.rewards is not None:
            rewards = np.concatenate([one.column("reward") for one in (self, other)])
        filled = tuple(dict.fromkeys((*self.filled, *other.filled)))  # what was made of filled rows has all anyway
        return Rows(stores, order.astype(place_type(stores)), copies, filled, f"{self.tag}+{other.tag}", rewards)

    def column(self, name: str) -> np.ndarray:
        """(n,) of a fact that is known of every row."""
        if name == "reward" and self.rewards is not None:
            return self.rewards
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
        copies, rewards = (self.order[:0] if one is None else one for one in (self.copies, self.rewards))
        return digest(stores, self.order, copies, self.filled, rewards)

    @property
    def user(self) -> str:
        """Who asks for what is made of these rows, whatever they are by now: the settings, and which part it is."""
        return digest([one.user for one in self.stores], self.tag)

    @property
    def cache(self) -> Cache | None:
        """Where what is made of the rows is kept: with them; None where some lie in a list."""
        return next((one.cache for one in self.stores), None) if all(one.cache for one in self.stores) else None

    def made(self, name: str, make: Callable[[Rows], Iterable[Example]]) -> Rows:
        """The rows that `make` makes of these; beside them, once per machine. `name` says what it does, in full.

        What it logs is logged each time.
        """
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
        say(entry.lines)
        return Rows.whole([Store(entry, name, digest(key), digest(user), cache=self.cache)])
