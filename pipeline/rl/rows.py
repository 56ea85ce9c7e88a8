"""Which scored rows offline RL learns from: their rewards, those that are chosen, and how they are drawn."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import numpy as np
import torch

from pipeline.config.schema import RlOffline, RlStage
from pipeline.config.sections import BestRows
from pipeline.data import convert, encoded, sampling
from pipeline.data.batching import Draw, Packing, lengths
from pipeline.data.prompts import UniquePrompts
from pipeline.data.rows import Rows
from pipeline.data.stored import CHOSEN, REJECTED
from pipeline.errors import UserError
from pipeline.records import Example, Item
from pipeline.rewards import own_rewards, scoring
from pipeline.rewards.rewards import Rewards
from pipeline.rl.context import Context
from pipeline.trainer.schedule import epochs

logger = logging.getLogger("tiffin")

NOTHING_POSITIVE = {  # the cure, by what weighs a row
    "reward": "raise the rewards above 0, or set algo=alol, which subtracts what was to be expected",
    "advantage": "no response did better than expected of its prompt: are all rewards alike, or on another scale than "
    "those that values were learned from?",
    "standard_advantage": "are all rewards numbers?",
}


def with_rewards(
    context: Context, train: Sequence[Example], held_out: Sequence[Example]
) -> tuple[Sequence[Example], Sequence[Example]]:
    """Both with their rewards: what `reward` names, or judges where they bring none; else their own `reward`.

    Raises UserError where there is neither, or rows lack a reward of their own that is named.
    """
    rows, rewards, settings = Rows.of(train) + Rows.of(held_out), context.rewards, context.settings
    if settings.reward is None and (rewards is None or not np.isnan(rows.column("reward")).any()):
        convert.judged(rows, settings.run)
        if settings.rewards.normalise not in ("auto", "none"):
            logger.info("rewards.normalise: the rows' own `reward` stays as it is (reward=reward would change it too)")
        if rewards is not None and rewards.unsettled:  # of new responses
            raw = scoring.raw_scores(context.ranks, rewards, train)
            scoring.settle(context.ranks, rewards, raw, context.directory)
        return train, held_out
    say_what_is_left(rewards, rows)
    scoring.warn_of_equals(rewards, rows)
    scoring.tell_of_calls(row.completion for row in rows)
    scores = scoring.score_logged(context.ranks, rewards, rows, None, len(train), context.directory)
    scored = rows.with_rewards(scores.total)
    return scored[: len(train)], scored[len(train) :]


def say_what_is_left(rewards: Rewards, rows: Sequence[Example]) -> None:
    """One line where rows bring rewards that nothing reads."""
    used = {one.own for one in rewards.own}
    if left := [name for name in own_rewards.names(rows) if name not in used]:
        anew = "" if used else ": reward= scores them anew"
        logger.info(f"rewards: those that the rows bring are not used ({', '.join(left)}){anew}")


def learned_rows(rows: Sequence[Example], settings: RlOffline) -> Rows:
    """The rows that are chosen, with one another's rewards where these are shuffled.

    The best rows are chosen by the shuffled rewards: of a method that learns from these and reads rewards no further,
    nothing else would make a control. Halves are chosen before, so that what is known of them stays true.
    """
    if settings.shuffle_rewards and settings.rows == "best":
        return chosen_rows(with_shuffled_rewards(rows, settings.seed), settings.rows, settings.best)
    chosen = chosen_rows(rows, settings.rows, settings.best)
    return with_shuffled_rewards(chosen, settings.seed) if settings.shuffle_rewards else chosen


def chosen_rows(rows: Sequence[Example], which: str, best: BestRows | None = None) -> Rows:
    """The rows to learn from, in their order, by `rows=` of the settings.

    all; chosen, all but the rejected side of pairs; best_half and worst_half of n rows, n / 2 of them rounded up, by
    reward; best, as `best` says, see `best_rows`. Of equal rewards the first row counts as better. Raises UserError for
    `chosen` where no row is of a pair, and for `best` where none is good enough.
    """
    rows = Rows.of(rows)
    if which == "all":
        return rows
    if which == "chosen":
        if not any(row.id.endswith((CHOSEN, REJECTED)) for row in rows):
            raise UserError(
                f"rows=chosen: none of {len(rows)} rows is a side of a pair, wanted ids that end with {CHOSEN} and "
                f"{REJECTED}: score pairs with data.responses=both, or set rows=best_half"
            )
        return rows.take(np.array([not row.id.endswith(REJECTED) for row in rows]), which)
    if which == "best":
        assert best is not None
        return best_rows(rows, best)
    ranked = np.argsort(-rows.column("reward"), kind="stable")
    half = math.ceil(len(rows) / 2)
    return rows.take(np.sort(ranked[:half] if which == "best_half" else ranked[-half:]), which)


def best_rows(rows: Rows, best: BestRows) -> Rows:
    """The `of_prompt` best rows of each prompt, of those whose reward is at least `at_least`; null: no such limit.

    How many these are is said. Raises UserError where none is good enough.
    """
    rewards = rows.column("reward")
    kept = np.ones(len(rows), bool) if best.at_least is None else rewards >= best.at_least
    if not kept.any():
        problem = f"none of {len(rows):,} rows has a reward of {best.at_least:.4g} (the highest: {rewards.max():.4g})"
        raise UserError(f"best.at_least: {problem}, wanted a limit that some reach")
    prompts = UniquePrompts.of(rows, copies=True)
    counts = np.diff(prompts.ends)
    if best.of_prompt is not None:
        order = np.lexsort((-rewards, prompts.of_rows))  # prompt by prompt, the best first
        places = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        kept[order[places >= best.of_prompt]] = False
    logger.info(f"rows=best: {int(kept.sum()):,} of {len(rows):,} rows, of {len(counts):,} prompts ({best.spoken()})")
    if kept.all():
        logger.warning("rows=best leaves no row out: it is rows=all (best.at_least=R sets a limit to the reward)")
    return rows.take(kept, f"best {best.of_prompt} {best.at_least}")


def with_shuffled_rewards(rows: Sequence[Example], seed: int) -> Rows:
    """The rows with one another's rewards: the same numbers, which say nothing of the responses any more."""
    order = torch.randperm(len(rows), generator=sampling.generator("shuffle", seed, 0)).numpy()  # of no epoch
    rows = Rows.of(rows)
    return rows.with_rewards(rows.column("reward")[order])


