"""Which of a task's things belong to which split: told by a hash of their names, the same for every seed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

from pipeline.errors import UserError, did_you_mean


def split_of(name: str, shares: Mapping[str, float]) -> str:
    """The split of what is called `name`; `shares` are those of the splits and sum to 1."""
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
