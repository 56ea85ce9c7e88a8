"""Learning from preference pairs: pairs -> what the reference says of both responses -> every pair once per epoch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from pipeline import files
from pipeline.data import dataset, sampling
from pipeline.data import pairs as pairing
from pipeline.data.batching import Windows
from pipeline.data.tokenization import coloured
from pipeline.models import build
from pipeline.records import Example
from pipeline.rl import advantages, reference
from pipeline.rl.context import Lesson, Scene, refuse
from pipeline.rl.offline import Held, Look
from pipeline.trainer import engine, loop
from pipeline.trainer.loop import Watch


def lesson(scene: Scene) -> Lesson:
    """DPO: the start model's log-probabilities of both responses are known beforehand; nothing has to be judged."""
    settings, ranks, model = scene.settings, scene.ranks, scene.model
    refuse(settings, rows="all", sampling="all")
    train, held_out = pairs_of(scene)
    prompts = dataset.unique_prompts(held_out)[: settings.eval.max_rows]
    encoder = build.encoder_of(settings, model, list)
    encoded = dataset.encode(train, encoder, dataset.pair_rows)
    tested = dataset.encode(held_out[: settings.eval.max_rows], encoder, dataset.pair_rows)
    scene.say(f"{encoded.summary('train')}\n{tested.summary('validation')}")
    scene.say("\n".join(coloured(encoder, row) for row in encoded.items[0].rows))
    ranks.on_main(lambda: dataset.note(scene.directory, encoded, tested))

    # what the reference says, before the first step changes it
    policy = build.build_policy(model, encoder, settings.train, scene.data.max_response_length, settings.seed)
    packing = build.packing(settings.train, ranks.world, policy, encoder)
    trainer = engine.Engine(policy, ranks, settings.train, settings.optimizer)
    ref = advantages.Reference(trainer, encoder, packing, settings, files.fingerprint(model.path))
    known = advantages.with_ref_logps(ref, [*encoded.items, *tested.items])
    items, watched = known[: len(train)], known[len(train) :]
    draw = loop.epochs(len(items), settings.train.batch_size, settings.seed)

    def prepare() -> None:
        tolerance = settings.ratio_tolerance.model_dump()[settings.train.precision]
        reference.check_ratio(trainer, items, draw(0), packing, tolerance)

    course = loop.Course(
        windows=Windows(items, draw, packing, ranks.rank, ranks.world),
        objective=scene.objective,
        max_steps=loop.steps_for(settings, len(items)),
        eval_steps=settings.train.eval_steps,
        evaluate=Look(ref, scene.objective, Held(items, watched, prompts, scene.judge), {}),
        watch=Watch("eval/loss", False) if scene.judge is None else Watch("eval/reward/mean", True),
        export=loop.exporter(trainer, encoder),
    )
    return Lesson(trainer, course, prepare)


def pairs_of(scene: Scene) -> tuple[list[Example], list[Example]]:
    """The pairs to learn from, turned round at random if rewards are to be shuffled, and those held out."""
    settings = scene.settings
    train, held_out = map(pairing.paired, dataset.splits(scene.data, settings.seed))
    return with_shuffled_sides(train, settings.seed) if settings.shuffle_rewards else train, held_out


def with_shuffled_sides(pairs: Sequence[Example], seed: int) -> list[Example]:
    """The pairs, each turned round by a fair coin of its own: which response is better is not told any more."""
    coins = torch.rand(len(pairs), generator=sampling.generator("sides", seed, 0)).tolist()
    return [
        replace(pair, chosen=pair.rejected, rejected=pair.chosen) if coin < 0.5 else pair
        for pair, coin in zip(pairs, coins, strict=True)
    ]
