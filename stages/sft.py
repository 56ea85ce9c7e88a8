"""Supervised fine-tuning: from rows with completions to runs/<run>/sft/model/."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from pipeline.config.schema import SftStage
from pipeline.data import conversations, convert, dataset, encoding
from pipeline.data.batching import Packing, Windows
from pipeline.data.encoded import Items
from pipeline.data.rows import Rows
from pipeline.launch import run_dir
from pipeline.launch.entry import run
from pipeline.records import Example, Item
from pipeline.rollout.generate import generate
from pipeline.trainer import evaluation, group
from pipeline.trainer.loop import HELD_OUT_LOSS, Evaluation, Trainer, fit
from pipeline.trainer.model import Model, build_policy, encode, masked_packing
from pipeline.trainer.objective import Objective, objective_of
from pipeline.trainer.opening import open_stage
from pipeline.trainer.schedule import epochs_of, steps_for
from stages import inputs

logger = logging.getLogger("tiffin")


def main(settings: SftStage, words: Sequence[str]) -> None:
    ranks = group.start(settings.launch.ddp_timeout)
    directory = run_dir.stage_dir(settings, "sft")
    if not open_stage(ranks, directory, settings, words, inputs.of_sft(settings)):
        return
    _, _, objective = objective_of(settings.algorithm)
    train, held_out, train_on = rows_of(settings)
    masks = settings.masking.rate > 0

    policy = build_policy(
        settings, ranks, settings.model, texts=partial(dataset.texts, train, settings.template), mask=masks
    )
    watched = conversations.watched(held_out, train_on)
    items, tested = encode(policy, directory, train, watched, encoding.completion_rows)
    packing = masked_packing(policy, settings.masking, settings.seed, spans=True) if masks else policy.packing
    if train_on == "all":
        items = in_fewer_rows(items, policy, settings)
    draw = epochs_of(items, packing, settings)
    fit(
        Trainer(
            model=policy,
            settings=settings,
            directory=directory,
            windows=Windows(items, draw, packing, ranks.rank, ranks.world),
            objective=objective,
            max_steps=steps_for(settings, len(items)),
            evaluate=partial(evaluate, settings, policy, WatchedAnswers(objective, tested, held_out, packing)),
            best_metric=HELD_OUT_LOSS,
        )
    )


def rows_of(settings: SftStage) -> tuple[Rows, Rows, str]:
    """The rows to learn from, a row a turn if all are learned; those held out; and which turns are learned."""
    splits = dataset.splits(settings.data, settings.seed, folder=run_dir.cache(settings))
    train, held_out = (convert.to_supervised(rows) for rows in splits)
    train_on = conversations.resolved(settings.train_on, train)
    return conversations.learned(train, train_on), held_out[: settings.eval.max_rows], train_on


def in_fewer_rows(items: Items, policy: Model, settings: SftStage) -> Items:
    """Each conversation in one row where that changes nothing, after a word about it."""
    if settings.masking.rate > 0 or policy.packing.encoder_decoder:
        return items
    joined = encoding.joined(items, f"{run_dir.stage_dir(settings, 'sft')}/train")
    logger.info(f"train: {len(items):,} turns read in {len(joined):,} rows")
    return joined


@dataclass(frozen=True)
class WatchedAnswers:
    """What an evaluation reads: held-out items, the rows whose prompts are answered, and how training reads rows."""

    objective: Objective
    items: Sequence[Item]
    rows: Sequence[Example]
    packing: Packing


def evaluate(settings: SftStage, policy: Model, watched: WatchedAnswers, step: int) -> Evaluation:
    """The loss on held-out rows, whole and, where training masks, masked; and what the model answers now."""
    scalars = evaluation.held_out_loss(policy.engine, watched.objective, watched.items, policy.packing)
    scalars["eval/perplexity"] = math.exp(min(scalars["eval/loss"], 50.0))
    if settings.masking.rate > 0:
        masked = evaluation.held_out_loss(policy.engine, watched.objective, watched.items, watched.packing)
        scalars["eval/masked_loss"] = masked["eval/loss"]
    shown = watched.rows[: settings.eval.num_samples] if settings.eval.generate else []
    answers = generate(policy.engine, policy.encoder, shown, policy.generation, settings.seed) if shown else []
    return Evaluation(scalars, samples=evaluation.sample_rows(answers, None, len(answers)))


if __name__ == "__main__":
    run(main, "sft")
