"""How many responses each prompt of a step gets, and at which temperature: before anything is generated.

Every rank holds the same history and the same recent rewards, and so makes the same plan without communication.
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pipeline.algorithms import capability
from pipeline.config.sampler import SamplerSettings
from pipeline.config.schema import RlPolicy

LOW, HIGH = 0.05, 0.95  # quantiles between which a reward or an entropy is good or bad, where no range is given


def spoken_sampler(settings: RlPolicy) -> str:
    """How many responses a prompt has, in words."""
    s = settings.sampler
    if s.mode == "dynamic":
        return f"{s.k_min} to {s.k_max} responses each by {s.capability} ({s.k} where nothing is known)"
    if s.mode == "static":
        return f"{s.k} responses each"
    return f"one response each, of which {s.drop_share:.0%} are dropped"


def prompt_key(ids: Sequence[int]) -> str:
    """A prompt's name: the same on every rank, in every order and epoch, whatever row it came from."""
    return hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()[:16]


class Allocation(NamedTuple):
    """What one prompt of a step gets."""

    k: int
    temperature: float
    capability: float | None  # in [0, 1]; None where nothing is known
    probed: tuple[int, ...] = ()  # of each probe, where there were some: how many responses the others call for


class Record(NamedTuple):
    """What one step found out about one prompt's responses: means over them."""

    reward: float
    entropy: float  # nats per token, of the untempered policy
    confidence: float  # see algorithms/capability.py


class Sampler:
    """Plans the samples of a step from the records of earlier steps; it holds all that a resume needs for that."""

    def __init__(self, settings: SamplerSettings, choices: int, queue_size: int):
        self.settings = settings
        self.choices = choices  # ids that the policy can draw
        self.rewards: deque[float] = deque(maxlen=queue_size)  # of the last responses
        self.entropies: deque[float] = deque(maxlen=queue_size)  # of the last prompts
        self._records: dict[str, deque[Record]] = {}  # by prompt, the oldest first
        self._skipped: Counter[str] = Counter()  # how many times running a prompt was left out

    def plan(self, keys: Sequence[str]) -> list[Allocation]:
        """What each prompt gets, by its key; one that is left out this time has k = 0."""
        planned = [self._planned(key) for key in keys]
        if self.settings.budget is None:
            return planned
        sizes = [one.k for one in planned]
        kept = capability.within_budget(sizes, keys, self.settings.budget, self.settings.fewest)
        return [one._replace(k=k) for one, k in zip(planned, kept, strict=True)]

    def probes(self, keys: Sequence[str]) -> list[bool]:
        """Which prompts get a few responses first: those of which nothing is known, where `probe` is set."""
        wanted = self.settings.probe is not None
        return [wanted and not self.records(key) for key in keys]

    def after_probe(self, others: Sequence[Record]) -> Allocation:
        """What a prompt gets that was probed; its probes count, and the other responses have their temperature.

        others: for each probe what the others found out, which alone decides how much that one weighs: see
        algorithms/online.py. More responses come if any of them calls for more than the probes.
        """
        known = [self.capability([record]) for record in others]
        sizes = tuple(max(self._sized(one).k, self.settings.probe) for one in known)
        mean = None if None in known else statistics.fmean(known)
        return Allocation(math.ceil(statistics.fmean(sizes)), self.settings.temperature_min, mean, sizes)

    def _planned(self, key: str) -> Allocation:
        known, above = self.capability(self.records(key)), self.settings.skip_above
        plan = self._sized(known)
        sure = above is not None and known is not None and known >= above
        return plan._replace(k=0) if sure and self._skipped[key] < self.settings.recheck - 1 else plan

    def _sized(self, known: float | None) -> Allocation:
        s = self.settings
        if s.mode != "dynamic":
            return Allocation(s.fewest, s.temperature_min, known)
        if known is None:
            return Allocation(s.k, s.temperature_min, None)
        k = max(1, capability.size(known, s.k_min, s.k_max))
        temperature = capability.temperature(known, s.temperature_min, s.temperature_max, s.temperature_by)
        return Allocation(k, temperature, known)

    def capability(self, records: Sequence[Record]) -> float | None:
        """In [0, 1], from a prompt's records, the newest of which weighs most; None where nothing is known."""
        estimates = [self._estimate(record) for record in reversed(records)]
        known = [
            (self.settings.discount**age, c) for age, c in enumerate(estimates) if c is not None and not math.isnan(c)
        ]
        total = sum(weight for weight, _ in known)
        return sum(weight * c for weight, c in known) / total if total > 0 else None

    def _estimate(self, record: Record) -> float | None:
        s = self.settings
        if s.capability == "confidence":
            return record.confidence
        if s.capability == "entropy":
            return self._by_entropy(record)
        by_reward = self._by_reward(record)
        if s.capability == "reward":
            return by_reward
        by_entropy, w = self._by_entropy(record), s.entropy_weight
        return None if by_reward is None or by_entropy is None else w * by_entropy + (1.0 - w) * by_reward

    def _by_entropy(self, record: Record) -> float | None:
        given = self.settings.entropy_range
        limits = (0.0, math.log(self.choices)) if given == "full" else _limits(given, self.entropies)
        return None if limits is None else capability.entropy_capability(record.entropy, *limits)

    def _by_reward(self, record: Record) -> float | None:
        limits = _limits(self.settings.reward_range, self.rewards)
        return None if limits is None else capability.place_between(record.reward, *limits)

    def records(self, key: str) -> list[Record]:
        """A prompt's newest records, the oldest of them first."""
        return list(self._records.get(key, ()))

    def mean_reward(self) -> float | None:
        """Of the last responses of earlier steps; None where there are none."""
        return statistics.fmean(self.rewards) if self.rewards else None

    def learn(self, key: str, record: Record | None, rewards: Sequence[float] = ()) -> None:
        """A step's record of one prompt, and the rewards of its responses; no record of one that was left out."""
        if record is None:
            self._skipped[key] += 1
            return
        self._skipped.pop(key, None)
        self._records.setdefault(key, deque(maxlen=self.settings.history)).append(record)
        self.entropies.append(record.entropy)
        self.rewards.extend(rewards)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint's JSON, which keeps every float to the bit."""
        records = {key: [list(record) for record in found] for key, found in self._records.items()}
        history = {"records": records, "skipped": dict(self._skipped)}
        return {"history": history, "queue": list(self.rewards), "entropies": list(self.entropies)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What `state_dict` gave, and nothing else."""
        self._records = {
            key: deque((Record(*values) for values in found), maxlen=self.settings.history)
            for key, found in state["history"]["records"].items()
        }
        self._skipped = Counter(state["history"]["skipped"])
        for queue, values in ((self.rewards, state["queue"]), (self.entropies, state["entropies"])):
            queue.clear()
            queue.extend(values)


def _limits(given: Any, recent: Sequence[float]) -> tuple[float, float] | None:
    """The range that is given, else the quantiles of recent values; None where there are none."""
    if isinstance(given, list):
        return given[0], given[1]
    return capability.quantiles(recent, LOW, HIGH) if recent else None
