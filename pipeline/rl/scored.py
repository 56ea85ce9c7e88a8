"""Scored rows for methods that compare responses: every response of the data, with its reward."""

from __future__ import annotations

import logging

from pipeline.data import convert
from pipeline.data.prompts import UniquePrompts, unique_prompts
from pipeline.data.rows import Rows
from pipeline.rl import rows
from pipeline.rl.context import Context, splits

logger = logging.getLogger("tiffin")


def scored_rows(context: Context, sides: bool) -> tuple[Rows, Rows, UniquePrompts]:
    """Rows to learn from and held-out ones, all with a reward, shuffled as set; and all held-out prompts, each once.

    Of pairs both responses are rows. With `sides` a row that holds a pair beside its completion is that completion
    alone, and pairs that nobody scored are labelled by their sides; without, all three are rows. Raises UserError where
    a row has no reward, and nothing gives it one.
    """
    settings = context.settings
    read = splits(context)
    train, held_out = (convert.to_scored(some if sides else convert.parted(some), "both") for some in read)
    prompts = unique_prompts(held_out)
    held_out = held_out[: settings.eval.max_rows]
    if sides and settings.reward is None:
        train, held_out = by_sides(train, held_out)
    train, held_out = rows.with_rewards(context, train, held_out)
    if settings.shuffle_rewards:
        train = rows.with_shuffled_rewards(train, settings.seed)
    return train, held_out, prompts


def by_sides(train: Rows, held_out: Rows) -> tuple[Rows, Rows]:
    """Both with rewards by the sides of pairs, where no row of either has another, which is said."""
    rows_of_both = train + held_out
    sided = convert.with_sides(rows_of_both)
    if sided is rows_of_both:
        return train, held_out
    logger.info("labels: no row has a reward, and all are of pairs: the chosen response is desirable, the other is not")
    return sided[: len(train)], sided[len(train) :]
