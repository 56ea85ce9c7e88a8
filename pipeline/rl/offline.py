"""Learning from logged responses: scored rows -> what the reference says of them -> which rows, for how long."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from pipeline import files
from pipeline.data import dataset
from pipeline.data.batching import Windows
from pipeline.data.sampling import step_budget
from pipeline.data.tokenization import coloured
from pipeline.models import build
from pipeline.records import Example, Item, Needs
from pipeline.rewards.rewards import Rewards
from pipeline.rl import advantages, reference
from pipeline.rl.context import Lesson, Scene, spoken
from pipeline.trainer import engine, evaluation, loop
from pipeline.trainer.loop import Evaluation, Watch
from pipeline.trainer.objective import Objective

HISTOGRAM_ROWS = 128  # held-out rows whose ratio to the reference is drawn at each evaluation


def lesson(scene: Scene) -> Lesson:
    """The offline family: every row's response, reward, reference log-probability and value are known beforehand."""
    settings, ranks, model, algorithm = scene.settings, scene.ranks, scene.model, scene.algorithm
    # rows -> rewards -> tokens
    needs = scene.module.needs(algorithm)
    train, held_out, prompts = rewarded_rows(scene, needs)
    encoder = build.encoder_of(settings, model, list)
    encoded = dataset.encode(train, encoder, dataset.completion_rows)
    tested = dataset.encode(held_out, encoder, dataset.completion_rows)
    scene.say(f"{encoded.summary('train')}\n{tested.summary('validation')}")
    scene.say(coloured(encoder, encoded.items[0].rows[0]))
    ranks.on_main(lambda: dataset.note(scene.directory, encoded, tested))

    # what the reference says, before the first step changes it
    policy = build.build_policy(model, encoder, settings.train, scene.data.max_response_length, settings.seed)
    packing = build.packing(settings.train, ranks.world, policy, encoder)
    trainer = engine.Engine(policy, ranks, settings.train, settings.optimizer)
    ref = advantages.Reference(trainer, encoder, packing, settings, files.fingerprint(model.path))
    source = advantages.ValueData(prompts, encoded.items, scene.judge, scene.judge_key)
    items, watched, facts = referenced(ref, encoded.items, tested.items, source, needs)

    # which rows, for how long
    drawn = advantages.population(items, algorithm.weight, settings)
    facts["advantage/kept_fraction"] = drawn.kept_fraction
    scene.say(", ".join(f"{name} {value:.3g}" for name, value in facts.items()))
    budget = partial(step_budget, kept_fraction=drawn.kept_fraction if settings.scale_steps else 1.0)

    def prepare() -> None:
        if needs.ref_logp:
            tolerance = settings.ratio_tolerance.model_dump()[settings.train.precision]
            reference.check_ratio(trainer, items, drawn.draw(0), packing, tolerance)

    held = Held(items, watched, prompts[: settings.eval.max_rows], scene.judge)
    course = loop.Course(
        windows=Windows(items, drawn.draw, packing, ranks.rank, ranks.world),
        objective=scene.objective,
        max_steps=budget(loop.steps_for(settings, len(items))),
        eval_steps=None if settings.train.eval_steps is None else budget(settings.train.eval_steps),
        evaluate=Look(ref, scene.objective, held, facts),
        watch=Watch("eval/loss", False) if scene.judge is None else Watch("eval/reward/mean", True),
        export=loop.exporter(trainer, encoder),
    )
    return Lesson(trainer, course, prepare)


class Rows(NamedTuple):
    """What RL reads: rows to learn from, rows to watch, and all held-out prompts, each once."""

    train: list[Example]
    held_out: list[Example]
    prompts: list[Example]


def rewarded_rows(scene: Scene, needs: Needs) -> Rows:
    """The rows with their rewards, where they are needed; those to learn from chosen, or shuffled, as asked for."""
    settings, data = scene.settings, scene.data
    train, held_out = (dataset.scored(rows, data) for rows in dataset.splits(data, settings.seed))
    prompts = dataset.unique_prompts(held_out)
    held_out = held_out[: settings.eval.max_rows]
    if needs.rewards or settings.rows != "all" or settings.shuffle_rewards:
        rows = advantages.with_rewards(scene.ranks, [*train, *held_out], scene.judge, settings)
        train, held_out = rows[: len(train)], rows[len(train) :]
    train = advantages.chosen_rows(train, settings.rows)
    if settings.shuffle_rewards:
        train = advantages.with_shuffled_rewards(train, settings.seed)
    return Rows(train, held_out, prompts)


def referenced(
    ref: advantages.Reference, train: list[Item], tested: list[Item], source: advantages.ValueData, needs: Needs
) -> tuple[list[Item], list[Item], dict[str, float]]:
    """Both with what the algorithm needs of the reference: log-probabilities, values; and what is known of the fit."""
    items, facts = [*train, *tested], {}
    if needs.ref_logp:
        items = advantages.with_ref_logps(ref, items)
    if needs.values:
        items, facts = advantages.with_values(ref, items, source)
    return items[: len(train)], items[len(train) :], facts


@dataclass(frozen=True)
class Held:
    """What evaluation looks at: the rows trained on, held-out rows, held-out prompts, and who judges the answers."""

    items: list[Item]
    watched: list[Item]
    prompts: list[Example]
    judge: Rewards | None


class Look:
    """Evaluation during RL: the loss's statistics on held-out rows, and fresh responses to held-out prompts, judged."""

    def __init__(self, ref: advantages.Reference, objective: Objective, held: Held, facts: dict[str, float]):
        self.ref, self.objective, self.held, self.facts = ref, objective, held, facts

    def __call__(self, step: int) -> Evaluation:
        ref, held = self.ref, self.held
        scalars = evaluation.held_out_loss(ref.engine, self.objective, held.watched, ref.packing)
        found, samples = spoken(ref.engine, ref.encoder, held.prompts, held.judge, ref.settings)
        scalars |= found
        histograms = {}
        if held.watched[0].ref_logp:
            shown = held.watched[:HISTOGRAM_ROWS]
            histograms["ratio/log"] = evaluation.log_ratios(ref.engine, shown, ref.packing)
        if step == 0:
            scalars, histograms = scalars | self.facts, histograms | self.of_rows()
        return Evaluation(scalars, histograms, samples)

    def of_rows(self) -> dict[str, torch.Tensor]:
        """Distributions of what is known of all rows: they do not change."""
        items = self.held.items
        names = [name for name in ("reward", "value", "advantage") if name in items[0].numbers]
        return {name: torch.tensor([item.numbers[name] for item in items]) for name in names}
