"""What every kind of reinforcement learning is given before anything is read or built."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.config.reward_spec import no_judge_of_new_texts
from pipeline.config.schema import RlStage
from pipeline.config.sections import DataSettings, ModelSettings
from pipeline.data import dataset
from pipeline.data.prompts import unique_prompts
from pipeline.data.rows import Rows
from pipeline.launch import run_dir
from pipeline.records import Example
from pipeline.rewards import scoring
from pipeline.rewards.rewards import Rewards
from pipeline.rollout import same_words
from pipeline.rollout.generate import generate
from pipeline.rollout.handing import HandOver
from pipeline.rollout.served import Served
from pipeline.trainer import evaluation
from pipeline.trainer.group import Ranks
from pipeline.trainer.loop import Evaluation
from pipeline.trainer.model import Model
from pipeline.trainer.objective import Objective, RlModule

logger = logging.getLogger("tiffin")


@dataclass(frozen=True)
class Context:
    """One RL stage before anything is read or built."""

    settings: RlStage
    ranks: Ranks
    directory: Path
    start: ModelSettings  # the model to start from
    data: DataSettings  # where the rows come from
    rewards: Rewards | None  # what scores logged rows
    rewards_key: object  # names the rewards where results are cached
    module: RlModule
    algorithm: Any  # its settings
    objective: Objective
    hand_over: HandOver | None = None  # to the server that writes responses, where one does

    @property
    def judge(self) -> Rewards | None:
        """What judges any text by the very sum that is trained on; None where rows bring a part of it."""
        return None if self.rewards is None or self.rewards.own else self.rewards

    def served(self, model: Model) -> Served | None:
        """The server with the weights that `model` has now; None where responses come from here."""
        return None if self.hand_over is None else self.hand_over.to_server(model)


def splits(context: Context) -> tuple[Rows, Rows]:
    """The training rows and the held-out ones, with further columns where a reward may read them.

    Every reward has by then been tried on a training row. Raises UserError where one fails.
    """
    settings, rewards = context.settings, context.rewards
    carry = rewards is not None and rewards.reads_columns
    train, held_out = dataset.splits(context.data, settings.seed, carry=carry, folder=run_dir.cache(settings))
    if rewards is not None and rewards.own:
        say_what_is_judged(rewards)
    if rewards is not None:
        (row,) = unique_prompts(train[:1])
        scoring.try_rewards(context.ranks, rewards, row, written=True)
    return train, held_out


def say_what_is_judged(rewards: Rewards) -> None:
    """One line of what is known of new responses, where a part of the sum is a reward that the rows bring."""
    brought, watched = (", ".join(one.name for one in part) for part in (rewards.own, rewards.functions))
    shown = f"; logged of them, each by itself: {watched} (eval/rewards/NAME/...)" if watched else ""
    logger.info(f"rewards: the rows bring {brought}, so that nothing judges new responses by the whole sum{shown}")


def required_rewards(context: Context) -> Rewards:
    """The rewards of the stage. Raises UserError where there are none that judge new texts."""
    if context.judge is None:
        raise no_judge_of_new_texts(context.settings.algo, context.settings.run)
    return context.judge


def fresh_responses(context: Context, model: Model, prompts: Sequence[Example]) -> Evaluation:
    """eval/... of responses that the policy gives now, judged where something does that; with a few samples.

    Nothing where eval.generate is false.
    """
    settings = context.settings
    if not settings.eval.generate:
        return Evaluation({})
    server = context.served(model)
    if server is not None and prompts:
        same_words.compare(model.engine, model.encoder, prompts[0], settings.generation, server)
    responses = generate(model.engine, model.encoder, prompts, settings.generation, settings.seed, server)
    statistics, histograms, scores = evaluation.completion_statistics(responses), {}, None
    if context.rewards is not None and context.rewards.functions:
        scores = scoring.score_responses(model.ranks, context.rewards, responses)
        statistics |= evaluation.reward_statistics(scores, [response.text for response in responses])
        if scores.total is not None:
            histograms["eval/reward"] = torch.tensor(scores.total)
    samples = evaluation.sample_rows(responses, scores, settings.eval.num_samples)
    return Evaluation({f"eval/{name}": value for name, value in statistics.items()}, histograms, samples)
