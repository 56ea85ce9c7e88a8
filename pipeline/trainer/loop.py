"""The one training loop of all three stages."""

from __future__ import annotations

import logging
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.config.schema import Training
from pipeline.config.sections import OptimizerSettings, TrainSettings
from pipeline.data.batching import Draw, Source
from pipeline.data.sampling import epoch_rows
from pipeline.data.tokenization import Encoder
from pipeline.errors import PreemptedError, UserError
from pipeline.files import flatten
from pipeline.models import loading
from pipeline.records import Batch, Stat
from pipeline.trainer.checkpoint import Checkpoints, State
from pipeline.trainer.engine import Engine, Ranks
from pipeline.trainer.logger import RunLog
from pipeline.trainer.metrics import Interval, Tally
from pipeline.trainer.nonfinite import Micro, trace
from pipeline.trainer.objective import Objective, Output, Rest

logger = logging.getLogger("tiffin")


@dataclass(frozen=True)
class Evaluation:
    """What a look at held-out data gives; the same scalars on every rank."""

    scalars: Mapping[str, float]
    histograms: Mapping[str, Tensor] = field(default_factory=dict)
    samples: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class Watch:
    """The evaluation scalar that chooses the best weights."""

    tag: str
    larger_is_better: bool

    def better(self, value: float, best: float | None) -> bool:
        if math.isnan(value):
            return False
        return best is None or (value > best if self.larger_is_better else value < best)


@dataclass(frozen=True)
class Job:
    """Everything one training needs. `evaluate` and `export` are called on all ranks."""

    engine: Engine
    objective: Objective
    windows: Source
    evaluate: Callable[[int], Evaluation]
    export: Callable[[Path], None]
    train: TrainSettings
    optimizer: OptimizerSettings
    max_steps: int
    eval_steps: int | None
    watch: Watch
    log: RunLog
    checkpoints: Checkpoints
    directory: Path


def run(job: Job, state: State, interval: Interval) -> State:
    """Train from `state.step` to the last step; evaluate, log, save and keep the best weights on the way.

    Raises:
        PreemptedError: SIGTERM came; the state is saved.
        UserError: a loss or gradient is not finite, and train.non_finite is stop; the state before it is saved.
    """
    ranks, train, before, began = job.engine.ranks, job.train, state.seconds, time.monotonic()

    def save() -> None:
        seconds = before + time.monotonic() - began
        memory = job.windows.state_dict(state.step)
        job.checkpoints.save(job.engine, replace(state, seconds=seconds), interval, memory)

    with terminations() as received:
        if state.step == 0:
            state, values = look(job, state)
            job.log.scalars(0, values)
        while state.step < job.max_steps:
            if ranks.any(bool(received)):
                save()
                raise PreemptedError(f"stopped by SIGTERM after step {state.step} of {job.max_steps}, which is saved")
            if (trouble := one_step(job, state.step, interval)) is not None and train.non_finite == "stop":
                save()
                raise UserError(f"{trouble}; train.non_finite=skip goes on without such steps")
            state = replace(state, step=state.step + 1)
            values = {}
            if due(state.step, train.logging_steps, job.max_steps):
                values |= summary(ranks, interval)
            if due(state.step, job.eval_steps, job.max_steps):
                state, seen = look(job, state)
                values |= seen
            if values:
                job.log.scalars(state.step, values)
            if train.save_steps is not None and due(state.step, train.save_steps, job.max_steps):
                save()
    return replace(state, seconds=before + time.monotonic() - began)


@contextmanager
def terminations() -> Iterator[list[int]]:
    """A list that SIGTERM adds to, instead of ending the process."""
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before)


def one_step(job: Job, step: int, interval: Interval) -> str | None:
    """Forward and backward over the window of `step`, then one optimizer step.

    Returns:
        What was not finite and on which rows, where anything was; the optimizer has then not stepped, on any rank.
    """
    began, engine, ranks = time.monotonic(), job.engine, job.engine.ranks
    window = job.windows.at(step)
    n_terms = ranks.all_sum(job.objective.terms(window))
    engine.train()
    done, tally = [], Tally()
    tally.add(job.windows.stats)
    for place, (batch, output, rest) in enumerate(forwards(engine, job.objective, window)):
        total, stats = rest()
        # an infinite constant has a finite gradient: let the norm, which all ranks share, tell of it
        known = torch.where(total.detach().isfinite(), 1.0, math.nan)
        engine.backward(total * known, n_terms, last=place == len(window) - 1)
        done.append(Micro(batch, (output if isinstance(output, Tensor) else output[0]).detach(), total.detach()))
        tally.add({name if "/" in name else f"train/{name}": value for name, value in stats.items()})
    rate = learning_rate(step, job.max_steps, job.optimizer)
    norm = engine.step(rate)
    trouble = None
    if not math.isfinite(norm) and job.train.precision != "fp16":  # there a skipped step only finds its loss scale
        trouble = trace(job.directory, ranks, job.windows.items, step + 1, done, norm)
        if job.train.non_finite == "stop":
            return trouble
        logger.warning(f"{trouble}; left out")
    if math.isfinite(norm):
        interval.tally.merge(tally)
    interval.add(step_stats(window, norm, rate, ranks.device), time.monotonic() - began)
    return trouble


