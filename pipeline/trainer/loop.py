"""The one training loop of all three stages."""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.config.schema import Training
from pipeline.data import encoded
from pipeline.data.batching import Packing, Source
from pipeline.data.sampling import step_budget
from pipeline.errors import PreemptedError, UserError
from pipeline.files import flatten
from pipeline.launch import going_on, stopping
from pipeline.launch.processes import handled
from pipeline.records import Batch, Stat
from pipeline.trainer import keeping
from pipeline.trainer.checkpoint import Checkpoints, State
from pipeline.trainer.engine import Engine
from pipeline.trainer.group import Ranks
from pipeline.trainer.keeping import BestMetric, Shelf
from pipeline.trainer.logger import RunLog
from pipeline.trainer.metrics import Interval, Metrics, of_training
from pipeline.trainer.model import Model
from pipeline.trainer.nonfinite import Micro, trace
from pipeline.trainer.objective import Objective, Output, Rest, balanced, router_coefficient
from pipeline.trainer.schedule import due, learning_rate, lengthened

logger = logging.getLogger("tiffin")


@dataclass(frozen=True)
class Evaluation:
    """What held-out data say of the weights; the same scalars on every rank."""

    scalars: Mapping[str, float]
    histograms: Mapping[str, Tensor] = field(default_factory=dict)
    samples: Sequence[Mapping[str, Any]] = ()
    held_out: Sequence[Mapping[str, Any]] = ()  # what is known of each held-out row


HELD_OUT_LOSS = BestMetric("eval/loss", larger_is_better=False)
REWARD = BestMetric("eval/reward", larger_is_better=True)
GAIN = BestMetric("eval/gain/dr", larger_is_better=True)


@dataclass(frozen=True)
class Trainer:
    """One training: what is learned, from what, for how long, and how it is evaluated.

    `evaluate` and `prepare` are called on all ranks. `prepare` is called where training starts from nothing, with the
    untouched weights in the engine.
    """

    model: Model
    settings: Training
    directory: Path
    windows: Source
    objective: Objective
    max_steps: int
    evaluate: Callable[[int], Evaluation]
    best_metric: BestMetric
    prepare: Callable[[], None] = lambda: None
    kept_fraction: float = 1.0  # of rows, where fewer steps are taken for those that are left out

    @property
    def engine(self) -> Engine:
        return self.model.engine

    @property
    def asked(self) -> bool:
        """Whether the rows have prompts; before the first step there may be none of them."""
        items = self.windows.items
        return not len(items) or encoded.has_prompts(items)

    @property
    def shelf(self) -> Shelf:
        return Shelf(self.model, self.settings, self.directory, self.best_metric, self.max_steps, self.asked)

    @property
    def eval_steps(self) -> int | None:
        every = self.settings.train.eval_steps
        return None if every is None else step_budget(every, self.kept_fraction)


def fit(trainer: Trainer) -> None:
    """Run or resume a training and leave model/ and results.json."""
    ranks, train = trainer.engine.ranks, trainer.settings.train
    coefficient = router_coefficient(trainer.engine.module, train.router_aux_loss_coef)
    trainer = replace(trainer, objective=balanced(trainer.objective, coefficient))
    checkpoints = Checkpoints(trainer.directory, ranks, train.save_total_limit)
    resumed = checkpoints.load(trainer.engine)
    if resumed is None:
        trainer.prepare()
    else:
        ranks.on_main(lambda: keeping.refuse_lost_best(trainer.shelf, resumed[0]))
        say_resumed(trainer, resumed[0])
    fresh = State(step=0, world=ranks.world, began=ranks.world)
    state, interval, memory = resumed or (fresh, Interval(Metrics()), {})
    settings = flatten(trainer.settings.model_dump(), ".")
    cut = {key: settings[key] for key in going_on.CUT}
    state = replace(state, of=trainer.max_steps, world=ranks.world, began=state.began or state.world, cut=cut)
    trainer.windows.load_state_dict(memory)
    log = RunLog(
        trainer.directory,
        flatten(trainer.settings.model_dump()),
        resume_step=state.step,
        enabled=ranks.main,
        total_steps=trainer.max_steps,
        description="/".join(trainer.directory.parts[-2:]),
    )
    # results.json comes last: a stage with one is done, and its checkpoints may go
    state = take_steps(trainer, state, interval, log, checkpoints)
    best = keeping.keeps_best(trainer.shelf, state)
    numbers = results(state, best, trainer.max_steps)
    keeping.keep(trainer.shelf, best, numbers)
    log.finish(numbers)
    log.close()
    ranks.barrier()
    checkpoints.drop(keep_last=train.keep_checkpoint)