def population(
    items: Sequence[Item], packing: Packing, weight: str, settings: RlStage, weights: torch.Tensor | None = None
) -> tuple[Draw, float]:
    """The draw that `sampling` asks for, by the row weight of the algorithm; and the share of rows that can be drawn.

    `weight` is the number that weighs a row: reward, advantage or standard_advantage; "one" weighs all alike. `weights`
    (n,) are what the algorithm makes of it; None: the number itself. Where the algorithm's weight is `signed`, rows of
    negative weight are learned from too, and only those of weight 0 teach nothing and are left out, which is said.
    Raises UserError where no row has a positive weight; of signed ones, where all are 0.
    """
    size, seed, n = settings.train.batch_size, settings.seed, len(items)
    if weights is None:
        weights = torch.ones(n) if weight == "one" else torch.from_numpy(encoded.column(items, weight))
    signed = settings.algorithm.settings.get("weight") == "signed"
    if signed and settings.sampling == "all":
        kept = teaching(weights, settings.algorithm.settings["baseline"])
    else:
        kept = (weights > 0).nonzero().flatten() if settings.sampling == "all" else sampling.survivors(weights)
    if not len(kept):
        found = f"none of {n} rows has a positive {weight} (largest {float(weights.max()):.4g})"
        cure = NOTHING_POSITIVE[weight]
        raise UserError(f"sampling: {settings.sampling}, but {found}, wanted one to learn from: {cure}")
    if settings.sampling == "all" and weight == "reward" and (below := int((weights < 0).sum())):
        logger.warning(
            f"sampling: all, and {below:,} of {n:,} rows have a reward below 0: they are made less likely, the "
            "lower the more (sampling=positive leaves them out; an algorithm with weight: advantage compares instead)"
        )
    # in proportion to the weight; otherwise every row that is kept once per epoch
    known = lengths(items, packing) if settings.train.group_by_length else None
    if settings.sampling == "priority":
        chances = sampling.Chances.of(weights)
        if known is None:
            return lambda step: sampling.priority_rows(chances, size, step, seed), len(kept) / n
        return sampling.priority_by_length(chances, known, size, seed), len(kept) / n
    pool = torch.arange(n) if settings.sampling == "all" and not signed else kept
    if known is None:
        draw = epochs(len(pool), size, seed)
    else:
        draw = sampling.epochs_by_length(known[pool.numpy()], size, seed)
    return lambda step: pool[draw(step)].tolist(), len(kept) / n


def teaching(weights: torch.Tensor, baseline: str) -> torch.Tensor:
    """(kept,) the rows whose weight is not 0; how many others there are is said. Raises UserError where all are 0."""
    kept = weights.nonzero().flatten()
    grouped = baseline in ("prompt", "group")
    why = "the only row of its prompt, or of one whose rewards are all alike" if grouped else "what was expected"
    if not len(kept):
        cure = (
            "give several responses to each prompt, or set algorithm.settings.baseline=value"
            if grouped
            else ("are all rewards alike?")
        )
        raise UserError(f"sampling: none of {len(weights):,} rows has a weight: each is {why}: {cure}")
    if left := len(weights) - len(kept):
        logger.info(f"sampling: {left:,} of {len(weights):,} rows teach nothing and are left out: each is {why}")
    return kept
