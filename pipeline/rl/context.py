"""What every kind of reinforcement learning is given, and what it gives: a course for the one training loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.schema import Rl
from pipeline.config.sections import DataSettings, ModelSettings
from pipeline.data.tokenization import Encoder
from pipeline.errors import UserError
from pipeline.records import Example
from pipeline.rewards import scoring
from pipeline.rewards.rewards import Rewards
from pipeline.rollout.generate import generate
from pipeline.trainer import evaluation
from pipeline.trainer.engine import Engine, Ranks
from pipeline.trainer.loop import Course
from pipeline.trainer.objective import Objective


@dataclass(frozen=True)
class Scene:
    """One RL stage before anything is read or built."""

    settings: Rl
    ranks: Ranks
    directory: Path
    model: ModelSettings  # to start from
    data: DataSettings  # where the rows come from
    judge: Rewards | None
    judge_key: object  # names the judge where results are cached
    module: Any  # the algorithm's file
    algorithm: Any  # its settings
    objective: Objective

    def say(self, text: str) -> None:
        """Tell the user, once."""
        if self.ranks.main:
            print(text, flush=True)


@dataclass(frozen=True)
class Lesson:
    """What the training loop is to do. `prepare` is called before the first step, with the untouched weights."""

    engine: Engine
    course: Course
    prepare: Callable[[], None]


def refuse(settings: Rl, **neutral: Any) -> None:
    """Raise UserError where a setting that this kind of learning does not look at is not `neutral`."""
    values = settings.model_dump()
    for name, wanted in neutral.items():
        if values[name] != wanted:
            raise UserError(
                f"{name}: {values[name]}, which algo={settings.algo} does not look at, wanted {wanted}: leave it out, "
                "or choose another algo="
            )


def required_judge(scene: Scene) -> Rewards:
    """The rewards of the stage. Raises UserError where there are none."""
    if scene.judge is None:
        raise UserError(
            f"algo={scene.settings.algo}: nothing to judge new texts with, wanted a reward: give reward=NAME, "
            f"or train one with bash run.sh stage=reward run={scene.settings.run}"
        )
    return scene.judge


def spoken(
    engine: Engine, encoder: Encoder, prompts: Sequence[Example], judge: Rewards | None, settings: Rl
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """eval/... of fresh responses to `prompts`, with what `judge` says of them; and a few of them as samples."""
    answers = generate(engine, encoder, prompts, settings.generation, settings.seed)
    found, samples = evaluation.completion_statistics(answers), []
    if judge is not None:
        scores = scoring.score_responses(engine.ranks, judge, answers)
        found |= evaluation.reward_statistics(scores, [answer.text for answer in answers])
        samples = evaluation.sample_rows(answers, scores, settings.eval.num_samples)
    return {f"eval/{name}": value for name, value in found.items()}, samples
