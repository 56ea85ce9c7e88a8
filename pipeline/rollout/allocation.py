"""How many responses each prompt of a step is asked for, and at which temperature: before anything is generated.

Every rank holds the same history and the same queue, and so makes the same plan without a word.
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pipeline.algorithms import capability
from pipeline.config.schema import Rl
from pipeline.config.sections import SamplerSettings
from pipeline.errors import UserError

LOW, HIGH = 0.05, 0.95  # quantiles between which a reward or an entropy is good or bad, where no range is given


def check_sampler(settings: Rl, algorithm: Any) -> None:
    """Raise UserError where the settings of sampler, objective, generation and batch do not go together."""
    s, answer = settings.sampler, settings.generation.max_new_tokens
    if algorithm.sft_weight > 0:
        answer = max(answer, settings.data.max_response_length)
    longest = settings.data.max_prompt_length + answer
    fewest = {"static": s.k, "dynamic": max(1, s.k_min)}.get(s.mode, 1)
    if algorithm.objective == "mrt" and fewest < 2:
        raise UserError(
            f"sampler: {fewest} response(s) to a prompt at least with objective: mrt, wanted 2 or more, which are "
            f"compared with one another: raise sampler.{'k' if s.mode == 'static' else 'k_min'}"
        )
    if fewest < 2 and algorithm.objective == "reinforce" and algorithm.baseline in ("mean", "group"):
        raise UserError(
            f"sampler: {fewest} response(s) to a prompt at least with baseline: {algorithm.baseline}, wanted 2 or "
            "more, or one is compared with itself: say algorithm.settings.baseline=queue"
        )
    check_drop(settings)
    if settings.train.max_tokens is not None and longest > settings.train.max_tokens:
        raise UserError(
            f"train.max_tokens: {settings.train.max_tokens}, but a prompt with its response may have {longest} tokens: "
            "raise it, or lower data.max_prompt_length, generation.max_new_tokens or, with sft_weight, "
            "data.max_response_length"
        )


def check_drop(settings: Rl) -> None:
    """Raise UserError where a dropping mode would throw a whole batch away."""
    s, prompts, size = settings.sampler, settings.train.batch_size, settings.generation.batch_size
    if s.mode not in ("drop", "drop_fixed"):
        return
    least = (prompts % size or min(size, prompts)) if s.mode == "drop" else prompts
    if len(capability.dropped([0.0] * least, s.drop_share)) == least:
        raise UserError(
            f"sampler.drop_share: {s.drop_share} of a batch of {least} throws all of it away, wanted some kept: lower "
            f"it, or raise {'generation' if s.mode == 'drop' else 'train'}.batch_size"
        )


def spoken_sampler(settings: Rl) -> str:
    """How many responses a prompt has, in words."""
    s = settings.sampler
    if s.mode == "dynamic":
        return f"{s.k_min} to {s.k_max} responses each by {s.capability} ({s.k} where nothing is known)"
    if s.mode == "static":
        return f"{s.k} responses each"
    return f"one response each, of which {s.drop_share:.0%} are dropped"


class Share(NamedTuple):
    """What one prompt of a step gets."""

    k: int
    temperature: float
    capability: float | None  # in [0, 1]; None where nothing is known


@dataclass
class Sampler:
    """Plans the samples of a step from what earlier steps saw."""

    settings: SamplerSettings
    choices: int  # ids that the policy can draw
    queue: Queue  # of rewards
    history: History = field(init=False)
    entropies: Queue = field(init=False)  # of prompts

    def __post_init__(self) -> None:
        self.history = History(self.settings.history)
        self.entropies = Queue(self.queue.length)

    def plan(self, keys: Sequence[str]) -> list[Share]:
        """A share for each prompt, by its key; a prompt that is left out this time has k = 0."""
        shares = [self._share(self.capability(self.history.of(key)), key) for key in keys]
        if self.settings.budget is None:
            return shares
        sizes = [share.k for share in shares]
        kept = capability.within_budget(sizes, keys, self.settings.budget, self.least)
        return [share._replace(k=k) for share, k in zip(shares, kept, strict=True)]

    @property
    def least(self) -> int:
        """The fewest responses of a prompt that is not left out."""
        return self.settings.k if self.settings.mode == "static" else max(1, self.settings.k_min)

    def probes(self, keys: Sequence[str]) -> list[bool]:
        """Which prompts are asked for a few responses first: those of which nothing is known, where `probe` is set."""
        wanted = self.settings.probe is not None
        return [wanted and not self.history.of(key) for key in keys]

    def after_probe(self, record: Record) -> Share:
        """What a prompt gets that was probed; its probes count, and all its responses are drawn as hot as they were."""
        share = self._sized(self.capability([record]))
        return share._replace(k=max(share.k, self.settings.probe), temperature=self.settings.temperature_min)

    def _share(self, known: float | None, key: str) -> Share:
        above = self.settings.skip_above
        sure = above is not None and known is not None and known >= above
        if sure and self.history.skipped(key) < self.settings.recheck - 1:
            return self._sized(known)._replace(k=0)
        return self._sized(known)

    def _sized(self, known: float | None) -> Share:
        s = self.settings
        if s.mode != "dynamic":
            return Share(s.k if s.mode == "static" else 1, s.temperature_min, known)
        if known is None:
            return Share(s.k, s.temperature_min, None)
        k = max(1, capability.size(known, s.k_min, s.k_max))
        return Share(k, capability.temperature(known, s.temperature_min, s.temperature_max, s.temperature_by), known)

    def capability(self, records: Sequence[Record]) -> float | None:
        """In [0, 1], from a prompt's records, the newest of which weighs most; None where nothing can be said."""
        ways: Mapping[str, Callable[[Record], float | None]] = {
            "entropy": self._by_entropy,
            "reward": self._by_reward,
            "combined": self._combined,
            "confidence": lambda record: record.confidence,
        }
        estimates = [ways[self.settings.capability](record) for record in reversed(records)]
        known = [
            (self.settings.discount**age, c) for age, c in enumerate(estimates) if c is not None and not math.isnan(c)
        ]
        total = sum(weight for weight, _ in known)
        return sum(weight * c for weight, c in known) / total if total > 0 else None

    def _by_entropy(self, record: Record) -> float | None:
        wanted = self.settings.entropy_range
        limits = (0.0, math.log(self.choices)) if wanted == "full" else _limits(wanted, self.entropies)
        return None if limits is None else capability.entropy_capability(record.entropy, *limits)

    def _by_reward(self, record: Record) -> float | None:
        limits = _limits(self.settings.reward_range, self.queue)
        return None if limits is None else capability.place_between(record.reward, *limits)

    def _combined(self, record: Record) -> float | None:
        by_reward, by_entropy, w = self._by_reward(record), self._by_entropy(record), self.settings.entropy_weight
        return None if by_reward is None or by_entropy is None else w * by_entropy + (1.0 - w) * by_reward

    def learn(self, key: str, record: Record | None, rewards: Sequence[float] = ()) -> None:
        """What a step saw of one prompt, and the rewards of its responses; no record of one that was left out."""
        if record is None:
            self.history.skip(key)
            return
        self.history.push(key, record)
        self.entropies.push([record.entropy])
        self.queue.push(rewards)

    def state(self) -> dict[str, Any]:
        """History and queues, for a checkpoint."""
        queues = {"queue": self.queue.values(), "entropies": self.entropies.values()}
        return {"history": self.history.state(), **queues}

    def restore(self, state: Mapping[str, Any]) -> None:
        """What `state` gave."""
        self.history.restore(state["history"])
        self.queue.restore(state["queue"])
        self.entropies.restore(state["entropies"])


def _limits(given: Any, seen: Queue) -> tuple[float, float] | None:
    """The range that is given, else the quantiles of what was seen; None where nothing was."""
    if isinstance(given, list):
        return given[0], given[1]
    values = seen.values()
    return capability.quantiles(values, LOW, HIGH) if values else None


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
