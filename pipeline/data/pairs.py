"""Rows to compare: two responses to one prompt, or, for scores alone, every annotated response by itself."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import chain

from pipeline.data import convert, dataset, mixing
from pipeline.data.rows import Rows
from pipeline.errors import UserError
from pipeline.records import Example

logger = logging.getLogger("tiffin")


def all_pairs(rows: Sequence[Example]) -> bool:
    return Rows.of(rows).all("is_pair")


def paired(rows: Sequence[Example]) -> Rows:
    """Preference pairs: the rows' own, else made of the best and the worst scored row of each prompt.

    Pairs of two equal texts stay, and are counted: nothing is learned from them. Raises UserError where there is no
    pair, or none of two different responses, or a row lacks a completion or a reward.
    """
    pairs = Rows.of(rows if all_pairs(rows) else of_scored(rows))
    same = int(pairs.column("same_sides").sum())
    if same == len(pairs):
        raise UserError(
            f"{pairs[0].id}: chosen and rejected are the same text in all {same} pairs, wanted two different "
            "responses: were the columns filled from one source?"
        )
    if same:
        logger.info(f"pairs: {same:,} of {len(pairs):,} have the same text as chosen and rejected: they teach nothing")
    margin = pairs.column("margin")
    contradicts = (margin < 0) | (pairs.column("chosen_reward") < pairs.column("rejected_reward"))  # never of NaN
    if turned := int(contradicts.sum()):
        logger.warning(
            f"pairs: {turned:,} of {len(pairs):,} have a lower reward for chosen than for rejected, or a margin below "
            "0: that chosen is better is learned all the same"
        )
    return pairs


def of_scored(rows: Sequence[Example]) -> list[Example]:
    """Of each prompt the row of highest reward is chosen, that of lowest is rejected; one line counts all rows.

    Scored candidates are such rows. Of equal rewards the first row counts. margin = chosen_reward - rejected_reward
    > 0. Source, references, columns and id are the chosen row's; where the two rows came from one pair, its id comes
    back. `rewards` are not kept. Rows that are pairs already, without a completion, come first, unchanged.
    """
    given: list[Example] = []
    groups: dict[object, list[Example]] = {}
    for row in chain.from_iterable(map(convert.each_candidate, rows)):
        if convert.is_pair(row) and row.completion is None:
            given.append(row)
        else:
            groups.setdefault((mixing.copy_number(row), row.prompt), []).append(convert.with_score(row))
    # the largest contrast of each prompt; what lies between would say less, more often
    made, alone, tied, between = [], 0, 0, 0
    for group in groups.values():
        best, worst = max(group, key=lambda row: row.reward), min(group, key=lambda row: row.reward)
        if len(group) == 1:
            alone += 1
        elif best.reward == worst.reward or best.completion == worst.completion:
            tied += len(group)
        else:
            made.append(_pair(best, worst))
            between += len(group) - 2
    if not given and not made:
        raise UserError("data: no prompt has two rows of different reward, wanted pairs: give chosen and rejected")
    logger.info(
        f"pairs: {len(made):,} made of scored rows, {len(given):,} given, "
        f"{alone:,} rows without a second response, {tied:,} tied, {between:,} between"
    )
    return [*given, *made]


def annotated(rows: Sequence[Example]) -> Rows:
    """Every response by itself: those of pairs with the reward of their side, the others with their own.

    Raises UserError where a response has none.
    """
    alone = convert.to_scored(rows, "both")
    dataset.require(alone, ("reward",), "objective: regression")
    return alone


def _pair(best: Example, worst: Example) -> Example:
    return Example(
        _pair_id(best.id, worst.id),
        best.prompt,
        references=best.references,
        chosen=best.completion,
        rejected=worst.completion,
        chosen_reward=best.reward,
        rejected_reward=worst.reward,
        margin=best.reward - worst.reward,
        source=best.source,
        columns=best.columns,
    )


def _pair_id(best: str, worst: str) -> str:
    """The id that both had as a pair; else the better row's."""
    for one, other in ((convert.CHOSEN, convert.REJECTED), (convert.REJECTED, convert.CHOSEN)):
        if best.endswith(one) and worst.endswith(other) and best.removesuffix(one) == worst.removesuffix(other):
            return best.removesuffix(one)
    return best
