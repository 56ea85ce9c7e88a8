"""Conversations of which every assistant turn is learned, not only the last one.

Each turn becomes a row: what stands before it as prompt, in the very ids that generation reads, and the turn as
completion. Rows are then joined where that changes nothing: where one row's ids, the end of its turn included, begin
the next one's prompt. Chat templates allow it, so that a causal model reads a conversation once; `template.kind=text`,
which has no EOS in the history, does not, nor does a prompt that lost its beginning, nor an encoder-decoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pipeline.errors import UserError
from pipeline.records import Example, Item, Row


def learned(examples: Sequence[Example], which: str) -> list[Example]:
    """The rows to learn from by `train_on`: as they are for last, one for every assistant turn for all.

    Raises UserError where all turns are requested, but no row has an assistant turn before its completion.
    """
    if which == "last":
        return list(examples)
    rows = [row for example in examples for row in turns_of(example)]
    if len(rows) == len(examples):
        raise UserError(
            f"train_on: all, but none of {len(rows)} rows has an assistant turn before its last, wanted conversations: "
            "give `messages` or `history`, or set train_on=last"
        )
    return rows


def turns_of(example: Example) -> list[Example]:
    """A row for each assistant turn of the prompt, its id with "/turn-1" ..., and the example itself, in their order.

    The first message of a prompt is never a completion: nothing stands before it. Nor is a last one of the assistant,
    with which the example's completion goes on.
    """
    if isinstance(example.prompt, str):
        return [example]
    places = [i for i, turn in enumerate(example.prompt[:-1]) if turn.role == "assistant" and i > 0]
    earlier = [
        Example(
            f"{example.id}/turn-{number}",
            example.prompt[:place],
            completion=example.prompt[place].content,
            source=example.source,
        )
        for number, place in enumerate(places, start=1)
    ]
    return [*earlier, example]


def joined(items: Sequence[Item]) -> list[Item]:
    """Neighbours of one row each in one row, where the ids of the first begin the prompt of the second."""
    merged: list[Item] = []
    for item in items:
        row = item.rows[0]
        before = merged[-1].rows[0] if merged else None
        if before is not None and row.prompt_ids[: len(before)] == before.prompt_ids + before.response_ids:
            merged[-1] = replace(item, rows=(_one_row(before, row),))
        else:
            merged.append(item)
    return merged


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
