"""Supervised fine-tuning: from rows with completions to runs/<run>/sft/model/."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pipeline.config.schema import Sft
from pipeline.data import conversations, dataset
from pipeline.data.batching import Packing, Windows
from pipeline.data.dataset import Report
from pipeline.data.tokenization import Encoder, coloured
from pipeline.launch import run_dir
from pipeline.launch.entry import run
from pipeline.models import build
from pipeline.records import Example, Item
from pipeline.rollout import generate
from pipeline.trainer import engine, evaluation, loop
from pipeline.trainer.loop import Evaluation, Watch
from pipeline.trainer.objective import objective_of
from stages import inputs


def main(settings: Sft, words: Sequence[str]) -> None:
    ranks = engine.start(settings.launch.ddp_timeout)
    directory = run_dir.stage_dir(settings, "sft")
    model = settings.model
    if not ranks.on_main(lambda: run_dir.open_stage(directory, settings, words, inputs.of_sft(settings))):
        return

    # rows -> tokens
    say = print if ranks.main else str
    train = dataset.supervised(dataset.load_train(settings.data, settings.seed, say))
    train = conversations.learned(train, settings.train_on)
    held_out = dataset.supervised(dataset.load(settings.data, "validation", settings.seed, say))
    held_out = held_out[: settings.eval.max_rows]
    hides = settings.masking.rate > 0
    encoder = build.encoder_of(settings, model, lambda: dataset.texts(train, settings.template), hides)
    encoded = dataset.encode(train, encoder, dataset.completion_rows)
    watched = (
        held_out if settings.train_on == "last" else [row for one in held_out for row in conversations.turns_of(one)]
    )
    tested = dataset.encode(watched, encoder, dataset.completion_rows)
    say(f"{encoded.summary('train')}\n{tested.summary('validation')}\n{coloured(encoder, encoded.items[0].rows[0])}")
    ranks.on_main(lambda: dataset.note(directory, encoded, tested))

    # tokens -> model
    _, _, objective = objective_of(settings.algorithm)
    longest = settings.data.max_response_length
    policy = build.build_policy(model, encoder, settings.train, longest, settings.seed, hides)
    packing = build.packing(settings.train, ranks.world, policy, encoder)
    hidden = build.hidden(packing, encoder, policy, settings, spans=True) if hides else packing
    trainer = engine.Engine(policy, ranks, settings.train, settings.optimizer)

    items = encoded.items
    if settings.train_on == "all" and not (hides or policy.encoder_decoder):
        items = in_fewer_rows(items, say)

    def look(step: int) -> Evaluation:
        scalars = evaluation.held_out_loss(trainer, objective, tested.items, packing)
        scalars["eval/perplexity"] = math.exp(min(scalars["eval/loss"], 50.0))
        if hides:
            masked = evaluation.held_out_loss(trainer, objective, tested.items, hidden)
            scalars["eval/masked_loss"] = masked["eval/loss"]
        return Evaluation(scalars, samples=spoken(trainer, encoder, held_out, settings))

    course = loop.Course(
        windows=windows(items, hidden, settings, ranks),
        objective=objective,
        max_steps=loop.steps_for(settings, len(items)),
        eval_steps=settings.train.eval_steps,
        evaluate=look,
        watch=Watch("eval/loss", larger_is_better=False),
        export=loop.exporter(trainer, encoder),
    )
    loop.train(settings, directory, trainer, course)


def windows(items: Sequence[Item], packing: Packing, settings: Sft, ranks: engine.Ranks) -> Windows:
    """Every row once per epoch."""
    draw = loop.epochs(len(items), settings.train.batch_size, settings.seed)
    return Windows(items, draw, packing, ranks.rank, ranks.world)


def in_fewer_rows(items: Sequence[Item], say: Report) -> list[Item]:
    """Each conversation in one row where that changes nothing, after a word about it."""
    found = conversations.joined(items)
    say(f"train: {len(items):,} turns read in {len(found):,} rows")
    return found


def spoken(
    trainer: engine.Engine, encoder: Encoder, held_out: Sequence[Example], settings: Sft
) -> list[dict[str, str]]:
    """What the model says now to the first held-out prompts, as rows of a sample table."""
    shown = held_out[: settings.eval.num_samples]
    generation = settings.generation.model_copy(update={"max_new_tokens": settings.data.max_response_length})
    answers = generate.generate(trainer, encoder, shown, generation, settings.seed) if shown else []
    return [{"id": a.example.id, "prompt": a.prompt_text, "response": a.text} for a in answers]


if __name__ == "__main__":
    run(main, "sft")
