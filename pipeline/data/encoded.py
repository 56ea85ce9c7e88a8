"""Rows with their tokens: a sequence of Items that are made when they are asked for.

The tokens of all rows lie in one Arrow table, which `encoding` makes and which is mapped; the numbers that go with rows
are arrays; the reference's log-probabilities are one array, mapped too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import overload

import numpy as np
import pyarrow
import pyarrow.compute as pc
import torch

from pipeline.data.cache import digest
from pipeline.data.rows import Rows
from pipeline.data.stored import hash_of
from pipeline.records import Example, Item, Row

NUMBERS = ("reward", "margin", "chosen_reward", "rejected_reward", "correctness")
IDS = pyarrow.list_(pyarrow.int32())
SCHEMA = pyarrow.schema(
    [("prompt", IDS), ("response", IDS), ("learned", pyarrow.list_(pyarrow.bool_())), ("flags", pyarrow.uint8())]
)
FLAGS = ("cut_prompt", "cut_response", "spelled", "own_end", "unfinished", "cut_text")  # fields of a Row, by bit


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
        rows = tuple(self.row(at) for at in range(first, first + self.rows_each))
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

    def row(self, at: int) -> Row:
        """One row of the table."""
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
