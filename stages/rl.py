"""Reinforcement learning from scored rows: from the SFT model to runs/<run>/rl/model/."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from pipeline import advantages, assembly, engine, evaluate, examples, reference, rollout, runs, training
from pipeline.entry import run
from pipeline.loop import Evaluation, Objective, Watch
from pipeline.records import Example, Item, Needs, UserError
from pipeline.rewards import Rewards
from pipeline.sampling import step_budget
from pipeline.settings import Rl
from pipeline.text import coloured


def main(settings: Rl, words: Sequence[str]) -> None:
    ranks = engine.start(settings.launch.ddp_timeout)
    directory = runs.stage_dir(settings, "rl")
    model = assembly.start_model(settings, "sft")
    if model.path is None:
        raise UserError(
            f"stage=rl: {runs.run_dir(settings)}/sft holds no model to start from: make one with "
            f"bash run.sh stage=sft run={settings.run} data.train=FILE, or give model="
        )
    data = scored_data(settings)
    judge_key = assembly.reward_inputs(settings, settings.reward)
    inputs = assembly.inputs(settings.model_copy(update={"data": data}), model) | judge_key
    if not ranks.on_main(lambda: runs.open_stage(directory, settings, words, inputs)):
        return

    # rows -> rewards -> tokens
    say = print if ranks.main else str
    module, algorithm, objective = assembly.objective_of(settings.algorithm)
    needs = module.needs(algorithm)
    judge = assembly.build_rewards(settings, settings.reward, settings.rewards, ranks.device)
    rows = examples.scored(examples.load_train(data, settings.seed, say), data)
    held_out = examples.unique_prompts(examples.load(data, "validation", settings.seed, say))
    if needs.rewards:
        rows, _ = advantages.row_rewards(ranks, rows, judge, settings)
    encoder = assembly.encoder_of(settings, model, list)
    encoded = examples.encode(rows, encoder, examples.completion_rows)
    say(f"{encoded.summary('train')}\n{coloured(encoder, encoded.items[0].rows[0])}")

    # what the reference says, before the first step changes it
    policy = assembly.build_policy(model, encoder, settings.train, data.max_response_length, settings.seed)
    packing = assembly.packing(settings.train, ranks, policy, encoder)
    trainer = engine.Engine(policy, ranks, settings.train, settings.optimizer)
    ref = advantages.Reference(trainer, encoder, packing, settings, runs.fingerprint(model.path))
    items, facts = prepared(ref, encoded.items, needs, held_out, judge, judge_key)
    drawn = advantages.population(items, algorithm.weight, settings)
    facts["advantage/kept_fraction"] = drawn.kept_fraction
    say(", ".join(f"{name} {value:.3g}" for name, value in facts.items()))
    budget = partial(step_budget, kept_fraction=drawn.kept_fraction if settings.scale_steps else 1.0)

    def prepare() -> None:
        if needs.ref_logp:
            reference.check_ratio(trainer, items, drawn.draw(0), packing, settings.ratio_tolerance)

    course = training.Course(
        items=items,
        draw=drawn.draw,
        packing=packing,
        objective=objective,
        max_steps=budget(training.steps_for(settings, len(items))),
        eval_steps=None if settings.train.eval_steps is None else budget(settings.train.eval_steps),
        evaluate=Look(ref, objective, items, held_out, judge, facts),
        watch=Watch("eval/loss", False) if judge is None else Watch("eval/reward/mean", True),
        export=assembly.exporter(trainer, encoder),
    )
    training.train(settings, directory, trainer, course, prepare)


def scored_data(settings: Rl):
    """Where the rows come from: `scored`, else the run's score stage, else data.*."""
    left = runs.run_dir(settings) / "score"
    place = settings.scored or (str(left) if runs.finished(left) else None)
    if place is None:
        return settings.data
    return settings.data.model_copy(
        update={"path": place, "task": None, "train": None, "validation": None, "test": None, "format": None}
        | {"exclude": [], "drop_abrupt": False, "sources": None}
    )


def prepared(
    ref: advantages.Reference, items: list[Item], needs: Needs, held_out: Sequence[Example], judge, judge_key
) -> tuple[list[Item], dict[str, float]]:
    """The items with all that the algorithm needs to know of them, and what was learned on the way."""
    facts: dict[str, float] = {}
    if needs.ref_logp:
        items = advantages.with_ref_logps(ref, items)
    if needs.values:
        items, facts = advantages.with_values(ref, items, held_out, judge, judge_key)
    return items, facts


class Look:
    """Evaluation during RL: fresh responses to held-out prompts, judged; and the loss's statistics on logged rows."""

    def __init__(
        self,
        ref: advantages.Reference,
        objective: Objective,
        items: list[Item],
        held_out: list[Example],
        judge: Rewards | None,
        facts: dict[str, float],
    ):
        settings = ref.settings.eval
        self.ref, self.objective, self.judge, self.facts = ref, objective, judge, facts
        self.items, self.watched = items, items[: settings.max_rows]
        self.prompts = held_out[: settings.max_rows]

    def __call__(self, step: int) -> Evaluation:
        ref = self.ref
        scalars = evaluate.held_out_loss(ref.engine, self.objective, self.watched, ref.packing)
        answers = rollout.generate(ref.engine, ref.encoder, self.prompts, ref.settings.generation, ref.settings.seed)
        found = evaluate.completion_statistics(answers)
        samples = []
        if self.judge is not None:
            scores = evaluate.score_responses(ref.engine.ranks, self.judge, answers)
            found |= evaluate.reward_statistics(scores, [answer.text for answer in answers])
            samples = evaluate.sample_rows(answers, scores, ref.settings.eval.num_samples)
        scalars |= {f"eval/{name}": value for name, value in found.items()}
        histograms = self.of_rows() if step == 0 else {}
        return Evaluation(scalars | (self.facts if step == 0 else {}), histograms, samples)

    def of_rows(self) -> dict[str, torch.Tensor]:
        """Distributions of what is known of all rows: they do not change."""
        names = [name for name in ("reward", "value", "advantage") if name in self.items[0].numbers]
        return {name: torch.tensor([item.numbers[name] for item in self.items]) for name in names}


if __name__ == "__main__":
    run(main, "rl")
