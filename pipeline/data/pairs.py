"""Rows to compare: two responses to one prompt, or, for scores alone, every annotated response by itself."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from pipeline.data import convert, dataset
from pipeline.errors import UserError
from pipeline.records import Example

logger = logging.getLogger("tiffin")


def all_pairs(rows: Sequence[Example]) -> bool:
    return all(row.chosen is not None and row.rejected is not None for row in rows)


def paired(rows: Sequence[Example]) -> list[Example]:
    """Preference pairs: the rows' own, else made of the best and the worst scored row of each prompt.

    Raises:
        UserError: there is no pair, or none of two different responses.
    """
    if all_pairs(rows):
        return _different(rows)
    pairing = convert.to_pairs(rows)
    if not pairing.examples:
        raise UserError("data: no prompt has two rows of different reward, wanted pairs: give chosen and rejected")
    logger.info(
        f"pairs: {len(pairing.examples) - pairing.pairs_given:,} made of scored rows, {pairing.pairs_given:,} given, "
        f"{pairing.alone:,} rows without a second response, {pairing.tied:,} tied, {pairing.between:,} between"
    )
    return _different(pairing.examples)


def _different(pairs: Sequence[Example]) -> list[Example]:
    """The pairs, after a line about those whose two responses are the same: nothing is learned from them."""
    same = sum(pair.chosen == pair.rejected for pair in pairs)
    if same == len(pairs):
        raise UserError(
            f"{pairs[0].id}: chosen and rejected are the same text in all {same} pairs, wanted two different "
            "responses: were the columns filled from one source?"
        )
    if same:
        logger.info(f"pairs: {same:,} of {len(pairs):,} have the same text as chosen and rejected: they teach nothing")
    return list(pairs)


def annotated(rows: Sequence[Example]) -> list[Example]:
    """Every response by itself: those of pairs with the reward of their side, the others with their own.

    Raises:
        UserError: a response has none.
    """
    alone = convert.to_scored(rows, "both")
    dataset.require(alone, ("reward",), "objective: regression")
    return alone
