"""Rows to compare: two responses to one prompt, or, for scores alone, every annotated response by itself."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np

from pipeline.data import convert, dataset
from pipeline.data.prompts import UniquePrompts
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
    pairs = Rows.of(rows) if all_pairs(rows) else of_scored(rows)
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


def of_scored(rows: Sequence[Example]) -> Rows:
    """Of each prompt the row of highest reward is chosen, that of lowest is rejected; one line counts all rows.

    Scored candidates are such rows. Of equal rewards the first row counts. margin = chosen_reward - rejected_reward
    > 0. Source, references, columns and id are the chosen row's; where the two rows came from one pair, its id comes
    back. `rewards` are not kept. Rows that are pairs already, without a completion, come first, unchanged. Raises
    UserError for a row without a completion or a reward, and where there is no pair.
    """
    rows = Rows.of(rows)
    if rows.any("scored_candidates"):
        rows = rows.made("candidates", lambda some: chain.from_iterable(map(convert.each_candidate, some)))
    return rows.made("pairs", _of_scored)


def _of_scored(rows: Rows) -> Iterator[Example]:
    """The pairs of `of_scored`; of each prompt two rows are read, the others known by their reward."""
    given = rows.column("is_pair") & ~rows.column("answered")
    scored = rows.take(~given)
    for place in np.flatnonzero(~scored.column("answered") | np.isnan(scored.column("reward")))[:1]:
        convert.with_score(scored[int(place)])  # which raises
    yield from rows.take(given)
    # the largest contrast of each prompt; what lies between would say less, more often
    rewards, prompts = scored.column("reward"), UniquePrompts.of(scored, copies=True)
    made, alone, tied, between = 0, 0, 0, 0
    for places in map(prompts.group, range(len(prompts))):
        best, worst = (int(places[found(rewards[places])]) for found in (np.argmax, np.argmin))  # the first of equals
        if len(places) == 1:
            alone += 1
        elif rewards[best] == rewards[worst] or scored[best].completion == scored[worst].completion:
            tied += len(places)
        else:
            made += 1
            between += len(places) - 2
            yield _pair(scored[best], scored[worst])
    if not given.any() and not made:
        raise UserError("data: no prompt has two rows of different reward, wanted pairs: give chosen and rejected")
    logger.info(
        f"pairs: {made:,} made of scored rows, {int(given.sum()):,} given, "
        f"{alone:,} rows without a second response, {tied:,} tied, {between:,} between"
    )


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
        unfinished=tuple(dict.fromkeys((*best.unfinished, *worst.unfinished))),
    )


def _pair_id(best: str, worst: str) -> str:
    """The id that both had as a pair; else the better row's."""
    for one, other in ((convert.CHOSEN, convert.REJECTED), (convert.REJECTED, convert.CHOSEN)):
        if best.endswith(one) and worst.endswith(other) and best.removesuffix(one) == worst.removesuffix(other):
            return best.removesuffix(one)
    return best
