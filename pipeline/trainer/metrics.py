"""Additive metrics between two rows of the log: added up where they are born, reduced over ranks once per row."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pipeline.algorithms.stats import merge, reduce
from pipeline.records import Stat

TRL_GROUPS = ("completions", "logps", "rewards")  # what TRL logs under names with a slash, it logs as train/...
PACK_ROWS = 64  # packed metrics are padded to a multiple of this, so that differing layouts still meet in one call


class Metrics:
    """Statistics of one logged step, added up on the device they are born on until `reduce`.

    All ranks must add the same names in the same kinds before a reduction; a rank without rows adds Stats of count 0.
    """

    def __init__(self, stats: Mapping[str, Stat] | None = None) -> None:
        self.stats = dict(stats or {})  # what this rank holds

    def add(self, stats: Mapping[str, Stat]) -> None:
        """Merge `stats` into the running sums."""
        for name, stat in stats.items():
            self.stats[name] = merge(self.stats[name], stat) if name in self.stats else stat

    def sums(self) -> Tensor:
        """((n + 1) rounded up to PACK_ROWS, 3) float64: a row naming the layout, the sums in name order, zeros."""
        names = sorted(self.stats)
        mark = zlib.crc32(repr([(name, self.stats[name].kind) for name in names]).encode()) >> 12  # 20 bits: exact
        device = self.stats[names[0]].sums.device if names else torch.device("cpu")
        packed = torch.zeros(-(-(len(names) + 1) // PACK_ROWS) * PACK_ROWS, 3, dtype=torch.float64, device=device)
        packed[0] = torch.tensor([1.0, mark, mark**2], dtype=torch.float64)
        if names:
            packed[1 : len(names) + 1] = torch.stack([self.stats[name].sums for name in names])
        return packed

    def reduce(self, all_sum: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The statistics over all ranks, by name; nothing is held afterwards.

        `all_sum` adds a tensor over ranks (the identity in one process).
        Raises RuntimeError when ranks hold different names or kinds: adding them up would mix them.
        """
        kinds = {name: self.stats[name].kind for name in sorted(self.stats)}
        total = all_sum(self.sums()).cpu()
        ranks, marks, squares = (int(x) for x in total[0].tolist())
        # Cauchy-Schwarz: (sum m)^2 = n sum m^2 holds if and only if all ranks have the same m.
        if marks**2 != ranks * squares:
            raise RuntimeError(f"metrics: {ranks} ranks hold different statistics; this one has {list(kinds.items())}")
        self.stats = {}
        return {name: float(reduce(Stat(kind, row))) for (name, kind), row in zip(kinds.items(), total[1:])}  # noqa: B905


def of_training(stats: Mapping[str, Stat]) -> dict[str, Stat]:
    """The statistics of a step under the tags they are logged as: train/<name> as TRL has it, other groups as they are.

    Of held-out data the tag is eval/<name> for all of them.
    """
    plain = {name: "/" not in name or name.startswith(TRL_GROUPS) for name in stats}
    return {f"train/{name}" if plain[name] else name: stat for name, stat in stats.items()}


class Interval:
    """What has been seen of the steps since the last row of the log; a checkpoint keeps it, so that no step is lost.

    `steps` and `seconds` are this rank's own; evaluation and saving do not count as seconds.
    """

    def __init__(self, metrics: Metrics, steps: int = 0, seconds: float = 0.0) -> None:
        self.metrics, self.steps, self.seconds = metrics, steps, seconds

    def add(self, stats: Mapping[str, Stat], seconds: float) -> None:
        """One more step."""
        self.metrics.add(stats)
        self.steps += 1
        self.seconds += seconds

    def close(self, all_sum: Callable[[Tensor], Tensor]) -> tuple[dict[str, float], float]:
        """The statistics over all ranks and the seconds per step; the interval starts anew."""
        values, seconds = self.metrics.reduce(all_sum), self.seconds / max(1, self.steps)
        self.steps, self.seconds = 0, 0.0
        return values, seconds
