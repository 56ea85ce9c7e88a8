"""Training rows of several files, each file with a weight: how often its rows count. Weights change no other split.

A weight of 2.3 is two copies of each row, and a third of those whose prompt's hash is below 0.3: the rows of one prompt
stay together.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from pipeline.data.places import LISTED
from pipeline.data.rows import Rows
from pipeline.data.stored import COPY, hash_of
from pipeline.errors import UserError
from pipeline.records import Example

NUMBER = re.compile(f"{COPY}([0-9]+)")


def place_of(key: object) -> float:
    """Where in [0, 1) a key lies, by its hash."""
    return hash_of(key) / 2**64


def times(weight: float, prompt: object, seed: int) -> int:
    """How often a row of this prompt counts in a file of this weight."""
    part = weight % 1
    return int(weight) + (part > 0 and place_of((seed, prompt)) < part)


def weighed(rows: Rows, weights: Sequence[float], seed: int) -> np.ndarray:
    """(n,) how often each row counts, by the weight of its store."""
    numbers = rows.store_numbers
    counts = np.array([int(weight) for weight in weights])[numbers]
    for number, weight in enumerate(weights):
        if weight % 1:
            mine = np.flatnonzero(numbers == number)
            _, firsts, groups = np.unique(rows.column("prompt")[mine], return_index=True, return_inverse=True)
            known = [times(weight, rows[int(mine[first])].prompt, seed) for first in firsts]
            counts[mine] = np.array(known, dtype=counts.dtype)[groups]
    return counts


def repeated(rows: Rows, counts: np.ndarray) -> Rows:
    """Each row as often as it counts, copies behind it with ids of their own. Raises UserError for none at all."""
    if not counts.any():
        raise UserError(f"data.train: its weights leave none of {len(rows):,} rows, wanted at least one: raise them")
    return rows.repeated(counts)


def copy_number(row: Example) -> int:
    """Which copy of a row this is, from 1."""
    found = NUMBER.search(row.id) if COPY in row.id else None
    return int(found[1]) if found else 1


def summed_up(
    split: str, rows: Rows, files: Sequence[str], weights: Mapping[str, float], counts: np.ndarray
) -> Iterator[str]:
    """A line that counts the rows of each of several files, each as often as `counts` says; and one about ids they
    share. `files` are those of the stores."""
    numbers, there, counted = rows.store_numbers, Counter[str](), Counter[str]()
    for number, file in enumerate(files):
        there[file] += int((numbers == number).sum())
        counted[file] += int(counts[numbers == number].sum())
    parts = [
        f"{file} {counted[file]:,}" + (f" (weight {weight:g} of {there[file]:,})" if weight != 1 else "")
        for file, weight in weights.items()
    ]
    more = f" and {len(parts) - LISTED:,} more files" if len(parts) > LISTED else ""
    yield f"{split}: {int(counts.sum()):,} rows of {len(weights):,} files: {', '.join(parts[:LISTED])}{more}"
    if shared := len(rows) - len(np.unique(rows.column("id"))):
        yield f"{split}: {shared:,} of {len(rows):,} rows have an id that an earlier row has, too"
