"""Learning from responses that the policy gives now: prompts -> responses -> rewards -> one step, again and again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from pipeline import assembly, engine, evaluate, examples, rollout, training
from pipeline.algorithms.functional import group_advantages
from pipeline.data import Draw, Packing, collate, window
from pipeline.engine import Engine
from pipeline.lesson import Lesson, Scene, refuse, required_judge, spoken
from pipeline.loop import Evaluation, Watch
from pipeline.records import Batch, Example, Item, Response, Row
from pipeline.rewards import Rewards
from pipeline.settings import GenerationSettings
from pipeline.text import Encoder


def lesson(scene: Scene) -> Lesson:
    """On-policy RL. train.batch_size counts prompts; each has `samples` responses in the step."""
    settings, ranks, model = scene.settings, scene.ranks, scene.model
    refuse(settings, rows="all", sampling="all", shuffle_rewards=False)
    judge = required_judge(scene)
    prompts = examples.unique_prompts(examples.load_train(scene.data, settings.seed, scene.say))
    held_out = examples.unique_prompts(examples.load(scene.data, "validation", settings.seed, scene.say))
    held_out = held_out[: settings.eval.max_rows]
    encoder = assembly.encoder_of(settings, model, list)
    longest = settings.generation.max_new_tokens
    policy = assembly.build_policy(model, encoder, settings.train, longest, settings.seed)
    packing = assembly.packing(settings.train, ranks, policy, encoder)
    trainer = engine.Engine(policy, ranks, settings.train, settings.optimizer)
    scene.say(f"train: {len(prompts):,} prompts, {scene.algorithm.samples} responses each, sampled at every step")

    def look(step: int) -> Evaluation:
        found, samples = spoken(trainer, encoder, held_out, judge, settings)
        return Evaluation(found, samples=samples)

    course = training.Course(
        windows=Rollouts(
            engine=trainer,
            encoder=encoder,
            judge=judge,
            prompts=prompts,
            draw=training.epochs(len(prompts), settings.train.batch_size, settings.seed),
            packing=packing,
            generation=sampled(settings.generation, scene.algorithm.samples),
            baseline=scene.algorithm.baseline,
            seed=settings.seed,
        ),
        objective=scene.objective,
        max_steps=training.steps_for(settings, len(prompts)),
        eval_steps=settings.train.eval_steps,
        evaluate=look,
        watch=Watch("eval/reward/mean", True),
        export=assembly.exporter(trainer, encoder),
    )
    return Lesson(trainer, course, lambda: None)


def sampled(settings: GenerationSettings, samples: int) -> GenerationSettings:
    """The policy's own distribution, `samples` responses per prompt: what the gradient is an expectation over."""
    return rollout.free(settings).model_copy(update={"num_return_sequences": samples})


@dataclass
class Rollouts:
    """Windows of responses that are sampled when they are asked for; a function of weights, seed and step."""

    engine: Engine
    encoder: Encoder
    judge: Rewards
    prompts: Sequence[Example]
    draw: Draw
    packing: Packing
    generation: GenerationSettings
    baseline: str
    seed: int
    items: Sequence[Item] = ()  # of the last step

    def at(self, step: int) -> list[Batch]:
        """This rank's micro-batches of the responses to the prompts of `step`."""
        ranks = self.engine.ranks
        asked = [self.prompts[i] for i in self.draw(step)]
        answers = rollout.generate(self.engine, self.encoder, asked, self.generation, self.seed * 1_000_003 + step)
        rewards = evaluate.score_responses(ranks, self.judge, answers).total
        self.items = self._items(answers, rewards)
        plan = window(self.items, range(len(self.items)), self.packing, ranks.rank, ranks.world)
        return [collate(self.items, indices, self.packing, step) for indices in plan]

    def _items(self, answers: Sequence[Response], rewards: Sequence[float]) -> list[Item]:
        """The responses with their rewards, and with their advantages over those to the same prompt."""
        table = torch.tensor(rewards, dtype=torch.float64).reshape(-1, self.generation.num_return_sequences)
        weights = group_advantages(table, self.baseline).flatten().tolist()
        return [
            Item(
                replace(answer.example, completion=answer.text),
                (Row(answer.prompt_ids, answer.response_ids),),
                {"reward": reward, "advantage": weight},
            )
            for answer, reward, weight in zip(answers, rewards, weights, strict=True)
        ]
