"""Reinforcement learning from scored rows: from the SFT model to runs/<run>/rl/model/."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from pipeline import advantages, assembly, engine, evaluate, examples, reference, rollout, runs, training
from pipeline.engine import Ranks
from pipeline.entry import run
from pipeline.loop import Evaluation, Objective, Watch
from pipeline.records import Example, Item, Needs, UserError
from pipeline.rewards import Rewards
from pipeline.sampling import step_budget
from pipeline.settings import DataSettings, ModelSettings, Rl
from pipeline.text import coloured

HISTOGRAM_ROWS = 128  # held-out rows whose ratio to the reference is drawn at each evaluation


def main(settings: Rl, words: Sequence[str]) -> None:
    ranks = engine.start(settings.launch.ddp_timeout)
    directory = runs.stage_dir(settings, "rl")
    model, data = start_model(settings), scored_data(settings)
    judge_key = assembly.reward_inputs(settings, settings.reward)
    inputs = assembly.inputs(settings.model_copy(update={"data": data}), model) | judge_key
    if not ranks.on_main(lambda: runs.open_stage(directory, settings, words, inputs)):
        return

    # rows -> rewards -> tokens
    say = print if ranks.main else str
    module, algorithm, objective = assembly.objective_of(settings.algorithm)
    needs = module.needs(algorithm)
    judge = assembly.build_rewards(settings, settings.reward, settings.rewards, ranks.device)
    train, held_out, prompts = rewarded_rows(settings, ranks, judge, needs, say)
    encoder = assembly.encoder_of(settings, model, list)
    encoded = examples.encode(train, encoder, examples.completion_rows)
    tested = examples.encode(held_out, encoder, examples.completion_rows)
    say(f"{encoded.summary('train')}\n{tested.summary('validation')}\n{coloured(encoder, encoded.items[0].rows[0])}")
    ranks.on_main(lambda: examples.note(directory, encoded, tested))

    # what the reference says, before the first step changes it
    policy = assembly.build_policy(model, encoder, settings.train, data.max_response_length, settings.seed)
    packing = assembly.packing(settings.train, ranks, policy, encoder)
    trainer = engine.Engine(policy, ranks, settings.train, settings.optimizer)
    ref = advantages.Reference(trainer, encoder, packing, settings, runs.fingerprint(model.path))
    source = advantages.ValueData(prompts, encoded.items, judge, judge_key)
    items, watched, facts = referenced(ref, encoded.items, tested.items, source, needs)

    # which rows, for how long
    drawn = advantages.population(items, algorithm.weight, settings)
    facts["advantage/kept_fraction"] = drawn.kept_fraction
    say(", ".join(f"{name} {value:.3g}" for name, value in facts.items()))
    budget = partial(step_budget, kept_fraction=drawn.kept_fraction if settings.scale_steps else 1.0)

    def prepare() -> None:
        if needs.ref_logp:
            tolerance = settings.ratio_tolerance.model_dump()[settings.train.precision]
            reference.check_ratio(trainer, items, drawn.draw(0), packing, tolerance)

    course = training.Course(
        items=items,
        draw=drawn.draw,
        packing=packing,
        objective=objective,
        max_steps=budget(training.steps_for(settings, len(items))),
        eval_steps=None if settings.train.eval_steps is None else budget(settings.train.eval_steps),
        evaluate=Look(ref, objective, Held(items, watched, prompts[: settings.eval.max_rows], judge), facts),
        watch=Watch("eval/loss", False) if judge is None else Watch("eval/reward/mean", True),
        export=assembly.exporter(trainer, encoder),
    )
    training.train(settings, directory, trainer, course, prepare)


def start_model(settings: Rl) -> ModelSettings:
    """The model to start from. Raises UserError where there is none: RL does not begin with a new one."""
    model = assembly.start_model(settings)
    if model.path is None:
        raise UserError(
            f"stage=rl: {runs.run_dir(settings)}/sft holds no model to start from: make one with "
            f"bash run.sh stage=sft run={settings.run} data.train=FILE, or give model="
        )
    return model


def scored_data(settings: Rl) -> DataSettings:
    """Where the rows come from: `scored`, else the run's score stage, else data.*."""
    left = runs.run_dir(settings) / "score"
    place = settings.scored or (str(left) if runs.finished(left) else None)
    if place is None:
        return settings.data
    return settings.data.model_copy(
        update={"path": place, "files": None, "task": None, "train": None, "validation": None, "test": None}
        | {"format": None, "exclude": [], "drop_abrupt": False, "sources": None}
    )


class Rows(NamedTuple):
    """What RL reads: rows to learn from, rows to watch, and all held-out prompts, each once."""

    train: list[Example]
    held_out: list[Example]
    prompts: list[Example]


def rewarded_rows(settings: Rl, ranks: Ranks, judge: Rewards | None, needs: Needs, say: Callable[[str], None]) -> Rows:
    """The rows with their rewards, where they are needed; those to learn from chosen, or shuffled, as asked for."""
    data = scored_data(settings)
    train = examples.scored(examples.load_train(data, settings.seed, say), data)
    held_out = examples.scored(examples.load(data, "validation", settings.seed, say), data)
    prompts = examples.unique_prompts(held_out)
    held_out = held_out[: settings.eval.max_rows]
    if needs.rewards or settings.rows != "all" or settings.shuffle_rewards:
        rows = advantages.with_rewards(ranks, [*train, *held_out], judge, settings)
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
        ref, held, settings = self.ref, self.held, self.ref.settings
        scalars = evaluate.held_out_loss(ref.engine, self.objective, held.watched, ref.packing)
        answers = rollout.generate(ref.engine, ref.encoder, held.prompts, settings.generation, settings.seed)
        found = evaluate.completion_statistics(answers)
        samples = []
        if held.judge is not None:
            scores = evaluate.score_responses(ref.engine.ranks, held.judge, answers)
            found |= evaluate.reward_statistics(scores, [answer.text for answer in answers])
            samples = evaluate.sample_rows(answers, scores, settings.eval.num_samples)
        scalars |= {f"eval/{name}": value for name, value in found.items()}
        histograms = {}
        if held.watched[0].ref_logp:
            shown = held.watched[:HISTOGRAM_ROWS]
            histograms["ratio/log"] = evaluate.log_ratios(ref.engine, shown, ref.packing)
        if step == 0:
            scalars, histograms = scalars | self.facts, histograms | self.of_rows()
        return Evaluation(scalars, histograms, samples)

    def of_rows(self) -> dict[str, torch.Tensor]:
        """Distributions of what is known of all rows: they do not change."""
        items = self.held.items
        names = [name for name in ("reward", "value", "advantage") if name in items[0].numbers]
        return {name: torch.tensor([item.numbers[name] for item in items]) for name in names}


if __name__ == "__main__":
    run(main, "rl")
