"""Measuring side by side: two sides in turns, medians of rounds, peaks of memory, one table.

A round is some steps of both sides taken in turns, so that whatever else the machine does slows both alike. It gives
one ratio; printed are the median of the rounds' ratios, the least and the greatest.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
HEAD = ("", "ours", "other", "ratio", "least .. greatest", "goal", "met", "")

T = TypeVar("T")


@dataclass(frozen=True)
class Goal:
    """What a number should be: `limit` or less, or, where `at_least`, `limit` or more."""

    limit: float
    at_least: bool = False

    def met(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.limit:g}"


@dataclass(frozen=True)
class Result:
    """One line of the table; what does not apply is None."""

    name: str
    unit: str
    ours: float
    other: float | None = None
    ratio: float | None = None
    least: float | None = None
    greatest: float | None = None
    goal: Goal | None = None  # of the ratio; of `ours` where there is no ratio to meet it
    note: str = ""
    mfu: float | None = None  # of a step of training: the share of what the device can compute; None: not known

    @property
    def met(self) -> bool | None:
        if self.goal is None:
            return None
        return self.goal.met(self.ours if self.ratio is None else self.ratio)


@dataclass(frozen=True)
class Timing:
    """How often each side is measured, and by which clock."""

    rounds: int
    steps: int  # per round
    clock: str  # wall | cpu: processor time of this process, where other work shares the machine
    warm: int = 2  # steps before anything counts

    @property
    def total(self) -> int:
        return self.warm + self.rounds * self.steps

    @property
    def single(self) -> Timing:
        """One step per round, for steps that take seconds."""
        return replace(self, steps=1, warm=1)


def timed(work: Callable[[], object], clock: str) -> float:
    """Seconds that `work` takes, its kernels on the GPU included."""
    started = _now(clock)
    work()
    return _now(clock) - started


def _now(clock: str) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return CLOCKS[clock]()


def in_turns(
    ours: Callable[[int], T], other: Callable[[int], T], timing: Timing, of_round: Callable[[list[T]], float]
) -> list[tuple[float, float]]:
    """Per round what `of_round` makes of the values of our steps and of the other's; each goes first half the time."""

    def turns(steps: range) -> tuple[list[T], list[T]]:
        values: tuple[list[T], list[T]] = ([], [])
        for step in steps:
            for side in (0, 1) if step % 2 == 0 else (1, 0):
                values[side].append((ours, other)[side](step))
        return values

    turns(range(timing.warm))
    rounds = [turns(range(start, start + timing.steps)) for start in range(timing.warm, timing.total, timing.steps)]
    return [(of_round(mine), of_round(others)) for mine, others in rounds]


def alternate(
    ours: Callable[[int], object], other: Callable[[int], object], timing: Timing
) -> list[tuple[float, float]]:
    """Per round the median seconds of a step of `ours` and of `other`; both take the step's number, from 0."""
    clocked = [lambda step, side=side: timed(lambda: side(step), timing.clock) for side in (ours, other)]
    return in_turns(*clocked, timing, statistics.median)


def speed(steps: Sequence[tuple[float, float]]) -> float:
    """Tokens per second of steps of (tokens, seconds)."""
    return sum(tokens for tokens, _ in steps) / sum(seconds for _, seconds in steps)


def compared(name: str, unit: str, rounds: Sequence[tuple[float, float]], goal: Goal | None, note: str = "") -> Result:
    """The result of rounds of (ours, other)."""
    ratios = [ours / other for ours, other in rounds]
    medians = (statistics.median(side) for side in (*zip(*rounds, strict=True), ratios))
    return Result(name, unit, *medians, min(ratios), max(ratios), goal, note)


def times_less(name: str, ours: Callable[[], object], other: Callable[[], object], goal: Goal | None) -> Result:
    """How many times the peak memory of `ours` that of `other` is, each measured once."""
    mine, others = peak_megabytes(ours), peak_megabytes(other)
    return Result(f"{name}, peak memory", "MB", mine, others, others / mine, goal=goal)


def peak_megabytes(work: Callable[[], object]) -> float:
    """The most memory that tensors take during `work` beyond what was there before.

    On a GPU torch's own count; on a CPU the sum of the allocations and frees that the profiler records.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    now = most = 0
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most / 1e6


def table(results: Sequence[Result]) -> str:
    """The results as aligned columns."""
    rows = [HEAD, *(_cells(result) for result in results)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    aligned = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return "\n".join("  ".join(row).rstrip() for row in aligned)


def _cells(result: Result) -> tuple[str, ...]:
    return (
        result.name,
        f"{result.ours:,.4g} {result.unit}",
        "" if result.other is None else f"{result.other:,.4g} {result.unit}",
        "" if result.ratio is None else f"{result.ratio:.3f}",
        "" if result.least is None else f"{result.least:.3f} .. {result.greatest:.3f}",
        "" if result.goal is None else str(result.goal),
        {None: "", True: "yes", False: "no"}[result.met],
        result.note,
    )
