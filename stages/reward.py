"""A reward model: from preference pairs or scored responses to runs/<run>/reward/<name>/model/."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from pipeline.config.schema import Reward
from pipeline.data import dataset, pairs
from pipeline.data.batching import Packing, Windows, once, packing_of
from pipeline.data.tokenization import coloured
from pipeline.launch import run_dir
from pipeline.launch.entry import run
from pipeline.models import build
from pipeline.records import Example, Item
from pipeline.trainer import engine, evaluation, loop
from pipeline.trainer.loop import Evaluation, Watch
from pipeline.trainer.objective import objective_of
from reward_models import learned
from stages import inputs


def main(settings: Reward, words: Sequence[str]) -> None:
    ranks = engine.start(settings.launch.ddp_timeout)
    directory = run_dir.stage_dir(settings, "reward")
    model = run_dir.start_model(settings)
    if not ranks.on_main(lambda: run_dir.open_stage(directory, settings, words, inputs.of_reward(settings))):
        return

    # rows -> tokens
    module, algorithm, objective = objective_of(settings.algorithm)
    say = print if ranks.main else str
    train, held_out = rows_of(settings, module, algorithm, say)
    alone = not pairs.all_pairs(train)  # responses with a score each
    made = dataset.completion_rows if alone else dataset.pair_rows
    encoder = build.encoder_of(settings, model, lambda: dataset.texts(train, settings.template))
    encoded = dataset.encode(train, encoder, made)
    tested = dataset.encode(held_out, encoder, made)
    say(f"{encoded.summary('train')}\n{tested.summary('validation')}\n{coloured(encoder, encoded.items[0].rows[0])}")
    ranks.on_main(lambda: dataset.note(directory, encoded, tested))

    # tokens -> model
    scorer = build.build_scalar(model, encoder, settings.train, settings.seed)
    packing = packing_of(settings.train, ranks.world, scorer.encoder_decoder, encoder.pad_id, whole=True)
    trainer = engine.Engine(scorer, ranks, settings.train, settings.optimizer)

    def look(step: int) -> Evaluation:
        scalars = evaluation.held_out_loss(trainer, objective, tested.items, packing)
        scores = scores_of(trainer, tested.items, packing)
        if alone:
            rewards = [example.reward for example in held_out]
            scalars |= evaluation.agreement(held_out, scores[0])
            return Evaluation(scalars, {"scores/error": torch.tensor(scores[0]) - torch.tensor(rewards)})
        scalars |= evaluation.accuracy_by_source(held_out, *scores)
        return Evaluation(scalars, {"scores/margin": torch.tensor(scores[0]) - torch.tensor(scores[1])})

    course = loop.Course(
        windows=Windows(
            encoded.items,
            loop.epochs(len(encoded.items), settings.train.batch_size, settings.seed),
            packing,
            ranks.rank,
            ranks.world,
        ),
        objective=objective,
        max_steps=loop.steps_for(settings, len(encoded.items)),
        eval_steps=settings.train.eval_steps,
        evaluate=look,
        watch=Watch("eval/loss", larger_is_better=False),
        export=loop.exporter(trainer, encoder, partial(learned.save_input, encoder=encoder)),
    )
    loop.train(settings, directory, trainer, course)


def rows_of(
    settings: Reward, module: Any, algorithm: Any, say: Callable[[str], None]
) -> tuple[list[Example], list[Example]]:
    """What to learn from and what is held out: pairs, or every response by itself where its score will do.

    Raises:
        UserError: a row lacks what the objective learns from.
    """
    train = dataset.load_train(settings.data, settings.seed, say)
    held_out = dataset.load(settings.data, "validation", settings.seed, say)
    if module.pairs_only(algorithm) or pairs.all_pairs([*train, *held_out]):
        train, held_out = pairs.paired(train, say), pairs.paired(held_out, say)[: settings.eval.max_rows]
        dataset.require([*train, *held_out], module.columns(algorithm), f"objective: {algorithm.objective}")
        return train, held_out
    train, held_out = (pairs.annotated(rows, settings.data) for rows in (train, held_out))
    return train, held_out[: settings.eval.max_rows]


@torch.no_grad()
def scores_of(trainer: engine.Engine, items: Sequence[Item], packing: Packing) -> list[list[float]]:
    """For each place in an item (chosen and rejected, or one) the scores in the items' order, on every rank."""
    trainer.train(False)
    places, mine = len(items[0].rows), {}
    for batch in once(items, packing, trainer.ranks.rank, trainer.ranks.world):
        table = trainer(batch).cpu().reshape(places, -1).T.tolist()  # one row per item
        mine |= dict(zip(batch.items, table, strict=False))  # a filler has scores, and is no item
    merged = {i: row for part in trainer.ranks.gather(mine) for i, row in part.items()}
    return [[merged[i][place] for i in range(len(items))] for place in range(places)]


if __name__ == "__main__":
    run(main, "reward")
