"""A reward model: from preference pairs (or scored responses) to runs/<run>/reward/<name>/model/."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from pipeline import assembly, engine, evaluate, examples, runs, training
from pipeline.data import Windows, once, packing_of
from pipeline.entry import run
from pipeline.loop import Evaluation, Watch
from pipeline.records import Item
from pipeline.settings import Reward
from pipeline.text import coloured
from reward_models import learned


def main(settings: Reward, words: Sequence[str]) -> None:
    ranks = engine.start(settings.launch.ddp_timeout)
    directory = runs.stage_dir(settings, "reward")
    model = assembly.start_model(settings)
    if not ranks.on_main(lambda: runs.open_stage(directory, settings, words, assembly.inputs(settings, model))):
        return

    # pairs -> tokens
    module, algorithm, objective = assembly.objective_of(settings.algorithm)
    say = print if ranks.main else str
    train = examples.paired(examples.load_train(settings.data, settings.seed, say), say)
    held_out = examples.paired(examples.load(settings.data, "validation", settings.seed, say), say)
    held_out = held_out[: settings.eval.max_rows]
    examples.require([*train, *held_out], module.columns(algorithm), "algorithm.settings")
    encoder = assembly.encoder_of(settings, model, lambda: examples.texts(train, settings.template))
    encoded = examples.encode(train, encoder, examples.pair_rows)
    tested = examples.encode(held_out, encoder, examples.pair_rows)
    say(f"{encoded.summary('train')}\n{tested.summary('validation')}\n{coloured(encoder, encoded.items[0].rows[0])}")
    ranks.on_main(lambda: examples.note(directory, encoded, tested))

    # tokens -> model
    scorer = assembly.build_scalar(model, encoder, settings.train, settings.seed)
    packing = packing_of(settings.train, ranks.world, scorer.encoder_decoder, encoder.pad_id, whole=True)
    trainer = engine.Engine(scorer, ranks, settings.train, settings.optimizer)

    def look(step: int) -> Evaluation:
        scalars = evaluate.held_out_loss(trainer, objective, tested.items, packing)
        chosen, rejected = pair_scores(trainer, tested.items, packing)
        scalars |= evaluate.accuracy_by_source(held_out, chosen, rejected)
        return Evaluation(scalars, {"scores/margin": torch.tensor(chosen) - torch.tensor(rejected)})

    course = training.Course(
        windows=Windows(
            encoded.items,
            training.epochs(len(encoded.items), settings.train.batch_size, settings.seed),
            packing,
            ranks.rank,
            ranks.world,
        ),
        objective=objective,
        max_steps=training.steps_for(settings, len(encoded.items)),
        eval_steps=settings.train.eval_steps,
        evaluate=look,
        watch=Watch("eval/loss", larger_is_better=False),
        export=assembly.exporter(trainer, encoder, partial(learned.save_input, encoder=encoder)),
    )
    training.train(settings, directory, trainer, course)


@torch.no_grad()
def pair_scores(trainer: engine.Engine, items: Sequence[Item], packing) -> tuple[list[float], list[float]]:
    """Scores of the chosen and of the rejected responses, in the items' order, on every rank."""
    trainer.train(False)
    mine: dict[int, tuple[float, float]] = {}
    for batch in once(items, packing, trainer.ranks.rank, trainer.ranks.world):
        chosen, rejected = trainer(batch).cpu().chunk(2)
        mine |= {i: (float(chosen[place]), float(rejected[place])) for place, i in enumerate(batch.items)}
    merged = {i: pair for part in trainer.ranks.gather(mine) for i, pair in part.items()}
    return [merged[i][0] for i in range(len(items))], [merged[i][1] for i in range(len(items))]


if __name__ == "__main__":
    run(main, "reward")
