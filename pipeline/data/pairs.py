"""Rows to compare: two responses to one prompt, or, for scores alone, every annotated response by itself."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.config.sections import DataSettings
from pipeline.data import convert, dataset
from pipeline.data.dataset import Report
from pipeline.errors import UserError
from pipeline.records import Example


def all_pairs(rows: Sequence[Example]) -> bool:
    return all(row.chosen is not None and row.rejected is not None for row in rows)


def paired(rows: Sequence[Example], report: Report = print) -> list[Example]:
    """Preference pairs: the rows' own, else made of the best and the worst scored row of each prompt.

    Raises:
        UserError: there is no pair, or none of two different responses.
    """
    if all_pairs(rows):
        return _different(rows, report)
    pairing = convert.to_pairs(rows)
    if not pairing.examples:
        raise UserError("data: no prompt has two rows of different reward, wanted pairs: give chosen and rejected")
    report(
        f"pairs: {len(pairing.examples) - pairing.pairs_given:,} made of scored rows, {pairing.pairs_given:,} given, "
        f"{pairing.alone:,} rows without a second response, {pairing.tied:,} tied, {pairing.between:,} between"
    )
    return _different(pairing.examples, report)


def _different(pairs: Sequence[Example], report: Report) -> list[Example]:
    """The pairs, after a word about those whose two responses are the same: nothing is learned from them."""
    same = sum(pair.chosen == pair.rejected for pair in pairs)
    if same == len(pairs):
        raise UserError(
            f"{pairs[0].id}: chosen and rejected are the same text in all {same} pairs, wanted two different "
            "responses: were the columns filled from one source?"
        )
    if same:
        report(f"pairs: {same:,} of {len(pairs):,} have the same text as chosen and rejected: they teach nothing")
    return list(pairs)


def annotated(rows: Sequence[Example], data: DataSettings) -> list[Example]:
    """Every response by itself: those of pairs with the reward of their side, the others with their own.

    Raises:
        UserError: a response has none.
    """
    alone = dataset.scored(rows, data.model_copy(update={"responses": "both"}))
    dataset.require(alone, ("reward",), "objective: regression")
    return alone
