"""Learning from labels: scored rows -> which are desirable -> log-probabilities of the reference -> each row once per
epoch."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial

import numpy as np

from pipeline.algorithms.labels import Settings
from pipeline.data import encoded, encoding
from pipeline.data.batching import Windows
from pipeline.data.encoded import Items
from pipeline.errors import UserError
from pipeline.rl.context import Context
from pipeline.rl.offline import WatchedRows, best_metric, check_start, evaluate
from pipeline.rl.reference import reference_of, with_ref_logps
from pipeline.rl.reference_points import (
    POINT,
    LabelledWindows,
    Midpoint,
    Mismatched,
    ReferencePoint,
    mismatched_items,
    noted,
)
from pipeline.rl.scored import scored_rows
from pipeline.trainer.loop import Evaluation, Trainer
from pipeline.trainer.model import Model, build_policy, encode
from pipeline.trainer.schedule import epochs_of, steps_for

logger = logging.getLogger("tiffin")


def trainer(context: Context) -> Trainer:
    """KTO and BCO. train.batch_size counts rows."""
    settings, ranks, algorithm = context.settings, context.ranks, context.algorithm
    train, tested, prompts = scored_rows(context, sides=True)
    policy = build_policy(settings, ranks, context.start)
    items, held_out = encode(policy, context.directory, train, tested, encoding.completion_rows)
    items, held_out, facts = with_labels(items, held_out, algorithm)

    # what the reference says, before the first step changes it
    reference = reference_of(context, policy)
    items, held_out = (with_ref_logps(reference, part) for part in (items, held_out))
    if algorithm.objective == "kto":
        others = mismatched_items(context, policy, train, tested)
        point: ReferencePoint = Mismatched(
            policy.engine, policy.packing, algorithm.beta, *(with_ref_logps(reference, part) for part in others)
        )
    else:
        point = Midpoint(ranks)
    draw = epochs_of(items, policy.packing, settings)
    windows = LabelledWindows(Windows(items, draw, policy.packing, ranks.rank, ranks.world), point, ranks)
    watched = WatchedRows(held_out, prompts[: settings.eval.max_rows], items, facts)
    return Trainer(
        model=policy,
        settings=settings,
        directory=context.directory,
        windows=windows,
        objective=noted(context.objective, point),
        max_steps=steps_for(settings, len(items)),
        evaluate=partial(evaluate_labels, context, policy, watched, point),
        best_metric=best_metric(context, held_out),
        prepare=partial(check_start, context, policy, items, draw(0)),
    )


def with_labels(items: Items, held_out: Items, settings: Settings) -> tuple[Items, Items, dict[str, float]]:
    """Both with `desirable` and the `weight` of their class, and what is to be logged once; one line says it all.

    Without a threshold it is the mean over the training rows, which lies between the two values where there are only
    two. Raises UserError where all rewards are one, and no threshold says which that is.
    """
    rewards = items.numbers["reward"]
    threshold = settings.threshold
    if threshold is None:
        if rewards.min() == rewards.max():
            raise UserError(
                f"algorithm.settings.threshold: null, but all {len(rewards):,} rows have the reward {rewards[0]:g}, "
                "wanted different ones, or algorithm.settings.threshold=0.5 to say from which on a row is desirable"
            )
        threshold = float(rewards.mean())
    good = int((rewards >= threshold).sum())
    weights = class_weights(good, len(rewards) - good, settings)
    found = f"{good:,} rows are desirable (reward >= {threshold:.4g}), {len(rewards) - good:,} are not"
    logger.info(f"labels: {found}; a row of these counts {weights[0]:.3g}, of those {weights[1]:.3g}")
    if good in (0, len(rewards)):
        logger.warning("labels: all rows have one label, so that nothing tells good responses from bad ones")
    parts = []
    for part in (items, held_out):
        desirable = part.numbers["reward"] >= threshold
        parts.append(part.with_numbers(desirable=desirable, weight=np.where(desirable, *weights)))
    return parts[0], parts[1], {"labels/desirable": good / len(rewards), "labels/threshold": threshold}


def class_weights(desirable: int, undesirable: int, settings: Settings) -> tuple[float, float]:
    """What a desirable row and an undesirable one counts; see `Settings.desirable_weight`.

    Both classes then weigh the same in all, the lower end of what the paper advises (up to 4/3 in favour of desirable
    rows). Without a row in one of the classes there is nothing to weigh against.
    """
    other = settings.undesirable_weight
    if settings.desirable_weight is not None:
        return settings.desirable_weight, other
    return (other * undesirable / desirable if desirable and undesirable else 1.0), other


def evaluate_labels(
    context: Context, policy: Model, watched: WatchedRows, point: ReferencePoint, step: int
) -> Evaluation:
    """As `offline.evaluate`, against the reference point of now."""
    found = point.of_held_out()
    held_out = encoded.with_numbers(watched.held_out, **{POINT: np.full(len(watched.held_out), found)})
    evaluation = evaluate(context, policy, replace(watched, held_out=held_out), step)
    return replace(evaluation, scalars={**evaluation.scalars, f"eval/rewards/{POINT}": found})
