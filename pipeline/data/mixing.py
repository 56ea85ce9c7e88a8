"""Training rows of several files, each file with a weight: how often its rows count. Weights change no other split.

A weight of 2.3 is two copies of each row, and a third of those whose prompt's hash is below 0.3: the rows of one prompt
stay together.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from pipeline.data.convert import CHOSEN, REJECTED
from pipeline.data.places import LISTED
from pipeline.errors import UserError
from pipeline.records import Example

COPY = "/copy-"
NUMBER = re.compile(f"{COPY}([0-9]+)")
SIDE = re.compile(f"({CHOSEN}|{REJECTED})?$")  # ids of the sides of pairs still end with the side


def place_of(key: object) -> float:
    """Where in [0, 1) a key lies, by its hash."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") / 2**64


def asked(row: Example) -> object:
    """The prompt, the same for a text and for a user's message of that text alone: files may have either."""
    alone = not isinstance(row.prompt, str) and len(row.prompt) == 1 and type(row.prompt) is tuple
    return row.prompt[0].content if alone and row.prompt[0].role == "user" and not row.prompt[0].more else row.prompt


def times(weight: float, prompt: object, seed: int) -> int:
    """How often a row of this prompt counts in a file of this weight."""
    part = weight % 1
    return int(weight) + (part > 0 and place_of((seed, prompt)) < part)


def weighed(rows: Sequence[Example], files: Sequence[str], weights: Mapping[str, float], seed: int) -> list[list[int]]:
    """Of each row, which lies in the file of `files` at its place, the numbers of its copies: [], [1], [1, 2] ..."""
    known: dict[tuple[str, object], list[int]] = {}
    for row, file in zip(rows, files, strict=True):
        if (key := (file, row.prompt)) not in known:
            known[key] = [*range(1, times(weights[file], row.prompt, seed) + 1)]
    return [known[file, row.prompt] for row, file in zip(rows, files, strict=True)]


def repeated(rows: Sequence[Example], numbers: Sequence[Sequence[int]]) -> list[Example]:
    """Each row as often as it has numbers, copies behind it with ids of their own. Raises UserError for none at all."""
    made = [copy_of(row, number) for row, some in zip(rows, numbers, strict=True) for number in some]
    if not made:
        raise UserError(f"data.train: its weights leave none of {len(rows):,} rows, wanted at least one: raise them")
    return made


def copy_of(row: Example, number: int) -> Example:
    """The row itself as the first, else one with the id ID/copy-NUMBER."""
    return row if number == 1 else replace(row, id=SIDE.sub(lambda side: f"{COPY}{number}{side[0]}", row.id, count=1))


def copy_number(row: Example) -> int:
    """Which copy of a row this is, from 1."""
    found = NUMBER.search(row.id) if COPY in row.id else None
    return int(found[1]) if found else 1


def summed_up(
    split: str, rows: Sequence[Example], files: Sequence[str], weights: Mapping[str, float], learned: Sequence[int]
) -> Iterator[str]:
    """A line that counts the rows of each of several files, `learned` times each; and one about ids they share."""
    there, counted = Counter(files), Counter[str]()
    for file, count in zip(files, learned, strict=True):
        counted[file] += count
    parts = [
        f"{file} {counted[file]:,}" + (f" (weight {weight:g} of {there[file]:,})" if weight != 1 else "")
        for file, weight in weights.items()
    ]
    more = f" and {len(parts) - LISTED:,} more files" if len(parts) > LISTED else ""
    yield f"{split}: {sum(learned):,} rows of {len(weights):,} files: {', '.join(parts[:LISTED])}{more}"
    if shared := len(rows) - len({row.id for row in rows}):
        yield f"{split}: {shared:,} of {len(rows):,} rows have an id that an earlier row has, too"
