"""Which rows a step trains on: pure functions of (seed, step), so that a resumed run needs no sampler state.

The rows drawn are global, for all ranks together; each rank takes its slice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from pipeline.errors import UserError


def epoch_rows(n: int, batch_size: int, step: int, seed: int) -> list[int]:
    """The `batch_size` rows of step `step` (from 0) in an endless chain of seeded permutations of range(n).

    Every row comes once per epoch. A batch may span the end of an epoch, and several epochs where it is larger than n.
    Raises UserError where n is 0.
    """
    if n < 1:
        raise UserError("data: 0 rows to draw from, wanted at least 1: is the file empty, or every row dropped?")
    positions = range(step * batch_size, (step + 1) * batch_size)
    return [int(_permutation(n, seed, position // n)[position % n]) for position in positions]


def priority_rows(weights: Sequence[float] | Tensor, batch_size: int, step: int, seed: int) -> list[int]:
    """`batch_size` rows of step `step`, drawn with replacement, each with probability max(w, 0) / sum of max(w, 0).

    weights (n,), usually the advantages. Source: A-LoL's priority sampling. Raises UserError as `survivors` does.
    """
    shares = torch.rand(batch_size, generator=generator("priority", seed, step), dtype=torch.float64)  # in [0, 1)
    total = _as_float64(weights).clamp(min=0.0).sum()
    return draw_by_cdf(weights, shares * total)


def draw_by_cdf(weights: Sequence[float] | Tensor, u: Sequence[float] | Tensor) -> list[int]:
    """For each u in [0, total) the first surviving row whose cumulative weight exceeds u.

    Only rows of positive weight take part; the sums are float64.
    """
    rows = survivors(weights)
    cdf = _as_float64(weights)[rows].cumsum(0)
    places = torch.searchsorted(cdf, _as_float64(u), right=True).clamp(max=len(rows) - 1)  # u may round up to total
    return rows[places].tolist()


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
