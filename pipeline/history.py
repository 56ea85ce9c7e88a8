"""What earlier steps saw of each prompt, and the last rewards of all: the same on every rank, saved in checkpoints."""

from __future__ import annotations

import hashlib
import statistics
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple


class Record(NamedTuple):
    """What one step saw of one prompt's responses."""

    step: int
    k: int
    temperature: float
    reward: float  # the mean
    reward_std: float
    entropy: float  # mean nats per token, of the untempered policy
    confidence: float  # mean over responses, see algorithms/capability.py
    logp: float  # mean log-probability of a response
    length: float  # mean tokens of a response
    finished: float  # share that ended by itself


def prompt_key(ids: Sequence[int]) -> str:
    """A prompt's name: the same on every rank, in every order and epoch, whatever row it came from."""
    return hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()[:16]


class History:
    """The newest `length` records of each prompt, and how often it has been left out since the last of them."""

    def __init__(self, length: int):
        self.length = length
        self._records: dict[str, deque[Record]] = {}
        self._skipped: dict[str, int] = {}

    def of(self, key: str) -> list[Record]:
        """A prompt's records, the oldest first."""
        return list(self._records.get(key, ()))

    def skipped(self, key: str) -> int:
        """How many times running the prompt was left out."""
        return self._skipped.get(key, 0)

    def push(self, key: str, record: Record) -> None:
        """One record more; the oldest is forgotten where there are too many."""
        self._records.setdefault(key, deque(maxlen=self.length)).append(record)
        self._skipped.pop(key, None)

    def skip(self, key: str) -> None:
        """The prompt was left out once more."""
        self._skipped[key] = self.skipped(key) + 1

    def state(self) -> dict[str, Any]:
        """All of it, for JSON, which keeps every float to the bit."""
        return {"records": {key: [list(r) for r in found] for key, found in self._records.items()}} | {
            "skipped": dict(self._skipped)
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """What `state` gave."""
        self._records = {
            key: deque((Record(*values) for values in found), maxlen=self.length)
            for key, found in state["records"].items()
        }
        self._skipped = dict(state["skipped"])


class Queue:
    """The last numbers of a kind, first in first out; read before a step's own are pushed, it knows none of them."""

    def __init__(self, length: int, values: Iterable[float] = ()):
        self.length = length
        self._values: deque[float] = deque(values, maxlen=length)

    def push(self, values: Iterable[float]) -> None:
        """Values in an order that all ranks share; the oldest are forgotten where there are too many."""
        self._values.extend(values)

    def restore(self, values: Iterable[float]) -> None:
        """What `values` gave, and nothing else."""
        self._values.clear()
        self._values.extend(values)

    def values(self) -> list[float]:
        """The oldest first."""
        return list(self._values)

    def mean(self) -> float | None:
        """None of an empty queue."""
        return statistics.fmean(self._values) if self._values else None

    def std(self) -> float | None:
        """The population's; None of an empty queue."""
        return statistics.pstdev(self._values) if self._values else None
