"""Which weights a training keeps, and on the disk once: best/ on the way, last/ and model/ at the end."""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.config.schema import Training
from pipeline.errors import UserError
from pipeline.files import CARD, write_text
from pipeline.models import card, writing
from pipeline.trainer.checkpoint import State, gigabytes
from pipeline.trainer.facts import facts_of
from pipeline.trainer.model import Model

logger = logging.getLogger("tiffin")


@dataclass(frozen=True)
class BestMetric:
    """The evaluation scalar that chooses the best weights; an evaluation without it does not know their worth."""

    tag: str
    larger_is_better: bool

    def better(self, value: float, best: float | None) -> bool:
        if math.isnan(value):
            return False
        return best is None or (value > best if self.larger_is_better else value < best)


@dataclass(frozen=True)
class Shelf:
    """Where a training keeps which weights, and what of."""

    model: Model
    settings: Training
    directory: Path
    metric: BestMetric
    last_step: int
    asked: bool  # whether the rows have prompts


def refuse_lost_best(shelf: Shelf, state: State) -> None:
    """Raises UserError where the best weights so far, which may be those to keep, were removed by hand.

    Those that a kill left set aside are put back.
    """
    best = shelf.directory / "best"
    if not best.is_dir() and (before := writing.set_aside(best)).is_dir():
        os.replace(before, best)
    if shelf.settings.train.keep == "best" and state.best_step is not None and not best.is_dir():
        raise UserError(
            f"{best}: is gone, and the weights of step {state.best_step} in it are the best so far: put it back "
            "(model/ is a copy of it where the stage had ended), or choose another run= or name="
        )


def offer(shelf: Shelf, state: State) -> State:
    """Export the weights to best/ if they are the best so far, and train.best_steps lets them be written.

    Where train.keep is last, nothing would become of best/, and it is not written.
    """
    value = state.last_seen.get(shelf.metric.tag, math.nan)
    if shelf.settings.train.keep == "last" or not shelf.metric.better(value, state.best):
        return state
    if not may_keep(shelf, state):
        return missed(shelf, state, value)
    shelf.model.export(best := shelf.directory / "best", shelf.asked)
    if state.best is None and shelf.model.ranks.main:
        often = shelf.settings.train.best_steps
        bound = "train.best_steps bounds that" if often is None else f"at most once in {often:,} steps"
        logger.info(f"{best}: {gigabytes(best)} on the disk, written anew at each better evaluation ({bound})")
    return replace(state, best=value, best_step=state.step, best_seen=state.last_seen)


def may_keep(shelf: Shelf, state: State) -> bool:
    """Whether train.best_steps lets best/ be written now: long enough after the last time, or at the last step."""
    often = shelf.settings.train.best_steps
    due_again = often is None or state.best_step is None or state.step - state.best_step >= often
    return due_again or state.step == shelf.last_step


def missed(shelf: Shelf, state: State, value: float) -> State:
    """The state after a better evaluation whose weights are not kept, which is said."""
    logger.info(
        f"step {state.step}: {shelf.metric.tag} {value:.6g} is better than {state.best:.6g}, but best/ stays "
        f"that of step {state.best_step} (train.best_steps={shelf.settings.train.best_steps})"
    )
    best_missed = state.missed is None or shelf.metric.better(value, state.missed)
    return replace(state, missed=value, missed_step=state.step) if best_missed else state


def keeps_best(shelf: Shelf, state: State) -> bool:
    """Whether model/ becomes the best weights, not the last: never where it is not known what the last are worth."""
    if shelf.settings.train.keep == "last":
        return False
    known = shelf.metric.tag in state.last_seen
    if not known:
        logger.warning(
            f"train.keep: best, but {shelf.metric.tag} of the last weights is not known, so that no others can "
            "be called better: the last are kept"
        )
    if known and state.missed is not None and shelf.metric.better(state.missed, state.best):
        logger.warning(
            f"model/ is of step {state.best_step}, {shelf.metric.tag} {state.best:.6g}; that of step "
            f"{state.missed_step} was better, {state.missed:.6g}, and was not kept (train.best_steps)"
        )
    return known and state.best_step is not None


def keep(shelf: Shelf, best: bool, numbers: Mapping[str, Any]) -> None:
    """Export the last weights to last/, and let model/ be best/ or last/, with a card. `numbers`: see `results`.

    Nothing is written twice: where the last weights are the best, last/ is made of the files of best/.
    """
    if not (best and numbers["model_step"] == numbers["steps"]):
        shelf.model.export(shelf.directory / "last", shelf.asked)
    elif shelf.model.ranks.main:
        shutil.rmtree(shelf.directory / "last", ignore_errors=True)
        linked(shelf.directory / "best", part := shelf.directory / "last.part")
        os.replace(part, shelf.directory / "last")
    if shelf.model.ranks.main:
        chosen = shelf.directory / ("best" if best else "last")
        linked(chosen, part := shelf.directory / "model.part")
        facts = facts_of(shelf.settings, shelf.model, shelf.directory, numbers, shelf.asked)
        write_text(part / CARD, card.text(facts))
        shutil.rmtree(shelf.directory / "model", ignore_errors=True)
        os.replace(part, shelf.directory / "model")
    shelf.model.ranks.barrier()


def linked(chosen: Path, part: Path) -> None:
    """Make `part` a directory with the files of `chosen`."""
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(chosen, part, copy_function=link_or_copy)


def link_or_copy(source: str, target: str) -> None:
    """A second name for the same bytes, so that weights are on the disk once; a copy where links are not to be had."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
