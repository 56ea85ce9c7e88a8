"""Reinforcement learning: from the SFT model to runs/<run>/rl/model/. Where responses come from, the algorithm says."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from pipeline.config.schema import RlStage
from pipeline.launch import run_dir
from pipeline.launch.entry import run
from pipeline.rewards.build import build_rewards
from pipeline.rl import dpo, groups, labels, offline, on_policy, semi_offline
from pipeline.rl.context import Context
from pipeline.rollout import handing
from pipeline.trainer import group
from pipeline.trainer.loop import Trainer, fit
from pipeline.trainer.objective import objective_of
from pipeline.trainer.opening import open_stage
from stages import inputs

logger = logging.getLogger("tiffin")

TRAINERS = {
    "data": offline.trainer,
    "masked data": semi_offline.trainer,
    "pairs": dpo.trainer,
    "labels": labels.trainer,
    "groups": groups.trainer,
    "policy": on_policy.trainer,
}  # by the algorithm's RESPONSES


def main(settings: RlStage, words: Sequence[str]) -> None:
    ranks = group.start(settings.launch.ddp_timeout)
    directory = run_dir.stage_dir(settings, "rl")
    start, data = inputs.rl_model(settings), inputs.rl_data(settings)
    started = ranks.on_main(lambda: inputs.of_rl(settings))
    if not open_stage(ranks, directory, settings, words, started):
        return
    rewards_key = {name: mark for name, mark in started.items() if name.startswith("reward ")}
    module, algorithm, objective = objective_of(settings.algorithm)
    logged = module.RESPONSES in ("data", "labels", "groups")
    rewards = build_rewards(settings, settings.reward, settings.rewards, ranks.device, logged=logged)
    with handing.opened(settings, ranks, directory) as server:
        given = settings, ranks, directory, start, data, rewards, rewards_key, module, algorithm, objective, server
        trainer = TRAINERS[module.RESPONSES](Context(*given))
        if not settings.eval.generate:
            say_what_chooses(trainer)
        fit(trainer)


def say_what_chooses(trainer: Trainer) -> None:
    """One line of where weights come from, where no evaluation samples responses."""
    tag = trainer.best_metric.tag
    best = trainer.settings.train.keep == "best"
    kept = f"{tag} of held-out rows chooses the weights" if best else "the last are kept"
    logger.info(f"eval.generate: false, so no evaluation samples responses: {kept}")


if __name__ == "__main__":
    run(main, "rl")
