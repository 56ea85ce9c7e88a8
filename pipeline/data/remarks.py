"""What is odd about rows, though each is sound: said, and nothing changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from pipeline.data.fields import Columns
from pipeline.data.rows import Rows
from pipeline.data.stored import empty_texts

# columns of public data sets that no format reads -> what happens without them
BEARING = {
    "context": "prompts are without it: put it into them",
    "weight": "all rows count alike",
}


def of_rows(split: str, rows: Rows) -> Iterator[str]:
    """Lines about repeated rows, and about texts that stand for an empty cell."""
    reward = rows.column("reward") + 0.0  # -0.0 is 0.0
    reward[np.isnan(reward)] = np.nan  # of one bit pattern
    columns = (rows.column("prompt"), rows.column("answers"), reward.view(np.uint64))
    if repeated := len(rows) - different(columns):
        yield f"{split}: {repeated:,} of {len(rows):,} rows repeat an earlier one"
    counts = rows.column("empty_texts")
    if counts.any():
        first = empty_texts(rows[int(np.flatnonzero(counts)[0])])[0]
        total = int(counts.sum(dtype=np.int64))
        yield f"{split}: {total:,} texts are {first!r} and nothing else: were they empty cells of a table?"


def different(columns: Sequence[np.ndarray]) -> int:
    """How many different rows of whole numbers the columns hold."""
    order = np.lexsort(columns)
    differs = np.zeros(len(order), dtype=bool)
    differs[:1] = True
    for column in columns:
        differs[1:] |= np.diff(column[order]) != 0
    return int(differs.sum())


def of_turns(split: str, rows: Rows) -> Iterator[str]:
    """Lines about weights and rewards that single turns bring: what counts where."""
    chats = rows.column("answered") & rows.column("is_chat")
    if weighted := int((chats & rows.column("weighted")).sum()):
        yield (
            f"{split}: {weighted:,} of {len(rows):,} rows have messages with weights: stage=sft leaves out those of 0, "
            "other stages go by rewards alone"
        )
    rewarded = chats & rows.column("rewarded_turns")
    if count := int(rewarded.sum()):
        unrated = int(np.isnan(rows.column("reward")[rewarded]).sum())
        last = f"; the last answer of {unrated:,} has none and is left out there" if unrated else ""
        yield (
            f"{split}: {count:,} of {len(rows):,} rows have rewards of earlier turns: each such turn is a row "
            f"of its own in stage=rl and score{last}"
        )


def of_splits(train: Rows, validation: Rows) -> Iterator[str]:
    """A line about prompts that are learned and held out."""
    learned, held_out = (np.unique(rows.column("asked")) for rows in (train, validation))
    if both := len(np.intersect1d(learned, held_out, assume_unique=True)):
        yield f"validation: {both:,} of {len(held_out):,} prompts stand in train too: it is not held out of learning"


def of_counts(counts: Mapping[str, int]) -> Iterator[str]:
    """Lines about what `encoded.counts` says of a split and few splits have."""
    if spelled := counts["spelled_special_tokens"]:
        yield (
            f"{spelled:,} of {counts['responses']:,} spell special tokens, which are plain text to the model: "
            "template.special_tokens=token makes them tokens"
        )
    if unfinished := counts["unfinished_responses"]:
        whole = counts["responses"]
        yield f"{unfinished:,} of {whole:,} responses were cut off when they were written: they teach no end"
    if ends := counts["own_ends"]:
        yield f"{ends:,} of {counts['responses']:,} responses spell the token that ends them, which they get but once"


def of_columns(row: Columns, unused: Sequence[str]) -> list[str]:
    """What `row` says of learning that is not read: columns among `unused`."""
    found = [f"{name} ({what})" for name, what in BEARING.items() if name in unused and row.get(name) is not None]
    if row.get("correctness") is not None and "chosen" not in row:
        found.append("correctness (it is read of pairs alone)")
    return found
