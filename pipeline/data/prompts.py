"""The prompts of some rows, each once, and what new responses to them are compared with."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from operator import eq
from typing import Any

import numpy as np

from pipeline.data import convert, mixing
from pipeline.data.rows import Rows
from pipeline.errors import UserError
from pipeline.records import Answer, Example, text_of

logger = logging.getLogger("tiffin")


def gold(example: Example) -> tuple[str, ...]:
    """What a new response to the prompt is compared with: the references given, else the answer that the row holds.

    That is its completion or the chosen side of its pair. A completion with a reward, or of a pair's rejected side, is
    a response of any quality, and so none; nor is one of weight 0.
    """
    judged = example.reward is not None or example.rewards or example.id.endswith(convert.REJECTED)
    judged = judged or example.turn_weight == 0
    answer = example.chosen if example.completion is None else None if judged else example.completion
    return example.references or (() if answer is None else (text_of(answer),))


def with_gold(examples: Sequence[Example]) -> Rows:
    """The examples with what new responses to their prompts are compared with as references."""
    return Rows.of(examples).made("gold", lambda rows: (replace(row, references=gold(row)) for row in rows))


def unique_prompts(examples: Sequence[Example], copies: bool = False) -> UniquePrompts:
    """The first example of each prompt, to be answered anew; its references are what is gold in any of that prompt.

    With `copies`, which the weights of files make, each copy of a prompt is one of its own. Further columns stay those
    of the first example; a line is logged where they differ.
    """
    rows = Rows.of(examples)
    found = UniquePrompts.of(rows, copies)
    with_columns = any(store.names()[0] for store in rows.stores)
    if with_columns and (differing := found.differing()):
        logger.info(f"{differing:,} of {len(found):,} prompts have rows of different columns: the first row's count")
    return found


@dataclass(frozen=True, eq=False)
class UniquePrompts(Sequence[Example]):
    """The prompts of some rows, each once, in the order in which they come first."""

    rows: Rows
    places: np.ndarray  # (rows,) of the rows, those of one prompt one after the other, in their order
    ends: np.ndarray  # (prompts + 1,) where in `places` those of each prompt begin, and the last one's end

    @classmethod
    def of(cls, rows: Rows, copies: bool) -> UniquePrompts:
        hashes = rows.column("prompt")
        if copies:
            numbers = np.array([mixing.copy_number(row) for row in rows]) if rows.copies is None else rows.copies
            hashes = hashes ^ (numbers.astype(np.uint64) - np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        _, firsts, groups = np.unique(hashes, return_index=True, return_inverse=True)
        ranks = np.empty(len(firsts), np.int64)
        ranks[np.argsort(firsts)] = np.arange(len(firsts))
        groups = ranks[groups]
        ends = np.concatenate([[0], np.cumsum(np.bincount(groups, minlength=len(firsts)))])
        return cls(rows, np.argsort(groups, kind="stable"), ends)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        rows = self._group(range(len(self))[place])
        return replace(rows[0], references=tuple(dict.fromkeys(text for row in rows for text in gold(row))))

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(eq, self, other))

    __hash__ = None

    @cached_property
    def of_rows(self) -> np.ndarray:
        """(rows,) int64, which of the prompts each row has."""
        found = np.empty(len(self.places), np.int64)
        found[self.places] = np.repeat(np.arange(len(self)), np.diff(self.ends))
        return found

    def group(self, place: int) -> np.ndarray:
        """Where the rows of a prompt stand."""
        return self.places[self.ends[place] : self.ends[place + 1]]

    def _group(self, place: int) -> list[Example]:
        return [self.rows[int(i)] for i in self.group(place)]

    def differing(self) -> int:
        """How many prompts have rows whose further columns are not the first one's."""
        several = np.flatnonzero(np.diff(self.ends) > 1)
        return sum(any(row.columns != rows[0].columns for row in rows) for rows in map(self._group, several.tolist()))


def reference_text(example: Example) -> Answer:
    """The first reference, else the completion. Raises UserError where there is neither."""
    text = example.references[0] if example.references else example.completion
    if not text:
        raise UserError(
            f"{example.id}: no reference text, wanted one to learn from: give the row a column `completion` "
            "or `references`"
        )
    return text
