"""Reinforcement learning: from the SFT model to runs/<run>/rl/model/. Where responses come from, the algorithm says."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.config.schema import RlStage
from pipeline.config.sections import DataSettings, ModelSettings
from pipeline.data import dataset
from pipeline.errors import UserError
from pipeline.launch import run_dir
from pipeline.launch.entry import run
from pipeline.rewards.build import build_rewards, reward_inputs
from pipeline.rl import dpo, offline, on_policy, semi_offline
from pipeline.rl.context import Context
from pipeline.trainer import engine
from pipeline.trainer.loop import fit
from pipeline.trainer.objective import objective_of

TRAINERS = {
    "data": offline.trainer,
    "masked data": semi_offline.trainer,
    "pairs": dpo.trainer,
    "policy": on_policy.trainer,
}  # by the algorithm's RESPONSES


def main(settings: RlStage, words: Sequence[str]) -> None:
    ranks = engine.start(settings.launch.ddp_timeout)
    directory = run_dir.stage_dir(settings, "rl")
    start, data = start_model(settings), scored_data(settings)
    rewards_key = reward_inputs(settings, settings.reward)
    inputs = dataset.inputs(settings.model_copy(update={"data": data}), start) | rewards_key
    if not ranks.on_main(lambda: run_dir.open_stage(directory, settings, words, inputs)):
        return
    module, algorithm, objective = objective_of(settings.algorithm)
    rewards = build_rewards(settings, settings.reward, settings.rewards, ranks.device)
    context = Context(settings, ranks, directory, start, data, rewards, rewards_key, module, algorithm, objective)
    fit(TRAINERS[module.RESPONSES](context))


def start_model(settings: RlStage) -> ModelSettings:
    """The model to start from. Raises UserError where there is none: RL does not begin with a new one."""
    model = run_dir.start_model(settings)
    if model.path is None:
        raise UserError(
            f"stage=rl: {run_dir.run_dir(settings)}/sft holds no model to start from: make one with "
            f"bash run.sh stage=sft run={settings.run} data.train=FILE, or give model="
        )
    return model


def scored_data(settings: RlStage) -> DataSettings:
    """Where the rows come from: `scored`, else the run's score stage, else data.*."""
    left = run_dir.run_dir(settings) / "score"
    place = settings.scored or (str(left) if run_dir.finished(left) else None)
    if place is None:
        return settings.data
    return dataset.read_from(settings.data, path=place)


if __name__ == "__main__":
    run(main, "rl")