def forwards(engine: Engine, objective: Objective, window: Sequence[Batch]) -> Iterator[tuple[Batch, Output, Rest]]:
    """Each micro-batch after its forward, or after the next one's too where the objective has a `begin`."""
    waiting: list[tuple[Batch, Output, Rest]] = []
    for batch in window:
        output, moved = objective.ask(engine, batch), batch.to(engine.ranks.device)
        if objective.begin is None:
            yield batch, output, partial(objective.loss, output, moved)
            continue
        waiting.append((batch, output, objective.begin(output, moved)))
        if len(waiting) > 1:
            yield waiting.pop(0)
    yield from waiting


def step_stats(window: Sequence[Batch], norm: float, rate: float, device: torch.device) -> dict[str, Stat]:
    """What the loop itself knows of a step; a norm that is not finite is not counted, its step is."""
    learned = sum(int(batch.response_mask.sum()) for batch in window)
    read = sum(int(batch.input_mask.sum()) for batch in window)
    finite = math.isfinite(norm)
    numbers = {"train/learning_rate": rate, "train/num_tokens": learned, "perf/tokens": read}
    numbers |= {"train/skipped_fraction": 1.0 - finite, "train/grad_norm": norm if finite else 0.0}
    counts = {name: float(finite) if name == "train/grad_norm" else 1.0 for name in numbers}
    rows = torch.tensor([[counts[name], x, x * x] for name, x in numbers.items()], dtype=torch.float64, device=device)
    return {name: Stat("mean", sums) for name, sums in zip(numbers, rows, strict=True)}


def summary(ranks: Ranks, interval: Interval) -> dict[str, float]:
    """The interval over all ranks, with rates. num_tokens counts learned tokens of one step."""
    values, seconds = interval.close(ranks.all_sum)
    read = values.pop("perf/tokens") * ranks.world
    values["train/num_tokens"] *= ranks.world
    values |= {"perf/tokens_per_second": read / seconds, "perf/step_seconds": seconds}
    if ranks.device.type == "cuda":
        values["perf/peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return values


def look(job: Job, state: State) -> tuple[State, dict[str, float]]:
    """Evaluate; export the weights to best/ if they are the best so far."""
    job.engine.train(False)
    evaluation = job.evaluate(state.step)
    for tag, values in evaluation.histograms.items():
        job.log.histogram(tag, values, state.step)
    job.log.samples(state.step, list(evaluation.samples))
    seen = dict(evaluation.scalars)
    state = replace(state, last_seen=seen)
    if job.watch.better(seen[job.watch.tag], state.best):
        job.export(job.directory / "best")
        state = replace(state, best=seen[job.watch.tag], best_step=state.step, best_seen=seen)
    return state, seen


def keep(job: Job, state: State) -> None:
    """Export the last weights to last/, and let model/ be best/ or last/ as train.keep says."""
    job.export(job.directory / "last")
    if job.engine.ranks.main:
        chosen = job.directory / (job.train.keep if state.best_step is not None else "last")
        part = job.directory / "model.part"
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(chosen, part, copy_function=link_or_copy)
        shutil.rmtree(job.directory / "model", ignore_errors=True)
        os.replace(part, job.directory / "model")
    job.engine.ranks.barrier()


def link_or_copy(source: str, target: str) -> None:
    """A second name for the same bytes, so that weights are on the disk once; a copy where links are not to be had."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def due(step: int, every: int | None, last: int) -> bool:
    """Whether something that happens `every` so many steps, and at the end, happens at `step`."""
    return step == last or (every is not None and step % every == 0)


def learning_rate(step: int, max_steps: int, settings: OptimizerSettings) -> float:
    """The rate of `step`, counted from 0: linear warm-up, then constant, or linear or cosine down to 0."""
    warmup = math.ceil(max_steps * settings.warmup_ratio)
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, max_steps - warmup)
    factors = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}
    return settings.learning_rate * factors[settings.lr_scheduler_type]


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
    course.windows.load_state_dict(memory)
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


def exporter(engine: Engine, encoder: Encoder, then: Callable[[Path], None] | None = None) -> Callable[[Path], None]:
    """A function, called by all ranks, that writes the engine's model as a Hugging Face (or PEFT) directory."""

    def export(directory: Path) -> None:
        weights = engine.state_dict()
        if engine.ranks.main:
            own = {name.removeprefix("model."): weight for name, weight in weights.items()}
            loading.save(directory, engine.module.model, own, encoder.tokenizer, then)
        engine.ranks.barrier()

    return export
