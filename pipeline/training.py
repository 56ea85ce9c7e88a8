"""What the three training stages have in common: from items and an objective to a finished stage directory."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.checkpoint import Checkpoints, State
from pipeline.data import Draw, Source
from pipeline.engine import Engine
from pipeline.loop import Evaluation, Job, Objective, Watch, keep, run
from pipeline.metrics import RunLog, flatten
from pipeline.sampling import epoch_rows
from pipeline.settings import Training
from pipeline.tally import Interval, Tally

logger = logging.getLogger("tiffin")


@dataclass(frozen=True)
class Course:
    """What is learned, from what, for how long, and how it is looked at."""

    windows: Source
    objective: Objective
    max_steps: int
    eval_steps: int | None
    evaluate: Callable[[int], Evaluation]
    watch: Watch
    export: Callable[[Path], None]


def steps_for(settings: Training, rows: int) -> int:
    """Optimizer steps of the run: max_steps, or as many as num_train_epochs of `rows` need, at least 1."""
    if settings.train.max_steps is not None:
        return settings.train.max_steps
    return max(1, math.ceil(rows * settings.train.num_train_epochs / settings.train.batch_size))


def epochs(rows: int, batch_size: int, seed: int) -> Draw:
    """Every row once per epoch, in a new order each; epochs follow one another without a gap."""
    return lambda step: epoch_rows(rows, batch_size, step, seed)


def train(
    settings: Training, directory: Path, engine: Engine, course: Course, prepare: Callable[[], None] = lambda: None
) -> None:
    """Run or resume a course and leave model/ and results.json.

    Args:
        prepare: called when training starts from nothing, with the untouched weights in the engine.
    """
    ranks = engine.ranks
    checkpoints = Checkpoints(directory, ranks, settings.train.save_total_limit)
    found = checkpoints.load(engine)
    if found is None:
        prepare()
    state, interval, memory = found or (State(step=0, world=ranks.world), Interval(Tally()), {})
    course.windows.recall(memory)
    if found is not None:
        logger.info(f"{directory}: goes on from step {state.step} of {course.max_steps}")
    log = RunLog(
        directory,
        flatten(settings.model_dump()),
        resume_step=state.step,
        enabled=ranks.main,
        total_steps=course.max_steps,
        description="/".join(directory.parts[-2:]),
    )
    job = Job(
        engine=engine,
        objective=course.objective,
        windows=course.windows,
        evaluate=course.evaluate,
        export=course.export,
        train=settings.train,
        optimizer=settings.optimizer,
        max_steps=course.max_steps,
        eval_steps=course.eval_steps,
        watch=course.watch,
        log=log,
        checkpoints=checkpoints,
        directory=directory,
    )
    state = run(job, state, interval)
    keep(job, state)
    log.finish(results(state, settings.train.keep, course.max_steps))
    log.close()
    ranks.barrier()
    checkpoints.clear()


def results(state: State, kept: str, steps: int) -> dict[str, Any]:
    """The stage's final numbers: those of the weights that became model/."""
    best = kept == "best" and state.best_step is not None
    seen: Mapping[str, float] = state.best_seen if best else state.last_seen
    step = state.best_step if best else state.step
    return {**seen, "model_step": step, "steps": steps, "seconds": round(state.seconds, 1)}