def say_resumed(trainer: Trainer, state: State) -> None:
    """From which step training goes on; and, where it is to be longer than it was, what its rate does."""
    logger.info(f"{trainer.directory}: goes on from step {state.step} of {trainer.max_steps}")
    if state.step and state.of not in (0, trainer.max_steps):
        logger.info(lengthened(state.step, state.of, trainer.max_steps, trainer.settings.optimizer))


def take_steps(trainer: Trainer, state: State, interval: Interval, log: RunLog, checkpoints: Checkpoints) -> State:
    """Train from `state.step` to the last step; evaluate, log, save and keep the best weights on the way.

    Raises PreemptedError after SIGTERM, and UserError where a loss or gradient is not finite and train.non_finite is
    stop; the state, or the one before that step, is saved.
    """
    ranks, train = trainer.engine.ranks, trainer.settings.train
    before, began, last = state.seconds, time.monotonic(), trainer.max_steps

    def save() -> None:
        seconds = before + time.monotonic() - began
        memory = trainer.windows.state_dict(state.step)
        checkpoints.save(trainer.engine, replace(state, seconds=seconds), interval, memory)

    received: list[int] = []  # SIGTERMs, which then end nothing
    with handled(lambda number, frame: received.append(number), [signal.SIGTERM]):
        if state.step == 0:
            state, values = evaluate(trainer, state, log)
            log.scalars(0, values)
        while state.step < last:
            stopping.reached(state.step, last)
            # one rank's signal stops all, or the others would wait for it
            if ranks.any(bool(received)):
                save()
                raise PreemptedError(f"stopped by SIGTERM after step {state.step} of {last}, which is saved")
            if (trouble := one_step(trainer, state.step, interval)) is not None and train.non_finite == "stop":
                save()
                raise UserError(f"{trouble}; train.non_finite=skip goes on without such steps")
            state = replace(state, step=state.step + 1)
            values = {}
            if due(state.step, train.logging_steps, last):
                values |= summary(ranks, interval, state.num_tokens)
                state = replace(state, num_tokens=int(values["train/num_tokens"]))
            if due(state.step, trainer.eval_steps, last):
                state, scalars = evaluate(trainer, state, log)
                values |= scalars
            if values:
                log.scalars(state.step, values)
            at_end = last if train.keep_checkpoint or train.save_steps else None
            if due(state.step, train.save_steps, at_end):
                save()
    stopping.reached(state.step, last)
    return replace(state, seconds=before + time.monotonic() - began)


def one_step(trainer: Trainer, step: int, interval: Interval) -> str | None:
    """Forward and backward over the window of `step`, then one optimizer step.

    Returns what was not finite and on which rows, where anything was; the optimizer has then not stepped, on any rank.
    """
    began, engine, ranks = time.monotonic(), trainer.engine, trainer.engine.ranks
    window = trainer.windows.at(step)
    n_terms = ranks.all_sum(trainer.objective.terms(window))
    engine.train()
    done, metrics = [], Metrics()
    metrics.add(of_training(of_all(trainer.windows.stats, ranks.world)))
    for place, (batch, output, rest) in enumerate(forwards(engine, trainer.objective, window)):
        total, stats = rest()
        # an infinite constant has a finite gradient: let the norm, which all ranks share, tell of it
        known = torch.where(total.detach().isfinite(), 1.0, math.nan)
        engine.backward(total * known, n_terms, last=place == len(window) - 1)
        done.append(Micro(batch, (output if isinstance(output, Tensor) else output[0]).detach(), total.detach()))
        metrics.add(of_training(stats))
    rate = learning_rate(step, trainer.max_steps, trainer.settings.optimizer)
    norm = engine.step(rate)
    trouble = None
    # under fp16 a skipped step only finds its loss scale
    if not math.isfinite(norm) and trainer.settings.train.precision != "fp16":
        trouble = trace(trainer.directory, ranks, trainer.windows.items, step + 1, done, norm)
        if trainer.settings.train.non_finite == "stop":
            return trouble
        logger.warning(f"{trouble}; left out")
    if math.isfinite(norm):
        interval.metrics.add(metrics.stats)
    interval.add(step_stats(window, trainer.model.packing, norm, rate, ranks), time.monotonic() - began)
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


