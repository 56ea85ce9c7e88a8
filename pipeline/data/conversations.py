"""Conversations of which every assistant turn is learned, not only the last one, or scored by itself.

Each turn becomes a row: what stands before it as prompt, in the very ids that generation reads, and the turn as
completion. Rows are then joined where that changes nothing: where one row's ids, the end of its turn included, begin
the next one's prompt. Chat templates allow it, so that a causal model reads a conversation once; `template.kind=text`,
which has no EOS in the history, does not, nor does a prompt that lost its beginning, nor an encoder-decoder.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from pipeline.data.messages import answer_of
from pipeline.data.rows import Rows
from pipeline.errors import UserError
from pipeline.records import Example, Row

logger = logging.getLogger("tiffin")


def resolved(which: str, examples: Sequence[Example]) -> str:
    """`train_on`, auto decided: all where messages have weights, as OpenAI's files are read, else last."""
    if which != "auto":
        return which
    weighted = int(Rows.of(examples).column("weighted").sum())
    if weighted:
        logger.info(
            f"train_on: {weighted:,} of {len(examples):,} rows have messages with weights: all turns are learned"
        )
    return "all" if weighted else "last"


def learned(examples: Sequence[Example], which: str) -> Rows:
    """The rows to learn from by `train_on`: as they are for last, one for every assistant turn for all.

    Turns of weight 0 are left out, which is said. Raises UserError where all turns are requested, but no row has an
    assistant turn before its completion or a weight, and where all turns have weight 0.
    """
    rows = _by(examples, which)
    if which == "all" and len(rows) == len(examples) and not rows.any("weighted"):
        raise UserError(
            f"train_on: all, but none of {len(rows)} rows has an assistant turn before its last, wanted conversations: "
            "give `messages` or `history`, or set train_on=last"
        )
    kept = _of_weight(rows)
    if len(rows) and not len(kept):
        raise UserError(
            f"{rows[0].id}: weight 0, as all {len(rows):,} turns have that train_on={which} learns, wanted 1 for some"
        )
    if len(kept) < len(rows):
        logger.info(f"train_on={which}: {len(rows) - len(kept):,} of {len(rows):,} turns have weight 0: not learned")
    return kept


def watched(examples: Sequence[Example], which: str) -> Rows:
    """The rows of which the held-out loss is taken: those that would be learned."""
    return _of_weight(_by(examples, which))


def _of_weight(rows: Rows) -> Rows:
    """The rows but those of turns of weight 0."""
    left_out = rows.column("unlearned")
    return rows.take(~left_out, "of weight") if left_out.any() else rows


def _by(examples: Sequence[Example], which: str) -> Rows:
    rows = Rows.of(examples)
    if which == "last" or not rows.any("is_chat"):
        return rows
    return rows.made("turns", lambda some: (turn for row in some for turn in turns_of(row)))


def turns_of(example: Example) -> list[Example]:
    """A row for each assistant turn of the prompt, its id with "/turn-1" ..., and the example itself, in their order.

    Each has the weight and the reward of its turn. The first message of a prompt is never a completion: nothing stands
    before it. Nor is a last one of the assistant, with which the example's completion goes on.
    """
    if isinstance(example.prompt, str):
        return [example]
    places = [i for i, turn in enumerate(example.prompt[:-1]) if turn.role == "assistant" and i > 0]
    earlier = [
        Example(
            f"{example.id}/turn-{number}",
            example.prompt[:place],
            completion=answer_of(example.prompt[place]),
            source=example.source,
            reward=example.prompt[place].reward,
            turn_weight=example.prompt[place].weight,
        )
        for number, place in enumerate(places, start=1)
    ]
    return [*earlier, example]


def rewarded_turns(example: Example) -> list[Example]:
    """A scored row for each turn of the assistant that has a reward; the example itself where no earlier one has.

    Each keeps the columns. The last answer is not among them where it alone has no reward.
    """
    *earlier, last = turns_of(example)
    scored = [replace(row, columns=example.columns) for row in earlier if row.reward is not None]
    return scored if scored and last.reward is None else [*scored, last]


def joined(rows: Iterable[Row]) -> Iterator[tuple[int, Row]]:
    """Neighbours in one row, where the ids of the first begin the prompt of the second; each with the last's place."""
    before: Row | None = None
    for place, row in enumerate(rows):
        if before is not None and row.prompt_ids[: len(before)] == before.prompt_ids + before.response_ids:
            before = _one_row(before, row)
            continue
        if before is not None:
            yield place - 1, before
        before = row
    if before is not None:
        yield place, before


def _one_row(before: Row, after: Row) -> Row:
    """`after`, whose prompt begins with `before`, as one row of which the responses of both are learned."""
    between = after.prompt_ids[len(before) :]
    return Row(
        before.prompt_ids,
        before.response_ids + between + after.response_ids,
        cut_prompt=before.cut_prompt,
        cut_response=after.cut_response,
        learned=marks(before) + (False,) * len(between) + marks(after),
    )


def marks(row: Row) -> tuple[bool, ...]:
    """For each of `response_ids` whether it is learned."""
    return row.learned or (True,) * len(row.response_ids)
