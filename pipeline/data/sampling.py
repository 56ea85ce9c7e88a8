"""Which rows a step trains on: pure functions of (seed, step), so that a resumed run needs no sampler state.

The rows drawn are global, for all ranks together; each rank takes its slice.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import UserError

TOGETHER = 50  # steps, at most, whose rows are sorted by length together
APART = 4  # parts, at least, in which an epoch is sorted: its steps are to differ from those of the next
SHARES = 4  # of a step, the rows of each of which are of like length: short ones, longer ones ...


def epoch_rows(n: int, batch_size: int, step: int, seed: int) -> list[int]:
    """The `batch_size` rows of step `step` (from 0) in an endless chain of seeded permutations of range(n).

    Every row comes once per epoch. A batch may span the end of an epoch, and several epochs where it is larger than n.
    Raises UserError where n is 0.
    """
    refuse_none(n)
    start, stop = step * batch_size, (step + 1) * batch_size
    parts = [
        _permutation(n, seed, epoch)[max(0, start - epoch * n) : stop - epoch * n]
        for epoch in range(start // n, (stop - 1) // n + 1)
    ]
    return torch.cat(parts).tolist()


def epochs_by_length(lengths: np.ndarray, batch_size: int, seed: int) -> Callable[[int], list[int]]:
    """As `epoch_rows` of a step, but in each of its SHARES rows are of like length: read together, they are not padded.

    lengths (n, 1), a row's tokens; (n, 2) where prompts and responses are padded apart. Of each epoch's permutation the
    rows of up to TOGETHER steps are sorted and shared out, see `_by_length`. Every row still comes once per epoch;
    where epochs meet in a step it takes of both. The same function of the step whoever asks, in whatever order.
    Raises UserError where n is 0.
    """
    n = len(lengths)
    refuse_none(n)

    @lru_cache(maxsize=2)  # steps follow each other
    def part(epoch: int, first: int, stop: int) -> list[list[int]]:
        """The rows of the epoch that the steps from `first` to before `stop` take."""
        bounds = [min(max(step * batch_size - epoch * n, 0), n) for step in range(first, stop + 1)]
        rows = _permutation(n, seed, epoch)[bounds[0] : bounds[-1]].numpy()
        sizes = [end - begin for begin, end in pairwise(bounds)]
        return _by_length(rows, lengths, sizes, generator("lengths", seed, f"{epoch} {first}"))

    def draw(step: int) -> list[int]:
        drawn: list[int] = []
        for epoch in range(step * batch_size // n, ((step + 1) * batch_size - 1) // n + 1):
            begin, end = epoch * n // batch_size, ((epoch + 1) * n - 1) // batch_size + 1  # steps that take rows of it
            first, stop = _part_of(step - begin, end - begin)
            drawn += part(epoch, begin + first, begin + stop)[step - begin - first]
        return drawn

    return draw


def refuse_none(n: int) -> None:
    """Raises UserError where there are no rows."""
    if n < 1:
        raise UserError("data: 0 rows to draw from, wanted at least 1: is the file empty, or every row dropped?")


class Chances(NamedTuple):
    """What rows are drawn by, made once: a step then costs what its own rows cost."""

    rows: Tensor  # (kept,) int64, those of positive weight, in order
    cdf: Tensor  # (kept,) float64, the sums of their weights up to each
    total: Tensor  # () float64, the sum of them all

    @classmethod
    def of(cls, weights: Sequence[float] | Tensor) -> Chances:
        """weights (n,). Raises UserError as `survivors` does."""
        rows, values = survivors(weights), _as_float64(weights)
        return cls(rows, values[rows].cumsum(0), values.clamp(min=0.0).sum())


def priority_rows(chances: Chances, batch_size: int, step: int, seed: int) -> list[int]:
    """`batch_size` rows of step `step`, drawn with replacement, each with probability max(w, 0) / sum of max(w, 0).

    The weights w are usually the advantages. Source: A-LoL's priority sampling.
    """
    shares = torch.rand(batch_size, generator=generator("priority", seed, step), dtype=torch.float64)  # in [0, 1)
    return draw_by_cdf(chances, shares * chances.total)


def priority_by_length(chances: Chances, lengths: np.ndarray, batch_size: int, seed: int) -> Callable[[int], list[int]]:
    """As `priority_rows` of a step, with rows of like length in each share of it, as `epochs_by_length` has them.

    lengths (n, 1 or 2), of all rows. What TOGETHER steps draw is drawn at once, of few rows for fewer steps: a row that
    is drawn twice for them may come twice in one step.
    """
    steps = min(TOGETHER, max(1, len(chances.rows) // (APART * batch_size)))

    @lru_cache(maxsize=2)
    def part(number: int) -> list[list[int]]:
        rows = np.array(priority_rows(chances, steps * batch_size, number, seed))
        return _by_length(rows, lengths, [batch_size] * steps, generator("lengths", seed, number))

    return lambda step: part(step // steps)[step % steps]


def _part_of(step: int, steps: int) -> tuple[int, int]:
    """The steps from and to before which `step` is sorted with, of the `steps` of an epoch: parts of like size."""
    parts = min(steps, max(APART, math.ceil(steps / TOGETHER)))
    part = ((step + 1) * parts - 1) // steps  # the last that begins at or before it
    return part * steps // parts, (part + 1) * steps // parts


def _by_length(rows: np.ndarray, lengths: np.ndarray, sizes: Sequence[int], order: torch.Generator) -> list[list[int]]:
    """`rows` shared out among steps of these sizes: of the shortest quarter each step has rows that follow one another
    in length, which ones is drawn, and so of the other quarters.

    Steps of one length throughout would need still less padding, but their numbers of tokens would differ by far: the
    mean over the tokens of a step would make a token of a short row weigh more than one of a long row.
    """
    rows = rows[np.argsort(lengths[rows, 0], kind="stable")]
    steps: list[list[int]] = [[] for _ in sizes]
    start = 0
    for share in range(SHARES):
        counts = [size * (share + 1) // SHARES - size * share // SHARES for size in sizes]
        alike = rows[start : start + sum(counts)]
        start += sum(counts)
        if lengths.shape[1] > 1:
            alike = _by_both(alike, lengths, len(sizes))
        places = torch.randperm(len(sizes), generator=order).tolist()
        for place, stop in zip(places, accumulate(counts[place] for place in places), strict=True):
            steps[place] += alike[stop - counts[place] : stop].tolist()
    return steps


def _by_both(rows: np.ndarray, lengths: np.ndarray, steps: int) -> np.ndarray:
    """`rows`, sorted by one length, in an order in which neighbours are alike in the other too: to and fro."""
    parts = np.array_split(rows, round(math.sqrt(steps)))
    turned = [np.argsort(lengths[part, 1] * (-1) ** place, kind="stable") for place, part in enumerate(parts)]
    return np.concatenate([part[order] for part, order in zip(parts, turned, strict=True)])


def draw_by_cdf(chances: Chances, u: Sequence[float] | Tensor) -> list[int]:
    """For each u in [0, total) the first surviving row whose cumulative weight exceeds u.

    Only rows of positive weight take part; the sums are float64.
    """
    places = torch.searchsorted(chances.cdf, _as_float64(u), right=True)
    return chances.rows[places.clamp(max=len(chances.rows) - 1)].tolist()  # u may round up to total


def survivors(weights: Sequence[float] | Tensor) -> Tensor:
    """(kept,) int64, the rows of positive weight, in order.

    Raises UserError where there is none, or where a weight is not a finite number.
    """
    values = _as_float64(weights)
    if not values.isfinite().all():
        row = int((~values.isfinite()).nonzero()[0, 0])
        raise UserError(f"sampling weights: row {row} has {float(values[row])}, wanted a finite number: see its reward")
    rows = (values > 0).nonzero().flatten()
    if not len(rows):
        largest = f" (largest {float(values.max()):.4g})" if len(values) else ""
        raise UserError(
            f"sampling weights: none of {len(values)} rows is positive{largest}, wanted at least one: "
            "check that rewards and values are on one scale, or set sampling=all"
        )
    return rows


def step_budget(steps: int, kept_fraction: float) -> int:
    """Steps for the kept share of the rows: steps * kept_fraction, truncated, and at least 1.

    9000 * 0.677 is 6093, also where the product is a hair below it in floating point.
    """
    assert 0 < kept_fraction <= 1, f"kept_fraction is {kept_fraction}"
    return max(1, int(round(steps * kept_fraction, 6)))


@lru_cache(maxsize=2)
def _permutation(n: int, seed: int, epoch: int) -> Tensor:
    """(n,) int64 permutation of one epoch; the last two are cached, as steps follow each other."""
    return torch.randperm(n, generator=generator("epoch", seed, epoch))


def generator(purpose: str, seed: int, index: object) -> torch.Generator:
    """A generator of its own for each purpose, seed and index: neighbouring seeds share no stream."""
    digest = hashlib.sha256(f"{purpose} {seed} {index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _as_float64(values: Sequence[float] | Tensor) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64, device="cpu")
