"""Learning from groups of scored rows: rows of one prompt together -> reference log-probabilities -> every group once
per epoch."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from pipeline.algorithms.groups import reward_name
from pipeline.data import encoding, sampling
from pipeline.data.batching import Windows
from pipeline.data.encoded import Items
from pipeline.data.prompts import UniquePrompts
from pipeline.data.rows import Rows
from pipeline.errors import UserError
from pipeline.records import Item
from pipeline.rl.context import Context, fresh_responses
from pipeline.rl.offline import WatchedRows, best_metric, check_start, estimated, gained, number_histograms
from pipeline.rl.reference import reference_of, with_ref_logps
from pipeline.rl.scored import scored_rows
from pipeline.trainer import evaluation
from pipeline.trainer.loop import Evaluation, Trainer
from pipeline.trainer.model import Model, build_policy, encode
from pipeline.trainer.schedule import epochs_of, steps_for

logger = logging.getLogger("tiffin")


def trainer(context: Context) -> Trainer:
    """AGRO, REBEL and NCA. train.batch_size counts groups."""
    settings, ranks, size = context.settings, context.ranks, context.algorithm.group_size
    train, tested, prompts = scored_rows(context, sides=False)
    learned_groups, held_out_groups = (
        groups_of(rows, size, settings.seed, what) for rows, what in ((train, "train"), (tested, "validation"))
    )
    policy = build_policy(settings, ranks, context.start)
    parts = encode(policy, context.directory, train, tested, encoding.completion_rows)

    # what the reference says of each row, before the first step changes it; the same file as of other methods
    reference = reference_of(context, policy)
    rows, held_out = (with_ref_logps(reference, part) for part in parts)
    groups, tested_groups = GroupedItems(rows, learned_groups), GroupedItems(held_out, held_out_groups)
    draw = epochs_of(groups, policy.packing, settings)
    watched = WatchedRows(tested_groups, prompts[: settings.eval.max_rows], rows, {})
    return Trainer(
        model=policy,
        settings=settings,
        directory=context.directory,
        windows=Windows(groups, draw, policy.packing, ranks.rank, ranks.world),
        objective=context.objective,
        max_steps=steps_for(settings, len(groups)),
        evaluate=partial(evaluate_groups, context, policy, watched),
        best_metric=best_metric(context, held_out),
        prepare=partial(check_start, context, policy, groups, draw(0)),
    )


@dataclass(frozen=True, eq=False)
class GroupedItems(Sequence[Item]):
    """Groups of rows of one prompt, each an item of its first row's example, made when they are asked for."""

    rows: Items  # one response each, with `reward`
    places: np.ndarray  # (groups, K) which rows

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return GroupedItems(self.rows, self.places[place])
        rows = [self.rows[int(i)] for i in self.places[place]]
        numbers = {reward_name(i): row.numbers["reward"] for i, row in enumerate(rows)}
        logps = tuple(logp for row in rows for logp in row.ref_logp)
        return Item(rows[0].example, tuple(row.rows[0] for row in rows), numbers, logps)


def groups_of(rows: Rows, size: int, seed: int, what: str) -> np.ndarray:
    """(groups, size) places of rows, those of a group of one prompt; one line counts all rows.

    A prompt's rows are cut into groups in an order that the seed decides, the same in every epoch. Where they leave a
    rest, others of the prompt fill the last group up, and come twice; prompts of fewer rows than `size` are left out.
    Raises UserError where all are.
    """
    prompts = UniquePrompts.of(rows, copies=True)
    counts = np.diff(prompts.ends)
    keys = torch.rand(len(rows), generator=sampling.generator("groups", seed, 0), dtype=torch.float64).numpy()
    order = prompts.places[np.lexsort((keys[prompts.places], np.repeat(np.arange(len(counts)), counts)))]
    whole = counts >= size
    if not whole.any():
        most = counts.max()
        cure = f"set algorithm.settings.group_size={most}" if most > 1 else "set algo=alol, which takes rows alone"
        raise UserError(
            f"algorithm.settings.group_size: {size}, but no prompt of {what} has as many scored rows (the most have "
            f"{most}, of {len(counts):,} prompts), wanted some: {cure}"
        )
    kept, begins = counts[whole], prompts.ends[:-1][whole]
    filled = -(-kept // size) * size  # rounded up
    within = np.arange(filled.sum()) - np.repeat(np.cumsum(filled) - filled, filled)
    places = order[np.repeat(begins, filled) + within % np.repeat(kept, filled)].reshape(-1, size)
    rewards = rows.column("reward")[places]
    equal = int((rewards.max(1) == rewards.min(1)).sum())
    left, twice = int(counts[~whole].sum()), int((filled - kept).sum())
    logger.info(
        f"groups of {what}: {len(places):,} of {size} rows each, of {int(whole.sum()):,} prompts; {twice:,} rows come "
        f"twice to fill groups up; {left:,} rows of prompts with fewer than {size} are left out"
        + (f"; {equal:,} groups have equal rewards" if equal else "")
    )
    if equal == len(places):
        logger.warning(
            f"groups of {what}: the rewards of each are equal, so that nothing tells good responses from bad"
        )
    return places


def evaluate_groups(context: Context, policy: Model, watched: WatchedRows, step: int) -> Evaluation:
    """The loss's statistics on held-out groups, what their rows say was gained, and fresh responses, judged."""
    groups: GroupedItems = watched.held_out
    scalars, ratios = evaluation.held_out_ratios(policy.engine, context.objective, groups, policy.packing)
    judged = fresh_responses(context, policy, watched.prompts)
    places, first = np.unique(groups.places, return_index=True)  # each row once
    rows = estimated([groups.rows[int(place)] for place in places], ratios[first])
    scalars |= judged.scalars | gained(rows, step)
    histograms = {**judged.histograms, "ratio/log": rows.log_ratio}
    if step == 0:
        histograms |= number_histograms(watched.learned)
    return Evaluation(scalars, histograms, judged.samples)
