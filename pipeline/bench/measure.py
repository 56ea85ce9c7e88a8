"""How things are measured side by side: in turns, medians of rounds, peaks of memory, one table.

A round is some steps of both sides taken in turns, so that whatever else the machine does slows both alike. It gives
one ratio, that of the two medians; printed are the median of the rounds' ratios, the least and the greatest.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch.profiler import ProfilerActivity, profile

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}

Step = Callable[[int], None]  # takes the number of the step, counted from 0


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

    @property
    def met(self) -> bool | None:
        if self.goal is None:
            return None
        return self.goal.met(self.ours if self.ratio is None else self.ratio)


@dataclass(frozen=True)
class Plan:
    """How often each side is measured."""

    rounds: int
    steps: int  # per round
    clock: str  # wall | cpu: processor time of this process, where other work shares the machine
    warm: int = 2  # steps before anything counts


def timed(work: Callable[[], object], clock: str) -> float:
    """Seconds that `work` takes, its kernels on the GPU included."""
    _synchronise()
    started = CLOCKS[clock]()
    work()
    _synchronise()
    return CLOCKS[clock]() - started


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def alternate(ours: Step, other: Step, plan: Plan) -> list[tuple[float, float]]:
    """Per round the median seconds of a step of `ours` and of `other`, in turns; each goes first half the time."""
    for step in range(plan.warm):
        ours(step)
        other(step)
    rounds = []
    for start in range(plan.warm, plan.warm + plan.rounds * plan.steps, plan.steps):
        found: tuple[list[float], list[float]] = ([], [])
        for step in range(start, start + plan.steps):
            for side in (0, 1) if step % 2 == 0 else (1, 0):
                found[side].append(timed(partial((ours, other)[side], step), plan.clock))
        rounds.append((statistics.median(found[0]), statistics.median(found[1])))
    return rounds


def compared(name: str, unit: str, rounds: Sequence[tuple[float, float]], goal: Goal | None, note: str = "") -> Result:
    """The result of rounds of (ours, other)."""
    ratios = [ours / other for ours, other in rounds]
    return Result(
        name,
        unit,
        ours=statistics.median(ours for ours, _ in rounds),
        other=statistics.median(other for _, other in rounds),
        ratio=statistics.median(ratios),
        least=min(ratios),
        greatest=max(ratios),
        goal=goal,
        note=note,
    )


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
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return peak(changes) / 1e6


def peak(changes: Sequence[float]) -> float:
    """The greatest sum of the first k `changes`, at least 0."""
    now = most = 0.0
    for change in changes:
        now += change
        most = max(most, now)
    return most


def table(results: Sequence[Result]) -> str:
    """The results as aligned columns."""
    head = ("", "ours", "other", "ratio", "least .. greatest", "goal", "met", "")
    rows = [head, *(_cells(result) for result in results)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    return "\n".join("  ".join(_aligned(row, widths)).rstrip() for row in rows)


def _aligned(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    last = len(row) - 1
    cells = enumerate(zip(row, widths, strict=True))
    return [text.ljust(width) if place in (0, last) else text.rjust(width) for place, (text, width) in cells]


def _cells(result: Result) -> tuple[str, ...]:
    ratio, least, greatest = ("" if x is None else f"{x:.3f}" for x in (result.ratio, result.least, result.greatest))
    return (
        result.name,
        f"{result.ours:,.4g} {result.unit}",
        "" if result.other is None else f"{result.other:,.4g} {result.unit}",
        ratio,
        "" if result.least is None else f"{least} .. {greatest}",
        "" if result.goal is None else str(result.goal),
        {None: "", True: "yes", False: "no"}[result.met],
        result.note,
    )
