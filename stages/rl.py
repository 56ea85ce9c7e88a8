"""Reinforcement learning: from the SFT model to runs/<run>/rl/model/. Where responses come from, the algorithm says."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.config.schema import Rl
from pipeline.launch import run_dir
from pipeline.launch.entry import run
from pipeline.rewards import build
from pipeline.rl import dpo, offline, on_policy, semi_offline
from pipeline.rl.context import Scene
from pipeline.trainer import engine, loop
from pipeline.trainer.objective import objective_of
from stages import inputs

LESSONS = {
    "data": offline.lesson,
    "masked data": semi_offline.lesson,
    "pairs": dpo.lesson,
    "policy": on_policy.lesson,
}  # by the algorithm's RESPONSES


def main(settings: Rl, words: Sequence[str]) -> None:
    ranks = engine.start(settings.launch.ddp_timeout)
    directory = run_dir.stage_dir(settings, "rl")
    model, data = inputs.rl_model(settings), inputs.rl_data(settings)
    found = ranks.on_main(lambda: inputs.of_rl(settings))
    if not ranks.on_main(lambda: run_dir.open_stage(directory, settings, words, found)):
        return
    module, algorithm, objective = objective_of(settings.algorithm)
    judge_key = {name: mark for name, mark in found.items() if name.startswith("reward ")}
    judge = build.build_rewards(settings, settings.reward, settings.rewards, ranks.device)
    scene = Scene(settings, ranks, directory, model, data, judge, judge_key, module, algorithm, objective)
    lesson = LESSONS[module.RESPONSES](scene)
    loop.train(settings, directory, lesson.engine, lesson.course, lesson.prepare)


if __name__ == "__main__":
    run(main, "rl")
