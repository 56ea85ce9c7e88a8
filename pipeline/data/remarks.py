"""What is odd about rows, though each is sound: said, and nothing changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from pipeline.data import mixing
from pipeline.data.fields import Columns
from pipeline.records import Example

EMPTY = {"nan", "none", "null", "<na>", "#n/a"}  # what programs write into the cells of texts that are not there
# columns of public data sets that no format reads -> what happens without them
BEARING = {
    "context": "prompts are without it: put it into them",
    "weight": "all rows count alike",
}


def of_rows(split: str, rows: Sequence[Example]) -> Iterator[str]:
    """Lines about repeated rows, and about texts that stand for an empty cell."""
    contents = {(r.prompt, r.completion, r.chosen, r.rejected, r.candidates, r.reward) for r in rows}
    if repeated := len(rows) - len(contents):
        yield f"{split}: {repeated:,} of {len(rows):,} rows repeat an earlier one"
    empty = [text for row in rows for text in _texts(row) if text.strip().lower() in EMPTY]
    if empty:
        yield f"{split}: {len(empty):,} texts are {empty[0]!r} and nothing else: were they empty cells of a table?"


def of_turns(split: str, rows: Sequence[Example]) -> Iterator[str]:
    """Lines about weights and rewards that single turns bring: what counts where."""
    chats = [row for row in rows if row.completion is not None and not isinstance(row.prompt, str)]
    if weighted := sum(
        any(turn.weight is not None for turn in row.prompt) or row.turn_weight is not None for row in chats
    ):
        yield (
            f"{split}: {weighted:,} of {len(rows):,} rows have messages with weights: stage=sft leaves out those of 0, "
            "other stages go by rewards alone"
        )
    rewarded = [row for row in chats if any(turn.reward is not None for turn in row.prompt)]
    if rewarded:
        unrated = sum(row.reward is None for row in rewarded)
        last = f"; the last answer of {unrated:,} has none and is left out there" if unrated else ""
        yield (
            f"{split}: {len(rewarded):,} of {len(rows):,} rows have rewards of earlier turns: each such turn is a row "
            f"of its own in stage=rl and score{last}"
        )


def of_splits(train: Sequence[Example], validation: Sequence[Example]) -> Iterator[str]:
    """A line about prompts that are learned and held out."""
    learned, held_out = ({*map(mixing.asked, rows)} for rows in (train, validation))
    if both := len(learned & held_out):
        yield f"validation: {both:,} of {len(held_out):,} prompts stand in train too: it is not held out of learning"


def of_counts(counts: Mapping[str, int]) -> Iterator[str]:
    """Lines about what `dataset.counts` says of a split and few splits have."""
    if spelled := counts["spelled_special_tokens"]:
        yield (
            f"{spelled:,} of {counts['responses']:,} spell special tokens, which are plain text to the model: "
            "template.special_tokens=token makes them tokens"
        )
    if ends := counts["own_ends"]:
        yield f"{ends:,} of {counts['responses']:,} responses spell the token that ends them, which they get but once"


def of_columns(row: Columns, unused: Sequence[str]) -> list[str]:
    """What `row` says of learning that is not read: columns among `unused`."""
    found = [f"{name} ({what})" for name, what in BEARING.items() if name in unused and row.get(name) is not None]
    if row.get("correctness") is not None and "chosen" not in row:
        found.append("correctness (it is read of pairs alone)")
    return found


def _texts(row: Example) -> list[str]:
    texts = (row.prompt, row.completion, row.chosen, row.rejected, *row.references, *row.candidates)
    return [text for text in texts if isinstance(text, str)]
