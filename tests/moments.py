"""When to kill a stage, by what its directory shows from outside, and what the stack says that was hit."""

from __future__ import annotations

import glob
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

# event -> what changes in the stage directory when it happens; a kill waits for the k-th change
EVENTS = {
    "row": "metrics.jsonl",  # a row of metrics
    "checkpoint": "checkpoints/part-*",  # a checkpoint is being written
    "pointer": "checkpoints/latest",  # and is complete
    "evaluation": "samples",
    "best": "best.part",  # exports
    "last": "last.part",
    "model": "model.part",
    "results": "results.json*",
    "caching": "../cache",  # a cache has been begun or finished
}
USUAL = ("start", "row", "row", "row", "checkpoint", "checkpoint", "pointer", "best", "last", "model", "results")
ONCE = ("last", "model", "results")
BY_KIND = {  # of a stage, or of an algorithm of rl
    "sft": (*USUAL, "evaluation", "evaluation"),
    "reward": USUAL,
    "alol": (*USUAL, "evaluation", "caching", "caching", "caching", "start"),
    "semi_offline": (*USUAL, "evaluation", "evaluation"),
    "esrl": (*USUAL, "evaluation", "evaluation"),
}

# what the stack says -> what was hit; the first that fits
HITS = (
    ("final export", r"keeping\.py.* in keep\b"),
    ("export of the best weights", r"in export\b(.|\n)* in offer"),  # the innermost call comes first
    ("evaluation", r"loop\.py.* in evaluate"),
    ("checkpoint write", r"checkpoint\.py.* in (save|_rotate)"),
    ("resume from a checkpoint", r"checkpoint\.py.* in load"),
    ("clean-up at the end", r"checkpoint\.py.* in clear|metrics\.py.* in (finish|close)"),
    ("cache: policy's responses", r"in value_targets"),
    ("cache: reference log-probs", r"in read_rows"),
    ("cache: value fit", r"in (fit_value|values_of|with_values)"),
    ("scoring by the learned reward", r"in with_rewards"),
    ("judging compositions", r"compositions\.py.* in judged\b"),
    ("sampling", r"rollout/generate\.py.* in respond"),
    ("ratio check", r"in check_ratio"),
    ("optimizer step", r"engine\.py.* in step\b"),
    ("in a window", r"loop\.py.* in one_step"),
    ("between steps", r"loop\.py.* in run"),
    ("beside the steps", r"training\.py.* in train"),
)


@dataclass(frozen=True)
class Moment:
    """`delay` seconds after the `count`-th change that `event` means."""

    event: str
    count: int
    delay: float

    def __str__(self) -> str:
        return f"{self.event} {self.count} + {self.delay * 1000:.1f} ms"


def draws(kind: str, rng: random.Random, start_seconds: float) -> Iterator[Moment]:
    """Moments without end: soon after something happened, or anywhere in the first `start_seconds`.

    Every event of `kind` has its turn before one comes again.
    """
    while True:
        for event in rng.sample(BY_KIND[kind], len(BY_KIND[kind])):
            if event == "start":
                yield Moment(event, 0, rng.uniform(0.0, start_seconds))
            else:
                yield Moment(event, 1 if event in ONCE else rng.randint(1, 3), 10 ** rng.uniform(-4, -1.3))


def wait(directory: Path, moment: Moment, ended: Callable[[], bool]) -> bool:
    """Look every millisecond until `moment` has come; False if the stage ended before."""
    count, before = 0, _changed(directory, moment.event)
    while count < moment.count:
        if ended():
            return False
        now = _changed(directory, moment.event)
        count, before = count + (now > before), max(now, before)
        time.sleep(0.001)
    until = time.monotonic() + moment.delay
    while time.monotonic() < until:
        if ended():
            return False
        time.sleep(min(0.001, moment.delay))
    return not ended()


def _changed(directory: Path, event: str) -> int:
    """When the last change that `event` means happened, in nanoseconds; 0 if none has."""
    newest = 0
    for path in glob.glob(str(directory / EVENTS[event])) if event != "start" else ():
        try:
            newest = max(newest, os.stat(path).st_mtime_ns)
        except FileNotFoundError:
            continue
    return newest


def hit(where: str, crosses_epoch: Callable[[int], bool]) -> str:
    """What was hit, in words that can be counted."""
    name = next((name for name, pattern in HITS if re.search(pattern, where)), "start" if where else "")
    facts = {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", where)}
    if name != "in a window":
        return name
    if "step" in facts and crosses_epoch(facts["step"]):
        return "in a window across two epochs"
    if facts.get("place", 0) > 0:
        return "mid-accumulation"
    return "in a window, mid-epoch"
