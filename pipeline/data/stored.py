"""One row of an Arrow file: an Example as JSON text, and columns of what has to be known of all rows at once.

Prompts, texts and ids are compared by 64 bits of a hash: of ten million different ones, two are taken for equal once in
400,000 data sets.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow

from pipeline.data.cache import Writer
from pipeline.records import Chat, Example, Message

BATCH_ROWS, BATCH_BYTES = 8192, 1 << 26  # of a batch of the Arrow file, whichever is reached first
EMPTY = {"nan", "none", "null", "<na>", "#n/a"}  # what programs write into the cells of texts that are not there
PAIRED = ("chosen", "rejected", "chosen_reward", "rejected_reward", "margin", "correctness")  # fields of a pair
CHOSEN, REJECTED = "/chosen", "/rejected"  # what the ids of the two rows of a pair end with
COPY = "/copy-"
SIDE = re.compile(f"({CHOSEN}|{REJECTED})?$")  # ids of the sides of pairs still end with the side
TURNS = ("completion", "chosen", "rejected")
LISTS = ("references", "candidates", "candidate_rewards", "unfinished")
LACKED = (*LISTS, "rewards", "source", "columns", "candidate_scores")
AS_JSON = json.JSONEncoder(ensure_ascii=False).encode


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
