"""Step folders and resume state: complete or absent, rotated, `latest` written last.

checkpoints/step-000200/   DeepSpeed's shards, pieces-<rank>.json (see partitions.py), rank-<rank>.pt (random state,
                           the log's open interval), state.json, memory.json (what the source of the rows keeps of
                           earlier steps)
checkpoints/latest         the name of the newest complete one
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from pipeline.files import write_json, write_text
from pipeline.launch import going_on
from pipeline.records import Stat
from pipeline.trainer.engine import Engine
from pipeline.trainer.group import Ranks
from pipeline.trainer.metrics import Interval, Metrics


@dataclass(frozen=True)
class State:
    """All that a resume needs besides weights, optimizer and each rank's own; what is drawn is a function of `step`."""

    step: int
    world: int  # ranks that wrote it
    began: int = 0  # ranks that took the first step; 0 where older versions did not say
    cut: dict[str, Any] = field(default_factory=dict)  # the settings that decide how a step is computed
    of: int = 0  # steps that were planned; 0 where older versions did not say
    seconds: float = 0.0  # that the training has taken so far
    num_tokens: int = 0  # read up to the last row of the log, over all ranks
    best: float | None = None  # best value of the watched metric so far
    best_step: int | None = None
    best_seen: dict[str, float] = field(default_factory=dict)  # what the evaluation at best_step saw
    last_seen: dict[str, float] = field(default_factory=dict)  # and the last evaluation
    missed: float | None = None  # the best value seen, where train.best_steps kept its weights from best/
    missed_step: int | None = None


logger = logging.getLogger("tiffin")


class Checkpoints:
    """The checkpoints of one stage directory."""

    def __init__(self, directory: Path, ranks: Ranks, limit: int):
        self.directory, self.ranks, self.limit = directory / going_on.CHECKPOINTS, ranks, limit
        self._size_is_known = False

    def save(self, engine: Engine, state: State, interval: Interval, memory: Mapping[str, Any] | None = None) -> None:
        """Write a step folder under another name, rename it, then point `latest` at it and drop the oldest.

        `memory` is what `Source.state_dict` gave, the same on every rank. The step that `latest` names is complete
        and is left as it is: while it was replaced there would be none.
        """
        name, pointer = f"step-{state.step:06d}", self.directory / "latest"
        if self.ranks.from_main(pointer.is_file() and pointer.read_text(encoding="utf-8").strip() == name):
            return
        # under another name until all ranks have written: a kill leaves no half checkpoint
        part = self.directory / f"part-{name}"
        if self.ranks.main:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        self.ranks.barrier()
        engine.save(part)
        torch.save({"rng": rng_state(), **packed(interval)}, part / f"rank-{self.ranks.rank}.pt")
        self.ranks.barrier()
        if self.ranks.main:
            write_json(part / "memory.json", dict(memory or {}))
            write_json(part / going_on.STATE, asdict(state))
            # on the disk first, then the rename, then the pointer: each moment has a whole `latest`
            flush(part)
            shutil.rmtree(self.directory / name, ignore_errors=True)
            os.replace(part, self.directory / name)
            write_text(self.directory / "latest", name + "\n")
            self._rotate()
            self._say_size(self.directory / name)
        self.ranks.barrier()

    def _rotate(self) -> None:
        by_step = sorted(self.directory.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
        for old in [*by_step[: -self.limit], *self.directory.glob("part-*")]:
            shutil.rmtree(old)

    def _say_size(self, folder: Path) -> None:
        """Once: the disk that one checkpoint takes."""
        if not self._size_is_known:
            many = f"{self.limit} stay (save_total_limit), and one more while it is written"
            logger.info(f"{folder}: {gigabytes(folder)} on the disk for each checkpoint; {many}")
        self._size_is_known = True

    def load(self, engine: Engine) -> tuple[State, Interval, dict[str, Any]] | None:
        """Restore the newest complete checkpoint, and give state, open interval and memory; None if there is none.

        Other ranks may read it than wrote it; `State.world` is then that of those who wrote it.
        """
        directory = self.ranks.on_main(lambda: going_on.checkpoint(self.directory.parent))
        if directory is None:
            return None
        state = State(**going_on.state_of(directory))
        engine.load(directory)
        rank, device = self.ranks.rank, self.ranks.device
        # a rank that there was not goes on with another's generators, as all begin with the same ones
        own = read_rank(directory, rank % state.world)
        restore_rng(own["rng"])
        if state.world == self.ranks.world:
            interval = unpacked(own, device)
        else:
            interval = shared_out([read_rank(directory, each) for each in range(state.world)], rank, device)
        memory = json.loads((directory / "memory.json").read_text(encoding="utf-8"))
        return state, interval, memory

    def drop(self, keep_last: bool) -> None:
        """Remove all checkpoints, or all but the last, once the stage's final model is written."""
        if self.ranks.main:
            going_on.drop_checkpoints(self.directory.parent, keep_last)


def flush(folder: Path) -> None:
    """Have everything below `folder` on the disk itself, so that a power cut after the rename finds it whole."""
    for path in [folder, *folder.rglob("*")]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def packed(interval: Interval) -> dict[str, Any]:
    parts = {name: (kind, sums.cpu()) for name, (kind, sums) in interval.metrics.stats.items()}
    return {"tally": parts, "steps": interval.steps, "seconds": interval.seconds}


def unpacked(saved: Mapping[str, Any], device: torch.device) -> Interval:
    stats = {name: Stat(kind, sums.to(device)) for name, (kind, sums) in saved["tally"].items()}
    return Interval(Metrics(stats), saved["steps"], saved["seconds"])


def read_rank(directory: Path, rank: int) -> dict[str, Any]:
    """What a rank kept for itself."""
    return torch.load(directory / f"rank-{rank}.pt", map_location="cpu", weights_only=True)


def shared_out(saved: Sequence[Mapping[str, Any]], rank: int, device: torch.device) -> Interval:
    """What all ranks of before had seen, as the interval of rank 0; the other ranks have then seen nothing of it."""
    parts = [unpacked(one, device) for one in saved]
    metrics = Metrics()
    for part in parts:
        metrics.add(part.metrics.stats)
    if rank:
        metrics = Metrics({name: Stat(kind, torch.zeros_like(sums)) for name, (kind, sums) in metrics.stats.items()})
    return Interval(metrics, parts[0].steps, parts[0].seconds)


def gigabytes(folder: Path) -> str:
    """The disk that a folder takes, in words."""
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"


def rng_state() -> dict[str, torch.Tensor]:
    """The state of torch's generators on this rank."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_rng(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
