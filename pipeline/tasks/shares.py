"""The splits of the built-in tasks: each thing belongs to one by a hash of its name, whatever the seed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

from pipeline.errors import UserError, did_you_mean


def split_of(name: str, shares: Mapping[str, float]) -> str:
    """The split that `name` belongs to; `shares` of the splits sum to 1."""
    place = int(hashlib.sha1(name.encode()).hexdigest()[:8], 16) / 16**8  # uniform in [0, 1)
    for split, share in shares.items():
        if place < share:
            return split
        place -= share
    raise AssertionError(f"the shares sum to {sum(shares.values())}, not to 1")


def check_split(task: str, split: str, known: Iterable[str]) -> None:
    """Raises UserError for a split that the task does not have."""
    if split not in known:
        hint = did_you_mean(split, known)
        raise UserError(f"data.task: {task}: found split {split!r}, wanted one of {', '.join(known)}{hint}")