def of_all(stats: Mapping[str, Stat], world: int) -> dict[str, Stat]:
    """This rank's part of what is the same on every rank: added up over them, each step counts once."""
    return {name: Stat(kind, sums / world) for name, (kind, sums) in stats.items()}


def step_stats(window: Sequence[Batch], packing: Packing, norm: float, rate: float, ranks: Ranks) -> dict[str, Stat]:
    """What the loop itself knows of a step; a norm that is not finite is not counted, its step is.

    The means over the interval are those per step, of tokens over all ranks, whatever number of ranks took which step.
    """
    learned = sum(int(batch.response_mask.sum()) for batch in window)
    read = sum(int(batch.input_mask.sum()) for batch in window)
    finite = math.isfinite(norm)
    shared = {"train/learning_rate": rate, "train/skipped_fraction": 1.0 - finite}
    shared |= {"train/grad_norm": norm} if finite else {}
    own = {"train/learned_tokens": learned, "perf/tokens": read}
    rows = {name: [1.0 / ranks.world, x / ranks.world, x * x / ranks.world] for name, x in shared.items()}
    rows |= {name: [1.0 / ranks.world, x, x * x] for name, x in own.items()}
    rows = {"train/grad_norm": [0.0, 0.0, 0.0], **rows}
    if not packing.unpadded:
        computed, wasted = padding(window, packing.apart)
        rows["perf/padding_fraction"] = [computed, wasted, wasted]
    return {
        name: Stat("mean", torch.tensor(row, dtype=torch.float64, device=ranks.device)) for name, row in rows.items()
    }


def padding(window: Sequence[Batch], apart: bool) -> tuple[int, int]:
    """Tokens that are computed, and those of them that are padding or in fillers; of responses too if apart."""
    masks = [(batch, mask) for batch in window for mask in (batch.input_mask, batch.response_mask)[: 1 + apart]]
    computed = sum(mask.numel() for _, mask in masks)
    return computed, computed - sum(int(mask.sum()) for batch, mask in masks if batch.items)


def summary(ranks: Ranks, interval: Interval, tokens: int) -> dict[str, float]:
    """The interval over all ranks, with rates; `tokens` were read before it. learned_tokens are those of one step."""
    steps = interval.steps
    values, seconds = interval.close(ranks.all_sum)
    read = values.pop("perf/tokens")
    values["train/num_tokens"] = tokens + round(read * steps)  # since the start, prompts too, as TRL counts
    values |= {"perf/tokens_per_second": read / seconds, "perf/step_seconds": seconds}
    if ranks.device.type == "cuda":
        values["perf/peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return values


def evaluate(trainer: Trainer, state: State, log: RunLog) -> tuple[State, dict[str, float]]:
    """Evaluate; export the weights to best/ if they are the best so far."""
    trainer.engine.train(False)
    evaluation = trainer.evaluate(state.step)
    for tag, values in evaluation.histograms.items():
        log.histogram(tag, values, state.step)
    log.samples(state.step, list(evaluation.samples))
    log.held_out(state.step, evaluation.held_out)
    scalars = dict(evaluation.scalars)
    return keeping.offer(trainer.shelf, replace(state, last_seen=scalars)), scalars


def results(state: State, best: bool, steps: int) -> dict[str, Any]:
    """The stage's final numbers: those of the weights that became model/."""
    seen: Mapping[str, float] = state.best_seen if best else state.last_seen
    step = state.best_step if best else state.step
    return {**seen, "model_step": step, "steps": steps, "seconds": round(state.seconds, 1)}
