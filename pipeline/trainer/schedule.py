"""The schedule of a training: how many steps, what each draws, the learning rate, what is due at a step."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

from pipeline.config.schema import Training
from pipeline.config.sections import OptimizerSettings
from pipeline.data.batching import Draw, Packing, lengths
from pipeline.data.sampling import epoch_rows, epochs_by_length, step_budget
from pipeline.records import Item

FEW = 10  # optimizer steps that are too few to teach much

logger = logging.getLogger("tiffin")


def steps_for(settings: Training, rows: int, kept: float = 1.0) -> int:
    """Optimizer steps of the run: max_steps, or as many as num_train_epochs of `rows` need, at least 1.

    Of these the share `kept`, in (0, 1], and a word where that leaves few of them.
    """
    train = settings.train
    given = train.max_steps or max(1, math.ceil(rows * train.num_train_epochs / train.batch_size))
    steps = step_budget(given, kept)
    if steps < given:
        logger.info(f"{steps:,} of {given:,} steps, for the rows that are kept (scale_steps=false takes all)")
    if steps < FEW and steps != train.max_steps:
        logger.warning(few(settings, rows, kept, steps))
    if (warmup := warmup_steps(steps, settings.optimizer)) > steps:
        found = f"optimizer.warmup_steps: {warmup:,}, but there are {steps:,} steps in all"
        logger.warning(f"{found}, so that the rate never reaches {settings.optimizer.learning_rate:g}")
    return steps


def few(settings: Training, rows: int, kept: float, steps: int) -> str:
    """Of a training of less than FEW `steps`, which nobody asked for: how few they are, and what makes FEW of them."""
    train = settings.train
    found = f"only {steps} optimizer step{'s' * (steps > 1)} in all, which will teach little"
    if train.max_steps is not None:
        return f"{found}: set max_steps={math.ceil(FEW / kept)}, or more"
    epochs = math.ceil(FEW * train.batch_size / (rows * kept))
    of = f"{round(rows * kept):,} rows, num_train_epochs={train.num_train_epochs:g}, batch_size={train.batch_size}"
    return f"{found} ({of}): num_train_epochs={epochs} makes {FEW} of them, a smaller batch_size= more"


def epochs(rows: int, batch_size: int, seed: int) -> Draw:
    """Every row once per epoch, in a new order each; epochs follow one another without a gap."""
    return lambda step: epoch_rows(rows, batch_size, step, seed)


def epochs_of(items: Sequence[Item], packing: Packing, settings: Training) -> Draw:
    """As `epochs` of the items' rows; with train.group_by_length those of like length are in one step."""
    train = settings.train
    if not train.group_by_length:
        return epochs(len(items), train.batch_size, settings.seed)
    return epochs_by_length(lengths(items, packing), train.batch_size, settings.seed)


def learning_rate(step: int, max_steps: int, settings: OptimizerSettings) -> float:
    """The rate of `step`, counted from 0: linear warm-up, then what lr_scheduler_type says, down to min_lr_ratio of it.

    No step has the rate 0, for it would teach nothing: of n steps of warm-up the first has 1/n of the rate.
    """
    warmup = warmup_steps(max_steps, settings)
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    falls_from = warmup
    if settings.lr_scheduler_type == "warmup_stable_decay":
        falls_from = max(warmup, max_steps - _share(max_steps, settings.decay_ratio))
    progress = max(0, step - falls_from) / max(1, max_steps - falls_from)
    linear, cosine = 1.0 - progress, 0.5 * (1.0 + math.cos(math.pi * progress))
    factors = {"constant": 1.0, "linear": linear, "warmup_stable_decay": linear, "cosine": cosine}
    floor = settings.min_lr_ratio
    return settings.learning_rate * (floor + (1.0 - floor) * factors[settings.lr_scheduler_type])


def warmup_steps(max_steps: int, settings: OptimizerSettings) -> int:
    """The steps whose rate rises: as many as are given, or a share of all."""
    if settings.warmup_steps is not None:
        return settings.warmup_steps
    return _share(max_steps, settings.warmup_ratio)


def _share(steps: int, ratio: float) -> int:
    return math.ceil(round(steps * ratio, 9))  # 140 x 0.05 is 7, not 7.000000000000001


def shape_of(settings: OptimizerSettings) -> str:
    """The settings that give the rate its course, in words."""
    given = settings.warmup_steps
    warmup = f"warmup_ratio={settings.warmup_ratio:g}" if given is None else f"warmup_steps={given}"
    words = [settings.lr_scheduler_type, warmup]
    if settings.lr_scheduler_type == "warmup_stable_decay":
        words.append(f"optimizer.decay_ratio={settings.decay_ratio:g}")
    if settings.min_lr_ratio:
        words.append(f"min_lr_ratio={settings.min_lr_ratio:g}")
    return ", ".join(words)


def lengthened(step: int, before: int, now: int, settings: OptimizerSettings) -> str:
    """What a training that goes on after `step`, of `now` steps instead of `before`, does with its rate."""
    last, following = learning_rate(step - 1, before, settings), learning_rate(step, now, settings)
    return (
        f"{now:,} steps in place of {before:,}: the learning rate follows its schedule over all of them "
        f"({shape_of(settings)}): step {step:,} had {last:.3g}, step {step + 1:,} has {following:.3g}"
    )


def due(step: int, every: int | None, last: int | None) -> bool:
    """Whether something that happens `every` so many steps, and at the `last` if one is given, happens at `step`."""
    return step == last or (every is not None and step % every == 0)
