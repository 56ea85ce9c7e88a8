"""A reward model: from preference pairs or scored responses to runs/<run>/reward/<name>/model/."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from pipeline.config.schema import RewardStage
from pipeline.data import dataset, pairs
from pipeline.data.batching import Windows, once
from pipeline.data.rows import Rows
from pipeline.data.tokenization import Encoder
from pipeline.launch import run_dir
from pipeline.launch.entry import run
from pipeline.records import Example, Item, Row
from pipeline.trainer import evaluation, group
from pipeline.trainer.loop import HELD_OUT_LOSS, Evaluation, Trainer, fit
from pipeline.trainer.model import Model, build_reward_model, encode
from pipeline.trainer.objective import Objective, RewardModule, objective_of
from pipeline.trainer.opening import open_stage
from pipeline.trainer.schedule import epochs_of, steps_for
from stages import inputs


def main(settings: RewardStage, words: Sequence[str]) -> None:
    ranks = group.start(settings.launch.ddp_timeout)
    directory = run_dir.stage_dir(settings, "reward")
    start = run_dir.start_model(settings)
    if not open_stage(ranks, directory, settings, words, inputs.of_reward(settings)):
        return
    module, algorithm, objective = objective_of(settings.algorithm)
    train, held_out = rows_of(settings, module, algorithm)
    made = judged_pairs if pairs.all_pairs(train) else judged_rows  # else responses with a score each

    scorer = build_reward_model(settings, ranks, start, partial(dataset.texts, train, settings.template))
    items, tested = encode(scorer, directory, train, held_out, made)
    draw = epochs_of(items, scorer.packing, settings)
    fit(
        Trainer(
            model=scorer,
            settings=settings,
            directory=directory,
            windows=Windows(items, draw, scorer.packing, ranks.rank, ranks.world),
            objective=objective,
            max_steps=steps_for(settings, len(items)),
            evaluate=partial(evaluate, scorer, objective, tested),
            best_metric=HELD_OUT_LOSS,
        )
    )


def judged_pairs(example: Example, encoder: Encoder) -> tuple[Row, ...]:
    """Both responses as texts are judged: with an end, also where one was cut off when it was written."""
    return tuple(encoder.encode(example.prompt, answer) for answer in (example.chosen, example.rejected))


def judged_rows(example: Example, encoder: Encoder) -> tuple[Row, ...]:
    """The same of a single response."""
    return (encoder.encode(example.prompt, example.completion),)


def rows_of(settings: RewardStage, module: RewardModule, algorithm: Any) -> tuple[Rows, Rows]:
    """What to learn from and what is held out: pairs, or every response by itself where its score will do.

    Raises UserError where a row lacks what the objective learns from.
    """
    train, held_out = dataset.splits(settings.data, settings.seed, folder=run_dir.cache(settings))
    if module.pairs_only(algorithm) or (pairs.all_pairs(train) and pairs.all_pairs(held_out)):
        train, held_out = pairs.paired(train), pairs.paired(held_out)[: settings.eval.max_rows]
        dataset.require(train + held_out, module.columns(algorithm), f"objective: {algorithm.objective}")
        return train, held_out
    train, held_out = (pairs.annotated(rows) for rows in (train, held_out))
    return train, held_out[: settings.eval.max_rows]


def evaluate(scorer: Model, objective: Objective, items: Sequence[Item], step: int) -> Evaluation:
    """The loss on held-out rows, and how the scores agree with what people, or the annotated rewards, said."""
    scalars = evaluation.held_out_loss(scorer.engine, objective, items, scorer.packing)
    scores = scores_of(scorer, items)
    every = [score for place in scores for score in place]
    scalars |= {"eval/scores/mean": statistics.fmean(every), "eval/scores/std": statistics.pstdev(every)}
    examples = [item.example for item in items]
    if len(scores) == 1:
        rewards = torch.tensor([example.reward for example in examples])
        scalars |= evaluation.agreement(examples, scores[0])
        return Evaluation(scalars, {"scores/error": torch.tensor(scores[0]) - rewards})
    scalars |= evaluation.accuracy_by_source(examples, *scores)
    return Evaluation(scalars, {"scores/margin": torch.tensor(scores[0]) - torch.tensor(scores[1])})


@torch.no_grad()
def scores_of(scorer: Model, items: Sequence[Item]) -> list[list[float]]:
    """For each place in an item (chosen and rejected, or one) the scores in the items' order, on every rank."""
    scorer.engine.train(False)
    ranks, places, mine = scorer.ranks, len(items[0].rows), {}
    for batch in once(items, scorer.packing, ranks.rank, ranks.world):
        table = scorer.engine(batch).cpu().reshape(places, -1).T.tolist()  # one row per item
        mine |= dict(zip(batch.items, table, strict=False))  # a filler has scores, and is no item
    merged = {i: row for part in ranks.gather(mine) for i, row in part.items()}
    return [[merged[i][place] for i in range(len(items))] for place in range(places)]


if __name__ == "__main__":
    run(main, "reward")
